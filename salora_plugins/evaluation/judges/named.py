"""Judges by name, and their verdicts; what a judge fails on is an error and no verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...hookspecs import BatchJudge, Judge, JudgeKind
from ...plugins import judge_factories, judges


class NamedJudge:
    """A judge as the evaluation uses it, whatever it is made of."""

    def __init__(self, name: str, judge: BatchJudge) -> None:
        self.name = name
        self.kind: JudgeKind = judge.kind
        self._judge = judge
        self._loaded = False

    def describe(self) -> dict[str, Any]:
        """Its kind and its settings as JSON values; raises what keeps it from working, as far as that is known."""
        return {"kind": self.kind, **self._judge.describe()}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool | str]:
        """
        Judge pairs of request and response; the first call loads what the judge needs.

        Returns:
            Per pair its verdict (True: refuses or, for a judge of harm, is harmful), or why the judge failed. Where it
            fails on several pairs at once, each is tried alone.
        """
        if pairs and not self._loaded:
            self._judge.load()
            self._loaded = True
        return self._verdicts(list(pairs)) if pairs else []

    def _verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[bool | str]:
        try:
            verdicts = list(self._judge(pairs))
            if len(verdicts) != len(pairs):
                raise ValueError(f"the judge returned {len(verdicts)} verdicts on {len(pairs)} answers")
        except (Exception, SystemExit) as error:  # a judge that ends the process would end the evaluation silently
            if len(pairs) > 1:
                return [verdict for pair in pairs for verdict in self._verdicts([pair])]
            return [f"{type(error).__name__}: {error}"]
        return [_checked(verdict) for verdict in verdicts]


def load_judge(spec: str) -> NamedJudge:
    """
    A judge by name. Nothing is loaded yet.

    Args:
        spec: "NAME", or "NAME:ARGUMENT". Built in are "keyword", "classifier:MODEL", "openai:URL#MODEL" and
            "openai-refusal:URL#MODEL"; plugins can add others.

    Raises:
        ValueError: There is none of that name, or the argument is not usable.
    """
    plain = judges()
    if spec in plain:
        return NamedJudge(spec, _PlainJudge(plain[spec]))
    factories = judge_factories()
    name, _, argument = spec.partition(":")
    if name not in factories:
        known = sorted(plain) + [f"{factory}:..." for factory in sorted(factories)]
        reason = "it takes no argument" if name in plain else "there is none of that name"
        # Without its argument, which may hold a key.
        raise ValueError(f"judge {name!r}: {reason}. Known: {', '.join(known)}.")
    return NamedJudge(spec, factories[name](argument))


class _PlainJudge:
    """A judge of single answers, a function (request, response) -> bool, which may have a `kind` and `describe()`."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.kind: JudgeKind = getattr(judge, "kind", "refusal")

    def describe(self) -> dict[str, Any]:
        describe = getattr(self._judge, "describe", None)
        return {} if describe is None else describe()

    def load(self) -> None:
        pass

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [self._judge(request, response) for request, response in pairs]


def _checked(verdict: Any) -> bool | str:
    if isinstance(verdict, bool):
        return verdict
    if isinstance(verdict, str):
        return verdict or "The judge failed and gave no reason."
    return f"The judge returned {verdict!r} of type {type(verdict).__name__}, not True or False."
