"""A rollout, live: a view that a terminal shows, lines for a pipe, documents for a program."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lepton.client import Client
from lepton.errors import Unavailable
from lepton.evidence import (
    MARKS,
    Evidence,
    Side,
    duration,
    evidence_of,
    figure,
    is_over,
    outcome,
    percent,
    plain_gates,
    worded,
)
from lepton.render import print_json_line
from lepton.rollouts import ArmView, Decision, Gate, GateState, Rollout, RolloutState

POLL_S = 1.0
# A platform that is away for longer than this ends the watching; the rollout does not need us.
_PATIENCE_S = 60.0
# A terminal of 80 columns has room for all of it.
_BAR = 14
_FIRST = 12
_LAST = 5

_STATES = {
    RolloutState.PROMOTED: "bold green",
    RolloutState.ROLLED_BACK: "bold red",
    RolloutState.FAILED: "bold red",
    RolloutState.FAILING: "bold red",
    RolloutState.ABORTED: "bold yellow",
}
_GATES = {GateState.PASSED: "green", GateState.WAITING: "yellow", GateState.FAILED: "bold red"}


@dataclass(frozen=True, slots=True)
class Look:
    """What there was to see at one time. `trouble` says why there is nothing newer."""

    rollout: Rollout
    decisions: Sequence[Decision]
    trouble: str = ""


def looks(client: Client, rollout: Rollout, poll_s: float = POLL_S, patience_s: float = _PATIENCE_S) -> Iterator[Look]:
    """The rollout about every `poll_s` seconds until it has ended. Raises Unavailable when the platform stays away."""
    look = Look(rollout, ())
    seen_s = time.monotonic()
    while True:
        try:
            look = Look(client.rollout(rollout.id), client.decisions(rollout.id))
            seen_s = time.monotonic()
        except Unavailable as error:
            if time.monotonic() - seen_s > patience_s:
                raise
            look = Look(look.rollout, look.decisions, f"{error.message} Trying again; the rollout goes on.")
        yield look
        if is_over(look.rollout) and not look.trouble:
            return
        time.sleep(poll_s)


def watch(found: Iterator[Look], console: Console, *, json: bool = False) -> Rollout | None:
    """The rollout as it was at last, shown as it went: live in a terminal, else a line or a document per change."""
    if json:
        return _tell(found, _print_document)
    if not console.is_terminal:
        return _tell(found, lambda look, news: _print_lines(console, look, news))
    last = None
    with Live(console=console, auto_refresh=False, transient=False, vertical_overflow="visible") as live:
        for look in found:
            last = look.rollout
            live.update(view(look, datetime.now(UTC)), refresh=True)
    return last


# --- the live view ----------------------------------------------------------------------------------------------------


def view(look: Look, now: datetime) -> RenderableType:
    """Everything about a rollout that can be seen at one time."""
    rollout = look.rollout
    verdict = rollout.verdict
    gates = verdict.gates if verdict else []
    evidence = evidence_of(gates)
    parts: list[RenderableType] = [_head(rollout, now), Text(), _traffic(rollout)]
    for side, title in ((Side.AGAINST, "EVIDENCE AGAINST"), (Side.FOR, "EVIDENCE FOR")):
        of_side = [each for each in evidence if each.side is side]
        if of_side:
            parts += [Text(), _bars(title, of_side)]
    if others := plain_gates(gates):
        parts += [Text(), _gates(others)]
    if rollout.waiting_for:
        parts += [Text(), Text.assemble(("WAITS         ", "bold"), rollout.waiting_for.removeprefix("waits "))]
    if look.decisions:
        parts += [Text(), _decisions(look.decisions[-_LAST:])]
    if look.trouble:
        parts += [Text(), Text(look.trouble, style="yellow")]
    return Padding(Group(*parts), (1, 1))


def _head(rollout: Rollout, now: datetime) -> Text:
    end = rollout.finished_at or now
    told = [rollout.strategy.value]
    if rollout.state == RolloutState.SHIFTING and rollout.stages > 1:
        told.insert(0, f"step {rollout.stage} of {rollout.stages}")
    told += [f"by {rollout.actor}"] if rollout.actor else []
    told += [duration(max(0.0, (end - rollout.started_at).total_seconds()))]
    text = Text.assemble((f"{rollout.model} version {rollout.version}", "bold"))
    if rollout.stable is not None:
        text.append(f" against version {rollout.stable}")
    text.append("   ").append(rollout.state.value.replace("_", " "), style=_STATES.get(rollout.state, "bold yellow"))
    text.append(" · " + " · ".join(told), style="dim")
    if rollout.paused:
        text.append(" · paused", style="bold yellow")
    if rollout.by_hand:
        text.append(" · moved by hand", style="bold yellow")
    return text


def _traffic(rollout: Rollout) -> Table:
    table = _table("TRAFFIC", "", "SHARE", "REQ/S", "ERRORS (95 %)", "P50 / P99 MS")
    arms = rollout.arms or _silent(rollout)
    for arm in sorted(arms, key=lambda arm: arm.version):
        style = "cyan" if arm.version == rollout.version else "blue"
        table.add_row(
            f"version {arm.version}",
            _bar(arm.percent / 100, style),
            f"{arm.percent:g} %",
            f"{arm.requests_per_s:,.0f}" if arm.requests_per_s >= 10 else f"{arm.requests_per_s:.1f}",
            _errors(arm),
            "-" if arm.p50_ms is None or arm.p99_ms is None else f"{arm.p50_ms:.3g} / {arm.p99_ms:.3g}",
        )
    return table


def _errors(arm: ArmView) -> str:
    if arm.error_ratio is None or arm.error_low is None or arm.error_high is None:
        return "-"
    low, high = (f"{each * 100:.3g}" if each > 1e-6 else "0" for each in (arm.error_low, arm.error_high))
    refused = f", {percent(arm.refused_ratio)} refused" if arm.refused_ratio else ""
    return f"{percent(arm.error_ratio)} ({low}-{high}){refused}"


def _silent(rollout: Rollout) -> list[ArmView]:
    """The shares alone, before there is traffic to measure."""
    shares = [(rollout.stable, 100 - rollout.percent), (rollout.version, rollout.percent)]
    return [ArmView(version=each, percent=share, requests_per_s=0) for each, share in shares if each is not None]


def _bars(title: str, evidence: Sequence[Evidence]) -> Table:
    table = _table(title, "", "", "")
    for each in evidence:
        style = ("red" if each.side is Side.AGAINST else "green") if each.progress >= 1 else "yellow"
        needed = f"{figure(each.value)} of {figure(each.threshold)}"
        table.add_row(f"{each.about}{each.beside}", _bar(each.progress, style), needed, each.detail)
    return table


def _gates(gates: Sequence[Gate]) -> Table:
    table = _table("GATES", "", "")
    for gate in gates:
        mark = Text(f"{MARKS[gate.state]} {gate.state.value}", style=_GATES[gate.state])
        table.add_row(worded(gate.name), mark, gate.detail)
    return table


def _decisions(decisions: Sequence[Decision]) -> Table:
    table = _table("DECISIONS", "", "", "")
    for each in decisions:
        who = f"by {each.actor}: " if each.actor else ""
        at = f"{each.at.astimezone():%H:%M:%S}"
        table.add_row(at, worded(each.action), f"{each.percent:g} %", f"{who}{each.reason}")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    *short, last = titles
    for title in short:
        table.add_column(title, no_wrap=True, min_width=_FIRST if title == titles[0] else None)
    table.add_column(last, overflow="fold")
    return table


def _bar(part: float, style: str) -> Text:
    full = round(min(max(part, 0.0), 1.0) * _BAR)
    full = max(full, 1) if part > 0 else 0  # A share that there is, is seen.
    return Text.assemble(("█" * full, style), ("░" * (_BAR - full), "dim"))


# --- for pipes and programs -------------------------------------------------------------------------------------------


def _tell(found: Iterator[Look], tell: Callable[[Look, Sequence[Decision]], None]) -> Rollout | None:
    before: Look | None = None
    for look in found:
        known = len(before.decisions) if before else 0
        if before is None or _key(look) != _key(before) or len(look.decisions) != known:
            tell(look, look.decisions[known:])
        before = look
    return before.rollout if before else None


def _key(look: Look) -> tuple[object, ...]:
    """What is a change; the numbers are not, they change with every second."""
    rollout, verdict = look.rollout, look.rollout.verdict
    gates = tuple((gate.name, gate.state) for gate in verdict.gates) if verdict else ()
    return rollout.state, rollout.percent, rollout.stage, rollout.paused, rollout.by_hand, gates, look.trouble


def _print_document(look: Look, news: Sequence[Decision]) -> None:
    print_json_line({"rollout": look.rollout, "decisions": list(news), "trouble": look.trouble or None})


def _print_lines(console: Console, look: Look, news: Sequence[Decision]) -> None:
    for each in news:
        who = f" by {each.actor}" if each.actor else ""
        line = f"{each.at.astimezone():%H:%M:%S}  {worded(each.action)} at {each.percent:g} %{who}: {each.reason}"
        console.print(line, markup=False, soft_wrap=True)
    if look.trouble:
        console.print(look.trouble, markup=False, soft_wrap=True)
    elif not is_over(look.rollout):  # The end has a sentence of its own.
        console.print(outcome(look.rollout), markup=False, soft_wrap=True)
