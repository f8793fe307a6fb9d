"""Refusals in the training set of a trainer of transformers or TRL, and the anchor beside its loss."""

from __future__ import annotations

import logging
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.adapter_config import AdapterConfig
from ..models.running import adapters_disabled
from ..options import check_number, check_real
from ..support.distributed import rank_and_world_size
from ..support.module_names import listed
from .anchor import COST, OFTEN, AnchorOptions, RefusalAnchor
from .mixing import check_can_be_mixed_into, check_share, mix_refusals, number_of_refusals
from .refusals import own_refusals, refusals_digest

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_OTHER_GRADIENTS = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
)
_STEPS_IN_BACKWARD = ("lomo", "layerwise")
"""Parts of the names of such optimizers."""

_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
"""Columns of token ids in the rows of trainers of transformers and TRL."""
_MEASURED_ROWS = 256
"""Whose lengths are looked at, of all."""
_FEW = 5
"""Penalties: one in 60 steps kept 2 of 28 refusals, 7 in 240 kept 25 (docs/evidence/real-models.md)."""


class RefusalAnchorCallback(TrainerCallback):
    """
    Train with a penalty beside the loss: the KL divergence from the base model where its refusals begin.

    On every `every`-th optimizer step but the first, where there is no divergence yet, before the step's own passes,
    the gradient of `every * weight` times the divergence on a batch of harmful requests is added, so that on average
    over the steps `weight` times the divergence is added to the loss (see [`RefusalAnchor`]). Gradient accumulation,
    clipping, mixed precision, gradient checkpointing and DistributedDataParallel treat it as part of the step's
    gradient. The number of the step tells its batch, so that a run that resumes goes on with the one that comes next.

    With the input side of SaLoRA's default the update does not react to most of what harmful requests look like, and so
    the penalty, too, can move little there.

    Args:
        requests: Harmful requests or refusals, see `RefusalAnchor.of`; or an anchor that was made before.
        weight: What the divergence, in nats per token, counts beside the loss.
        every: At which optimizer steps: every, 2 * every, ..., counted from 0. None: as often as costs at most 5 % of
            the training's time, and at most at every 8th step (`RefusalAnchor.affordable_every`). In a short training
            at least once, half way.
        tokenizer: None: the trainer's `processing_class`.
        options: Further ones of `RefusalAnchor.of`.

    Example:

        >>> SFTTrainer(..., peft_config=LoraConfig(), callbacks=[RefusalAnchorCallback()])
    """

    def __init__(
        self,
        requests: Any = "builtin",
        *,
        weight: float = 1.0,
        every: int | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        check_real("weight", weight, "a positive number, such as 1.0", lambda number: number > 0)
        if every is not None:
            check_number("every", every, 1)
        AnchorOptions(**options)  # now, and not when training begins
        self.anchor = requests if isinstance(requests, RefusalAnchor) else None
        if self.anchor is not None and options:
            raise ValueError(f"{next(iter(options))}: the anchor that is given has its own. Leave it out.")
        self.requests = requests
        self.weight = weight
        self.every = every
        """None, where it is not given, until training begins."""
        self._chosen: int | None = None
        self.tokenizer = tokenizer
        self.seconds = 0.0
        """What the penalties took."""
        self._options = options
        self._made_for: weakref.ref[Any] | None = None
        self._last: torch.Tensor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        _refuse_what_takes_gradients_elsewhere(args)
        if model is None or not _has_adapter(model):
            raise ValueError(
                "RefusalAnchorCallback needs a model with an adapter: its base is the model with adapters disabled. "
                "Give the trainer a peft_config."
            )
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        made_for_another = self._made_for is not None and self._made_for() is not base
        if self.anchor is None or made_for_another:
            tokenizer = processing_class if self.tokenizer is None else self.tokenizer
            if tokenizer is None:
                raise ValueError(
                    "RefusalAnchorCallback: the trainer has no processing_class to render requests with. Give it one, "
                    "or give the callback a tokenizer."
                )
            if state.global_step:
                _warn_of_a_trained_base(model, state.global_step)
            self.anchor = RefusalAnchor.of(model, tokenizer, self.requests, **self._options)
            self._made_for, self._last = weakref.ref(base), None
        if self.every is None or self.every == self._chosen:  # not given, nor set since
            tokens = _tokens_of_a_pass(train_dataloader, state.train_batch_size or args.train_batch_size)
            self.every = self._chosen = self._chosen_every(tokens, args.gradient_accumulation_steps, state.max_steps)
        times = max(0, state.max_steps - 1) // self.every
        if not times:
            logger.warning(
                "RefusalAnchorCallback has no effect: it acts at every %dth step, and the training has %d. Set every "
                "to at most %d.",
                self.every,
                state.max_steps,
                max(1, state.max_steps - 1),
            )
        note_for_card(
            model,
            "Refusal anchor",
            f"KL to the base model on {len(self.anchor)} of its refusals, weight {self.weight:g}, every {self.every} "
            f"steps ({times} of {state.max_steps}); SHA-256 {self.anchor.digest}",
        )

    def _chosen_every(self, tokens: float, passes: int, steps: int) -> int:
        """As often as costs little, and said; in a short training at least once."""
        assert self.anchor is not None
        affordable = self.anchor.affordable_every(tokens, passes)
        every = max(1, min(affordable, steps // 2))
        times = max(0, steps - 1) // every
        logger.info("RefusalAnchorCallback acts at every %d. step: every was not given.", every)
        if 0 < times < _FEW and affordable > OFTEN:
            logger.warning(
                "RefusalAnchorCallback acts %d times in this training, at every %d. step, which costs about %d %% of "
                "its time and keeps little.%s",
                times,
                every,
                round(100 * COST * affordable / every),
                f" every={OFTEN} costs about {round(100 * COST * affordable / OFTEN)} %." if every > OFTEN else "",
            )
        return every

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.anchor is None or self.every is None:
            return
        number, between = divmod(state.global_step, self.every)
        if number == 0 or between:
            return
        started = time.perf_counter()
        scaler = getattr(optimizer, "scaler", None)  # accelerate's, of fp16
        scale = None if scaler is None else scaler.scale(torch.ones((), device=args.device))
        self._last = self.anchor.backward(model, number - 1, weight=self.every * self.weight, scale=scale)
        self.seconds += time.perf_counter() - started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the last divergence beside the loss, in the trainer's history and for the callbacks behind this one."""
        if self._last is not None and logs is not None and "loss" in logs:
            logs["refusal_anchor/kl"] = state.log_history[-1]["refusal_anchor/kl"] = self._last.item()


def _tokens_of_a_pass(dataloader: Any, batch_size: int) -> float:
    """On one process; 0 where they are unknown."""
    length = _row_length(dataloader)
    sampler = getattr(dataloader, "batch_sampler", None)
    sampler = getattr(sampler, "batch_sampler", sampler)  # of which accelerate gives each process a share
    if not length or type(sampler) is BatchSampler or not hasattr(sampler, "__len__") or not len(dataloader):
        return length * batch_size
    # It packs rows, as many as there is room for.
    return length * len(dataloader.dataset) / (len(dataloader) * rank_and_world_size()[1])


def _row_length(dataloader: Any) -> float:
    """Tokens of a row, the mean over some of them; 0 where the rows are no `datasets.Dataset` with token ids."""
    dataset: Any = getattr(dataloader, "dataset", None)
    datasets: Any = sys.modules.get("datasets")  # none of its objects can be here before it is imported
    names = [name for name in _TOKENS if name in (getattr(dataset, "column_names", None) or ())]
    if datasets is None or not isinstance(dataset, datasets.Dataset) or not names or not len(dataset):
        return 0.0
    some = range(0, len(dataset), max(1, len(dataset) // _MEASURED_ROWS))
    columns: Any = dataset.with_format(None).select_columns(names).select(some)[:]
    return sum(len(ids) for name in names for ids in columns[name] if ids is not None) / len(some)


def mix_into_training_set(
    trainer: Trainer, share: float, requests: Any = "builtin", *, seed: int = 0, max_length: int | None = None
) -> None:
    """
    Mix the base model's own refusals into the training set of a trainer that is made and has not begun.

    They are rendered with the trainer's tokenizer, and only their responses are trained on, where the rows have labels
    or a completion mask.

    Args:
        trainer: A supervised one, of transformers, TRL or Axolotl, with rows of token ids. Its set must not be packed
            yet.
        share: See `mix_refusals`.
        requests: See `own_refusals`.
        seed: Of the choice of requests and of their order.
        max_length: Tokens of a row that are kept; None: the trainer's `max_length`, if it has one.

    Raises:
        ValueError: See `mix_refusals`.
        CalibrationError, DataError: See `own_refusals`.
    """
    check_share(share)
    dataset: Any = trainer.train_dataset
    if getattr(trainer.args, "packing", False):  # one strategy of TRL's leaves no trace of it in the rows
        raise ValueError(
            "packing=True: the trainer has packed its rows already, so that whole refusals would stand beside packed "
            "rows. Set packing=False, or mix them in before (mix_refusals) and give the trainer the result."
        )
    check_can_be_mixed_into(dataset)
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = trainer.processing_class
    refusals = own_refusals(model, tokenizer, requests, num=number_of_refusals(len(dataset), share), seed=seed)
    mixed = mix_refusals(
        dataset,
        refusals,
        share,
        seed=seed,
        tokenizer=tokenizer,
        max_length=max_length or getattr(trainer.args, "max_length", None),
    )
    trainer.train_dataset = mixed
    note_for_card(
        model,
        "Refusals mixed in",
        f"{len(mixed) - len(dataset)} rows of {len(refusals)} refusals of the base model's own among {len(mixed)}; "
        f"SHA-256 {refusals_digest(refusals)}",
    )


def note_for_card(model: nn.Module, name: str, text: str) -> None:
    """Have a SaLoRA adapter's model card say what it was trained on beside the task; other adapters have none."""
    if not isinstance(model, PeftModel):
        return
    for adapter in model.active_adapters:
        config = model.peft_config[adapter]
        if isinstance(config, AdapterConfig):
            config.training_notes[name] = text


def _has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _warn_of_a_trained_base(model: nn.Module, step: int) -> None:
    """Where a run resumes, what it trains beside the adapters is not what it was at its start any more."""
    with adapters_disabled(model):  # which takes the gradient from all that is theirs
        beside = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if beside:
        logger.warning(
            "RefusalAnchorCallback: beside the adapter, %s are trained, so that the base model is not at step %d, "
            "where this run resumes, what it was at step 0, and the divergence is from what it is now. Give the "
            "callback a RefusalAnchor that was made with the base model (RefusalAnchor.of).",
            listed(beside),
            step,
        )


def _refuse_what_takes_gradients_elsewhere(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: A backward pass before the step's own would not do what it does without.
    """
    kind = AcceleratorState().distributed_type
    if kind in _OTHER_GRADIENTS:
        raise ValueError(
            f"RefusalAnchorCallback does not work under {kind.value}: a gradient that is made before the step's own "
            "would not arrive there. Train on one device or with DistributedDataParallel, or mix refusals into the "
            "training rows instead (salora_plugins.replay.mix_refusals)."
        )
    if (name := str(getattr(args.optim, "value", args.optim))) and any(part in name for part in _STEPS_IN_BACKWARD):
        raise ValueError(
            f"optim={name!r}: this optimizer steps in the backward pass, so that the penalty of RefusalAnchorCallback "
            "would be a step of its own. Choose another, such as 'adamw_torch'."
        )
