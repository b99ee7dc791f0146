"""The published AsyncAPI document: up to date, valid by the official schema, and true of real events."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from lepton_common.asyncapi import ANSWERED, ASKED, document
from lepton_common.events import types
from lepton_common.topics import FOREIGN

PUBLISHED = Path(__file__).parents[3] / "docs" / "asyncapi.json"
# Of @asyncapi/specs 6.11.1 on npm; its licence and ours are the same.
OFFICIAL = json.loads(gzip.decompress((Path(__file__).parent / "asyncapi" / "3.0.0.json.gz").read_bytes()))
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))

DOCUMENT = document()
INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0.5]}


def payload(name: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": DOCUMENT["components"]["schemas"]}},
    )


def test_the_published_document_is_todays() -> None:
    assert json.loads(PUBLISHED.read_text()) == DOCUMENT, (
        "`.venv/bin/python -m lepton_common.asyncapi > docs/asyncapi.json` publishes it anew"
    )


def test_it_is_valid_by_the_official_schema_which_notices_mistakes() -> None:
    official = jsonschema_rs.validator_for(OFFICIAL)
    assert [error.message for error in official.iter_errors(DOCUMENT)] == []
    wrong: dict[str, Any] = copy.deepcopy(DOCUMENT)
    wrong["operations"]["tell-lepton.models"]["action"] = "publish"
    assert not official.is_valid(wrong)


def test_every_event_and_everything_that_may_be_asked_for_is_in_it_once() -> None:
    told = [name for channel in DOCUMENT["channels"].values() for name in channel["messages"]]
    assert sorted(told) == sorted(each.__name__ for each in (*types(), *ASKED.values(), *ANSWERED))
    assert ASKED.keys() == {topic.name for topic in FOREIGN}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_events_are_as_the_document_says(path: Path) -> None:
    golden = json.loads(path.read_text())
    kind = golden["headers"]["ce_type"]
    assert [error.message for error in payload(kind).iter_errors(golden["value"])] == []
    headers = jsonschema_rs.validator_for(DOCUMENT["components"]["messages"][kind]["headers"])
    assert [error.message for error in headers.iter_errors(golden["headers"])] == []


@pytest.mark.parametrize(
    ("name", "data", "is_valid"),
    [
        ("Ingest", {"model": "digits", "sha256": "a" * 64, "policy": "careful"}, True),
        ("Ingest", {"model": "digits", "uri": "https://a/b", "policy": {"strategy": "immediate"}}, True),
        ("Ingest", {"model": "digits", "uri": "https://a/b", "policy": "unheard-of"}, False),
        ("Ingest", {"model": "Digits"}, False),
        ("Label", {"request": "r1", "label": "fraud"}, True),
        ("Label", {"key": "k", "label": [1, 0.5, True]}, True),
        ("Label", {"request": "r1", "label": {"a": 1}}, False),
        ("InferenceRequest", {"model": "digits", "inputs": [INPUT], "timeout_ms": 500, "ordered": True}, True),
        ("InferenceRequest", {"inputs": [INPUT]}, False),
        ("InferenceAnswered", {"model_name": "digits", "outputs": [INPUT]}, True),
        ("InferenceFailed", {"error": "no model 'digits'"}, True),
    ],
)
def test_what_may_be_asked_for_is_as_the_document_says(name: str, data: dict[str, Any], is_valid: bool) -> None:
    assert payload(name).is_valid(data) is is_valid
