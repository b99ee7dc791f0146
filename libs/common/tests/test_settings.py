import os
from pathlib import Path

import pytest
from lepton_common.settings import Settings


class WorkerSettings(Settings):
    blobs: Path
    """folder or URL of the artifacts"""
    cache_bytes: int = 1024


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LEPTON_")]:
        monkeypatch.delenv(name)


def test_defaults_hold_without_any_variable() -> None:
    settings = Settings.read()
    assert (settings.host, settings.port, settings.log_level, settings.drain_s) == ("127.0.0.1", 0, "info", 10.0)


def test_variables_override_defaults_and_empty_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_PORT", "8080")
    monkeypatch.setenv("LEPTON_ETCD", "")
    monkeypatch.setenv("LEPTON_BLOBS", "/blobs")
    settings = WorkerSettings.read()
    assert (settings.port, settings.etcd, settings.blobs) == (8080, "127.0.0.1:2379", Path("/blobs"))


def test_every_wrong_variable_is_named_with_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_PORT", "70000")
    monkeypatch.setenv("LEPTON_LOG_LEVEL", "loud")
    monkeypatch.setenv("LEPTON_OTLP", "collector:4318")
    with pytest.raises(SystemExit) as stopped:
        WorkerSettings.read()
    lines = sorted(str(stopped.value).splitlines())
    assert [line.split(":")[0] for line in lines] == [
        "LEPTON_BLOBS is not set",
        "LEPTON_LOG_LEVEL is 'loud'",
        "LEPTON_OTLP is 'collector",
        "LEPTON_PORT is '70000'",
    ]
    assert lines[0].endswith("expected folder or URL of the artifacts")
    assert "port to listen on" in lines[3]
    assert "65535" in lines[3]


def test_a_password_is_neither_in_repr_nor_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_POSTGRES_DSN", "postgresql://lepton:hunter2@db/lepton")
    assert "hunter2" not in repr(Settings.read())
    monkeypatch.setenv("LEPTON_POSTGRES_DSN", "mysql://lepton:hunter2@db/lepton")
    with pytest.raises(SystemExit) as stopped:
        Settings.read()
    assert str(stopped.value).startswith("LEPTON_POSTGRES_DSN is a value not shown here: expected PostgreSQL")
    assert "hunter2" not in str(stopped.value)
