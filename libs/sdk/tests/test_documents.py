"""Files that people write: what they are read as, and how a mistake in them is told."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton.documents import read_documents, to_yaml
from lepton.errors import Invalid
from lepton.policies import PRESETS, Policy

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=20)
    | st.sampled_from(["22:00", "no", "1e3", "0x1F", "2026-01-02", "~", "null", "yes", "on", "=", "1_000", "- a", "#"])
)
_NAMES = st.sampled_from(["a", "no", "22:00", "b c"])
_CONTENT = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=8,
)


def read(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    (document,) = read_documents(path)
    return document.parsed(Policy, "policy")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_written_down_is_read_as_itself(tmp_path: Path, preset: str) -> None:
    policy = PRESETS[preset]
    assert read(tmp_path, to_yaml(policy.model_dump(mode="json"))) == policy
    assert read(tmp_path, json.dumps(policy.model_dump(mode="json"), indent=2)) == policy


@settings(max_examples=50)
@given(content=st.dictionaries(_NAMES, _CONTENT, max_size=3))
def test_whatever_is_written_is_read_back_as_it_was(
    content: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(to_yaml(content), encoding="utf-8")
    (document,) = read_documents(path)
    assert document.content == content


def test_times_and_dates_need_no_quotes(tmp_path: Path) -> None:
    policy = read(
        tmp_path, "freeze:\n  - {start: 22:00, end: 06:00, first: 2026-12-20, days: [fri, sat], reason: no}\n"
    )
    (freeze,) = policy.freeze
    assert (freeze.start.hour, freeze.end.hour, f"{freeze.first}", freeze.reason) == (22, 6, "2026-12-20", "no")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "dwell_s: 5\nstrategy: canry\n",
            2,
            "`strategy`: expected 'immediate', 'canary', 'blue-green', 'shadow' or 'ab'",
        ),
        ("dwell: 5\n", 1, "a policy has no field `dwell`"),
        (
            "judge:\n  errors:\n    margin: 0.5\n",
            3,
            "`judge.errors.margin`: expected greater than or equal to 1, not 0.5",
        ),
        ("steps: [5, 1]\n", 1, "steps must grow: 5, 1"),
        ("steps:\n  - 1\n  - {percent: 5, aproval: true}\n", 3, "a policy has no field `steps[1].aproval`"),
        ("steps:\n  - 1\n  - 250\n", 3, "`steps[1]`: expected less than or equal to 100, not 250"),
        ("steps:\n  - some\n", 2, "`steps[0]`: expected a valid number, not 'some'"),
        ("match:\n  - header: x-beta\n", 2, "`match[0].value` is missing"),
        ("freeze:\n  - timezone: Europe/Zurch\n", 2, "`freeze[0].timezone`: 'Europe/Zurch' is not a time zone"),
        ('{"dwell_s": 5,\n "bake_s": "long"}', 2, "`bake_s`: expected a valid number, not 'long'"),
        ("dwell_s: 5\ndwell_s: 6\n", 2, "'dwell_s' is there twice"),
        ("steps: [5\ndwell_s: 1\n", 2, "expected ',' or ']'"),
    ],
)
def test_a_mistake_is_told_with_its_line_its_field_and_what_was_expected(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    with pytest.raises(Invalid) as raised:
        read(tmp_path, text)
    message = raised.value.message
    assert f"policy.yaml, line {line}: " in message
    assert said in message
    assert len(message.splitlines()) == 1, "one mistake, one line"


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as raised:
        read(tmp_path, "strategy: canry\ndwell_s: -1\nbake: 3\n")
    assert [line.partition("line ")[2][0] for line in raised.value.message.splitlines()] == ["1", "2", "3"]


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text\n", "3\n"])
def test_what_is_no_mapping_is_no_policy(tmp_path: Path, text: str) -> None:
    with pytest.raises(Invalid, match="is not a policy: expected fields and values"):
        read(tmp_path, text)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Invalid, match="not text in UTF-8"):
        read_documents(path)
    path.write_bytes(b"a" * 1_000_001)
    with pytest.raises(Invalid, match="larger than 1000 kB"):
        read_documents(path)


def test_tags_build_no_objects(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="could not determine a constructor"):
        read(tmp_path, "strategy: !!python/object/apply:os.getcwd []\n")
