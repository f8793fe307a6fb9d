"""What a plugin can add: data sources, ways to compute a safety basis, judges of a response, CLI commands.

A plugin is a module (or object) whose functions are marked with `hookimpl`, named by an entry point of the
group `salora_plugins`:

    [project.entry-points."salora_plugins"]
    my_plugin = "my_package.my_module"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pluggy

if TYPE_CHECKING:
    import typer
    from torch import Tensor, nn

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

    def __call__(
        self, statistics: ModuleStatistics, rank: Any, side: Side
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]:
        """Return the basis and its singular values.

        Args:
            statistics: what one pass over the safety data left for this module, and what else the method
                needs (`BasisNeeds`).
            rank: number of directions, (int). A share or a rule that the user asked for is made a number by
                the statistics of the safety data. A method without safety rows gets what was asked for
                (`ranks.Rank`: a number, a share such as 0.95 or a rule such as "entropy:0.85"), since only
                it can make that a number (`ranks.rank_of_spectrum`).
            side: `"output"` (d = d_out, directions of W X) or `"input"` (d = d_in, directions of X).

        Returns:
            The basis, (d, rank), float32, with orthonormal columns, the most important direction first; and
            its singular values, (rank,), not increasing. A third part, a number, is the energy that the
            squared singular values are a part of, where that is not the energy of the safety data's vectors.
        """


@dataclass(frozen=True)
class BasisNeeds:
    """What a basis method gets beside the statistics of the safety rows; it is gathered only where it is declared."""

    safety_rows: bool | Literal["input"] = True
    """
    False: no safety data is read, and no model is run for it; the statistics are of no vectors. "input": only where
    there is an input side, and for that; a share or a rule of the output side is left to the method.
    """

    utility_rows: bool = False
    """`ModuleStatistics.utility`: the same statistics over `utility_data`, at the same positions."""

    weights: bool = False
    """`ModuleStatistics.weight()`: (d_out, d_in) float32, dequantized."""

    unaligned_model: bool = False
    """`ModuleStatistics.unaligned_weight()`: of the same module of `unaligned_model`, (d_out, d_in) float32."""

    chooses_rank: bool = False
    """
    Whether it may return fewer columns than it was asked for (at least one), and more where the rank is a share, a rule
    or the default (`ModuleStatistics.has_default_rank`).
    """

    prepare: Callable[[Preparation], Mapping[str, Any]] | None = None
    """Run once before the bases; what it returns by module name is `ModuleStatistics.prepared`."""

    options: tuple[str, ...] = ()
    """
    Options of `SaLoRAConfig` that it reads beside those that come with the needs above: in `ModuleStatistics.options`
    and `Preparation.options`. One of those for basis methods that is not declared is refused beside `basis_method`.
    """

    @property
    def read_options(self) -> frozenset[str]:
        """Of the options for basis methods (`options.OF_BASIS_METHODS`) those that it reads."""
        of_needs = {"utility_data", "num_utility_samples"} if self.utility_rows else set()
        return frozenset(of_needs | ({"unaligned_model"} if self.unaligned_model else set()) | set(self.options))

    @property
    def looks_at_modules(self) -> bool:
        """Whether it may find other directions for modules that share their inputs, and so their statistics."""
        return self.weights or self.unaligned_model or self.prepare is not None

    def reads_safety_rows(self, has_input_side: bool) -> bool:
        """Whether safety data is read and run through the model."""
        return has_input_side if self.safety_rows == "input" else self.safety_rows

    def unread_options(self, has_input_side: bool) -> frozenset[str]:
        """Of the options of the safety data and of passes over data those that have no effect."""
        if self.reads_safety_rows(has_input_side):
            return frozenset()
        unread = {"safety_data", "safety_positions", "header_weight"}
        if not self.utility_rows:
            unread.add("calibration_engine")
            if self.prepare is None:
                unread |= {"num_safety_samples", "calibration_batch_size", "calibration_max_length"}
        return frozenset(unread - set(self.options))


@dataclass(frozen=True)
class Preparation:
    """What `BasisNeeds.prepare` gets."""

    model: nn.Module
    """The base model in evaluation mode, its adapters disabled."""

    names: Sequence[str]
    """Of the target modules, in the model's order."""

    options: Mapping[str, Any]
    """Every option of `SaLoRAConfig` by its name, as it was given or by default."""

    contrastive_rows: Callable[[], list[tuple[Any, Any]]]
    """Reads `contrastive_data`: pairs of chosen and rejected `rows.examples.TokenizedExample` of one prompt."""

    batch_size: int
    """Rows per forward pass."""


SAFETY_ROWS_ONLY = BasisNeeds()
"""What a method gets that declares nothing."""


class RegisterBasisMethod(Protocol):
    """What `register_basis_methods` gets."""

    def __call__(self, name: str, method: BasisMethod, needs: BasisNeeds = SAFETY_ROWS_ONLY) -> None:
        """Name a method; `needs` says what it gets beside the statistics of the safety rows."""


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
def register_basis_methods(register: RegisterBasisMethod) -> None:
    """Name ways to compute a safety basis for `basis_method`: `register(name, method, needs=BasisNeeds())`."""


@hookspec
def register_judges(register: Callable[[str, Judge], None]) -> None:
    """Name judges of a response: `register(name, judge)`."""


@hookspec
def register_judge_factories(register: Callable[[str, JudgeFactory], None]) -> None:
    """Name judges that take an argument, as in `--judge NAME:ARGUMENT`: `register(name, factory)`."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to `salora` with `@app.command()` or `app.add_typer(...)`."""
