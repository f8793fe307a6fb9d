"""The weights of a saved model, one at a time, by the names of its modules: the model itself is not loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..support.files import read_json_object
from ..support.hub import hub_folder
from .embeddings import input_embeddings, output_embeddings
from .weights import linear_weight

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = ["config.json", _WEIGHTS, _INDEX, "model-*.safetensors"]
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CheckpointWeights:
    """
    The weights of linear layers of a saved model, to be used as a context manager.

    The files' names of weights may differ from those of the modules (with or without "model." in front, or as an older
    Transformers wrote them): they are found by the rules by which Transformers loads the files.

    Args:
        source: A folder, or a hub repository ("organization/name", with "@revision" or without), with
            `model.safetensors`, in one or several files.
        like: A model of the same architecture, whose modules are meant; it may carry adapters or be quantized. None:
            the causal language model that the checkpoint's own configuration describes.
        option: What the user calls the model, for messages.
        trust_remote_code: Run the repository's own model code.

    Raises:
        FileNotFoundError: There is no such model, or a file of it is missing.
        ValueError: It is not saved as safetensors, is quantized, or cannot be read.

    Example:

        >>> with CheckpointWeights("organization/base-model") as weights:
        ...     weights.weight("model.layers.0.self_attn.q_proj")
    """

    def __init__(
        self,
        source: str | os.PathLike,
        *,
        like: nn.Module | None = None,
        option: str = "model",
        trust_remote_code: bool = False,
    ) -> None:
        self.source = os.fspath(source)
        self.option = option
        wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
        folder = Path(source) if os.path.isdir(source) else hub_folder(self.source, wanted, option=option)
        files = self._files(folder)
        self._model = self._skeleton(folder, like, trust_remote_code)
        self._open = ExitStack()
        try:
            opened = [self._opened(file) for file in files]
            self._keys = self._by_parameter(opened)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        """Whether a module of this name has a weight here."""
        return self._key(name) in self._keys

    def weight(self, name: str) -> Tensor:
        """
        The weight of the linear layer `name`, (d_out, d_in) float32 on the CPU.

        Raises:
            ValueError: There is none, or it has another shape or kind than such a layer's.
        """
        return self.stored(name).float()

    def stored(self, name: str) -> Tensor:
        """The same in the dtype of the files."""
        file, key = self._place(name)
        try:
            stored = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self._told}: {key} cannot be read, the file is perhaps cut short ({error}).") from error
        if stored.dtype not in _FLOATS:
            raise ValueError(
                f"{self._told}: the weight of {name!r} is stored as {str(stored.dtype).removeprefix('torch.')}, so the "
                "model is quantized. Give it as it was before that."
            )
        expected = self._parameter(name)
        if stored.shape != expected.shape:
            raise ValueError(
                f"{self._told}: the weight of {name!r} is stored with shape {tuple(stored.shape)}, and the layer has "
                f"{tuple(expected.shape)}. Give a model of the same architecture and size."
            )
        return stored.T if isinstance(self._model.get_submodule(name), Conv1D) else stored

    def _place(self, name: str) -> tuple[Any, str]:
        try:
            self._parameter(name)
        except AttributeError as error:
            raise ValueError(
                f"{self._told}: it has no linear layer {name!r}. Give a model of the same architecture."
            ) from error
        if self._key(name) in self._keys:
            return self._keys[self._key(name)]
        raise ValueError(
            f"{self._told}: its files have no weight that is that of {name!r} alone: they are not complete, or keep it "
            "together with others. Load the model and save it again, or leave the module out."
        )

    def _key(self, name: str) -> str:
        """Name of a module's weight, or of the one that it is tied to where only that is stored."""
        key = f"{name}.weight"
        if key not in self._keys and getattr(self._model.config, "tie_word_embeddings", False):
            modules = dict(self._model.named_modules())
            head, embeddings = output_embeddings(self._model), input_embeddings(self._model)
            if head is not None and modules.get(name) is head:
                return next((f"{other}.weight" for other, module in modules.items() if module is embeddings), key)
        return key

    def _parameter(self, name: str) -> Tensor:
        """
        Raises:
            AttributeError: The model has no such module, or it has no weight of two dimensions.
        """
        weight = self._model.get_submodule(name).weight
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise AttributeError(f"{name} is not linear")
        return weight

    @property
    def _told(self) -> str:
        return f"{self.option}={self.source!r}"

    def _files(self, folder: Path) -> list[Path]:
        if (folder / _WEIGHTS).is_file():
            return [folder / _WEIGHTS]
        if not (folder / _INDEX).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            told = "holds pickled weights only, which are not read" if pickled else f"has no {_WEIGHTS}"
            raise FileNotFoundError(
                f"{self._told}: {folder} {told}. Give a model that is saved as safetensors (load it and call "
                "save_pretrained)."
            )
        places = read_json_object(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{folder / _INDEX} names no weights. Save the model again.")
        files = [folder / Path(name).name for name in sorted(set(map(str, places.values())))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{self._told}: {folder} has no {missing[0]}, which its {_INDEX} names.")
        return files

    def _skeleton(self, folder: Path, like: nn.Module | None, trust_remote_code: bool) -> PreTrainedModel:
        """The model without its weights: what its modules are called, and of which kinds they are."""
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{self._told}: {folder} has no config.json, so it is not a saved model.")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{self._told} is quantized. Give the model as it was before it was quantized.")
        with torch.device("meta"):
            like = like.get_base_model() if isinstance(like, PeftModel) else like
            if isinstance(like, PreTrainedModel):
                return type(like)(_without_quantization(like.config))
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    def _opened(self, file: Path) -> Any:
        try:
            return self._open.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file, perhaps cut short ({error}).") from error

    def _by_parameter(self, files: list[Any]) -> dict[str, tuple[Any, str]]:
        """Name of a parameter of the model -> the file that holds it, and its key there."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, expected = self._model.base_model_prefix, self._model.state_dict()
        found: dict[str, tuple[Any, str]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                renamed, converter = rename_source_key(key, renamings, converters, prefix, expected)
                if renamed not in expected and key in expected:
                    renamed, converter = key, None
                if converter is None:  # otherwise made from several, or a part
                    found.setdefault(renamed, (file, key))
        return found


class LoadedWeights:
    """The same of a model that is in memory, without its adapters; quantized weights are dequantized."""

    def __init__(self, model: nn.Module, *, option: str = "model") -> None:
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._option = option

    def stored(self, name: str) -> Tensor:
        """The weight of the linear layer `name`, (d_out, d_in) in the dtype that it has, on the CPU."""
        try:
            layer = self._model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{self._option}: {type(self._model).__name__} has no layer {name!r}. Give a model of the same "
                "architecture."
            ) from error
        with linear_weight(layer) as weight:
            return weight.detach().to("cpu", copy=True)


WeightSource = CheckpointWeights | LoadedWeights


@contextmanager
def opened_weights(
    source: str | os.PathLike | nn.Module, *, option: str, trust_remote_code: bool = False
) -> Iterator[WeightSource]:
    """The weights of a model that is given as in `CheckpointWeights`, or itself."""
    if isinstance(source, nn.Module):
        yield LoadedWeights(source, option=option)
        return
    with CheckpointWeights(source, option=option, trust_remote_code=trust_remote_code) as weights:
        yield weights


def weight_delta(minuend: WeightSource, subtrahend: WeightSource, name: str) -> Tensor | None:
    """
    The difference of two models' weights of one layer, (d_out, d_in) float64; None where it is zero, or no more than
    the rounding of the one that is kept in the coarser dtype.

    Raises:
        ValueError: One of them has no such layer, or they are of different shapes, or not finite.
    """
    first, second = minuend.stored(name), subtrahend.stored(name)
    if first.shape != second.shape:
        raise ValueError(
            f"The weight of {name!r} has the shape {tuple(first.shape)} in one model and {tuple(second.shape)} in the "
            "other. Give two models of the same architecture and size."
        )
    coarser = max(first.dtype, second.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(first.to(coarser), second.to(coarser)):
        return None
    delta = first.double() - second.double()
    if not torch.isfinite(delta).all():
        raise ValueError(f"The weight of {name!r} contains NaN or infinity in one of the two models.")
    return delta


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
