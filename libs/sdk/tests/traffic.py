"""rollout's and monitor's part of the tests' platform: rollouts, what is served, policies, the mesh, windows."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from lepton.models import ModelLimits, ServingView, TrafficShare
from lepton.policies import PRESETS, Policy
from lepton.rollouts import (
    Action,
    MeshView,
    NewMesh,
    NewRollout,
    Policies,
    Reason,
    Replay,
    Rollout,
    RolloutState,
    StoredPolicy,
)
from pydantic import ValidationError

from libs.sdk.tests.stories import Story

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DEFAULT_LIMITS = ModelLimits(max_concurrency=1024, timeout_ms=30_000)


class Answer(Exception):  # Not always an error.
    """Ends a request with a status and a body."""

    def __init__(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


def problem(status: int, title: str, detail: str) -> Answer:
    return Answer(status, {"title": title, "status": status, "detail": detail})


def not_found(detail: str) -> Answer:
    return problem(404, "Not Found", detail)


class Traffic:
    """The rollouts, policies and mesh, and what is to happen to the rollouts."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.stories: dict[str, Story] = {}  # By the rollout's id; a story moves on at each look.
        self.looked: dict[str, int] = {}
        self.stable: dict[str, int] = {}
        self.limits: dict[str, ModelLimits] = {}
        self.policies: dict[str, Policy] = {}
        self.hands: dict[str, NewMesh] = {}
        self.started: list[NewRollout] = []
        self.steered: list[tuple[str, Reason]] = []
        self.replayed: list[Policy] = []
        self.unheard = 0  # How often rollout answers that it has not heard of a version.
        self.outcome = RolloutState.PROMOTED

    def tell(self, story: Story) -> Rollout:
        """The story's rollout is there, at its first look."""
        rollout = story.looks[0]
        self.stories[str(rollout.id)] = story
        self.rollouts.insert(0, rollout)
        return rollout

    # --- rollouts ---

    def start_rollout(self, model: str, version: int, policy: Policy = PRESETS["immediate"]) -> Rollout:
        rollout = Rollout(
            id=uuid4(),
            tenant="default",
            model=model,
            version=version,
            stable=self.stable.get(model),
            previous=self.stable.get(model),
            strategy=policy.strategy,
            state=RolloutState.LOADING,
            percent=0,
            started_at=NOW,
            policy=policy,
        )
        self.rollouts.insert(0, rollout)
        return rollout

    def post_rollout(self, request: Any) -> None:
        wanted = NewRollout.model_validate(request.json())
        if self.unheard:
            self.unheard -= 1
            raise not_found("no such version")
        for each in self.rollouts:
            if each.state == RolloutState.LOADING and each.version == wanted.version:
                raise Answer(202, each)
            if each.state == RolloutState.LOADING:
                raise problem(409, "Conflict", "another rollout is open")
        self.started.append(wanted)
        policy = wanted.policy or self.policies.get(wanted.model, Policy())
        raise Answer(
            202,
            self.start_rollout(wanted.model, wanted.version, PRESETS[policy] if isinstance(policy, str) else policy),
        )

    def get_rollouts(self, request: Any) -> None:
        raise Answer(200, [each for each in self.rollouts if request.query.get("model", each.model) == each.model])

    def get_rollout(self, _: object, rollout_id: str) -> None:
        """Each look at a rollout brings it one step further."""
        if rollout_id in self.stories:
            looks = self.stories[rollout_id].looks
            seen = self.looked[rollout_id] = self.looked.get(rollout_id, -1) + 1
            raise Answer(200, looks[min(seen, len(looks) - 1)])
        index = self.index(rollout_id)
        rollout = self.rollouts[index]
        after = RolloutState.SHIFTING if rollout.state == RolloutState.LOADING else self.outcome
        self.rollouts[index] = rollout.model_copy(update={"state": after, "percent": 100, "reason": "as told"})
        if after == RolloutState.PROMOTED:
            self.stable[rollout.model] = rollout.version
        raise Answer(200, rollout)

    def index(self, rollout_id: str) -> int:
        for index, each in enumerate(self.rollouts):
            if str(each.id) == rollout_id:
                return index
        raise not_found(f"there is no rollout {rollout_id}")

    def steer(self, request: Any, rollout_id: str, command: str) -> None:
        index = self.index(rollout_id)
        self.steered.append((command, Reason.model_validate(request.json())))
        changes: dict[str, dict[str, Any]] = {"pause": {"paused": True, "percent": 5.0}, "resume": {"paused": False}}
        self.rollouts[index] = self.rollouts[index].model_copy(update=changes.get(command, {}))
        raise Answer(200, self.rollouts[index])

    def get_decisions(self, _: object, rollout_id: str) -> None:
        """Those made by the time of the last look."""
        story = self.stories[rollout_id]
        share = (self.looked.get(rollout_id, 0) + 1) / len(story.looks)
        raise Answer(200, list(story.decisions[: max(1, round(share * len(story.decisions)))]))

    def get_rollout_windows(self, _: object, rollout_id: str) -> None:
        raise Answer(200, list(self.stories[rollout_id].windows))

    def get_windows(self, request: Any) -> None:
        wanted = request.query.get("version")
        points = [point for story in self.stories.values() for point in story.windows]
        raise Answer(200, [each for each in points if wanted in (None, str(each.version))])

    def replay(self, request: Any, rollout_id: str) -> None:
        self.replayed.append(Policy.model_validate(request.json()))
        told = [each for each in self.stories[rollout_id].decisions if each.gates]
        second = int(told[-1].at.timestamp())
        raise Answer(200, Replay(outcome=Action.ROLL_BACK, second=second, seconds_judged=8, decisions=told))

    # --- what is served ---

    def rollback(self, _: object, model: str) -> None:
        raise Answer(202, self.start_rollout(model, self.stable[model] - 1))

    def get_serving(self, _: object, model: str) -> None:
        if model not in self.stable:
            raise not_found("nothing is served")
        stable = self.stable[model]
        split = [TrafficShare(version=stable, percent=100)]
        raise Answer(
            200,
            ServingView(
                tenant="default",
                model=model,
                generation=1,
                stable=stable,
                previous=None,
                split=split,
                versions=[stable],
                workers=[],
                limits=self.limits.get(model, DEFAULT_LIMITS),
            ),
        )

    def put_limits(self, request: Any, model: str) -> None:
        wanted = ModelLimits.model_validate(request.json())
        if wanted.burst is not None and wanted.rate_per_s is None:
            raise problem(400, "Bad Request", "set rate_per_s too")
        self.limits[model] = DEFAULT_LIMITS.model_copy(update=wanted.model_dump(exclude_none=True))
        self.get_serving(request, model)

    def delete_limits(self, request: Any, model: str) -> None:
        self.limits.pop(model, None)
        self.get_serving(request, model)

    # --- policies ---

    def get_policies(self, _: object) -> None:
        presets = Policies(presets=dict(PRESETS), schema=Policy.model_json_schema())
        raise Answer(200, presets.model_dump(mode="json", by_alias=True))

    def get_policy(self, _: object, model: str) -> None:
        if model not in self.policies:
            raise Answer(200, StoredPolicy(model=model, policy=Policy(), source="default"))
        raise Answer(200, StoredPolicy(model=model, policy=self.policies[model], source="alice", at=NOW))

    def put_policy(self, request: Any, model: str) -> None:
        self.policies[model] = Policy.model_validate(request.json())
        raise Answer(200, StoredPolicy(model=model, policy=self.policies[model], source="alice", at=NOW))

    def delete_policy(self, _: object, model: str) -> None:
        if self.policies.pop(model, None) is None:
            raise not_found(f"model {model!r} has no policy of its own")
        raise Answer(204)

    # --- the mesh ---

    def mesh(self, model: str) -> MeshView:
        hand = self.hands.get(model)
        split = {"name": "split", "timeout": "10s", "route": [_to(model, 1, 95), _to(model, 2, 5)]}
        routes = {**_named("VirtualService", model), "spec": {"hosts": [_host(model)], "http": [split]}}
        subsets = [{"name": f"v{version}", "labels": {"lepton.ai/pool": "cpu"}} for version in (1, 2)]
        rule: dict[str, Any] = {
            **_named("DestinationRule", model),
            "spec": {"host": _host(model), "subsets": subsets},
        }
        return MeshView(
            model=model,
            held_by="alice" if hand else "rollout",
            virtual_service=hand.virtual_service if hand else routes,
            destination_rule=rule,
        )

    def get_mesh(self, _: object, model: str) -> None:
        if model not in self.stable:
            raise not_found(f"model {model!r} is not served")
        raise Answer(200, self.mesh(model))

    def put_mesh(self, request: Any, model: str) -> None:
        try:
            self.hands[model] = NewMesh.model_validate(request.json())
        except ValidationError as error:
            raise problem(400, "Bad Request", str(error)) from error
        raise Answer(200, self.mesh(model))

    def delete_mesh(self, _: object, model: str) -> None:
        if self.hands.pop(model, None) is None:
            raise problem(409, "Conflict", f"the traffic of model {model!r} is not moved by hand")
        raise Answer(200, self.mesh(model))


def _host(model: str) -> str:
    return f"{model}.default.models.lepton"


def _named(kind: str, model: str) -> dict[str, Any]:
    return {"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": {"name": model, "namespace": "default"}}


def _to(model: str, version: int, weight: int) -> dict[str, Any]:
    return {"destination": {"host": _host(model), "subset": f"v{version}"}, "weight": weight}


ROUTES: dict[tuple[str, str], Callable[..., None]] = {
    ("POST", "v1/rollouts"): Traffic.post_rollout,
    ("GET", "v1/rollouts"): Traffic.get_rollouts,
    ("GET", "v1/rollouts/*"): Traffic.get_rollout,
    ("GET", "v1/rollouts/*/decisions"): Traffic.get_decisions,
    ("GET", "v1/rollouts/*/windows"): Traffic.get_rollout_windows,
    ("POST", "v1/rollouts/*/replay"): Traffic.replay,
    ("POST", "v1/rollouts/*/*"): Traffic.steer,
    ("GET", "v1/windows"): Traffic.get_windows,
    ("POST", "v1/serving/*/rollback"): Traffic.rollback,
    ("GET", "v1/serving/*"): Traffic.get_serving,
    ("PUT", "v1/serving/*/limits"): Traffic.put_limits,
    ("DELETE", "v1/serving/*/limits"): Traffic.delete_limits,
    ("GET", "v1/policies"): Traffic.get_policies,
    ("GET", "v1/policies/*"): Traffic.get_policy,
    ("PUT", "v1/policies/*"): Traffic.put_policy,
    ("DELETE", "v1/policies/*"): Traffic.delete_policy,
    ("GET", "v1/mesh/*"): Traffic.get_mesh,
    ("PUT", "v1/mesh/*"): Traffic.put_mesh,
    ("DELETE", "v1/mesh/*"): Traffic.delete_mesh,
}
