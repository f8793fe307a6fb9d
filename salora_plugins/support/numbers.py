"""How numbers are shown, by what they are: the same in every command, report and card."""

from __future__ import annotations

from collections.abc import Callable


def percent(value: float) -> str:
    """A rate, or a share of a whole: "97.8 %"."""
    return f"{100 * value:.1f} %"


def tiny_share(value: float) -> str:
    """A share that is to be close to nothing, such as that of an update in the safety directions: "1.2e-06"."""
    return f"{value:.1e}"


def loss(value: float) -> str:
    """Nats per token: "0.4031"."""
    return f"{value:.4f}"


def change_of_loss(value: float) -> str:
    """With its sign: "+0.0012"."""
    return f"{value:+.4f}"


def margin(value: float) -> str:
    """A refusal margin, or a difference of two, in nats: "3.14"."""
    return f"{value:.2f}"


def divergence(value: float) -> str:
    """A KL divergence, in nats per token: "0.012"."""
    return f"{value:.3f}"


def interval(bounds: tuple[float, float], shown: Callable[[float], str]) -> str:
    """Both bounds as the value itself is shown: "[91.4 %, 98.9 %]"."""
    return f"[{shown(bounds[0])}, {shown(bounds[1])}]"


def spread(mean: float, deviation: float, shown: Callable[[float], str]) -> str:
    """A mean and its standard deviation: "1.23 ± 0.04"."""
    return f"{shown(mean)} ± {shown(deviation)}"


def probability(p: float) -> str:
    """The p value of a test."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def size(number: float) -> str:
    """A number of bytes: "1.5 GB"."""
    return f"{number / 1e9:.1f} GB" if number >= 5e7 else f"{number / 1e6:.1f} MB"
