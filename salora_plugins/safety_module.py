"""The safety module: per layer, the directions that an update must stay out of, and where they come from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .provenance import Provenance, checked_energies
from .ranks import SIDES, Rank, Side, SideRanks, of_side, rank_for_share, rule_of
from .support.files import atomic_write
from .support.hub import hub_file, is_hub_id
from .support.linear_algebra import MOST_DEVIATION, deviation_from_orthonormal
from .support.module_names import advice_to_leave_out, listed
from .support.texts import is_placeholder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Since 2, the checksum is of the description, too."""
DEFAULT_FILE = "salora.safetensors"

_METADATA_KEY = "salora_safety_module"
_WEIGHT_SAMPLE = "weight_sample"


class SafetyModuleError(ValueError):
    """A safety module file that cannot be used, or one that does not belong to this model."""


@dataclass(frozen=True)
class SideBases:
    """The directions of one side of a set of linear layers, by module name."""

    bases: dict[str, Tensor]
    """U_C (d_out, r_s) or V_C (d_in, r_in), float32 with orthonormal columns, most important first."""

    singular_values: dict[str, Tensor] = field(default_factory=dict)
    """Of W X_h, or of X_h, for the columns of the basis: (rank,) float32, descending."""

    energies: dict[str, float] = field(default_factory=dict)
    """Sum of all squared singular values, those of the directions that were left out among them."""

    are_checked: bool = field(default=False, compare=False)
    """Whether who computed all this has found it finite, and the columns orthonormal."""

    @property
    def least_rank(self) -> int:
        """The smallest number of protected directions over the modules."""
        return min(basis.shape[1] for basis in self.bases.values())

    @property
    def captured_energy(self) -> dict[str, float]:
        """Module name -> share of the energy on the safety data that the directions capture, from 0 to 1."""
        return {
            name: values.double().square().sum().item() / self.energies[name]
            for name, values in self.singular_values.items()
            if self.energies.get(name)
        }

    def leading(self, ranks: Mapping[str, int]) -> SideBases:
        """The first directions of some modules: module name -> how many."""

        def first(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # The tensor itself where all of it is wanted: layers with one input share theirs.
            return {
                name: values[name] if values[name].shape[-1] == rank else values[name][..., :rank].contiguous()
                for name, rank in ranks.items()
                if name in values
            }

        energies = {name: energy for name, energy in self.energies.items() if name in ranks}
        return SideBases(first(self.bases), first(self.singular_values), energies, self.are_checked)


@dataclass(frozen=True)
class SafetyModule:
    """
    The fixed safety module (section 4.1 of the paper) for a set of linear layers.

    Modules are named as in the base model, for example "model.layers.0.self_attn.q_proj".
    """

    sides: dict[Side, SideBases]
    """"output": U_C; and, where there is an input side, "input": V_C, for the same modules."""

    weight_samples: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> a few elements of the weight it was computed for, float32: the fingerprint of the model."""

    provenance: Provenance = field(default_factory=Provenance)
    """What it was computed from and how; a mapping of JSON values is made one."""

    def __post_init__(self) -> None:
        if "output" not in self.sides or not self.bases:
            raise SafetyModuleError("A safety module needs at least one module with a basis; it has none.")
        for side, found in self.sides.items():
            for name, basis in found.bases.items():
                if name not in self.bases:
                    raise SafetyModuleError(f"{name}: has an {side} basis but no output basis.")
                _check_basis(basis, f"{name}: {side} basis", found.are_checked)
            if missing := sorted(set(self.bases) - set(found.bases)):
                raise SafetyModuleError(f"{missing[0]}: has no {side} basis, although other modules have one.")
            for name, vector in found.singular_values.items():
                kind = f"{side} singular values"
                if name not in found.bases or vector.shape != (found.bases[name].shape[1],):
                    raise SafetyModuleError(f"{name}: {kind} of shape {tuple(vector.shape)} do not fit its basis.")
                if not found.are_checked and not torch.isfinite(vector).all():
                    raise SafetyModuleError(f"{name}: {kind} are not finite.")
        if not isinstance(self.provenance, Provenance):
            try:
                object.__setattr__(self, "provenance", Provenance.of(self.provenance))
            except ValueError as error:
                raise SafetyModuleError(str(error)) from error

    @property
    def protects(self) -> bool:
        """Whether updates are kept out of its directions; those of SAILS are where a training starts."""
        return self.provenance.variant != "sails"

    @property
    def bases(self) -> dict[str, Tensor]:
        """Module name -> U_C, (d_out, r_s)."""
        return self.sides["output"].bases

    @property
    def input_bases(self) -> dict[str, Tensor]:
        """Module name -> V_C, (d_in, r_in); empty without an input side."""
        return self.sides["input"].bases if "input" in self.sides else {}

    @property
    def singular_values(self) -> dict[str, Tensor]:
        """Module name -> singular values of W X_h for the columns of U_C, (r_s,)."""
        return self.sides["output"].singular_values

    @property
    def input_singular_values(self) -> dict[str, Tensor]:
        """Module name -> singular values of X_h for the columns of V_C, (r_in,); empty without an input side."""
        return self.sides["input"].singular_values if "input" in self.sides else {}

    @property
    def safety_rank(self) -> int:
        """The smallest number of protected output directions over the modules."""
        return self.sides["output"].least_rank

    @property
    def input_safety_rank(self) -> int:
        """The smallest number of protected input directions over the modules; 0 without an input side."""
        return self.sides["input"].least_rank if "input" in self.sides else 0

    @property
    def captured_energy(self) -> dict[str, float]:
        """Module name -> share of the energy of its outputs on the safety data that U_C captures, from 0 to 1."""
        return self.sides["output"].captured_energy

    @property
    def captured_input_energy(self) -> dict[str, float]:
        """The same for its inputs and V_C."""
        return self.sides["input"].captured_energy if "input" in self.sides else {}

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

    def restricted_to(self, ranks: SideRanks) -> SafetyModule:
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
                f"(it has, for example, {next(iter(self.bases))!r}). Calibrate again with these target_modules, or "
                f"leave them out: {advice_to_leave_out(absent, names)}."
            )
        leading = {side: self._directions(side, by_name) for side, by_name in ranks.items()}
        return SafetyModule(
            sides={side: found.leading(leading[side]) for side, found in self.sides.items() if side in leading},
            weight_samples={n: self.weight_samples[n] for n in names if n in self.weight_samples},
            provenance=self._provenance_with(leading.get("input", {})),
        )

    def _provenance_with(self, input_directions: Mapping[str, int]) -> Provenance:
        """Without the leak of modules that are left out, or of which fewer directions are taken than it is of."""
        leaks = self.provenance.get("leak") or {}
        kept = {
            name: leak for name, leak in leaks.items() if input_directions.get(name) == self.input_bases[name].shape[1]
        }
        if len(kept) == len(leaks):
            return self.provenance
        said = {key: value for key, value in self.provenance.items() if not key.startswith("leak")}
        if not kept:
            reason = "fewer directions were taken of the safety module than it was measured with"
            return Provenance.of({**said, "leak_unknown": reason})
        return Provenance.of({**self.provenance, "leak": kept})

    def _directions(self, side: Side, ranks: Mapping[str, Rank]) -> dict[str, int]:
        """Module name -> how many of its directions are wanted."""
        option = of_side(side, "safety_rank")
        found = self.sides.get(side, SideBases({}))
        asked, asked_by_name = self.provenance.get(option), self.provenance.get(f"{option}_pattern") or {}
        calibrated_with = (asked, *asked_by_name.values())
        by_need = not isinstance(asked, int | None) or any(
            self.provenance.get(f"{option}_{key}") for key in ("pattern", "cut")
        )
        directions = {}
        for name, wanted in ranks.items():
            available = found.bases[name].shape[1] if name in found.bases else 0
            if rule_of(wanted) is not None:
                if available and wanted in calibrated_with:
                    directions[name] = available
                    continue
                raise SafetyModuleError(
                    f"{option}={wanted!r}, but the safety module was calibrated with {option}={asked!r}, and whose "
                    f"numbers of directions follow from that. Leave {option} out, which takes all that it has, or "
                    "calibrate again with the rule."
                )
            if not isinstance(wanted, int):
                wanted = float(wanted)
                values, energy = found.singular_values.get(name), found.energies.get(name)
                needed = None if values is None or not energy else rank_for_share(values, energy, wanted)
                if needed is None and available and wanted in calibrated_with:
                    needed = available  # a method that takes directions out of these keeps less of the energy
                if needed is None:
                    raise SafetyModuleError(
                        f"{option}={wanted}, but the safety module's {available} directions for {name!r} capture less "
                        f"than that share of the energy, or it does not say how much. Lower {option}, or calibrate "
                        "again with it."
                    )
                directions[name] = needed
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
        path = Path(path).expanduser()
        if path.is_dir():
            path = path / DEFAULT_FILE
        tensors = self._tensors()
        energies: dict[str, dict[str, float]] = {}
        if self.sides["output"].energies:  # a file has those of both sides, or none
            energies = {
                of_side(side, "energy"): self.sides[side].energies if side in self.sides else {} for side in SIDES
            }
        description = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "provenance": {**self.provenance, **energies},
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
        path = _file_of(path)
        tensors, description = _read(path)
        try:
            version, digest, provenance = (
                description[key] for key in ("format_version", "content_sha256", "provenance")
            )
        except (KeyError, TypeError) as error:
            raise SafetyModuleError(f"{path}: its description cannot be read ({error}). Calibrate again.") from error
        if version not in (1, FORMAT_VERSION):
            raise SafetyModuleError(
                f"{path}: format version {version!r}, this salora-plugins reads "
                f"1 and {FORMAT_VERSION}. Install the version that wrote it, or calibrate again."
            )
        try:
            module = cls._of_file(tensors, provenance)
        except ValueError as error:
            raise SafetyModuleError(f"{path}: {error}") from error
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

    def _tensors(self) -> dict[str, Tensor]:
        """As they are in the file."""
        kinds = {_WEIGHT_SAMPLE: self.weight_samples}
        for side, found in self.sides.items():
            kinds |= {f"{side}_basis": found.bases, f"{side}_singular_values": found.singular_values}
        # Modules that read the same input share one V_C in memory; safetensors wants every tensor on its own.
        return {
            f"{name}.{kind}": tensor.detach().cpu().float().clone(memory_format=torch.contiguous_format)
            for kind, by_name in kinds.items()
            for name, tensor in by_name.items()
        }

    @classmethod
    def _of_file(cls, tensors: Mapping[str, Tensor], provenance: Any) -> SafetyModule:
        """
        Raises:
            ValueError: A part is not what it should be; it says which.
        """
        kinds: dict[str, dict[str, Tensor]] = {_WEIGHT_SAMPLE: {}}
        for side in SIDES:
            kinds |= {f"{side}_basis": {}, f"{side}_singular_values": {}}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(".")
            if kind not in kinds:
                raise SafetyModuleError(f"holds {key!r}, which is no part of a safety module.")
            kinds[kind][name] = tensor
        try:
            said = dict(provenance) if isinstance(provenance, Mapping) else provenance
            sides: dict[Side, SideBases] = {}
            for side in SIDES:
                key = of_side(side, "energy")
                energies = checked_energies(key, said.pop(key, {})) if isinstance(said, dict) else {}
                bases, values = kinds[f"{side}_basis"], kinds[f"{side}_singular_values"]
                if side == "output" or bases or values:
                    sides[side] = SideBases(bases, values, energies)
            return cls(sides, kinds[_WEIGHT_SAMPLE], Provenance.of(said))
        except ValueError as error:
            raise SafetyModuleError(f"{error} The file is damaged; calibrate again.") from error


def check_replaceable(path: Path, option: str) -> None:
    """
    Args:
        path: Where a safety module is to be written.
        option: What the user calls it, for messages.

    Raises:
        FileExistsError: Another file is there, such as a model's weights, which would be lost.
    """
    if not path.exists():
        return
    try:
        _read_description(path)
    except (SafetyModuleError, OSError) as error:
        raise FileExistsError(
            f"{option} {path}: this file exists and is no safety module, so that it is not replaced. Name another file."
        ) from error


def _file_of(source: str | os.PathLike) -> Path:
    """
    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / DEFAULT_FILE
    elif not path.exists() and isinstance(source, str) and is_hub_id(source):
        path = hub_file(source, DEFAULT_FILE, option="safety_module")
    if not path.is_file() and is_placeholder(str(source)):
        raise FileNotFoundError(
            f"safety_module={str(source)!r}: a saved configuration has only the type of what was an object. Give the "
            "safety module again, or its file."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"safety_module: there is no file {str(path)!r}. Give a safety module file, a folder that holds "
            f"{DEFAULT_FILE}, or a hub repository (organization/name)."
        )
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """
    The tensors of a file and its description, unchecked.

    Raises:
        SafetyModuleError: They cannot be read.
    """
    description = _read_description(path)
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, description  # noqa: SIM118 -- not a dict


def _read_description(path: Path) -> Any:
    """
    Raises:
        SafetyModuleError: The file has none, or it cannot be read.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if _METADATA_KEY not in metadata:
        raise SafetyModuleError(f"{path}: a safetensors file, but not a safety module.")
    try:
        return json.loads(metadata[_METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise SafetyModuleError(f"{path}: its description cannot be read ({error}). Calibrate again.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """
    Raises:
        SafetyModuleError: It is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise SafetyModuleError(
            f"{path}: not a readable safetensors file, perhaps cut short ({error}). Calibrate again or fetch it again."
        ) from error


def _check_basis(basis: Tensor, what: str, is_checked: bool) -> None:
    if basis.ndim != 2 or not 0 < basis.shape[1] <= basis.shape[0]:
        raise SafetyModuleError(f"{what} has shape {tuple(basis.shape)}; expected (dimension, rank).")
    if is_checked:
        return
    if not basis.is_floating_point() or not torch.isfinite(basis).all():
        raise SafetyModuleError(f"{what} is not finite.")
    if (deviation := deviation_from_orthonormal(basis).item()) > MOST_DEVIATION:
        raise SafetyModuleError(f"{what} is not orthonormal (deviation {deviation:.1e}).")


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
