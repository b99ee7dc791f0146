"""Where the platform is, and with which key."""

from pathlib import Path

import pytest
from lepton.endpoint import find_endpoint
from lepton.errors import (
    Invalid,
    Unauthenticated,
    Unreachable,
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local platform's folder, and nothing in the environment but that."""
    (tmp_path / "platform.json").write_text('{"url": "http://127.0.0.1:9000/"}')
    (tmp_path / "key").write_text("lp_local\n")
    monkeypatch.setenv("LEPTON_HOME", str(tmp_path))
    monkeypatch.delenv("LEPTON_URL", raising=False)
    monkeypatch.delenv("LEPTON_API_KEY", raising=False)
    return tmp_path


def test_the_local_platform_is_found_with_its_key(home: Path) -> None:
    found = find_endpoint()
    assert (found.url, found.key) == ("http://127.0.0.1:9000", "lp_local")


def test_arguments_win_over_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_URL", "https://a.example")
    monkeypatch.setenv("LEPTON_API_KEY", "lp_env")
    assert (find_endpoint().url, find_endpoint().key) == ("https://a.example", "lp_env")
    found = find_endpoint("http://b.example", "lp_given")
    assert (found.url, found.key) == ("http://b.example", "lp_given")


def test_a_key_read_with_its_line_break_is_the_key(home: Path) -> None:
    assert find_endpoint(key="lp_given\n").key == "lp_given"
    with pytest.raises(Unauthenticated, match="line break"):
        find_endpoint(key="lp_given\nKeep it now")


def test_the_local_key_is_sent_to_no_other_platform(home: Path) -> None:
    assert find_endpoint("https://elsewhere.example").key is None
    assert "lp_local" not in repr(find_endpoint())


def test_where_nothing_was_started_there_is_a_hint_and_no_guess(home: Path) -> None:
    (home / "platform.json").unlink()
    with pytest.raises(Unreachable, match=r"No platform was started here yet\.\nStart it with `lepton up`"):
        find_endpoint()


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8080", "http://"])
def test_what_is_no_url_is_invalid(url: str) -> None:
    with pytest.raises(Invalid, match="not a platform's URL"):
        find_endpoint(url)
