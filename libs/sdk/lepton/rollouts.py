"""Every HTTP shape of rollouts, their judgement, and the mesh: the page beside `models.py`."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field, JsonValue

from lepton.models import Name, Request, Response, Text, VersionNumber
from lepton.policies import CounterName, Policy, Strategy


class Member(Request):
    """Another model's version that steps and gives up together with a rollout's."""

    model: Name
    version: VersionNumber


class NewRollout(Request):
    """A version to bring to live traffic.

    `policy` is a preset's name or a policy of its own; None takes the model's, else the default. `force`: although the
    same bytes were taken back before. `together`: other models' versions that step with it, by the same policy.
    """

    model: Name
    version: VersionNumber
    policy: Policy | Name | None = None
    force: bool = False
    together: Annotated[list[Member], Field(max_length=20)] = []


class RolloutState(StrEnum):
    """Workers load the version, then the mesh shifts traffic to it, then it has ended, one way or the other.

    `queued` waits for another rollout of the model. `failing` takes the traffic back and the version off the workers;
    then it is `rolled_back` (worse than the stable), `aborted` (by a person, or for a newer version) or `failed` (it
    never had traffic).
    """

    QUEUED = "queued"
    LOADING = "loading"
    SHIFTING = "shifting"
    FAILING = "failing"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    FAILED = "failed"


class GateState(StrEnum):
    """`passed` stands in the way of nothing, `waiting` of growing, `failed` of staying."""

    PASSED = "passed"
    WAITING = "waiting"
    FAILED = "failed"


class Gate(Response):
    """One thing that a step depends on, and how it stands. `numbers` are what it was decided by."""

    name: str
    state: GateState
    detail: str
    numbers: dict[str, float] = {}


class Action(StrEnum):
    STEP = "step"
    HOLD = "hold"
    ROLL_BACK = "roll_back"


class Verdict(Response):
    """What the judge says after a second (Unix time), and why."""

    action: Action
    reason: str
    second: int
    page: bool = False
    gates: list[Gate] = []


class Decision(Response):
    """Something that was decided about a rollout: by the judge, with its gates, or by a person (`actor`)."""

    number: int
    at: datetime
    action: str
    stage: int
    percent: float
    reason: str
    actor: str = ""
    gates: list[Gate] = []


class ArmView(Response):
    """One version's live traffic over the last seconds. The interval holds the error ratio with 95 % confidence.

    `refused_ratio`: requests answered as the caller's own mistake (4xx).
    """

    version: int
    percent: float
    requests_per_s: float
    error_ratio: float | None = None
    refused_ratio: float | None = None
    error_low: float | None = None
    error_high: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None


class Rollout(Response):
    """A version's way to live traffic. `stable` is what it is compared with, `previous` what served before it once it
    is promoted; `percent` is the share it has now, `stage` of `stages` how far it is, `waiting_for` what it waits for.
    `by_hand`: somebody moves the model's traffic with a VirtualService of their own, and the judge only watches."""

    id: UUID
    tenant: str
    model: str
    version: int
    stable: int | None = None
    previous: int | None = None
    strategy: Strategy
    state: RolloutState
    reason: str = ""
    percent: float
    stage: int = 0
    stages: int = 1
    paused: bool = False
    by_hand: bool = False
    waiting_for: str = ""
    group: UUID | None = None
    actor: str = ""
    started_at: datetime
    finished_at: datetime | None = None
    policy: Policy = Policy()
    verdict: Verdict | None = None
    arms: list[ArmView] = []


class Reason(Request):
    """Why somebody steers a rollout. `full`: promote past all steps that are left."""

    reason: Text
    full: bool = False


class WindowPoint(Response):
    """One version's traffic in `seconds` seconds from `at` on. Percentiles are in ms, None without answers."""

    at: datetime
    seconds: int
    version: int
    pool: str
    forced: bool = False
    requests: int
    ok: int
    client_errors: int
    server_errors: int
    timeouts: int
    shed: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    counters: dict[str, int] = {}


class Replay(Response):
    """What a rollout's windows would have come to under another policy: each change of mind, and where it ended."""

    outcome: Action
    second: int
    seconds_judged: int
    decisions: list[Decision]


class StoredPolicy(Response):
    """A model's own policy. `source` is a preset's name, "default", or who set it."""

    model: str
    policy: Policy
    source: str
    at: datetime | None = None


class Policies(Response):
    """The named policies, and the JSON schema that every policy fits."""

    presets: dict[str, Policy]
    json_schema: dict[str, JsonValue] = Field(alias="schema")


class MeshView(Response):
    """A model's live mesh objects, as Istio has them, and who holds the wheel: "rollout" or a person's name."""

    model: str
    held_by: str
    virtual_service: dict[str, JsonValue]
    destination_rule: dict[str, JsonValue]


class NewMesh(Request):
    """An ordinary Istio VirtualService to take the traffic over with."""

    virtual_service: dict[str, JsonValue]
    reason: Text | None = None


class Resolution(StrEnum):
    """`auto` is 1 s for the last hour when at most a quarter of an hour is asked for, else 1 m."""

    AUTO = "auto"
    SECOND = "1s"
    MINUTE = "1m"


class Occurrences(Request):
    """Events that the platform does not know by itself, such as complaints about a version's answers. They are counted
    in the second in which they are told, and a policy may judge them by the counter's name."""

    model: Name
    version: VersionNumber
    counter: CounterName
    count: Annotated[int, Field(ge=1, le=1_000_000)] = 1
