"""Safe LoRA (arXiv 2405.16833): an adapter's layers that move away from the alignment are projected onto it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapters.certificate import product_norm
from ..adapters.model_card import PACKAGE, TO_LOAD, table
from ..adapters.saved import SavedAdapter, check_plain_lora
from ..adapters.writing import check_destination, check_dtype, in_dtype, write_adapter
from ..models.checkpoint_weights import weight_delta, weights_of
from ..options import check_number, check_real
from ..support.module_names import listed
from ..support.tables import TableOfNames
from ..support.texts import markdown, one_line

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class ModuleAlignment:
    """One module's update B A beside its projection C B A."""

    cosine: float | None
    """Of C B A with B A (Frobenius); None where there is no update, or no difference between the two models."""
    size: float | None
    """||C B A||_F / ||B A||_F: what projecting leaves of the update's size. C is no projector, see [`apply_safe_lora`];
    None as for the cosine."""
    delta_norm: float
    """||V||_F, of the difference between the two models' weights."""
    projected: bool
    """Whether B became C B."""


@dataclass(frozen=True)
class SafeLoRAReport:
    """The outcome of [`apply_safe_lora`]."""

    modules: dict[str, ModuleAlignment]
    threshold: float | None
    """Modules whose cosine is below it were projected; None where their number was given."""
    num_layers: int | None
    """So many modules, of the smallest cosines, were projected."""
    not_covered: tuple[str, ...] = ()
    """What else the adapter has trained, which stays: tensors of its file, or options of a model's adapter."""

    @property
    def projected(self) -> list[str]:
        """The modules whose B became C B."""
        return [name for name, module in self.modules.items() if module.projected]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def _rule(self) -> str:
        if self.num_layers is not None:
            found = len(self.projected)
            if found < self.num_layers:
                return f"all that have a cosine, {found} modules and not the {self.num_layers} that were asked for"
            return f"the {found} modules of the smallest cosines"
        return f"modules with a cosine under {self.threshold:g}"

    def summary(self) -> str:
        """A few lines for people."""
        lines = [f"{len(self.projected)} of {len(self.modules)} modules projected: {self._rule}."]
        sizes = [module.size for module in self.modules.values() if module.projected and module.size is not None]
        if sizes:
            lines.append(f"Of the size of their updates, {min(sizes):.1%} to {max(sizes):.1%} is left.")
        if unchanged := [name for name, module in self.modules.items() if not module.delta_norm]:
            lines.append(f"The two models do not differ in {listed(unchanged)}, left as they were.")
        if self.not_covered:
            lines.append(f"Not projected, though the adapter has trained it: {one_line(listed(self.not_covered))}.")
        return "\n".join(lines)

    def table(self) -> TableOfNames:
        """One row a module."""
        result = TableOfNames(
            "Module",
            ("cosine", "left", "projected"),
            "Cosine: of the update with its projection. Left: the projection's size over the update's.",
        )
        for name, module in self.modules.items():
            cosine = "-" if module.cosine is None else f"{module.cosine:.4f}"
            size = "-" if module.size is None else f"{module.size:.2%}"
            result.add_row(name, cosine, size, "yes" if module.projected else "")
        return result

    def card_section(self) -> str:
        """The section of the model card of the adapter."""
        known = [module.cosine for module in self.modules.values() if module.cosine is not None]
        rows = {
            "Projected": f"{len(self.projected)} of {len(self.modules)} modules: {self._rule}",
            "Cosines": f"{min(known):.3f} to {max(known):.3f}",
        }
        if self.not_covered:
            rows["Not projected"] = markdown(listed(self.not_covered))
        return f"""
## Safe LoRA

A LoRA adapter, some of whose layers {PACKAGE} has projected onto the difference between an aligned model and its base
(`salora safe-lora`, [Safe LoRA](https://arxiv.org/abs/2405.16833)).

{table(rows)}

{TO_LOAD}
"""


def apply_safe_lora(
    adapter: str | os.PathLike | PeftModel,
    base: str | os.PathLike | nn.Module,
    aligned: str | os.PathLike | nn.Module,
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    out: str | os.PathLike | None = None,
    adapter_name: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> SafeLoRAReport:
    """
    Project the layers of a LoRA adapter that move away from the alignment (Safe LoRA, arXiv 2405.16833).

    With V = W_aligned - W_base and C = V V^T / ||V||_F, a layer whose cosine <C B A, B A> / (||C B A|| ||B A||) is
    under the threshold gets C B in the place of B. C is the paper's approximation of the projector onto the columns of
    V, and the published code's. It is none: its eigenvalues are s_i^2 / ||V||_F, those of a small difference small, so
    that C B has another size than B, as a rule a much smaller one; the report says which.

    Parameters are matched by the modules' names (the published code takes them in their order, and pairs the wrong ones
    where a layer has a bias). C is never formed: C B = V (V^T B) / ||V||_F, a layer at a time, in float64.

    Args:
        adapter: A folder with a saved LoRA adapter, or a [`~peft.PeftModel`] that carries one, whose `lora_B` weights
            are changed where they are.
        base: The model before its alignment: a folder, a hub repository (safetensors, read a tensor at a time), or a
            model in memory.
        aligned: The model after it, likewise.
        threshold: Modules with a smaller cosine are projected; 0.5 where `num_layers` is not given either.
        num_layers: Instead: so many modules, those of the smallest cosines.
        out: The folder to write; for an adapter that is a folder.
        adapter_name: Which of a model's adapters; None: the active one.
        dtype: "float32", "bfloat16" or "float16" of the written weights.
        overwrite: Replace an adapter that `out` holds already; all other files there stay.
        trust_remote_code: Run model code from the two repositories.

    Raises:
        FileNotFoundError, FileExistsError: See the message.
        ValueError: Options contradict each other, the adapter is not two plain factors per linear layer, the models
            have no such layers or other shapes, or do not differ in any of them that the adapter changes.

    Example:

        >>> apply_safe_lora("adapter", "org/model", "org/model-chat", threshold=0.5, out="safe-adapter")
        >>> apply_safe_lora(peft_model, base, aligned, num_layers=10)  # in memory
    """
    check_dtype(dtype)
    threshold = _threshold(threshold, num_layers)
    weights: dict[str, Tensor] = {}
    if isinstance(adapter, PeftModel):
        if out is not None:
            raise ValueError("out: a model's adapter is changed in memory; save it with model.save_pretrained.")
        saved, weights = _of_model(adapter, adapter_name)
        beside = _trained_beside(saved.config)
        where = Path(f"adapter {adapter_name or adapter.active_adapter!r} of the model")
    else:
        if out is None or adapter_name is not None:
            raise ValueError("Give `out`, the folder to write, and no adapter_name, for an adapter that is a folder.")
        where, out = Path(adapter).expanduser(), Path(out).expanduser()
        check_destination(where, out, overwrite)
        saved = SavedAdapter.load(where)
        beside = saved.trained_beside
    check_plain_lora(saved, where, purpose="projected")
    most = len(saved.factors)
    if num_layers is not None and num_layers > most:
        raise ValueError(f"num_layers={num_layers}: give a number from 1 to {most}, the adapter's modules.")

    report, new = _project(saved, base, aligned, threshold, num_layers, trust_remote_code)
    report = replace(report, not_covered=beside)
    if out is not None:
        _write(saved, new, Path(out), dtype, report)
    with torch.no_grad():
        for name in weights.keys() & new.keys():
            weights[name].copy_(new[name])
    return report


def _threshold(threshold: float | None, num_layers: int | None) -> float | None:
    """
    The default where nothing is given.

    Raises:
        ValueError: Both are given, or the threshold is no cosine, or the number none of modules.
    """
    if num_layers is not None:
        if threshold is not None:
            raise ValueError("threshold and num_layers are both set. Choose one of them.")
        check_number("num_layers", num_layers, 1)
        return None
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    check_real("threshold", threshold, "a cosine, such as 0.5", lambda number: -1 <= number <= 1)
    return threshold


def _project(
    saved: SavedAdapter,
    base: str | os.PathLike | nn.Module,
    aligned: str | os.PathLike | nn.Module,
    threshold: float | None,
    num_layers: int | None,
    trust_remote_code: bool,
) -> tuple[SafeLoRAReport, dict[str, Tensor]]:
    """
    The report, and module name -> C B of the modules that are projected.

    Raises:
        ValueError: The models do not differ, or do not fit, or the adapter has no update where they differ.
    """
    before = weights_of(base, saved.factors, option="base", trust_remote_code=trust_remote_code)
    after = weights_of(aligned, saved.factors, option="aligned", trust_remote_code=trust_remote_code)
    projected = {}
    for name, (a, b) in saved.factors.items():
        weight = after.weight(name)
        delta = weight_delta(weight, before.weight(name), name)
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"The adapter's update of {name!r} has the shape {(b.shape[0], a.shape[1])}, the models' weight "
                f"{tuple(weight.shape)}. Give the models that the adapter belongs to."
            )
        projected[name] = _projected(a, b, delta)
    modules = _chosen({name: module for name, (module, _) in projected.items()}, threshold, num_layers)
    if not any(module.delta_norm for module in modules.values()):
        raise ValueError(
            f"base and aligned have the same weights in all {len(modules)} modules of the adapter, so that nothing "
            "tells where the alignment is. Give the model before its alignment, and the one after it."
        )
    if all(module.cosine is None for module in modules.values()):
        raise ValueError(
            f"The adapter has no update in the modules where base and aligned differ (B A is zero, of {len(modules)} "
            "modules in all), so that there is nothing to project. Give an adapter that was trained."
        )
    report = SafeLoRAReport(modules, threshold, num_layers)
    return report, {name: projected[name][1] for name in report.projected}


def _of_model(model: PeftModel, adapter_name: str | None) -> tuple[SavedAdapter, dict[str, Tensor]]:
    """
    The adapter of a model in the form of a saved one, and its lora_B by module name.

    Raises:
        ValueError: There is no such adapter, or it is merged into the weights.
    """
    chosen = adapter_name or model.active_adapter
    if not isinstance(chosen, str) or chosen not in model.peft_config:
        raise ValueError(f"adapter_name={chosen!r}: choose one of {', '.join(map(repr, model.peft_config))}.")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if chosen in layer.merged_adapters:
            raise ValueError(f"The adapter {chosen!r} is merged into the model. Call model.unmerge_adapter() first.")
        if chosen in layer.lora_embedding_A:
            raise ValueError(f"The adapter {chosen!r} has an embedding, {name!r}; only linear layers can be projected.")
        if chosen in layer.lora_A:
            parts: Any = layer.lora_A[chosen], layer.lora_B[chosen]
            a, b = (part.weight for part in parts)
            factors[name], weights[name] = (a.detach().cpu(), b.detach().cpu()), b
    return SavedAdapter(model.peft_config[chosen].to_dict(), factors, {}), weights


def _trained_beside(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a configuration trains beside the factors."""
    options = [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    options += ["trainable_token_indices"] if config.get("trainable_token_indices") else []
    return (*(config.get("modules_to_save") or ()), *options)


def _projected(a: Tensor, b: Tensor, delta: Tensor | None) -> tuple[ModuleAlignment, Tensor]:
    """
    What is to be known of a module's update, and C B.

    Args:
        a: lora_A, (k, d_in).
        b: lora_B, (d_out, k).
        delta: V, (d_out, d_in); None where the models do not differ.
    """
    if delta is None:
        return ModuleAlignment(None, None, 0.0, False), b
    a, b = a.double(), b.double()
    norm = torch.linalg.norm(delta).item()
    new = delta @ (delta.T @ b) / norm
    before, after = product_norm(a, b), product_norm(a, new)
    if not before:
        return ModuleAlignment(None, None, norm, False), new
    # <X A, Y A>_F = <X^T Y, A A^T>_F for X and Y of k columns
    cosine = ((new.T @ b) * (a @ a.T)).sum().item() / (before * after) if after else 0.0
    return ModuleAlignment(min(1.0, cosine), after / before, norm, False), new


def _chosen(
    modules: Mapping[str, ModuleAlignment], threshold: float | None, num_layers: int | None
) -> dict[str, ModuleAlignment]:
    """With those marked that are to be projected; of equal cosines, the first in the file come first."""
    known = {name: module.cosine for name, module in modules.items() if module.cosine is not None}
    if num_layers is not None:
        chosen = set(sorted(known, key=lambda name: known[name])[:num_layers])
    else:
        chosen = {name for name, cosine in known.items() if threshold is not None and cosine < threshold}
    return {name: replace(module, projected=name in chosen) for name, module in modules.items()}


def _write(saved: SavedAdapter, new: Mapping[str, Tensor], out: Path, dtype: str, report: SafeLoRAReport) -> None:
    factors = {
        name: (in_dtype(a, dtype, name), in_dtype(new.get(name, b), dtype, name))
        for name, (a, b) in saved.factors.items()
    }
    write_adapter(replace(saved, factors=factors), out, card=lambda digest: report.card_section(), tags=("lora",))
