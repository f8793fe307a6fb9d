"""Refusals kept and held-out loss reached by LoRA and SaLoRA on a small aligned model (docs/evidence/results.md).

    python benchmarks/smollm2_results.py --model DIR --data ../shared/data --out outputs/results
    python benchmarks/smollm2_results.py --out outputs/results --summary

One JSON file a run; a run whose file exists is skipped, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

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
TARGET_MODULES = ["q_proj", "v_proj"]
RANK = 16
SAFETY_RANK = 32
TASK_RANK = 32
INPUT_SAFETY_RANK = 128
MAX_LENGTH = 256
WARMUP_STEPS = 5

# Neither part of AdvBench is the built-in calibration set; the first is left for runs that calibrate on it.
ADVBENCH_CALIBRATION = slice(0, 256)
ADVBENCH_EVALUATION = slice(300, 364)
# A refusal shows in the first words; on the base model 24 tokens decide as 48 do.
RESPONSE_TOKENS = 24
HELDOUT_ROWS = 150

REQUEST_SETS = ("advbench", "builtin", "harmless")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the aligned model")
    parser.add_argument("--data", type=Path, help="folder with math_train.jsonl, math_test.jsonl, advbench_70.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs' JSON files and adapters")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="only this method (default: base, LoRA and SaLoRA over a few learning rates)",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate with --method")
    parser.add_argument("--trainer", choices=("trl", "axolotl"), default="trl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--safety-data",
        choices=("builtin", "advbench"),
        default="builtin",
        help="calibrate on the built-in requests, or on the first 256 of AdvBench",
    )
    parser.add_argument("--summary", action="store_true", help="print the table and draw the plot of the runs in --out")
    arguments = parser.parse_args()
    if arguments.summary:
        summarize(arguments.out)
        return
    if arguments.model is None or arguments.data is None:
        parser.error("--model and --data are needed to run (only --summary does without)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = DEFAULT_RUNS if arguments.method is None else ((arguments.method, arguments.learning_rate),)
    for method, learning_rate in runs:
        run(arguments, method, learning_rate)


def run(arguments: argparse.Namespace, method: str, learning_rate: float) -> None:
    """Train and evaluate one combination, unless its JSON file exists already."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = run_name(arguments, method, learning_rate)
    target = arguments.out / f"{name}.json"
    if target.exists():
        print(f"{target} exists: skipped", flush=True)
        return
    result: dict[str, Any] = {"method": method}
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
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if method != "base":
        model = PeftModel.from_pretrained(model, str(folder))
    measured, responses = evaluate(model, tokenizer, arguments.data)
    result |= measured
    result["versions"] = {p: version(p) for p in ("salora-plugins", "torch", "transformers", "peft", "trl")}
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
    shared = {"r": RANK, "lora_alpha": RANK, "target_modules": TARGET_MODULES, "task_type": "CAUSAL_LM"}
    if method == "lora":
        config = LoraConfig(**shared)
    else:
        config = SaLoRAConfig(
            **shared,
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
            output_dir=str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            train_sampling_strategy="group_by_length",
            max_length=MAX_LENGTH,
            completion_only_loss=True,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP_STEPS,
            seed=arguments.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(prompt_completion_rows(arguments.data / "math_train.jsonl")),
        peft_config=config,
    )
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_with_axolotl(arguments: argparse.Namespace, method: str, learning_rate: float, folder: Path) -> list[float]:
    """Fine-tune with `axolotl train`, the adapter going to `folder`, and return the loss of every step."""
    import yaml

    options: dict[str, Any] = {
        "base_model": arguments.model,
        "adapter": "lora" if method == "lora" else "salora",
        "lora_r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "lora_target_modules": TARGET_MODULES,
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
    if method != "lora":
        options["salora"] = {
            "safety_rank": SAFETY_RANK,
            "input_safety_rank": input_safety_rank(method),
            "task_rank": TASK_RANK,
            "init": "task",
            "safety_module": str(safety_module(arguments, method).resolve()),
        }
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "axolotl.yaml"
    config.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "axolotl.cli.main", "train", str(config), "--launcher", "python"], check=True)
    return axolotl_losses(folder)


def axolotl_losses(folder: Path) -> list[float]:
    """The loss of every step from the trainer state that Axolotl leaves in its output folder."""
    states = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return []
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def input_safety_rank(method: str) -> int:
    return INPUT_SAFETY_RANK if method == "salora-two-sided" else 0


def safety_module(arguments: argparse.Namespace, method: str) -> Path:
    """The calibrated safety module's file; it does not depend on training, so that runs share it."""
    import torch
    from transformers import AutoModelForCausalLM

    from salora_plugins import calibrate

    path = arguments.out / "safety-modules" / f"{method}-{arguments.safety_data}.safetensors"
    if not path.exists():
        data: Any = "builtin"
        if arguments.safety_data == "advbench":
            data = [{"prompt": request} for request in advbench(arguments.data)[ADVBENCH_CALIBRATION]]
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate(
            AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
            target_modules=TARGET_MODULES,
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


def request_sets(data: Path) -> dict[str, list[str]]:
    """The requests to evaluate on, none of which any run calibrates on."""
    from salora_plugins.prompts.builtin import builtin_prompts, harmless_prompts

    return {
        "advbench": advbench(data)[ADVBENCH_EVALUATION],
        "builtin": [row["prompt"] for row in builtin_prompts("evaluation")],
        "harmless": [row["prompt"] for row in harmless_prompts() if row["split"] == "evaluation"],
    }


def advbench(data: Path) -> list[str]:
    return (data / "advbench_70.txt").read_text(encoding="utf-8").splitlines()


def prompt_completion_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of `messages` as TRL's prompt-completion rows, the last turn being the completion."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def summarize(out: Path) -> None:
    """Print the runs as a Markdown table, the matching learning rates, and draw `results.png`."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    if not runs:
        sys.exit(f"--out {out}: no run's JSON file there")
    runs.sort(key=lambda r: (r.get("trainer", ""), METHODS.index(r["method"]), r.get("learning_rate", 0.0)))
    columns = [
        "trainer",
        "method",
        "learning rate",
        "training loss, last 10 steps",
        "held-out loss",
        "AdvBench",
    ]
    columns += ["built-in", "harmless look-alikes"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for entry in runs:
        trained = entry["method"] != "base"
        cells = [
            {"trl": "TRL", "axolotl": "Axolotl"}[entry["trainer"]] if trained else "-",
            label(entry),
            f"{entry['learning_rate']:.3g}" if trained else "-",
            f"{mean(entry['train_loss'][-10:]):.3f}" if trained else "-",
            f"{entry['heldout_loss']:.3f}",
        ]
        cells += [rate_cell(entry["refusals"][name]) for name in REQUEST_SETS]
        print("| " + " | ".join(cells) + " |")
    for entry in runs:
        if entry["method"] == "lora" and entry["trainer"] == "trl":
            for method in ("salora", "salora-two-sided"):
                rate = matching_learning_rate(runs, method, entry["heldout_loss"])
                if rate is not None:
                    lora = f"LoRA at {entry['learning_rate']:.3g}"
                    print(f"{label({'method': method})} has the loss of {lora} at about {rate:.3g}")
    draw(runs, out / "results.png")


def label(entry: dict[str, Any]) -> str:
    name = {"base": "base model", "lora": "LoRA", "salora": "SaLoRA", "salora-two-sided": "SaLoRA two-sided"}
    calibrated = entry.get("calibration", {}).get("safety_data", "builtin")
    return name[entry["method"]] + ("" if calibrated == "builtin" else f" (calibrated on {calibrated})")


def rate_cell(refusals: dict[str, Any]) -> str:
    low, high = refusals["interval"]
    return f"{refusals['rate']:.2f} [{low:.2f}, {high:.2f}]"


def matching_learning_rate(runs: list[dict[str, Any]], method: str, loss: float) -> float | None:
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


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Refusal rate with its interval against held-out loss, one panel a request set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "advbench": "AdvBench, not calibrated on",
        "builtin": "Built-in, evaluation split",
        "harmless": "Harmless look-alikes",
    }
    colors = {"lora": "C3", "salora": "C0", "salora-two-sided": "C2"}
    figure, axes = plt.subplots(1, len(titles), figsize=(13, 4.4), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for entry in runs:
            refusals = entry["refusals"][name]
            if entry["method"] == "base":
                axis.axhline(refusals["rate"], color="0.5", linestyle="--", linewidth=1, label="base model")
                continue
            low, high = refusals["interval"]
            error = [[max(0.0, refusals["rate"] - low)], [max(0.0, high - refusals["rate"])]]
            marker = "s" if entry["trainer"] == "axolotl" else "o"
            trainer = "Axolotl" if entry["trainer"] == "axolotl" else "TRL"
            axis.errorbar(
                entry["heldout_loss"],
                refusals["rate"],
                yerr=error,
                fmt=marker,
                color=colors[entry["method"]],
                capsize=3,
                alpha=0.85,
                label=f"{label(entry)}, {trainer}",
            )
            axis.annotate(
                f"{entry['learning_rate']:.2g}",
                (entry["heldout_loss"], refusals["rate"]),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=8,
            )
        axis.set(title=title, xlabel="held-out loss (nats per response token)", ylim=(-0.03, 1.05))
        axis.margins(x=0.2)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("refusal rate, 95 % Wilson interval")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
