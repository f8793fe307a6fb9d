"""Refusals kept and held-out loss reached on a small aligned model (docs/evidence/results.md).

By LoRA, by the paper's form (`salora`) and by one with an input side, too (`salora-two-sided`).

    python -m benchmarks.smollm2_results --model DIR --data ../shared/data --out outputs/results
    python -m benchmarks.smollm2_results --summary --out outputs/results
    python -m benchmarks.smollm2_results --publish --out outputs/results
    python -m benchmarks.smollm2_results --summary --write

One JSON file a run; a run whose file exists is skipped, so an interrupted benchmark goes on where it was. The published
runs are one file, one run a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from . import tables
from .runs import EVIDENCE, MERGED, Run, read_json, read_runs, versions, write_json, write_runs
from .small_model import (
    DPI,
    MAX_LENGTH,
    QV,
    RANK,
    RESPONSE_TOKENS,
    WARMUP_STEPS,
    advbench,
    legend_below,
    load,
    lora_options,
    new_figure,
    prompt_completion_rows,
    request_sets,
    sft_options,
    step_losses,
)

DOCUMENT = EVIDENCE / "results.md"
PUBLISHED = EVIDENCE / "results"

METHODS = ("base", "lora", "salora", "salora-two-sided")
DEFAULT_RUNS = (
    ("base", 0.0),
    ("lora", 5e-4),
    ("lora", 1e-3),
    ("salora", 5e-4),
    ("salora", 1e-3),
    ("salora-two-sided", 1e-3),
)

# The same for every method and both trainers.
SAFETY_RANK = 32
TASK_RANK = 32
INPUT_SAFETY_RANK = 128

ADVBENCH_CALIBRATION = slice(0, 256)
HELDOUT_ROWS = 150

REQUEST_SETS = {
    "advbench": ("AdvBench", "AdvBench, not calibrated on"),
    "builtin": ("built-in", "Built-in, evaluation split"),
    "harmless": ("harmless look-alikes", "Harmless look-alikes"),
}
"""Name -> its column in the table, and the title of its panel."""
TRAINERS = {"trl": "TRL", "axolotl": "Axolotl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the aligned model")
    parser.add_argument("--data", type=Path, help="folder with math_train.jsonl, math_test.jsonl, advbench_70.txt")
    parser.add_argument("--out", type=Path, help="folder for the runs' JSON files and adapters")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="only this method (default: base, LoRA and both forms over a few learning rates)",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate with --method")
    parser.add_argument("--trainer", choices=tuple(TRAINERS), default="trl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--safety-data",
        choices=("builtin", "advbench"),
        default="builtin",
        help="calibrate on the built-in requests, or on the first 256 of AdvBench",
    )
    parser.add_argument(
        "--summary", action="store_true", help="print the table and draw the plot of the runs in --out, or published"
    )
    parser.add_argument("--write", action="store_true", help="with --summary: write the published runs' table")
    parser.add_argument("--publish", action="store_true", help="add the runs in --out to the published ones")
    arguments = parser.parse_args()
    if arguments.summary:
        summarize(arguments.out, arguments.write)
        return
    if arguments.out is None:
        parser.error("--out is needed (only --summary does without)")
    if arguments.publish:
        write_runs(PUBLISHED / MERGED, published_runs() | runs_in(arguments.out))
        return
    if arguments.model is None or arguments.data is None:
        parser.error("--model and --data are needed to run (only --summary and --publish do without)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = DEFAULT_RUNS if arguments.method is None else ((arguments.method, arguments.learning_rate),)
    for method, learning_rate in runs:
        run(arguments, method, learning_rate)


def run(arguments: argparse.Namespace, method: str, learning_rate: float) -> None:
    """Train and evaluate one combination, unless its JSON file exists already."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    name = run_name(arguments, method, learning_rate)
    target = arguments.out / f"{name}.json"
    if target.exists():
        print(f"{target} exists: skipped", flush=True)
        return
    result: Run = {"method": method}
    folder = arguments.out / "adapters" / name
    if method != "base":
        started = time.monotonic()
        train = train_with_trl if arguments.trainer == "trl" else train_with_axolotl
        train_losses = train(arguments, method, learning_rate, folder)
        result |= {
            "trainer": arguments.trainer,
            "learning_rate": learning_rate,
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "seed": arguments.seed,
            "train_loss": train_losses,
            "minutes": round((time.monotonic() - started) / 60, 2),
        }
        if method != "lora":
            result["calibration"] = calibration_of(folder) | {"safety_data": arguments.safety_data}
    # Evaluated as anybody would load it: a plain LoRA adapter on the base model, whichever trainer wrote it.
    model = load(arguments.model, use_gpu=False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if method != "base":
        model = PeftModel.from_pretrained(model, str(folder))
    measured, responses = evaluate(model, tokenizer, arguments.data)
    result |= measured
    result["versions"] = versions()
    write_json(arguments.out / "responses" / target.name, responses)
    write_json(target, result)
    print(json.dumps({key: result[key] for key in ("method", "heldout_loss", "refusals")}), flush=True)


def run_name(arguments: argparse.Namespace, method: str, learning_rate: float) -> str:
    """The file name of a run, without its suffix."""
    if method == "base":
        return "base"
    parts = [arguments.trainer, method, f"lr{learning_rate:.3g}", f"seed{arguments.seed}"]
    if arguments.batch_size != 8:
        parts.append(f"batch{arguments.batch_size}")
    if arguments.steps != 60:
        parts.append(f"steps{arguments.steps}")
    if arguments.safety_data != "builtin" and method != "lora":
        parts.append(arguments.safety_data)
    return "-".join(parts)


def train_with_trl(arguments: argparse.Namespace, method: str, learning_rate: float, folder: Path) -> list[float]:
    """Fine-tune with TRL's SFTTrainer, save the adapter to `folder`, and return the loss of every step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from salora_plugins import SaLoRAConfig

    set_seed(arguments.seed)
    if method == "lora":
        config = LoraConfig(**lora_options(QV))
    else:
        config = SaLoRAConfig(
            **lora_options(QV),
            safety_rank=SAFETY_RANK,
            input_safety_rank=input_safety_rank(method),
            task_rank=TASK_RANK,
            init="task",
            safety_module=safety_module(arguments, method),
            seed=arguments.seed,
        )
    trainer = SFTTrainer(
        model=arguments.model,
        args=SFTConfig(
            **sft_options(),
            output_dir=str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            train_sampling_strategy="group_by_length",
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            seed=arguments.seed,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(prompt_completion_rows(arguments.data / "math_train.jsonl")),
        peft_config=config,
    )
    trainer.train()
    trainer.save_model()
    return step_losses(trainer.state.log_history)


def train_with_axolotl(arguments: argparse.Namespace, method: str, learning_rate: float, folder: Path) -> list[float]:
    """Fine-tune with `axolotl train`, the adapter going to `folder`, and return the loss of every step."""
    import yaml

    options = axolotl_options(arguments, learning_rate, folder)
    if method != "lora":
        options |= {
            "adapter": "salora",
            "salora": {
                "safety_rank": SAFETY_RANK,
                "input_safety_rank": input_safety_rank(method),
                "task_rank": TASK_RANK,
                "init": "task",
                "safety_module": str(safety_module(arguments, method).resolve()),
            },
        }
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "axolotl.yaml"
    config.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "axolotl.cli.main", "train", str(config), "--launcher", "python"], check=True)
    return axolotl_losses(folder)


def axolotl_options(arguments: argparse.Namespace, learning_rate: float, folder: Path) -> dict[str, Any]:
    """Axolotl's configuration of a run with LoRA."""
    return {
        "base_model": arguments.model,
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "lora_target_modules": QV,
        "datasets": [
            {
                "path": str((arguments.data / "math_train.jsonl").resolve()),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
            }
        ],
        "chat_template": "tokenizer_default",
        "train_on_inputs": False,
        "sequence_len": MAX_LENGTH,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "micro_batch_size": arguments.batch_size,
        "group_by_length": True,
        "gradient_accumulation_steps": 1,
        "max_steps": arguments.steps,
        "learning_rate": learning_rate,
        "lr_scheduler": "cosine",
        "warmup_steps": WARMUP_STEPS,
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": arguments.seed,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": arguments.steps,
        "dataset_prepared_path": str(folder.resolve() / "prepared"),
        "output_dir": str(folder.resolve()),
    }


def axolotl_losses(folder: Path) -> list[float]:
    """The loss of every step from the trainer state that Axolotl leaves in its output folder."""
    states = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return step_losses(read_json(states[-1])["log_history"]) if states else []


def input_safety_rank(method: str) -> int:
    return INPUT_SAFETY_RANK if method == "salora-two-sided" else 0


def safety_module(arguments: argparse.Namespace, method: str) -> Path:
    """The calibrated safety module's file; it does not depend on training, so that runs share it."""
    from salora_plugins import calibrate

    path = arguments.out / "safety-modules" / f"{method}-{arguments.safety_data}.safetensors"
    if not path.exists():
        data: Any = "builtin"
        if arguments.safety_data == "advbench":
            data = [{"prompt": request} for request in advbench(arguments.data)[ADVBENCH_CALIBRATION]]
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(
            load(arguments.model, use_gpu=False),
            target_modules=QV,
            safety_data=data,
            safety_rank=SAFETY_RANK,
            input_safety_rank=input_safety_rank(method),
            safety_positions="predicting" if input_safety_rank(method) else "response",
        ).save(path)
    return path


def calibration_of(folder: Path) -> dict[str, Any]:
    """How many requests were refused and used, from the safety module beside a saved adapter."""
    from salora_plugins import SafetyModule

    provenance = SafetyModule.load(folder / "salora.safetensors").provenance
    return {key: provenance[key] for key in ("requests", "refusals", "safety_samples", "safety_positions")}


def evaluate(model: Any, tokenizer: Any, data: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Held-out loss in nats per response token, refusals by request set, and the responses themselves."""
    from salora_plugins.evaluation import response_loss, wilson_interval
    from salora_plugins.evaluation.generation import generate_responses
    from salora_plugins.evaluation.judges.keyword import is_refusal

    rows = prompt_completion_rows(data / "math_test.jsonl")[:HELDOUT_ROWS]
    result: dict[str, Any] = {
        "heldout_loss": response_loss(model, tokenizer, rows, batch_size=8),
        "heldout_rows": len(rows),
        "refusals": {},
    }
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, requests in request_sets(data).items():
        responses = generate_responses(model, tokenizer, requests, max_new_tokens=RESPONSE_TOKENS, batch_size=64)
        refused = [is_refusal(response) for response in responses]
        result["refusals"][name] = {
            "refused": sum(refused),
            "requests": len(refused),
            "rate": sum(refused) / len(refused),
            "interval": wilson_interval(sum(refused), len(refused)),
        }
        answers[name] = [
            {"prompt": prompt, "response": response, "refusal": refusal}
            for prompt, response, refusal in zip(requests, responses, refused, strict=True)
        ]
    return result, answers


def runs_in(out: Path) -> dict[str, Run]:
    return read_runs(out / MERGED, out.glob("*.json"))


def published_runs() -> dict[str, Run]:
    return read_runs(PUBLISHED / MERGED)


def document_tables() -> dict[str, str]:
    """Name -> table of the document, from the published runs."""
    return {"runs": runs_table(in_order(published_runs()))}


def summarize(out: Path | None, write: bool) -> None:
    """Print the runs as a Markdown table, or write it; print the matching learning rates, and draw `results.png`."""
    if write:
        tables.write(DOCUMENT, document_tables())
        print(f"wrote the table of {DOCUMENT}")
    runs = in_order(published_runs() if out is None else runs_in(out))
    if not runs:
        sys.exit(f"--out {out}: no run's JSON file there")
    print(runs_table(runs))
    for entry in runs:
        if entry["method"] == "lora" and entry["trainer"] == "trl":
            for method in ("salora", "salora-two-sided"):
                rate = matching_learning_rate(runs, method, entry["heldout_loss"])
                if rate is not None:
                    lora = f"LoRA at {entry['learning_rate']:.3g}"
                    print(f"{label({'method': method})} has the loss of {lora} at about {rate:.3g}")
    draw(runs, (out or PUBLISHED) / "results.png")


def in_order(runs: dict[str, Run]) -> list[Run]:
    """By trainer, method and learning rate."""
    return sorted(
        runs.values(), key=lambda r: (r.get("trainer", ""), METHODS.index(r["method"]), r.get("learning_rate", 0.0))
    )


def runs_table(runs: list[Run]) -> str:
    columns = ["trainer", "method", "learning rate", "training loss, last 10 steps", "held-out loss"]
    rows = []
    for entry in sorted(runs, key=lambda r: r.get("trainer", "") == "axolotl"):  # last
        trained = entry["method"] != "base"
        rows.append(
            [
                TRAINERS[entry["trainer"]] if trained else "-",
                label(entry),
                f"{entry['learning_rate']:.3g}" if trained else "-",
                f"{mean(entry['train_loss'][-10:]):.3f}" if trained else "-",
                f"{entry['heldout_loss']:.3f}",
                *(rate_cell(entry["refusals"][name]) for name in REQUEST_SETS),
            ]
        )
    return tables.markdown([*columns, *(column for column, _ in REQUEST_SETS.values())], rows)


def label(entry: dict[str, Any]) -> str:
    name = {"base": "base model", "lora": "LoRA", "salora": "paper's form", "salora-two-sided": "two-sided"}
    calibrated = entry.get("calibration", {}).get("safety_data", "builtin")
    return name[entry["method"]] + ("" if calibrated == "builtin" else f" (calibrated on {calibrated})")


def rate_cell(refusals: dict[str, Any]) -> str:
    low, high = refusals["interval"]
    return f"{refusals['rate']:.2f} [{low:.2f}, {high:.2f}]"


def matching_learning_rate(runs: list[Run], method: str, loss: float) -> float | None:
    """The learning rate at which a method reaches `loss`, log-linear between its runs; None outside them."""
    points = sorted(
        (run["heldout_loss"], run["learning_rate"])
        for run in runs
        if run["method"] == method and run["trainer"] == "trl" and run["calibration"]["safety_data"] == "builtin"
    )
    for (low, rate_low), (high, rate_high) in itertools.pairwise(points):
        if low <= loss <= high:
            share = (loss - low) / (high - low)
            return math.exp((1 - share) * math.log(rate_low) + share * math.log(rate_high))
    return None


def draw(runs: list[Run], path: Path) -> None:
    """Refusal rate with its interval against held-out loss, one panel a request set."""
    figure = new_figure((13, 4.4))
    axes = figure.subplots(1, len(REQUEST_SETS), sharey=True)
    for axis, (name, (_, title)) in zip(axes, REQUEST_SETS.items(), strict=True):
        for entry in runs:
            draw_run(axis, entry, entry["refusals"][name])
        axis.set(title=title, xlabel="held-out loss (nats per response token)", ylim=(-0.03, 1.05))
        axis.margins(x=0.2)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("refusal rate, 95 % Wilson interval")
    handles, labels = axes[0].get_legend_handles_labels()
    legend_below(figure, dict(zip(labels, handles, strict=True)), columns=4, frameon=False)
    figure.savefig(path, dpi=DPI)
    print(f"wrote {path}")


def draw_run(axis: Any, entry: Run, refusals: dict[str, Any]) -> None:
    """A point with its interval and learning rate; the base model as a line."""
    if entry["method"] == "base":
        axis.axhline(refusals["rate"], color="0.5", linestyle="--", linewidth=1, label="base model")
        return
    low, high = refusals["interval"]
    axis.errorbar(
        entry["heldout_loss"],
        refusals["rate"],
        yerr=[[max(0.0, refusals["rate"] - low)], [max(0.0, high - refusals["rate"])]],
        fmt="s" if entry["trainer"] == "axolotl" else "o",
        color={"lora": "C3", "salora": "C0", "salora-two-sided": "C2"}[entry["method"]],
        capsize=3,
        alpha=0.85,
        label=f"{label(entry)}, {TRAINERS[entry['trainer']]}",
    )
    axis.annotate(
        f"{entry['learning_rate']:.2g}",
        (entry["heldout_loss"], refusals["rate"]),
        textcoords="offset points",
        xytext=(5, 5),
        fontsize=8,
    )


if __name__ == "__main__":
    main()
