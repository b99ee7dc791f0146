"""The registry's rules."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from lepton import models as shapes
from lepton_common.errors import Conflict, Invalid
from lepton_common.events import (
    AccessEvent,
    Batching,
    MeshReturned,
    MeshTaken,
    ModelCreated,
    PolicySet,
    RolloutFinished,
    RolloutHeld,
    RolloutSteered,
    TrafficShifted,
    VersionRegistered,
    types,
)
from lepton_common.records import KeyLimits, KeyRecord, Scope
from lepton_common.signature import Signature, TensorSpec
from lepton_registry.domain import (
    Artifact,
    Model,
    Push,
    VersionState,
    check_new_key,
    entry,
    is_told,
    next_version,
    registered,
    replaced,
    state_after,
    successor,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SHA = "a" * 64
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),))


def test_versions_count_up_and_are_told_with_all_that_a_worker_needs() -> None:
    model = Model("acme", "digits", latest_version=2, aliases={}, created_at=NOW)
    artifact = Artifact("acme", SHA, 10, "onnx", SIGNATURE, NOW)
    push = Push(Batching(max_rows=8), {"accuracy": 0.9}, {"team": "a"}, actor="ci", at=NOW, deploy=False)
    version = next_version(model, artifact, push)
    assert (version.version, version.sha256, version.state) == (3, SHA, VersionState.REGISTERED)
    told = registered(version, push)
    assert (told.version, told.sha256, told.size_bytes, told.format) == (3, SHA, 10, "onnx")
    assert (told.batching.max_rows, told.deploy, told.actor) == (8, False, "ci")


HELD = KeyRecord(
    id="1" * 16, prefix="lp_abcdefgh", tenant="acme", name="ci", scopes=frozenset({Scope.READ}), created_at=NOW
)


def test_key_may_not_be_born_dead_or_share_a_name_or_open_more_than_it_says() -> None:
    laptop = HELD.model_copy(update={"name": "laptop"})
    wanted = laptop.model_copy(update={"expires_at": NOW + timedelta(seconds=1), "models": ("fraud-*",)})
    check_new_key(wanted, [HELD])
    for change, message in (
        ({"expires_at": NOW}, "expires_at"),
        ({"scopes": frozenset({Scope.ADMIN})}, "models"),
        ({"limits": KeyLimits(burst=3)}, "limits.burst"),
    ):
        with pytest.raises(Invalid, match=message):
            check_new_key(wanted.model_copy(update=change), [HELD])
    with pytest.raises(Conflict, match="'ci' exists"):
        check_new_key(HELD, [HELD])


def test_successor_has_the_same_rights_and_as_long_to_live() -> None:
    old = HELD.model_copy(update={"models": ("fraud-*",), "limits": KeyLimits(per_day=9)})
    assert successor(old, "2" * 16, "lp_b", NOW).expires_at is None
    mortal = old.model_copy(update={"expires_at": NOW + timedelta(days=30)})
    later = NOW + timedelta(days=29)
    new = successor(mortal, "2" * 16, "lp_b", later)
    assert new.expires_at == later + timedelta(days=30)
    same = {"name", "tenant", "scopes", "models", "limits"}
    assert new.model_dump(include=same) == mortal.model_dump(include=same)


def test_replaced_key_ends_after_the_overlap_and_never_later_than_it_would_have() -> None:
    soon, late = NOW + timedelta(hours=1), NOW + timedelta(days=3)
    assert replaced(HELD, "2" * 16, soon).expires_at == soon
    mortal = HELD.model_copy(update={"expires_at": soon})
    assert replaced(mortal, "2" * 16, late).expires_at == soon
    with pytest.raises(Conflict, match="was rotated before: 2222222222222222 has its place"):
        successor(replaced(HELD, "2" * 16, soon), "3" * 16, "lp_c", NOW)
    with pytest.raises(Conflict, match="expired"):
        successor(mortal, "3" * 16, "lp_c", soon)
    with pytest.raises(Conflict, match="LEPTON_BOOTSTRAP_KEY_SHA256"):
        successor(HELD.model_copy(update={"prefix": "lp_"}), "3" * 16, "lp_c", NOW)


def test_state_says_how_the_last_rollout_ended() -> None:
    ends = ("promoted", "rolled_back", "aborted", "failed", "an end of a later release")
    assert [state_after(each, in_production=False) for each in ends] == [
        VersionState.PROMOTED,
        VersionState.ROLLED_BACK,
        VersionState.ABORTED,
        VersionState.FAILED,
        VersionState.FAILED,
    ]


def test_version_in_production_stays_promoted() -> None:
    assert state_after("promoted", in_production=True) is VersionState.PROMOTED
    assert [state_after(each, in_production=True) for each in ("rolled_back", "aborted", "failed")] == [None] * 3


def test_states_are_those_that_the_api_tells() -> None:
    assert [*VersionState] == [*shapes.VersionState]


def test_story_is_of_what_was_decided_and_not_of_every_second() -> None:
    untold = {kind.__name__ for kind in types() if not is_told(kind) and not issubclass(kind, AccessEvent)}
    assert untold == {"InferenceWindow", "WindowClosed"}


def test_entry_tells_who_why_and_on_what_grounds() -> None:
    rollout = uuid4()
    event = RolloutFinished(
        tenant="acme", model="digits", rollout=rollout, version=2, outcome="failed", reason="no worker", previous=1
    )
    told = entry(event)
    assert (told.id, told.type, told.version, told.reason) == (event.id, "RolloutFinished", 2, "no worker")
    assert told.evidence == {"rollout": str(rollout), "outcome": "failed", "previous": 1, "evidence": {}}
    registered = VersionRegistered(tenant="acme", model="digits", version=1, sha256=SHA, size_bytes=3, actor="ci")
    assert entry(registered).actor == "ci"
    assert entry(registered).evidence["sha256"] == SHA
    assert entry(ModelCreated(tenant="acme", model="digits")).version is None


def test_entry_of_what_a_person_did_says_who_and_what() -> None:
    about = {"tenant": "acme", "model": "digits"}
    rollout = {**about, "rollout": uuid4(), "version": 2}
    held = entry(RolloutHeld.model_validate({**rollout, "reason": "approval", "page": True}))
    assert (held.version, held.actor, held.reason, held.evidence["page"]) == (2, "", "approval", True)
    steered = RolloutSteered.model_validate({**rollout, "command": "pause", "actor": "anna", "reason": "lunch"})
    told = entry(steered)
    assert (told.actor, told.reason, told.evidence["command"]) == ("anna", "lunch", "pause")
    shifted = TrafficShifted.model_validate({**rollout, "percent": 5, "reason": "step 1", "actor": "anna"})
    assert (entry(shifted).actor, entry(shifted).evidence["percent"]) == ("anna", 5.0)
    policy = entry(PolicySet.model_validate({**about, "policy": {"strategy": "shadow"}, "actor": "ci"}))
    assert (policy.version, policy.actor, policy.evidence) == (None, "ci", {"policy": {"strategy": "shadow"}})
    taken = entry(MeshTaken.model_validate({**about, "actor": "anna", "spec": {"hosts": ["m"]}}))
    assert (taken.actor, taken.evidence) == ("anna", {"spec": {"hosts": ["m"]}})
    returned = entry(MeshReturned.model_validate({**about, "actor": "anna"}))
    assert (returned.version, returned.actor, returned.evidence) == (None, "anna", {})
