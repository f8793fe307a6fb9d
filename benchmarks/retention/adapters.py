"""From a method to its adapter: the configuration, the safety module, and what happens to the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig

from salora_plugins import SafetyModule, SaLoRAConfig, calibrate
from salora_plugins.parametrization import project_out
from salora_plugins.ranks import Side

from ..small_model import load, lora_options
from .directions import make_known
from .experiment import Experiment
from .methods import Method
from .tasks import harmful_rows, harmless_rows


def peft_config(experiment: Experiment, method: Method, seed: int) -> LoraConfig:
    options = lora_options(method.target_modules)
    if method.layers == "upper half":
        layers = AutoConfig.from_pretrained(experiment.model).num_hidden_layers
        options["layers_to_transform"] = list(range(layers // 2, layers))
    if method.kind == "lora":
        return LoraConfig(**options)
    if method.kind == "pissa":
        return LoraConfig(**options, init_lora_weights="pissa")
    calibration = method.calibration
    if calibration is None:
        raise ValueError(f"{method}: SaLoRA needs a calibration")
    return SaLoRAConfig(
        **options,
        safety_rank=calibration.safety_rank,
        input_safety_rank=calibration.input_safety_rank,
        init=method.init,
        safety_module=safety_module(experiment, method),
        seed=seed,
    )


def safety_module(experiment: Experiment, method: Method) -> Path:
    """The file of a method's safety module; methods that differ in training only share one."""
    calibration = method.calibration
    if calibration is None:
        raise ValueError(f"{method}: it has no calibration")
    parts = [
        *(method.targets, calibration.safety_data, calibration.positions),
        f"{calibration.safety_rank}-{calibration.input_safety_rank}",
    ]
    if calibration.directions != "strongest":
        parts.append(calibration.directions)
    path = experiment.out / "safety-modules" / f"{'-'.join(parts)}.safetensors"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = harmful_rows(experiment, calibration.safety_data)
    model = load(experiment.model)
    options: dict[str, Any] = {}
    if calibration.directions != "strongest":
        make_known()
        harmless = harmless_rows(experiment)
        options = {
            "basis_method": calibration.directions,
            "utility_data": harmless,
            "num_utility_samples": len(harmless),
            "calibration_engine": "exact",  # the Gram matrix itself is compared, not a sketch of it
        }
    calibrate(
        model,
        experiment.tokenizer,
        target_modules=method.target_modules,
        safety_data=rows,
        safety_rank=calibration.safety_rank,
        input_safety_rank=calibration.input_safety_rank,
        safety_positions=calibration.positions,
        num_safety_samples=len(rows),
        **options,
    ).save(path)
    return path


@contextmanager
def changed_afterwards(experiment: Experiment, model: nn.Module, method: Method) -> Iterator[None]:
    """For the methods that train LoRA and project its update afterwards, or scale it: the model with the change."""
    module = SafetyModule.load(safety_module(experiment, method)) if method.projected else None
    if module is None and method.scale is None:
        yield
        return
    trained: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not (isinstance(layer, nn.Linear) and name.endswith(("lora_A.default", "lora_B.default"))):
                continue
            weight = layer.weight
            trained[weight] = weight.clone()
            on_input = ".lora_A." in f".{name}"
            if module is not None:
                base_name = name.removeprefix("base_model.model.").rsplit(".", 2)[0]
                side: Side = "input" if on_input else "output"
                weight.copy_(project_out(weight, module.sides[side].bases[base_name].to(weight.device), side))
            elif method.scale is not None and not on_input:
                weight *= method.scale
        yield
        for weight, value in trained.items():
            weight.copy_(value)


def cap_norms(model: nn.Module, cap: float) -> None:
    """Scale the update of every layer back to ‖ΔW‖ = cap ‖W‖ (Frobenius) where it is beyond."""
    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            a: Any = layer.lora_A["default"]  # linear layers, whose weights are computed with SaLoRA
            b: Any = layer.lora_B["default"]
            base: Any = layer.get_base_layer()
            down, up = a.weight, b.weight
            # ‖B A‖² = tr(BᵀB AAᵀ), without the product
            norm = layer.scaling["default"] * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
            for trained in b.parameters():
                trained *= (cap * base.weight.norm() / norm).clamp(max=1)
