"""The client, blocking and async, against a platform that breaks on purpose."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import lepton
import numpy as np
import pytest
from lepton import Client
from lepton.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    Invalid,
    Limited,
    NotFound,
    RolloutFailed,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from lepton.models import Model, Scope
from lepton.rollouts import RolloutState

from libs.sdk.tests.conftest import SECRET, Platform
from libs.sdk.tests.traffic import Answer


def problem(status: int, detail: str = "as it is", **headers: str) -> Answer:
    return Answer(status, {"title": "No", "status": status, "detail": detail}, headers)


# --- push, deploy, roll back ------------------------------------------------------------------------------------------


def test_a_first_push_returns_when_the_version_serves(client: Client, platform: Platform, model: Path) -> None:
    stages: list[str] = []
    version = client.push(model, name="m", labels={"team": "a"}, progress=lambda each: stages.append(each.stage))
    assert (version.version, version.labels, platform.stable) == (1, {"team": "a"}, {"m": 1})
    assert platform.counted("POST /v1/rollouts") == 0, "a first version is rolled out by itself"
    assert [*dict.fromkeys(stages)] == ["upload", "loading", "shifting", "promoted"]


def test_a_later_push_is_rolled_out_as_soon_as_rollout_has_heard_of_it(
    client: Client, platform: Platform, model: Path
) -> None:
    client.push(model, name="m")
    platform.unheard = 2
    version = client.push(model, name="m", classes=["a", "b"])
    assert version.version == 2
    assert platform.stable == {"m": 2}
    assert platform.counted("POST /v1/rollouts") == 3


def test_a_repeated_push_returns_the_same_version_and_changes_nothing(
    client: Client, platform: Platform, model: Path
) -> None:
    first = client.push(model, name="m")
    assert client.push(model, name="m") == first
    assert len(platform.rollouts) == 1


def test_a_push_without_deploy_starts_no_rollout(client: Client, platform: Platform, model: Path) -> None:
    assert client.push(model, name="m", deploy=False).version == 1
    assert not platform.rollouts


def test_a_push_without_wait_leaves_its_rollout_running(client: Client, platform: Platform, model: Path) -> None:
    client.push(model, name="m", wait=False)
    assert platform.rollouts[0].state == RolloutState.LOADING
    assert platform.counted("GET /v1/rollouts/") == 0


def test_a_push_tells_the_version_before_its_rollout(client: Client, model: Path) -> None:
    told: list[tuple[int, bool]] = []
    client.push(model, name="m", tell=lambda version, rollout: told.append((version.version, rollout is not None)))
    assert told == [(1, False), (1, True)]


def test_lepton_push_needs_no_client(platform: Platform, model: Path) -> None:
    assert lepton.push(model, name="m").version == 1


def test_a_rollout_that_fails_raises_with_its_reason(client: Client, platform: Platform, model: Path) -> None:
    platform.outcome = RolloutState.FAILED
    with pytest.raises(RolloutFailed, match="m version 1 was not deployed: as told"):
        client.push(model, name="m")


def test_waiting_ends_after_its_timeout(client: Client, platform: Platform, model: Path) -> None:
    platform.outcome = RolloutState.SHIFTING
    with pytest.raises(DeadlineExceeded, match=r"still shifting after 0\.2 s"):
        client.push(model, name="m", timeout=0.2)


def test_deploying_a_version_that_is_on_its_way_joins_its_rollout(
    client: Client, platform: Platform, model: Path
) -> None:
    client.push(model, name="m", wait=False)
    assert client.deploy("m", 1).id == platform.rollouts[0].id
    assert len(platform.rollouts) == 1


def test_deploying_beside_another_rollout_is_a_conflict(client: Client, model: Path) -> None:
    client.push(model, name="m", wait=False)
    client.push(model, name="m", classes=["a"], deploy=False)
    with pytest.raises(Conflict, match="another rollout is open"):
        client.deploy("m", 2)


def test_deploying_an_unknown_model_is_not_found_at_once(client: Client, platform: Platform) -> None:
    platform.unheard = 1
    with pytest.raises(NotFound, match="there is no model 'm'"):
        client.deploy("m", 2)


def test_a_rollback_returns_when_the_version_before_serves_again(
    client: Client, platform: Platform, model: Path
) -> None:
    client.push(model, name="m")
    client.push(model, name="m", classes=["a"])
    assert client.rollback("m").version == 1
    assert client.serving("m").stable == 1
    assert [each.version for each in client.rollouts("m")] == [1, 2, 1]


# --- lists, keys ------------------------------------------------------------------------------------------------------


def test_lists_come_from_as_many_pages_as_there_are(client: Client, platform: Platform, model: Path) -> None:
    for name in ("a", "b", "c"):
        client.push(model, name=name)
    models = client.models()
    assert_type(models, list[Model])
    assert [each.name for each in models] == ["a", "b", "c"]
    assert [each.type for each in client.timeline("a")] == ["VersionRegistered"]
    assert platform.counted("GET /v1/models?after") == 2


def test_a_new_key_shows_its_secret_once(client: Client) -> None:
    key = client.create_key("robot", scopes=["infer", Scope.DEPLOY])
    assert (key.secret, key.scopes) == (SECRET, [Scope.INFER, Scope.DEPLOY])
    (listed,) = client.keys()
    assert (listed.name, listed.id) == ("robot", key.id)
    client.revoke_key(key.id)
    with pytest.raises(NotFound, match="k2"):
        client.revoke_key("k2")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda client: client.create_key("robot", scopes=["root"]), "scopes"),
        (lambda client: client.create_tenant("Not A Name"), "name"),
        (lambda client: client.deploy("m", 0), "version"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    client: Client, platform: Platform, call: Callable[[Client], object], named: str
) -> None:
    with pytest.raises(Invalid, match=named):
        call(client)
    assert not platform.requests


# --- errors and retries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Invalid), (401, Unauthenticated), (403, Forbidden), (404, NotFound), (409, Conflict), (413, TooLarge)],
)
def test_each_status_is_its_kind_and_is_not_retried(
    client: Client, platform: Platform, status: int, kind: type[lepton.LeptonError]
) -> None:
    platform.answers = [problem(status)]
    with pytest.raises(kind, match="as it is") as raised:
        client.models()
    assert raised.value.status == status
    assert len(platform.requests) == 1


def test_safe_calls_are_retried_until_the_platform_is_back(client: Client, platform: Platform) -> None:
    platform.answers = [problem(503), Answer(429, {"error": "slow"}, {"retry-after": "0"}), Answer(502, b"<html>")]
    assert client.models() == []
    assert len(platform.requests) == 4


def test_a_call_that_would_act_twice_is_not_retried(client: Client, platform: Platform) -> None:
    platform.answers = [problem(503)]
    with pytest.raises(Unavailable):
        client.create_key("robot")
    assert len(platform.requests) == 1


def test_a_long_retry_after_is_told_and_not_waited_for(client: Client, platform: Platform) -> None:
    platform.answers = [Answer(429, {"error": "slow down"}, {"retry-after": "60"})]
    with pytest.raises(Limited, match="slow down") as raised:
        client.infer("m", {"x": np.zeros((1, 2), np.float32)})
    assert raised.value.retry_after_s == 60


def test_each_wrong_input_of_a_problem_is_told(client: Client, platform: Platform) -> None:
    body = {"title": "No", "status": 400, "detail": "wrong", "errors": [{"name": "query.limit", "detail": "too large"}]}
    platform.answers = [Answer(400, body)]
    with pytest.raises(Invalid, match=r"wrong\nquery.limit: too large"):
        client.models()


@pytest.mark.parametrize("body", [b"<html>", b"[]", json.dumps({"items": 3}).encode()])
def test_an_answer_of_something_else_is_an_error_with_a_hint(client: Client, platform: Platform, body: bytes) -> None:
    platform.answers = [Answer(200, body)]
    with pytest.raises(lepton.LeptonError, match="Is the URL that of a Lepton platform"):
        client.models()


def test_a_platform_that_does_not_run_is_unreachable_and_says_how_to_start_it() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable, match=f"Nothing answers at {url}.\nStart it with"):
            client.models()


def test_a_platform_that_does_not_answer_in_time_is_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
            client.infer("m", {"x": np.zeros((1, 2), np.float32)}, timeout=0.1)
