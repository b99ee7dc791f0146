"""The registry's rules."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from lepton_common.errors import Conflict, Forbidden, Invalid, NotFound
from lepton_common.events import Batching, ModelCreated, RolloutFinished, VersionRegistered
from lepton_common.records import KeyRecord, Scope
from lepton_common.signature import Signature, TensorSpec
from lepton_registry.domain import (
    Artifact,
    Model,
    Push,
    VersionState,
    check_new_key,
    check_operator,
    entry,
    managed_tenant,
    next_version,
    registered,
    state_after,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SHA = "a" * 64
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),))


def test_versions_count_up_and_are_told_with_all_that_a_worker_needs() -> None:
    model = Model("acme", "digits", latest_version=2, aliases={}, created_at=NOW)
    artifact = Artifact("acme", SHA, 10, "onnx", SIGNATURE, NOW)
    push = Push(Batching(max_rows=8), {"accuracy": 0.9}, {"team": "a"}, actor="ci", at=NOW)
    version = next_version(model, artifact, push)
    assert (version.version, version.sha256, version.state) == (3, SHA, VersionState.REGISTERED)
    told = registered(version, deploy=False)
    assert (told.version, told.sha256, told.size_bytes, told.format) == (3, SHA, 10, "onnx")
    assert (told.batching.max_rows, told.deploy, told.actor) == (8, False, "ci")


def test_admin_manages_its_own_tenant_and_the_operator_all() -> None:
    assert managed_tenant("acme", None) == "acme"
    assert managed_tenant("acme", "acme") == "acme"
    assert managed_tenant("default", "acme") == "acme"
    with pytest.raises(NotFound):
        managed_tenant("acme", "other")
    with pytest.raises(NotFound):
        managed_tenant("acme", "default")
    check_operator("default")
    with pytest.raises(Forbidden):
        check_operator("acme")


def test_key_may_not_be_born_dead_or_share_a_name() -> None:
    held = KeyRecord(id="1", prefix="lp_", tenant="acme", name="ci", scopes=frozenset({Scope.READ}), created_at=NOW)
    check_new_key("laptop", NOW + timedelta(seconds=1), [held], NOW)
    with pytest.raises(Invalid, match="expires_at"):
        check_new_key("laptop", NOW, [held], NOW)
    with pytest.raises(Conflict, match="'ci' exists"):
        check_new_key("ci", None, [held], NOW)


def test_only_a_promoted_rollout_leaves_a_version_promoted() -> None:
    assert state_after("promoted") is VersionState.PROMOTED
    assert state_after("failed") is VersionState.FAILED
    assert state_after("rolled_back") is VersionState.FAILED


def test_entry_tells_who_why_and_on_what_grounds() -> None:
    rollout = uuid4()
    event = RolloutFinished(
        tenant="acme", model="digits", rollout=rollout, version=2, outcome="failed", reason="no worker", previous=1
    )
    told = entry(event)
    assert (told.id, told.type, told.version, told.reason) == (event.id, "RolloutFinished", 2, "no worker")
    assert told.evidence == {"rollout": str(rollout), "outcome": "failed", "previous": 1}
    registered = VersionRegistered(tenant="acme", model="digits", version=1, sha256=SHA, size_bytes=3, actor="ci")
    assert entry(registered).actor == "ci"
    assert entry(registered).evidence["sha256"] == SHA
    assert entry(ModelCreated(tenant="acme", model="digits")).version is None
