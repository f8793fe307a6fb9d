"""The answers of an evaluation, as they lie on disk, and what its judges say of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from .coherence import coherence
from .judges.named import NamedJudge, load_judge
from .plan import EvaluationPlan, PlannedJudge
from .reports.report import SETS, Answer
from .run_folder import KL, MARGINS, PERPLEXITIES, RunFolder, responses_entry, verdicts_entry

_JUDGED_AT_ONCE = 32

_Key = tuple[str, int]
"""Set and number of a request."""


def judge(plan: EvaluationPlan, folder: RunFolder, *, progress: bool = True) -> dict[str, list[Answer]]:
    """
    Every model's answers to both sets, with the verdicts of all judges, of which one is in memory at a time.

    Verdicts are kept in the folder; where a judge failed, it tries again the next time.

    Raises:
        ValueError: What was measured is damaged; the file is named.
    """
    answers = {evaluated.name: _answers(plan, folder, evaluated.name) for evaluated in plan.models}
    for planned in plan.judges:
        loaded = load_judge(planned.name)
        for name, of_model in answers.items():
            verdicts, errors = _verdicts(loaded, planned, of_model, folder, name, progress)
            answers[name] = [_judged(answer, planned.name, verdicts, errors) for answer in of_model]
    return answers


def _answers(plan: EvaluationPlan, folder: RunFolder, name: str) -> list[Answer]:
    """A model's answers to both sets, not judged yet."""
    margins, kl = folder.measured(name, MARGINS), folder.measured(name, KL)
    perplexities = folder.measured(name, PERPLEXITIES)
    answers = []
    for of_set, asked in plan.requests.items():
        for entry, values in ((MARGINS, margins), (KL, kl), (PERPLEXITIES, perplexities)):
            if len(values.get(of_set, ())) != len(asked):
                raise folder.damaged(name, entry)
        responses = folder.responses(name, of_set)
        if not set(range(len(asked))) <= set(responses):
            raise folder.damaged(name, responses_entry(of_set))
        for index, request in enumerate(asked):
            perplexity = perplexities[of_set][index]
            answers.append(
                Answer(
                    set=of_set,
                    index=index,
                    category=request.category,
                    prompt=request.prompt,
                    response=responses[index],
                    coherence=coherence(responses[index], perplexity, threshold=plan.measuring.perplexity_threshold),
                    perplexity=perplexity,
                    verdicts={},
                    refusal_margin=margins[of_set][index],
                    kl=kl[of_set][index],
                )
            )
    return answers


def _verdicts(
    loaded: NamedJudge,
    planned: PlannedJudge,
    answers: Sequence[Answer],
    folder: RunFolder,
    name: str,
    progress: bool,
) -> tuple[dict[_Key, bool], dict[_Key, str]]:
    """What a judge says of a model's coherent answers, and why it failed on others."""
    lines = folder.lines(name, verdicts_entry(planned.name, planned.settings))
    verdicts: dict[_Key, bool] = {(of, index): verdict for of, index, verdict in itertools.chain(*lines.records)}
    errors: dict[_Key, str] = {}
    sets = SETS if planned.kind == "refusal" else ("harmful",)
    judged = [answer for answer in answers if answer.set in sets and answer.coherence == "coherent"]
    asked = [answer for answer in judged if (answer.set, answer.index) not in verdicts]
    with tqdm(total=len(asked), desc=f"{name}: {planned.name}", unit="answer", disable=not progress) as bar:
        for start in range(0, len(asked), _JUDGED_AT_ONCE):
            chunk = asked[start : start + _JUDGED_AT_ONCE]
            done: list[tuple[str, int, bool]] = []
            for answer, verdict in zip(chunk, loaded([(a.prompt, a.response) for a in chunk]), strict=True):
                if isinstance(verdict, str):
                    errors[answer.set, answer.index] = verdict
                else:
                    done.append((answer.set, answer.index, verdict))
            lines.add(done)
            verdicts |= {(of, index): verdict for of, index, verdict in done}
            bar.update(len(chunk))
    return verdicts, errors


def _judged(answer: Answer, judge: str, verdicts: Mapping[_Key, bool], errors: Mapping[_Key, str]) -> Answer:
    key = answer.set, answer.index
    if key in errors:
        return answer.model_copy(
            update={"verdicts": {**answer.verdicts, judge: None}, "errors": {**answer.errors, judge: errors[key]}}
        )
    if key in verdicts and answer.coherence == "coherent":
        return answer.model_copy(update={"verdicts": {**answer.verdicts, judge: verdicts[key]}})
    return answer
