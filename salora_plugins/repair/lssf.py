"""LSSF (arXiv 2602.00038): giving a fine-tuned model its refusals back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapters.certificate import norms, product_norm
from ..adapters.saved import ADAPTER_CONFIG_FILE, PREFIX, SavedAdapter, check_plain_lora
from ..adapters.writing import check_destination, check_dtype, in_dtype, write_adapter
from ..calibration import calibrate
from ..models.checkpoint_weights import CheckpointWeights, LoadedWeights, weight_delta
from ..models.fingerprint import check_belongs
from ..models.loading import LoadingOptions, load_model, load_tokenizer
from ..models.weights import base_layer, is_quantized, layer_features
from ..options import check_number, check_real
from ..safety_module import SafetyModule
from ..support.hub import hub_file, is_model_name
from ..support.module_names import listed
from .fusion import SafetyVector, at_rank
from .merged_model import check_folder, check_mergeable, untied_head, write_merged
from .restore_report import FORMS, Form, ModuleRestoration, RestoreReport
from .strength import Strength, StrengthSearch
from .strength_search import Trial, refusal_judge, search_strength
from .updates import Factors

ENTROPY = 0.85
"""The paper's share of the entropy of a layer's spectrum that its safety directions make up."""

Source = str | os.PathLike


def restore(
    finetuned: Source,
    aligned: Source | PreTrainedModel,
    out: Source,
    *,
    unsafe: Source | None = None,
    form: str | None = None,
    alpha: float = 1.0,
    alpha_1: float = 1.0,
    entropy: float | None = None,
    max_rank: int | None = None,
    search: StrengthSearch | None = None,
    safety_module: SafetyModule | Source | None = None,
    target_modules: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    dtype: str = "float32",
    overwrite: bool = False,
    loading: LoadingOptions | None = None,
    **calibration: Any,
) -> RestoreReport:
    """
    Give a model that was fine-tuned already its refusals back, without training (LSSF, arXiv 2602.00038).

    Z = W X of the aligned model on harmful requests with its refusals (the response's tokens), U S V^T = SVD(Z). A
    layer's safety directions are the first r columns of U, r being the least number whose part of the spectrum's
    entropy is `entropy` (see `salora_plugins.ranks.rank_for_entropy`, also for what sketches make of it). With
    alpha_i = 1 + (alpha_1 - 1) (s_i - s_r) / (s_1 - s_r) and U'_i = alpha_i U_i, the weights become
    W_finetuned + alpha U' U'^T (W_safe - W_unsafe).

    The unsafe counterpart may be an adapter of the aligned model that lost its refusals, such as the fine-tuned one
    itself (the default): then the difference is -s B A of it, which is never formed, and the repair has no higher rank
    than it. With alpha = alpha_1 = 1 that takes the safety directions out of the fine-tuned update, as
    `project_adapter` does on its output side. Or it is a model: the base before its alignment, or a fine-tuned one,
    read a tensor at a time.

    Args:
        finetuned: The fine-tuned model: a folder with a LoRA adapter of the aligned model, of SaLoRA or any other; or a
            whole model, a folder or a hub repository.
        aligned: The aligned model that it was made from, a folder or a hub repository; or itself.
        out: The folder to write.
        unsafe: An adapter's folder, or a model. None: the fine-tuned one.
        form: "combined": one plain LoRA of adapter and repair, the default for an adapter; "repair": that alone, a
            plain LoRA to go on the fine-tuned model, the default for a model; "merged": a whole model.
        alpha: Of all directions.
        alpha_1: Of a layer's first direction, its last one having 1.
        entropy: The share that decides how many safety directions a layer has; 0.85. Not with a `safety_module`.
        max_rank: Repairs of a higher rank are cut to it, in the best approximation; the report says what is lost.
        search: Find alpha and alpha_1 by a sweep.
        safety_module: The safety directions, computed before (`salora calibrate --safety-rank entropy:0.85`). Its
            output side is used as it is.
        target_modules: Which layers to repair where nothing else says it, both being models; "all-linear".
        tokenizer: The aligned model's; None: the one beside it.
        dtype: "float32", "bfloat16" or "float16" of a written adapter; a merged model keeps its own.
        overwrite: Replace an adapter that `out` holds already; all other files there stay. A merged model is written
            into a new folder only.
        loading: How models are loaded.
        calibration: Options of `calibrate`: safety_data, num_safety_samples, calibration_batch_size, seed, ...

    Raises:
        FileNotFoundError, FileExistsError: See the message.
        CalibrationError, DataError: The safety directions cannot be computed.
        ValueError: Options contradict each other, the adapter is not two plain factors per linear layer, models and
            adapters do not belong together, or nothing differs between the safe and the unsafe weights.
    """
    if isinstance(aligned, PeftModel):
        raise ValueError(
            "aligned: the model carries an adapter. Give its folder or repository, or load it again without one."
        )
    return _Restoration(
        finetuned=os.path.expanduser(finetuned),
        aligned=aligned,
        out=Path(out).expanduser(),
        unsafe=None if unsafe is None else os.path.expanduser(unsafe),
        form=form,
        strength=Strength(alpha, alpha_1),
        entropy=entropy,
        max_rank=max_rank,
        search=search,
        safety_module=safety_module,
        target_modules=target_modules,
        tokenizer=tokenizer,
        dtype=dtype,
        overwrite=overwrite,
        loading=loading or LoadingOptions(),
        calibration=calibration,
    ).run()


@dataclass(frozen=True)
class _Restoration:
    """What `restore` is asked for."""

    finetuned: str
    aligned: Source | PreTrainedModel
    out: Path
    unsafe: str | None
    form: str | None
    strength: Strength
    entropy: float | None
    max_rank: int | None
    search: StrengthSearch | None
    safety_module: SafetyModule | Source | None
    target_modules: str | Sequence[str] | None
    tokenizer: Any
    dtype: str
    overwrite: bool
    loading: LoadingOptions
    calibration: Mapping[str, Any]

    def run(self) -> RestoreReport:
        """Compute the repair and write it."""
        self._check_options()
        adapter = _adapter(self.finetuned, "finetuned")
        unsafe_adapter = adapter if self.unsafe is None else _adapter(self.unsafe, "unsafe")
        form = self._form(adapter)
        self._check_inputs(adapter, unsafe_adapter, form)

        model = self.aligned
        if not isinstance(model, PreTrainedModel):
            model = load_model(os.fspath(model), self.loading)
        self._check_whole_model(adapter, model, ())
        names = _names(model, adapter, unsafe_adapter)
        with untied_head(model, [*names, *(adapter.factors if adapter is not None else ())]):
            return self._restored(model, adapter, unsafe_adapter, names, form)

    def _restored(
        self,
        model: PreTrainedModel,
        adapter: SavedAdapter | None,
        unsafe_adapter: SavedAdapter | None,
        names: Sequence[str],
        form: Form,
    ) -> RestoreReport:
        """
        Args:
            model: The aligned model.
            adapter: The fine-tuned one; None for a model.
            unsafe_adapter: What lost the refusals; None for a model.
            names: The modules of the adapter that lost the refusals; none of a model.
            form: Of what is written.
        """
        beside = () if adapter is None else _trained_beside(adapter, model)
        if beside and (self.search is not None or form == "merged"):
            raise ValueError(
                f"{self.finetuned}: has trained more than two factors per linear layer ({beside[0]}), with which it "
                "can neither be merged here nor searched. Write form='combined' at a given strength."
            )
        tokenizer, folder = self.tokenizer, model.config._name_or_path
        if tokenizer is None and folder:
            tokenizer = load_tokenizer(folder, self.loading)
        targets = names or self.target_modules
        directions = self._directions(model, tokenizer, targets)
        self._check_whole_model(adapter, model, directions.bases)
        unsafe = self.finetuned if self.unsafe is None else self.unsafe
        vectors = _safety_vectors(model, directions, unsafe_adapter, unsafe)
        if adapter is None and (self.search is not None or form == "merged"):
            model = load_model(self.finetuned, self.loading.without_revision())
        if form == "merged":
            check_mergeable(model, {**({} if adapter is None else adapter.factors), **vectors})
        strength, trials = self._strength(model, tokenizer, adapter, vectors)
        repairs = _Repairs(vectors, strength, self.max_rank)
        report = RestoreReport(
            form=form,
            strength=strength,
            modules={name: _described(name, directions, repairs, adapter) for name in directions.bases},
            unsafe=unsafe if self.unsafe is not None else f"the fine-tuned one itself, {unsafe}",
            search=self.search,
            trials=tuple(trials),
            not_covered=() if adapter is None else (*_outside(adapter, directions), *beside),
        )
        if form == "merged":
            changed = {**({} if adapter is None else adapter.factors), **vectors}
            parts = ((name, _parts(name, adapter, repairs)) for name in changed)
            write_merged(model, parts, self.out, tokenizer=tokenizer, section=report.card_section(directions))
        else:
            base_model = self.finetuned if adapter is None else None
            write_adapter(
                _as_adapter(model, adapter, repairs, form, base_model, self.dtype),
                self.out,
                card=lambda digest: report.card_section(directions),
                tags=("lora",),
                safety_module=directions if form == "combined" else None,
            )
        return report

    def _check_options(self) -> None:
        check_dtype(self.dtype)
        self.strength.check()
        if self.entropy is not None:
            check_real("entropy", self.entropy, f"a share between 0 and 1, such as {ENTROPY}", lambda s: 0 < s < 1)
        if self.max_rank is not None:
            check_number("max_rank", self.max_rank, 1)
        if self.search is not None:
            if self.strength != Strength():
                raise ValueError("alpha, alpha_1: a search is given, which finds them. Give one of the two.")
            self.search.check()
            refusal_judge(self.search)
        given = [*(["entropy"] if self.entropy is not None else []), *self.calibration]
        if self.safety_module is not None and given:
            raise ValueError(f"{given[0]}: a safety_module is given, whose directions are used. Give one of the two.")
        if fixed := sorted({"safety_rank", "input_safety_rank"}.intersection(self.calibration)):
            raise ValueError(f"{fixed[0]}: the safety directions follow from `entropy`; or give a safety_module.")

    def _form(self, adapter: SavedAdapter | None) -> Form:
        possible: list[Form] = [name for name in FORMS if adapter is not None or name != "combined"]
        if self.form is None:
            return possible[0]
        for name in possible:
            if name == self.form:
                return name
        reason = ", since the fine-tuned model is no adapter to combine with" if self.form in FORMS else ""
        raise ValueError(f"form={self.form!r}: choose one of {', '.join(possible)}{reason}.")

    def _check_inputs(self, adapter: SavedAdapter | None, unsafe_adapter: SavedAdapter | None, form: Form) -> None:
        if form == "merged":
            check_folder(self.out)
        else:
            check_destination(Path(self.finetuned), self.out, self.overwrite)
        if self.target_modules is not None and (adapter or unsafe_adapter):
            raise ValueError("target_modules: an adapter is given, whose modules are repaired. Leave it out.")

    def _check_whole_model(self, adapter: SavedAdapter | None, model: PreTrainedModel, names: Iterable[str]) -> None:
        """
        Of a fine-tuned model that is no adapter, the headers of its files: a repair alone is written without it.

        Raises:
            FileNotFoundError, ValueError: See `CheckpointWeights`.
        """
        if adapter is None:
            CheckpointWeights(self.finetuned, model, names, option="finetuned")

    def _directions(self, model: PreTrainedModel, tokenizer: Any, targets: str | Sequence[str] | None) -> SafetyModule:
        """
        The safety directions of the layers' outputs.

        Args:
            model: The aligned model.
            tokenizer: Its tokenizer.
            targets: Names of modules, or what `target_modules` takes; None: all linear layers, or those of the safety
                module.

        Raises:
            SafetyModuleError: The safety module is another model's, or lacks a module.
        """
        if self.safety_module is None:
            return calibrate(
                model,
                tokenizer,
                target_modules=targets or "all-linear",
                safety_rank=f"entropy:{ENTROPY if self.entropy is None else self.entropy}",
                input_safety_rank=0,
                **{"safety_positions": "response", **self.calibration},
            )
        found = self.safety_module
        if not isinstance(found, SafetyModule):
            found = SafetyModule.load(found)
        if not found.protects:
            raise ValueError(
                "safety_module: these are the directions that a SAILS adapter starts in, and none of refusals. Leave "
                "it out, or give a safety module."
            )
        if isinstance(targets, str):
            raise ValueError("target_modules: give names of modules beside a safety_module, or leave it out.")
        names = list(found.bases)
        if targets is not None:
            ends = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
            if missing := sorted(target for target, matched in ends.items() if not matched):
                raise ValueError(
                    f"safety_module: has no directions for {listed(missing)}. Calibrate again with these modules."
                )
            names = [name for name in names if any(name in matched for matched in ends.values())]
        check_belongs(found, model, names)
        return found.restricted_to({"output": {name: found.bases[name].shape[1] for name in names}})

    def _strength(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        adapter: SavedAdapter | None,
        vectors: Mapping[str, SafetyVector],
    ) -> tuple[Strength, list[Trial]]:
        """The strength that was asked for, or found by the search, and what that has measured."""
        if self.search is None:
            return self.strength, []

        def repairs(strength: Strength) -> dict[str, list[Factors]]:
            found = _Repairs(vectors, strength, self.max_rank)
            return {name: [_as_float32(found.of(name)[0])] for name in vectors}

        own = {} if adapter is None else {name: [_as_float32(_update(adapter, name))] for name in adapter.factors}
        return search_strength(self.search, model, tokenizer, own, repairs)


@dataclass(frozen=True)
class _Repairs:
    """What is added, made anew for each layer that is asked for, so that only one layer's float64 factors are there."""

    vectors: Mapping[str, SafetyVector]
    """Of the modules whose safe and unsafe weights differ."""
    strength: Strength
    max_rank: int | None

    def of(self, name: str) -> tuple[Factors, float]:
        """The repair of a module, float64, and what its truncation to `max_rank` has lost."""
        return at_rank(self.vectors[name].repair(self.strength), self.max_rank)


def _adapter(source: str, option: str) -> SavedAdapter | None:
    """
    None for what is a model.

    Raises:
        FileNotFoundError: It is neither a folder nor a name of the hub.
        ValueError: It is an adapter of the hub, or not two plain factors per linear layer.
    """
    folder = Path(source)
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        if not folder.is_dir():
            if not is_model_name(source.partition("@")[0]):
                raise FileNotFoundError(f"{option}={source!r}: there is no such folder. Check the path.")
            if _is_adapter_of_hub(source, option):
                raise ValueError(
                    f"{option}={source!r} is an adapter on the hub. Download it first (`hf download`), and name its "
                    "folder."
                )
        return None
    saved = SavedAdapter.load(folder)
    check_plain_lora(saved, folder, purpose="restored")
    return saved


def _is_adapter_of_hub(name: str, option: str) -> bool:
    try:
        hub_file(name, ADAPTER_CONFIG_FILE, option=option)
    except FileNotFoundError:
        return False
    return True


def _names(model: nn.Module, adapter: SavedAdapter | None, unsafe_adapter: SavedAdapter | None) -> list[str]:
    """
    The modules of the unsafe adapter, or else of the fine-tuned one; none where both are models.

    Raises:
        ValueError: They are not those of the model.
    """
    for saved in (adapter, unsafe_adapter):
        for name, (a, b) in ({} if saved is None else saved.factors).items():
            try:
                features = layer_features(model.get_submodule(name))
            except AttributeError as error:
                raise ValueError(
                    f"aligned: {type(model).__name__} has no linear layer {name!r}, which the adapter changes. Give "
                    "the model that the adapter belongs to."
                ) from error
            if features != (a.shape[1], b.shape[0]):
                raise ValueError(
                    f"aligned: {name!r} has {features[0]} inputs and {features[1]} outputs, the adapter's update "
                    f"{a.shape[1]} and {b.shape[0]}. Give the model that the adapter belongs to."
                )
    chosen = unsafe_adapter or adapter
    return [] if chosen is None else [name for name, _ in model.named_modules() if name in chosen.factors]


def _safety_vectors(
    model: PreTrainedModel,
    directions: SafetyModule,
    unsafe_adapter: SavedAdapter | None,
    unsafe: str,
) -> dict[str, SafetyVector]:
    """
    Of the modules whose safe and unsafe weights differ.

    Raises:
        ValueError: None do.
    """
    found = {}
    if unsafe_adapter is not None:
        for name, basis in directions.bases.items():
            a, b = unsafe_adapter.factors[name]
            update = a, unsafe_adapter.scaling(name) * b.double()
            vector = SafetyVector.of_adapter(basis, directions.singular_values[name], update)
            if vector.norm:
                found[name] = vector
    else:
        names = list(directions.bases)
        if quantized := [name for name in names if is_quantized(model.get_submodule(name))]:
            raise ValueError(
                f"aligned: {quantized[0]!r} is quantized, so that its difference to the unsafe model's weight would be "
                "mostly rounding. Load the model unquantized, or give an adapter as the unsafe counterpart."
            )
        safe = LoadedWeights(model, names, option="aligned")
        weights = CheckpointWeights(unsafe, model, names, option="unsafe")
        for name, basis in directions.bases.items():
            delta = weight_delta(safe.weight(name), weights.weight(name), name)
            if delta is not None:
                found[name] = SafetyVector.of_difference(basis, directions.singular_values[name], delta)
    if not found:
        raise ValueError(
            f"unsafe={unsafe!r} has the aligned model's weights in all {len(directions.bases)} modules, so that there "
            "is nothing to put back. Give an adapter or a model that lost its refusals, or the base before alignment."
        )
    return found


def _update(saved: SavedAdapter, name: str) -> Factors:
    """A and s B of a module, float64."""
    a, b = saved.factors[name]
    return a.double(), saved.scaling(name) * b.double()


def _as_float32(update: Factors) -> Factors:
    a, b = update
    return a.float(), b.float()


def _parts(name: str, adapter: SavedAdapter | None, repairs: _Repairs) -> list[Factors]:
    """The updates of a module's aligned weight, or of its fine-tuned one where that is no adapter's, float64."""
    own = [] if adapter is None or name not in adapter.factors else [_update(adapter, name)]
    return own + ([repairs.of(name)[0]] if name in repairs.vectors else [])


def _outside(adapter: SavedAdapter, directions: SafetyModule) -> list[str]:
    """The adapter's modules that have no safety directions."""
    return [name for name in adapter.factors if name not in directions.bases]


def _trained_beside(adapter: SavedAdapter, model: nn.Module) -> list[str]:
    """
    The keys of what an adapter holds beside its factors, without copies of the model's own weights: PEFT saves one of a
    head, or of embeddings, that it has put factors on.
    """
    own = model.state_dict()

    def is_copy(key: str, saved: Tensor) -> bool:
        weight = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if weight is None or weight.is_meta or weight.shape != saved.shape:
            return False
        weight = weight.to(saved.device)
        return torch.equal(saved.to(weight.dtype), weight) or torch.equal(weight.to(saved.dtype), saved)

    return [key for key, saved in adapter.other_tensors.items() if not is_copy(key, saved)]


def _described(
    name: str, directions: SafetyModule, repairs: _Repairs, adapter: SavedAdapter | None
) -> ModuleRestoration:
    """
    Args:
        name: Of the module.
        directions: The safety directions.
        repairs: What is added.
        adapter: The fine-tuned one.
    """
    number = directions.bases[name].shape[1]
    own = None if adapter is None or name not in adapter.factors else _update(adapter, name)
    before = None if own is None else _share(own, directions, name)
    vector = repairs.vectors.get(name)
    if vector is None:
        return ModuleRestoration(number, 0, 0.0, 0.0, 0.0, 0.0, before, before)
    update, lost = repairs.of(name)
    return ModuleRestoration(
        directions=number,
        rank=update[0].shape[0],
        delta_norm=vector.norm,
        kept_share=vector.kept_share,
        repair_norm=product_norm(*vector.repair(repairs.strength)),
        lost_share=lost,
        share_before=before,
        share_after=None if own is None else _share(_sum([own, update]), directions, name),
    )


def _share(update: Factors, directions: SafetyModule, name: str) -> float:
    """||U^T B A||_F / ||B A||_F; 0 where there is no update."""
    norm, inside = norms(*update, directions, name)
    return inside["output"] / norm if norm else 0.0


def _sum(updates: Sequence[Factors]) -> Factors:
    """The factors of the sum: those with the same A by their B, others side by side."""
    first_a, first_b = updates[0]
    if all(a.shape == first_a.shape and torch.equal(a, first_a) for a, _ in updates):
        return first_a, sum((b for _, b in updates[1:]), start=first_b)
    return torch.cat([a for a, _ in updates]), torch.cat([b for _, b in updates], dim=1)


def _as_adapter(
    model: nn.Module,
    adapter: SavedAdapter | None,
    repairs: _Repairs,
    form: Form,
    base_model: str | None,
    dtype: str,
) -> SavedAdapter:
    """
    The repair, or the fine-tuned adapter with it, as a plain LoRA whose scaling is 1 in every module, whatever its
    rank: what reads one alpha and one r for all of them finds the same.

    Args:
        model: Of the same architecture as the one that it goes on.
        adapter: The fine-tuned one.
        repairs: What is added.
        form: "repair" or "combined".
        base_model: The fine-tuned model, where it is a whole one.
        dtype: Of the written weights.
    """
    own = adapter if form == "combined" else None
    factors = {}
    for name in {**({} if own is None else own.factors), **repairs.vectors}:
        a, b = _sum(_parts(name, own, repairs))
        factors[name] = in_dtype(a, dtype, name).contiguous(), in_dtype(b, dtype, name).contiguous()
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    others = {name: found for name, found in ranks.items() if found != rank}
    config = {} if adapter is None else dict(adapter.config)
    if form == "combined" and adapter is not None:
        if set(factors) != set(adapter.factors):
            config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
            config["target_modules"] = _targets(model, list(factors))
    else:
        layers = [base_layer(model.get_submodule(name)) for name in factors]
        known = {key: config[key] for key in ("base_model_name_or_path", "revision", "task_type") if config.get(key)}
        fresh = LoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            target_modules=_targets(model, list(factors)),
            fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers),
        )
        named = base_model or getattr(model.config, "_name_or_path", None)
        config = {**fresh.to_dict(), "base_model_name_or_path": named, **known}
    config |= {
        **{"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)},
        **{"use_rslora": False, "init_lora_weights": True},
    }
    tensors = adapter.other_tensors if adapter is not None and form == "combined" else {}
    return SavedAdapter(config, factors, tensors)


def _targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The last parts of the names where they say the same, as servers want them; else the names."""
    ends = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if matched == set(names) else sorted(names)
