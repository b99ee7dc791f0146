"""How many requests of its day each key has used, counted by all gateways together, in etcd.

Each gateway counts by itself and adds to the common count every second: a request never waits for etcd. So a key may
have more than its quota by what the other gateways let through within one round, and a gateway that is killed forgets
its last one; a write that etcd did not confirm may count twice. While etcd is away each gateway counts alone.

Counts of days that are over mean nothing and are taken out of etcd: with them go those of keys that were revoked, have
expired or are not used any more.
"""

import asyncio
import time
from contextlib import suppress

import structlog
from lepton_common.errors import Conflict, Unavailable
from lepton_common.etcd import EtcdClient, Versioned
from lepton_common.records import QUOTAS, QuotaUse
from pydantic import ValidationError

from lepton_gateway.admission import Admission
from lepton_gateway.limits import DayUse

SHARE_EVERY_S = 1.0
SWEEP_EVERY_S = 3600.0
_EXPIRE_EVERY_S = 0.02

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Quotas:
    """`share` tells the others, and hears of them; `sweep` takes out of etcd what is over."""

    def __init__(self, etcd: EtcdClient, admission: Admission) -> None:
        self._etcd = etcd
        self._admission = admission

    async def share(self) -> None:
        """What was used up to now is in etcd. While etcd is away it stays to be told the next time."""
        self._admission.tidy(time.monotonic())
        today = self._admission.today()
        used = [(key_id, use.day) for key_id, use in self._admission.keys.items() if use.day is not None]
        try:
            for key_id, day in used:
                day.on(today)
                while day.unshared and not await self._share(key_id, day, today):
                    pass
        except Unavailable as error:
            _log.warning("daily quotas are counted by this gateway alone", reason=error.message)

    async def _share(self, key_id: str, use: DayUse, today: int) -> bool:
        """Whether the count is in etcd; False when another gateway was faster."""
        key, count = QUOTAS + key_id, use.unshared
        found = await self._etcd.get(key)
        # One that cannot be read counts from nothing, and is one again that can.
        before = (found and _read(found)) or QuotaUse(day=today, used=0)
        total = count + (before.used if before.day == today else 0)
        # Where the clock of another gateway is ahead, ours are requests of a day that is over.
        if before.day <= today:
            value = QuotaUse(day=today, used=total).model_dump_json().encode()
            try:
                await self._etcd.put_if_unchanged(key, value, 0 if found is None else found.mod_revision)
            except Conflict:
                return False
        use.shared(today, count, total)
        return True

    async def sweep(self) -> None:
        """etcd has no count of a day before yesterday. Raises Unavailable while it is away."""
        # By the clock of another gateway yesterday may not be over.
        yesterday = self._admission.today() - 1
        found, _ = await self._etcd.list(QUOTAS)
        for each in found:
            use = _read(each)
            if use is not None and use.day < yesterday:
                with suppress(Conflict):  # It has a new day, or another gateway was faster.
                    await self._etcd.delete_if_unchanged(each)


def _read(found: Versioned) -> QuotaUse | None:
    """The count, None when it is none."""
    try:
        return QuotaUse.model_validate_json(found.value)
    except ValidationError:
        _log.warning("a record in etcd cannot be read", key=found.key)
        return None


async def watch_over(admission: Admission) -> None:
    """For as long as the gateway lives, whoever waits hears when its time is up."""
    while True:
        admission.expire(time.monotonic())
        await asyncio.sleep(_EXPIRE_EVERY_S)
