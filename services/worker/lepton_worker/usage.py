"""Which tenants use more of a worker's cores than others, and are to let them go first. Pure: times are arguments."""

import math

# What was used so long ago counts a third.
_MEMORY_S = 2.0
_NEGLIGIBLE_S = 1e-5
# So much more than the mean: else of two equal ones now this one, now that one would have to yield.
_MARGIN = 1.2


class Usage:
    """The processor seconds that runs took lately, by tenant."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._at = 0.0

    def of(self, tenant: str) -> "Account":
        """What the tenant's versions count with."""
        return Account(self, tenant)

    def add(self, tenant: str, seconds: float, now: float) -> None:
        """A run of the tenant's took so much, and ended `now`, a monotonic time.

        What counts is the processor's time: who yields takes longer, and would look ever larger.
        """
        kept = math.exp((self._at - now) / _MEMORY_S)
        self._at = now
        self._seconds = {each: used * kept for each, used in self._seconds.items() if used * kept > _NEGLIGIBLE_S}
        self._seconds[tenant] = self._seconds.get(tenant, 0.0) + max(seconds, _NEGLIGIBLE_S)

    def is_large(self, tenant: str) -> bool:
        """Whether the tenant used more, by a fifth, than the mean of those that used anything."""
        return self._seconds.get(tenant, 0.0) * len(self._seconds) > _MARGIN * sum(self._seconds.values())


class Account:
    """One tenant's usage."""

    __slots__ = ("_tenant", "_usage")

    def __init__(self, usage: Usage, tenant: str) -> None:
        self._usage = usage
        self._tenant = tenant

    def add(self, seconds: float, now: float) -> None:
        """See `Usage.add`."""
        self._usage.add(self._tenant, seconds, now)

    @property
    def is_large(self) -> bool:
        """See `Usage.is_large`."""
        return self._usage.is_large(self._tenant)
