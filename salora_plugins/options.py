"""
What SaLoRA adds to LoRA's options. Each is declared here, once: name, type, default, help and least value.

`SaLoRAConfig` has them as its fields. The keys of Axolotl's `salora:` block, the arguments of TRL's scripts and the
options of `salora calibrate` are made from `OPTIONS`. Torch is not imported here: Axolotl imports its plugins, and with
them this module, at every start.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .ranks import Rank, check_pattern, check_rank
from .support.texts import how_to_write, shortened

Variant = Literal["two-sided", "paper", "sails"]
"""Which sides of the layers are protected; with "sails" none is, and training starts in the directions."""
Positions = Literal["response", "predicting", "prompt", "header", "all"]
"""Which positions of the safety data count, see `activations.positions.position_mask`."""
Start = Literal["task", "pissa", "zero", "sails"]
"""Start values of the factors; "sails" is that of the variant."""
EngineChoice = Literal["auto", "exact", "sketched"]
"""How the statistics of the layers are kept, see `activations.statistics.choose_engine`."""
RankPattern = dict[str, Rank]
"""Module name or regular expression -> rank."""
Holds = Literal["rows", "safety module", "autoencoders"]
"""What an option names, or is, that can be an object in Python: its type is Any."""


def about(
    help: str, *, least: int = 1, if_none: str | None = None, several: bool = False, holds: Holds | None = None
) -> dict[str, Any]:
    """
    What is said of an option, as the metadata of its field.

    Args:
        help: In full sentences, in no host's syntax, without the default.
        least: The least value of a number.
        if_none: What the default is where it is given as None.
        several: Whether a list of such values is a value, too.
        holds: What it names or is, where its type is Any.
    """
    return {"help": help, "least": least, "if_none": if_none, "several": several, "holds": holds}


@dataclass
class AdapterOptions:
    """The options that [`SaLoRAConfig`] adds to those of [`~peft.LoraConfig`]; its docstring explains them."""

    safety_rank: Rank = field(
        default=32,
        metadata=about(
            "Output directions per layer that the update may not write into, or the share of the energy that they "
            "capture, such as 0.95, or entropy:0.85: as many as make up that share of the entropy of the spectrum."
        ),
    )
    variant: Variant = field(
        default="two-sided",
        metadata=about(
            "two-sided: what the layers write and what they react to is protected; paper: the output side only; sails: "
            "nothing is, and training on safety data starts in the directions of sae (SAILS)."
        ),
    )
    input_safety_rank: Rank | None = field(
        default=None,
        metadata=about(
            "Input directions per layer that the update may not react to, or a share of the energy, or leak:0.05: as "
            "few as leak no more (how an update could react to unseen harmful requests, over everyday ones), or "
            "entropy:0.85; 0: none.",
            least=0,
            if_none="those of a safety module that is given, or a quarter of the layer's inputs, at most 256",
        ),
    )
    safety_rank_pattern: RankPattern = field(
        default_factory=dict,
        metadata=about("Ranks of single modules: module name or regular expression -> safety_rank."),
    )
    input_safety_rank_pattern: RankPattern = field(
        default_factory=dict,
        metadata=about("Ranks of single modules: module name or regular expression -> input_safety_rank."),
    )
    safety_positions: Positions | None = field(
        default=None,
        metadata=about(
            "Positions of the safety data that count: those whose input is a response token, those that predict one, "
            "those of the prompt, those of the prompt behind the request's own text (header), or all.",
            if_none="prompt, and response without an input side",
        ),
    )
    task_rank: int = field(default=32, metadata=about("Task directions that the start 'task' keeps."))
    init: Start | None = field(
        default=None,
        metadata=about(
            "Start of the factors. With zero the saved adapter has rank r, with the others rank 2r.",
            if_none="zero, and task without an input side or where options of the task start are given",
        ),
    )
    safety_data: Any = field(
        default="builtin",
        metadata=about(
            "Harmful requests, with safe responses or without: builtin, a file (of text: a request a line), a folder "
            "or a hub data set, or several of these; in Python and YAML also a list of requests or rows.",
            several=True,
            holds="rows",
        ),
    )
    task_data: Any = field(
        default=None,
        metadata=about(
            "Examples for the start 'task', and what the leak is measured against: a file, a folder or a hub data set.",
            if_none="the first training batch",
            holds="rows",
        ),
    )
    safety_module: Any = field(
        default=None,
        metadata=about(
            "A safety module computed before (a file, a folder that holds one, or a hub repository); skips "
            "calibration.",
            if_none="none, it is calibrated",
            holds="safety module",
        ),
    )
    basis_method: str = field(
        default="salora", metadata=about("Method that computes the safety bases; plugins can add some.")
    )
    num_safety_samples: int = field(
        default=512,
        metadata=about("Safety examples to calibrate on, at most, spread evenly over their categories and forms."),
    )
    num_task_samples: int = field(default=128, metadata=about("Task examples for the start 'task'."))
    calibration_batch_size: int = field(default=16, metadata=about("Examples per forward pass of a calibration."))
    calibration_max_length: int = field(
        default=512, metadata=about("Tokens per calibration example; longer ones are cut.", least=2)
    )
    calibration_engine: EngineChoice = field(
        default="auto",
        metadata=about("The layers' statistics as Gram matrices (exact), as sketches, or by their size (auto)."),
    )
    calibration_cache: bool = field(
        default=True,
        metadata=about("Reuse a calibration of the same model, data and settings, and keep this one."),
    )
    seed: int = field(default=0, metadata=about("Seed of the selection of examples and of decompositions.", least=0))
    header_weight: float = field(
        default=1.0,
        metadata=about(
            "How many times as much as another position one of the header counts, with the safety_positions prompt and "
            "all.",
            least=0,
        ),
    )
    utility_data: Any = field(
        default="builtin",
        metadata=about(
            "Everyday requests, with responses or without, for a basis_method that tells safety from utility: builtin, "
            "or as safety_data.",
            several=True,
            holds="rows",
        ),
    )
    num_utility_samples: int = field(default=128, metadata=about("Utility examples to calibrate on, at most."))
    utility_rank: int | None = field(
        default=None,
        metadata=about(
            "Output directions per layer that hold its utility, for basis_method actsvd.",
            if_none="four times safety_rank, as far as there are as many and the layer keeps some",
        ),
    )
    input_utility_rank: int | None = field(
        default=None,
        metadata=about(
            "Input directions per layer that hold its utility, for basis_method actsvd.",
            if_none="four times input_safety_rank, as far as there are as many and the layer keeps some",
        ),
    )
    contrastive_data: Any = field(
        default=None,
        metadata=about(
            "Pairs of a safe and an unsafe response to a request, for basis_method sae: a file, a folder or a hub data "
            "set of rows with prompt, chosen and rejected.",
            if_none="none",
            holds="rows",
        ),
    )
    contrastive_positions: Positions = field(
        default="response", metadata=about("Positions of the contrastive data that count, as safety_positions.")
    )
    sae: Any = field(
        default=None,
        metadata=about(
            "Sparse autoencoder of each layer, for basis_method sae: RELEASE:ID of sae-lens, or a folder, with {layer} "
            "in the place of the layer's number; in Python and YAML also a mapping of layers to such.",
            if_none="none",
            holds="autoencoders",
        ),
    )
    sae_feature_share: float = field(
        default=0.3,
        metadata=about(
            "Share of the autoencoder's features that tell safe from unsafe most, for basis_method sae.", least=0
        ),
    )
    unaligned_model: str | None = field(
        default=None,
        metadata=about(
            "The model before its alignment, for basis_method weight-delta: a folder or hub repository, with layers of "
            "the same shapes.",
            if_none="none",
        ),
    )


@dataclass(frozen=True)
class Option:
    """
    What is declared of one option, to make the form of it that a host wants.

    Args:
        name: Of the field of `AdapterOptions`.
        type: Its annotation without None.
        optional: Whether None is a value, too.
        default: Its default.
        help: What it is, without the default.
        default_in_words: The default, or what it is where it is given as None.
        least: The least value, where it is a number.
        several: Whether it can also be a list of such values.
        holds: What it names or is, where its type is Any.
    """

    name: str
    type: Any
    optional: bool
    default: Any
    help: str
    default_in_words: str
    least: int
    several: bool
    holds: Holds | None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it can have, where these are a few only."""
        if self.type is bool:
            return (True, False)
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def described(self, default: str | None = None) -> str:
        """Help with the default, or with what stands in its place in a host."""
        return f"{self.help} Default: {default or self.default_in_words}."

    def check(self, value: Any, *, named: str | None = None) -> None:
        """
        Args:
            value: Of the option, as a configuration takes it; not converted from another kind.
            named: What a host calls the option.

        Raises:
            ValueError: It cannot have this value.
        """
        name = named or self.name
        if value is None:
            if not self.optional:
                raise ValueError(f"{name}=None: leave it out for the default ({self.default_in_words}), or give one.")
        elif self.type == Rank:
            check_rank(self.name, value, self.least, named=name)
        elif self.type == RankPattern:
            check_pattern(self.name, value, named=name)
        elif self.type is int:
            check_number(name, value, self.least)
        elif self.type is float:
            check_real(name, value, f"a number of at least {self.least}", lambda number: number >= self.least)
        elif self.choices:
            # By type, too: 1 is equal to True, and an array is compared element by element.
            if type(value) not in map(type, self.choices) or value not in self.choices:
                choices = (*self.choices, None) if self.optional else self.choices
                raise ValueError(f"{name}={shortened(value)}: choose one of {', '.join(map(repr, choices))}.")
        elif not _VALID[self.holds](value):
            raise ValueError(f"{name}={shortened(value)}: give {_WANTED[self.holds]}.")


def check_number(name: str, value: object, least: int) -> None:
    """
    Raises:
        ValueError: `value` is no whole number of at least `least`, or none that 64 bits hold.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{name}={shortened(value)}: give a whole number of at least {least}{how_to_write(value)}.")


def check_real(name: str, value: object, wanted: str, valid: Callable[[float], bool]) -> None:
    """
    Args:
        name: What the user calls the number.
        value: Of it.
        wanted: What it is to be, such as "a number above 0, such as 1.0".
        valid: Whether a finite number is that.

    Raises:
        ValueError: `value` is no finite number, or not a valid one.
    """
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -math.inf < value < math.inf
        and valid(value)
    ):
        return
    raise ValueError(f"{name}={shortened(value)}: give {wanted}{how_to_write(value)}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_name(value: Any) -> bool:
    return _is_text(value) or isinstance(value, os.PathLike)


def _may_hold_rows(value: Any) -> bool:
    """Whether it is a name, or rows may come out of it one after another; which, is for who reads them to say."""
    if isinstance(value, (str, os.PathLike)):
        return _is_name(value)
    # A scalar of numpy or torch has the method, too. A mapping is one row; a data set of several splits is a mapping.
    is_scalar = getattr(value, "ndim", 1) == 0
    return hasattr(value, "__iter__") and not is_scalar and type(value) is not dict and not isinstance(value, _NO_ROWS)


_NO_ROWS = (bytes, bytearray, Set)


def _is_safety_module(value: Any) -> bool:
    return _is_name(value) or hasattr(value, "input_bases")  # the class is of a higher layer


def _are_autoencoders(value: Any) -> bool:
    return _is_name(value) or (isinstance(value, Mapping) and bool(value) and all(map(_is_name, value.values())))


# By what an option holds; None: a text.
_VALID: dict[Holds | None, Callable[[Any], bool]] = {
    None: _is_name,
    "rows": _may_hold_rows,
    "safety module": _is_safety_module,
    "autoencoders": _are_autoencoders,
}
_WANTED: dict[Holds | None, str] = {
    None: "a name, as a text",
    "rows": "a registered name, a file, a folder or a hub data set, as a text, or in Python a `datasets.Dataset` or a "
    "list of rows",
    "safety module": "a file, a folder or a hub repository, as a text, or in Python a SafetyModule",
    "autoencoders": "RELEASE:ID or a folder, as a text, or a mapping of layers to such",
}


def _declared() -> Mapping[str, Option]:
    annotations, found = get_type_hints(AdapterOptions), {}
    for entry in fields(AdapterOptions):
        annotation = annotations[entry.name]
        kinds = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        found[entry.name] = Option(
            name=entry.name,
            type=functools.reduce(operator.or_, [kind for kind in kinds if kind is not NoneType]),
            optional=NoneType in kinds or default is None,
            default=default,
            help=entry.metadata["help"],
            default_in_words=entry.metadata["if_none"] or str(default),
            least=entry.metadata["least"],
            several=entry.metadata["several"],
            holds=entry.metadata["holds"],
        )
    return MappingProxyType(found)


OPTIONS = _declared()
"""Name -> option, in the order of their declaration."""

OF_BASIS_METHODS = (
    "utility_data",
    "num_utility_samples",
    "utility_rank",
    "input_utility_rank",
    "contrastive_data",
    "contrastive_positions",
    "sae",
    "sae_feature_share",
    "unaligned_model",
)
"""Options that only the basis methods read that say so, see `hookspecs.BasisNeeds`."""
