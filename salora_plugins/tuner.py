"""The SaLoRA tuner: PEFT's LoRA layers with parametrized weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .adapters.adapter_config import AdapterConfig, read_config
from .adapters.saved import ADAPTER_CONFIG_FILE
from .calibration import task_bases
from .config import CONFIG_FILE, SaLoRAConfig
from .models.targets import check_layer_type, say_what_is_left_out, target_module_names
from .models.weights import check_loaded, check_not_offloaded
from .safety_module import DEFAULT_FILE, SafetyModule
from .support.callers import argument_of_caller
from .support.hosts import in_use, warn_of_unsupported
from .tuning.batched_factors import FactorBatch, ForwardScope
from .tuning.first_batch import FirstBatchStarts
from .tuning.layers import check_without_other_adapters, lora_layer, salora_layers, salora_linears
from .tuning.safety_modules import bases_of, safety_module_for, safety_module_of_checkpoint, take_options
from .tuning.start_values import (
    copy_factors,
    parametrize_layer,
    replace_bases,
    restrict_layer_to_task,
    restrict_layers_to_task,
    start_factors,
    synchronize,
)
from .tuning.state_dicts import (
    check_saved_as_trained,
    check_scaling_of_file,
    check_that_more_than_a_copy_is_loaded,
    put_effective_weights,
    take_factors,
)


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
        _refuse_loading_by_transformers(model)
        warn_of_unsupported(*in_use())
        given.warn_about_weights_outside_the_safety_module()
        names = target_module_names(model, given)
        if not self.targeted_module_names:  # the first adapter of this tuner
            check_without_other_adapters(model, adapter_name, names)
        check_not_offloaded(model, names)
        if given.safety_module is not None:
            check_loaded(model, names)
        say_what_is_left_out(model, given)
        twin = self._adapter_of(given, besides=adapter_name)
        if twin is not None and isinstance(given, AdapterConfig):
            safety_module = given.safety_module_in_force
        else:
            safety_module = safety_module_for(model, given, names)
        weights_follow = given.weights_follow
        bases_of_task = None
        if given.init == "task" and given.task_data is not None and twin is None and not weights_follow:
            bases_of_task = task_bases(model, given)

        # What was given may be used for other models, too; everything from here on belongs to this adapter.
        config = self.peft_config[adapter_name] = AdapterConfig.of(given, safety_module)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = set(names)  # type: ignore[assignment]  # PEFT makes it a set itself, of all layers
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config.note_heads_added_later()
        layers = {name: lora_layer(model, name) for name in names}
        if any(p.is_meta for layer in layers.values() for p in layer.lora_A[adapter_name].parameters()):
            raise ValueError(
                "low_cpu_mem_usage=True leaves the new factors without values, but SaLoRA computes them from the base "
                "weights. Leave it at False."
            )
        with tqdm(total=len(layers), desc="initializing SaLoRA", unit="layer", leave=False) as progress:
            if twin is not None:
                for layer in layers.values():
                    copy_factors(layer, twin, adapter_name)
                    progress.update()
            else:
                for name, start in start_factors(
                    layers, adapter_name, config, safety_module.bases, zeros=weights_follow
                ):
                    parametrize_layer(layers[name], adapter_name, start, bases_of(safety_module, name))
                    if bases_of_task is not None:
                        restrict_layer_to_task(layers[name], adapter_name, bases_of_task[name])
                    progress.update()
        synchronize(layers.values(), adapter_name)
        self._compute_together(adapter_name)
        self._twins[adapter_name] = twin
        waits = config.init == "task" and config.task_data is None and not weights_follow
        if waits and (twin is None or twin in self.waiting_for_task_data):
            first = not self._first_batch_starts.watches
            self._first_batch_starts.add(adapter_name, config.task_rank)
            if first:
                self._watch_entry_points()

    def initialize_from_task_data(self, rows: Any, adapter_name: str = "default") -> None:
        """
        Set the task initialization (the paper, section 4.2) from training rows, before the first optimizer step.

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
        restrict_layers_to_task(dict(salora_layers(self.model, adapter_name)), adapter_name, bases)
        self._first_batch_starts.settle(adapter_name)

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
        self._first_batch_starts.remove(adapter_name)
        self._twins.pop(adapter_name, None)
        self._forward_scope.batches.pop(adapter_name, None)

    def safety_module(self, adapter_name: str = "default") -> SafetyModule | None:
        """The safety module that an adapter is trained with, its tensors on the CPU; None for one of plain LoRA."""
        config = self.peft_config[adapter_name]
        return config.safety_module_in_force if isinstance(config, AdapterConfig) else None

    @property
    def waiting_for_task_data(self) -> list[str]:
        """Adapters whose task initialization is still to come, from the first training batch if from nowhere else."""
        return self._first_batch_starts.waiting

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(peft_config, SaLoRAConfig):
            check_layer_type(current_key, target)
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )

    # Made when they are asked for: the base class injects from its constructor, before a subclass could set attributes.

    @cached_property
    def _first_batch_starts(self) -> FirstBatchStarts:
        return FirstBatchStarts(self)

    @cached_property
    def _forward_scope(self) -> ForwardScope:
        return ForwardScope()

    @cached_property
    def _entry_hooks(self) -> list[RemovableHandle]:
        return []

    @cached_property
    def _twins(self) -> dict[str, str | None]:
        """Adapter -> the one that it was made as a copy of ("ref" of "default", in TRL)."""
        return {}

    def _compute_together(self, adapter_name: str) -> None:
        """Within a forward pass, let the effective weights of an adapter be computed at once."""
        linears = [linear for _, linear in salora_linears(self.model, adapter_name)]
        FactorBatch(adapter_name, linears, self._forward_scope)
        if not self._entry_hooks:
            self._watch_entry_points()

    def _watch_entry_points(self) -> None:
        """Hooks on the entry points. The first batch's stands first, since it runs the model."""
        self._remove_entry_hooks()
        for entry in self._entry_points():
            if self._first_batch_starts.watches:
                self._entry_hooks.extend(self._first_batch_starts.watch(entry))
            self._entry_hooks.extend(self._forward_scope.watch(entry))

    def _remove_entry_hooks(self) -> None:
        for handle in self._entry_hooks:
            handle.remove()
        self._entry_hooks.clear()

    def _entry_points(self) -> list[nn.Module]:
        """The base model, and its decoder: some losses skip the language-model head and call the decoder itself."""
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        return [self.model, decoder] if isinstance(decoder, nn.Module) and decoder is not self.model else [self.model]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._remove_entry_hooks()
        self._first_batch_starts.clear()
        return model

    def _adapter_of(self, config: SaLoRAConfig, besides: str) -> str | None:
        """The adapter that a configuration belongs to, as of the one that TRL gives to its copy "ref"."""
        if not isinstance(config, AdapterConfig):
            return None
        return next((name for name, other in self.peft_config.items() if other is config and name != besides), None)

    def _take_safety_module_of_checkpoint(self, model: nn.Module, adapter_name: str) -> None:
        """
        Where a trainer resumes, or loads its best checkpoint: train on with the safety module that was saved there.

        The trainer has calibrated before it knew of the checkpoint, perhaps on other data or another device, and the
        weights to load stay out of the directions of the module that is saved with them, not of this one.
        """
        config = self.peft_config[adapter_name]
        folder = argument_of_caller("model_id", "load_adapter", lambda variables: variables.get("self") is model)
        if folder is not None:
            _refuse_best_of_another_adapter(Path(folder), adapter_name)
            if (Path(folder) / ADAPTER_CONFIG_FILE).is_file():
                check_scaling_of_file(Path(folder), self.model, adapter_name)
        if not isinstance(config, AdapterConfig) or folder is None or not (Path(folder) / CONFIG_FILE).is_file():
            return
        of_checkpoint = read_config(folder)
        if config.safety_module == str(Path(folder) / DEFAULT_FILE):
            return  # `load_for_training` has read it already
        saved = safety_module_of_checkpoint(folder, config, adapter_name, self.model)
        if saved is None:
            return
        for name, layer in salora_layers(self.model, adapter_name):
            replace_bases(layer, adapter_name, bases_of(saved, name))
        config.safety_module_in_force = saved
        take_options(config, of_checkpoint)

    # PEFT's seams for saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The weights as an ordinary LoRA adapter: effective, in float32, under LoRA's own keys."""
        if isinstance(config, SaLoRAConfig):
            check_saved_as_trained(model, adapter_name, config)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        put_effective_weights(selected, model, adapter_name)
        return selected

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: Always. What is saved is the difference to the initial model already.
        """
        raise ValueError(
            "path_initial_model_for_weight_conversion: leave it out. A SaLoRA adapter is saved as an ordinary LoRA "
            "adapter for the unchanged base model, whatever its init."
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Split effective weights into trained and start factors again, checking that they fit the safety module."""
        tuner = model if isinstance(model, SaLoRAModel) else getattr(model, "base_model", None)
        if isinstance(tuner, SaLoRAModel):
            tuner._take_safety_module_of_checkpoint(model, adapter_name)
        state_dict = dict(state_dict)
        factors, states = take_factors(state_dict, model, adapter_name)
        if factors and isinstance(tuner, SaLoRAModel):
            original = tuner._twins.get(adapter_name)
            if original in tuner.peft_config:
                check_that_more_than_a_copy_is_loaded(tuner.model, adapter_name, original, factors)
            tuner._first_batch_starts.settle(adapter_name)
        others = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return {**others, **factors, **states}


def _refuse_best_of_another_adapter(folder: Path, adapter_name: str) -> None:
    """
    Raises:
        ValueError: A trainer loads its best checkpoint into an adapter that was saved in a folder of its own within it:
            what the checkpoint itself holds is the adapter "default".
    """
    own = folder / adapter_name
    loads_best = argument_of_caller("best_safe_adapter_model_path", "_load_best_model", lambda _: True) is not None
    if loads_best and (own / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"load_best_model_at_end: the trainer would load the adapter 'default' of {folder} into {adapter_name!r}, "
            f"which is in {own}. Leave it at False, and after the training load the best one yourself: "
            f"model.load_adapter({str(own)!r}, {adapter_name!r})."
        )


def _refuse_loading_by_transformers(model: nn.Module) -> None:
    """
    Raises:
        ValueError: transformers' `load_adapter` makes this adapter, with a configuration that it was given. It knows no
            seam by which a tuner takes saved weights apart, and would leave the adapter at its start.
    """

    def is_of_transformers(variables: Mapping[str, Any]) -> bool:
        return variables.get("self") is model and "adapter_state_dict" in variables

    if argument_of_caller("peft_config", "load_adapter", is_of_transformers) is not None:
        raise ValueError(
            "peft_config: load_adapter of transformers cannot load weights into a SaLoRA adapter in training, which "
            "would stay at its start. Use salora_plugins.load_for_training(model, folder); for inference leave "
            "peft_config out."
        )
