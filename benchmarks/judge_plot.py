"""The judge benchmark's plot."""

from pathlib import Path
from typing import Any

COLOURS = ("#1b6ca8", "#c2571a", "#8a8a8a", "#c4b454")

LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}


def draw(result: dict[str, Any], harmless: list[str], target: Path) -> None:
    """False rollbacks, power and time to the rollback, one bar for each judge."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    scenarios: dict[str, list[dict[str, Any]]] = result["scenarios"]
    harmful = [name for name in scenarios if name not in harmless]
    figure, axes = plt.subplots(1, 3, figsize=(17, 7), layout="constrained")
    panels = (
        (axes[0], harmless, "rolled_back", "False rollbacks: no difference (% of rollouts)"),
        (axes[1], harmful, "rolled_back", "Rightly rolled back (% of rollouts)"),
        (axes[2], harmful, "seconds", "Median seconds from harm to rollback"),
    )
    for axis, names, what, title in panels:
        _bars(axis, scenarios, names, what)
        axis.set_title(title, fontsize=10.5)
        axis.set_yticks(range(len(names)), [_wrapped(name) for name in names], fontsize=9)
        axis.invert_yaxis()
        axis.margins(y=0.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(5, color="black", linewidth=1, linestyle="--", label="promised: at most 5 %")
    axes[0].set_xlim(0, 112)
    axes[1].set_xlim(0, 112)
    axes[2].set_xscale("log")
    axes[2].set_xlim(0.8, 2500)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=10, frameon=False)
    figure.suptitle(
        f"{result['rollouts']:,} simulated rollouts each: 100 requests/s for {result['seconds']} s, 10 % to the new "
        "version, 1 % errors, looked at every second",
        fontsize=12,
    )
    figure.savefig(target, dpi=110)


def _bars(axis: Any, scenarios: dict[str, list[dict[str, Any]]], names: list[str], what: str) -> None:
    judges = [row["judge"] for row in scenarios[names[0]]]
    height = 0.8 / len(judges)
    for index, judge in enumerate(judges):
        places = [at + (index - (len(judges) - 1) / 2) * height for at in range(len(names))]
        values = [scenarios[name][index][what] for name in names]
        shown = [(value or 0.0) * (100 if what == "rolled_back" else 1) for value in values]
        axis.barh(places, shown, height * 0.92, color=COLOURS[index], label=judge)
        for place, value, known in zip(places, shown, values, strict=True):
            text = "never" if known is None else f"{value:.1f}" if what == "rolled_back" else f"{value:,.0f}"
            start = (max(value, 0.8 if what == "seconds" else 0), place)
            axis.annotate(text, start, (3, 0), textcoords="offset points", va="center", fontsize=7.5, bbox=LABEL)


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n").replace(" after", "\nafter")
