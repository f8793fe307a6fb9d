"""Watching refusals while a model is fine-tuned."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.certificate import covers, largest, norms
from ..models.running import check_base_is_unchanged
from ..options import check_number, check_real
from ..rows.rendering import template_digest, tokenizer_of
from ..safety_module import SafetyModule
from ..tuner import SaLoRAModel
from ..tuning.layers import lora_linears
from .first_tokens import FirstTokenReference, first_token_kl, first_token_reference, refusal_margins
from .request_sets import load_requests

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_LEAST_REQUESTS = 4


class SafetyMonitorCallback(TrainerCallback):
    """
    Log at every evaluation how far the model still is from answering harmful requests.

    Through the trainer's own logger, and so to TensorBoard, W&B or trackio:

    - `safety/refusal_margin`: mean over the requests, in nats (see `refusal_margins`); below 0 it is about to comply;
    - `safety/kl_harmful`: KL divergence from the base model at the first answer tokens, nats per token;
    - `safety/certificate`: the largest share of a module's update in the safety directions, where there is a safety
      module;
    - `safety/requests` and `safety/seconds`: on how many requests, and what it took.

    It also warns if the trainer renders with another chat template than the adapter was calibrated with.

    No text is generated, and nothing that training depends on is changed: with and without the monitor, the weights are
    the same. If measuring takes more than `max_time_share` of the time since the measurement before, it takes half of
    the requests the next time. The base model is the model with its adapters disabled; a model without adapters is
    compared with itself at the start of the run.

    Args:
        trainer: The trainer of transformers or TRL, to whose logger the values go.
        tokenizer: None: the trainer's `processing_class`.
        harmful: Requests, see `load_requests`.
        num_requests: How many of them.
        every_steps: Measure at these steps rather than at evaluations.
        safety_module: For the certificate; None: the one that the adapter is trained with, if it is SaLoRA's.
        stop_at_margin_drop: Stop training once the margin has fallen by this share of the base model's, such as 0.5.
        max_time_share: Share of the training time that measuring may take.
        batch_size: Requests per forward pass.

    Example:

        >>> trainer = SFTTrainer(..., args=SFTConfig(eval_strategy="steps", eval_steps=100))
        >>> trainer.add_callback(SafetyMonitorCallback(trainer))
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        tokenizer: Any = None,
        harmful: Any = "builtin",
        num_requests: int = 32,
        every_steps: int | None = None,
        safety_module: SafetyModule | str | os.PathLike | None = None,
        stop_at_margin_drop: float | None = None,
        max_time_share: float = 0.05,
        batch_size: int = 16,
    ) -> None:
        for option, value in (("every_steps", every_steps), ("batch_size", batch_size)):
            if value is not None:
                check_number(option, value, 1)
        check_real("max_time_share", max_time_share, "a positive share of the time, such as 0.05", lambda s: s > 0)
        if stop_at_margin_drop is not None:
            check_real("stop_at_margin_drop", stop_at_margin_drop, "a positive share, such as 0.5", lambda s: s > 0)
        if every_steps is None and trainer.args.eval_strategy == "no":
            raise ValueError(
                "The trainer does not evaluate (eval_strategy='no'), so that SafetyMonitorCallback would measure "
                "nothing. Set eval_strategy, or every_steps of the callback."
            )
        if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "SafetyMonitorCallback cannot run the model under DeepSpeed ZeRO stage 3, which splits its weights. "
                "Use stage 2, or evaluate the checkpoints."
            )
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ValueError(
                "SafetyMonitorCallback cannot run the model under FSDP 1, which splits its weights. Use FSDP 2 "
                "(fsdp_version: 2)."
            )
        self.trainer = trainer
        self.tokenizer = tokenizer_of(trainer.processing_class if tokenizer is None else tokenizer)
        self.requests = [request.asked for request in load_requests(harmful, option="harmful", num=num_requests)]
        self.every_steps = every_steps
        if safety_module is not None and not isinstance(safety_module, SafetyModule):
            safety_module = SafetyModule.load(safety_module)
        self.safety_module = safety_module
        if safety_module is not None and not any(True for _ in _covered_factors(self._model(), safety_module)):
            raise ValueError(
                "safety_module: it has no directions for any module with a LoRA adapter of this model, so that there "
                f"would be no certificate (it has {next(iter(safety_module.bases))!r}). Give the one of the base model "
                "and these target modules, or leave it out."
            )
        self.stop_at_margin_drop = stop_at_margin_drop
        self.max_time_share = max_time_share
        self.batch_size = batch_size
        self._base_margins = torch.empty(0)
        self._reference: FirstTokenReference | None = None
        self._last_end = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self._model()
        check_base_is_unchanged(model)
        warn_of_another_template(model, self.trainer.processing_class)
        if state.global_step and not isinstance(model, PeftModel):
            logger.warning(
                "SafetyMonitorCallback compares the model with itself at step %d, where this run resumes: it has no "
                "adapters that could be disabled.",
                state.global_step,
            )
        with _without_adapters(model):
            self._base_margins = self._margins(model)
            self._reference = first_token_reference(model, self.tokenizer, self.requests, batch_size=self.batch_size)
        base = self._base_margins.mean().item()
        if self.stop_at_margin_drop is not None and base <= 0:
            raise ValueError(
                f"stop_at_margin_drop={self.stop_at_margin_drop}: the base model's refusal margin is {base:.2f}, so it "
                "does not refuse these requests and there is nothing to keep. Remove the option, or give other "
                "requests (harmful)."
            )
        self._last_end = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainers can evaluate before they train, too.
        if self.every_steps is None and self._reference is not None:
            self._measure(state, control, self._reference)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every_steps is not None and self._reference is not None and state.global_step % self.every_steps == 0:
            self._measure(state, control, self._reference)

    def _measure(self, state: TrainerState, control: TrainerControl, reference: FirstTokenReference) -> None:
        started = time.perf_counter()
        model = self._model()
        count = len(self.requests)
        margin = self._margins(model).mean().item()
        base = self._base_margins[:count].mean().item()
        kl = first_token_kl(model, reference.restricted_to(count), batch_size=self.batch_size)
        values = {
            "safety/refusal_margin": margin,
            "safety/kl_harmful": kl.mean().item(),
        }
        safety_module = self.safety_module or _own_safety_module(model)
        if safety_module is not None and safety_module.protects and isinstance(model, PeftModel):
            values["safety/certificate"] = largest_live_share(model, safety_module)
        ended = time.perf_counter()
        should_log = control.should_log  # which logging sets back, so that the step's loss would not be logged
        self.trainer.log({**values, "safety/requests": count, "safety/seconds": round(ended - started, 3)})
        control.should_log = should_log
        self._keep_within_budget(ended - started, started - self._last_end)
        self._last_end = time.perf_counter()
        if self.stop_at_margin_drop is not None and base - margin > self.stop_at_margin_drop * base:
            logger.warning(
                "Training stops at step %d: the refusal margin has fallen from %.2f to %.2f, by more than "
                "stop_at_margin_drop=%s of it.",
                state.global_step,
                base,
                margin,
                self.stop_at_margin_drop,
            )
            control.should_training_stop = True

    def _keep_within_budget(self, taken: float, since_last: float) -> None:
        """Every rank of a distributed run has to measure on the same requests, so that the slowest decides."""
        too_long = float(taken > self.max_time_share * since_last)
        flags = self.trainer.accelerator.gather(torch.tensor([too_long], device=self.trainer.args.device))
        if flags.any() and len(self.requests) > _LEAST_REQUESTS:
            count = max(_LEAST_REQUESTS, len(self.requests) // 2)
            logger.warning(
                "Measuring safety took %.1f s of %.1f s since the last time, more than max_time_share=%s: the next "
                "time it takes %d requests instead of %d. Evaluate less often to keep them.",
                taken,
                since_last,
                self.max_time_share,
                count,
                len(self.requests),
            )
            self.requests = self.requests[:count]

    def _margins(self, model: nn.Module) -> Tensor:
        return refusal_margins(model, self.tokenizer, self.requests, batch_size=self.batch_size)

    def _model(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)


def largest_live_share(model: PeftModel, safety_module: SafetyModule) -> float:
    """
    The certificate of a model in training: the largest share of a module's update in the safety directions, either
    side, over the active adapters; 0 where there is no update yet, NaN where an update is not finite.

    Args:
        model: With LoRA adapters, of SaLoRA or not.
        safety_module: The directions.
    """
    shares = [0.0]
    for name, a, b in _covered_factors(model, safety_module):
        norm, inside = norms(a, b, safety_module, name)
        shares += [part / norm if norm else 0.0 for part in inside.values()]
    return largest(shares)


def _covered_factors(model: nn.Module, safety_module: SafetyModule) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, lora_A and lora_B of every adapter in use on a layer that the safety module has directions for."""
    if not isinstance(model, PeftModel):
        return
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in model.active_adapters:
            if adapter in layer.lora_A:
                linears = lora_linears(layer, adapter)
                a, b = _whole_weight(linears["input"]), _whole_weight(linears["output"])
                if covers(safety_module, name, b):
                    yield name, a, b


def _whole_weight(factor: Any) -> Tensor:
    """Of lora_A or lora_B, a linear layer whose weight may be split over ranks."""
    weight = factor.weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu()


def warn_of_another_template(model: nn.Module, processing_class: Any) -> None:
    """
    Warn where a trainer renders with another chat template than the adapter was calibrated with, as it can where the
    adapter was made before the trainer.

    Args:
        model: Anything; only SaLoRA's adapters are looked at.
        processing_class: The trainer's tokenizer or processor, or None.
    """
    safety_module = _own_safety_module(model)
    calibrated = None if safety_module is None else safety_module.provenance.get("chat_template_sha256")
    if calibrated is None or processing_class is None:
        return
    if template_digest(tokenizer_of(processing_class)) != calibrated:
        logger.warning(
            "The adapter was calibrated with another chat template than the trainer's processing_class has, so that "
            "its safety directions are those of other tokens. Give the trainer peft_config=SaLoRAConfig(...) and the "
            "model without an adapter, or SaLoRAConfig(tokenizer=...) that tokenizer."
        )


def _own_safety_module(model: nn.Module) -> SafetyModule | None:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, SaLoRAModel):
        return None
    return model.base_model.safety_module(model.active_adapter)


def _without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
