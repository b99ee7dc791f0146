"""When a second of a model is over for all gateways, and what it then comes to.

A second closes by what is in the model's stream, in its order, and never by how long the service took to read it: so an
outage, a restart or a slow database changes nothing about any closed second.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lepton_common.errors import Limited
from lepton_common.events import ShadowWindow, Tally, VersionWindow
from lepton_common.sketch import merged

# Who told of the model this recently (by event time) is waited for. Gateways tell of no second without requests, so it
# is long: what one tells after a pause must not find its second closed. One that died costs the wait for so long.
KNOWN_S = 300
# The wait for those that have not said anything, from the first window of the second on. When that one was late
# itself, the others are given as long again as it took: after an outage all have much to tell, one after the other.
LEAST_WAIT_S, LONGEST_WAIT_S = 0.9, 5.0
# Other names than a gateway can have.
MARKER = "monitor:"
CALLERS = "api:"
# What an event has room for. A model with more versions at a time has them for a few testers.
MOST_VERSIONS = 16
MOST_COUNTERS = 50
_NEVER = -1


@dataclass(frozen=True, slots=True)
class Content:
    """What was seen of a model in some time: versions in the order of their keys, and its shadow."""

    versions: tuple[VersionWindow, ...] = ()
    shadow: ShadowWindow | None = None
    in_flight: int = 0

    @property
    def requests(self) -> int:
        return sum(each.requests for each in self.versions)

    @property
    def is_empty(self) -> bool:
        return not self.versions and self.shadow is None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a model's seconds are closed.

    `oldest` is the oldest second that is open, with a window; None when there is none. `done` says up to which second
    each gateway has told all; `marked`, up to which second nobody is waited for any more.
    """

    closed: int = _NEVER
    sequence: int = 0
    oldest: int | None = None
    marked: int = _NEVER
    done: Mapping[str, int] = field(default_factory=dict)


# --- closing ----------------------------------------------------------------------------------------------------------


def heard(progress: Progress, gateway: str, second: int, *, is_final: bool) -> Progress:
    """After a window of the second from a gateway, a caller or the marker. `is_final`: made after the second's end."""
    if gateway == MARKER:
        return replace(progress, marked=max(progress.marked, second))
    oldest = second if progress.oldest is None else min(progress.oldest, second)
    if gateway == CALLERS:
        return replace(progress, oldest=oldest)
    told = max(progress.done.get(gateway, _NEVER), second if is_final else second - 1)
    return replace(progress, oldest=oldest, done={**progress.done, gateway: told})


def closable(progress: Progress, open_seconds: Sequence[int]) -> list[int]:
    """Of the open seconds with windows, in their order, those that are over for everybody.

    A second is, once every gateway that is known to have requests for the model has told all of it. After a long quiet
    time none is known for certain, so that its first second waits for the marker.
    """
    result, before, done = [], progress.closed, progress.done
    for second in open_seconds:
        awaited = [told for told in done.values() if told >= second - KNOWN_S]
        all_told = before >= second - KNOWN_S and bool(awaited) and all(told >= second for told in awaited)
        if not (all_told or second <= progress.marked):
            break
        result.append(second)
        before = second
    return result


def after_closing(progress: Progress, closed: int, emitted: int, oldest: int | None) -> Progress:
    """After all up to that second is closed, `emitted` seconds with something in them; `oldest` is open now."""
    known = {gateway: told for gateway, told in progress.done.items() if told >= closed - KNOWN_S}
    return replace(progress, closed=closed, sequence=progress.sequence + emitted, oldest=oldest, done=known)


def due_s(second: int, first_arrival_s: float) -> float:
    """When (Unix time) nobody is waited for any more, so that a marker may be sent."""
    wait_s = min(max(LEAST_WAIT_S, first_arrival_s - (second + 1)), LONGEST_WAIT_S)
    return max(first_arrival_s + wait_s, second + 1.5)


def to_mark(arrivals: Iterable[tuple[int, float]], now_s: float) -> tuple[int | None, float | None]:
    """Of open seconds and their first arrivals, in order: the newest second to mark now, and when the next is due."""
    marked = None
    for second, first_arrival_s in arrivals:
        due = due_s(second, first_arrival_s)
        if due > now_s:
            return marked, due
        marked = second
    return marked, None


# --- merging ----------------------------------------------------------------------------------------------------------


def merge(contents: Iterable[Content]) -> Content:
    """All of it as one: counts and sketches add up by version, pool and whether the callers forced the version.

    Of two shadows the newer version's is kept: a second has one.
    """
    versions: dict[tuple[int, str, bool], list[VersionWindow]] = {}
    shadows: list[ShadowWindow] = []
    in_flight = 0
    for content in contents:
        in_flight += content.in_flight
        for each in content.versions:
            versions.setdefault((each.version, each.pool, each.forced), []).append(each)
        if content.shadow:
            shadows.append(content.shadow)
    merged_versions = (_merged_versions(each) for _, each in sorted(versions.items()))
    return Content(tuple(merged_versions), _merged_shadows(shadows), in_flight)


def attributed(content: Content) -> Content:
    """With counters that callers told joined to the live traffic of their version, where it had any."""
    told = [each for each in content.versions if each.counters and not each.requests]
    rest = [each for each in content.versions if each not in told]
    for each in told:
        live = [other for other in rest if other.version == each.version and not other.forced and other.requests]
        if not live:
            rest.append(each)
            continue
        home = max(live, key=lambda other: other.requests)
        rest[rest.index(home)] = home.model_copy(update={"counters": _added([home.counters, each.counters])})
    return replace(content, versions=tuple(sorted(rest, key=_key)))


def counted(content: Content, version: int, counter: str, count: int) -> Content:
    """With that many more occurrences. Raises Limited when the second has too many kinds of them."""
    after = merge([content, Content((VersionWindow(version=version, counters={counter: count}),))])
    if len(after.versions) > MOST_VERSIONS or any(len(each.counters) > MOST_COUNTERS for each in after.versions):
        raise Limited(
            f"counter {counter!r}: at most {MOST_COUNTERS} counters of {MOST_VERSIONS} versions in a second",
            retry_after_s=1,
        )
    return after


def bounded(content: Content) -> Content:
    """With the busiest versions only, should they be too many for an event."""
    if len(content.versions) <= MOST_VERSIONS:
        return content
    busiest = sorted(content.versions, key=lambda each: each.requests, reverse=True)[:MOST_VERSIONS]
    return replace(content, versions=tuple(sorted(busiest, key=_key)))


def by_minute(seconds: Iterable[tuple[int, Content]]) -> dict[int, Content]:
    """The contents of seconds, merged by the minute (its first second) they are in."""
    minutes: dict[int, list[Content]] = {}
    for second, content in seconds:
        minutes.setdefault(second - second % 60, []).append(content)
    return {minute: merge(contents) for minute, contents in minutes.items()}


def _key(window: VersionWindow) -> tuple[int, str, bool]:
    return window.version, window.pool, window.forced


def _merged_versions(windows: Sequence[VersionWindow]) -> VersionWindow:
    first, *others = windows
    if not others:
        return first
    users = [each.users for each in windows if each.users]
    # Users that are known of a part of the traffic only would hide what befell the rest.
    if any(each.requests and not each.users for each in windows):
        users = []
    return VersionWindow(
        version=first.version,
        pool=first.pool,
        forced=first.forced,
        users=Tally.model_validate(_tally(users)) if users else None,
        counters=_added([each.counters for each in windows]),
        **_tally(windows),
    )


def _tally(tallies: Sequence[Tally]) -> dict[str, object]:
    counts = ("ok", "client_errors", "server_errors", "timeouts", "shed")
    total: dict[str, object] = {name: sum(getattr(each, name) for each in tallies) for name in counts}
    return total | {"latency": merged(each.latency for each in tallies)}


def _merged_shadows(shadows: Sequence[ShadowWindow]) -> ShadowWindow | None:
    if not shadows:
        return None
    version = max(each.version for each in shadows)
    same = [each for each in shadows if each.version == version]
    if len(same) == 1:
        return same[0]
    total: dict[str, object] = {"version": version, "latency": merged(each.latency for each in same)}
    for name in ShadowWindow.model_fields.keys() - total.keys():
        total[name] = sum(getattr(each, name) for each in same)
    return ShadowWindow.model_validate(total)


def _added(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counters:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total
