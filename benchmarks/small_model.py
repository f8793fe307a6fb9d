"""What the experiments on a small aligned model share: its loading, data, requests, and settings of training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The same for every method and trainer.
RANK = 16
MAX_LENGTH = 256
WARMUP_STEPS = 5
QV = ["q_proj", "v_proj"]

# A refusal shows in the first words; on the base model 24 tokens decide as 48 do.
RESPONSE_TOKENS = 24
DPI = 110  # of the plots
# No part of AdvBench is the built-in calibration set; what comes before these is left for runs that calibrate on it.
ADVBENCH_EVALUATION = slice(300, 364)


def load(folder: str, *, use_gpu: bool = True) -> Any:
    """The model in float32, whose type depends on its configuration; on the GPU where there is one to be used."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.cuda() if use_gpu and torch.cuda.is_available() else model


def lora_options(target_modules: list[str]) -> dict[str, Any]:
    """What PEFT's configuration of every method has."""
    return {"r": RANK, "lora_alpha": RANK, "target_modules": target_modules, "task_type": "CAUSAL_LM"}


def sft_options() -> dict[str, Any]:
    """What TRL's arguments of every run have."""
    return {
        "max_length": MAX_LENGTH,
        "completion_only_loss": True,
        "warmup_steps": WARMUP_STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": False,
    }


def step_losses(log_history: Iterable[Mapping[str, Any]]) -> list[float]:
    """The training loss of every step from a trainer's log."""
    return [entry["loss"] for entry in log_history if "loss" in entry]


def advbench(data: Path) -> list[str]:
    return (data / "advbench_70.txt").read_text(encoding="utf-8").splitlines()


def request_sets(data: Path) -> dict[str, list[str]]:
    """The requests to evaluate on, none of which any run calibrates on."""
    from salora_plugins.prompts.builtin import builtin_prompts, harmless_prompts, plain_prompts

    return {
        "advbench": advbench(data)[ADVBENCH_EVALUATION],
        "builtin": plain_prompts(builtin_prompts("evaluation")),
        "harmless": plain_prompts([row for row in harmless_prompts() if row["split"] == "evaluation"]),
    }


def prompt_completion_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of `messages` as TRL's prompt-completion rows, the last turn being the completion."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of this many inches."""
    from salora_plugins.support import plotting

    return plotting.new_figure(*size)


def legend_below(figure: Figure, handles: Mapping[str, Any], columns: int, **options: Any) -> None:
    """One legend for all panels."""
    labels: Sequence[str] = list(handles)
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns, **options)
