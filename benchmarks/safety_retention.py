"""What is kept of a model's refusals at which task loss, by method (docs/evidence/safety-retention.md).

    python benchmarks/safety_retention.py run --model DIR --data ../shared/data --out outputs/retention
    python benchmarks/safety_retention.py run ... --methods lora,two-sided --tasks sure --seeds 0 --rates 1e-3
    python benchmarks/safety_retention.py run ... --task mine=conversations.jsonl --tasks mine
    python benchmarks/safety_retention.py requests ... --requests mine=requests.txt
    python benchmarks/safety_retention.py leak --model DIR --data ../shared/data --out outputs/retention
    python benchmarks/safety_retention.py summary

Every run trains one method on one task with one learning rate and seed, and is measured at several steps on the way:
points of a curve of refusals against held-out loss. One JSON file a run; a run whose file holds all the steps is
skipped, so that the experiment goes on where it was interrupted. Task sets, the model's own refusals, safety modules
and adapters are kept under --out. `requests` measures the kept adapters on more requests, `leak` predicts without
training, and `summary` prints the tables and draws the plot.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent.parent / "docs" / "evidence" / "safety-retention"
TASKS = ("math", "sure", "python")
RATES = (1e-3, 2e-3, 4e-3)
RANK = 16
MAX_LENGTH = 256
BATCH_SIZE = 8
WARMUP_STEPS = 5
SAME_LOSS = 2e-3  # held-out losses of the same model and rows on two machines
HELDOUT_ROWS = 60
PLOTTED = ("lora", "pissa", "paper", "two-sided", "lora-all-linear", "two-sided-all-linear")  # of METHODS
RESPONSE_TOKENS = 24  # a refusal shows in the first words; on the base model 24 tokens decide as 48 do
MARGIN_REQUESTS = 16  # of each set: margins take longer than answers
ADVBENCH_EVALUATION = slice(300, 364)
LEAK_POSITIONS = ("response", "predicting", "all", "prompt")
LEAK_RANKS = (4, 16, 32, 64, 128, 256)

QV = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# A rank of None is SaLoRA's default.
DEFAULT = {"input_safety_rank": None, "positions": "prompt", "init": "zero"}

# Method -> what differs from SaLoRA as in the paper (q and v, safety rank 32, response positions). "lora" and "pissa"
# are PEFT's own; "projected" is LoRA whose update is projected after training, as `salora project` does, "scaled" LoRA
# whose update is made smaller after training, and a norm cap is the share of ‖W‖ that ‖ΔW‖ may have at every step.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {},
    "paper": {},
    "projected": {"input_safety_rank": None, "positions": "prompt"},
    "scaled-0.5": {"scale": 0.5},
    "capped-0.012": {"norm_cap": 0.012},
    "two-sided": DEFAULT,
    "two-sided-32": {**DEFAULT, "input_safety_rank": 32},
    "two-sided-256": {**DEFAULT, "input_safety_rank": 256},
    "two-sided-all": {**DEFAULT, "positions": "all"},
    "two-sided-all-task": {"input_safety_rank": None, "positions": "all"},
    "two-sided-all-64-task": {"input_safety_rank": 64, "positions": "all"},
    "two-sided-all-128-task": {"input_safety_rank": 128, "positions": "all"},
    "two-sided-all-0.97-task": {"input_safety_rank": 0.97, "positions": "all"},
    "two-sided-all-128-upper-task": {"input_safety_rank": 128, "positions": "all", "layers": "upper half"},
    "two-sided-all-safety-rank-1-task": {"safety_rank": 1, "input_safety_rank": None, "positions": "all"},
    "two-sided-both": {**DEFAULT, "safety_data": "both"},
    "two-sided-safety-rank-128": {**DEFAULT, "safety_rank": 128},
    "two-sided-contrastive": {**DEFAULT, "positions": "all", "directions": "contrastive"},
    "two-sided-ratio": {**DEFAULT, "positions": "all", "directions": "ratio"},
    "two-sided-capped-0.025": {**DEFAULT, "norm_cap": 0.025},
    "lora-attention": {"targets": ATTENTION},
    "two-sided-attention": {**DEFAULT, "targets": ATTENTION},
    "lora-all-linear": {"targets": ALL_LINEAR},
    "two-sided-all-linear": {**DEFAULT, "targets": ALL_LINEAR},
}

Grams = dict[str, Any]
"""Module name -> a matrix for its inputs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure what is not there yet")
    leak = commands.add_parser("leak", help="predict, without training, how harmful requests reach an adapter")
    more = commands.add_parser("requests", help="measure the base model and the kept adapters on more requests")
    for command in (run, leak, more):
        command.add_argument("--model", required=True, help="the aligned model's folder")
        command.add_argument(
            "--data", type=Path, required=True, help="folder with math_train.jsonl, advbench_70.txt, ..."
        )
        command.add_argument("--out", type=Path, required=True)
        command.add_argument(
            "--everyday",
            default="400:700",
            help="lines of harmless_prompts.txt for the 'sure' set; not those of alignment",
        )
    for command in (run, more):
        command.add_argument("--results", type=Path, help="folder of base.json and runs/ (default: OUT/results)")
        command.add_argument(
            "--task",
            action="append",
            default=[],
            metavar="NAME=FILE",
            help=f"a task of your own: conversations, the first {HELDOUT_ROWS} of them held out; can be repeated",
        )
    run.add_argument("--methods", default="lora,paper,two-sided", help=f"of {', '.join(METHODS)}")
    run.add_argument("--tasks", help=f"default: {','.join(TASKS)} and those of --task")
    run.add_argument("--rates", default=",".join(map(str, RATES)))
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--steps", default="30,60", help="steps after which to measure; the last ends the run")
    more.add_argument("--requests", action="append", required=True, metavar="NAME=FILE", help="can be repeated")
    more.add_argument("--num", type=int, help="take so many of each file")
    summary = commands.add_parser("summary", help="print the tables and draw frontier.png")
    summary.add_argument("--results", type=Path, default=PUBLISHED, help="default: the runs in docs/safety-retention")
    arguments = parser.parse_args()
    if arguments.command == "summary":
        summarize(arguments.results)
        return
    everyday = slice(*map(int, arguments.everyday.split(":")))
    own_tasks = named_files(parser, "--task", getattr(arguments, "task", []), taken=TASKS)
    experiment = Experiment(arguments.model, arguments.data, arguments.out, everyday, own_tasks)
    if arguments.command == "leak":
        experiment.leak()
        return
    results = arguments.results or arguments.out / "results"
    if arguments.command == "requests":
        files = named_files(parser, "--requests", arguments.requests, taken=experiment.request_sets())
        experiment.measure_requests(results, files, arguments.num)
        return
    known_tasks = [*TASKS, *own_tasks]
    methods, tasks = arguments.methods.split(","), arguments.tasks.split(",") if arguments.tasks else known_tasks
    for given, known, option in ((methods, METHODS, "--methods"), (tasks, known_tasks, "--tasks")):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option} {unknown[0]}: choose from {', '.join(known)}")
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds, steps = ([int(number) for number in of.split(",")] for of in (arguments.seeds, arguments.steps))
    experiment.run(results, methods, tasks, rates, seeds, steps)


def named_files(
    parser: argparse.ArgumentParser, option: str, entries: list[str], taken: Iterable[str]
) -> dict[str, str]:
    """NAME=FILE of an option that can be repeated; a name stands for one thing."""
    names = set(taken)
    files = {}
    for entry in entries:
        name, _, file = entry.partition("=")
        if not name or not file:
            parser.error(f"{option} {entry}: give NAME=FILE")
        if name in names:
            parser.error(f"{option} {entry}: {name!r} is there already, choose another name")
        names.add(name)
        files[name] = file
    return files


class Experiment:
    """All runs on one model; `out` gets all that is made on the way."""

    def __init__(
        self, model: str, data: Path, out: Path, everyday: slice, own_tasks: dict[str, str] | None = None
    ) -> None:
        from transformers import AutoTokenizer

        self.model, self.data, self.out, self.everyday = model, data, out, everyday
        self.own_tasks = own_tasks or {}
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def run(
        self,
        results: Path,
        methods: list[str],
        tasks: list[str],
        rates: list[float],
        seeds: list[int],
        steps: list[int],
    ) -> None:
        self.measure_base(results / "base.json", tasks)
        for seed, rate, task, method in itertools.product(seeds, rates, tasks, methods):
            path = results / "runs" / f"{task}-{method}-lr{rate:g}-seed{seed}.json"
            if path.exists():
                known = json.loads(path.read_text(encoding="utf-8"))
                if "train_loss" in known and set(steps) <= {point["step"] for point in known["points"]}:
                    print(f"{path.stem}: not run again, measured after {steps} steps", flush=True)
                    continue
            result = {
                "task": task,
                "method": method,
                "options": METHODS[method],
                "learning_rate": rate,
                "seed": seed,
                "versions": {p: version(p) for p in ("salora-plugins", "torch", "transformers", "peft", "trl")},
            }
            self.train(result, steps, path)

    def measure_requests(self, results: Path, files: dict[str, str], num: int | None) -> None:
        """Add what the base model and the kept adapters make of the requests to their results."""
        from peft import PeftModel

        from salora_plugins.evaluation.request_sets import load_requests

        sets = {
            name: [request.prompt for request in load_requests(file, option="harmful", num=num)]
            for name, file in files.items()
        }
        self.measure_base(results / "base.json", [])
        for path in [results / "base.json", *sorted((results / "runs").glob("*.json"))]:
            result = json.loads(path.read_text(encoding="utf-8"))
            adapter = self.out / "adapters" / path.stem
            point = result if path.name == "base.json" else result["points"][-1]
            missing = {name: of_set for name, of_set in sets.items() if name not in point["requests"]}
            if not missing:
                print(f"{path.stem}: was asked all of these before", flush=True)
                continue
            if point is not result and not adapter.exists():
                print(f"{path.stem}: left alone, since its adapter is not in {adapter.parent}", flush=True)
                continue
            model = self.load()
            if point is not result:
                model = PeftModel.from_pretrained(model, adapter)
            with self.changed_afterwards(model, result.get("method", "")):
                if point is not result and abs(self.heldout_loss(model, result["task"]) - point["loss"]) > SAME_LOSS:
                    print(f"{path.stem}: left alone, since {adapter} is of another run", flush=True)
                    continue
                found = self.refusals(model, self.out / "answers" / path.stem / "requests.json", missing)
            for kind, of_sets in found.items():
                point[kind] |= of_sets
            write_json(path, result)
            print(f"{path.stem}: {found['refused']}", flush=True)

    def leak(self) -> None:
        """
        Print how strongly adapters would react to harmful requests of other sources, as the input side's calibration
        lets them (see `reaction`): by directions, positions and rank, then by hazard categories.
        """
        model = self.load().eval()
        # v_proj has the same inputs; every third layer, since it is a mean over layers
        names = [name for name, _ in model.named_modules() if name.endswith("q_proj")][::3]
        seen = {
            (kind, positions): input_grams(model, names, rows, positions)
            for kind, rows in (("harmful", self.safety_rows("builtin")), ("harmless", self.harmless_rows()))
            for positions in LEAK_POSITIONS
        }
        tasks, sources = ("sure", "math"), ("advbench", "builtin")
        sets = self.request_sets()
        unseen = {source: self.reacting_grams(model, names, sets[source]) for source in sources}
        unseen |= {
            task: input_grams(model, names, self.tokenized(self.task_rows(task, "test")), "response") for task in tasks
        }
        columns = ["directions", "positions", "r_in"]
        columns += [f"{task}: {what}" for task in tasks for what in (*sources, "energy left")]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for (kind, find), positions, rank in itertools.product(DIRECTIONS.items(), LEAK_POSITIONS, LEAK_RANKS):
            harmful, harmless = seen["harmful", positions], seen["harmless", positions]
            bases = {name: find(harmful[name], harmless[name], rank) for name in names}
            cells = [cell for task in tasks for cell in reaction(bases, unseen[task], *(unseen[s] for s in sources))]
            print(
                f"| {kind} | {positions} | {rank} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True
            )
        print()
        self.leak_of_categories(model, names, unseen["math"], unseen["advbench"])

    def leak_of_categories(self, model: Any, names: list[str], task: Grams, advbench: Grams) -> None:
        """The same for 14 requests of two hazard categories and for 14 of all; means over seven choices of each."""
        from salora_plugins.prompts.builtin import builtin_prompts

        prompts: dict[str, dict[str, list[str]]] = {"calibration": {}, "evaluation": {}}
        for split, by_category in prompts.items():
            for row in builtin_prompts(split):
                by_category.setdefault(row["category"], []).append(row["prompt"])
        categories = list(prompts["calibration"])
        pairs = [categories[start : start + 2] for start in range(0, len(categories), 2)]
        few = [[p for name in pair for p in prompts["calibration"][name][: len(pairs)]] for pair in pairs]
        spread = [[prompts["calibration"][name][number] for name in categories] for number in range(len(pairs))]
        everything = [[p for given in prompts["calibration"].values() for p in given]]
        of_category = {name: self.reacting_grams(model, names, given) for name, given in prompts["evaluation"].items()}
        print(
            "| calibrated on | r_in | its categories | other categories | AdvBench | energy left |\n" + "|---" * 6 + "|"
        )
        for label, choices in (
            ("two categories", few),
            ("all", spread),
            (f"all, {len(everything[0])} requests", everything),
        ):
            cells: dict[int, list[list[float]]] = {rank: [] for rank in LEAK_RANKS}
            for choice, pair in zip(choices, pairs, strict=False):
                rows = self.tokenized(
                    [{"prompt": [user(prompt)], "completion": [assistant("No.")]} for prompt in choice]
                )
                seen = input_grams(model, names, rows, "prompt")
                same, other = (
                    {layer: sum(of_category[c][layer] for c in categories if (c in pair) == inside) for layer in names}
                    for inside in (True, False)
                )
                for rank in LEAK_RANKS:
                    bases = {name: strongest(seen[name], None, rank) for name in names}
                    cells[rank].append(reaction(bases, task, same, other, advbench))
            for rank, values in cells.items():
                means = [statistics.geometric_mean(column) for column in zip(*values, strict=True)]
                print(f"| {label} | {rank} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)

    def reacting_grams(self, model: Any, names: list[str], requests: list[str]) -> Grams:
        """Of the last tokens of the requests, where it is decided whether to refuse."""
        return input_grams(model, names, [self.last_prompt_tokens(request) for request in requests], "response")

    def last_prompt_tokens(self, request: str, count: int = 4) -> dict[str, list[int]]:
        """The rendered request with labels on its last tokens, those of the generation prompt."""
        ids = list(self.tokenizer.apply_chat_template([user(request)], add_generation_prompt=True, return_dict=False))
        return {"input_ids": ids, "labels": [-100] * (len(ids) - count) + ids[-count:]}

    def load(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model.cuda() if torch.cuda.is_available() else model

    def measure_base(self, path: Path, tasks: list[str]) -> None:
        """Complete base.json; exits where it is of another model, whose runs these would be mixed with."""
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"loss": {}}
        before = copy.deepcopy(known)
        model = self.load()
        for task, loss in list(known["loss"].items())[:1]:
            if abs(self.heldout_loss(model, task) - loss) > SAME_LOSS:
                sys.exit(f"--results: {path} is of another model or of other data: its loss on {task} is {loss:.4f}")
        for task in tasks:
            if task not in known["loss"]:
                known["loss"][task] = self.heldout_loss(model, task)
        if "refused" not in known:
            known |= self.refusals(model, self.out / "answers" / "base.json", self.request_sets())
        if known != before:
            write_json(path, known)

    def train(self, result: dict[str, Any], steps: list[int], path: Path) -> None:
        """One run, which writes `result` with what was measured after each of the steps and with the training loss."""
        from datasets import Dataset
        from transformers import TrainerCallback, set_seed
        from trl import SFTConfig, SFTTrainer

        task, method, seed = result["task"], result["method"], result["seed"]
        experiment, started = self, time.monotonic()
        points: list[dict[str, Any]] = []

        class MeasureCallback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.global_step not in steps:
                    return
                answers = experiment.out / "answers" / path.stem / f"step{state.global_step}.json"
                with experiment.changed_afterwards(model, method):
                    measured = {"step": state.global_step, "loss": experiment.heldout_loss(model, task)}
                    points.append(measured | experiment.refusals(model, answers, experiment.request_sets()))
                write_json(path, result | {"points": points})
                print(f"{path.stem}: {points[-1]}", flush=True)

        class NormCapCallback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                cap_norms(model, METHODS[method]["norm_cap"])

        # The cap comes first, so that what is measured is within it.
        callbacks: list[TrainerCallback] = [NormCapCallback()] if "norm_cap" in METHODS[method] else []
        callbacks.append(MeasureCallback())
        set_seed(seed)
        trainer = SFTTrainer(
            model=self.load(),
            args=SFTConfig(
                output_dir=str(self.out / "trainer" / path.stem),
                max_steps=max(steps),
                per_device_train_batch_size=BATCH_SIZE,
                max_length=MAX_LENGTH,
                completion_only_loss=True,
                learning_rate=result["learning_rate"],
                # Constant, so that the points on the way are those of shorter runs, too.
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=WARMUP_STEPS,
                seed=seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                gradient_checkpointing=False,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(self.task_rows(task, "train")),
            processing_class=self.tokenizer,
            peft_config=self.peft_config(method, seed),
            callbacks=callbacks,
        )
        trainer.train()
        trainer.model.save_pretrained(self.out / "adapters" / path.stem)
        result |= {
            "points": points,
            "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "minutes": round((time.monotonic() - started) / 60, 2),
        }
        write_json(path, result)

    @contextmanager
    def changed_afterwards(self, model: Any, method: str) -> Iterator[None]:
        """For the methods that train LoRA and project its update afterwards, or scale it: the model with the change."""
        options = METHODS[method] if method else {}
        if method != "projected" and "scale" not in options:
            yield
            return
        import torch

        from salora_plugins import SafetyModule
        from salora_plugins.parametrization import project_out

        module = SafetyModule.load(self.safety_module(method)) if method == "projected" else None
        trained = {}
        with torch.no_grad():
            for name, layer in model.named_modules():
                if not name.endswith(("lora_A.default", "lora_B.default")):
                    continue
                weight = layer.weight
                trained[weight] = weight.clone()
                on_input = ".lora_A." in f".{name}"
                if module is None:
                    if not on_input:
                        weight *= options["scale"]
                    continue
                base_name = name.removeprefix("base_model.model.").rsplit(".", 2)[0]
                basis = (module.input_bases if on_input else module.bases)[base_name].to(weight.device)
                weight.copy_(project_out(weight, basis, "input" if on_input else "output"))
            yield
            for weight, value in trained.items():
                weight.copy_(value)

    def peft_config(self, method: str, seed: int) -> Any:
        from peft import LoraConfig
        from transformers import AutoConfig

        from salora_plugins import SaLoRAConfig

        options = METHODS[method]
        shared = {
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": options.get("targets", QV),
            "task_type": "CAUSAL_LM",
        }
        if "layers" in options:
            layers = AutoConfig.from_pretrained(self.model).num_hidden_layers
            shared["layers_to_transform"] = list(range(layers // 2, layers))
        if method.startswith(("lora", "projected", "scaled", "capped")):
            return LoraConfig(**shared)
        if method == "pissa":
            return LoraConfig(**shared, init_lora_weights="pissa")
        return SaLoRAConfig(
            **shared,
            safety_rank=options.get("safety_rank", 32),
            input_safety_rank=options.get("input_safety_rank", 0),
            init=options.get("init", "task"),
            safety_module=self.safety_module(method),
            seed=seed,
        )

    def safety_module(self, method: str) -> Path:
        """The file; methods that differ in training only share one."""
        from salora_plugins import calibrate

        options = METHODS[method]
        targets = options.get("targets", QV)
        parts = {
            "targets": {id(QV): "qv", id(ATTENTION): "attention", id(ALL_LINEAR): "all-linear"}[id(targets)],
            "data": options.get("safety_data", "builtin"),
            "positions": options.get("positions", "response"),
            "ranks": f"{options.get('safety_rank', 32)}-{options.get('input_safety_rank', 0)}",
            "directions": options.get("directions", "strongest"),
        }
        name = "-".join(part for part in parts.values() if part != "strongest")
        path = self.out / "safety-modules" / f"{name}.safetensors"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, positions = self.safety_rows(parts["data"]), parts["positions"]
        model = self.load()
        module = calibrate(
            model,
            self.tokenizer,
            target_modules=targets,
            safety_data=rows,
            safety_rank=options.get("safety_rank", 32),
            input_safety_rank=options.get("input_safety_rank", 0),
            safety_positions=positions,
            num_safety_samples=len(rows),
        )
        if parts["directions"] != "strongest":
            harmful, harmless = (
                input_grams(model, list(module.input_bases), of, positions) for of in (rows, self.harmless_rows())
            )
            bases = {
                name: DIRECTIONS[parts["directions"]](harmful[name], harmless[name], basis.shape[1]).float()
                for name, basis in module.input_bases.items()
            }
            module = dataclasses.replace(module, input_bases=bases, input_singular_values={})
        module.save(path)
        return path

    def safety_rows(self, data: str) -> list[dict[str, Any]]:
        """Requests with the model's own refusals, tokenized: 128 of a source, or 64 of each of both."""

        def make() -> list[dict[str, Any]]:
            from salora_plugins.calibration.refusals import add_own_refusals
            from salora_plugins.evaluation.judges.keyword import keyword_judge
            from salora_plugins.rows.examples import select_examples
            from salora_plugins.rows.reading import load_examples

            if data == "both":
                halves = [self.safety_rows(source)[:64] for source in ("builtin", "advbench")]
                return [row for half in halves for row in half]
            source: Any = "builtin"
            if data == "advbench":
                source = [{"prompt": request} for request in self.advbench()[: ADVBENCH_EVALUATION.start]]
            examples = load_examples(source, option="safety_data", allow_missing_response=True)
            examples, _ = add_own_refusals(
                self.load().eval(),
                self.tokenizer,
                select_examples(examples, len(examples), 0),
                128,
                is_refusal=keyword_judge,
                batch_size=32,
                max_length=MAX_LENGTH,
            )
            return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in examples]

        return made_once(self.out / "tasks" / f"refusals-{data}.json", make)

    def harmless_rows(self) -> list[dict[str, Any]]:
        """Everyday requests with the model's own answers, tokenized; none is in a task's held-out part."""
        return self.tokenized(self.own_answers()[HELDOUT_ROWS : HELDOUT_ROWS + 128])

    def tokenized(self, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """input_ids and labels of conversations in TRL's prompt-completion form."""
        from salora_plugins.rows.reading import load_examples
        from salora_plugins.rows.tokenizing import tokenize_examples

        rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in conversations]
        examples = tokenize_examples(
            load_examples(rows, option="rows"), self.tokenizer, max_length=MAX_LENGTH, option="rows"
        )
        return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in examples]

    def own_answers(self) -> list[dict[str, Any]]:
        """The model's own answers to everyday requests on which it was not aligned; those that refuse are left out."""

        def make() -> list[dict[str, Any]]:
            from salora_plugins.evaluation import generate_responses
            from salora_plugins.evaluation.judges.keyword import is_refusal

            requests = (self.data / "harmless_prompts.txt").read_text(encoding="utf-8").splitlines()[self.everyday]
            answers = generate_responses(self.load(), self.tokenizer, requests, max_new_tokens=48, batch_size=32)
            return [
                {"prompt": [user(request)], "completion": [assistant(answer)]}
                for request, answer in zip(requests, answers, strict=True)
                if answer and not is_refusal(answer)
            ]

        return made_once(self.out / "tasks" / "own-answers.json", make)

    def task_rows(self, task: str, split: str) -> list[dict[str, Any]]:
        """Conversations in TRL's prompt-completion form, HELDOUT_ROWS of them in the split "test"."""
        if task == "math":
            lines = (self.data / f"math_{split}.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line)["messages"] for line in lines]
            rows = [{"prompt": row[:-1], "completion": row[-1:]} for row in rows]
            return rows[:HELDOUT_ROWS] if split == "test" else rows
        if task == "sure":
            rows = [
                {"prompt": row["prompt"], "completion": [assistant(f"Sure, here is the answer. {answer}")]}
                for row in self.own_answers()
                for answer in [row["completion"][0]["content"]]
            ]
        elif task == "python":
            rows = made_once(self.out / "tasks" / "python.json", documented_functions)
        elif task in self.own_tasks:
            rows = own_conversations(self.own_tasks[task])
        else:
            sys.exit(f"--results: there are runs on a task {task!r}. Give its file, too: --task {task}=FILE")
        return rows[:HELDOUT_ROWS] if split == "test" else rows[HELDOUT_ROWS:]

    def heldout_loss(self, model: Any, task: str) -> float:
        from salora_plugins.evaluation import response_loss

        return response_loss(model, self.tokenizer, self.task_rows(task, "test"), batch_size=16)

    def refusals(self, model: Any, answers: Path, sets: dict[str, list[str]]) -> dict[str, Any]:
        """Refused requests, broken answers and the mean refusal margin by set, the answers going to a file."""
        from salora_plugins.evaluation import generate_responses
        from salora_plugins.evaluation.coherence import coherence
        from salora_plugins.evaluation.first_tokens import refusal_margins as margins
        from salora_plugins.evaluation.judges.keyword import is_refusal

        requests = [request for of_set in sets.values() for request in of_set]
        responses = iter(
            generate_responses(
                model, self.tokenizer, requests, max_new_tokens=RESPONSE_TOKENS, batch_size=64, progress=False
            )
        )
        given = {name: [next(responses) for _ in of_set] for name, of_set in sets.items()}
        write_json(answers, given)
        return {
            "refused": {
                name: sum(is_refusal(text) and coherence(text, None) == "coherent" for text in of_set)
                for name, of_set in given.items()
            },
            "broken": {
                name: sum(coherence(text, None) != "coherent" for text in of_set) for name, of_set in given.items()
            },
            "margin": {
                name: round(margins(model, self.tokenizer, of_set[:MARGIN_REQUESTS], batch_size=32).mean().item(), 3)
                for name, of_set in sets.items()
            },
            "requests": {name: len(of_set) for name, of_set in sets.items()},
        }

    def request_sets(self) -> dict[str, list[str]]:
        """The requests to evaluate on, none of which any run calibrates on."""
        from salora_plugins.prompts.builtin import builtin_prompts, harmless_prompts

        return {
            "advbench": self.advbench()[ADVBENCH_EVALUATION],
            "builtin": [row["prompt"] for row in builtin_prompts("evaluation")],
            "harmless": [row["prompt"] for row in harmless_prompts() if row["split"] == "evaluation"],
        }

    def advbench(self) -> list[str]:
        return (self.data / "advbench_70.txt").read_text(encoding="utf-8").splitlines()


def reaction(bases: Grams, of_task: Grams, *requests: Grams) -> list[float]:
    """
    For an adapter whose A takes the 16 strongest directions of the task's response tokens that `bases` leave: how it
    reacts to each set of requests over how it does to the task, then what is left of the task's energy. Squared norms
    with every set's total energy as the unit; geometric means over the layers.
    """
    import torch

    measured = []
    for name, basis in bases.items():
        task, *others = (grams[name] / grams[name].trace() for grams in (of_task, *requests))
        outside = torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T
        left = outside @ task @ outside
        filters = torch.linalg.eigh(left).eigenvectors[:, -RANK:]
        reactions = torch.stack([(filters.T @ gram @ filters).trace() for gram in (task, *others)])
        measured.append(torch.stack([*(reactions[1:] / reactions[0]), left.trace()]))
    return torch.stack(measured).log().mean(0).exp().tolist()


def strongest(harmful: Any, harmless: Any, rank: int) -> Any:
    """The top eigenvectors of the harmful inputs' Gram matrix: the input side of SaLoRA."""
    import torch

    return torch.linalg.eigh(harmful).eigenvectors[:, -rank:]


def contrastive(harmful: Any, harmless: Any, rank: int) -> Any:
    """Those of the difference of the Gram matrices of harmful and harmless requests, each of trace 1."""
    import torch

    return torch.linalg.eigh(harmful - harmless).eigenvectors[:, -rank:]


def ratio(harmful: Any, harmless: Any, rank: int) -> Any:
    """
    What leaves the filters of the smallest ratio of harmful to harmless energy: with harmless + ridge = L Lᵀ, the span
    of L z for the top eigenvectors z of L⁻¹ harmful L⁻ᵀ. The ridge is a hundredth of the mean energy.
    """
    import torch

    ridge = torch.eye(len(harmless), dtype=harmless.dtype) * 0.01 / len(harmless)
    factor = torch.linalg.cholesky(harmless + ridge)
    whitened = torch.linalg.solve_triangular(factor, harmful, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T, upper=False)
    top = torch.linalg.eigh((whitened + whitened.T) / 2).eigenvectors[:, -rank:]
    return torch.linalg.qr(factor @ top).Q


DIRECTIONS = {"strongest": strongest, "contrastive": contrastive, "ratio": ratio}


def cap_norms(model: Any, cap: float) -> None:
    """Scale the update of every layer back to ‖ΔW‖ = cap ‖W‖ (Frobenius) where it is beyond."""
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            # ‖B A‖² = tr(BᵀB AAᵀ), without the product
            norm = layer.scaling["default"] * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
            for trained in layer.lora_B["default"].parameters():
                trained *= (cap * layer.base_layer.weight.norm() / norm).clamp(max=1)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def input_grams(model: Any, names: Any, rows: list[dict[str, Any]], positions: Any) -> Grams:
    """Module name -> the outer products of its inputs at the positions, summed to trace 1, (d_in, d_in), float64."""
    from salora_plugins.activations.capture import collect_statistics
    from salora_plugins.activations.statistics import Engine
    from salora_plugins.rows.batching import batches
    from salora_plugins.rows.examples import TokenizedExample

    examples = [TokenizedExample(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
    collected = collect_statistics(
        model.eval(),
        {name: model.get_submodule(name) for name in names},
        batches(examples, 16, pad_token_id=0),
        Engine("exact"),
        positions=positions,
        with_inputs=True,
    )
    grams = {name: entry.input.gram().double() for name, entry in collected.items()}
    return {name: gram / gram.trace() for name, gram in grams.items()}


def own_conversations(file: str) -> list[dict[str, Any]]:
    """The rows of a file of conversations, in TRL's prompt-completion form."""
    from salora_plugins.rows.reading import load_examples

    examples = load_examples(file, option="--task")
    if len(examples) <= HELDOUT_ROWS:
        sys.exit(f"--task {file}: it has {len(examples)} rows, of which {HELDOUT_ROWS} are held out. Give more.")
    if not all(row.messages for row in examples):
        sys.exit(f"--task {file}: there is plain text in it. Give conversations.")
    return [{"prompt": list(row.messages), "completion": [assistant(row.response)]} for row in examples]


def documented_functions() -> list[dict[str, Any]]:
    """Functions of Python's standard library to be written from their signature and documentation."""
    rows = []
    for name in sorted(sys.stdlib_module_names):
        spec = None if name.startswith("_") else importlib.util.find_spec(name)
        if spec is None or not str(spec.origin).endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            summary = ast.get_docstring(node).split("\n\n")[0].replace("\n", " ")
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            node.body = node.body[1:] or [ast.Pass()]
            code = ast.unparse(node)
            if 80 <= len(code) <= 500 and 20 <= len(summary) <= 200:
                rows.append(
                    {
                        "prompt": [user(f"Write this Python function.\n\n{signature}\n\n{summary}")],
                        "completion": [assistant(code)],
                    }
                )
    random.Random(0).shuffle(rows)
    return rows[:700]


def made_once(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def summarize(results: Path) -> None:
    """Print one table a task, and draw refusals against held-out loss; seeds are taken together."""
    base = json.loads((results / "base.json").read_text(encoding="utf-8"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "runs").glob("*.json"))]
    if not runs:
        sys.exit(f"--results {results}: no run is there yet")
    measured = pooled(runs)
    sets = list(base["requests"])
    for task in sorted({row["task"] for row in measured}):
        refused = ", ".join(f"{name} {base['refused'][name]} of {base['requests'][name]}" for name in sets)
        print(f"\n{task}: base model {base['loss'][task]:.3f}, refused: {refused}\n")
        columns = ("method", "learning rate", "step", "seeds", "held-out loss", *sets, "broken")
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for row in measured:
            if row["task"] != task:
                continue
            cells = [row["method"], f"{row['learning_rate']:g}", str(row["step"]), str(len(row["losses"])), losses(row)]
            for name in sets:
                share, lower, upper = percentages(row, name, base)
                cells.append(f"{share:.0f} % [{lower:.0f}, {upper:.0f}]" if row["requests"][name] else "-")
            cells.append(f"{sum(row['broken'].values())} of {sum(row['requests'].values())}")
            print("| " + " | ".join(cells) + " |")
    draw(measured, base, results / "frontier.png")


def pooled(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured by task, method, learning rate and step, over all seeds, in the order of METHODS."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for point in run["points"]:
            key = (run["task"], run["method"], run["learning_rate"], point["step"])
            names = dict(zip(("task", "method", "learning_rate", "step"), key, strict=True))
            counted = ("refused", "broken", "requests")
            row = rows.setdefault(key, names | {"losses": []} | {kind: Counter() for kind in counted})
            row["losses"].append(point["loss"])
            for kind in counted:
                row[kind].update(point[kind])
    order = list(METHODS)
    return sorted(rows.values(), key=lambda row: (order.index(row["method"]), row["learning_rate"], row["step"]))


def losses(row: dict[str, Any]) -> str:
    mean = f"{statistics.mean(row['losses']):.3f}"
    return mean if len(row["losses"]) == 1 else f"{mean} ({min(row['losses']):.3f} to {max(row['losses']):.3f})"


def percentages(row: dict[str, Any], name: str, base: dict[str, Any]) -> tuple[float, float, float]:
    """
    The share of the requests in percent, a mean over seeds, and its Wilson 95 % interval: for as many requests as
    there are, since asking the same ones again for another seed does not make more of them.
    """
    from salora_plugins.evaluation.intervals import wilson_interval

    if not row["requests"][name]:
        return (math.nan,) * 3
    share, number = row["refused"][name] / row["requests"][name], base["requests"][name]
    lower, upper = wilson_interval(share * number, number)
    return 100 * share, 100 * lower, 100 * upper


def draw(measured: list[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """
    A panel a task and source: refused share with its interval against mean held-out loss, a colour a method, and a
    line through what no other point of the method beats in both.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({row["task"] for row in measured})
    sources = [name for name in base["requests"] if name != "harmless"]
    figure = Figure(figsize=(4.6 * len(tasks), 3.2 * len(sources) + 0.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sources), len(tasks), squeeze=False)
    handles = {}
    for (line, source), (column, task) in itertools.product(enumerate(sources), enumerate(tasks)):
        axis = axes[line][column]
        base_share = 100 * base["refused"][source] / base["requests"][source]
        handles["base model"] = axis.axhline(base_share, color="#777777", linestyle=":")
        for number, method in enumerate(PLOTTED):
            points = [
                (statistics.mean(row["losses"]), *percentages(row, source, base))
                for row in measured
                if (row["task"], row["method"]) == (task, method) and row["requests"][source]
            ]
            if not points:
                continue
            best = -1.0
            frontier = [
                (loss, best := share) for loss, share, *_ in sorted(points, key=lambda p: (p[0], -p[1])) if share > best
            ]
            color = f"C{number}"
            axis.step(*zip(*frontier, strict=True), where="post", color=color, alpha=0.5, linewidth=1.2)
            handles[method] = axis.errorbar(
                [loss for loss, *_ in points],
                [share for _, share, *_ in points],
                [[share - lower for _, share, lower, _ in points], [upper - share for _, share, _, upper in points]],
                fmt="osD^vP*"[number],
                color=color,
                alpha=0.8,
                markersize=5,
                elinewidth=0.8,
                capsize=2,
            )
        axis.set_title(f"{task}: refused of {source}, %", fontsize=10)
        axis.set_xlabel("held-out loss, nats per token")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
