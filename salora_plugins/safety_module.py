"""The safety module: per layer, the directions that an update must stay out of, and where they come from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .ranks import Rank, rank_for_share
from .support.files import atomic_write
from .support.hub import hub_file, is_hub_id
from .support.module_names import advice_to_leave_out, listed

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Since 2, the checksum is of the description, too."""
DEFAULT_FILE = "salora.safetensors"
# float32 SVDs leave 1e-6; anything above means that the file does not hold orthonormal bases.
_ORTHONORMALITY_TOLERANCE = 1e-4

_METADATA_KEY = "salora_safety_module"
_NUMBER = (int, float)
_LARGEST = 1e300
# The parts of the provenance that this package reads, and what they are; a calibration may add others.
_TEXTS = ("base_model", "safety_data", "safety_data_sha256", "safety_positions", "basis_method", "engine")
_NUMBERS = (
    *("safety_samples", "positions_counted", "requests", "refusals", "safety_rank", "input_safety_rank"),
    *("sketch_width", "input_sketch_width", "seed"),
)
_MAPPINGS = {
    **dict.fromkeys(("energy", "input_energy", "safety_rank_pattern", "input_safety_rank_pattern"), _NUMBER),
    "versions": str,
}

_KEYS = ("output_basis", "output_singular_values", "input_basis", "input_singular_values", "weight_sample")


class SafetyModuleError(ValueError):
    """A safety module file that cannot be used, or one that does not belong to this model."""


@dataclass(frozen=True)
class SafetyModule:
    """
    The fixed safety module of SaLoRA (section 4.1 of the paper) for a set of linear layers.

    Modules are named as in the base model, for example "model.layers.0.self_attn.q_proj".
    """

    bases: dict[str, Tensor]
    """Module name -> U_C, (d_out, r_s) float32 with orthonormal columns, most important first."""

    input_bases: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> V_C, (d_in, r_in) float32 with orthonormal columns; empty without an input side."""

    singular_values: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> singular values of W X_h for the columns of U_C, (r_s,) float32, descending."""

    input_singular_values: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> singular values of X_h for the columns of V_C, (r_in,) float32, descending."""

    weight_samples: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> a few elements of the weight it was computed for, float32: the fingerprint of the model."""

    provenance: dict[str, Any] = field(default_factory=dict)
    """What it was computed from and how; JSON values."""

    def __post_init__(self) -> None:
        if not self.bases:
            raise SafetyModuleError("A safety module needs at least one module with a basis; it has none.")
        for name, basis in self.bases.items():
            _check_basis(basis, f"{name}: output basis")
        for name, basis in self.input_bases.items():
            if name not in self.bases:
                raise SafetyModuleError(f"{name}: has an input basis but no output basis.")
            _check_basis(basis, f"{name}: input basis")
        if self.input_bases and set(self.input_bases) != set(self.bases):
            missing = sorted(set(self.bases) - set(self.input_bases))
            raise SafetyModuleError(f"{missing[0]}: has no input basis, although other modules have one.")
        for kind, values, bases in (
            ("singular values", self.singular_values, self.bases),
            ("input singular values", self.input_singular_values, self.input_bases),
        ):
            for name, vector in values.items():
                if name not in bases or vector.shape != (bases[name].shape[1],):
                    raise SafetyModuleError(f"{name}: {kind} of shape {tuple(vector.shape)} do not fit its basis.")
                if not torch.isfinite(vector).all():
                    raise SafetyModuleError(f"{name}: {kind} are not finite.")
        _check_provenance(self.provenance)

    @property
    def safety_rank(self) -> int:
        """The smallest number of protected output directions over the modules."""
        return min(basis.shape[1] for basis in self.bases.values())

    @property
    def input_safety_rank(self) -> int:
        """The smallest number of protected input directions over the modules; 0 without an input side."""
        return min((basis.shape[1] for basis in self.input_bases.values()), default=0)

    @property
    def fingerprint(self) -> str:
        """
        Hex digest of the model's weights, from a few elements of every module, rounded to bfloat16.

        The rounding makes it the same for one checkpoint loaded in float32 or bfloat16.
        """
        digest = hashlib.sha256()
        for name in sorted(self.weight_samples):
            digest.update(name.encode())
            digest.update(self.weight_samples[name].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    @property
    def captured_energy(self) -> dict[str, float]:
        """Module name -> share of the energy of its outputs on the safety data that U_C captures, from 0 to 1."""
        return _captured(self.singular_values, self.provenance.get("energy", {}))

    @property
    def captured_input_energy(self) -> dict[str, float]:
        """The same for its inputs and V_C."""
        return _captured(self.input_singular_values, self.provenance.get("input_energy", {}))

    def restricted_to(self, ranks: Mapping[str, Mapping[str, Rank]]) -> SafetyModule:
        """
        The part of this safety module for some modules, with the first columns of every basis.

        Args:
            ranks: Side ("output" and, where there is to be one, "input") -> module name -> number of directions, or
                share of the energy. Where this module was calibrated by shares or patterns, it has the numbers of
                directions that were needed, and a larger number means all of them.

        Raises:
            SafetyModuleError: A module or a rank that it does not have.
        """
        names = list(ranks["output"])
        if absent := [name for name in names if name not in self.bases]:
            raise SafetyModuleError(
                f"The safety module has no basis for {len(absent)} of {len(names)} target modules: {listed(absent)} "
                f"(it "
                f"has, for example, {next(iter(self.bases))!r}). Calibrate again with these target_modules, or leave "
                f"them "
                f"out: {advice_to_leave_out(absent, names)}."
            )
        chosen = {side: self._directions(side, by_name) for side, by_name in ranks.items()}

        def leading(tensor: Tensor, rank: int) -> Tensor:
            # The tensor itself where all of it is wanted: layers with one input share theirs.
            return tensor if tensor.shape[-1] == rank else tensor[..., :rank].contiguous()

        def first(values: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
            return {n: leading(values[n], rank) for n, rank in chosen.get(side, {}).items() if n in values}

        energies = {
            key: {n: energy for n, energy in self.provenance[key].items() if n in chosen.get(side, {})}
            for key, side in (("energy", "output"), ("input_energy", "input"))
            if key in self.provenance
        }
        return SafetyModule(
            bases=first(self.bases, "output"),
            input_bases=first(self.input_bases, "input"),
            singular_values=first(self.singular_values, "output"),
            input_singular_values=first(self.input_singular_values, "input"),
            weight_samples={n: self.weight_samples[n] for n in names if n in self.weight_samples},
            provenance={**self.provenance, **energies},
        )

    def _directions(self, side: str, ranks: Mapping[str, Rank]) -> dict[str, int]:
        """Module name -> how many of its directions are wanted."""
        if side == "output":
            option, bases, values, energies = "safety_rank", self.bases, self.singular_values, "energy"
        else:
            option, bases, values, energies = (
                "input_safety_rank", self.input_bases, self.input_singular_values, "input_energy",
            )  # fmt: skip
        by_need = isinstance(self.provenance.get(option), float) or any(
            self.provenance.get(f"{option}_{key}") for key in ("pattern", "cut")
        )
        directions = {}
        for name, wanted in ranks.items():
            available = bases[name].shape[1] if name in bases else 0
            if isinstance(wanted, float):
                energy = self.provenance.get(energies, {}).get(name)
                found = rank_for_share(values[name], energy, wanted) if energy and name in values else None
                if found is None:
                    raise SafetyModuleError(
                        f"{option}={wanted}, but the safety module's {available} directions for {name!r} capture less "
                        f"than that share of the energy, or it does not say how much. Lower {option}, or calibrate "
                        "again with it."
                    )
                directions[name] = found
            elif available >= wanted or (by_need and available):
                directions[name] = min(available, wanted)
            else:
                raise SafetyModuleError(
                    f"{option}={wanted}, but the safety module has only {available} such directions for {name!r}. "
                    f"Set {option}={available}, or calibrate again with the higher rank."
                )
        return directions

    def save(self, path: str | os.PathLike) -> None:
        """
        Write one safetensors file, all of it or nothing.

        Args:
            path: The file; for a folder, `salora.safetensors` in it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / DEFAULT_FILE
        tensors = {}
        for key, values in zip(_KEYS, self._parts(), strict=True):
            # Modules that read the same input share one V_C in memory; safetensors wants every tensor on its own.
            for name, tensor in values.items():
                copy = tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)
                tensors[f"{name}.{key}"] = copy
        description = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        description["content_sha256"] = _checksum(tensors, description)
        # One entry: safetensors writes several in an order of its own, and equal modules would differ in their bytes.
        metadata = {_METADATA_KEY: json.dumps(description, sort_keys=True)}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> SafetyModule:
        """
        Read a safety module and check it: format, shapes, finiteness, orthonormality, and that the content is what
        was written. Files of format version 1, whose description is under no checksum, are read with a warning.

        Args:
            path: A file, a folder that holds `salora.safetensors` (a saved adapter, for example), or a repository of
                the Hugging Face hub that does: "organization/name", or "organization/name@revision".

        Raises:
            FileNotFoundError: There is no such file.
            SafetyModuleError: The file is damaged, was changed, or is not a safety module; it says which module.
        """
        given, path = path, Path(path).expanduser()
        if path.is_dir():
            path = path / DEFAULT_FILE
        elif not path.exists() and isinstance(given, str) and is_hub_id(given):
            path = hub_file(given, DEFAULT_FILE, option="safety_module")
        if not path.is_file():
            raise FileNotFoundError(
                f"safety_module: there is no file {str(path)!r}. Give a safety module file, a folder that holds "
                f"{DEFAULT_FILE}, or a hub repository (organization/name)."
            )
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
        except SafetensorError as error:
            raise SafetyModuleError(
                f"{path}: not a readable safetensors file, perhaps cut short ({error}). Calibrate again or fetch it "
                "again."
            ) from error
        if _METADATA_KEY not in metadata:
            raise SafetyModuleError(f"{path}: a safetensors file, but not a safety module.")
        try:
            description = json.loads(metadata[_METADATA_KEY])
            version, digest, provenance = (
                description[key] for key in ("format_version", "content_sha256", "provenance")
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SafetyModuleError(f"{path}: its description cannot be read ({error}). Calibrate again.") from error
        if version not in (1, FORMAT_VERSION):
            raise SafetyModuleError(
                f"{path}: format version {version!r}, this salora-plugins reads "
                f"1 and {FORMAT_VERSION}. Install the version that wrote it, or calibrate again."
            )
        parts: dict[str, dict[str, Tensor]] = {key: {} for key in _KEYS}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            if part not in parts:
                raise SafetyModuleError(f"{path}: holds {key!r}, which is no part of a safety module.")
            parts[part][name] = tensor
        try:
            module = cls(
                bases=parts["output_basis"],
                input_bases=parts["input_basis"],
                singular_values=parts["output_singular_values"],
                input_singular_values=parts["input_singular_values"],
                weight_samples=parts["weight_sample"],
                provenance=provenance,
            )
        except SafetyModuleError as error:
            raise SafetyModuleError(f"{path}: {error} The file is damaged; calibrate again.") from error
        if digest != (content_digest(tensors) if version == 1 else _checksum(tensors, description)):
            raise SafetyModuleError(
                f"{path}: its content is not what was written (the checksum differs). The file is damaged or was "
                "changed; calibrate again or fetch it again."
            )
        if version == 1:
            logger.warning(
                "%s is of format version 1: what it says of its origin (base model, data, versions) is under no "
                "checksum. SafetyModule.load(...).save(...) writes it anew, for who trusts it.",
                path,
            )
        return module

    def _parts(self) -> tuple[dict[str, Tensor], ...]:
        return (
            self.bases,
            self.singular_values,
            self.input_bases,
            self.input_singular_values,
            self.weight_samples,
        )


def _captured(singular_values: Mapping[str, Tensor], energies: Mapping[str, float]) -> dict[str, float]:
    return {
        name: values.double().square().sum().item() / energies[name]
        for name, values in singular_values.items()
        if energies.get(name)
    }


def _check_basis(basis: Tensor, what: str) -> None:
    if basis.ndim != 2 or not 0 < basis.shape[1] <= basis.shape[0]:
        raise SafetyModuleError(f"{what} has shape {tuple(basis.shape)}; expected (dimension, rank).")
    if not basis.is_floating_point() or not torch.isfinite(basis).all():
        raise SafetyModuleError(f"{what} is not finite.")
    error = basis.T.double() @ basis.double() - torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
    if error.abs().max() > _ORTHONORMALITY_TOLERANCE:
        raise SafetyModuleError(f"{what} is not orthonormal (deviation {error.abs().max().item():.1e}).")


def _check_provenance(provenance: Any) -> None:
    """Raise SafetyModuleError for a part that is not what it should be; parts may be missing."""
    if not isinstance(provenance, Mapping):
        raise SafetyModuleError(f"provenance is {provenance!r:.80}, not a mapping.")
    for key, value in provenance.items():
        if key in _TEXTS and not (value is None or isinstance(value, str)):
            raise SafetyModuleError(f"provenance: {key} is {value!r:.80}, not a text.")
        if key in _NUMBERS and not (value is None or _is_a(value, _NUMBER)):
            raise SafetyModuleError(f"provenance: {key} is {value!r:.80}, not a number.")
        if key in _MAPPINGS:
            kind = _MAPPINGS[key]
            inside = value.items() if isinstance(value, Mapping) else [(None, None)]
            if not all(isinstance(name, str) and _is_a(of_name, kind) for name, of_name in inside):
                wanted = "numbers" if kind is _NUMBER else "texts"
                raise SafetyModuleError(f"provenance: {key} is {value!r:.80}, not a mapping of names to {wanted}.")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is _NUMBER:
        # Also of whole numbers that no float can hold.
        return isinstance(value, _NUMBER) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
    return isinstance(value, kind)


def _checksum(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors and of the description, but for the checksum itself."""
    # As it is read from the file, in which all keys are texts.
    others = json.loads(json.dumps({key: value for key, value in description.items() if key != "content_sha256"}))
    content = content_digest(tensors) + json.dumps(others, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def content_digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """
    SHA-256 of tensors on the CPU, as 64 hexadecimal digits: of their names, shapes, dtypes and bytes, not of a file.

    Args:
        tensors: By name; or pairs of name and tensor in the order of the names, of which one is in memory at a time.
    """
    pairs = ((key, tensors[key]) for key in sorted(tensors)) if isinstance(tensors, Mapping) else tensors
    digest = hashlib.sha256()
    for key, tensor in pairs:
        digest.update(f"{key}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
