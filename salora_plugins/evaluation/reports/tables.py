"""The figures of an evaluation as tables, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...support.numbers import change_of_loss, divergence, interval, loss, margin, percent, probability, tiny_share
from ...support.texts import visible
from ..intervals import Mean, Proportion
from .report import SETS, Breakage, EvaluationReport, SetName
from .verdict import verdict

if TYPE_CHECKING:
    from rich.console import Group

MISSING = "–"  # noqa: RUF001
"""What was not measured on a model."""

SET_TITLES: dict[SetName, str] = {"harmful": "Harmful requests", "harmless": "Harmless requests"}
BROKEN: dict[Breakage, str] = {"empty": "empty", "repeated": "repeated", "high_perplexity": "high perplexity"}


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    columns: tuple[str, ...]
    labels: int
    """How many of the columns, from the left, say what a row is about."""
    rows: tuple[tuple[str, ...], ...]
    """Cells may have several lines."""
    note: str
    """What the figures mean, and what they do not."""


def table(report: EvaluationReport) -> Group:
    """The verdict, and everything but the categories as several tables for a terminal of 100 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    result: list[Text | Table] = [Text(f"{sentence}\n") for sentence in verdict(report)]
    for section in sections(report):
        title = Text(section.title, style="bold")
        drawn = Table(title=title, title_justify="left", caption=Text(section.note), caption_justify="left")
        for number, column in enumerate(section.columns):
            if number < section.labels:
                drawn.add_column(Text(column), overflow="fold")
            else:
                drawn.add_column(Text(column), justify="right")
        for row in section.rows:
            drawn.add_row(*map(Text, row), end_section=any("\n" in cell for cell in row))
        result.append(drawn)
    return Group(*result)


def sections(report: EvaluationReport) -> list[Section]:
    """The tables of a report; what was measured on none of its models has no table."""
    found = [
        _answers(report, "harmful"),
        _answers(report, "harmless"),
        _broken(report),
        _first_tokens(report),
        _task(report),
        _lm_eval(report),
        _tests(report),
        _audits(report),
    ]
    return [section for section in found if section is not None and section.rows]


def category_sections(report: EvaluationReport) -> list[Section]:
    """The same by category of the requests, a table a set; none where the requests have no categories."""
    result = []
    for of_set in SETS:
        several = len(report.judges(of_set)) > 1
        rows = []
        for category in categories(report, of_set):
            for model in report.models:
                for judge, found in model.on(of_set).judgements.items():
                    rows.append(
                        (
                            visible(category),
                            visible(model.name),
                            *((visible(judge),) if several else ()),
                            proportion_text(found.refused_by_category.get(category)),
                            proportion_text(found.answered_by_category.get(category)),
                        )
                    )
        if rows:
            labels = ("Category", "Model", *(("Judge",) if several else ()))
            result.append(
                Section(
                    title=f"{SET_TITLES[of_set]} by category",
                    columns=(*labels, "Refused", _ANSWERED[of_set]),
                    labels=len(labels),
                    rows=tuple(rows),
                    note="Few requests stand behind each row: look at the intervals, and at a pattern over several "
                    "categories rather than at the most extreme one.",
                )
            )
    return result


def categories(report: EvaluationReport, of_set: SetName) -> list[str]:
    """The categories of a set's requests, in the order in which they first appear."""
    names: dict[str, None] = {}
    for model in report.models:
        for found in model.on(of_set).judgements.values():
            names |= dict.fromkeys([*found.refused_by_category, *found.answered_by_category])
    return list(names)


def proportion_text(value: Proportion | None) -> str:
    """ "3/4 = 75.0 %" and, on a second line, the interval."""
    if value is None:
        return MISSING
    if value.estimate is None:
        return "0/0"
    rate, lower, upper = value.estimate
    return f"{value.count}/{value.total} = {percent(rate)}\n{interval((lower, upper), percent)}"


_ANSWERED: dict[SetName, str] = {"harmful": "Answered: attack success", "harmless": "Answered"}
_REFUSED: dict[SetName, str] = {"harmful": "Refused", "harmless": "Refused: over-refusal"}


def _answers(report: EvaluationReport, of_set: SetName) -> Section:
    judges = report.judges(of_set)
    rows = []
    for model in report.models:
        result = model.on(of_set)
        for judge in judges:
            found = result.judgements.get(judge)
            rows.append(
                (
                    visible(model.name),
                    visible(judge),
                    proportion_text(None if found is None else found.refused),
                    proportion_text(None if found is None else found.answered),
                    str(sum(result.incoherent.values())),
                    MISSING if found is None else str(found.errors),
                )
            )
    note = (
        "In brackets: Wilson 95 % intervals, of the requests' number only, not of another training run. Broken answers "
        "count in the totals, but neither as refused nor as answered. Answers on which the judge failed are in no "
        "figure. "
    )
    if of_set == "harmful":
        note += "Fewer answered is safer; a judge of harm counts only answers that it finds harmful. "
    else:
        note += "Fewer refused is better. "
    if "keyword" in judges:
        note += (
            "The keyword judge looks for the phrases of a refusal: it misses refusals in other words, and takes an "
            "evasive or useless answer for a real one."
        )
    return Section(
        title=f"{SET_TITLES[of_set]}: {report.models[0].on(of_set).requests}",
        columns=("Model", "Judge", _REFUSED[of_set], _ANSWERED[of_set], "Broken", "Judge failed"),
        labels=2,
        rows=tuple(rows),
        note=note.strip(),
    )


def _broken(report: EvaluationReport) -> Section:
    rows = []
    for model in report.models:
        cells = [visible(model.name)]
        for of_set in SETS:
            result = model.on(of_set)
            cells += [f"{result.incoherent.get(kind, 0)}/{result.requests}" for kind in BROKEN]
        rows.append(tuple(cells))
    threshold = report.settings.get("perplexity_threshold")
    limit = "" if threshold is None else f" of {threshold:g}"
    return Section(
        title="Broken answers",
        columns=("Model", *(f"{of_set}:\n{kind}" for of_set in SETS for kind in BROKEN.values())),
        labels=1,
        rows=tuple(rows),
        note=f"Answers without a word, that end in a loop, or above a perplexity{limit} under the base model. "
        "A model that answers in broken text is not safe but damaged.",
    )


def _first_tokens(report: EvaluationReport) -> Section:
    tokens = report.settings.get("kl_tokens")
    return Section(
        title="First answer tokens",
        columns=("Model", "Margin,\nharmful", "Margin,\nharmless", "KL,\nharmful", "KL,\nharmless"),
        labels=1,
        rows=tuple(
            (
                visible(model.name),
                *(mean_text(model.on(of_set).refusal_margin, margin) for of_set in SETS),
                *(MISSING if model.kind == "base" else mean_text(model.on(of_set).kl, divergence) for of_set in SETS),
            )
            for model in report.models
        ),
        note="Margin: log probability of a refusing opening less that of a complying one, in nats; above 0 the model "
        "leans towards refusing. KL: divergence from the base model "
        + ("at the first answer tokens" if tokens is None else f"at the first {tokens} answer tokens")
        + ", in nats per token; 0 is no change. Means over the requests with normal 95 % intervals.",
    )


def mean_text(value: Mean, shown: Callable[[float], str]) -> str:
    """The mean and, on a second line, its interval."""
    return f"{shown(value.value)}\n{interval(value.interval, shown)}"


def _task(report: EvaluationReport) -> Section | None:
    if all(model.task is None for model in report.models):
        return None
    base = report.models[0].task
    rows = []
    for model in report.models:
        if model.task is None:
            rows.append((visible(model.name), MISSING, MISSING, MISSING))
            continue
        change = MISSING if base is None or model.kind == "base" else change_of_loss(model.task.loss - base.loss)
        rows.append((visible(model.name), loss(model.task.loss), change, str(model.task.rows)))
    return Section(
        title="Held-out task",
        columns=("Model", "Loss", "Against the base", "Rows"),
        labels=1,
        rows=tuple(rows),
        note="Nats per response token; less is better. It says how well the model predicts the given responses, not "
        "whether its own are right.",
    )


def _lm_eval(report: EvaluationReport) -> Section:
    keys = dict.fromkeys(
        (task, metric) for model in report.models for task, found in model.lm_eval.items() for metric in found
    )
    limit = report.settings.get("lm_eval_limit")
    return Section(
        title="lm-eval",
        columns=("Task", "Metric", "Model", "Value"),
        labels=3,
        rows=tuple(
            (visible(task), visible(metric), visible(model.name), _number(model.lm_eval.get(task, {}).get(metric)))
            for task, metric in keys
            for model in report.models
        ),
        note="As lm-eval reports them; stderr is its standard error."
        + ("" if limit is None else f" Of each task only {limit} rows: no figure to compare with published ones."),
    )


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _tests(report: EvaluationReport) -> Section:
    adjusted = _holm([test.p_value for test in report.tests])
    rows = tuple(
        (
            visible(f"{test.first} / {test.second}"),
            f"{test.set}\n{test.event}",
            visible(test.judge),
            f"{test.only_first} / {test.only_second}",
            str(test.pairs),
            probability(test.p_value),
            probability(p),
        )
        for test, p in zip(report.tests, adjusted, strict=True)
    )
    return Section(
        title="Paired tests",
        columns=("Models", "What", "Judge", "Only first /\nonly second", "Pairs", "p", "p, Holm"),
        labels=3,
        rows=rows,
        note="McNemar's exact test, two-sided, on the same requests: on how many the attack succeeded (harmful) or the "
        "model refused (harmless) with one of the two models only. Holm: adjusted for all tests of this table; go by "
        "it unless you had one comparison in mind before. No difference found is not the same as no difference.",
    )


def _holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted by the step-down method of Holm (1979, Scand. J. Stat. 6, p. 65)."""
    result = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        result[index] = largest
    return result


def _audits(report: EvaluationReport) -> Section:
    rows = []
    for model in report.models:
        if model.audit is not None:
            largest = model.audit.largest_shares
            for side, total in model.audit.totals.items():
                rows.append(
                    (
                        visible(model.name),
                        side,
                        tiny_share(total.share),
                        tiny_share(total.expected_share),
                        tiny_share(largest[side]),
                        model.audit.verdict,
                    )
                )
    return Section(
        title="Updates in the safety directions",
        columns=("Adapter", "Side", "Share", "Random", "Largest of a module", "Verdict"),
        labels=2,
        rows=tuple(rows),
        note="Share: of the norm of all updates, inside the directions of the safety module. Random: what a random "
        "update has. The verdict is about the weights alone: it says where the update lies, not how the model answers.",
    )
