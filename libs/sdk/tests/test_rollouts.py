"""Rollouts, limits, policies and the mesh from Python, blocking and async."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import onnx
import onnx.helper
import pytest
from lepton import AsyncClient, Client, Progress
from lepton.errors import Conflict, DeadlineExceeded, Invalid, NotFound, RolloutFailed
from lepton.models import ModelLimits
from lepton.policies import PRESETS, Policy, Strategy
from lepton.rollouts import Action, Member, Rollout, RolloutState

from libs.sdk.tests import stories
from libs.sdk.tests.conftest import Platform
from libs.sdk.tests.traffic import DEFAULT_LIMITS


@pytest.fixture
def versions(client: Client, platform: Platform, tmp_path: Path) -> None:
    """Versions 1, which serves, and 2 of `digits`."""
    for number in (1, 2):
        client.push(_model(tmp_path, number), name="digits", deploy=number == 1)


def _model(folder: Path, number: int) -> Path:
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [float(number)])
    value = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [1])
    path = folder / f"{number}.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "w", [], [value], [tensor])), path)
    return path


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("versions")
def test_a_rollout_starts_by_the_models_policy_a_preset_or_a_file(
    client: Client, platform: Platform, tmp_path: Path
) -> None:
    file = tmp_path / "slow.yaml"
    file.write_text("strategy: blue-green\ndwell_s: 5\n")
    for policy in (None, "fast", file, str(file), Policy(dwell_s=5)):
        client.start_rollout("digits", 2, policy=policy, force=True, together={"tokenizer": 4}, wait=True)
    sent = [each.policy for each in platform.started]
    blue_green = Policy(strategy=Strategy.BLUE_GREEN, dwell_s=5)
    assert sent == [None, "fast", blue_green, blue_green, Policy(dwell_s=5)]
    assert platform.started[0].together == [Member(model="tokenizer", version=4)]
    assert platform.started[0].force


@pytest.mark.usefixtures("versions")
def test_a_rollout_starts_as_soon_as_rollout_has_heard_of_the_version(client: Client, platform: Platform) -> None:
    platform.unheard = 2
    assert client.start_rollout("digits", 2).version == 2


def test_an_unknown_preset_is_told_with_the_known_ones(client: Client, platform: Platform) -> None:
    with pytest.raises(NotFound, match="no policy 'fats'") as raised:
        client.start_rollout("digits", 2, policy="fats")
    assert "immediate, fast, careful, shadow-first" in raised.value.hint
    assert platform.counted("POST") == 0


def test_a_wrong_file_starts_nothing(client: Client, platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"dwell_s": "long"}')
    with pytest.raises(Invalid, match=r"p\.json, line 1: `dwell_s`: expected a valid number, not 'long'"):
        client.start_rollout("digits", 2, policy=tmp_path / "p.json")
    (tmp_path / "two.yaml").write_text("dwell_s: 1\n---\ndwell_s: 2\n")
    with pytest.raises(Invalid, match="has 2 documents, expected one policy"):
        client.start_rollout("digits", 2, policy=tmp_path / "two.yaml")
    with pytest.raises(FileNotFoundError):
        client.start_rollout("digits", 2, policy=tmp_path / "none.yaml")
    assert not platform.requests


@pytest.mark.usefixtures("versions")
def test_a_push_takes_the_stored_policy_and_without_one_goes_live_at_once(
    client: Client, platform: Platform, tmp_path: Path
) -> None:
    client.push(_model(tmp_path, 3), name="digits")
    client.set_policy("digits", "fast")
    client.push(_model(tmp_path, 4), name="digits")
    assert [(each.version, each.policy) for each in platform.started] == [(3, "immediate"), (4, None)]
    assert platform.rollouts[0].policy == PRESETS["fast"]


# --- wait -------------------------------------------------------------------------------------------------------------


def test_waiting_tells_the_share_and_what_is_waited_for(client: Client, platform: Platform) -> None:
    seen: list[Progress] = []
    rollout = client.wait(platform.tell(stories.good()), progress=seen.append)
    assert rollout.state == RolloutState.PROMOTED
    assert [each.done for each in seen] == [0, 5, 25, 100]
    assert seen[2] == Progress("shifting", 25, 100, "proof of errors")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (RolloutState.ROLLED_BACK, "digits version 2 was taken back: too slow"),
        (RolloutState.ABORTED, "digits version 2 was given up: too slow"),
        (RolloutState.FAILED, "digits version 2 was not deployed: too slow"),
    ],
)
def test_a_rollout_that_does_not_get_there_raises_with_the_reason_and_the_next_step(
    client: Client, platform: Platform, state: RolloutState, said: str
) -> None:
    ended = stories.look(stories.GOOD, 2, state, 0, 1, reason="too slow")
    rollout = platform.tell(stories.Story((ended,), (), ()))
    with pytest.raises(RolloutFailed, match=said) as raised:
        client.wait(rollout)
    assert f"`lepton rollout explain {rollout.id}`" in raised.value.hint


def test_waiting_too_long_tells_how_it_stands_and_that_it_goes_on(client: Client, platform: Platform) -> None:
    story = stories.good()
    rollout = platform.tell(stories.Story(story.looks[2:3], (), ()))
    with pytest.raises(DeadlineExceeded, match=r"still shifting after 0 s, at 25 %: proof of errors") as raised:
        client.wait(rollout, timeout=0)
    assert "`lepton rollout watch digits`" in raised.value.hint


# --- steer ------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_steered_by_id_or_by_its_model(client: Client, platform: Platform) -> None:
    rollout = platform.tell(stories.good())
    client.pause_rollout("digits")
    client.resume_rollout(rollout.id)
    client.promote_rollout("digits", reason="the numbers are fine", full=True)
    client.approve_rollout(str(rollout.id), reason="seen")
    client.abort_rollout(str(rollout.id)[:8], reason="enough")
    client.retry_rollout("digits")
    commands = ["pause", "resume", "promote", "approve", "abort", "retry"]
    assert [command for command, _ in platform.steered] == commands
    assert (platform.steered[2][1].reason, platform.steered[2][1].full) == ("the numbers are fine", True)
    assert platform.steered[0][1].reason == "no reason given"


@pytest.mark.parametrize("command", ["promote", "abort", "approve"])
def test_what_needs_a_reason_is_not_sent_without_one(client: Client, platform: Platform, command: str) -> None:
    platform.tell(stories.good())
    steer: Callable[..., Rollout] = getattr(client, f"{command}_rollout")
    with pytest.raises(Invalid, match=f"To {command} a rollout needs a reason"):
        steer("digits", reason="")
    assert not platform.steered


def test_of_a_models_rollouts_the_one_under_way_is_meant_else_the_newest(client: Client, platform: Platform) -> None:
    def there(number: int, state: RolloutState) -> Rollout:
        look = stories.look(UUID(int=number), number, state, 0, 1)
        return platform.tell(stories.Story((look,), (), ()))

    old = there(1, RolloutState.PROMOTED)
    assert client.find_rollout("digits").id == old.id
    running = there(2, RolloutState.SHIFTING)
    there(3, RolloutState.QUEUED)
    assert client.find_rollout("digits").id == running.id
    with pytest.raises(NotFound, match="no rollout of 'letters'"):
        client.find_rollout("letters")


# --- look -------------------------------------------------------------------------------------------------------------


def test_decisions_windows_and_a_replay_are_told(client: Client, platform: Platform, tmp_path: Path) -> None:
    rollout = platform.tell(stories.bad())
    platform.looked[str(rollout.id)] = 2
    decisions = client.decisions(rollout.id)
    assert [each.action for each in decisions][-3:] == ["roll_back", "failing", "rolled_back"]
    assert decisions[3].gates[0].numbers["evidence"] == 41_250
    assert {each.version for each in client.rollout_windows(rollout.id)} == {2, 3}
    assert {each.version for each in client.windows("digits", version=3, since=stories.START)} == {3}
    assert "since=2026-01-02T03%3A04%3A05%2B00%3A00" in platform.requests[-1]
    (tmp_path / "p.yaml").write_text("dwell_s: 1")
    for policy in ("careful", tmp_path / "p.yaml"):
        assert client.replay(rollout.id, policy).outcome == Action.ROLL_BACK
    assert platform.replayed == [PRESETS["careful"], Policy(dwell_s=1)]


async def test_the_async_client_does_the_same(platform: Platform) -> None:
    platform.tell(stories.good())
    async with AsyncClient() as client:
        assert (await client.find_rollout("digits")).version == 2
        assert "fast" in (await client.policies()).presets
        assert (await client.pause_rollout("digits")).paused
        platform.stable["digits"] = 2
        assert (await client.set_limits("digits", timeout_ms=500)).limits.timeout_ms == 500
        assert (await client.unset_limits("digits")).limits == DEFAULT_LIMITS


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_are_set_as_a_whole_and_go_back_to_the_defaults(client: Client, platform: Platform) -> None:
    platform.stable["digits"] = 1
    assert client.serving("digits").limits == DEFAULT_LIMITS
    client.set_limits("digits", rate_per_s=0.5, burst=3)
    limits = client.set_limits("digits", max_concurrency=8).limits
    assert limits == ModelLimits(max_concurrency=8, timeout_ms=30_000)
    assert client.unset_limits("digits").limits == client.serving("digits").limits == DEFAULT_LIMITS


def test_a_limit_that_makes_no_sense_is_refused_by_name_before_it_is_sent(client: Client, platform: Platform) -> None:
    for name, value in (("rate_per_s", float("nan")), ("burst", 0), ("max_concurrency", -1), ("timeout_ms", 3_600_001)):
        limits: dict[str, Any] = {name: value}
        with pytest.raises(Invalid, match=f"^{name} "):
            client.set_limits("digits", **limits)
    assert platform.requests == []


# --- policies and the mesh --------------------------------------------------------------------------------------------


def test_a_policy_is_set_shown_and_taken_away(client: Client, platform: Platform) -> None:
    assert client.policy("digits").source == "default"
    assert client.set_policy("digits", "careful").policy == PRESETS["careful"]
    assert client.policy("digits").policy == PRESETS["careful"]
    client.unset_policy("digits")
    with pytest.raises(NotFound, match="no policy of its own"):
        client.unset_policy("digits")
    assert client.policies().json_schema == Policy.model_json_schema()


def test_the_mesh_is_shown_taken_and_given_back(client: Client, platform: Platform) -> None:
    platform.stable["digits"] = 1
    view = client.mesh("digits")
    assert (view.held_by, view.virtual_service["kind"]) == ("rollout", "VirtualService")
    assert client.apply_mesh("digits", view.virtual_service, reason="a test").held_by == "alice"
    assert platform.hands["digits"].reason == "a test"
    assert client.release_mesh("digits").held_by == "rollout"
    with pytest.raises(Conflict, match="not moved by hand"):
        client.release_mesh("digits")
