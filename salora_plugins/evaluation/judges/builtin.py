"""The built-in judges, registered."""

from __future__ import annotations

from collections.abc import Callable

from ...hookspecs import BatchJudge, Judge, JudgeFactory, hookimpl
from .keyword import keyword_judge


# Imported when used: torch and transformers take seconds.
def _classifier(argument: str) -> BatchJudge:
    from .classifier import ClassifierJudge

    return ClassifierJudge(argument)


def _endpoint(argument: str) -> BatchJudge:
    from .endpoint import EndpointJudge

    return EndpointJudge(argument, "harm")


def _endpoint_for_refusals(argument: str) -> BatchJudge:
    from .endpoint import EndpointJudge

    return EndpointJudge(argument, "refusal")


@hookimpl
def register_judges(register: Callable[[str, Judge], None]) -> None:
    register("keyword", keyword_judge)


@hookimpl
def register_judge_factories(register: Callable[[str, JudgeFactory], None]) -> None:
    register("classifier", _classifier)
    register("openai", _endpoint)
    register("openai-refusal", _endpoint_for_refusals)
