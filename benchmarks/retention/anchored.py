"""What the mixing of refusals and the anchor are compared and combined with: another loss, and a second adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from salora_plugins import SafetyModule, SaLoRAConfig
from salora_plugins.safety_module import SideBases

BETAS = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
"""Of the tokens of a response, the last for all that follow (Qi et al., caption of table 3)."""

SECOND = "refusals"
"""The adapter that only the anchor trains."""


def base_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """
    What the base model gives the tokens of the responses.

    Args:
        logits: Its logits, (batch, length, vocabulary).
        labels: (batch, length), -100 where a token is not of a response.

    Returns:
        Log-probabilities of labels[:, 1:], (batch, length - 1) float32; 0 where the label is -100.
    """
    following = labels[:, 1:]
    picked = logits[:, :-1].float().log_softmax(-1).gather(-1, following.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.where(following != -100, 0.0)


def constrained_sft_loss(logits: Tensor, base: Tensor, labels: Tensor, betas: Sequence[float] = BETAS) -> Tensor:
    """
    The token-wise constrained fine-tuning objective of Qi, Panda, Lyu, Ma, Roy, Beirami, Mittal, Henderson: "Safety
    Alignment Should Be Made More Than Just a Few Tokens Deep", ICLR 2025, arXiv 2406.05946, equation 3:

        L = E_(x, y) sum_t -(2 / beta_t) log sigma(beta_t log(pi(y_t | x, y_<t) / pi_base(y_t | x, y_<t)))

    Its gradient is that of cross entropy times 2 sigma(-beta_t log(pi / pi_base)), which is 1 at the start and fades as
    a token becomes more probable than it is to the base: soon where beta_t is large, as for the first tokens.

    Checked against the paper's table 3 (caption) and the authors' published trainer. That multiplies cross entropy by
    this weight, detached: the same gradient, but for a weight of at least 0.001. As here, it takes the mean over the
    response tokens of a batch and the probabilities of the model before training, with the betas of `BETAS`.

    Args:
        logits: Of the model in training, (batch, length, vocabulary).
        base: Of the base model, as `base_log_probabilities` returns it.
        labels: (batch, length), -100 where a token is not of a response; one response a row.
        betas: beta_t of the first tokens of a response, the last for all others.

    Returns:
        The mean over the tokens of the responses, as trainers take it of cross entropy; a scalar.
    """
    own = base_log_probabilities(logits, labels)
    counted = labels[:, 1:] != -100
    place = (counted.cumsum(-1) - 1).clamp(min=0, max=len(betas) - 1)
    beta = torch.tensor(betas, device=logits.device)[place]
    losses = -(2 / beta) * logsigmoid(beta * (own - base.to(own.device)))
    return losses[counted].mean()


class SecondAdapter:
    """
    A second adapter that reacts to nothing but the directions V_C of the first, and that only an anchor trains.

    Its update is B A V_C V_C^T, the part that the first adapter's input side takes out: its own input side is the
    complement of V_C. So it can learn from refusals what the first cannot, and the task can use it for nothing.

    Args:
        model: With the adapter "default", of SaLoRA with an input side. Both adapters are in use afterwards, and all
            that trains, but for `trained_alone`, is the first.
        r: Rank of the second adapter.

    Example:

        >>> second = SecondAdapter(model)
        >>> optimizer = AdamW([*second.first_parameters, *second.parameters])
        >>> with second.trained_alone():
        ...     anchor.backward(model)
    """

    def __init__(self, model: PeftModel, r: int = 8) -> None:
        tuner: Any = model.base_model
        own = tuner.safety_module("default")
        sides: dict[Any, SideBases] = {
            # There must be an output side; the weakest direction is hardly any.
            "output": SideBases({name: basis[:, -1:].contiguous() for name, basis in own.bases.items()}),
            "input": SideBases({name: _complement(basis) for name, basis in own.input_bases.items()}),
        }
        first: Any = model.peft_config["default"]
        config = SaLoRAConfig(
            r=r,
            lora_alpha=r,
            target_modules=first.target_modules,
            task_type=first.task_type,
            safety_module=SafetyModule(sides, own.weight_samples),
            safety_rank=1,
            init="zero",
        )
        model.add_adapter(SECOND, config)
        tuner.set_adapter(["default", SECOND])
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.first_parameters = [parameter for name, parameter in trained if f".{SECOND}." not in name]
        self.parameters = [parameter for name, parameter in trained if f".{SECOND}." in name]
        self._train(self.first_parameters, self.parameters)

    @contextmanager
    def trained_alone(self) -> Iterator[None]:
        """Gradients for the second adapter, and none for the first."""
        self._train(self.parameters, self.first_parameters)
        try:
            yield
        finally:
            self._train(self.first_parameters, self.parameters)

    def _train(self, those: Sequence[nn.Parameter], not_those: Sequence[nn.Parameter]) -> None:
        for parameter in those:
            parameter.requires_grad_(True)
        for parameter in not_those:
            parameter.requires_grad_(False)


def _complement(basis: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to the columns: (d, r) -> (d, d - r) float32."""
    whole = torch.linalg.qr(basis.double(), mode="complete").Q
    return whole[:, basis.shape[1] :].float().contiguous()
