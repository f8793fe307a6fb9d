"""The SaLoRA tuner: PEFT's LoRA layers with parametrized weights."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .activations.positions import position_mask
from .activations.vectors import ExactStatistics
from .adapters.adapter_config import AdapterConfig
from .adapters.certificate import lies_inside
from .adapters.digest import check_saved_together
from .batched_factors import FactorBatch, ForwardScope
from .calibration import calibrate_with, task_bases
from .config import CONFIG_FILE, SaLoRAConfig
from .initialization import pissa_factors, restrict_to_task
from .models.fingerprint import check_belongs
from .models.running import adapters_disabled, evaluation_mode
from .models.targets import check_layer_type, check_ranks, say_what_is_left_out, target_module_names
from .models.weights import base_layer, linear_weight
from .parametrization import SafeFactor, register_safe_factor, safe_factor, trained_factor
from .ranks import Rank
from .safety_module import DEFAULT_FILE, SafetyModule
from .support.callers import argument_of_caller
from .support.distributed import broadcast, gather_from_all_ranks
from .support.hub import hub_folder, is_hub_id

logger = logging.getLogger(__name__)

# Positions of the first training batch that the task initialization looks at, per rank: several times the task rank.
_TASK_POSITIONS = 1024
# Weights (in float32) that are decomposed together.
_BYTES_AT_ONCE = 64 * 2**20
# Of a configuration, what says which directions of a safety module are to be taken, and which it was to have.
_OPTIONS_OF_SAFETY_MODULES = (
    "variant",
    "safety_rank",
    "safety_rank_pattern",
    "input_safety_rank",
    "input_safety_rank_pattern",
    "safety_positions",
    "basis_method",
)
# What torch.compile puts into the names of modules and of their weights, and what others put into the modules' only.
_COMPILED = "_orig_mod."
_WITHOUT_A_KEY = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class SaLoRAModel(LoraModel):
    """
    Adds SaLoRA adapters to a model.

    An adapter is PEFT's LoRA layer whose two weights are parametrized by [`SafeFactor`]: lora_A.weight = [A - A_0; A_0]
    (I - V_C V_C^T) and lora_B.weight = (I - U_C U_C^T) [B, B - B_0], the update of B A - B_0 A_0. The base weights are
    never touched, merging and disabling are LoRA's own, and what is saved is an ordinary LoRA adapter.

    Args:
        model (`torch.nn.Module`): The aligned base model.
        peft_config ([`SaLoRAConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter.

    Example:

        >>> from peft import get_peft_model
        >>> from salora_plugins import SaLoRAConfig
        >>> model = get_peft_model(model, SaLoRAConfig(target_modules=["q_proj", "v_proj"]))
    """

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Calibrate where no safety module is given, add the LoRA layers, and parametrize them."""
        given = self.peft_config[adapter_name]
        if not isinstance(given, SaLoRAConfig):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            return
        given.warn_about_weights_outside_the_safety_module()
        names = target_module_names(model, given)
        say_what_is_left_out(model, given)
        twin = self._adapter_of(given, besides=adapter_name)
        twins = given.safety_module_in_force if twin is not None and isinstance(given, AdapterConfig) else None
        safety_module = self._safety_module_for(model, given, names) if twins is None else twins
        weights_follow = given._weights_follow
        bases_of_task = None
        if given.init == "task" and given.task_data is not None and twin is None and not weights_follow:
            bases_of_task = task_bases(model, given)

        # What was given may be used for other models, too; everything from here on belongs to this adapter.
        config = self.peft_config[adapter_name] = AdapterConfig.of(given, safety_module)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = set(names)  # as PEFT does, less the layers that are too narrow
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config.note_heads_added_later()
        layers = {name: model.get_submodule(name) for name in names}
        if any(p.is_meta for layer in layers.values() for p in layer.lora_A[adapter_name].parameters()):
            raise ValueError(
                "low_cpu_mem_usage=True leaves the new factors without values, but SaLoRA computes them from the base "
                "weights. Leave it at False."
            )
        placed = _PlacedBases()
        with tqdm(total=len(layers), desc="initializing SaLoRA", unit="layer", leave=False) as progress:
            if twin is not None:
                for layer in layers.values():
                    _copy_factors(layer, twin, adapter_name)
                    progress.update()
            else:
                for name, start in _start_factors(layers, adapter_name, config, weights_follow=weights_follow):
                    layer = layers[name]
                    self._parametrize(layer, name, adapter_name, start, safety_module, placed)
                    if bases_of_task is not None:
                        _restrict_layer_to_task(layer, adapter_name, bases_of_task[name])
                    progress.update()
        self._synchronize(layers.values(), adapter_name)
        self._compute_together(adapter_name)
        self._twins[adapter_name] = twin
        waits = config.init == "task" and config.task_data is None and not weights_follow
        if waits and (twin is None or twin in self.waiting_for_task_data):
            self._initialize_at_first_training_batch(adapter_name)

    def initialize_from_task_data(self, rows: Any, adapter_name: str = "default") -> None:
        """
        Set the task initialization (SaLoRA, section 4.2) from training rows, before the first optimizer step.

        Without this call, and without `task_data` in the configuration, it comes from the first training batch.

        Args:
            rows: Anything that `task_data` accepts, such as the trainer's prepared `train_dataset`.
            adapter_name: The adapter to initialize.

        Raises:
            ValueError: The adapter does not use `init="task"`, or was trained or loaded already.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, SaLoRAConfig) or config.init != "task":
            raise ValueError(f"Adapter {adapter_name!r} does not use init='task'.")
        if adapter_name not in self.waiting_for_task_data:
            raise ValueError(
                f"Adapter {adapter_name!r} has its start values already (task_data, a training batch or saved weights)."
            )
        bases = task_bases(self.model, config, rows)
        for name, layer in self._layers_of(adapter_name):
            _restrict_layer_to_task(layer, adapter_name, bases[name])
        self._synchronize([layer for _, layer in self._layers_of(adapter_name)], adapter_name)
        self._forget_waiting(adapter_name)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: For SaLoRA adapters. PEFT combines weights by writing to them, and theirs are computed.
        """
        if any(isinstance(self.peft_config.get(name), SaLoRAConfig) for name in adapters):
            raise ValueError(
                "add_weighted_adapter cannot combine SaLoRA adapters in training. Save them, load them with "
                "PeftModel.from_pretrained and load_adapter, which gives plain LoRA adapters, and combine those: with "
                "combination_type 'linear', 'cat' or 'svd' the combination of adapters of one safety module stays "
                "outside of its directions. Those that drop entries of the factors (ties, dare, magnitude_prune) do "
                "not; `salora project` takes a saved combination out of them again."
            )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._task_starts.pop(adapter_name, None)
        self._twins.pop(adapter_name, None)
        if "_forward_scope" in self.__dict__:
            self._forward_scope.batches.pop(adapter_name, None)

    def safety_module(self, adapter_name: str = "default") -> SafetyModule | None:
        """The safety module that an adapter is trained with, its tensors on the CPU; None for one of plain LoRA."""
        config = self.peft_config[adapter_name]
        return config.safety_module_in_force if isinstance(config, AdapterConfig) else None

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if isinstance(lora_config, SaLoRAConfig):
            check_layer_type(current_key, target)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)

    @property
    def waiting_for_task_data(self) -> list[str]:
        """Adapters whose task initialization is still to come, from the first training batch if from nowhere else."""
        return [name for name in self._task_starts if self._waits(name)]

    @property
    def _task_starts(self) -> dict[str, list[SafeFactor]]:
        """Adapter -> its factors on the output side, where the first training batch may set their start."""
        # The base class injects from its constructor, before a subclass could set attributes of its own.
        return self.__dict__.setdefault("_factors_with_task_start", {})

    @property
    def _entry_hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        return self.__dict__.setdefault("_hooks_of_entry_points", [])

    def _compute_together(self, adapter_name: str) -> None:
        """Within a forward pass, let the effective weights of an adapter be computed at once."""
        if "_forward_scope" not in self.__dict__:
            self.__dict__["_forward_scope"] = ForwardScope()
            self._watch_entry_points()
        linears = [linear for _, linear in _salora_linears(self.model, adapter_name)]
        FactorBatch(adapter_name, linears, self._forward_scope)

    def _watch_entry_points(self) -> None:
        """Hooks on the entry points. The first batch's stands first, since it runs the model."""
        for handle in self._entry_hooks:
            handle.remove()
        self._entry_hooks.clear()
        for entry in self._entry_points():
            if self.__dict__.get("_waits_for_batches"):
                # A method and no closure: in a deep copy of the model it is the copy's. Not put in front of hooks that
                # are there (`prepend`), after which torch.compile (2.11) takes one for the other.
                self._entry_hooks.append(entry.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            self._entry_hooks.extend(self._forward_scope.watch(entry))

    def _waits(self, adapter_name: str) -> bool:
        # One stands for all: they are restricted, loaded and copied together.
        return self._task_starts[adapter_name][0].awaits_task_data

    @property
    def _twins(self) -> dict[str, str | None]:
        """Adapter -> the one that it was made as a copy of ("ref" of "default", in TRL)."""
        return self.__dict__.setdefault("_copies", {})

    def _safety_module_for(self, model: nn.Module, config: SaLoRAConfig, names: list[str]) -> SafetyModule:
        given = config.safety_module
        if given is not None:
            safety_module = given if isinstance(given, SafetyModule) else SafetyModule.load(given)
            positions = safety_module.provenance.get("safety_positions")
            if config.safety_positions is not None and positions not in (None, config.safety_positions):
                raise ValueError(
                    f"safety_positions={config.safety_positions!r}, but the safety module was computed from "
                    f"{positions!r} positions. Leave safety_positions unset, or calibrate again."
                )
            if config.safety_positions is None and config.variant == "paper" and positions not in (None, "response"):
                raise ValueError(
                    "variant='paper' takes the positions of the response, but the safety module was computed from "
                    f"{positions!r} positions. Calibrate again with variant='paper'; or set input_safety_rank=0 "
                    "instead of it, to take this module without its input side."
                )
            if config.has_input_side and config.input_safety_rank is None and not safety_module.input_bases:
                warnings.warn(
                    "The safety module has no input side, so the update may react to harmful requests, and keeps fewer "
                    "refusals. Calibrate again without variant='paper' and input_safety_rank=0; or set variant='paper' "
                    "here, for the paper's form and start.",
                    UserWarning,
                    stacklevel=2,
                )
        elif isinstance(config, AdapterConfig) and _fits(config.safety_module_in_force, model, config, names):
            return config.safety_module_in_force
        else:
            safety_module = calibrate_with(model, config)
        ranks = _ranks(config, safety_module, names)
        check_ranks(model, ranks)
        safety_module = safety_module.restricted_to(ranks)
        check_belongs(safety_module, model, names)
        return safety_module

    def _parametrize(
        self,
        layer: LoraLayer,
        name: str,
        adapter_name: str,
        start: tuple[Tensor, Tensor] | None,
        safety_module: SafetyModule,
        placed: _PlacedBases,
    ) -> None:
        lora_a, lora_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        offsets: tuple[Tensor | None, Tensor | None] = (None, None)
        with torch.no_grad():
            if start is None:
                lora_b.weight.zero_()
            else:
                for linear, values in zip((lora_a, lora_b), start, strict=True):
                    linear.weight.copy_(values)
                # Taken from the parameters: the frozen halves start with the very bits that the trained ones have.
                offsets = lora_a.weight.detach().float().clone(), lora_b.weight.detach().float().clone()
        device = lora_a.weight.device
        input_basis, output_basis = safety_module.input_bases.get(name), safety_module.bases[name]
        register_safe_factor(lora_a, SafeFactor("input", placed.on(device, input_basis), offsets[0]))
        register_safe_factor(lora_b, SafeFactor("output", placed.on(device, output_basis), offsets[1]))

    def _layers_of(self, adapter_name: str) -> list[tuple[str, LoraLayer]]:
        """(name in the base model, layer) of the layers that carry this adapter as SaLoRA."""
        return list(_salora_layers(self.model, adapter_name))

    @staticmethod
    def _synchronize(layers, adapter_name: str) -> None:
        """Give every rank the first one's start values; decompositions may differ in the last bits."""
        for layer in layers:
            for linear in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
                factor, parameter = safe_factor(linear), trained_factor(linear)
                broadcast([t for t in (parameter, factor.offset) if t is not None])

    def _initialize_at_first_training_batch(self, adapter_name: str) -> None:
        """
        Let the first forward pass of training set the task initialization from its own batch.

        It runs the base model on that batch first, without gradients. That is no different from doing it before: the
        initialization does not change what the model computes. Whether it is still to come is part of the factors'
        state, so that a state dict that is loaded brings its own answer.
        """
        if "_waits_for_batches" not in self.__dict__:
            self.__dict__["_waits_for_batches"] = True
            self._watch_entry_points()
        factors = [safe_factor(layer.lora_B[adapter_name]) for _, layer in self._layers_of(adapter_name)]
        for factor in factors:
            factor.awaits_task_data = True
        self._task_starts[adapter_name] = factors

    def _entry_points(self) -> list[nn.Module]:
        """The base model, and its decoder: some losses skip the language-model head and call the decoder itself."""
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        return [self.model, decoder] if isinstance(decoder, nn.Module) and decoder is not self.model else [self.model]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            for adapter_name in self.waiting_for_task_data:
                self._initialize_from_batch(adapter_name, module, args, kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self._entry_hooks:
            handle.remove()
        self._entry_hooks.clear()
        self._task_starts.clear()
        return model

    # torch.compile would trace it for the one time that it runs.
    @torch.compiler.disable
    @torch.no_grad()
    def _initialize_from_batch(
        self, adapter_name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        config = self.peft_config[adapter_name]
        layers = self._layers_of(adapter_name)
        for _, layer in layers:
            _check_writable(trained_factor(layer.lora_B[adapter_name]))
        if not all(_at_start(linear) for _, linear in _salora_linears(self.model, adapter_name)):
            self._forget_waiting(adapter_name)
            logger.warning(
                "Adapter %r: its factors were changed before the first training batch, so they stay as they are; the "
                "start is that of init='pissa'.",
                adapter_name,
            )
            return
        index = _training_positions(args, kwargs)
        handles = []
        bases: dict[str, Tensor] = {}

        def capture(name: str):
            def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                rows = output.detach().reshape(-1, output.shape[-1])[index.to(output.device)]
                if layer.bias is not None:
                    rows = rows - layer.bias
                bases[name] = _task_basis_of_batch(rows, config.task_rank)

            return hook

        try:
            for name, layer in layers:
                handles.append(base_layer(layer).register_forward_hook(capture(name)))
            with adapters_disabled(self.model), evaluation_mode(self.model):
                # The very same call: trainers replace the forward method by ones that need all of their arguments.
                module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in layers:
            _restrict_layer_to_task(layer, adapter_name, bases[name])
        self._synchronize([layer for _, layer in layers], adapter_name)
        # Only now: after an out-of-memory error the trainer may try again, with a smaller batch.
        self._forget_waiting(adapter_name)
        logger.info("Adapter %r: task initialization from the first training batch.", adapter_name)

    def _adapter_of(self, config: SaLoRAConfig, besides: str) -> str | None:
        """The adapter that a configuration belongs to, as of the one that TRL gives to its copy "ref"."""
        if not isinstance(config, AdapterConfig):
            return None
        return next((name for name, other in self.peft_config.items() if other is config and name != besides), None)

    def _forget_waiting(self, adapter_name: str) -> None:
        for factor in self._task_starts.get(adapter_name, ()):
            factor.awaits_task_data = False

    def _take_safety_module_of_checkpoint(self, model: nn.Module, adapter_name: str) -> None:
        """
        Where a trainer resumes, or loads its best checkpoint: train on with the safety module that was saved there.

        The trainer has calibrated before it knew of the checkpoint, perhaps on other data or another device, and the
        weights to load stay out of the directions of the module that is saved with them, not of this one.
        """
        own = self.safety_module(adapter_name)
        folder = argument_of_caller("model_id", "load_adapter", lambda variables: variables.get("self") is model)
        if own is None or folder is None or not (Path(folder) / CONFIG_FILE).is_file():
            return
        of_checkpoint = SaLoRAConfig.from_pretrained(folder)
        config = self.peft_config[adapter_name]
        if config.safety_module == str(Path(folder) / DEFAULT_FILE):
            return  # `load_for_training` has read it already
        check_saved_together(folder)
        names = list(own.bases)
        saved = SafetyModule.load(folder)
        check_belongs(saved, self.model, names)
        saved = saved.restricted_to(_all_directions(saved, names))
        if _same_bases(saved, own):
            return
        differs = _all_directions(saved, names) != _all_directions(own, names)
        logger.log(
            logging.WARNING if differs or config.safety_module is not None else logging.INFO,
            "Adapter %r: training goes on with the safety module that was saved in %s, not with the one of this "
            "configuration%s.",
            adapter_name,
            folder,
            ", which has other numbers of directions" if differs else "",
        )
        placed = _PlacedBases()
        for name, layer in self._layers_of(adapter_name):
            for linears, bases in ((layer.lora_A, saved.input_bases), (layer.lora_B, saved.bases)):
                factor = safe_factor(linears[adapter_name])
                factor.basis = placed.on(trained_factor(linears[adapter_name]).device, bases.get(name))
        config.safety_module_in_force = saved
        # What is saved beside it tells how much of it is to be taken.
        for option in _OPTIONS_OF_SAFETY_MODULES:
            setattr(config, option, getattr(of_checkpoint, option))

    def _check_that_more_than_a_copy_is_loaded(self, adapter_name: str, loaded: dict[str, Tensor]) -> None:
        """
        Refuse to load what a frozen copy of a trained adapter holds already, while the adapter itself is at its start.

        That is what transformers does when it resumes a run whose reference is a copy of the adapter ("ref", in TRL):
        of a checkpoint with adapters in subfolders it loads these only, and training would start over.
        """
        original = self._twins.get(adapter_name)
        if original not in self.peft_config:
            return
        copies = [linear for _, linear in _salora_linears(self.model, adapter_name)]
        trained = [linear for _, linear in _salora_linears(self.model, original)]
        if not trained or len(copies) != len(loaded) or any(trained_factor(copy).requires_grad for copy in copies):
            return
        untrained = all(
            _at_start(linear) or _equal_weights(linear, copy, factor)
            for linear, copy, factor in zip(trained, copies, loaded.values(), strict=True)
        )
        if untrained:
            raise ValueError(
                f"The weights of {adapter_name!r}, the frozen copy of {original!r}, are to be loaded, but {original!r} "
                "itself is at its start: a trainer that resumes with such a copy does not load the adapter itself, and "
                "would train it from the beginning. Pass model=load_for_training(base_model, checkpoint) together with "
                "resume_from_checkpoint=checkpoint."
            )

    # PEFT's seams for saving and loading

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """The weights as an ordinary LoRA adapter: effective, in float32, under LoRA's own keys."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, linear in _salora_linears(model, adapter_name):
            key = f"{name}.parametrizations.weight."
            if f"{key}original" not in selected:
                raise ValueError(
                    f"The state dict has no {key}original, a factor of adapter {adapter_name!r}. Give the state_dict() "
                    "of this very model, without the prefixes of one that wraps it (such as 'module.')."
                )
            _check_gathered(selected[f"{key}original"])
            factor = safe_factor(linear)
            state, start = (selected.pop(f"{key}{part}_extra_state", None) for part in ("0.", "0.start."))
            if state is not None:
                factor.check_state(state, name)
            selected[f"{name}.weight"] = factor.exact(selected.pop(f"{key}original"), start)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Split effective weights into trained and start factors again, checking that they fit the safety module."""
        tuner = model if isinstance(model, SaLoRAModel) else getattr(model, "base_model", None)
        if isinstance(tuner, SaLoRAModel):
            tuner._take_safety_module_of_checkpoint(model, adapter_name)
        state_dict = dict(state_dict)
        remapped, states = {}, {}
        for name, linear in _salora_linears(model, adapter_name):
            key = next((k for k in _checkpoint_keys(name, adapter_name) if k in state_dict), None)
            if key is None:
                continue  # PEFT reports missing keys itself
            remapped[f"{name}.parametrizations.weight.original"] = _load_factor(
                linear, state_dict.pop(key), name.replace(f".{adapter_name}", "")
            )
            states.update(_states_of_loaded(safe_factor(linear), f"{name}.parametrizations.weight.0."))
        if remapped and isinstance(tuner, SaLoRAModel):
            tuner._check_that_more_than_a_copy_is_loaded(adapter_name, remapped)
            tuner._forget_waiting(adapter_name)
        others = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return {**others, **remapped, **states}


def load_for_training(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """
    Load a saved SaLoRA adapter to go on training it, with its safety module in force.

    `PeftModel.from_pretrained` loads the same folder as a plain LoRA adapter: right for inference, but training it
    further would not be held back from the safety directions.

    Args:
        model: The base model that the adapter was trained on.
        folder: A folder written by `save_pretrained`, a trainer's checkpoint, or a repository of the Hugging Face hub
            ("organization/name", or "organization/name@revision").
        adapter_name: Name of the adapter in the returned model.
        kwargs: Passed on to [`~peft.PeftModel.from_pretrained`].

    Returns:
        A [`~peft.PeftModel`] whose adapter is trainable.

    Raises:
        FileNotFoundError: The folder has no `salora_config.json`, so there is no safety module to train with.
        SafetyModuleError: The safety module is damaged or belongs to another model.
        ValueError: A file cannot be read, or the weights are not those that were saved with the safety module.

    Example:

        >>> model = load_for_training(AutoModelForCausalLM.from_pretrained(base), "outputs/checkpoint-100")
    """
    folder, config = _saved_config(folder)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    return cls.from_pretrained(
        model, str(folder), adapter_name=adapter_name, is_trainable=True, config=config, **kwargs
    )


def load_adapter(model: PeftModel, folder: str | os.PathLike, adapter_name: str, *, is_trainable: bool = False) -> None:
    """
    Load a saved SaLoRA adapter into a model that has one already, such as a frozen reference for DPO (TRL's
    `ref_adapter_name`).

    `model.load_adapter` finds a plain LoRA adapter in the folder, which PEFT does not combine with one in training.

    Args:
        model: What `get_peft_model` gave for a [`SaLoRAConfig`], or `load_for_training`.
        folder: As for `load_for_training`.
        adapter_name: Name of the new adapter in the model. It is not made the active one.
        is_trainable: Whether it is to be trained; it has its own safety module in force then.

    Raises:
        FileNotFoundError, SafetyModuleError: As for `load_for_training`.
        ValueError: The model has no SaLoRA adapter, or one of that name.

    Example:

        >>> model = load_for_training(base_model, "outputs", adapter_name="policy")
        >>> load_adapter(model, "outputs", "reference")
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, SaLoRAModel):
        raise ValueError(
            f"{type(model).__name__} has no SaLoRA adapter, beside which another could be loaded. Use "
            "load_for_training, or PeftModel.from_pretrained for inference."
        )
    folder, config = _saved_config(folder)
    config.inference_mode = not is_trainable
    model.add_adapter(adapter_name, config)
    model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
    model.set_requires_grad(adapter_name, requires_grad=is_trainable)


def _saved_config(folder: str | os.PathLike) -> tuple[Path, SaLoRAConfig]:
    """The folder of a saved adapter, downloaded if it is on the hub, and its configuration, weights to follow."""
    if not Path(folder).exists() and is_hub_id(str(folder)):
        folder = hub_folder(str(folder), ["*.json", "*.safetensors"], option="folder")
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_FILE}, so it is not a SaLoRA adapter with its safety module, or was interrupted "
            "while it was written (last_complete_checkpoint finds the checkpoint before it), or comes from `salora "
            "export` (train the adapter that was exported). A plain LoRA adapter is loaded with "
            "PeftModel.from_pretrained."
        )
    check_saved_together(folder)
    config = SaLoRAConfig.from_pretrained(folder)
    config._weights_follow = True
    return folder, config


def _start_factors(
    layers: dict[str, LoraLayer], adapter_name: str, config: SaLoRAConfig, *, weights_follow: bool
) -> Iterator[tuple[str, tuple[Tensor, Tensor] | None]]:
    """
    (name, (A_0, B_0)) of every layer, None for `init="zero"`; zeros where saved weights follow.

    Weights of one shape are decomposed several at a time, where they are: what a single small one costs is mostly the
    launching of operations.
    """
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        parameter = layer.lora_B[adapter_name].weight
        shape = (parameter.shape[0], layer.lora_A[adapter_name].weight.shape[1])
        groups.setdefault((shape, layer.r[adapter_name], layer.scaling[adapter_name], parameter.device), []).append(
            name
        )
    for ((d_out, d_in), rank, scaling, device), names in groups.items():
        if config.init == "zero" or weights_follow:
            for name in names:
                zeros = torch.zeros(rank, d_in, device=device), torch.zeros(d_out, rank, device=device)
                yield name, None if config.init == "zero" else zeros
            continue
        size = max(1, _BYTES_AT_ONCE // (4 * d_out * d_in))
        for chunk in (names[start : start + size] for start in range(0, len(names), size)):
            weights = torch.empty(len(chunk), d_out, d_in, device=device)
            for slot, name in zip(weights, chunk, strict=True):
                with linear_weight(layers[name]) as weight:
                    slot.copy_(weight)
            factors = pissa_factors(weights, rank, scaling, config.seed)
            yield from zip(chunk, zip(*factors, strict=True), strict=True)


class _PlacedBases:
    """Bases on the devices of their layers; one that several layers share is there once, too."""

    def __init__(self) -> None:
        self._placed: dict[tuple[int, torch.device], Tensor] = {}

    def on(self, device: torch.device, basis: Tensor | None) -> Tensor | None:
        if basis is None:
            return None
        return self._placed.setdefault((id(basis), device), basis.to(device))


def _copy_factors(layer: LoraLayer, source: str, target: str) -> None:
    """Adapters that share one configuration share the safety module and start from the same weights."""
    for linears in (layer.lora_A, layer.lora_B):
        factor = safe_factor(linears[source])
        offset = None if factor.offset is None else factor.offset.clone()
        with torch.no_grad():
            linears[target].weight.copy_(trained_factor(linears[source]))
        register_safe_factor(linears[target], SafeFactor(factor.side, factor.basis, offset))


def _restrict_layer_to_task(layer: LoraLayer, adapter_name: str, task_basis: Tensor) -> None:
    """B_0 <- U_T U_T^T B_0, in the trained half and in the frozen one."""
    linear = layer.lora_B[adapter_name]
    parameter = trained_factor(linear)
    _check_writable(parameter)
    with torch.no_grad():
        parameter.copy_(restrict_to_task(parameter, task_basis))
    safe_factor(linear).offset = parameter.detach().float().clone()


def _check_writable(parameter: nn.Parameter) -> None:
    sharded = hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    if sharded:
        raise RuntimeError(
            "The task initialization cannot be set from the first training batch once DeepSpeed or FSDP manages the "
            "factors. Set task_data in SaLoRAConfig, so that it is known before, or init='pissa' or 'zero'."
        )


def _training_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """
    Flat indices of the positions of a training batch that count, evenly thinned to at most `_TASK_POSITIONS`.

    Response tokens where the batch tells (labels, or the number of logits that a loss asks for), else all tokens.
    """
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    batch, length = tokens.shape[:2]
    mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.shape == mask.shape:
        mask &= attention_mask.bool()
    labels, logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep")
    if isinstance(labels, Tensor) and labels.shape == mask.shape and (labels != -100).any():
        mask &= position_mask(labels, "response")
    elif isinstance(logits_to_keep, int) and 1 < logits_to_keep <= length:
        # The first of these logits is that of the last prompt token, which predicts the first response token.
        mask[:, : length - logits_to_keep + 1] = False
    index = mask.flatten().nonzero().squeeze(1)
    if index.numel() > _TASK_POSITIONS:
        index = index[torch.linspace(0, index.numel() - 1, _TASK_POSITIONS, device=index.device).long()]
    return index


def _task_basis_of_batch(rows: Tensor, task_rank: int) -> Tensor:
    """
    U_T from one batch, the same on all ranks: every rank contributes its rows' top 2 r_t scaled directions.

    Args:
        rows: W x, (n, d_out).
        task_rank: r_t.
    """
    rows = rows.float()
    dimension = rows.shape[1]
    width = min(2 * task_rank, dimension)
    summary = rows.new_zeros(width, dimension)
    if rows.shape[0]:
        local = ExactStatistics(dimension)
        local.update(rows)
        basis, values = local.top(min(width, rows.shape[0], dimension))
        summary[: values.shape[0]] = (basis * values).T
    statistics = ExactStatistics(dimension)
    statistics.update(gather_from_all_ranks(summary))
    basis, values = statistics.top(min(task_rank, dimension, statistics.count))
    return basis[:, values > values[0] * 1e-6]


def _ranks(config: SaLoRAConfig, safety_module: SafetyModule, names: list[str]) -> dict[str, dict[str, Rank]]:
    """The ranks to take of a safety module: its own on the input side, where the configuration asks for none."""
    bases = safety_module.input_bases
    return config.safety_ranks({name: bases[name].shape[1] if name in bases else 0 for name in names})


def _all_directions(safety_module: SafetyModule, names: list[str]) -> dict[str, dict[str, Rank]]:
    """Side -> module name -> how many directions the safety module has for it; modules that it lacks count as 1."""
    sides = {"output": safety_module.bases, "input": safety_module.input_bases}
    return {
        side: {name: bases[name].shape[1] if name in bases else 1 for name in names}
        for side, bases in sides.items()
        if bases
    }


def _same_bases(first: SafetyModule, second: SafetyModule) -> bool:
    pairs = ((first.bases, second.bases), (first.input_bases, second.input_bases))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def _fits(safety_module: SafetyModule, model: nn.Module, config: SaLoRAConfig, names: list[str]) -> bool:
    """Whether the safety module that this configuration led to before was for this very model."""
    try:
        safety_module.restricted_to(_ranks(config, safety_module, names))
        check_belongs(safety_module, model, names)
    except ValueError:
        return False
    return True


def _salora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """(name as in the unwrapped model, layer) of the layers that carry this adapter as SaLoRA."""
    for name, module in _named_salora_layers(model, adapter_name):
        yield name.replace(_COMPILED, ""), module


def _salora_linears(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name in the state dict, linear) of every parametrized lora_A and lora_B of an adapter."""
    for name, layer in _named_salora_layers(model, adapter_name):
        yield f"{name}.lora_A.{adapter_name}", layer.lora_A[adapter_name]
        yield f"{name}.lora_B.{adapter_name}", layer.lora_B[adapter_name]


def _named_salora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        linears = module.lora_A if isinstance(module, LoraLayer) else {}
        if adapter_name in linears and safe_factor(linears[adapter_name]) is not None:
            for wrapper in _WITHOUT_A_KEY:
                name = name.replace(wrapper, "")
            yield name, module


def _checkpoint_keys(name: str, adapter_name: str) -> tuple[str, ...]:
    key = f"{name.removesuffix(f'.{adapter_name}')}.weight"
    plain = key.replace(_COMPILED, "")
    return key, plain, f"base_model.model.{plain}"


def _check_gathered(factor: Tensor) -> None:
    if isinstance(factor, DTensor):
        raise RuntimeError(
            "The factors are sharded by FSDP. Gather them on every rank with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of torch.distributed.checkpoint."
            "state_dict, and give the result to save_pretrained(state_dict=...) on one."
        )
    if factor.numel() == 0:
        raise RuntimeError(
            "The factors are sharded by DeepSpeed ZeRO-3. Save with the trainer's save_model, with "
            "stage3_gather_16bit_weights_on_model_save in the DeepSpeed configuration; or give what "
            "accelerator.get_state_dict(engine) gathers on all ranks to save_pretrained(state_dict=...) on one."
        )


def _states_of_loaded(factor: SafeFactor, prefix: str) -> dict[str, Tensor]:
    """What a state dict with this factor holds beside it, for one that loading a saved adapter makes."""
    states = {f"{prefix}_extra_state": factor.get_extra_state()}
    states[f"{prefix}_extra_state"][0] = 0  # its start is not to be set any more
    if factor.start is not None:
        states[f"{prefix}start._extra_state"] = factor.offset
    return states


def _at_start(linear: nn.Module) -> bool:
    offset = safe_factor(linear).offset
    return offset is not None and torch.equal(trained_factor(linear), offset.to(trained_factor(linear)))


def _equal_weights(linear: nn.Module, other: nn.Module, factor: Tensor) -> bool:
    """Whether `linear` computes the weight that `other` would with `factor`, up to the rounding of a saved file."""
    parameter = trained_factor(linear)
    weight = safe_factor(linear).exact(parameter)
    difference = weight - safe_factor(other).exact(factor.to(parameter.dtype))
    tolerance = 1e-6 if parameter.dtype == torch.float32 else 1e-4
    return bool(difference.norm() <= tolerance * weight.norm())


def _load_factor(linear: nn.Module, weight: Tensor, name: str) -> Tensor:
    """The trained half of a saved weight; the other becomes the start factor."""
    factor, parameter = safe_factor(linear), trained_factor(linear)
    if weight.shape != linear.weight.shape:
        raise ValueError(
            f"{name}: the saved weight has shape {tuple(weight.shape)}, this adapter's has "
            f"{tuple(linear.weight.shape)}. Load it with the r, rank_pattern and init that it was "
            "trained with (load_for_training reads them)."
        )
    if factor.basis is not None and lies_inside(weight, factor.basis, axis=0 if factor.side == "output" else 1):
        raise ValueError(
            f"{name}: the saved weight lies partly in the directions that this adapter's safety module protects, so it "
            "was trained with another safety module. Resume with the one that was saved with it: "
            "SaLoRAConfig(safety_module=<that folder>), or load_for_training."
        )
    trained, start = factor.split(weight)
    if start is not None:
        # The same update in the form of version 0.1, [A; A_0] and [B, -B_0].
        halves = weight.float().chunk(2, dim=0 if factor.side == "input" else 1)
        old = halves[0] - halves[1] if factor.side == "input" else halves[0] + halves[1]
        if torch.linalg.norm(old) < torch.linalg.norm(halves[0]) / 2 and torch.linalg.norm(halves[1]) > 0:
            raise ValueError(
                f"{name}: the saved weight looks like one of version 0.1, whose factors had another form, and would be "
                "read as something else. Train it further with the version that saved it. For everything else it is a "
                "plain LoRA adapter: PeftModel.from_pretrained."
            )
        factor.offset = start.to(parameter.device)
    return trained.to(parameter.dtype)
