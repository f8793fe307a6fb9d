"""What is kept of a model's refusals at which task loss, by method: the experiment of docs/safety-retention.md.

    python benchmarks/safety_retention.py run --model DIR --data ../shared/data --out outputs/retention
    python benchmarks/safety_retention.py run ... --methods lora,two-sided-128 --tasks sure --seeds 0 --rates 1e-3
    python benchmarks/safety_retention.py leak --model DIR --data ../shared/data --out outputs/retention
    python benchmarks/safety_retention.py summary

Every run trains one method on one task with one learning rate and seed, and is measured at several steps on the way:
points of a curve of refusals against held-out loss. One JSON file a run, kept with the project; a run whose file
exists is skipped, so that the experiment goes on where it was interrupted. Task sets, the model's own refusals and
safety modules are made once and kept under --out.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "safety-retention"
TASKS = ("math", "sure", "python")
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
RANK = 16
MAX_LENGTH = 256
BATCH_SIZE = 8
WARMUP_STEPS = 5
HELDOUT_ROWS = 60
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
# are PEFT's own; "projected" is LoRA whose update is projected after training, as `salora project` does.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {},
    "paper": {},
    "paper-predicting": {"positions": "predicting"},
    "paper-zero": {"init": "zero"},
    "paper-rank-128": {"safety_rank": 128},
    "projected": {"input_safety_rank": None, "positions": "prompt"},
    "two-sided": DEFAULT,
    "two-sided-task": {"input_safety_rank": None, "positions": "prompt"},
    "two-sided-64-task": {"input_safety_rank": 64, "positions": "prompt"},
    "two-sided-32": {**DEFAULT, "input_safety_rank": 32},
    "two-sided-256": {**DEFAULT, "input_safety_rank": 256},
    "two-sided-all": {**DEFAULT, "positions": "all"},
    "two-sided-all-task": {"input_safety_rank": None, "positions": "all"},
    "two-sided-all-64-task": {"input_safety_rank": 64, "positions": "all"},
    "two-sided-all-128-task": {"input_safety_rank": 128, "positions": "all"},
    "two-sided-all-0.97-task": {"input_safety_rank": 0.97, "positions": "all"},
    "two-sided-all-128-upper-task": {"input_safety_rank": 128, "positions": "all", "layers": "upper half"},
    "two-sided-all-safety-rank-1-task": {"safety_rank": 1, "input_safety_rank": None, "positions": "all"},
    "two-sided-predicting": {**DEFAULT, "positions": "predicting"},
    "two-sided-response": {**DEFAULT, "positions": "response"},
    "two-sided-advbench": {**DEFAULT, "safety_data": "advbench"},
    "two-sided-both": {**DEFAULT, "safety_data": "both"},
    "lora-attention": {"targets": ATTENTION},
    "two-sided-attention": {**DEFAULT, "targets": ATTENTION},
    "lora-all-linear": {"targets": ALL_LINEAR},
    "paper-all-linear": {"targets": ALL_LINEAR},
    "two-sided-all-linear": {**DEFAULT, "targets": ALL_LINEAR},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure what is not there yet")
    leak = commands.add_parser("leak", help="predict, without training, how harmful requests reach an adapter")
    for command in (run, leak):
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
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of base.json and runs/ (default: the docs)")
    run.add_argument("--methods", default="lora,paper,two-sided")
    run.add_argument("--tasks", default=",".join(TASKS))
    run.add_argument("--rates", default=",".join(map(str, RATES)))
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--steps", default="30,60", help="steps after which to measure; the last ends the run")
    summary = commands.add_parser("summary", help="print the tables and draw frontier.png")
    summary.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "summary":
        summarize(arguments.results)
        return
    everyday = slice(*map(int, arguments.everyday.split(":")))
    experiment = Experiment(arguments.model, arguments.data, arguments.out, everyday)
    if arguments.command == "leak":
        experiment.leak()
        return
    methods, tasks = arguments.methods.split(","), arguments.tasks.split(",")
    for given, known, option in ((methods, METHODS, "--methods"), (tasks, TASKS, "--tasks")):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option} {unknown[0]}: choose from {', '.join(known)}")
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds, steps = ([int(number) for number in of.split(",")] for of in (arguments.seeds, arguments.steps))
    experiment.run(arguments.results, methods, tasks, rates, seeds, steps)


class Experiment:
    """All runs on one model; `out` gets all that is made on the way."""

    def __init__(self, model: str, data: Path, out: Path, everyday: slice) -> None:
        from transformers import AutoTokenizer

        self.model, self.data, self.out, self.everyday = model, data, out, everyday
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
                measured = [point["step"] for point in json.loads(path.read_text(encoding="utf-8"))["points"]]
                print(f"{path.stem}: not run again, measured after {measured} steps", flush=True)
                continue
            started = time.monotonic()
            points, losses = self.train(task, method, rate, seed, steps, self.out / "answers" / path.stem)
            result = {
                "task": task,
                "method": method,
                "learning_rate": rate,
                "seed": seed,
                "points": points,
                "train_loss": losses,
                "minutes": round((time.monotonic() - started) / 60, 2),
                "versions": {p: version(p) for p in ("salora-plugins", "torch", "transformers", "peft", "trl")},
            }
            write_json(path, result)
            last = {key: points[-1][key] for key in ("loss", "refused")}
            print(f"{path.stem}: {last} in {result['minutes']} min", flush=True)

    def leak(self) -> None:
        """
        Print how strongly adapters react to harmful requests, as the input side's calibration lets them.

        An adapter whose A takes the 16 strongest directions of the task's response tokens that the input side leaves;
        its reaction to the last tokens of requests of other sources over that to the task's, and what is left of the
        energy of the task's. Geometric means over every third layer, of squared norms.
        """
        import torch

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
        rows = {name: [self.last_prompt_tokens(request) for request in sets[name]] for name in sources}
        rows |= {task: self.tokenized(self.task_rows(task, "test")) for task in tasks}
        unseen = {name: input_grams(model, names, of_set, "response") for name, of_set in rows.items()}
        columns = ["directions", "positions", "r_in"]
        columns += [f"{task}: {what}" for task in tasks for what in (*sources, "energy left")]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for (kind, find), positions, rank in itertools.product(DIRECTIONS.items(), LEAK_POSITIONS, LEAK_RANKS):
            cells = []
            for task in tasks:
                measured = []
                for name in names:
                    harmful, harmless, of_task, *others = (
                        (gram[name] / gram[name].trace()).double()
                        for gram in (
                            seen["harmful", positions],
                            seen["harmless", positions],
                            unseen[task],
                            unseen["advbench"],
                            unseen["builtin"],
                        )
                    )
                    basis = find(harmful, harmless, rank)
                    outside = torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T
                    left = outside @ of_task @ outside
                    filters = torch.linalg.eigh(left).eigenvectors[:, -RANK:]
                    reaction = [(filters.T @ gram @ filters).trace() for gram in (of_task, *others)]
                    measured.append(torch.stack([reaction[1] / reaction[0], reaction[2] / reaction[0], left.trace()]))
                cells += [f"{value:.3f}" for value in torch.stack(measured).log().mean(0).exp().tolist()]
            print(f"| {kind} | {positions} | {rank} | " + " | ".join(cells) + " |", flush=True)

    def last_prompt_tokens(self, request: str, count: int = 4) -> dict[str, list[int]]:
        """The rendered request with labels on its last tokens, those of the generation prompt."""
        ids = list(self.tokenizer.apply_chat_template([user(request)], add_generation_prompt=True, return_dict=False))
        return {"input_ids": ids, "labels": [-100] * (len(ids) - count) + ids[-count:]}

    def load(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def measure_base(self, path: Path, tasks: list[str]) -> None:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"loss": {}}
        if missing := [task for task in tasks if task not in known["loss"]]:
            model = self.load()
            for task in missing:
                known["loss"][task] = self.heldout_loss(model, task)
            if "refused" not in known:
                known |= self.refusals(model, self.out / "answers" / "base.json")
            write_json(path, known)

    def train(
        self, task: str, method: str, rate: float, seed: int, steps: list[int], answers: Path
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """One run; what was measured after each of the steps, and the training loss of every step."""
        from datasets import Dataset
        from transformers import TrainerCallback, set_seed
        from trl import SFTConfig, SFTTrainer

        experiment = self
        points: list[dict[str, Any]] = []

        class MeasureCallback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if state.global_step in steps:
                    with experiment.projected(model, method):
                        points.append(
                            {"step": state.global_step, "loss": experiment.heldout_loss(model, task)}
                            | experiment.refusals(model, answers / f"step{state.global_step}.json")
                        )

        set_seed(seed)
        trainer = SFTTrainer(
            model=self.load(),
            args=SFTConfig(
                output_dir=str(self.out / "trainer"),
                max_steps=max(steps),
                per_device_train_batch_size=BATCH_SIZE,
                max_length=MAX_LENGTH,
                completion_only_loss=True,
                learning_rate=rate,
                # Constant, so that the points on the way are those of shorter runs, too.
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=WARMUP_STEPS,
                seed=seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(self.task_rows(task, "train")),
            processing_class=self.tokenizer,
            peft_config=self.peft_config(method, seed),
            callbacks=[MeasureCallback()],
        )
        trainer.train()
        trainer.model.save_pretrained(self.out / "adapters" / answers.name)
        return points, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @contextmanager
    def projected(self, model: Any, method: str) -> Iterator[None]:
        """For the methods that train LoRA and project its update afterwards: the projected model."""
        if not method.startswith("projected"):
            yield
            return
        import torch

        from salora_plugins import SafetyModule

        module = SafetyModule.load(self.safety_module(method))
        trained = {}
        with torch.no_grad():
            for name, layer in model.named_modules():
                if name.endswith(("lora_A.default", "lora_B.default")):
                    weight = layer.weight
                    trained[weight] = weight.clone()
                    base_name = name.removeprefix("base_model.model.").rsplit(".", 2)[0]
                    if ".lora_A." in f".{name}":
                        basis = module.input_bases[base_name]
                        weight -= (weight @ basis) @ basis.T
                    else:
                        basis = module.bases[base_name]
                        weight -= basis @ (basis.T @ weight)
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
        if method.startswith(("lora", "projected")):
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
        }
        path = self.out / "safety-modules" / f"{'-'.join(parts.values())}.safetensors"
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
        module.save(path)
        return path

    def safety_rows(self, data: str) -> list[dict[str, Any]]:
        """Requests with the model's own refusals, tokenized: 128 of a source, or 64 of each of both."""

        def make() -> list[dict[str, Any]]:
            from salora_plugins.calibration.data import load_examples, select_examples
            from salora_plugins.calibration.responses import add_own_refusals
            from salora_plugins.judges import keyword_judge

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
        from salora_plugins.calibration.data import load_examples, tokenize_examples

        rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in conversations]
        examples = tokenize_examples(
            load_examples(rows, option="rows"), self.tokenizer, max_length=MAX_LENGTH, option="rows"
        )
        return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in examples]

    def own_answers(self) -> list[dict[str, Any]]:
        """The model's own answers to everyday requests on which it was not aligned; those that refuse are left out."""

        def make() -> list[dict[str, Any]]:
            from salora_plugins.evaluation import generate_responses
            from salora_plugins.judges import is_refusal

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
        else:
            rows = made_once(self.out / "tasks" / "python.json", documented_functions)
        return rows[:HELDOUT_ROWS] if split == "test" else rows[HELDOUT_ROWS:]

    def heldout_loss(self, model: Any, task: str) -> float:
        from salora_plugins.evaluation import response_loss

        return response_loss(model, self.tokenizer, self.task_rows(task, "test"), batch_size=16)

    def refusals(self, model: Any, answers: Path) -> dict[str, Any]:
        """Refused requests, broken answers and the mean refusal margin by set, the answers going to a file."""
        from salora_plugins.evaluation import generate_responses
        from salora_plugins.evaluation.coherence import coherence
        from salora_plugins.evaluation.first_tokens import refusal_margins as margins
        from salora_plugins.judges import is_refusal

        sets = self.request_sets()
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
        from salora_plugins.data.builtin import builtin_prompts, harmless_prompts

        return {
            "advbench": self.advbench()[ADVBENCH_EVALUATION],
            "builtin": [row["prompt"] for row in builtin_prompts("evaluation")],
            "harmless": [row["prompt"] for row in harmless_prompts() if row["split"] == "evaluation"],
        }

    def advbench(self) -> list[str]:
        return (self.data / "advbench_70.txt").read_text(encoding="utf-8").splitlines()


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


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def input_grams(model: Any, names: Any, rows: list[dict[str, Any]], positions: Any) -> dict[str, Any]:
    """Module name -> sum of the outer products of its inputs at the positions, (d_in, d_in)."""
    from salora_plugins.calibration.batching import batches
    from salora_plugins.calibration.capture import collect_statistics
    from salora_plugins.calibration.data import TokenizedExample
    from salora_plugins.calibration.statistics import Engine

    examples = [TokenizedExample(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
    collected = collect_statistics(
        model.eval(),
        {name: model.get_submodule(name) for name in names},
        batches(examples, 16, pad_token_id=0),
        Engine("exact"),
        positions=positions,
        with_inputs=True,
    )
    return {name: entry.input.gram() for name, entry in collected.items()}


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
                share, lower, upper = percentages(row["refused"][name], row["requests"][name])
                cells.append(f"{share:.0f} % [{lower:.0f}, {upper:.0f}]")
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


def percentages(count: int, total: int) -> tuple[float, float, float]:
    """The share in percent and its Wilson 95 % interval."""
    from salora_plugins.evaluation.statistics import wilson_interval

    lower, upper = wilson_interval(count, total)
    return 100 * count / total, 100 * lower, 100 * upper


def draw(measured: list[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """A panel a task and source: refused share with its interval against mean held-out loss, a colour a method."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = sorted({row["task"] for row in measured})
    methods = list(dict.fromkeys(row["method"] for row in measured))
    sources = ("advbench", "builtin")
    figure = Figure(figsize=(5 * len(tasks), 3.6 * len(sources) + 0.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sources), len(tasks), squeeze=False)
    handles = {}
    for (line, source), (column, task) in itertools.product(enumerate(sources), enumerate(tasks)):
        axis = axes[line][column]
        base_share = 100 * base["refused"][source] / base["requests"][source]
        handles["base model"] = axis.axhline(base_share, color="#777777", linestyle=":")
        for number, method in enumerate(methods):
            points = [row for row in measured if (row["task"], row["method"]) == (task, method)]
            if not points:
                continue
            shares = [percentages(row["refused"][source], row["requests"][source]) for row in points]
            handles[method] = axis.errorbar(
                [statistics.mean(row["losses"]) for row in points],
                [share for share, _, _ in shares],
                [[share - lower for share, lower, _ in shares], [upper - share for share, _, upper in shares]],
                fmt="osD^v"[number // 10 % 5],
                color=colormaps["tab10"](number % 10),
                alpha=0.8,
                markersize=6,
                capsize=2,
            )
        axis.set_title(f"{task}: refused of {source}, %", fontsize=10)
        axis.set_xlabel("held-out loss, nats per token")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
