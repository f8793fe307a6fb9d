"""The demo's experiment: fine-tune the shipped model in a few ways, and measure each result in the same way."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from pydantic import BaseModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from ..config import SaLoRAConfig
from ..evaluation import generate_responses, response_loss
from ..evaluation.intervals import Proportion
from ..evaluation.judges.keyword import is_refusal
from ..prompts.builtin import builtin_prompts, harmless_prompts
from .task import is_correct, word_problems

MODEL = Path(__file__).parent / "model"
TRAIN_ROWS = 1024
TEST_ROWS = 128
MAX_NEW_TOKENS = 48
_KNOWN_HARMFUL = {"calibration": 196, "evaluation": 98}
_KNOWN_HARMLESS = 70


@dataclass(frozen=True)
class Settings:
    """What all fine-tuned variants have in common."""

    steps: int = 120
    learning_rate: float = 2e-3
    seed: int = 0
    batch_size: int = 16
    rank: int = 16
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Measurement(BaseModel):
    """What was measured on one model. The loss is per response token, in nats."""

    name: str
    refusals: Proportion
    over_refusals: Proportion
    task_accuracy: Proportion
    task_loss: float
    responses: dict[str, list[dict[str, str]]]
    """Every request with the model's response, by set."""


def load_demo_model() -> tuple[PreTrainedModel, Any]:
    """The shipped model in float32, in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


def adapters(settings: Settings, tokenizer: Any) -> dict[str, PeftConfig]:
    """The adapters that are compared, by name: they differ in the method only."""
    common: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": settings.lora_alpha,
        "target_modules": list(settings.target_modules),
        "task_type": "CAUSAL_LM",
    }
    requests = [row["prompt"] for row in known_requests("calibration")["harmful"]]
    salora = {
        **common,
        "tokenizer": tokenizer,
        "seed": settings.seed,
        "safety_data": requests,
        "num_safety_samples": 128,
    }
    return {
        "LoRA": LoraConfig(**common),
        "SaLoRA, the paper's form": SaLoRAConfig(**salora, variant="paper"),
        "SaLoRA": SaLoRAConfig(**salora),
    }


def fine_tune(peft_config: PeftConfig, settings: Settings, progress: bool = True) -> nn.Module:
    """Fine-tune the shipped model on the task with TRL's SFTTrainer; returns the model with its adapter."""
    set_seed(settings.seed)
    model, tokenizer = load_demo_model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=settings.steps,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                per_device_train_batch_size=settings.batch_size,
                seed=settings.seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                disable_tqdm=not progress,
            ),
            train_dataset=Dataset.from_list(word_problems("train", TRAIN_ROWS, settings.seed)),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
    return trainer.model  # type: ignore[return-value]  # None only until a trainer is made


def known_requests(split: str) -> dict[str, list[dict[str, Any]]]:
    """
    The "harmful" and "harmless" rows of a split that stood in the built-in sets when the demo's model was made, English
    and of one turn; what else they hold today it refuses as a whole, since it does not know the words.
    """
    harmless = [row for row in harmless_prompts() if row["split"] == split]
    return {"harmful": builtin_prompts(split)[: _KNOWN_HARMFUL[split]], "harmless": harmless[:_KNOWN_HARMLESS]}


def measure(
    name: str, model: nn.Module, tokenizer: Any, max_prompts: int | None = None, progress: bool = True
) -> Measurement:
    """Let a model answer the held-out requests and word problems, and count.

    Args:
        name: what the model is called in the results.
        model: the model, with or without an adapter.
        tokenizer: its tokenizer.
        max_prompts: ask at most so many of each set, spread evenly over it; None asks all.
        progress: show a progress bar.
    """

    def some(rows: list[Any]) -> list[Any]:
        return rows if max_prompts is None else rows[:: math.ceil(len(rows) / max_prompts)]

    problems = some(word_problems("test", TEST_ROWS))
    prompts = {
        **{name: some([row["prompt"] for row in rows]) for name, rows in known_requests("evaluation").items()},
        "task": [row["prompt"][0]["content"] for row in problems],
    }
    everything = [prompt for part in prompts.values() for prompt in part]
    answers = iter(
        generate_responses(
            model, tokenizer, everything, max_new_tokens=MAX_NEW_TOKENS, batch_size=64, progress=progress
        )
    )
    responses = {part: [{"prompt": prompt, "response": next(answers)} for prompt in prompts[part]] for part in prompts}

    def share(part: str, counts: Callable[[str], bool]) -> Proportion:
        rows = responses[part]
        return Proportion(count=sum(counts(row["response"]) for row in rows), total=len(rows))

    correct = [is_correct(problem, row["response"]) for problem, row in zip(problems, responses["task"], strict=True)]
    return Measurement(
        name=name,
        refusals=share("harmful", is_refusal),
        over_refusals=share("harmless", is_refusal),
        task_accuracy=Proportion(count=sum(correct), total=len(correct)),
        task_loss=response_loss(model, tokenizer, problems, batch_size=64),
        responses=responses,
    )
