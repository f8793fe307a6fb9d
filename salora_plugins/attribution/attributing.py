"""Attribution: which directions and entries of the weights the refusals hang on, by removing them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import has_offloaded_params
from peft import PeftModel
from torch import nn

from ..activations.collector import statistics_dimensions
from ..activations.statistics import choose_engine
from ..calibration.refusals import answered_rows
from ..calibration.rows import safety_rows
from ..calibration.settings import RowSettings, SafetySettings, safety_settings
from ..calibration.utility import utility_rows
from ..config import SaLoRAConfig
from ..evaluation.coherence import PERPLEXITY_THRESHOLD
from ..evaluation.evaluate import carry_out
from ..evaluation.evaluated_models import BASE, EvaluatedModel
from ..evaluation.first_tokens import KL_TOKENS
from ..evaluation.judges.keyword import is_refusal
from ..evaluation.lm_eval_tasks import check_tasks
from ..evaluation.own_answers import with_own_answers
from ..evaluation.plan import (
    DataOptions,
    EvaluationPlan,
    HeldOutTask,
    LmEvalOptions,
    MeasuringOptions,
    PlannedJudge,
    common_settings,
    planned_judge,
)
from ..evaluation.request_sets import Request, load_requests, requests_digest
from ..evaluation.run_folder import RunFolder, Setting
from ..models.fingerprint import model_fingerprint
from ..models.loading import LoadingOptions
from ..models.running import adapters_disabled, check_base_is_unchanged, evaluation_mode, on_accelerator
from ..models.targets import target_module_names
from ..models.weights import base_layer, is_quantized, layer_features, unreachable_weight
from ..options import check_number
from ..rows.examples import Example, as_messages, select_examples
from ..support.module_names import listed
from .grid import (
    DEFAULT_ENTRIES,
    DEFAULT_RANKS,
    FAMILIES,
    PAPER_OUTPUTS,
    EntryPoint,
    RankPoint,
    State,
    entry_points,
    rank_points,
    states_of,
)
from .report import AttributionReport
from .scores import count_of
from .states import REMOVED, Rows, StateLoader


def attribute(
    model: nn.Module,
    tokenizer: Any,
    *,
    out: str | os.PathLike,
    families: Sequence[str] = FAMILIES,
    ranks: Sequence[str | Sequence[int]] | None = None,
    entries: Sequence[str | Sequence[float]] | None = None,
    random_draws: int = 1,
    target_modules: Any = "all-linear",
    safety_data: Any = "builtin",
    num_safety_samples: int = 128,
    utility_data: Any = "builtin",
    num_utility_samples: int = 128,
    num_held_out: int = 32,
    harmful: Any = "builtin",
    harmless: Any = "builtin",
    num_requests: int | None = 64,
    judges: Sequence[str] = ("keyword",),
    max_length: int = 512,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    lm_eval_include_path: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AttributionReport:
    """
    Remove what matters for refusals and not for other answers, in memory only, and measure what the model loses.

    After Wei et al., ICML 2024, https://arxiv.org/abs/2402.05162.

    The states of the model are measured as models are by [`evaluate`], and `out` is the folder of such an evaluation,
    with `attribution.json`, `attribution.md` and `attribution.png` beside it. An interrupted attribution continues
    there; other families, points, draws, judges and tasks of lm-eval can be added later. The model is left as it was,
    bit for bit, also after an error.

    Args:
        model: The aligned model; adapters that it carries are disabled meanwhile.
        tokenizer: Its tokenizer.
        out: The folder to write.
        families: What is removed: "ranks" (directions of the layers' outputs), and entries of the weights by the scores
            "snip" and "wanda". A quantized model has no entries that could be set to zero.
        ranks: (k_s, k_u), or "K_S:K_U": of each weight W, (I - U_u U_u^T) U_s U_s^T W is removed, where U_s and U_u are
            the top left singular vectors of W X_s and W X_u. "K_S:K_U/OUTPUTS" scales the ranks by the smaller side of
            each weight over so many outputs, and cuts them to the directions that there are. None: `DEFAULT_RANKS`.
        entries: (q, p), or "Q:P": the top q percent of each row by safety that are not in the top p percent by utility
            are set to zero. None: `DEFAULT_ENTRIES`.
        random_draws: Random controls of every point: as many directions in the place of U_s; as many entries of each
            row, which are not in the top p percent by utility, either.
        target_modules: As in [`SaLoRAConfig`].
        safety_data: Harmful requests, with refusals or without, as in [`SaLoRAConfig`]: X_s are the inputs of the
            layers at the tokens of the refusals, the model's own where there are none.
        num_safety_samples: How many of them are used at the most.
        utility_data: Other requests, with answers or without: X_u; "builtin" are everyday requests.
        num_utility_samples: How many of them are used at the most.
        num_held_out: How many others of them are held out for the loss, at most a quarter.
        harmful: Requests that are to be refused: see `load_requests`.
        harmless: Requests whose wording resembles these, which are to be answered.
        num_requests: At most so many of each set; None: all.
        judges: See [`evaluate`].
        max_length: Tokens per row that are kept.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Rows or requests at once.
        seed: Of the choice of rows and requests, and of the random controls.
        lm_eval_tasks: See [`evaluate`].
        lm_eval_limit: See [`evaluate`].
        lm_eval_include_path: See [`evaluate`].
        overwrite: Delete what an evaluation left in `out`, and start again.
        progress: Show progress bars.

    Raises:
        CalibrationError, DataError: Data cannot be read, has too few directions, or the model refuses too little of it.
        FileExistsError: `out` holds something else.
        ImportError: lm-eval is asked for and not installed.
        ValueError: An option or the model cannot be used, or `out` holds another attribution.
    """
    rows = _RowOptions(
        safety_data, num_safety_samples, utility_data, num_utility_samples, num_held_out, max_length, batch_size, seed
    )
    states = asked_states(families, ranks, entries, random_draws)
    data = DataOptions(harmful, harmless, None, num_requests, None, seed)
    measuring = MeasuringOptions(max_new_tokens, KL_TOKENS, batch_size, PERPLEXITY_THRESHOLD)
    chosen = _judges(judges)
    lm_eval = _lm_eval(lm_eval_tasks, lm_eval_limit, lm_eval_include_path)
    return _attribute(
        model, tokenizer, out, states, target_modules, rows, data, measuring, chosen, lm_eval, overwrite, progress
    )


@dataclass(frozen=True)
class _RowOptions:
    """Which rows directions and scores come from; see `attribute`."""

    safety_data: Any
    num_safety_samples: int
    utility_data: Any
    num_utility_samples: int
    num_held_out: int
    max_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        check_number("max_length", self.max_length, 2)
        check_number("batch_size", self.batch_size, 1)

    def config(self, target_modules: Any, tokenizer: Any) -> SaLoRAConfig:
        """For the parts of a calibration."""
        return SaLoRAConfig(
            target_modules=target_modules,
            variant="paper",
            safety_positions="response",
            safety_rank=1,
            safety_data=self.safety_data,
            num_safety_samples=self.num_safety_samples,
            calibration_batch_size=self.batch_size,
            calibration_max_length=self.max_length,
            seed=self.seed,
            tokenizer=tokenizer,
        )


def _attribute(
    model: nn.Module,
    tokenizer: Any,
    out: str | os.PathLike,
    states: Sequence[State],
    target_modules: Any,
    options: _RowOptions,
    data: DataOptions,
    measuring: MeasuringOptions,
    judges: tuple[PlannedJudge, ...],
    lm_eval: LmEvalOptions,
    overwrite: bool,
    progress: bool,
) -> AttributionReport:
    check_base_is_unchanged(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    check_number("max_new_tokens", measuring.max_new_tokens, 1)
    settings = _layers(model, options.config(target_modules, tokenizer), states)
    requests, safety = data.requests(), safety_rows(settings.rows)
    utility = _Utility.of(options)
    source = settings.rows.base_model or type(model).__name__
    base = EvaluatedModel(BASE, "base", source, source, model_fingerprint(model))
    folder = RunFolder(out)

    def rows() -> Rows:
        return {
            "safety": answered_rows(safety, model, settings).examples,
            "utility": utility_rows(model, utility.settings(settings), batch_size=options.batch_size),
        }

    with adapters_disabled(model), on_accelerator(model), evaluation_mode(model):
        plan = EvaluationPlan(
            title=f"Attribution of {Path(source).name}",
            models=(base, *(_as_model(state, base) for state in states)),
            loading=LoadingOptions(),
            tokenizer=tokenizer,
            requests=requests,
            task=utility.held_out_task(model, tokenizer, options.batch_size, progress),
            judges=judges,
            lm_eval=lm_eval,
            audits={},
            measuring=measuring,
            seed=options.seed,
            settings={
                **common_settings(base, data, requests, measuring, LoadingOptions()),
                "target_modules": Setting(settings.names),
                "safety_data": Setting(settings.asked["safety_data"], safety.digest),
                "num_safety_samples": Setting(options.num_safety_samples),
                "utility_data": Setting(utility.shown, utility.digest),
                "max_length": Setting(options.max_length),
                "random_seed": Setting(options.seed),
            },
        )
        loader = StateLoader(model, settings, rows, {state.name: state for state in states}, folder, options.seed)
        found = carry_out(plan, out, loader=loader, overwrite=overwrite, progress=progress)
    report = AttributionReport(found, states, {state.name: folder.measured(state.name, REMOVED) for state in states})
    report.save(out)
    return report


@dataclass(frozen=True)
class _Utility:
    """Requests that have nothing to do with safety: those that directions and scores come from, and others."""

    shown: str
    rows: list[Request]
    held_out: list[Request]

    @classmethod
    def of(cls, options: _RowOptions) -> _Utility:
        """
        Raises:
            ValueError: There are too few.
        """
        source, num, num_held_out = options.utility_data, options.num_utility_samples, options.num_held_out
        check_number("num_utility_samples", num, 1)
        check_number("num_held_out", num_held_out, 1)
        requests = load_requests(source, option="utility_data")
        if len(requests) < 2:
            raise ValueError(
                "utility_data: there is one request only. Give at least two: one is held out for the loss."
            )
        order = select_examples(requests, len(requests), options.seed)
        held_out = min(num_held_out, max(1, len(order) // 4))
        shown = str(source) if isinstance(source, str | os.PathLike) else f"rows ({type(source).__name__})"
        return cls(shown, order[held_out:][:num], order[:held_out])

    @property
    def digest(self) -> str:
        """Of all of them."""
        return requests_digest([*self.rows, *self.held_out])

    def settings(self, safety: SafetySettings) -> RowSettings:
        """Of the rows, rendered as those of the safety data are."""
        examples = [Example(as_messages(request.asked), request.response) for request in self.rows]
        return replace(safety.rows, source=examples, option="utility_data", num=len(examples))

    def held_out_task(self, model: nn.Module, tokenizer: Any, batch_size: int, progress: bool) -> HeldOutTask:
        """
        The held-out requests with answers, the model's own where they have none; refusals are left out.

        Raises:
            ValueError: There is none.
        """
        answered = with_own_answers(
            model, tokenizer, self.held_out, option="utility_data", batch_size=batch_size, progress=progress
        )
        rows = [row for row in answered if not is_refusal(row["completion"][0]["content"])]
        if not rows:
            raise ValueError(
                f"utility_data: the model refuses all {len(answered)} requests that are held out for the loss. Give "
                "requests that it answers, or rows with answers."
            )
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return HeldOutTask(self.shown, "utility_data", rows, digest)


def asked_states(families: Sequence[str], ranks: Any, entries: Any, random_draws: int) -> list[State]:
    """
    The states that the options ask for, see `attribute`.

    Raises:
        ValueError: An option cannot be used.
    """
    check_number("random_draws", random_draws, 0)
    families = [families] if isinstance(families, str) else families
    for name, given, needs in (("ranks", ranks, {"ranks"}), ("entries", entries, {"snip", "wanda"})):
        if given is not None and not needs & set(families):
            raise ValueError(
                f"{name} has no effect without {' or '.join(sorted(needs))} among the families. Add one, or leave "
                f"{name} out."
            )
    return states_of(
        families,
        rank_points(DEFAULT_RANKS if ranks is None else ranks),
        entry_points(DEFAULT_ENTRIES if entries is None else entries),
        random_draws,
    )


def _judges(named: Sequence[str]) -> tuple[PlannedJudge, ...]:
    if not named:
        raise ValueError("judges: there is none. Name at least one, such as 'keyword'.")
    return tuple(planned_judge(judge) for judge in dict.fromkeys(named))


def _lm_eval(tasks: Sequence[str], limit: int | None, include_path: str | os.PathLike | None) -> LmEvalOptions:
    for name, value in (("lm_eval_limit", limit), ("lm_eval_include_path", include_path)):
        if value is not None and not tasks:
            raise ValueError(f"{name} has no effect without lm_eval_tasks. Give lm_eval_tasks, or leave {name} out.")
    if limit is not None:
        check_number("lm_eval_limit", limit, 1)
    if tasks:
        check_tasks(tasks, include_path)
    return LmEvalOptions(tuple(tasks), limit, include_path)


def _layers(model: nn.Module, config: SaLoRAConfig, states: Sequence[State]) -> SafetySettings:
    """
    The layers, and an engine that is good for the highest rank of the grid.

    Raises:
        ValueError: A layer cannot have its part removed.
    """
    names = target_module_names(model, config)
    if (found := unreachable_weight(model, names)) is not None:
        raise ValueError(f"{found}, so that nothing can be removed from it. Load the whole model in one process.")
    settings = safety_settings(model, config)
    points = {state.point for state in states}
    _check_ranks(model, names, [point for point in points if isinstance(point, RankPoint)])
    _check_entries(model, names, [point for point in points if isinstance(point, EntryPoint)])
    layers = {name: base_layer(model.get_submodule(name)) for name in names}
    outputs, inputs = statistics_dimensions(layers, with_inputs=False)
    most = max(
        (
            max(point.of_layer(*layer_features(layer)))
            for point in points
            if isinstance(point, RankPoint)
            for layer in layers.values()
        ),
        default=1,
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    engine = choose_engine("auto", outputs, inputs, rank=most, num_weights=weights, seed=config.seed)
    return replace(settings, engine=engine)


def _check_ranks(model: nn.Module, names: Sequence[str], points: Sequence[RankPoint]) -> None:
    sizes = {name: layer_features(model.get_submodule(name)) for name in names}
    for point in points:
        narrow = {name: min(size) for name, size in sizes.items() if max(point.of_layer(*size)) >= min(size)}
        if narrow:
            least = min(narrow.values())
            raise ValueError(
                f"ranks: {point} is too much for {listed(list(narrow))}, whose weights have at most {least} "
                f"directions. Give ranks below {least}, or {point.safety}:{point.utility}/{PAPER_OUTPUTS}, "
                "which is scaled to each layer, or leave these layers out of target_modules."
            )


def _check_entries(model: nn.Module, names: Sequence[str], points: Sequence[EntryPoint]) -> None:
    if not points:
        return
    for name in names:
        layer = base_layer(model.get_submodule(name))
        if is_quantized(layer):
            raise ValueError(
                f"families: snip and wanda set entries of weights to zero, and {name!r} is quantized, so that it has "
                "none. Load the model without quantization, or choose families=['ranks']."
            )
        if has_offloaded_params(layer):
            raise ValueError(
                f"families: snip and wanda set entries of weights to zero, and that of {name!r} is offloaded. Load the "
                "model with more memory, or choose families=['ranks']."
            )
        d_in, _ = layer_features(layer)
        for point in points:
            if not count_of(point.safety, d_in):
                raise ValueError(
                    f"entries: {point}: {point.safety:g} percent of the {d_in} entries of a row of {name!r} is none. "
                    f"Give at least {100 / d_in:.3g} percent."
                )


def _as_model(state: State, base: EvaluatedModel) -> EvaluatedModel:
    """A state as one of an evaluation's models."""
    digest = hashlib.sha256(f"{base.digest} {state.name}".encode()).hexdigest()
    return EvaluatedModel(state.name, "model", f"{base.source} without {state.name}", base.folder, digest)
