"""What one key or one model may use: a rate, requests at once, requests a day. Pure: times are arguments."""

import math

from lepton_common.records import KeyLimits, Limits

SECONDS_A_DAY = 86_400
# Times of `time.monotonic` are told to less than this.
_EPSILON_S = 1e-9
# One request in eleven days. The interval of a far lower rate is infinite, and infinite times let everything through.
_LEAST_RATE_PER_S = 1e-6


class TokenBucket:
    """At most `burst` requests at once and `rate_per_s` on average; None is a second's worth.

    The generic cell rate algorithm (ITU-T I.371): one number, the time at which the bucket is full again.
    """

    __slots__ = ("_full_at", "_interval_s", "_slack_s")

    def __init__(self, rate_per_s: float, burst: int | None) -> None:
        self._interval_s = 1 / max(rate_per_s, _LEAST_RATE_PER_S)
        self._slack_s = (max(1, math.ceil(rate_per_s) if burst is None else burst) - 1) * self._interval_s
        self._full_at = -math.inf

    def wait_s(self, now: float) -> float:
        """How long until there is a token; 0.0 when there is one."""
        wait_s = self._full_at - self._slack_s - now
        return wait_s if wait_s > _EPSILON_S else 0.0

    def take(self, now: float) -> None:
        """A token is gone. Only to be called where `wait_s` says 0.0."""
        self._full_at = max(self._full_at, now) + self._interval_s

    def is_full(self, now: float) -> bool:
        return self._full_at <= now


class DayUse:
    """Requests of one key on one day, over all gateways as far as this one has heard: `quotas.py` shares them."""

    __slots__ = ("day", "unshared", "used")

    def __init__(self) -> None:
        self.day = 0  # since 1970, in UTC
        self.used = 0  # by everyone, ours included
        self.unshared = 0  # of ours, those that the others have not heard of

    def on(self, day: int) -> int:
        """How many were used on that day, which is today."""
        if day != self.day:
            self.day, self.used, self.unshared = day, 0, 0
        return self.used

    def take(self) -> None:
        self.used += 1
        self.unshared += 1

    def shared(self, day: int, count: int, total: int) -> None:
        """The others have heard of `count` of ours on that day, on which everyone used `total`."""
        if day == self.day:
            self.unshared -= count
            self.used = total + self.unshared


class Use:
    """What one key or one model uses of its limits at this gateway. `name` is how a message calls it.

    `in_flight` of its requests are under way, what waits for its turn included, and `most` may be. `is_plain`: that is
    all there is to its limits.
    """

    __slots__ = ("_bucket", "_limits", "day", "in_flight", "is_plain", "most", "name")

    def __init__(self, name: str, limits: KeyLimits | Limits) -> None:
        self.name = name
        self.in_flight = 0
        self.day: DayUse | None = None
        self._limits: KeyLimits | Limits
        self._set(limits)

    def change(self, limits: KeyLimits | Limits) -> None:
        """These limits hold from now on. Told again, the same ones change nothing: the bucket is not full again."""
        if limits is not self._limits:
            if limits == self._limits:
                self._limits = limits
            else:
                self._set(limits)

    def _set(self, limits: KeyLimits | Limits) -> None:
        self._limits = limits
        self.most = math.inf if limits.max_concurrency is None else limits.max_concurrency
        self._bucket = None if limits.rate_per_s is None else TokenBucket(limits.rate_per_s, limits.burst)
        if self.per_day is None:
            self.day = None
        elif self.day is None:
            self.day = DayUse()
        self.is_plain = self._bucket is None and self.day is None

    @property
    def rate_per_s(self) -> float | None:
        return self._limits.rate_per_s

    @property
    def per_day(self) -> int | None:
        return self._limits.per_day if isinstance(self._limits, KeyLimits) else None

    def wait_s(self, now: float) -> float:
        """How long until the rate allows another request; 0.0 when it does."""
        return 0.0 if self._bucket is None else self._bucket.wait_s(now)

    def take(self, now: float) -> None:
        """One more request is under way."""
        self.in_flight += 1
        if self._bucket is not None:
            self._bucket.take(now)
        if self.day is not None:
            self.day.take()

    def is_idle(self, now: float) -> bool:
        """Whether forgetting it would change nothing: what was used today is not known otherwise."""
        is_rested = self._bucket is None or self._bucket.is_full(now)
        return self.in_flight == 0 and is_rested and (self.day is None or not self.day.used)
