"""What a calibration knows of a layer, and whether that is kept exactly or in sketches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..options import EngineChoice
from ..ranks import Side
from .vectors import LEAST_WIDTH, ExactStatistics, SketchedStatistics, VectorStatistics

# Rows of a sketch per direction, where they are affordable.
_WIDTH = 4
# Up to this size a Gram matrix costs less time than a sketch.
_SMALL_DIMENSION = 256
# Up to this multiple of a sketch's width, too: several times faster, for at most three times the memory.
_EXACT_WITHIN = 1.5
# What the exact engine may keep in memory where the engine is chosen by size.
_EXACT_BYTES = 256 * 2**20
# The share of the weights (in bf16) that sketches may take where they can be narrower than _WIDTH times the rank.
_SKETCH_SHARE = 0.1


@dataclass(frozen=True)
class ModuleStatistics:
    """What a basis method gets to know of one layer."""

    name: str
    """The module's name in the base model."""

    output: VectorStatistics
    """Of W x over the chosen positions, without the bias."""

    input: VectorStatistics | None = None
    """Of x over the chosen positions; None where no input side was asked for."""

    utility: ModuleStatistics | None = None
    """The same over the utility data, for a method that needs it."""

    prepared: Any = None
    """What the method's `prepare` returned for this module."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Name -> value of the options that the method reads."""

    default_sides: Set[Side] = frozenset()
    """Sides whose rank nobody asked for."""

    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False, compare=False)
    """Name, as in `BasisNeeds` -> reads that weight; use `weight()` and `unaligned_weight()`."""

    weight_rounding: float = 2.0**-23
    """
    Relative precision of their difference: float32's, or where they are kept in two dtypes, the root mean square of
    what rounding to the coarser one makes of it, at most.
    """

    def weight(self) -> Tensor:
        """
        W (d_out, d_in) of this module, a float32 copy on its device, dequantized.

        Raises:
            ValueError: The method did not say that it needs it.
        """
        return self._read("weights")

    def unaligned_weight(self) -> Tensor:
        """
        W (d_out, d_in) of the same module of `unaligned_model`, float32, on the device of `weight()`; its elements are
        those of `weight()` where both are equal in the coarser of the two dtypes that they are kept in.

        Raises:
            ValueError: The method did not say that it needs it.
            CalibrationError: That model has no such weight, or one of another shape.
        """
        return self._read("unaligned_model")

    def _read(self, need: str) -> Tensor:
        if need not in self.weights:
            raise ValueError(f"{self.name}: the basis method was registered without BasisNeeds({need}=True).")
        return self.weights[need]()

    def has_default_rank(self, side: Side) -> bool:
        """Whether the rank of a side is the default, so that a method that chooses its rank may take more."""
        return side in self.default_sides

    def of(self, side: Side) -> VectorStatistics:
        """
        Raises:
            ValueError: No input side was asked for.
        """
        found = self.output if side == "output" else self.input
        if found is None:
            raise ValueError(f"{self.name}: no statistics of its inputs were asked for.")
        return found


@dataclass(frozen=True)
class Engine:
    """How the statistics of a calibration are kept."""

    kind: Literal["exact", "sketched"]
    width: int = 0
    """Rows of a sketch of a layer's outputs."""

    input_width: int = 0
    """Rows of a sketch of its inputs."""

    exact_up_to: int = 0
    """Length of vectors up to which statistics are exact, whatever the engine."""

    exact_within: float = 1.0
    """Multiple of a sketch's width up to which they are."""

    seed: int = 0

    def statistics(self, dimension: int, side: Side = "output") -> VectorStatistics:
        """New statistics of a layer's outputs or inputs of this length."""
        if self._is_exact(dimension, side):
            return ExactStatistics(dimension)
        return SketchedStatistics(dimension, self._width(side), self.seed)

    def bytes_of(self, dimension: int, side: Side = "output") -> int:
        """What these statistics keep, about: a Gram matrix in float64, or a sketch in float32."""
        return 8 * dimension**2 if self._is_exact(dimension, side) else 4 * dimension * self._width(side)

    def _width(self, side: Side) -> int:
        return self.width if side == "output" else self.input_width

    def _is_exact(self, dimension: int, side: Side) -> bool:
        return self.kind == "exact" or dimension <= max(self.exact_within * self._width(side), self.exact_up_to)


def choose_engine(
    kind: EngineChoice,
    outputs: list[int],
    inputs: list[int],
    *,
    rank: int,
    input_rank: int = 0,
    num_weights: int,
    seed: int = 0,
) -> Engine:
    """
    The engine for layers' outputs and inputs of these lengths.

    "auto" is exact while the Gram matrices take at most 256 MiB together, and for vectors of up to 256 numbers or 1.5
    times a sketch's width, where it is faster. Sketches are four times as wide as the rank, or narrower (down to twice
    the rank), so that they take at most a tenth of the weights in bf16.

    Args:
        kind: As in [`SaLoRAConfig`].
        outputs: Lengths of the outputs that statistics are kept of.
        inputs: Lengths of the inputs that statistics are kept of; outputs may be represented by them.
        rank: The most directions that will be asked for of any outputs.
        input_rank: The most directions that will be asked for of any inputs.
        num_weights: Number of parameters of the model.
        seed: Seed of the sketches.
    """
    if kind == "exact" or (kind == "auto" and 8 * sum(d * d for d in (*outputs, *inputs)) <= _EXACT_BYTES):
        return Engine("exact")
    input_rank = max(rank, input_rank)
    affordable = _SKETCH_SHARE * 2 * num_weights / (4 * (sum(outputs) * rank + sum(inputs) * input_rank))
    width = max(LEAST_WIDTH, min(_WIDTH, affordable))  # of a direction
    widths = int(width * rank), int(width * input_rank)
    if kind == "sketched":
        return Engine("sketched", *widths, seed=seed)
    return Engine("sketched", *widths, _SMALL_DIMENSION, _EXACT_WITHIN, seed)
