"""Why a rollout went as it did: each decision with the numbers it was made by."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lepton.evidence import MARKS, duration, numbers_of, outcome, summary, worded
from lepton.rollouts import Action, Decision, Gate, GateState, Replay, Rollout

_STYLES = {GateState.PASSED: "green", GateState.WAITING: "yellow", GateState.FAILED: "bold red"}
_ENDINGS = {
    Action.STEP: "would have let it take all traffic",
    Action.HOLD: "would still hold it",
    Action.ROLL_BACK: "would have taken it back",
}


def explanation(rollout: Rollout, decisions: Sequence[Decision]) -> RenderableType:
    """The rollout's story, in order."""
    compared = f" compared with version {rollout.stable}" if rollout.stable is not None else ""
    by = f", started by {rollout.actor}" if rollout.actor else ""
    head = Text.assemble(
        (f"{rollout.model} version {rollout.version}", "bold"),
        f"{compared}{by}, by {summary(rollout.policy)}\n",
        (str(rollout.id), "dim"),
    )
    return Group(head, *(_told(each) for each in decisions), Text(outcome(rollout), style="bold"))


def replayed(rollout: Rollout, replay: Replay, name: str) -> RenderableType:
    """What another policy would have made of the same windows, beside what happened."""
    ending = f"{name} {_ENDINGS[replay.outcome]}"
    if replay.outcome is not Action.HOLD:
        since = max(0.0, replay.second - rollout.started_at.timestamp())
        ending += f" {duration(since)} after the start"
    judged = f", judging {replay.seconds_judged} seconds of traffic."
    happened = Text(f"In fact: {outcome(rollout)}", style="dim")
    return Group(*(_told(each) for each in replay.decisions), Text(ending + judged, style="bold"), happened)


def _told(decision: Decision) -> Tree:
    own = "by the judge" if decision.gates else "by itself"
    label = Text.assemble(
        (f"#{decision.number} ", "dim"),
        f"{decision.at.astimezone():%m-%d %H:%M:%S}  ",
        (worded(decision.action), "bold"),
        f" at {decision.percent:g} % {f'by {decision.actor}' if decision.actor else own}",
    )
    tree = Tree(label, guide_style="dim")
    if decision.reason:
        tree.add(Text(decision.reason))
    if decision.gates:
        tree.add(_gates(decision.gates))
    return tree


def _gates(gates: Sequence[Gate]) -> Table:
    """The gates, each with its state, what it says, and the numbers behind it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for gate in gates:
        state = Text(f"{MARKS[gate.state]} {gate.state.value}", style=_STYLES[gate.state])
        numbers = numbers_of(gate)
        told = Text.assemble(gate.detail, (f" ({numbers})", "dim") if numbers else "")
        table.add_row(worded(gate.name), state, told)
    return table
