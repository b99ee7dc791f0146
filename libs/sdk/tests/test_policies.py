"""The published schema of a policy."""

import json
from pathlib import Path

import jsonschema_rs
import pytest
from lepton.policies import PRESETS, Policy

PUBLISHED = Path(__file__).parents[3] / "docs" / "policy.schema.json"


def test_the_published_schema_is_the_policys() -> None:
    assert json.loads(PUBLISHED.read_text()) == Policy.model_json_schema(), (
        "`lepton policy schema > docs/policy.schema.json` publishes it anew"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_by_the_published_schema(preset: str) -> None:
    assert jsonschema_rs.is_valid(json.loads(PUBLISHED.read_text()), PRESETS[preset].model_dump(mode="json"))
