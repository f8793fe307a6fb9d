"""Weights of a model that is not loaded, read from its safetensors files one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from ..support.hub import hub_file, is_hub_id, is_model_name
from ..support.module_names import listed
from .embeddings import input_embeddings, output_embeddings
from .fingerprint import weights_digest
from .weights import base_layer, is_quantized, layer_features, linear_weight

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class CheckpointWeights:
    """
    The weights that a checkpoint has for some linear layers of a model; only one of them is in memory at a time.

    The names in its files are brought to those of the model's modules as transformers does when it loads a checkpoint:
    by the architecture's renamings, and with or without the prefix of the base model.

    Args:
        source: A folder, or a hub repository ("organization/name@revision"), of which only the files that hold these
            weights are downloaded.
        model: The model whose layers they are compared with.
        names: Names of its linear layers.
        option: What the user calls the source, for messages.

    Raises:
        FileNotFoundError: There is no such folder or repository, or it has no safetensors files.
        ValueError: A layer has no weight there, one of another shape, or one that is no plain floating-point matrix.
    """

    def __init__(self, source: str, model: nn.Module, names: Iterable[str], *, option: str) -> None:
        self.source = source
        self._option = option
        self._digest = ""
        self._layers = {name: base_layer(model.get_submodule(name)) for name in names}
        self._folder = Path(source).expanduser()
        files = self._files()
        keys = _with_tied_head(_keys_of_modules(files, model), model)
        if missing := [name for name in self._layers if name not in keys]:
            raise ValueError(
                f"{option}={source!r} has no weight for {len(missing)} of {len(self._layers)} target modules: "
                f"{listed(missing)} (it has, for example, {next(iter(files), 'none')!r}). It must be a model of the "
                "same architecture, as a whole and not an adapter."
            )
        self._places = {name: (self._path(files[keys[name]]), keys[name]) for name in self._layers}
        self._dtypes = {name: self._checked_dtype(name) for name in self._layers}

    def dtype(self, name: str) -> torch.dtype:
        """That a layer's weight is stored in."""
        return self._dtypes[name]

    def weight(self, name: str) -> Tensor:
        """(d_out, d_in) of a layer, on the CPU, in the dtype that it is stored in."""
        path, key = self._places[name]
        try:
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._option}={self.source!r}: {path} cannot be read ({error}).") from error
        return weight.T if isinstance(self._layers[name], Conv1D) else weight

    def fingerprint(self) -> str:
        """Hex digest of all these weights; they are read once."""
        if not self._digest:
            self._digest = weights_digest((name, self.weight(name)) for name in self._layers)
        return self._digest

    def _files(self) -> dict[str, str]:
        """Key -> name of the file that holds it."""
        path = self._index_or_file()
        try:
            if path.name == _INDEX:
                files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
                if not isinstance(files, Mapping):
                    raise ValueError("its weight_map is no mapping")
                return {str(key): str(file) for key, file in files.items()}
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), path.name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self._option}={self.source!r}: {path} cannot be read ({error}).") from error

    def _index_or_file(self) -> Path:
        if self._folder.is_dir():
            for name in (_ONE_FILE, _INDEX):  # the order in which transformers takes them
                if (self._folder / name).is_file():
                    return self._folder / name
            raise FileNotFoundError(
                f"{self._option}={self.source!r}: the folder has neither {_ONE_FILE} nor {_INDEX}. Name that of a "
                "whole model; load one that is stored otherwise, or merge an adapter, and call `save_pretrained`."
            )
        if not (is_hub_id(self.source) or is_model_name(self.source)):
            raise FileNotFoundError(f"{self._option}={self.source!r}: there is no such folder. Check the path.")
        try:
            return hub_file(self.source, _ONE_FILE, option=self._option)
        except FileNotFoundError:  # a large model has several
            return hub_file(self.source, _INDEX, option=self._option)

    def _path(self, file: str) -> Path:
        return self._folder / file if self._folder.is_dir() else hub_file(self.source, file, option=self._option)

    def _checked_dtype(self, name: str) -> torch.dtype:
        path, key = self._places[name]
        try:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(key)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._option}={self.source!r}: {path} cannot be read ({error}).") from error
        d_in, d_out = layer_features(self._layers[name])
        wanted = (d_in, d_out) if isinstance(self._layers[name], Conv1D) else (d_out, d_in)
        if dtype not in _FLOATING:
            raise ValueError(
                f"{self._option}={self.source!r}: the weight of {name!r} is stored as {dtype}, quantized perhaps; it "
                f"must be one of {', '.join(_FLOATING)}. Name the model as it was before it was quantized."
            )
        if shape != wanted:
            raise ValueError(
                f"{self._option}={self.source!r}: the weight of {name!r} has the shape {shape} there and {wanted} in "
                "this model. It must be a model of the same sizes: the one that this model was aligned from."
            )
        return _FLOATING[dtype]


def _keys_of_modules(keys: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Module name -> the key of its weight, for all modules that there is a weight for."""
    found: dict[str, str] = {}
    renamings = _renamings(model)
    prefix = f"{getattr(model, 'base_model_prefix', '') or '.'}."
    for key in keys:
        renamed = key
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        if renamed.endswith(".weight"):
            name = renamed.removesuffix(".weight")
            for candidate in (name, name.removeprefix(prefix), prefix + name):
                found.setdefault(candidate, key)
    return found


def _with_tied_head(keys: dict[str, str], model: nn.Module) -> dict[str, str]:
    """With the head of a model that shares its weight with the embeddings, where only theirs is stored."""
    head, embeddings = output_embeddings(model), input_embeddings(model)
    if head is None or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return keys
    names = {base_layer(module): name.removesuffix(".base_layer") for name, module in model.named_modules()}
    head_name, source = names.get(base_layer(head), ""), names.get(embeddings) if embeddings is not None else None
    return {head_name: keys[source], **keys} if head_name and source in keys else keys


def _renamings(model: nn.Module) -> list[WeightRenaming]:
    """What transformers renames in checkpoints of this architecture."""
    if not isinstance(model, PreTrainedModel):
        return []
    return [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]


class LoadedWeights:
    """
    The same of a model that is in memory, its adapters left out; quantized weights are dequantized.

    Args:
        model: The model.
        names: Names of its linear layers.
        option: What the user calls it, for messages.

    Raises:
        ValueError: It has no such layer.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, option: str) -> None:
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        _check_modules(self._model, names, option)

    def weight(self, name: str) -> Tensor:
        """(d_out, d_in) of a layer, on the CPU, in the dtype that it has."""
        with linear_weight(self._model.get_submodule(name)) as weight:
            return weight.detach().to("cpu", copy=True)


def weights_of(
    source: str | os.PathLike | nn.Module, names: Iterable[str], *, option: str, trust_remote_code: bool = False
) -> CheckpointWeights | LoadedWeights:
    """
    The weights of a model that need not be loaded: the modules of a checkpoint are those of the causal language model
    that its own configuration describes.

    Args:
        source: As for `CheckpointWeights`; or a model.
        names: Names of linear layers.
        option: What the user calls the source, for messages.
        trust_remote_code: Run the repository's own model code.

    Raises:
        FileNotFoundError, ValueError: See `CheckpointWeights`; or it is a model whose weights are quantized.
    """
    names = list(names)
    if isinstance(source, nn.Module):
        found = LoadedWeights(source, names, option=option)
        base = source.get_base_model() if isinstance(source, PeftModel) else source
        if quantized := [name for name in names if is_quantized(base.get_submodule(name))]:
            raise ValueError(
                f"{option}: {listed(quantized)} of the model are quantized, so that what they differ by from another "
                "model's would be mostly rounding. Load it unquantized, or name its folder or repository."
            )
        return found
    source = os.path.expanduser(source)
    skeleton = _skeleton(source, option, trust_remote_code)
    _check_modules(skeleton, names, f"{option}={source!r}")
    return CheckpointWeights(source, skeleton, names, option=option)


def _skeleton(source: str, option: str, trust_remote_code: bool) -> PreTrainedModel:
    """A model without its weights: what its modules are called, and of which kinds they are."""
    name, _, revision = (source, "", "") if os.path.isdir(source) else source.partition("@")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or None, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(f"{option}={source!r}: there is no model of that name ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{option}={source!r}: it is no model. Name a whole model's folder. ({error})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{option}={source!r} is quantized. Name the model as it was before it was quantized.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _check_modules(model: nn.Module, names: Iterable[str], told: str) -> None:
    known = dict(model.named_modules())
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"{told}: {type(model).__name__} has no linear layer {listed(missing)}. Give a model of the same "
            "architecture."
        )


def coarser_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """That of two floating dtypes which rounds more."""
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def elements_that_differ(one: Tensor, other: Tensor) -> Tensor:
    """Where two weights of one shape differ by more than the rounding of the one in the coarser dtype: bool."""
    dtype = coarser_dtype(one.dtype, other.dtype)
    differs = one.to(dtype) != other.to(dtype)
    if {one.dtype, other.dtype} == {torch.bfloat16, torch.float16}:
        # Neither is the other rounded: both may be of one weight, each within half a step of it.
        differs &= ~((one.float() - other.float()).abs() <= (_step(one) + _step(other)) / 2)  # NaN differs
    return differs


def _step(weight: Tensor) -> Tensor:
    """Between each number and the next in its dtype, float32."""
    of_dtype = torch.finfo(weight.dtype)
    powers = torch.ldexp(torch.ones_like(weight, dtype=torch.float32), torch.frexp(weight.float()).exponent - 1)
    return of_dtype.eps * powers.clamp(min=of_dtype.smallest_normal)


def weight_delta(minuend: Tensor, subtrahend: Tensor, name: str) -> Tensor | None:
    """
    The difference of two models' weights of one layer, (d_out, d_in) float64, zero where it is no more than the
    rounding of the one that is kept in the coarser dtype; None where all of it is.

    Args:
        minuend: The one, in its dtype.
        subtrahend: The other, in its dtype.
        name: The layer's name, for messages.

    Raises:
        ValueError: They are of different shapes, or not finite.
    """
    if minuend.shape != subtrahend.shape:
        raise ValueError(
            f"The weight of {name!r} has the shape {tuple(minuend.shape)} in one model and {tuple(subtrahend.shape)} "
            "in the other. Give two models of the same architecture and size."
        )
    differs = elements_that_differ(minuend, subtrahend)
    if not differs.any():
        return None
    delta = minuend.double() - subtrahend.double()
    if not torch.isfinite(delta).all():
        raise ValueError(f"The weight of {name!r} contains NaN or infinity in one of the two models.")
    return delta.masked_fill_(~differs, 0)
