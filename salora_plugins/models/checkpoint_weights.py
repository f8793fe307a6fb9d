"""Weights of a model that is not loaded, read from its safetensors files one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from ..support.hub import hub_file, is_hub_id, is_model_name
from ..support.module_names import listed
from .fingerprint import spread_samples
from .weights import base_layer, layer_features

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
        self._layers = {name: base_layer(model.get_submodule(name)) for name in names}
        self._folder = Path(source).expanduser()
        files = self._files()
        keys = _keys_of_modules(files, model)
        if missing := [name for name in self._layers if name not in keys]:
            raise ValueError(
                f"{option}={source!r} has no weight for {len(missing)} of {len(self._layers)} target modules: "
                f"{listed(missing)} (it has, for example, {next(iter(files), 'none')!r}). It must be a model of the "
                "same architecture, as a whole and not an adapter."
            )
        self._places = {name: (self._path(files[keys[name]]), keys[name]) for name in self._layers}
        for name in self._layers:
            self._check(name)

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
        """Hex digest of a few elements of every weight, rounded to bfloat16."""
        digest = hashlib.sha256()
        for name in self._layers:
            digest.update(name.encode())
            digest.update(spread_samples(self.weight(name)).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

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
            for name in (_INDEX, _ONE_FILE):
                if (self._folder / name).is_file():
                    return self._folder / name
            raise FileNotFoundError(
                f"{self._option}={self.source!r}: the folder has neither {_ONE_FILE} nor {_INDEX}. Name that of a "
                "whole model; load one that is stored otherwise, or merge an adapter, and call `save_pretrained`."
            )
        if not (is_hub_id(self.source) or is_model_name(self.source)):
            raise FileNotFoundError(f"{self._option}={self.source!r}: there is no such folder. Check the path.")
        try:
            return hub_file(self.source, _INDEX, option=self._option)
        except FileNotFoundError:  # a small model has one file
            return hub_file(self.source, _ONE_FILE, option=self._option)

    def _path(self, file: str) -> Path:
        return self._folder / file if self._folder.is_dir() else hub_file(self.source, file, option=self._option)

    def _check(self, name: str) -> None:
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


def _renamings(model: nn.Module) -> list[WeightRenaming]:
    """What transformers renames in checkpoints of this architecture."""
    if not isinstance(model, PreTrainedModel):
        return []
    return [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
