"""A rollout's report: one HTML page that needs no network, no script and no other file."""

from collections.abc import Sequence
from html import escape

from lepton.documents import to_yaml
from lepton.evidence import MARKS, duration, numbers_of, outcome, percent, summary, worded
from lepton.report_plots import Bin, Data, collect, errors, evidence, latency, refuses, shares, total
from lepton.report_style import STYLE
from lepton.report_svg import Plot
from lepton.rollouts import Decision, Gate, Rollout, WindowPoint


def page(rollout: Rollout, decisions: Sequence[Decision], windows: Sequence[WindowPoint]) -> str:
    """The whole page: well-formed XML too, so that a program can read it."""
    data = collect(rollout, decisions, windows)
    title = escape(f"{rollout.model} version {rollout.version}: {_word(rollout)}")
    body = "\n".join([_header(rollout), _facts(data), *_plots(data), _decisions(decisions), _policy(rollout)])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _word(rollout: Rollout) -> str:
    return rollout.state.value.replace("_", " ")


def _header(rollout: Rollout) -> str:
    against = f" against version {rollout.stable}" if rollout.stable is not None else ""
    name = escape(f"{rollout.model} version {rollout.version}")
    pill = f'<span class="pill {rollout.state.value}">{escape(_word(rollout))}</span>'
    lead = f'<p class="lead">{escape(outcome(rollout))}</p>'
    return f"<header><h1>{name}<small>{escape(against)}</small> {pill}</h1>{lead}</header>"


def _facts(data: Data) -> str:
    rollout = data.rollout
    ended = rollout.finished_at
    facts = {
        "Started": f"{rollout.started_at:%Y-%m-%d %H:%M:%S %Z}" + (f" by {rollout.actor}" if rollout.actor else ""),
        "Took": duration((ended - rollout.started_at).total_seconds()) if ended else "not over yet",
        "Policy": summary(rollout.policy),
        "Rollout": str(rollout.id),
    }
    pairs = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    rows = "".join(_traffic(f"version {version}", kind, _since_start(data, version)) for version, kind in data.kinds())
    heads = ("What users saw", "Requests", "Refused", "Failed", "", "95 % sure", "p50", "p99")
    head = "".join(f"<th>{each}</th>" for each in heads)
    return (
        f'<section class="facts"><dl>{pairs}</dl>'
        f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _since_start(data: Data, version: int) -> Bin:
    return total(each for each in data.bins.get(version, []) if each.second >= 0)


def _traffic(name: str, kind: str, seen: Bin) -> str:
    low, high = seen.interval
    interval = f"{percent(low)} to {percent(high)}" if seen.judged else "-"
    cells = (
        f"{seen.requests:,}",
        f"{seen.refused:,}",
        f"{seen.errors:,}",
        percent(seen.error_ratio) if seen.judged else "-",
        interval,
        *("-" if each is None else f"{each:.3g} ms" for each in (seen.p50_ms, seen.p99_ms)),
    )
    swatch = f'<i class="swatch {kind}"></i>'
    return f"<tr><th>{swatch}{escape(name)}</th>" + "".join(f"<td>{each}</td>" for each in cells) + "</tr>"


# --- the plots --------------------------------------------------------------------------------------------------------


def _plots(data: Data) -> list[str]:
    versions = [(kind, f"version {version}") for version, kind in data.kinds()]
    bands = [*versions, ("band", "95 % interval")]
    lines = [(f"{kind}{dash}", f"{name}, {what}") for kind, name in versions for dash, what in _PERCENTILES]
    every = f"{duration(data.width_s)} a point"
    figures = [_figure(shares(data), data, versions, "Numbers mark the decisions below; time counts from the start.")]
    if data.bins:
        told = f"Server errors and time-outs, {every}."
        if refuses(data):
            bands += [(f"{kind} dashed", f"{name}, refused") for kind, name in versions]
            told = f"Server errors and time-outs; dashed 4xx, {every}."
        figures.append(_figure(errors(data), data, bands, told))
        figures.append(_figure(latency(data), data, lines, f"As the gateway saw it, {every}."))
    judged = evidence(data)
    if judged is not None:
        plot, legend = judged
        told = "E-values at each decision: 1 is none, and looking often does not inflate them."
        figures.append(_figure(plot, data, legend, told))
    return figures


_PERCENTILES = (("", "p50"), (" dashed", "p99"))


def _figure(plot: Plot, data: Data, legend: Sequence[tuple[str, str]], told: str) -> str:
    keys = "".join(f'<span><i class="key {kind}"></i>{escape(name)}</span>' for kind, name in legend)
    title = f"<h3>{escape(plot.title)}<small>{escape(told)}</small></h3>"
    caption = f'<figcaption>{title}<span class="legend">{keys}</span></figcaption>'
    return f"<figure>{caption}\n{plot.svg(data.marks)}\n</figure>"


# --- the decisions and the policy -------------------------------------------------------------------------------------


def _decisions(decisions: Sequence[Decision]) -> str:
    if not decisions:
        return "<section><h2>Decisions</h2><p>Nothing was decided yet.</p></section>"
    rows = "".join(map(_decision, decisions))
    head = "".join(f"<th>{each}</th>" for each in ("", "When", "What", "Share", "Who", "Why"))
    return (
        f'<section><h2>Decisions</h2><table class="decisions"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _decision(decision: Decision) -> str:
    gates, own = "", "rollout"
    if decision.gates:
        own = "the judge"
        rows = "".join(map(_gate, decision.gates))
        gates = f"<details><summary>{len(decision.gates)} gates</summary><table>{rows}</table></details>"
    return (
        f'<tr><td class="number">{decision.number}</td><td class="when">{decision.at:%H:%M:%S}</td>'
        f'<td class="what {escape(decision.action)}">{escape(worded(decision.action))}</td>'
        f"<td>{decision.percent:g} %</td><td>{escape(decision.actor or own)}</td>"
        f"<td>{escape(decision.reason)}{gates}</td></tr>\n"
    )


def _gate(gate: Gate) -> str:
    return (
        f'<tr><td class="{gate.state.value}">{MARKS[gate.state]}</td><td>{escape(worded(gate.name))}</td>'
        f'<td>{escape(gate.detail)}</td><td class="dim">{escape(numbers_of(gate))}</td></tr>'
    )


def _policy(rollout: Rollout) -> str:
    text = escape(to_yaml(rollout.policy.model_dump(mode="json")))
    return f"<section><details><summary>The whole policy</summary><pre>{text}</pre></details></section>"
