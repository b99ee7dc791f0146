"""A model's traffic as monitor tells of it, without the traffic: windows that follow the split in etcd."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from lepton_common.etcd import EtcdClient
from lepton_common.events import ShadowWindow, VersionWindow, WindowClosed
from lepton_common.records import SERVING, Serving
from lepton_common.sketch import bucket_of
from lepton_common.types import ModelRef
from lepton_rollout.workers import Signal

from .stand_ins import RecordingBus

# A second passes in this time.
PACE_S = 0.02


class Clock:
    """The time of day, which can be made to run ahead."""

    def __init__(self) -> None:
        self._ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def reach(self, second: int) -> None:
        """That second (Unix time) has begun."""
        self._ahead = max(self._ahead, datetime.fromtimestamp(second, UTC) - datetime.now(UTC))


@dataclass
class Seconds:
    """Each window has `requests`, split as etcd says it; of a version's, `error_ratio[version]` fail and all take
    `latency_s[version]`. Fractions of a request are carried over, so nothing is left to chance."""

    etcd: EtcdClient
    bus: RecordingBus
    clock: Clock
    model: ModelRef
    requests: int = 200
    error_ratio: dict[int, float] = field(default_factory=dict)
    latency_s: dict[int, float] = field(default_factory=dict)
    agreement: float = 1.0
    told: list[WindowClosed] = field(default_factory=list)
    _passed: Signal = field(default_factory=Signal)

    async def more(self, count: int) -> None:
        """That many more seconds have passed."""
        wanted = len(self.told) + count
        while len(self.told) < wanted:
            await self._passed.wait(self._passed.count, 60)

    async def run(self) -> None:
        sequence = 0
        carried: dict[tuple[int, str], float] = {}

        def whole(version: int, kind: str, exact: float) -> int:
            exact += carried.get((version, kind), 0.0)
            carried[version, kind] = exact - int(exact)
            return int(exact)

        while True:
            sequence += 1
            second = int(self.clock().timestamp())
            serving = await self._serving()
            versions = []
            for share in serving.split if serving else ():
                count = whole(share.version, "requests", self.requests * share.percent / 100)
                errors = min(count, whole(share.version, "errors", count * self.error_ratio.get(share.version, 0.0)))
                bucket = bucket_of(self.latency_s.get(share.version, 0.01))
                versions.append(
                    VersionWindow(
                        version=share.version, ok=count - errors, server_errors=errors, latency={bucket: count}
                    )
                )
            window = WindowClosed(
                tenant=self.model.tenant,
                model=self.model.model,
                second=second,
                sequence=sequence,
                gateways=1,
                versions=tuple(versions),
                shadow=self._shadow(serving),
            )
            self.told.append(window)
            self._passed.send()
            self.clock.reach(second + 1)
            await self.bus.tell(window)
            await asyncio.sleep(PACE_S)

    def _shadow(self, serving: Serving | None) -> ShadowWindow | None:
        if serving is None or serving.shadow is None:
            return None
        agreed = round(self.requests * self.agreement)
        version = serving.shadow.version
        bucket = bucket_of(self.latency_s.get(version, 0.01))
        return ShadowWindow(
            version=version, agreed=agreed, disagreed=self.requests - agreed, latency={bucket: self.requests}
        )

    async def _serving(self) -> Serving | None:
        found = await self.etcd.get(f"{SERVING}{self.model}")
        return Serving.model_validate_json(found.value) if found else None
