"""Whether a model and its tokenizer can be calibrated, without its weights: they stay on the meta device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import is_offline_mode
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..activations.errors import CalibrationError
from ..calibration.rows import safety_rows
from ..calibration.settings import checked_ranks, safety_row_settings, statistics_bytes
from ..config import SaLoRAConfig
from ..models.embeddings import output_embeddings, vocabulary_size
from ..models.loading import NO_PICKLES, LoadingOptions, folder_or_name, load_tokenizer
from ..ranks import SideRanks
from ..rows.examples import RenderedRequest
from ..rows.rendering import has_template
from ..support.files import read_json_object
from ..support.memory import ROOM, accelerator_memory, free_memory
from ..support.numbers import size
from .findings import Finding

AREA = "Model"

# Quantizers whose weights can be read and trained through; see docs/quantized.md.
_READABLE = ("bitsandbytes", "torchao")
# Those that transformers can undo while it loads.
_UNDONE = {"mxfp4": "Mxfp4Config(dequantize=True)", "fp8": "FineGrainedFP8Config(dequantize=True)"}


def examine_model(source: str, config: SaLoRAConfig, loading: LoadingOptions) -> list[Finding]:
    """
    Whether `salora calibrate` would work on a model: its architecture and target modules, weights, tokenizer, chat
    template, safety data, and the memory. No weights are read, and none are downloaded.

    Args:
        source: Folder or hub repository.
        config: The options of the calibration.
        loading: How the model would be loaded.
    """
    try:
        source = folder_or_name(source)
        of_model = AutoConfig.from_pretrained(
            source, revision=loading.revision, trust_remote_code=loading.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        remedy = "Check the name"
        if is_offline_mode() and not Path(source).is_dir():
            remedy += "; HF_HUB_OFFLINE is set, so that nothing is downloaded: unset it"
        text = str(error)
        return [
            Finding(AREA, "configuration", text if text.startswith(source) else f"{source}: {text}", "problem", remedy)
        ]
    found = [_quantization(of_model)]
    try:
        model = _without_weights(of_model, loading)
        found.append(Finding(AREA, "architecture", type(model).__name__))
        ranks = checked_ranks(model, config)
    except (ValueError, OSError, ImportError) as error:
        return [*found, Finding(AREA, "targets", str(error), "problem")]
    weights, stored = _weights(source, loading)
    found += [_targets(ranks), weights, *_tokenizer(source, model, config, loading)]
    if stored is None or loading.dtype != "auto" or loading.load_in_4bit or loading.load_in_8bit:
        stored = _bytes_of_weights(model, loading)
    found.append(_memory(stored, statistics_bytes(model, config, ranks), loading))
    return found


def _without_weights(of_model: Any, loading: LoadingOptions) -> nn.Module:
    dtype = of_model.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(
            of_model, dtype=dtype or torch.float32, trust_remote_code=loading.trust_remote_code
        ).eval()


def _quantization(of_model: Any) -> Finding:
    of_weights = getattr(of_model, "quantization_config", None)
    if of_weights is None:
        return Finding(AREA, "quantization", "the checkpoint is not quantized")
    get = of_weights.get if isinstance(of_weights, dict) else lambda name: getattr(of_weights, name, None)
    method = str(getattr(get("quant_method"), "value", get("quant_method")))
    if method in _READABLE:
        return Finding(AREA, "quantization", f"{method}, which can be read")
    if method in _UNDONE:
        return Finding(
            AREA,
            "quantization",
            f"{method}, whose weights cannot be read as numbers",
            "problem",
            f"Dequantize it as it is loaded: quantization_config={_UNDONE[method]}; in Axolotl "
            "model_quantization_config_kwargs: {dequantize: true}",
        )
    return Finding(
        AREA,
        "quantization",
        f"{method}, whose weights cannot be read as numbers",
        "problem",
        "Take the model as it was before; load_in_4bit or load_in_8bit quantize it while it is loaded",
    )


def _targets(ranks: SideRanks) -> Finding:
    kinds = Counter(name.rpartition(".")[2] for name in ranks["output"])
    text = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    sides = "outputs and inputs" if "input" in ranks else "outputs only"
    return Finding(AREA, "target modules", f"{len(ranks['output'])} linear layers ({text}), {sides}")


def _weights(source: str, loading: LoadingOptions) -> tuple[Finding, int | None]:
    """Whether all files are here or can be downloaded, and their bytes, if they are; none is opened but the index."""
    folder = Path(source) if Path(source).is_dir() else _downloaded(source, loading)
    if folder is None:
        return _still_to_download("the weights", source), None
    index, only = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if only.is_file():  # which transformers takes first
        files = [only]
    elif index.is_file():
        files = [folder / name for name in sorted(set(read_json_object(index)["weight_map"].values()))]
    else:
        text = f"{folder} has neither {only.name} nor {index.name}"
        return Finding(AREA, "weights", text, "problem", NO_PICKLES), None
    missing = [file.name for file in files if not file.is_file()]
    if missing and Path(source).is_dir():
        text = f"{len(missing)} of {len(files)} files are missing ({missing[0]})"
        return Finding(AREA, "weights", text, "problem", "Copy the whole folder"), None
    if missing:
        return _still_to_download(f"{len(missing)} of {len(files)} files", source), None
    stored = sum(file.stat().st_size for file in files)
    return Finding(AREA, "weights", f"{len(files)} file{'s' if len(files) > 1 else ''}, {size(stored)}"), stored


def _still_to_download(what: str, source: str) -> Finding:
    """Of a hub repository; nothing comes where the hub is not to be asked."""
    if is_offline_mode():
        text = f"{what} are not on this machine, and HF_HUB_OFFLINE is set, so that nothing is downloaded"
        return Finding(AREA, "weights", text, "problem", f"Unset HF_HUB_OFFLINE, then: hf download {source}")
    text = f"{what} are still to download, which is done when the model is loaded"
    return Finding(AREA, "weights", text, "ok", f"Beforehand: hf download {source}")


def _downloaded(source: str, loading: LoadingOptions) -> Path | None:
    """The folder of a hub repository's weights in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
        found = try_to_load_from_cache(source, name, revision=loading.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _tokenizer(source: str, model: nn.Module, config: SaLoRAConfig, loading: LoadingOptions) -> Iterator[Finding]:
    """The tokenizer, its chat template, and the safety data rendered with it."""
    tokenizer = load_tokenizer(source, loading)
    if tokenizer is None:
        yield Finding(
            AREA,
            "tokenizer",
            f"{source} has none",
            "problem",
            "Save one there (tokenizer.save_pretrained), or pass SaLoRAConfig(tokenizer=...)",
        )
        return
    embeddings = vocabulary_size(model)
    yield Finding(
        AREA, "tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens; the model knows {embeddings}"
    )
    if has_template(tokenizer):
        yield Finding(AREA, "chat template", "there")
    else:
        yield Finding(
            AREA,
            "chat template",
            "none: requests are plain text, as for a base model, which refuses little",
            "warning",
            "Take the instruction-tuned model, or set tokenizer.chat_template",
        )
    given = safety_row_settings(model, config)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = safety_rows(replace(given, tokenizer=tokenizer)).rows
    except (CalibrationError, ValueError, OSError, ImportError) as error:
        yield Finding(AREA, "safety data", str(error), "problem")
        return
    requests = [row for row in rows if isinstance(row, RenderedRequest)]
    longest = max(len(row.prompt_ids if isinstance(row, RenderedRequest) else row.input_ids) for row in rows)
    text = f"{len(rows)} rows rendered, of up to {longest} tokens"
    if requests:
        text += f"; {len(requests)} of them are requests that the model is asked, and kept where it refuses"
    yield Finding(AREA, "safety data", text)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            yield Finding(AREA, "safety data", str(warning.message), "warning")


def _memory(weights: int, statistics: int, loading: LoadingOptions) -> Finding:
    """Weights with room for activations, and statistics, beside what there is."""
    needed = ROOM * weights + statistics
    of_cpu = free_memory()
    places = {name: free for name, (free, _) in accelerator_memory().items()} | {"the CPU": of_cpu}
    there = ", ".join(f"{size(free)} on {name}" for name, free in places.items())
    text = f"calibration needs about {size(needed)} ({size(weights)} of weights); free are {there}"
    if any(needed <= free for free in places.values()):
        through_cpu = loading.device_map is None and not (loading.load_in_4bit or loading.load_in_8bit)
        if through_cpu and weights > of_cpu:
            text += "; without a device map the weights are loaded to the CPU first, which has too little"
            return Finding(AREA, "memory", text, "warning", "Load them to where they fit: --device-map auto")
        return Finding(AREA, "memory", text)
    if needed <= sum(places.values()):
        return Finding(AREA, "memory", text, "warning", "Split it over what there is: --device-map auto")
    remedy = "Quantize it (--load-in-4bit), or run salora calibrate on a larger machine and copy the result"
    return Finding(AREA, "memory", text, "problem", remedy)


def _bytes_of_weights(model: nn.Module, loading: LoadingOptions) -> int:
    """Of a model on the meta device, quantized if it would be."""
    total = float(sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())))
    if loading.load_in_4bit or loading.load_in_8bit:
        of_a_number = 0.55 if loading.load_in_4bit else 1.05  # with the scales
        head = output_embeddings(model)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:  # which bitsandbytes leaves as it is
                total -= module.weight.numel() * (module.weight.element_size() - of_a_number)
    return int(total)
