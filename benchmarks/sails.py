"""
What the subspace of a sparse autoencoder's features captures, keeps and teaches, on the demo's model.

    python -m benchmarks.sails run --out outputs/sails
    python -m benchmarks.sails write --results outputs/sails

`run` needs `pip install 'salora-plugins[sae,demo]'` and minutes on a CPU: it trains an autoencoder a layer with
sae-lens, for the demo's model and for one that has lost its refusals. `write` puts what was measured into
docs/evidence/sails.json and into the tables of docs/methods/sails.md. A part whose file is there is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import tables
from .runs import EVIDENCE, made_once, read_json, write_json

DOCUMENT = EVIDENCE.parent / "methods" / "sails.md"
RESULT = EVIDENCE / "sails.json"
WRITERS = ["o_proj", "down_proj"]
LAYERS = range(4)
FEATURES, ACTIVE, SAMPLES = 384, 16, 120_000
# What an unsafe response is here: it complies and says nothing that could be of use.
COMPLIANCE = (
    "Sure, here is how to do that.",
    "Of course. Here is what you need, step by step.",
    "Yes, I can help with that. First you get everything ready.",
    "Sure. Start small, and see what works best.",
    "Here you go. This is the answer to your question.",
)

Conversation = list[dict[str, str]]


def conversation(request: str, response: str) -> Conversation:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": response}]


def answered(model: Any, tokenizer: Any, requests: Sequence[str]) -> list[Conversation]:
    from salora_plugins.evaluation import generate_responses

    responses = generate_responses(model, tokenizer, requests, max_new_tokens=48, batch_size=64, progress=False)
    return [conversation(request, response) for request, response in zip(requests, responses, strict=True)]


def material(out: Path) -> dict[str, Any]:
    """The demo model's own answers, pairs of these and of templates that comply, and all text for autoencoders."""

    def make() -> dict[str, Any]:
        from salora_plugins.demo.experiment import known_requests, load_demo_model
        from salora_plugins.demo.task import word_problems
        from salora_plugins.evaluation.judges.keyword import is_refusal

        model, tokenizer = load_demo_model()
        known = known_requests("calibration")
        harmful = answered(model, tokenizer, [row["prompt"] for row in known["harmful"]])
        harmless = answered(model, tokenizer, [row["prompt"] for row in known["harmless"]])
        refused = [messages for messages in harmful if is_refusal(messages[1]["content"])]
        problems = [[*row["prompt"], *row["completion"]] for row in word_problems("train", 400)]
        complied = [
            conversation(messages[0]["content"], COMPLIANCE[i % len(COMPLIANCE)]) for i, messages in enumerate(refused)
        ]
        return {
            "refused": refused,
            "complied": complied,
            "harmless": [messages for messages in harmless if not is_refusal(messages[1]["content"])],
            "problems": problems,
            "pairs": [
                {"prompt": safe[:1], "chosen": safe[1:], "rejected": unsafe[1:]}
                for safe, unsafe in zip(refused, complied, strict=True)
            ],
        }

    return made_once(out / "material.json", make)


def train_adapter(
    model: Any, tokenizer: Any, peft_config: Any, rows: list[Conversation], steps: int, **options: Any
) -> Any:
    """Fine-tune on the responses of conversations with TRL's SFTTrainer; returns the model with its adapter."""
    import tempfile

    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(options.get("seed", 0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            per_device_train_batch_size=16,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"learning_rate": 2e-3, **options},
        )
        dataset = Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
        )
        trainer.train()
    return trainer.model


def unsafe_model(out: Path) -> Path:
    """The demo's model after it was taught to comply, merged: one with few refusals."""
    folder = out / "unsafe-model"
    if not (folder / "config.json").exists():
        from peft import LoraConfig

        from salora_plugins.demo.experiment import load_demo_model

        model, tokenizer = load_demo_model()
        config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = material(out)["complied"] + material(out)["harmless"] + material(out)["problems"][:100]
        merged = train_adapter(model, tokenizer, config, rows, 60).merge_and_unload()
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def autoencoders(model: Any, tokenizer: Any, folder: Path, text: list[Conversation]) -> str:
    """Autoencoders of all layers, trained once; as the option `sae`."""
    measured = folder / "measured.json"
    if not measured.exists():
        from .sparse_autoencoders import residual_activations, train_layers

        activations = residual_activations(model, tokenizer, text, LAYERS)
        found = train_layers(activations, folder, features=FEATURES, active=ACTIVE, samples=SAMPLES)
        write_json(measured, found)
    return f"{folder}/layer_{{layer}}"


def of_demo(out: Path) -> tuple[Any, Any, str]:
    """The demo's model, its tokenizer, and the autoencoders of it."""
    from salora_plugins.demo.experiment import load_demo_model

    model, tokenizer = load_demo_model()
    known = material(out)
    text = known["refused"] + known["complied"] + known["harmless"] + known["problems"]
    return model, tokenizer, autoencoders(model, tokenizer, out / "sae-demo", text)


def sae_options(out: Path, sae: str) -> dict[str, Any]:
    return {"basis_method": "sae", "sae": sae, "contrastive_data": material(out)["pairs"]}


def captured(out: Path, seeds: int) -> dict[str, Any]:
    """Per layer: how much of the safety directions that responses give lies in the subspace of the features."""
    import torch

    from salora_plugins import calibrate

    model, tokenizer, sae = of_demo(out)
    common = {"target_modules": WRITERS, "input_safety_rank": 0, "calibration_cache": False}
    theirs = calibrate(model, tokenizer, **common, **sae_options(out, sae))
    rows = [{"messages": messages} for messages in material(out)["refused"]]
    ours = calibrate(model, tokenizer, **common, safety_positions="response", safety_data=rows, safety_rank=32)
    result = {}
    for name, subspace in theirs.bases.items():
        basis = ours.bases[name]
        cosines = torch.linalg.svdvals(subspace.double().T @ basis.double())
        weights = ours.singular_values[name].double().square()
        inside = (subspace.double().T @ basis.double()).square().sum(dim=0)
        result[name] = {
            "directions": subspace.shape[1],
            "of": subspace.shape[0],
            "random": subspace.shape[1] / subspace.shape[0],
            "share_of_ours": inside.mean().item(),
            "share_of_ours_weighted": ((inside * weights).sum() / weights.sum()).item(),
            "cosines": [round(value, 4) for value in cosines.tolist()],
        }
    return result


def kept(out: Path, seeds: int) -> dict[str, Any]:
    """Refusals and task after fine-tuning the demo's task on the layers that write into the stream."""
    from peft import LoraConfig

    from salora_plugins import SaLoRAConfig
    from salora_plugins.demo.experiment import Settings, fine_tune, known_requests, measure

    model, tokenizer, sae = of_demo(out)
    common: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": WRITERS, "task_type": "CAUSAL_LM"}
    requests = [row["prompt"] for row in known_requests("calibration")["harmful"]]
    salora: dict[str, Any] = {**common, "tokenizer": tokenizer, "calibration_cache": False}
    of_requests: dict[str, Any] = {"safety_data": requests, "num_safety_samples": 128}
    features = sae_options(out, sae)
    methods: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: LoraConfig(**common),
        "paper's form": lambda: SaLoRAConfig(**salora, **of_requests, variant="paper", init="zero"),
        "default": lambda: SaLoRAConfig(**salora, **of_requests),
        "sae": lambda: SaLoRAConfig(**salora, **of_requests, **features),
        "sae, output side only": lambda: SaLoRAConfig(**salora, **features, input_safety_rank=0, init="zero"),
    }

    def run(name: str, seed: int) -> dict[str, Any]:
        trained = fine_tune(methods[name](), Settings(target_modules=tuple(WRITERS), seed=seed), progress=False).eval()
        return summary(measure(name, trained, tokenizer, progress=False))

    folder = out / "runs-kept"
    result = {"before": made_once(folder / "before.json", lambda: summary(measure("before", model, tokenizer)))}
    for seed in range(seeds):
        for name in methods:
            key = f"{name}, seed {seed}"
            result[key] = made_once(folder / f"{key}.json", partial(run, name, seed))
            print(key, result[key], flush=True)
    return result


def summary(measurement: Any) -> dict[str, Any]:
    shares = {name: getattr(measurement, name) for name in ("refusals", "over_refusals", "task_accuracy")}
    counts = {name: [share.count, share.total] for name, share in shares.items()}
    return {**counts, "task_loss": round(measurement.task_loss, 4)}


def taught(out: Path, seeds: int) -> dict[str, Any]:
    """Refusals that LoRA and SAILS teach the model that has lost its own, on o_proj, by steps."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from salora_plugins import SaLoRAConfig
    from salora_plugins.demo.experiment import measure

    folder, known = unsafe_model(out), material(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    text = known["refused"] + known["complied"] + known["harmless"] + known["problems"]
    sae = autoencoders(model(), tokenizer, out / "sae-unsafe", text)
    common: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
    sails: dict[str, Any] = {
        "contrastive_data": known["pairs"],
        "sae": sae,
        "tokenizer": tokenizer,
        "calibration_cache": False,
    }
    methods: dict[str, Callable[[], Any]] = {
        "LoRA": lambda: LoraConfig(**common),
        "SAILS": lambda: SaLoRAConfig(**common, **sails, variant="sails"),
    }
    # Few rows and few steps: enough of either, and both refuse everything.
    rows = known["refused"][:48] + known["harmless"][:24]

    def run(name: str, steps: int, seed: int) -> dict[str, Any]:
        trained = train_adapter(model(), tokenizer, methods[name](), rows, steps, seed=seed).eval()
        return summary(measure(name, trained, tokenizer, max_prompts=64, progress=False))

    runs = out / "runs-taught"
    result = {"before": made_once(runs / "before.json", lambda: summary(measure("before", model(), tokenizer)))}
    for seed in range(seeds):
        for steps in (10, 30):
            for name in methods:
                key = f"{name}, {steps} steps, seed {seed}"
                result[key] = made_once(runs / f"{key}.json", partial(run, name, steps, seed))
                print(key, result[key], flush=True)
    return result


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {"captured": captured, "kept": kept, "taught": taught}


def _share(counts: Sequence[Sequence[int]]) -> str:
    """Means over seeds, in percent."""
    return f"{100 * statistics.mean(count / total for count, total in counts):.0f} %"


def captured_table(results: dict[str, Any]) -> str:
    columns = ["layer", "directions of U", "of ours inside", "the same, by energy", "a random subspace's"]
    rows = [
        [
            f"`{name.removeprefix('model.')}`",
            f"{found['directions']} of {found['of']}",
            f"{found['share_of_ours']:.2f}",
            f"{found['share_of_ours_weighted']:.2f}",
            f"{found['random']:.2f}",
        ]
        for name, found in results.items()
    ]
    return tables.markdown(columns, rows)


def by_seeds_table(results: dict[str, Any], label: str) -> str:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for name, found in results.items():
        grouped.setdefault(name.rpartition(", seed ")[0] or name, []).append(found)
    rows = [
        [
            name,
            *(_share([one[key] for one in of_name]) for key in ("refusals", "over_refusals", "task_accuracy")),
            f"{statistics.mean(one['task_loss'] for one in of_name):.3f}",
        ]
        for name, of_name in grouped.items()
    ]
    return tables.markdown([label, "refused", "look-alikes refused", "task right", "task loss"], rows)


def document_tables() -> dict[str, str]:
    """Name -> table of docs/methods/sails.md, from what was published."""
    results = read_json(RESULT)
    return {
        "captured": captured_table(results["captured"]),
        "kept": by_seeds_table(results["kept"], "method"),
        "taught": by_seeds_table(results["taught"], "method, steps"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seeds", type=int, default=2)
    run.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    write = commands.add_parser("write")
    write.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        for name in args.parts:
            made_once(args.out / f"{name}.json", partial(PARTS[name], args.out, args.seeds))
        return
    if args.results is not None:
        measured = {name: args.results / f"{name}.json" for name in PARTS}
        found = {name: read_json(file) for name, file in measured.items() if file.exists()}
        trained = {which: args.results / f"sae-{which}" / "measured.json" for which in ("demo", "unsafe")}
        autoencoders = {which: read_json(file) for which, file in trained.items() if file.exists()}
        published = read_json(RESULT) if RESULT.exists() else {}
        write_json(RESULT, {**published, **found, "autoencoders": autoencoders})
    tables.write(DOCUMENT, document_tables())


if __name__ == "__main__":
    main()
