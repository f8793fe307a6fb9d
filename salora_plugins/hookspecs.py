"""What a plugin can add: data sources, ways to compute a safety basis, judges of a response, CLI commands.

A plugin is a module (or object) whose functions are marked with `hookimpl`, named by an entry point of the
group `salora_plugins`:

    [project.entry-points."salora_plugins"]
    my_plugin = "my_package.my_module"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pluggy

if TYPE_CHECKING:
    import typer
    from torch import Tensor

    from .activations.statistics import ModuleStatistics
    from .ranks import Side

PROJECT = "salora_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

JudgeKind = Literal["refusal", "harm"]
"""What a judge's True means: the response refuses the request, or it is harmful."""

DataSource = Callable[[], Iterable[Mapping[str, Any]]]
"""Returns rows in any format that `salora_plugins.rows.reading.load_examples` accepts."""


class BasisMethod(Protocol):
    """Computes the safety basis of one module from what calibration gathered about it."""

    def __call__(self, statistics: ModuleStatistics, rank: int, side: Side) -> tuple[Tensor, Tensor]:
        """Return the basis and its singular values.

        Args:
            statistics: what one pass over the safety data left for this module.
            rank: number of directions.
            side: `"output"` (d = d_out, directions of W X) or `"input"` (d = d_in, directions of X).

        Returns:
            The basis, (d, rank), float32, with orthonormal columns, the most important direction first; and
            its singular values, (rank,), not increasing.
        """


class Judge(Protocol):
    """Decides whether a response refuses a request."""

    def __call__(self, request: str, response: str) -> bool:
        """Return True if `response` refuses `request` (the last user turn, without chat markup)."""


class BatchJudge(Protocol):
    """Judges many answers at once: a model, or a service. `register_judge_factories` says how one is made."""

    kind: JudgeKind
    """What True means."""

    def describe(self) -> dict[str, Any]:
        """
        What a reader of the report has to know to repeat the judgement, as JSON values.

        Called before any answer is generated. Raises ValueError, OSError or ImportError if the judge could not work;
        it should find that out quickly, without loading a model.
        """

    def load(self) -> None:
        """Called once, before the first answers are judged. An exception ends the evaluation."""

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> Sequence[bool | str]:
        """
        Judge pairs of request and response.

        Returns:
            Per pair the verdict, or a text that says why there is none. An exception counts as that for every pair.
        """


JudgeFactory = Callable[[str], BatchJudge]
"""Makes the judge NAME:ARGUMENT from its argument, empty for a bare NAME; ValueError if that is not usable."""


@hookspec
def register_data_sources(register: Callable[[str, DataSource], None]) -> None:
    """Name data sources for `safety_data` and `task_data`: `register(name, function)`."""


@hookspec
def register_basis_methods(register: Callable[[str, BasisMethod], None]) -> None:
    """Name ways to compute a safety basis for `basis_method`: `register(name, method)`."""


@hookspec
def register_judges(register: Callable[[str, Judge], None]) -> None:
    """Name judges of a response: `register(name, judge)`."""


@hookspec
def register_judge_factories(register: Callable[[str, JudgeFactory], None]) -> None:
    """Name judges that take an argument, as in `--judge NAME:ARGUMENT`: `register(name, factory)`."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to `salora` with `@app.command()` or `app.add_typer(...)`."""
