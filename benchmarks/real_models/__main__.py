"""The command line of the experiment on models that others aligned: see benchmarks/README.md.

Every run trains one method on one task and is measured at several steps on the way. What is measured already is
skipped; the deadline ends everything where it is, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..retention.__main__ import named_files
from ..runs import Run
from .jobs import all_jobs
from .material import TASKS
from .methods import METHODS, TARGET_MODULES
from .results import PUBLISHED, Results
from .settings import CPU, FULL, Setup

SCALES = {"full": FULL, "cpu": CPU}


def main() -> None:
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.command == "run":
        sys.exit(0 if run(parser, arguments) else 1)
    elif arguments.command == "smoke":
        from .smoke import smoke

        with tempfile.TemporaryDirectory() as folder:
            results = smoke(
                arguments.out or Path(folder), arguments.device, arguments.workers, arguments.methods.split(",")
            )
            print(f"every kind of job runs: {len(results.points())} points")
    elif arguments.command == "leaks":
        measure_leaks(parser, arguments)
    elif arguments.command == "definitions":
        from .definitions import definitions

        rows = definitions(arguments.data_noun)
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif arguments.command == "publish":
        published = Results(arguments.to)
        published.add_all(Results(arguments.results).points())
        published.add_leaks(Results(arguments.results).leaks())
    else:
        from .summary import summarize

        summarize(Results(arguments.results), arguments.write)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_models", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure what is not there yet")
    run.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="the first comes first")
    run.add_argument("--data", type=Path, required=True, help="folder with math_train.jsonl, harmless_prompts.txt, ...")
    run.add_argument("--out", type=Path, required=True, help="folder of the results: points.jsonl and others")
    run.add_argument("--cache", type=Path, help="folder of what is made once for a model (default: OUT/cache)")
    run.add_argument("--set", action="append", default=[], metavar="NAME=FILE", help="harmful requests, one a line")
    run.add_argument("--task", action="append", default=[], metavar="NAME=FILE", help="conversations: a further task")
    run.add_argument("--rate", action="append", default=[], metavar="MODEL=RATE", help="LoRA's on q and v (0.001)")
    run.add_argument("--tasks", help=f"of {','.join(TASKS)} and those of --task; default: all")
    run.add_argument("--methods", default=",".join(METHODS), help="default: all of %(default)s")
    run.add_argument("--targets", default=",".join(TARGET_MODULES), help="default: %(default)s")
    run.add_argument("--predictions", type=Path, help="text that says what is expected; kept beside the results")
    run.add_argument("--scale", choices=list(SCALES), default="full", help="cpu: of a small model on one core")
    run.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the base model (default: bfloat16 on a GPU, float32 on a CPU, which AVX512-BF16 makes the slower one)",
    )
    run.add_argument("--steps", help="after which is measured (default: the scale's, 60,240 of the full one)")
    run.add_argument("--seeds", type=int, help="of the rows that are named (default: the scale's, 3)")
    run.add_argument("--num", type=int, help="requests of each set (default: the scale's, 100)")
    run.add_argument("--problems", type=int, help="of math (default: the scale's, 200)")
    run.add_argument("--anchor-every", type=int, help="steps (default: as often as costs 5 %% of the time)")
    run.add_argument("--deadline", type=float, default=1500, help="seconds (default: %(default)s)")
    run.add_argument("--list", action="store_true", help="print the jobs in their order, and do none")
    smoke = commands.add_parser("smoke", help="every kind of job for two steps on the demo's model")
    smoke.add_argument("--out", type=Path, help="default: none is kept")
    smoke.add_argument("--methods", default=",".join(METHODS), help="default: all")
    leaks = commands.add_parser("leaks", help="the leak of every way to calibrate, without training")
    leaks.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    leaks.add_argument("--out", type=Path, required=True, help="folder of the results: leaks.jsonl")
    leaks.add_argument("--set", action="append", default=[], metavar="NAME=FILE", help="harmful requests, one a line")
    leaks.add_argument("--num", type=int, default=400, help="built-in requests that are asked (default: %(default)s)")
    leaks.add_argument("--of-set", type=int, default=32, help="requests of each set (default: %(default)s)")
    leaks.add_argument("--layers", type=int, default=4, help="decoder layers that are looked at (default: %(default)s)")
    leaks.add_argument("--batch", type=int, default=32, help="requests at once (default: %(default)s)")
    leaks.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: a GPU if there is one")
    for command in (run, smoke):
        command.add_argument("--workers", type=int, default=1, help="processes side by side (default: %(default)s)")
        command.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: a GPU if there is one")
    summary = commands.add_parser("summary", help="print the tables and draw the plots")
    summary.add_argument("--results", type=Path, default=PUBLISHED, help="default: the published points")
    summary.add_argument(
        "--write", action="store_true", help="write the tables of docs/evidence/real-models.md instead"
    )
    made = commands.add_parser("definitions", help="write a task's rows: nouns of WordNet and their glosses")
    made.add_argument("--data-noun", type=Path, required=True, help="of WordNet 3.0, such as Debian's wordnet-base has")
    made.add_argument("--out", type=Path, required=True, help="the file, for run --task definitions=OUT")
    publish = commands.add_parser("publish", help="add results to the published ones")
    publish.add_argument("--results", type=Path, required=True)
    publish.add_argument("--to", type=Path, default=PUBLISHED, help="default: docs/evidence/real-models")
    return parser


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    steps = None if arguments.steps is None else tuple(int(step) for step in arguments.steps.split(","))
    given = {
        "steps": steps,
        "seeds": arguments.seeds,
        "requests": arguments.num,
        "problems": arguments.problems,
        "anchor_every": arguments.anchor_every,
    }
    scale = replace(SCALES[arguments.scale], **{name: value for name, value in given.items() if value is not None})
    setup = Setup(
        models=named_files(parser, "--model", arguments.model, taken=()),
        data=arguments.data,
        cache=arguments.cache or arguments.out / "cache",
        sets=named_files(parser, "--set", arguments.set, taken=("builtin", "look-alikes", "everyday")),
        task_files=named_files(parser, "--task", arguments.task, taken=TASKS),
        rates={name: float(rate) for name, rate in named_files(parser, "--rate", arguments.rate, taken=()).items()},
        device=arguments.device or default_device(),
        dtype=arguments.dtype,
        scale=scale,
    )
    if unknown := set(setup.rates) - set(setup.models):
        parser.error(f"--rate {unknown.pop()}: --model has {', '.join(setup.models)}")
    known_tasks = [*TASKS, *setup.task_files]
    chosen = {
        "--tasks": (arguments.tasks or ",".join(known_tasks), known_tasks),
        "--methods": (arguments.methods, METHODS),
        "--targets": (arguments.targets, TARGET_MODULES),
    }
    names = []
    for option, (given, known) in chosen.items():
        names.append(given.split(","))
        if wrong := [name for name in names[-1] if name not in known]:
            parser.error(f"{option} {wrong[0]}: choose from {', '.join(known)}")
    jobs = all_jobs(setup, *names)
    if arguments.list:
        print("\n".join(job.name for job in jobs))
        return True
    results = Results(arguments.out)
    if arguments.predictions is not None:
        results.predict(arguments.predictions.read_text(encoding="utf-8"))
    from .workers import Pool

    return Pool(setup, results, jobs, arguments.workers).run(arguments.deadline)


def measure_leaks(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """A model that is there already, with all lines, is left out."""
    from transformers import AutoTokenizer

    from .leaks import LINES, leaks
    from .material import read_lines, spread
    from .workers import load

    results = Results(arguments.out)
    files = named_files(parser, "--set", arguments.set, taken=("builtin", "everyday"))
    sets = {name: spread(read_lines(Path(file)), arguments.of_set) for name, file in files.items()}
    models = named_files(parser, "--model", arguments.model, taken=())
    setup = Setup(models, arguments.out, arguments.out, device=arguments.device or default_device())
    known = Counter(line["model"] for line in results.leaks())
    for name in [name for name in models if known[name] < LINES]:
        found: list[Run] = []
        for line in leaks(
            load(setup, name),
            AutoTokenizer.from_pretrained(models[name]),
            sets,
            num_requests=arguments.num,
            num_layers=arguments.layers,
            batch_size=arguments.batch,
        ):
            found.append({"model": name, **line})
            results.add_leaks(found)
        print(f"{name}: measured", flush=True)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
