"""How many requests over Kafka are worked on at a time: additive increase, multiplicative decrease."""

import asyncio
import math
import time
from collections.abc import Callable

_FIRST, _LEAST = 32.0, 4.0
_SHRINK = 0.7
_SHRINK_EVERY_S = 0.1

# The loop comes to a timer late when it, or the machine, has more to do than fits; who calls waits as long. So late is
# nothing yet: timers have a grain of a millisecond.
_UNNOTICED_S = 0.003
_LOOK_EVERY_S = 0.02
# As many as let the loop be late at one look in a hundred or a few: that is whom a p99 tells of.
_FIRST_BESIDE_CALLERS, _LEAST_BESIDE_CALLERS = 4.0, 1.0
_MORE_BESIDE_CALLERS = 0.05
_MORE_ALONE = 1.01  # 1.6 times a second


class Room:
    """More for as many as went well, fewer where the platform had no room; fewer, too, where callers are disturbed."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._size = min(_FIRST, most)
        self._shrunk_at = -1.0
        self._beside_callers = math.inf  # as many as do not disturb those who are there

    def size(self) -> int:
        return int(min(self._size, self._beside_callers))

    def went_well(self) -> None:
        self._size = min(self._most, self._size + 1 / self._size)

    def was_short(self) -> None:
        """Answers of the same moment say it once."""
        now = self._clock()
        if now - self._shrunk_at >= _SHRINK_EVERY_S:
            self._shrunk_at = now
            self._size = max(min(_LEAST, self._most), self._size * _SHRINK)

    def looked(self, late_s: float, *, beside_callers: bool) -> None:
        """The loop came to a timer `late_s` after its time. To be told every 20 ms."""
        if not beside_callers:
            # Not all at once: who calls now and then meets what the last one left.
            self._beside_callers *= _MORE_ALONE
            if self._beside_callers >= self._size:
                self._beside_callers = math.inf
        elif self._beside_callers == math.inf:
            self._beside_callers = min(_FIRST_BESIDE_CALLERS, self._size)
        elif late_s > _UNNOTICED_S:
            self._beside_callers = max(_LEAST_BESIDE_CALLERS, min(self._beside_callers, self._size) * _SHRINK)
        else:
            self._beside_callers = min(self._size, self._beside_callers + _MORE_BESIDE_CALLERS)


async def yield_to_callers(room: Room, has_callers: Callable[[], bool]) -> None:
    """For as long as the gateway lives."""
    while True:
        due = time.monotonic() + _LOOK_EVERY_S
        await asyncio.sleep(_LOOK_EVERY_S)
        room.looked(time.monotonic() - due, beside_callers=has_callers())
