"""What a safety module was computed from and how, as it stands in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

_LARGEST = 1e300


def _is_number(value: Any) -> bool:
    # Also of whole numbers that no float can hold.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rank(value: Any) -> bool:
    return _is_number(value) or _is_text(value)


def _is_extent(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))


def _maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(name, str) and fits(of_name) for name, of_name in value.items())
    )


def _kept_if(fits: Callable[[Any], bool], wanted: str) -> PlainValidator:
    """The value as it is: an equal one of another type would be other bytes in the file."""

    def validate(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"{value!r:.80}, not {wanted}.")
        return value

    return PlainValidator(validate)


_Text = Annotated[str | None, _kept_if(_maybe(_is_text), "a text")]
_Number = Annotated[int | float | None, _kept_if(_maybe(_is_number), "a number")]
_Numbers = Annotated[Mapping[str, int | float], _kept_if(_by_name(_is_number), "a mapping of names to numbers")]
_Rank = Annotated[int | float | str | None, _kept_if(_maybe(_is_rank), "a number or a rule")]
_Ranks = Annotated[Mapping[str, int | float | str], _kept_if(_by_name(_is_rank), "a mapping of names to ranks")]
_Extents = Annotated[
    Mapping[str, list[int]], _kept_if(_by_name(_is_extent), "a mapping of sides to smallest and largest number")
]
_Texts = Annotated[Mapping[str, str], _kept_if(_by_name(_is_text), "a mapping of names to texts")]


class Provenance(BaseModel, Mapping[str, Any]):
    """
    A frozen record, and a mapping of what was said: `provenance["seed"]`, `provenance.get("requests")`. A part that was
    not said is None as an attribute, absent from the mapping and from the file. Others than these may be there, from a
    plugin or another version, with any JSON values.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    base_model: _Text = None
    safety_data: _Text = None
    safety_data_sha256: _Text = None
    safety_samples: _Number = None
    safety_positions: _Text = None
    header_weight: _Number = None
    """Of the header's positions against the others; absent where all count alike."""
    positions_counted: _Number = None
    requests: _Number = None
    refusals: _Number = None
    """Of the requests that came without a response, how many there were and how many the model refused."""
    safety_sources: _Numbers = {}
    """Of several sources, how many examples are of each."""
    tokenizer: Any = None
    has_chat_template: Any = None
    chat_template_sha256: Any = None
    modules: Any = None
    """How many layers."""
    directions: _Extents = {}
    """Side -> the smallest and the largest number of directions."""
    safety_rank: _Rank = None
    safety_rank_pattern: _Ranks = {}
    safety_rank_cut: Any = None
    """How many modules have fewer directions than the default rank, the data having no more."""
    input_safety_rank: _Rank = None
    input_safety_rank_pattern: _Ranks = {}
    input_safety_rank_cut: Any = None
    leak: _Numbers = {}
    """Layer -> how an update could react to harmful requests that were held out, over everyday ones; 0: not at all."""
    leak_requests: _Number = None
    """How many were held out."""
    leak_everyday: _Text = None
    """Which everyday requests they were compared with: "builtin" or "task_data"."""
    leak_unknown: _Text = None
    """Why the leak was not measured."""
    variant: _Text = None
    """"sails" where the directions are those that a training starts in, and nothing is kept out of them."""
    basis_method: _Text = None
    utility_data: _Text = None
    utility_data_sha256: _Text = None
    utility_samples: _Number = None
    utility_rank: _Number = None
    input_utility_rank: _Number = None
    """Of a method that tells safety from utility; the ranks, where they were given."""
    unaligned_model: _Text = None
    unaligned_sha256: _Text = None
    """Of a method that compares weights: the other model, and a few elements of its weights."""
    engine: _Text = None
    sketch_width: _Number = None
    input_sketch_width: _Number = None
    seed: _Number = None
    versions: _Texts = {}

    @classmethod
    def of(cls, values: Any) -> Provenance:
        """
        Args:
            values: JSON values by name, as they are in a file.

        Raises:
            ValueError: A part is not what it should be; it says which.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"provenance is {values!r:.80}, not a mapping.")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            found = problem.get("ctx", {}).get("error", problem["msg"])
            raise ValueError(f"provenance: {problem['loc'][0]} is {found}") from error

    def __getitem__(self, key: str) -> Any:
        return self._said()[key]

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # a mapping's: pydantic's gives pairs
        return iter(self._said())

    def __eq__(self, other: object) -> bool:
        """As a mapping is compared with another."""
        return self._said() == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __len__(self) -> int:
        return len(self._said())

    def _said(self) -> dict[str, Any]:
        known = {name: value for name, value in self.__dict__.items() if name in self.model_fields_set}
        return known | (self.model_extra or {})


def checked_energies(key: str, energies: Any) -> dict[str, float]:
    """
    The energies of a side, which stand in the file beside the rest.

    Raises:
        ValueError: They are no mapping of names to numbers.
    """
    if not _by_name(_is_number)(energies):
        raise ValueError(f"provenance: {key} is {energies!r:.80}, not a mapping of names to numbers.")
    return dict(energies)
