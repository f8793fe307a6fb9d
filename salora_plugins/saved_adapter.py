"""A saved LoRA adapter as its files state it: factors, scalings, and how much of it lies in the safety directions."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import TAKEN_AWAY, atomic_write, scratch_folder
from .safety_module import DEFAULT_FILE, SafetyModule, content_digest

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
CONFIG_FILE = "salora_config.json"
CARD_FILE = "README.md"

DIGEST_KEY = "adapter_sha256"
"""In `salora_config.json`: the digest of the weights that were saved with it, see [`adapter_digest`]."""

_PICKLED_WEIGHTS_FILE = "adapter_model.bin"
# Of a saved adapter, all that this package or PEFT writes. What else lies in its folder is somebody else's.
_OWN_FILES = (WEIGHTS_FILE, _PICKLED_WEIGHTS_FILE, DEFAULT_FILE, CONFIG_FILE, CARD_FILE, ADAPTER_CONFIG_FILE)

logger = logging.getLogger(__name__)

# What PEFT 0.4.0, the first version that loads safetensors files, knows. Versions 0.6 to 0.13 fail on keys that are new
# to them; 0.4 and 0.5 pass over them.
KEYS_OF_OLDEST_PEFT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "revision",
        "target_modules",
        "task_type",
    }
)

# Initializations that leave the base weights as they are; the others need a base model that was changed with them.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
FOREIGN_FACTOR_SHARE = 1e-2
"""A factor saved in bf16 leaves this share of itself in the safety directions; another safety module's, far more."""

# Products of float64 rounding errors: an update this much smaller than its factors is none.
_ZERO = 1e-12


@dataclass(frozen=True)
class SavedAdapter:
    """The weights and the configuration of a saved LoRA adapter. Modules are named as in the base model."""

    config: dict[str, Any]
    """Content of `adapter_config.json`."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Module name -> lora_A (k, d_in) and lora_B (d_out, k), in the dtype of the file; other shapes as they are."""

    other_tensors: dict[str, Tensor]
    """The file's other tensors under their keys: `modules_to_save`, biases and the like."""

    @classmethod
    def load(cls, folder: str | os.PathLike) -> SavedAdapter:
        """
        Read a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: One of the two files is missing.
            ValueError: One of them cannot be read or holds what none of its kind does, or a module has only one of its
                factors.
        """
        folder = Path(folder)
        for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}, so it is not an adapter saved as safetensors.")
        config = read_json_object(folder / ADAPTER_CONFIG_FILE)
        _check_adapter_config(config, folder / ADAPTER_CONFIG_FILE)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} {_unreadable(error)}") from error
        names = [key.removesuffix(_FACTORS[0]) for key in tensors if key.endswith(_FACTORS[0])]
        factors = {}
        for name in names:
            a, b = (tensors.pop(f"{name}{suffix}", None) for suffix in _FACTORS)
            if b is None:
                raise ValueError(f"{folder}: {name} has a lora_A but no lora_B. Save the adapter again.")
            factors[name.removeprefix(_PREFIX)] = a, b
        return cls(config, factors, tensors)

    def rank_of(self, name: str) -> int:
        """The rank that the configuration says a module has, `rank_pattern` included."""
        return self._of(name, "rank_pattern", "r")

    def scaling(self, name: str) -> float:
        """The LoRA scaling s of a module, with PEFT's rules for rsLoRA, `rank_pattern` and `alpha_pattern`."""
        rank, alpha = self.rank_of(name), self._of(name, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, name: str, pattern: str, default: str) -> Any:
        from peft.utils.other import get_pattern_key

        values = self.config.get(pattern) or {}
        return values.get(get_pattern_key(values.keys(), name), self.config[default])

    @property
    def rank(self) -> int:
        """The largest rank over the modules."""
        return max(a.shape[0] for a, _ in self.factors.values())


def safety_shares(adapter: SavedAdapter, safety_module: SafetyModule) -> dict[str, dict[str, float]]:
    """
    How much of an adapter's update lies in the protected directions, from saved files alone, in float64.

    Args:
        adapter: Any LoRA adapter of linear layers.
        safety_module: The directions.

    Returns:
        Module name -> side ("output": ||U_C^T dW||_F / ||dW||_F; "input", where there is an input side:
        ||dW V_C||_F / ||dW||_F) -> share; 0 where dW is zero. dW is never formed: of B = QR, only R A is needed.

    Raises:
        ValueError: The safety module has no directions for a module, or ones of another size; or the weights are not
            finite, of which there is no share.
    """
    shares = {}
    for name, (a, b) in adapter.factors.items():
        if not covers(safety_module, name, b):
            raise ValueError(f"{name}: the safety module has no directions for this module. Was it another model's?")
        norm, inside = norms(a, b, safety_module, name)
        if not math.isfinite(norm):
            raise ValueError(f"the weights of {name} are not finite")
        shares[name] = {side: part / norm if norm else 0.0 for side, part in inside.items()}
    return shares


def covers(safety_module: SafetyModule, name: str, b: Tensor) -> bool:
    """Whether a safety module has directions for a module's update with the factor `b`, (d_out, k)."""
    return name in safety_module.bases and safety_module.bases[name].shape[0] == b.shape[0]


def norms(a: Tensor, b: Tensor, safety_module: SafetyModule, name: str) -> tuple[float, dict[str, float]]:
    """
    The Frobenius norm of an update without its scaling, and of its part in the protected directions, in float64.

    Args:
        a: lora_A, (k, d_in).
        b: lora_B, (d_out, k).
        safety_module: The directions.
        name: The module's name.

    Returns:
        ||B A||_F, 0 where it is rounding error only; and side -> ||U_C^T B A||_F or ||B A V_C||_F. All are NaN where
        a factor is not finite.
    """
    a, b = a.double(), b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        sides = ("output", "input") if name in safety_module.input_bases else ("output",)
        return math.nan, dict.fromkeys(sides, math.nan)
    reduced = torch.linalg.qr(b).R
    norm = torch.linalg.norm(reduced @ a).item()
    if norm <= _ZERO * (torch.linalg.norm(a) * torch.linalg.norm(b)).item():
        norm = 0.0
    inside = {"output": (safety_module.bases[name].double().T @ b) @ a}
    if name in safety_module.input_bases:
        if safety_module.input_bases[name].shape[0] != a.shape[1]:
            raise ValueError(
                f"{name}: the safety module's directions are for {safety_module.input_bases[name].shape[0]} inputs, "
                f"the adapter has {a.shape[1]}. Was it another model's?"
            )
        inside["input"] = reduced @ (a @ safety_module.input_bases[name].double())
    return norm, {side: torch.linalg.norm(part).item() for side, part in inside.items()}


def lies_inside(factor: Tensor, basis: Tensor, axis: int) -> bool:
    """
    Whether more of a factor lies in the directions of a basis than rounding to 16 bits leaves there.

    Args:
        factor: Saved lora_A, (k, d_in), or lora_B, (d_out, k).
        basis: (d, r) with orthonormal columns.
        axis: The axis of `factor` that has length d: 1 of lora_A, 0 of lora_B.
    """
    along = factor.cpu().double() if axis == 0 else factor.cpu().double().T
    inside = torch.linalg.norm(basis.cpu().double().T @ along)
    return bool(inside > FOREIGN_FACTOR_SHARE * torch.linalg.norm(along))


def check_saved_factors(folder: Path, safety_module: SafetyModule) -> None:
    """
    Check that the weights that PEFT has just written are an ordinary LoRA adapter with the projected factors.

    That they are rests on hooks of PEFT that are not public. Without this check, another PEFT could save the raw
    factors, which lie in the safety directions, or save them under names that nothing reads.

    Args:
        folder: Where the adapter is saved; nothing is checked where no safetensors file is there.
        safety_module: The one that the adapter was trained with.

    Raises:
        RuntimeError: A target module's factors are missing, or lie in the safety directions.
        ValueError: The weights were written as a pickle beside an older safetensors file, which is what is loaded.
    """
    from importlib.metadata import version

    weights, pickle = folder / WEIGHTS_FILE, folder / _PICKLED_WEIGHTS_FILE
    if not weights.is_file():
        return
    if pickle.is_file() and pickle.stat().st_mtime_ns > weights.stat().st_mtime_ns:
        raise ValueError(
            f"safe_serialization=False: {pickle} was written beside an older {WEIGHTS_FILE}, which PEFT and all else "
            "load instead. Leave safe_serialization at True, or save into another folder."
        )
    advice = (
        f"The installed PEFT {version('peft')} saves adapters in another way than salora-plugins knows. Do not use "
        "this file; install a PEFT version that salora-plugins supports."
    )
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, basis in safety_module.bases.items():
        bases = (safety_module.input_bases.get(name), basis)
        for suffix, directions, axis in zip(_FACTORS, bases, (1, 0), strict=True):
            factor = tensors.get(f"{_PREFIX}{name}{suffix}")
            if factor is None or factor.ndim != 2:
                raise RuntimeError(f"{folder / WEIGHTS_FILE}: has no {suffix[1:]} of {name}. {advice}")
            if directions is not None and lies_inside(factor, directions, axis):
                raise RuntimeError(
                    f"{folder / WEIGHTS_FILE}: {suffix[1:]} of {name} lies in the safety directions. {advice}"
                )


def largest_shares(shares: dict[str, dict[str, float]]) -> dict[str, float]:
    """Side -> the largest share over all modules; NaN where one of them is."""
    sides = dict.fromkeys(side for of_module in shares.values() for side in of_module)
    return {side: largest(of_module[side] for of_module in shares.values() if side in of_module) for side in sides}


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; NaN where one of them is, which `max` would pass over unless it comes first."""
    return max(values, key=lambda value: (math.isnan(value), value))


def in_dtype(factor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """
    A factor of a module in another dtype.

    Raises:
        ValueError: Its numbers are too large for it.
    """
    converted = factor.to(dtype)
    if not torch.isfinite(converted).all():
        short = str(dtype).removeprefix("torch.")
        raise ValueError(f"dtype={short!r} cannot hold the weights of {name}: choose 'float32' or 'bfloat16'.")
    return converted


def check_destination(adapter: Path, out: Path, overwrite: bool) -> None:
    """
    Raises:
        ValueError: `out` is the folder that is read.
        FileExistsError: There is something else than an adapter, or one that is not to be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() == adapter.resolve():
        raise ValueError(f"{out} holds the adapter that is read. Name another folder to write.")
    # One of the two is what an interruption may have left.
    if not any((out / name).is_file() for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE)):
        raise FileExistsError(f"{out} exists and is not a saved adapter. Name another folder to write.")
    if not overwrite:
        raise FileExistsError(
            f"{out} holds an adapter already. Name another folder, or give overwrite=True (--overwrite)."
        )


def check_plain_lora(saved: SavedAdapter, folder: Path, *, purpose: str) -> None:
    """
    Args:
        saved: An adapter.
        folder: Where it was read, for messages.
        purpose: What cannot be done otherwise, for messages: "exported".

    Raises:
        ValueError: Its update is not s B A of two finite factors per linear layer, on an unchanged base model.
    """
    from peft import LoraConfig

    from .config import COMPATIBLE_LORA_FIELDS

    config = saved.config
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type={config.get('peft_type')!r}; only LoRA adapters can be {purpose}.")
    defaults = LoraConfig().to_dict()
    for option, value in config.items():
        if option == "init_lora_weights":
            unusual = value not in _PLAIN_INITIALIZATIONS
        else:
            unusual = option not in COMPATIBLE_LORA_FIELDS and bool(value) and value != defaults.get(option)
        if unusual:
            raise ValueError(
                f"{folder}: {option}={value!r}. Only adapters of two plain factors per linear layer, on an "
                f"unchanged base model, can be {purpose}."
            )
    if not saved.factors:
        raise ValueError(f"{folder}: holds no lora_A and lora_B of a linear layer.")
    odd = [key for key in saved.other_tensors if "lora_" in key]
    odd += [name for name, pair in saved.factors.items() if any(factor.ndim != 2 for factor in pair)]
    if odd:
        raise ValueError(
            f"{folder}: {odd[0]} does not belong to a plain linear layer (an embedding, a convolution or a bias of "
            f"lora_B). Such adapters cannot be {purpose}."
        )
    for name, (a, b) in saved.factors.items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{folder}: the weights of {name} are not finite.")
        ranks = {a.shape[0], b.shape[1], saved.rank_of(name)}
        if len(ranks) > 1:
            raise ValueError(
                f"{folder}: the factors of {name} have the shapes {tuple(a.shape)} and {tuple(b.shape)}, and the "
                f"configuration says rank {saved.rank_of(name)}. The two files do not belong together; save it again."
            )


def adapter_digest(folder: str | os.PathLike) -> str | None:
    """
    SHA-256 of an adapter's weights: of the tensors' names, shapes, dtypes and bytes, in the order of the names, so that
    neither the order within the file nor its metadata matter.

    Args:
        folder: With `adapter_model.safetensors`; without it there is no digest: None.

    Raises:
        ValueError: The file cannot be read.
    """
    file = Path(folder) / WEIGHTS_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return content_digest((key, opened.get_tensor(key)) for key in sorted(opened.keys()))
    except SafetensorError as error:
        raise ValueError(f"{file} {_unreadable(error)}") from error


def adapter_problem(folder: str | os.PathLike) -> str | None:
    """
    Why the safety module and the certificate beside an adapter do not hold for its weights, or None.

    They name the weights that they were saved with: by the digest in `salora_config.json` and, where there is none (an
    adapter that was exported or projected), by that in the model card. A folder that names none has no problem.
    """
    folder = Path(folder)
    try:
        digest, source = _recorded_digest(folder)
        if digest is None:
            return None
        found = adapter_digest(folder)
    except ValueError as error:
        return str(error)
    if found is None:
        return f"{folder} has no {WEIGHTS_FILE}, though {source} names its weights"
    if found == digest:
        return None
    return (
        f"{folder}: the weights in {WEIGHTS_FILE} are not those that were saved with {source} (their SHA-256 "
        "differs from the one that it names). They were trained further, combined or converted without "
        "salora-plugins, so that neither its safety module nor its certificate is theirs"
    )


def check_saved_together(folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: The weights of a saved SaLoRA adapter are not those that its safety module was saved with, or a file
            cannot be read; the message names it.
    """
    if (problem := adapter_problem(folder)) is not None:
        raise ValueError(
            f"{problem.rstrip('.')}. Go on with the adapter as it was saved (a checkpoint before); or, to keep these "
            "weights, take out of them what lies in the safety directions: `salora project`."
        )


def read_side_config(folder: str | os.PathLike) -> dict[str, Any] | None:
    """
    Content of the `salora_config.json` beside an adapter; None where there is none.

    Raises:
        ValueError: It cannot be read.
    """
    file = Path(folder) / CONFIG_FILE
    return read_json_object(file) if file.is_file() else None


def read_json_object(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: The file is no JSON object; it is named.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read, perhaps cut short ({error}). Save it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} and no configuration. Save it again.")
    return values


def card_mark(digest: str) -> str:
    """How a model card names the weights that its certificate is for."""
    return f"weights of SHA-256 `{digest}`"


_CARD_MARK = re.compile(card_mark("([0-9a-f]{64})"))


def _recorded_digest(folder: Path) -> tuple[str | None, str]:
    """The digest of the weights that side files name, and which file it is."""
    config = read_side_config(folder)
    if config is not None and DIGEST_KEY in config:
        digest = config[DIGEST_KEY]
        if digest is not None and not isinstance(digest, str):
            raise ValueError(f"{folder / CONFIG_FILE}: {DIGEST_KEY} is {digest!r}, not a text. Save it again.")
        return digest, CONFIG_FILE
    if (folder / CARD_FILE).is_file():
        found = _CARD_MARK.search((folder / CARD_FILE).read_text(encoding="utf-8", errors="replace"))
        return (None if found is None else found.group(1)), CARD_FILE
    return None, CONFIG_FILE


def _unreadable(error: SafetensorError) -> str:
    return f"is not a readable safetensors file, perhaps cut short ({error}). Save it again."


# Of the entries of a LoRA configuration that are needed to read an adapter or to train it: what they may be.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "lora_alpha": (lambda value: type(value) in (int, float) and math.isfinite(value), "a number"),
    "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a share"),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a text"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "modules_to_save"),
        (lambda value: value is None or isinstance(value, str) or _all_texts(value), "a text or a list of texts"),
    ),
}


def _all_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def check_lora_entries(config: dict[str, Any], file: Path) -> None:
    """
    Raises:
        ValueError: The file has an entry that no PEFT writes; file and entry are named.
    """

    def check(option: str, kind: str, value: Any) -> None:
        valid, wanted = _ENTRIES[kind]
        if not valid(value):
            raise ValueError(f"{file}: {option} is {value!r:.80}, not {wanted}. Save the adapter again.")

    for option in _ENTRIES:
        if option in config:
            check(option, option, config[option])
    for option, kind in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = config.get(option)
        if pattern is not None and not isinstance(pattern, dict):
            raise ValueError(f"{file}: {option} is {pattern!r:.80}, not a mapping of modules to numbers.")
        for key, value in (pattern or {}).items():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{file}: {option}: {key!r} is no regular expression ({error}).") from error
            check(f"{option}[{key!r}]", kind, value)


def _check_adapter_config(config: dict[str, Any], file: Path) -> None:
    if config.get("peft_type", "LORA") == "LORA":  # other methods have other options
        check_lora_entries({"r": None, "lora_alpha": None, **config}, file)


def write_adapter(
    adapter: SavedAdapter,
    out: Path,
    *,
    card: Callable[[str], str],
    tags: tuple[str, ...],
    safety_module: SafetyModule | None = None,
) -> None:
    """
    Write a plain LoRA adapter in the place of one that is there; all else in the folder stays.

    An interruption leaves the adapter that was there. Where even putting that back fails, or the process is killed in
    between, `adapter_config.json` is missing, without which nothing loads the folder, and what was there lies in a
    hidden folder beside it.

    Args:
        adapter: What to write.
        out: The folder.
        card: Makes a section for the model card, Markdown, from the digest of the weights.
        tags: For the model card.
        safety_module: Written beside it as `salora.safetensors`.
    """
    from .model_card import write_card

    scratch = scratch_folder(out)
    new, old = scratch / "new", scratch / TAKEN_AWAY
    try:
        new.mkdir()
        tensors = dict(adapter.other_tensors)
        for name, (a, b) in adapter.factors.items():
            tensors[f"{_PREFIX}{name}{_FACTORS[0]}"] = a
            tensors[f"{_PREFIX}{name}{_FACTORS[1]}"] = b
        atomic_write(new / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        if safety_module is not None:
            safety_module.save(new / DEFAULT_FILE)
        if (out / CARD_FILE).is_file():
            shutil.copyfile(out / CARD_FILE, new / CARD_FILE)
        base_model = adapter.config.get("base_model_name_or_path")
        write_card(new, base_model, card(content_digest(tensors)), tags=tags, replaces=True)
        write_adapter_config(new, adapter.config)
        if out.exists():
            old.mkdir()
            _exchange(new, out, old)
        else:
            os.replace(new, out)
    except BaseException as error:
        _discard(scratch, out)
        # The files are called by the names that they were to have.
        if isinstance(error, OSError) and str(error.filename).startswith(str(new)):
            raise OSError(error.errno, error.strerror, str(out / Path(error.filename).name)) from error
        if isinstance(error, ValueError):
            raise ValueError(str(error).replace(str(new), str(out))) from error
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _exchange(new: Path, out: Path, old: Path) -> None:
    """
    Put the files of `new` into `out` and those of the adapter there into `old`; interrupted, put them back.

    `adapter_config.json` is the first to go and the last to come.
    """
    before = [name for name in _OWN_FILES if (out / name).exists()]
    try:
        for name in reversed(before):
            os.replace(out / name, old / name)
        for name in _OWN_FILES:
            if (new / name).exists():
                os.replace(new / name, out / name)
    except BaseException:
        if ADAPTER_CONFIG_FILE not in before or (old / ADAPTER_CONFIG_FILE).exists():
            (out / ADAPTER_CONFIG_FILE).unlink(missing_ok=True)
        for name in _OWN_FILES:
            if (old / name).exists():
                os.replace(old / name, out / name)
            elif name not in before:
                (out / name).unlink(missing_ok=True)
        raise


def _discard(scratch: Path, out: Path) -> None:
    """Remove a scratch folder, unless it holds what could not be put back into `out`."""
    if not any(scratch.glob(f"{TAKEN_AWAY}/*")):
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        logger.error("%s is not complete. What was there lies in %s; move it back.", out, scratch / TAKEN_AWAY)


def write_adapter_config(folder: str | os.PathLike, values: dict[str, Any]) -> None:
    """
    Write `adapter_config.json` so that PEFT reads it from version 0.4.0 on, all of it or nothing.

    Options that are newer than that version are left out where they have their default: every PEFT that knows them
    fills in the same, and versions 0.6 to 0.13 refuse a file with keys that they do not know.

    Args:
        folder: Where to write; created where it is missing.
        values: What `LoraConfig.to_dict` gives, with sets or lists.
    """
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in values.items()
        if key in KEYS_OF_OLDEST_PEFT or (key != "peft_version" and value != defaults.get(key))
    }
    content = json.dumps(kept, indent=2, sort_keys=True) + "\n"
    atomic_write(Path(folder) / ADAPTER_CONFIG_FILE, content.encode())
