"""What a model loses without its safety directions, as data, a table, words and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

from ...ranks import Side
from ...support.numbers import interval, loss, margin, spread
from ...support.plotting import new_figure, save_png
from ..intervals import Mean

if TYPE_CHECKING:
    from rich.table import Table

RANDOM_SUBSPACES = 5
"""How many times random directions are drawn, for a comparison."""

# A one-sided test of one value against five draws: Student's t of 4 degrees of freedom at 1 %, for a new observation.
_SPECIAL = 3.747 * (1 + 1 / RANDOM_SUBSPACES) ** 0.5


@dataclass(frozen=True)
class Measures:
    """The model in one state."""

    harmful_margin: Mean
    """Refusal margin on the harmful requests, nats."""
    harmless_margin: Mean
    """Refusal margin on the harmless requests, nats."""
    harmless_loss: float
    """On answers to the harmless requests, nats per response token."""


@dataclass(frozen=True)
class SideValidation:
    """One side of the safety module: the model without its directions, and without as many others."""

    safety: Measures
    """Without the safety directions."""
    random: tuple[Measures, ...]
    """Without random directions, of the same number in every layer, once per draw."""
    ordinary: Measures
    """Without the most important directions on the harmless data, of the same number in every layer."""


@dataclass(frozen=True)
class ValidationReport:
    """The outcome of [`validate`]."""

    unchanged: Measures
    sides: dict[Side, SideValidation]
    """Side -> its validation."""
    settings: dict[str, Any]

    def drop(self, side: Side, kind: Literal["safety", "ordinary"] = "safety") -> float:
        """By how many nats the mean refusal margin falls without the `safety` or `ordinary` directions."""
        found = self.sides[side].safety if kind == "safety" else self.sides[side].ordinary
        return self.unchanged.harmful_margin.value - found.harmful_margin.value

    def random_drops(self, side: Side) -> list[float]:
        """The same for the random directions, once per draw."""
        return [self.unchanged.harmful_margin.value - draw.harmful_margin.value for draw in self.sides[side].random]

    def is_special(self, side: Side) -> bool:
        """
        Whether removing the safety directions lowers the margin more than random ones do, at the 1 % level.

        One value against the draws' mean, by Student's t with the draws' spread; one-sided.
        """
        drops = self.random_drops(side)
        return self.drop(side) > mean(drops) + _SPECIAL * stdev(drops)

    def is_specific(self, side: Side) -> bool:
        """
        Whether the margin is lower without the safety directions than without the most important ones of ordinary
        answers, their 95 % intervals being apart.
        """
        found = self.sides[side]
        return found.safety.harmful_margin.interval[1] < found.ordinary.harmful_margin.interval[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""

        def values(measures: Measures) -> dict[str, Any]:
            return {
                "harmful_margin": measures.harmful_margin.model_dump(),
                "harmless_margin": measures.harmless_margin.model_dump(),
                "harmless_loss": measures.harmless_loss,
            }

        return {
            "settings": self.settings,
            "unchanged": values(self.unchanged),
            "sides": {
                side: {
                    "safety": values(found.safety),
                    "random": [values(draw) for draw in found.random],
                    "ordinary": values(found.ordinary),
                    "margin_drop": self.drop(side),
                    "random_margin_drops": self.random_drops(side),
                    "special": self.is_special(side),
                    "specific": self.is_specific(side),
                }
                for side, found in self.sides.items()
            },
        }

    def table(self) -> Table:
        """One row a state of the model."""
        from rich.table import Table

        result = Table(
            caption="Margin: log P(refusing opening) - log P(complying opening), nats, with 95 % intervals over the "
            f"requests. Random: mean and standard deviation over {RANDOM_SUBSPACES} draws.",
            caption_justify="left",
        )
        result.add_column("Without")
        for header in ("margin, harmful", "margin, harmless", "harmless loss"):
            result.add_column(header, justify="right")

        def row(name: str, measures: Measures) -> None:
            margins = (measures.harmful_margin, measures.harmless_margin)
            cells = [f"{margin(m.value)} {interval(m.interval, margin)}" for m in margins]
            result.add_row(name, *cells, loss(measures.harmless_loss))

        row("(unchanged)", self.unchanged)
        for side, found in self.sides.items():
            result.add_section()
            row(f"safety directions, {side}", found.safety)
            result.add_row(f"random directions, {side}", *(_spread(found.random, *measure) for measure in _MEASURES))
            row(f"ordinary directions, {side}", found.ordinary)
        return result

    def summary(self) -> str:
        """What the table means, a line or two a side."""
        return "\n".join(line for side in self.sides for line in self._verdict(side))

    def _verdict(self, side: Side) -> Iterator[str]:
        found, drops = self.sides[side], self.random_drops(side)
        if not self.is_special(side):
            holds = "does not hold refusals more than random directions do"
        elif self.is_specific(side):
            holds = "holds refusals"
        else:
            holds = "matters for refusals, but no more than the directions on which ordinary answers depend most"
        yield (
            f"The {side} side {holds}: without it the refusal margin falls by {margin(self.drop(side))} nats; without "
            f"random directions by {spread(mean(drops), stdev(drops), margin)}; without the most important directions "
            f"of ordinary answers by {margin(self.drop(side, 'ordinary'))}."
        )
        rises = [state.harmless_loss - self.unchanged.harmless_loss for state in (found.safety, found.ordinary)]
        random_rise = mean(draw.harmless_loss for draw in found.random) - self.unchanged.harmless_loss
        yield (
            "Ordinary answers need these directions, too, as far as their loss rises without them: by "
            f"{loss(rises[0])} nats per token (random {loss(random_rise)}, ordinary {loss(rises[1])})."
        )


_MEASURES: tuple[tuple[Callable[[Measures], float], Callable[[float], str]], ...] = (
    (lambda measures: measures.harmful_margin.value, margin),
    (lambda measures: measures.harmless_margin.value, margin),
    (lambda measures: measures.harmless_loss, loss),
)
"""Each with how it is shown."""


def _spread(draws: Sequence[Measures], get: Callable[[Measures], float], shown: Callable[[float], str]) -> str:
    values = [get(draw) for draw in draws]
    return spread(mean(values), stdev(values), shown)


def write_plot(path: Path, report: ValidationReport) -> None:
    """
    Draw by how much the refusal margin falls, and the harmless loss rises, without each kind of direction; PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    unchanged = report.unchanged
    figure = new_figure(11, 0.9 + 1.6 * len(report.sides))
    grid = figure.subplots(len(report.sides), 2, squeeze=False, sharex="col")
    panels: tuple[tuple[str, Callable[[Measures], float]], ...] = (
        (
            "Refusal margin lost on harmful requests, nats",
            lambda m: unchanged.harmful_margin.value - m.harmful_margin.value,
        ),
        ("Loss gained on harmless answers, nats per token", lambda m: m.harmless_loss - unchanged.harmless_loss),
    )
    for row, (axes, (side, found)) in enumerate(zip(grid, report.sides.items(), strict=True)):
        states_by_kind: tuple[tuple[str, Sequence[Measures], str], ...] = (
            (f"safety directions, {side}", [found.safety], "#c8553d"),
            ("ordinary directions", [found.ordinary], "#2a6f97"),
            (f"random directions ({RANDOM_SUBSPACES} draws)", found.random, "#555555"),
        )
        for column, (axis, (title, change)) in enumerate(zip(axes, panels, strict=True)):
            for position, (_, states, color) in enumerate(states_by_kind):
                axis.plot([change(state) for state in states], [position] * len(states), "o", color=color, alpha=0.75)
            axis.axvline(0, color="#999999", linewidth=1)
            labels = [label for label, _, _ in states_by_kind]
            axis.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
            axis.set_ylim(len(labels) - 0.5, -0.5)
            axis.set_title(title if row == 0 else "", fontsize=10)
            axis.grid(axis="x", alpha=0.3)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
    save_png(path, figure)
