"""The models of an evaluation: what they are, and loading them one at a time."""

from __future__ import annotations

import gc
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.saved import ADAPTER_CONFIG_FILE, WEIGHTS_FILE, SavedAdapter, check_plain_lora, without_file
from ..models.loading import LoadingOptions, check_whole_model, load_model, load_tokenizer
from ..models.weights import layer_features
from ..safety_module import DEFAULT_FILE, SafetyModule
from ..support.hub import hub_file, hub_folder, is_hub_id, is_model_name
from ..support.texts import one_line
from .reports.report import ModelKind

BASE = "base"
"""The base model's name in a report."""

_NAME = re.compile(r"\w[\w .,+=@()-]*")
_SAMPLES, _SAMPLE_BYTES = 64, 65_536


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated."""

    name: str
    kind: ModelKind
    source: str
    """Folder or hub repository."""
    folder: str
    """Where an adapter lies on this machine; for other models, the source."""
    digest: str
    """Of its content."""

    @cached_property
    def has_safety_module(self) -> bool:
        """Whether it is an adapter with a safety module beside it, and not with the directions that SAILS starts in."""
        file = Path(self.folder) / DEFAULT_FILE
        return self.kind == "adapter" and file.is_file() and SafetyModule.load(file).protects

    @property
    def is_plain_lora(self) -> bool:
        """Whether it is an adapter that changes nothing of the base model when it is loaded and taken off."""
        saved = SavedAdapter.load(self.folder)
        try:
            check_plain_lora(saved, Path(self.folder), purpose="taken off")
        except ValueError:
            return False
        return not saved.other_tensors  # copies of whole modules


def find_models(
    base_model: str,
    adapters: Mapping[str, str | os.PathLike],
    models: Mapping[str, str | os.PathLike],
    revision: str | None,
) -> list[EvaluatedModel]:
    """
    The base model, the adapters and the other models, in this order. No weights are loaded.

    Args:
        base_model: Folder or hub repository.
        adapters: Name -> folder or hub repository.
        models: The same for whole models.
        revision: Of the base model's repository.

    Raises:
        FileNotFoundError: One does not exist or is not what it should be.
        ValueError: A name cannot be that of a file, or is given twice.
    """
    names = [BASE, *adapters, *models]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a file. Give the model another name (NAME=PATH): letters, digits, "
                "spaces and _.,+=@()-."
            )
        # Some file systems do not tell a from A.
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise ValueError(f"{name!r} names two models; {BASE!r} is the base model's name. Choose other names.")
    return [
        _model(BASE, "base", base_model, revision),
        *(_adapter(name, str(source)) for name, source in adapters.items()),
        *(_model(name, "model", str(source), None) for name, source in models.items()),
    ]


def check_vocabularies(tokenizer: Any, models: Sequence[EvaluatedModel], loading: LoadingOptions) -> None:
    """
    Args:
        tokenizer: The base model's.
        models: Those to check, among others.
        loading: How they are loaded.

    Raises:
        ValueError: A model has a tokenizer with another vocabulary than the base model's.
    """
    vocabulary = tokenizer.get_vocab()
    for evaluated in models:
        if evaluated.kind == "model":
            own = load_tokenizer(evaluated.source, loading.without_revision())
            if own is not None and own.get_vocab() != vocabulary:
                raise ValueError(
                    f"{evaluated.name}={evaluated.source}: its tokenizer has another vocabulary than the base "
                    "model's, so that no KL divergence can be computed. Evaluate it as a base model of its own."
                )


def check_fits(evaluated: EvaluatedModel, base: nn.Module) -> None:
    """
    Args:
        evaluated: An adapter.
        base: The base model, in memory.

    Raises:
        ValueError: It is of a model whose layers have other sizes, as PEFT says in many lines, and only once it is its
            turn.
    """
    modules = dict(base.named_modules())
    for name, (a, b) in SavedAdapter.load(evaluated.folder).factors.items():
        module = modules.get(name)
        if a.ndim != 2 or not isinstance(module, (nn.Linear, Conv1D)):
            continue  # PEFT knows other names and kinds of layers
        d_in, d_out = layer_features(module)
        if (a.shape[1], b.shape[0]) != (d_in, d_out):
            raise ValueError(
                f"{evaluated.name}={evaluated.source}: its update of {name!r} is for {a.shape[1]} inputs and "
                f"{b.shape[0]} outputs, and the base model's layer has {d_in} and {d_out}. Name the base model that "
                "the adapter was trained on."
            )


class ModelLoader(Protocol):
    """Where the models of an evaluation come from, one at a time."""

    @property
    def base(self) -> nn.Module:
        """The base model, as it is."""

    def loaded(self, evaluated: EvaluatedModel) -> AbstractContextManager[nn.Module]:
        """A model, as long as the block lasts."""

    def release(self) -> None:
        """Keep nothing any more that was only needed to load models."""


class Loader:
    """
    Keeps one model of those on disk in memory.

    Args:
        base: The base model.
        options: How the models are loaded; the revision is the base model's.
    """

    def __init__(self, base: EvaluatedModel, options: LoadingOptions) -> None:
        self._base, self._options = base, options
        self._loaded: tuple[EvaluatedModel, nn.Module] | None = None

    @property
    def base(self) -> nn.Module:
        """The base model, without an adapter."""
        return self._model(self._base)

    @contextmanager
    def loaded(self, evaluated: EvaluatedModel) -> Iterator[nn.Module]:
        """
        A model; an adapter on the base model, to be taken off again.

        Raises:
            ValueError: An adapter does not fit the base model.
        """
        if evaluated.kind != "adapter":
            yield self._model(evaluated)
            return
        clean = False
        try:
            model = self._with_adapter(evaluated)
            yield model
            if evaluated.is_plain_lora:
                model.unload()
                clean = True
            del model  # else it would stay in memory here
        finally:
            if not clean:
                self.release()

    def _with_adapter(self, evaluated: EvaluatedModel) -> PeftModel:
        base = self.base
        try:
            return PeftModel.from_pretrained(base, evaluated.folder).eval()
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{evaluated.name}={evaluated.source}: PEFT cannot load it on the base model {self._base.source}: "
                f"{one_line(error)}"
            ) from error

    def _model(self, evaluated: EvaluatedModel) -> nn.Module:
        if self._loaded is None or self._loaded[0] != evaluated:
            self.release()
            options = self._options if evaluated.kind == "base" else self._options.without_revision()
            self._loaded = evaluated, load_model(evaluated.source, options)
        return self._loaded[1]

    def release(self) -> None:
        """Take the model out of memory."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _adapter(name: str, source: str) -> EvaluatedModel:
    folder = Path(source).expanduser()
    if not folder.is_dir() and is_hub_id(source):
        folder = hub_folder(source, [ADAPTER_CONFIG_FILE, WEIGHTS_FILE, DEFAULT_FILE], option=name)
    digest = hashlib.sha256()
    for file in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"Adapter {name!r}: {without_file(folder, file)}")
        with open(folder / file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return EvaluatedModel(name, "adapter", source, str(folder), digest.hexdigest())


def _model(name: str, kind: ModelKind, source: str, revision: str | None) -> EvaluatedModel:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return EvaluatedModel(name, kind, str(folder), str(folder), _folder_digest(folder))
    if folder.is_file() or (not is_hub_id(source) and not is_model_name(source)):
        found = "this is a file" if folder.is_file() else "there is no such folder"
        raise FileNotFoundError(f"{name}={source}: {found}. Give a model's folder or hub repository.")
    config = hub_file(source if revision is None else f"{source}@{revision}", "config.json", option=name)
    # The hub's cache names the folder by the commit.
    return EvaluatedModel(name, kind, source, source, config.parent.name)


def _folder_digest(folder: Path) -> str:
    """SHA-256 of a model's configuration and of samples of its weights, since these may have hundreds of GB."""
    check_whole_model(str(folder))
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if not (folder / "config.json").is_file() or not weights:
        raise FileNotFoundError(f"{folder}: a model's folder holds config.json and weights; this one does not.")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
