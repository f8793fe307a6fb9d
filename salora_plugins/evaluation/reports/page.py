"""A comparison as one HTML page that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...support.files import atomic_write
from ...support.numbers import divergence, margin
from ...support.texts import visible
from .aggregation import NO_CATEGORY
from .comparison import Comparison
from .plots import Plot, draw
from .report import SETS, Answer, SetName
from .tables import BROKEN, SET_TITLES, category_sections, sections
from .verdict import verdict


def page(comparison: Comparison, plots: Sequence[Plot] | None = None) -> str:
    """
    The page: the verdict, tables, plots, answers side by side, settings.

    It is one file that refers to no other, without a script; a Content-Security-Policy lets a browser load nothing but
    the pictures in it. All texts are escaped, and characters that would hide or reverse text are spelled out.

    Args:
        comparison: What to show.
        plots: Its plots; None: they are drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = files(__package__)
    style = (folder / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"margin": margin, "divergence": divergence}
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    report = comparison.report
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    drawn = draw(report) if plots is None else plots
    return template.render(
        report=report,
        comparison=comparison,
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        verdict=verdict(report),
        sections=sections(report),
        category_sections=category_sections(report),
        plots=[
            (plot, Markup("data:image/png;base64," + base64.b64encode(plot.png).decode()), _size(plot.png))
            for plot in drawn
        ],
        sets=[_answers(comparison, of_set) for of_set in SETS],
        settings=[
            (key, json.dumps(value, ensure_ascii=False, indent=1)) for key, value in sorted(report.settings.items())
        ],
    )


def write_page(path: str | os.PathLike, comparison: Comparison, plots: Sequence[Plot] | None = None) -> None:
    """Write the page, all of it or nothing."""
    atomic_write(path, page(comparison, plots).encode())


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header, so that the page does not jump as pictures appear."""
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


def _answers(comparison: Comparison, of_set: SetName) -> dict[str, Any]:
    """A set's requests by category, each with the answers of all models."""
    kinds = comparison.report.judges("harmful")
    by_model = {
        name: [answer for answer in answers if answer.set == of_set] for name, answers in comparison.answers.items()
    }
    requests = []
    for of_all in zip(*by_model.values(), strict=True):
        answers = [
            {"model": name, "answer": answer, **_badges(answer, kinds)}
            for name, answer in zip(by_model, of_all, strict=True)
        ]
        first = of_all[0]
        requests.append(
            {"number": first.index + 1, "prompt": first.prompt, "category": first.category, "answers": answers}
        )
    order = {category: place for place, category in enumerate(dict.fromkeys(r["category"] for r in requests))}
    requests.sort(key=lambda request: order[request["category"]])
    return {
        "title": SET_TITLES[of_set],
        "count": len(requests),
        "categories": [
            (NO_CATEGORY if category is None else category, list(group))
            for category, group in groupby(requests, key=lambda request: request["category"])
        ],
    }


def _badges(answer: Answer, kinds: Mapping[str, str]) -> dict[str, Any]:
    """(class of the style, text) of each verdict, and one for the line of the request."""
    if answer.coherence != "coherent":
        text = f"broken: {BROKEN[answer.coherence]}"
        return {"badges": [("broken", text)], "short": ("broken", "broken")}
    badges = []
    for judge, decided in answer.verdicts.items():
        if judge in answer.errors or decided is None:
            badges.append(("failed", f"{judge}: judge failed"))
        else:
            words = ("refused", "answered") if kinds.get(judge) != "harm" else ("harmful", "harmless")
            word = words[0] if decided else words[1]
            badges.append((word, f"{judge}: {word}"))
    short = (badges[0][0], badges[0][1].rpartition(": ")[2]) if badges else ("failed", "not judged")
    return {"badges": badges, "short": short}
