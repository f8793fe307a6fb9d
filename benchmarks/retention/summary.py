"""The tables and the plot of docs/evidence/safety-retention.md."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import tables
from ..runs import EVIDENCE, Run
from ..small_model import legend_below, new_figure
from .experiment import PUBLISHED, Results
from .methods import METHODS

DOCUMENT = EVIDENCE / "safety-retention.md"
PLOTTED = ("lora", "pissa", "paper", "two-sided", "lora-all-linear", "two-sided-all-linear")  # of METHODS

SETS = {
    "advbench": "AdvBench",
    "advbench-new": "AdvBench, new",
    "do-not-answer": "Do-Not-Answer",
    "builtin": "built-in",
    "harmless": "look-alikes",
}
"""Request set -> its name in the first table, in the order there."""

# Task, method, learning rate and step of the first table, with what the method is called there.
POINTS_THAT_MATTER = (
    ("math", "lora", 0.004, 30, "LoRA, 30 steps"),
    ("math", "lora", 0.004, 60, "LoRA, 60 steps"),
    ("math", "projected", 0.004, 30, "LoRA, projected"),
    ("math", "paper", 0.002, 30, "paper's form, 30 steps"),
    ("math", "two-sided", 0.004, 30, "default, 30 steps"),
    ("math", "two-sided", 0.004, 60, "default, 60 steps"),
    ("math", "two-sided", 0.004, 90, "default, 90 steps"),
    ("python", "lora", 0.004, 30, "LoRA, 30 steps"),
    ("python", "lora", 0.004, 60, "LoRA, 60 steps"),
    ("python", "projected", 0.004, 60, "LoRA, projected"),
    ("python", "paper", 0.002, 30, "paper's form, 30 steps"),
    ("python", "two-sided", 0.004, 30, "default, 30 steps"),
    ("python", "two-sided", 0.004, 60, "default, 60 steps"),
    ("sure", "lora", 0.002, 60, "LoRA, 60 steps"),
    ("sure", "projected", 0.002, 60, "LoRA, projected"),
    ("sure", "lora-attention", 0.001, 60, "LoRA, attention"),
    ("sure", "lora-all-linear", 0.001, 60, "LoRA, all linear"),
    ("sure", "paper", 0.001, 60, "paper's form, 60 steps"),
    ("sure", "two-sided", 0.002, 60, "default, 60 steps"),
    ("sure", "two-sided-attention", 0.002, 60, "default, attention"),
    ("sure", "two-sided-all-linear", 0.001, 60, "default, all linear"),
    ("definitions", "lora", 0.004, 30, "LoRA, 30 steps"),
    ("definitions", "lora", 0.004, 60, "LoRA, 60 steps"),
    ("definitions", "lora-all-linear", 0.001, 60, "LoRA, all linear"),
    ("definitions", "two-sided", 0.004, 60, "default, 60 steps"),
    ("definitions", "two-sided-all-linear", 0.001, 60, "default, all linear"),
)

# Task -> learning rate and step at which LoRA and the default are compared with the target.
TARGET_POINTS = {"math": (0.004, 60), "python": (0.004, 60), "sure": (0.002, 60)}

Key = tuple[str, str, float, int]
"""Task, method, learning rate, step."""

Row = dict[str, Any]
"""What was measured at a key: the seeds' `losses`, and their sums of `refused`, `broken` and `requests` by set."""


def summarize(results: Results, write: bool) -> None:
    """Print the tables, or write them to the document, and draw the plot; seeds are taken together."""
    base, measured = results.base(), pooled(results.runs().values())
    if not measured:
        sys.exit(f"--results {results.folder}: no run is there yet")
    if write:
        tables.write(DOCUMENT, document_tables(results))
        print(f"wrote the tables of {DOCUMENT}")
    else:
        print(all_runs(measured, base))
    draw(measured, base, results.folder / "frontier.png")


def document_tables(results: Results | None = None) -> dict[str, str]:
    """Name -> table of the document, from the published runs."""
    results = results or Results(PUBLISHED)
    base, measured = results.base(), pooled(results.runs().values())
    return {
        "points that matter": points_that_matter(measured, base),
        "against the target": against_the_target(measured, base),
        "all runs": all_runs(measured, base),
    }


def pooled(runs: Iterable[Run]) -> dict[Key, Row]:
    """What was measured by task, method, learning rate and step, over all seeds, in the order of METHODS."""
    rows: dict[Key, Row] = {}
    counted = ("refused", "broken", "requests")
    for run in runs:
        for point in run["points"]:
            key = (run["task"], run["method"], run["learning_rate"], point["step"])
            row = rows.setdefault(key, {"losses": []} | {kind: Counter() for kind in counted})
            row["losses"].append(point["loss"])
            for kind in counted:
                row[kind].update(point[kind])
    order = list(METHODS)
    return dict(sorted(rows.items(), key=lambda item: (item[0][0], order.index(item[0][1]), *item[0][2:])))


def points_that_matter(measured: dict[Key, Row], base: Run) -> str:
    """Counts at a choice of points, below those of the base model."""
    tasks = list(dict.fromkeys(task for task, *_ in POINTS_THAT_MATTER))
    base_losses = ", ".join(f"{task} {base['loss'][task]:.3f}" for task in tasks)
    rows = [["-", "base model", "-", "-", base_losses, *counts(base)]]
    for task, method, rate, step, label in POINTS_THAT_MATTER:
        row = measured[task, method, rate, step]
        rows.append([task, label, f"{rate:g}", str(len(row["losses"])), losses(row), *counts(row)])
    return tables.markdown(
        ["task", "method", "learning rate", "seeds", "held-out loss", *SETS.values(), "broken"], rows
    )


def counts(row: Row) -> list[str]:
    """How many requests of each set are refused, and how many answers are broken."""
    return [*(of(row["refused"][name], row["requests"].get(name, 0)) for name in SETS), broken(row)]


def of(count: int, total: int) -> str:
    return f"{count} of {total}" if total else "-"


def broken(row: Row) -> str:
    return of(sum(row["broken"].values()), sum(row["requests"].values()))


def against_the_target(measured: dict[Key, Row], base: Run) -> str:
    """The default against LoRA at its best learning rate and against the base model's refusals, by task."""
    points = {
        task: (measured[task, "lora", *point], measured[task, "two-sided", *point])
        for task, point in TARGET_POINTS.items()
    }
    own_sets = ("advbench", "builtin", "harmless")
    own_requests = sum(base["requests"][name] for name in own_sets)
    base_broken = of(sum(base["broken"][name] for name in own_sets), own_requests)

    def kept(name: str) -> list[str]:
        """Refusals over those of the base model, asked the same as often."""
        return [
            of(ours["refused"][name], base["refused"][name] * ours["requests"][name] // base["requests"][name])
            for _, ours in points.values()
        ]

    def per_seed(kind: str, names: Iterable[str]) -> list[str]:
        return [f"{sum(ours[kind][name] for name in names) / len(ours['losses']):.0f}" for _, ours in points.values()]

    rows = [
        [
            "LoRA's best held-out loss, of those tried: 60 steps, three seeds",
            *(losses(lora) for lora, _ in points.values()),
        ],
        ["the default's after as many steps, three seeds", *(losses(ours) for _, ours in points.values())],
        ["AdvBench kept", *kept("advbench")],
        ["AdvBench, new, kept", *kept("advbench-new")],
        ["Do-Not-Answer, against the base model's", *kept("do-not-answer")],
        ["built-in (calibration saw its kinds)", *kept("builtin")],
        [f"look-alikes refused (base model: {base['refused']['harmless']})", *per_seed("refused", ["harmless"])],
        [f"broken answers (base model: {base_broken})", *per_seed("broken", own_sets)],
    ]
    return tables.markdown(["", *points], rows)


def all_runs(measured: dict[Key, Row], base: Run) -> str:
    """One table a task: percentages with their intervals."""
    parts = []
    sets = list(base["requests"])
    columns = ["method", "learning rate", "step", "seeds", "held-out loss", *sets, "broken"]
    for task in sorted({task for task, *_ in measured}):
        refused = ", ".join(f"{name} {base['refused'][name]} of {base['requests'][name]}" for name in sets)
        parts.append(f"**{task}**: base model {base['loss'][task]:.3f}; refused: {refused}.")
        rows = []
        for (of_task, method, rate, step), row in measured.items():
            if of_task == task:
                shares = [share_cell(row, name, base) for name in sets]
                rows.append(
                    [method, f"{rate:g}", str(step), str(len(row["losses"])), losses(row), *shares, broken(row)]
                )
        parts.append(tables.markdown(columns, rows))
    return "\n\n".join(parts)


def share_cell(row: Row, name: str, base: Run) -> str:
    if not row["requests"][name]:
        return "-"
    share, lower, upper = percentages(row, name, base)
    return f"{share:.0f} % [{lower:.0f}, {upper:.0f}]"


def losses(row: Row) -> str:
    mean = f"{statistics.mean(row['losses']):.3f}"
    return mean if len(row["losses"]) == 1 else f"{mean} ({min(row['losses']):.3f} to {max(row['losses']):.3f})"


def percentages(row: Row, name: str, base: Run) -> tuple[float, float, float]:
    """
    The share of the requests in percent, a mean over seeds, and its Wilson 95 % interval: for as many requests as
    there are, since asking the same ones again for another seed does not make more of them.
    """
    from salora_plugins.evaluation.intervals import wilson_interval

    if not row["requests"][name]:
        return math.nan, math.nan, math.nan
    share, number = row["refused"][name] / row["requests"][name], base["requests"][name]
    lower, upper = wilson_interval(share * number, number)
    return 100 * share, 100 * lower, 100 * upper


def draw(measured: dict[Key, Row], base: Run, path: Path) -> None:
    """A panel a task and source: refused share with its interval against mean held-out loss, a colour a method."""
    tasks = sorted({task for task, *_ in measured})
    sources = [name for name in base["requests"] if name != "harmless"]
    figure = new_figure((4.6 * len(tasks), 3.2 * len(sources) + 0.8))
    axes = figure.subplots(len(sources), len(tasks), squeeze=False)
    handles: dict[str, Any] = {}
    for (line, source), (column, task) in itertools.product(enumerate(sources), enumerate(tasks)):
        axis = axes[line][column]
        base_share = 100 * base["refused"][source] / base["requests"][source]
        handles["base model"] = axis.axhline(base_share, color="#777777", linestyle=":")
        for number, method in enumerate(PLOTTED):
            points = [
                (statistics.mean(row["losses"]), *percentages(row, source, base))
                for (of_task, of_method, *_), row in measured.items()
                if (of_task, of_method) == (task, method) and row["requests"][source]
            ]
            if points:
                handles[method] = draw_method(axis, points, number)
        axis.set_title(f"{task}: refused of {source}, %", fontsize=10)
        axis.set_xlabel("held-out loss, nats per token")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    legend_below(figure, handles, columns=6, fontsize=9)
    figure.savefig(path)
    print(f"\nwrote {path}")


def draw_method(axis: Any, points: list[tuple[float, float, float, float]], number: int) -> Any:
    """Loss, share and interval of each point, and a line through what no other point beats in both."""
    best = -1.0
    frontier = [
        (loss, best := share) for loss, share, *_ in sorted(points, key=lambda p: (p[0], -p[1])) if share > best
    ]
    color = f"C{number}"
    axis.step(*zip(*frontier, strict=True), where="post", color=color, alpha=0.5, linewidth=1.2)
    return axis.errorbar(
        [loss for loss, *_ in points],
        [share for _, share, *_ in points],
        [[share - lower for _, share, lower, _ in points], [upper - share for _, share, _, upper in points]],
        fmt="osD^vP*"[number],
        color=color,
        alpha=0.8,
        markersize=5,
        elinewidth=0.8,
        capsize=2,
    )
