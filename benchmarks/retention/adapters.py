"""From a method to its adapter: the configuration, the safety module, and what happens to the update."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig

from salora_plugins import SaLoRAConfig, apply_safe_lora, calibrate, project_adapter, restore

from ..runs import Run
from ..small_model import load, lora_options
from .directions import DIRECTIONS, make_known
from .experiment import Experiment
from .methods import Calibration, Method
from .tasks import harmful_rows, harmless_rows, refusals_and_answers


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
    if calibration.basis_method != "salora":
        parts.append(calibration.basis_method)
    path = experiment.out / "safety-modules" / f"{'-'.join(parts).replace(':', '-')}.safetensors"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    model = load(experiment.model)
    calibrate(
        model,
        experiment.tokenizer,
        target_modules=method.target_modules,
        safety_rank=calibration.safety_rank,
        input_safety_rank=calibration.input_safety_rank,
        **data_options(experiment, calibration),
    ).save(path)
    return path


def data_options(experiment: Experiment, calibration: Calibration) -> dict[str, Any]:
    """What the directions are computed from, as options of `calibrate`."""
    make_known()
    if calibration.basis_method == "weight-delta":
        return {"basis_method": "weight-delta", "unaligned_model": needed(experiment, "unaligned", "weight-delta")}
    if calibration.basis_method == "sae":
        return {
            "basis_method": "sae",
            "sae": needed(experiment, "sae", "sae"),
            "contrastive_data": refusals_and_answers(experiment, needed(experiment, "unaligned", "sae")),
        }
    rows = harmful_rows(experiment, calibration.safety_data)
    options: dict[str, Any] = {
        "safety_data": rows,
        "num_safety_samples": len(rows),
        "safety_positions": calibration.positions,
        "basis_method": calibration.basis_method,
    }
    if calibration.basis_method != "salora":
        harmless = harmless_rows(experiment)
        options |= {"utility_data": harmless, "num_utility_samples": len(harmless)}
    if calibration.basis_method in DIRECTIONS:
        options["calibration_engine"] = "exact"  # the Gram matrix itself is compared, not a sketch of it
    return options


def needed(experiment: Experiment, option: str, method: str) -> str:
    """An option of the command line that a method cannot do without."""
    value = getattr(experiment, option)
    if value is None:
        sys.exit(f"--methods {method}: give --{option}, which it needs")
    return str(value)


def write_repaired(experiment: Experiment, method: Method, source: Path, destination: Path) -> Run:
    """Write what a repair makes of a LoRA adapter, as a plain LoRA adapter; returns what its report says in short."""
    if method.repair == "projected":
        report = project_adapter(source, safety_module(experiment, method), destination, overwrite=True)
        return {"removed_share": report.removed_share}
    if method.repair == "restored":
        return restored(experiment, method, source, destination, unsafe=None)
    unaligned = needed(experiment, "unaligned", str(method.repair))
    if method.repair == "restored-unaligned":
        return restored(experiment, method, source, destination, unsafe=unaligned)
    projection = apply_safe_lora(source, unaligned, experiment.model, out=destination, overwrite=True)
    cosines = [module.cosine for module in projection.modules.values() if module.cosine is not None]
    sizes = [module.size for module in projection.modules.values() if module.projected and module.size is not None]
    return {
        "projected": len(projection.projected),
        "modules": len(projection.modules),
        "cosines": [min(cosines), max(cosines)],
        "size_left": [min(sizes), max(sizes)] if sizes else None,
    }


@contextmanager
def changed_afterwards(model: nn.Module, method: Method) -> Iterator[None]:
    """For the method that trains LoRA and scales its update afterwards: the model with the change."""
    if method.scale is None:
        yield
        return
    trained: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith("lora_B.default"):
                trained[layer.weight] = layer.weight.clone()
                layer.weight.mul_(method.scale)
        yield
        for weight, value in trained.items():
            weight.copy_(value)


def restored(experiment: Experiment, method: Method, source: Path, destination: Path, unsafe: str | None) -> Run:
    """`salora restore`: one plain LoRA of the adapter and its repair."""
    report = restore(
        source,
        experiment.model,
        destination,
        unsafe=unsafe,
        safety_module=safety_module(experiment, method),
        overwrite=True,
    )
    ranks = [module.directions for module in report.modules.values()]
    return {"safety_ranks": [min(ranks), max(ranks)]}


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
