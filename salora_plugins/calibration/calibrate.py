"""From a model and safety data to a safety module."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import SaLoRAConfig
from ..distributed import broadcast_from_first_rank
from ..layers import (
    adapters_disabled,
    base_layer,
    check_ranks,
    check_weights,
    target_module_names,
    weight_samples,
)
from ..plugins import basis_methods, judges
from ..safety_module import SafetyModule
from .batching import batches
from .capture import CalibrationError, collect_statistics, evaluation_mode, on_accelerator
from .data import (
    MAX_ROWS,
    Example,
    TokenizedExample,
    data_digest,
    load_examples,
    select_examples,
    tokenize_examples,
)
from .responses import add_own_refusals
from .statistics import ModuleStatistics

logger = logging.getLogger(__name__)


def calibrate(model: nn.Module, tokenizer: Any = None, **options: Any) -> SafetyModule:
    """
    Compute the safety module of a model: U_C per target layer (SaLoRA, section 4.1), and V_C with an input side.

    Args:
        model: The aligned model; a [`~peft.PeftModel`] is calibrated with its adapters disabled. It is put back as it
            was: device, training mode, gradient checkpointing, hooks.
        tokenizer: Its tokenizer. None loads the one in the model's own folder or repository, where data needs one.
        options: As in [`SaLoRAConfig`]: safety_data, target_modules, safety_rank, input_safety_rank,
            safety_positions, basis_method, num_safety_samples, calibration_batch_size, ...

    Returns:
        The safety module, its tensors on the CPU.

    Raises:
        CalibrationError: The model refuses too little, a layer is not used, or values are not finite.
        DataError: The safety data cannot be read.
        ValueError: An option contradicts the model.

    Example:

        >>> calibrate(model, tokenizer, target_modules=["q_proj", "v_proj"]).save("llama.salora.safetensors")
    """
    return calibrate_with(model, SaLoRAConfig(**options, tokenizer=tokenizer))


def calibrate_with(model: nn.Module, config: SaLoRAConfig) -> SafetyModule:
    """`calibrate` with the options of a configuration; under torch.distributed every rank ends with the same bits."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    names = target_module_names(model, config)
    check_ranks(model, names, config.safety_rank, config.input_safety_rank)
    method = _registered("basis_method", config.basis_method, basis_methods())
    check_weights(model, names)
    with adapters_disabled(model), on_accelerator(model), evaluation_mode(model):
        examples, counts = _safety_examples(model, config)
        statistics = collect_statistics(
            model,
            {name: base_layer(model.get_submodule(name)) for name in names},
            batches(examples, config.calibration_batch_size, pad_token_id=_pad_token_id(config.tokenizer)),
            positions=config.resolved_safety_positions,
            with_inputs=config.input_safety_rank > 0,
            description="calibrating the safety module",
        )
    bases, singular_values = _bases(statistics, config.safety_rank, "output", method, config)
    input_bases, input_singular_values = {}, {}
    if config.input_safety_rank:
        input_bases, input_singular_values = _bases(statistics, config.input_safety_rank, "input", method, config)
    safety_module = SafetyModule(
        bases=bases,
        input_bases=input_bases,
        singular_values=singular_values,
        input_singular_values=input_singular_values,
        weight_samples=weight_samples(model, names),
        provenance={
            "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
            "safety_data": config.to_dict()["safety_data"],
            "safety_data_sha256": data_digest(examples),
            "safety_samples": len(examples),
            "safety_positions": config.resolved_safety_positions,
            "positions_counted": next(iter(statistics.values())).output.count,
            **counts,
            "safety_rank": config.safety_rank,
            "input_safety_rank": config.input_safety_rank,
            "basis_method": config.basis_method,
            "seed": config.seed,
            "captured_energy": {
                name: _share(values, statistics[name].output.energy) for name, values in singular_values.items()
            },
            "captured_input_energy": {
                name: _share(values, statistics[name].input.energy) for name, values in input_singular_values.items()
            },
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("salora-plugins", "torch", "transformers", "peft")},
            },
        },
    )
    broadcast_from_first_rank([*bases.values(), *input_bases.values()])
    return safety_module


def task_bases(model: nn.Module, config: SaLoRAConfig, rows: Any = None) -> dict[str, Tensor]:
    """
    U_T of every target layer: the top left singular vectors of W X_t on task data (SaLoRA, section 4.2).

    Args:
        model: The base model, with or without adapters.
        config: task_data, task_rank, num_task_samples, target_modules, ... are used.
        rows: Task data to use instead of `config.task_data`.

    Returns:
        Module name -> (d_out, r_t) float32, on the device of the layer; fewer columns where the data has fewer
        positions.
    """
    names = target_module_names(model, config)
    source = config.task_data if rows is None else rows
    examples = load_examples(source, option="task_data", max_rows=max(MAX_ROWS, config.num_task_samples))
    examples = select_examples(examples, config.num_task_samples, config.seed)
    with adapters_disabled(model), on_accelerator(model), evaluation_mode(model):
        examples = _tokenized(model, config, examples, "task_data")
        statistics = collect_statistics(
            model,
            {name: base_layer(model.get_submodule(name)) for name in names},
            batches(examples, config.calibration_batch_size, pad_token_id=_pad_token_id(config.tokenizer)),
            description="calibrating the task initialization",
        )
    bases = {name: task_basis(entry, config.task_rank) for name, entry in statistics.items()}
    broadcast_from_first_rank(list(bases.values()))
    return bases


def task_basis(statistics: ModuleStatistics, task_rank: int) -> Tensor:
    """U_T (d_out, r_t) of one layer, r_t being cut to the number of positions and outputs there are."""
    rows = statistics.output
    if rows.count == 0:
        raise CalibrationError("task_data: no response token in the data, so there is nothing to initialize from.")
    return rows.top(min(task_rank, rows.count, rows.dimension))[0]


def _safety_examples(model: nn.Module, config: SaLoRAConfig) -> tuple[list[TokenizedExample], dict[str, int]]:
    examples = load_examples(
        config.safety_data,
        option="safety_data",
        allow_missing_response=True,
        max_rows=max(MAX_ROWS, config.num_safety_samples),
    )
    examples = select_examples(examples, len(examples), config.seed)
    counts: dict[str, int] = {}
    if any(isinstance(example, Example) and example.response is None for example in examples):
        judge = _registered("judge", "keyword", judges())
        examples, counts = add_own_refusals(
            model,
            _tokenizer(model, config, "safety_data"),
            examples,
            config.num_safety_samples,
            is_refusal=judge,
            batch_size=max(config.calibration_batch_size, 16),
            max_length=config.calibration_max_length,
        )
    else:
        examples = examples[: config.num_safety_samples]
    return _tokenized(model, config, examples, "safety_data"), counts


def _tokenized(
    model: nn.Module, config: SaLoRAConfig, examples: Sequence[Example | TokenizedExample], option: str
) -> list[TokenizedExample]:
    needs_tokenizer = any(isinstance(example, Example) for example in examples)
    tokenizer = _tokenizer(model, config, option) if needs_tokenizer else config.tokenizer
    return tokenize_examples(examples, tokenizer, max_length=config.calibration_max_length, option=option)


def _tokenizer(model: nn.Module, config: SaLoRAConfig, option: str) -> Any:
    if config.tokenizer is None:
        from transformers import AutoTokenizer

        source = getattr(getattr(model, "config", None), "_name_or_path", "")
        try:
            if not source:
                raise ValueError("the model has no name or path")
            config.tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise CalibrationError(
                f"{option} holds text, and no tokenizer was found for the model ({error}). Pass "
                "SaLoRAConfig(tokenizer=...), or rows with input_ids and labels."
            ) from error
    return config.tokenizer


def _pad_token_id(tokenizer: Any) -> int:
    """Padding is masked, so that any id will do where there is no tokenizer or it has none."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def _bases(
    statistics: dict[str, ModuleStatistics], rank: int, side: str, method: Any, config: SaLoRAConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    option = "safety_rank" if side == "output" else "input_safety_rank"
    bases, singular_values = {}, {}
    for name, entry in statistics.items():
        count = getattr(entry, side).count
        if count < rank:
            raise CalibrationError(
                f"{option}={rank}, but the safety data has only {count} positions to find directions in. Give more "
                f"safety data (num_safety_samples, safety_data), or lower {option}."
            )
        basis, values = method(entry, rank, side)
        bases[name] = _checked_basis(basis, getattr(entry, side).dimension, rank, name, config.basis_method)
        singular_values[name] = values.float().cpu()
    return bases, singular_values


def _checked_basis(basis: Tensor, dimension: int, rank: int, name: str, method: str) -> Tensor:
    if basis.shape != (dimension, rank):
        raise CalibrationError(
            f"basis_method={method!r} returned shape {tuple(basis.shape)} for {name!r}; expected {(dimension, rank)}."
        )
    error = (basis.T.double() @ basis.double() - torch.eye(rank, dtype=torch.float64, device=basis.device)).abs().max()
    if not error < 1e-4:
        raise CalibrationError(
            f"basis_method={method!r} returned a basis for {name!r} whose columns are not orthonormal."
        )
    return basis.float().cpu().contiguous()


def _registered(option: str, name: str, registered: dict[str, Any]) -> Any:
    if name not in registered:
        raise ValueError(f"{option}={name!r} is not registered. Choose one of {', '.join(sorted(registered))}.")
    return registered[name]


def _share(singular_values: Tensor, energy: float) -> float:
    """The part of the data's energy that the basis captures, from 0 to 1."""
    return singular_values.double().square().sum().item() / energy if energy else 0.0
