"""From a model and safety data to a safety module."""

from __future__ import annotations

import copy
import dataclasses
import logging
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..activations.capture import CalibrationError, collect_statistics, statistics_dimensions
from ..activations.statistics import Engine, ModuleStatistics, choose_engine
from ..config import SaLoRAConfig
from ..inference.greedy import end_tokens
from ..inspection import facts
from ..models.fingerprint import check_belongs, model_fingerprint, weight_samples
from ..models.running import adapters_disabled, evaluation_mode, on_accelerator
from ..models.targets import (
    check_ranks,
    check_reached_by_text,
    default_input_ranks,
    say_what_is_left_out,
    target_module_names,
)
from ..models.weights import base_layer, check_reachable, check_weights, unreachable_weight
from ..plugins import basis_methods, judges
from ..provenance import Provenance
from ..ranks import Side, SideRanks, matching_patterns, of_side
from ..rows.batching import batches, vocabulary_size
from ..rows.examples import IGNORED, Example, TokenizedExample, data_digest, select_examples
from ..rows.reading import MAX_ROWS, load_examples
from ..rows.rendering import has_template, template_digest, tokenizer_of, trainer_tokenizer
from ..rows.tokenizing import render_prompt, tokenize_examples
from ..safety_module import SafetyModule, SideBases
from ..support.distributed import broadcast, rank_and_world_size
from ..support.notices import tell
from .basis import Basis, compute_bases
from .cache import cache_key, load_cached, store
from .refusals import add_own_refusals

logger = logging.getLogger(__name__)

SHARE_DIRECTIONS = 256
"""How many directions a sketch must be good for where ranks are shares of the energy, and so not known before."""


def calibrate(model: nn.Module, tokenizer: Any = None, **options: Any) -> SafetyModule:
    """
    Compute the safety module of a model: U_C per target layer (SaLoRA, section 4.1), and V_C with an input side.

    Args:
        model: The aligned model; a [`~peft.PeftModel`] is calibrated with its adapters disabled. It is put back as it
            was: device, training mode, gradient checkpointing, hooks.
        tokenizer: Its tokenizer. None loads the one in the model's own folder or repository, where data needs one.
        options: As in [`SaLoRAConfig`]: safety_data, target_modules, safety_rank, input_safety_rank,
            safety_positions, basis_method, num_safety_samples, calibration_batch_size, calibration_engine, ...

    Returns:
        The safety module, its tensors on the CPU.

    Raises:
        CalibrationError: The model refuses too little, a layer is not used, or values are not finite.
        DataError: The safety data cannot be read.
        ValueError: An option contradicts the model.

    Example:

        >>> calibrate(model, tokenizer, target_modules=["q_proj", "v_proj"]).save("llama.salora.safetensors")
    """
    config = SaLoRAConfig(**options, tokenizer=tokenizer)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    say_what_is_left_out(model, config)
    return calibrate_with(model, config)


def calibrate_with(model: nn.Module, config: SaLoRAConfig) -> SafetyModule:
    """
    `calibrate` with the options of a configuration.

    Under torch.distributed, where every rank must call it, each takes its share of the samples, and all end with the
    same bits.
    """
    config = copy.copy(config)  # a tokenizer that is found is kept in it
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    names = target_module_names(model, config)
    default_ranks = default_input_ranks(model, names)
    ranks = config.safety_ranks(default_ranks)
    check_ranks(model, ranks)
    check_reached_by_text(model, names)
    method = _registered("basis_method", config.basis_method, basis_methods())
    check_reachable(model, names)
    layers = {name: base_layer(model.get_submodule(name)) for name in names}
    engine = _engine(model, layers, config, ranks)
    with adapters_disabled(model):
        requests = _selected(model, config)
        key = _cache_key(model, config, requests, ranks, engine)
        if key is not None and (cached := load_cached(key, partial(_check_asked_for, model, names, ranks))) is not None:
            tell(logger, "%s; from the cache (calibration_cache=False calibrates again).", facts(cached.provenance))
            return cached
        start = time.monotonic()
        with on_accelerator(model), evaluation_mode(model):
            check_weights(model, names)
            examples, counts = _with_responses(model, config, requests)
            statistics = collect_statistics(
                model,
                layers,
                _batches(examples, config),
                engine,
                positions=config.resolved_safety_positions,
                with_inputs="input" in ranks,
                description="calibrating the safety module",
            )
            positions_counted = statistics[names[0]].output.count
            if not positions_counted:
                raise CalibrationError(
                    f"safety_positions={config.resolved_safety_positions!r}: the safety data has no such position. In "
                    "tokenized rows, labels must be -100 on the tokens of the prompt and the tokens' ids on those of "
                    "the response; or choose other safety_positions."
                )
            energies = {
                side: {name: getattr(entry, side).energy for name, entry in statistics.items()} for side in ranks
            }
            bases = compute_bases(statistics, ranks, method, config.basis_method, _defaults(config, names))
    safety_module = SafetyModule(
        sides={
            side: SideBases(
                {name: basis.vectors for name, basis in of.items()},
                {name: basis.singular_values for name, basis in of.items()},
                energies[side],
            )
            for side, of in bases.items()
        },
        weight_samples=weight_samples(model, names),
        provenance=Provenance.of(
            {
                "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
                "safety_data": config.to_dict()["safety_data"],
                "safety_data_sha256": data_digest(examples),
                "safety_samples": len(examples),
                "safety_positions": config.resolved_safety_positions,
                "positions_counted": positions_counted,
                **counts,
                **_tokenizer_facts(config.tokenizer),
                "modules": len(names),
                "directions": {
                    side: _extent(basis.vectors.shape[1] for basis in of.values()) for side, of in bases.items()
                },
                "safety_rank": config.safety_rank,
                "safety_rank_pattern": dict(config.safety_rank_pattern),
                "input_safety_rank": config.input_safety_rank if config.has_input_side else 0,
                "input_safety_rank_pattern": dict(config.input_safety_rank_pattern),
                **_cuts(bases, ranks),
                "basis_method": config.basis_method,
                "engine": engine.kind,
                **_sketch_widths(engine, ranks),
                "seed": config.seed,
                "versions": {
                    "python": platform.python_version(),
                    **{package: version(package) for package in ("salora-plugins", "torch", "transformers", "peft")},
                },
            }
        ),
    )
    seconds = time.monotonic() - start
    tell(logger, "%s; calibrated in %.0f s.", facts(safety_module.provenance), seconds)
    if key is not None:
        store(key, safety_module)
    return safety_module


def _check_asked_for(model: nn.Module, names: Sequence[str], ranks: SideRanks, safety_module: SafetyModule) -> None:
    """
    Raises:
        ValueError: A safety module is not one of these modules of this model, with these ranks.
    """
    if set(safety_module.bases) != set(names) or set(safety_module.sides) != set(ranks):
        raise ValueError("it is of other modules, or has another side.")
    check_belongs(safety_module, model, names)
    for side, by_name in ranks.items():
        may_be_less = of_side(side, "safety_rank_cut") in safety_module.provenance
        for name, wanted in by_name.items():
            found = safety_module.sides[side].bases[name].shape[1]
            if not isinstance(wanted, float) and found != wanted and not (may_be_less and found < wanted):
                raise ValueError(f"{name!r} has {found} {side} directions instead of {wanted}.")


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What the provenance says of the tokenizer, if there is one."""
    if tokenizer is None:
        return {}
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return {
        "tokenizer": str(name),
        "has_chat_template": has_template(tokenizer),
        "chat_template_sha256": template_digest(tokenizer),
    }


# What of a model's configuration does not decide activations: names, labels, what is returned, token ids that trainers
# set, and the dtype, which the fingerprint of the weights knows.
_WITHOUT_EFFECT = frozenset(
    {
        *("name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "task_specific_params"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)


def _deciding_configuration(values: Any) -> Any:
    """
    A configuration as JSON values without what has no effect on activations beyond rounding: names that begin with "_"
    (the path, the implementation of attention) are none of them.
    """
    if not isinstance(values, Mapping):
        return values
    return {
        str(key): _deciding_configuration(value)
        for key, value in values.items()
        if not str(key).startswith("_") and key not in _WITHOUT_EFFECT
    }


def _model_configuration(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return _deciding_configuration(config.to_dict()) if hasattr(config, "to_dict") else None


def _extent(ranks: Iterable[int]) -> list[int]:
    """The smallest and the largest."""
    ranks = list(ranks)
    return [min(ranks), max(ranks)]


def _cuts(bases: Mapping[Side, Mapping[str, Basis]], ranks: SideRanks) -> dict[str, int]:
    """What the provenance says of default ranks that the data has no directions for: how many modules have fewer."""
    cuts = {}
    for side, wanted in ranks.items():
        if fewer := sum(
            basis.vectors.shape[1] < wanted[name]
            for name, basis in bases[side].items()
            if not isinstance(wanted[name], float)
        ):
            cuts[of_side(side, "safety_rank_cut")] = fewer
    return cuts


def _defaults(config: SaLoRAConfig, names: Sequence[str]) -> dict[Side, set[str]]:
    """
    Side -> modules whose rank is the default's. That must not fail on a small or uniform set, and is cut to what there
    is; a number that was asked for is an error.
    """
    default = next(f.default for f in dataclasses.fields(SaLoRAConfig) if f.name == "safety_rank")
    sides = {
        "output": (config.safety_rank == default, config.safety_rank_pattern),
        "input": (config.input_safety_rank is None, config.input_safety_rank_pattern),
    }
    return {
        side: {name for name, key in matching_patterns(names, pattern).items() if is_default and key is None}
        for side, (is_default, pattern) in sides.items()
    }


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

    Raises:
        CalibrationError: A layer is not used or gives NaN, or the weights are sharded.
        DataError: The task data cannot be read.
    """
    config = copy.copy(config)  # a tokenizer that is found is kept in it
    names = target_module_names(model, config)
    if (found := unreachable_weight(model, names)) is not None:
        raise CalibrationError(f"{found}, so that no task data can be run through it. Set init='pissa' or 'zero'.")
    layers = {name: base_layer(model.get_submodule(name)) for name in names}
    source = config.task_data if rows is None else rows
    examples = load_examples(
        source,
        option="task_data",
        max_rows=max(MAX_ROWS, config.num_task_samples),
        vocabulary=vocabulary_size(model),
    )
    examples = select_examples(examples, config.num_task_samples, config.seed)
    with adapters_disabled(model), on_accelerator(model), evaluation_mode(model):
        statistics = collect_statistics(
            model,
            layers,
            _batches(_tokenized(model, config, examples, "task_data"), config),
            _engine(model, layers, config, {"output": dict.fromkeys(names, config.task_rank)}),
            description="calibrating the task initialization",
        )
        bases = {name: task_basis(statistics.pop(name), config.task_rank) for name in names}
    # A model that was on the accelerator for this only is back; its bases would stay there, and take memory.
    for name, layer in layers.items():
        if not layer.weight.is_meta:
            bases[name] = bases[name].to(layer.weight.device)
    broadcast(list(bases.values()))
    return bases


def task_basis(statistics: ModuleStatistics, task_rank: int) -> Tensor:
    """U_T (d_out, r_t) of one layer, r_t being cut to the number of positions and directions there are."""
    rows = statistics.output
    if rows.count == 0:
        raise CalibrationError("task_data: no response token in the data, so there is nothing to initialize from.")
    return rows.top(min(task_rank, rows.most_directions))[0]


def _selected(model: nn.Module, config: SaLoRAConfig) -> list[Example | TokenizedExample]:
    """The safety data in the order in which it is to be used; rows without a response among them."""
    examples = load_examples(
        config.safety_data,
        option="safety_data",
        allow_missing_response=True,
        max_rows=max(MAX_ROWS, config.num_safety_samples),
        vocabulary=vocabulary_size(model),
    )
    examples = select_examples(examples, len(examples), config.seed)
    if any(_needs_response(example) for example in examples):
        return examples
    return _tokenized(model, config, examples[: config.num_safety_samples], "safety_data")


def _needs_response(example: Example | TokenizedExample) -> bool:
    return isinstance(example, Example) and example.response is None


def _with_responses(
    model: nn.Module, config: SaLoRAConfig, examples: list[Example | TokenizedExample]
) -> tuple[list[TokenizedExample], dict[str, int]]:
    counts: dict[str, int] = {}
    if any(_needs_response(example) for example in examples):
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
    return _tokenized(model, config, examples, "safety_data"), counts


def _cache_key(
    model: nn.Module,
    config: SaLoRAConfig,
    examples: list[Example | TokenizedExample],
    ranks: SideRanks,
    engine: Engine,
) -> str | None:
    """What the safety module depends on; None where it is not to be kept."""
    if not config.calibration_cache or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return None
    if config.basis_method != "salora":
        return None  # code of a plugin, which may change from run to run
    ends: list[int] = []
    if any(isinstance(example, Example) for example in examples):
        # Rendered, so that another tokenizer or chat template is another calibration.
        tokenizer = _tokenizer(model, config, "safety_data")
        requests = [example for example in examples if _needs_response(example)]
        prompts = [tuple(render_prompt(request, tokenizer)) for request in requests]
        # What still counts of a generation configuration where answers are greedy.
        ends = sorted(end_tokens(model, tokenizer)) if requests else []
        answered = [example for example in examples if not _needs_response(example)]
        digest = data_digest(
            [TokenizedExample(prompt, (IGNORED,) * len(prompt)) for prompt in prompts]
            + _tokenized(model, config, answered, "safety_data")
        )
    else:
        digest = data_digest(examples)
    return cache_key(
        {
            "version": version("salora-plugins"),
            "model": model_fingerprint(model),
            "configuration": _model_configuration(model),
            "ends_of_answers": ends,
            "examples": digest,
            "ranks": ranks,
            "positions": config.resolved_safety_positions,
            "engine": dataclasses.astuple(engine),
            "num_safety_samples": config.num_safety_samples,
            "batch_size": config.calibration_batch_size,
            "max_length": config.calibration_max_length,
        }
    )


def _engine(model: nn.Module, layers: dict[str, nn.Module], config: SaLoRAConfig, ranks: SideRanks) -> Engine:
    """The engine for these ranks: side -> module name -> rank."""
    most = {
        side: max(SHARE_DIRECTIONS if isinstance(rank, float) else rank for rank in by_name.values())
        for side, by_name in ranks.items()
    }
    outputs, inputs = statistics_dimensions(layers, with_inputs="input" in ranks)
    return choose_engine(
        config.calibration_engine,
        outputs,
        inputs,
        rank=most["output"],
        input_rank=most.get("input", 0),
        num_weights=sum(parameter.numel() for parameter in model.parameters()),
        seed=config.seed,
    )


def _sketch_widths(engine: Engine, ranks: SideRanks) -> dict[str, int]:
    """What the provenance says of the sketches."""
    if engine.kind != "sketched":
        return {}
    widths = {"sketch_width": engine.width}
    return widths | {"input_sketch_width": engine.input_width} if "input" in ranks else widths


def _batches(examples: list[TokenizedExample], config: SaLoRAConfig) -> list[dict[str, Tensor]]:
    """The batches of this rank of torch.distributed."""
    rank, world_size = rank_and_world_size()
    share = examples[rank::world_size]
    if not share:  # more ranks than examples: one whose positions do not count, since every rank must run the model
        share = [TokenizedExample(examples[0].input_ids, (IGNORED,) * len(examples[0].input_ids))]
    # Padding is masked, so that any id will do.
    return list(batches(share, config.calibration_batch_size, pad_token_id=0))


def _tokenized(
    model: nn.Module, config: SaLoRAConfig, examples: Sequence[Example | TokenizedExample], option: str
) -> list[TokenizedExample]:
    tokenizer = None
    if any(isinstance(example, Example) for example in examples):
        tokenizer = _tokenizer(model, config, option)
    return tokenize_examples(
        examples,
        tokenizer,
        max_length=config.calibration_max_length,
        option=option,
        vocabulary=vocabulary_size(model),
    )


def _tokenizer(model: nn.Module, config: SaLoRAConfig, option: str) -> Any:
    """
    What this calibration renders with: the tokenizer of the configuration, of the trainer that is being made, or the
    one in the model's own folder.

    Args:
        config: This calibration's own copy, which keeps what is found.

    Raises:
        CalibrationError: There is none.
        ValueError: The configuration's renders otherwise than the trainer's.
    """
    trainers = trainer_tokenizer()
    if config.tokenizer is not None:
        config.tokenizer = tokenizer_of(config.tokenizer)
        if trainers is not None:
            _check_renders_alike(config.tokenizer, trainers)
    elif trainers is not None:
        config.tokenizer = trainers
    else:
        config.tokenizer = _own_tokenizer(model, option)
    return config.tokenizer


def _check_renders_alike(given: Any, trainers: Any) -> None:
    differences = []
    if given is not trainers:
        if (given.chat_template or None) != (trainers.chat_template or None):
            differences.append("chat template")
        if given.get_vocab() != trainers.get_vocab():
            differences.append("vocabulary")
    if differences:
        raise ValueError(
            f"SaLoRAConfig(tokenizer=...) has another {' and '.join(differences)} than the trainer's processing_class "
            "(chat_template_path changes that), so that calibration would see other tokens than training. Leave "
            "`tokenizer` out of SaLoRAConfig, which then takes the trainer's, or give both the same."
        )


def _own_tokenizer(model: nn.Module, option: str) -> Any:
    from transformers import AutoTokenizer

    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if not source:
            raise ValueError("the model has no name or path")
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise CalibrationError(
            f"{option} holds text, and no tokenizer was found for the model ({error}). Pass "
            "SaLoRAConfig(tokenizer=...), or rows with input_ids and labels."
        ) from error


def _registered(option: str, name: str, registered: dict[str, Any]) -> Any:
    if name not in registered:
        raise ValueError(f"{option}={name!r} is not registered. Choose one of {', '.join(sorted(registered))}.")
    return registered[name]
