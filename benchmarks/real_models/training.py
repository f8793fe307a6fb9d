"""One job of a worker: what is made once for a model, or a run, measured on the way."""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from salora_plugins import SafetyModule, SaLoRAConfig, calibrate
from salora_plugins.models.running import adapters_disabled, input_device
from salora_plugins.rows.batching import collate
from salora_plugins.rows.examples import TokenizedExample
from salora_plugins.safety_module import SideBases

from ..runs import Run, read_json, write_json
from ..small_model import WARMUP_STEPS, lora_options
from .jobs import Job, module_file
from .material import Material
from .measures import measure, response_losses, scaled, update_norm
from .methods import METHODS, TARGET_MODULES, Anchor, Method

TASK_ROWS = 128
"""Rows that the paper's start values come from."""
CALIBRATION_BATCH = 64
CALIBRATION_THREADS = 4
"""Decompositions of large layers run on the CPU."""

Report = Callable[[Run, dict[str, list[str]]], None]
"""Takes a measured point, and the answers that it counts."""


def do(job: Job, model: Any, material: Material, report: Report, norms: dict[int, float]) -> None:
    """
    Args:
        job: What it needs is there.
        model: The base model, without adapters, which it is again afterwards.
        material: Of that model.
        report: Takes what is measured.
        norms: Step -> size of the update to scale to, for methods of which it is given.
    """
    if job.kind == "answers":
        material.make_answers(model)
    elif job.kind == "module":
        make_safety_module(job, model, material)
    elif job.kind == "base":
        point, answers = measure(
            model, material, job.task, material.task_rows(job.task)[1], known=material.base_answers
        )
        report({"step": 0, **point}, answers)
    else:
        run(job, model, material, report, norms)


def make_safety_module(job: Job, model: Any, material: Material) -> None:
    """Calibrate, and keep the module with how long it took and what it says of its leak."""
    calibration, path = job.calibration, module_file(job, material.setup)
    if calibration is None:
        raise ValueError(f"{job.name}: it has no calibration")
    rows = [
        {"messages": [*row.messages, {"role": "assistant", "content": row.response}]}
        for row in material.refusals(calibration.requests)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(CALIBRATION_THREADS)
    started = time.monotonic()
    module = calibrate(
        model,
        material.tokenizer,
        target_modules=TARGET_MODULES[job.targets],
        safety_data=rows,
        num_safety_samples=len(rows),
        calibration_batch_size=CALIBRATION_BATCH,
        calibration_cache=False,
        **calibration.options,
    )
    torch.set_num_threads(threads)
    facts = {
        "calibration_seconds": round(time.monotonic() - started, 1),
        "answering_seconds": material.answering_seconds[calibration.requests],
        "rows": len(rows),
        "input_ranks": sorted({basis.shape[1] for basis in module.input_bases.values()}),
        "leak": _leak(module),
    }
    write_json(path.with_suffix(".json"), facts)
    module.save(path)


def _leak(module: SafetyModule) -> dict[str, float]:
    """The median of the leaks that a safety module says of itself, over all layers and by their kind."""
    by_module = module.provenance.get("leak") or {}
    kinds: dict[str, list[float]] = {"all": list(by_module.values())} if by_module else {}
    for name, leak in by_module.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(leak)
    return {kind: round(statistics.median(leaks), 4) for kind, leaks in kinds.items()}


def run(job: Job, model: Any, material: Material, report: Report, norms: dict[int, float]) -> None:
    """Train, and measure after some of the steps."""
    method = METHODS[job.method]
    rows, heldout_rows = material.task_rows(job.task)
    torch.manual_seed(job.seed)
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(model, adapter_config(job, material, rows))
    try:
        facts = {"start_seconds": round(time.monotonic() - started, 1), **_calibration_facts(job, material)}
        for step, timing in train_steps(adapted, job, material, rows, job.steps(material.setup)):
            with ExitStack() as stack:
                if method.norm_of is not None:
                    stack.enter_context(scaled(adapted, norms[step] / max(update_norm(adapted), 1e-12)))
                point, answers = measure(adapted, material, job.task, heldout_rows)
            report({"step": step, **point, **timing, **facts}, answers)
    finally:
        remove_adapter(adapted)


def train_steps(
    model: Any, job: Job, material: Material, rows: list[TokenizedExample], steps: tuple[int, ...]
) -> Iterator[tuple[int, Run]]:
    """
    Train with AdamW at a constant learning rate after some steps, gradients clipped to norm 1.

    Yields:
        The steps after which is to be measured, with the training loss and the seconds so far, without the caller's.
    """
    method = METHODS[job.method]
    refusals = material.refusal_rows if method.replay else []
    penalty = method.anchor or Anchor(weight=0.0)
    anchor = _anchor(model, material, job.seed) if penalty.weight else None
    every = material.setup.scale.anchor_every or penalty.every
    if anchor is not None and every is None:
        tokens = statistics.mean(len(row.input_ids) for row in rows)
        every = anchor.affordable_every(tokens * material.setup.scale.rows)
    second = _second_adapter(model) if method.second_adapter else None
    first = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [first] if second is None else [first, second.parameters]
    optimizer = torch.optim.AdamW(
        [parameter for group in groups for parameter in group], lr=job.rate, weight_decay=0.0, fused=first[0].is_cuda
    )
    batches = _batches(rows, refusals, method.replay, job.seed, material.setup.scale.rows)
    model.train()
    seconds, started = 0.0, time.perf_counter()
    for step in range(max(steps)):
        for group in optimizer.param_groups:
            group["lr"] = job.rate * min(1.0, (step + 1) / WARMUP_STEPS)
        # At the first step the divergence is 0, and so is its gradient.
        if anchor is not None and every is not None and step and step % every == 0:
            with nullcontext() if second is None else second.trained_alone():
                anchor.backward(model, step // every, weight=every * penalty.weight)
        loss = _loss(model, collate(next(batches), 0), method)
        loss.backward()
        for parameters in groups:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in steps:
            value = loss.item()  # waits for the device, which it does not do at the other steps
            if not math.isfinite(value):
                raise ValueError(f"the loss of step {step + 1} is {value}")
            seconds += time.perf_counter() - started
            timing = {"training_loss": round(value, 4), "training_seconds": round(seconds, 2)}
            yield step + 1, timing if anchor is None else {**timing, "anchor_every": every}
            model.train()
            started = time.perf_counter()


def _loss(model: Any, batch: dict[str, Tensor], method: Method) -> Tensor:
    if not method.constrained:
        return response_losses(model, batch).mean()
    from ..retention.anchored import base_log_probabilities, constrained_sft_loss

    batch = {name: values.to(input_device(model)) for name, values in batch.items()}
    with torch.no_grad(), adapters_disabled(model):
        base = base_log_probabilities(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return constrained_sft_loss(logits, base, batch["labels"])


def _second_adapter(model: Any) -> Any:
    from ..retention.anchored import SecondAdapter

    return SecondAdapter(model)


def _anchor(model: Any, material: Material, seed: int) -> Any:
    from salora_plugins.replay import Refusal, RefusalAnchor

    refusals = [Refusal(row.messages, row.response or "") for row in material.refusals("broad")]
    return RefusalAnchor.of(
        model,
        material.tokenizer,
        refusals,
        num_requests=material.setup.scale.anchored,
        seed=seed,
    )


def _batches(
    rows: list[TokenizedExample], refusals: list[TokenizedExample], share: float, seed: int, size: int
) -> Iterator[list[TokenizedExample]]:
    """Batches without end, every row once in a round; a row is a refusal instead with the probability `share`."""
    chance = random.Random(seed)
    order: list[int] = []
    while True:
        batch = []
        for _ in range(size):
            if refusals and chance.random() < share:
                batch.append(chance.choice(refusals))
                continue
            if not order:
                order = list(range(len(rows)))
                chance.shuffle(order)
            batch.append(rows[order.pop()])
        yield batch


def adapter_config(job: Job, material: Material, rows: list[TokenizedExample]) -> LoraConfig:
    options = lora_options(TARGET_MODULES[job.targets])
    calibration = job.calibration
    if calibration is None:
        return LoraConfig(**options)
    module = _module(module_file(job, material.setup))
    if METHODS[job.method].random_directions:
        module = random_directions(module, job.seed)
    if calibration.variant == "paper":
        start = [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in rows[:TASK_ROWS]]
        options |= {"variant": "paper", "task_data": start}
    return SaLoRAConfig(**options, safety_module=module, seed=job.seed)


@functools.lru_cache(maxsize=3)
def _module(path: Path) -> SafetyModule:
    """Checked once in a process."""
    return SafetyModule.load(path)


def _calibration_facts(job: Job, material: Material) -> Run:
    return {} if job.calibration is None else read_json(module_file(job, material.setup).with_suffix(".json"))


def random_directions(module: SafetyModule, seed: int) -> SafetyModule:
    """A safety module of the same shape whose directions are drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(basis: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(basis.shape, generator=generator)).Q.contiguous()

    sides = {
        side: SideBases({name: drawn(basis) for name, basis in found.bases.items()})
        for side, found in module.sides.items()
    }
    return SafetyModule(sides, module.weight_samples)


def remove_adapter(adapted: Any) -> None:
    """The base model as it was, without adapters."""
    base = adapted.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.requires_grad_(False)
    base.eval()
    if any(isinstance(module, LoraLayer) for module in base.modules()):
        raise RuntimeError("the adapter is still there")
