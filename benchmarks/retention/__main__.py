"""The command line of the experiment: see benchmarks/README.md.

Every run trains one method on one task with one learning rate and seed, and is measured at several steps on the way:
points of a curve of refusals against held-out loss. A run that has all the steps is skipped, so that the experiment
goes on where it was interrupted. Task sets, the model's own refusals, safety modules and adapters are kept under --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import comparison
from .experiment import PUBLISHED, Experiment, Results
from .methods import METHODS
from .summary import summarize
from .tasks import HELDOUT_ROWS, TASKS

OF_RUN = ("unaligned", "sae", "num_requests", "num_safety_rows", "batch_size")
"""Options of `run` alone, as the experiment has them."""
RATES = (1e-3, 2e-3, 4e-3)


def main() -> None:
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.command == "comparison":
        print(comparison.comparison(Results(arguments.results))) if arguments.results else comparison.write()
        return
    if arguments.command in ("summary", "publish"):
        results = Results(arguments.results)
        if arguments.command == "summary":
            summarize(results, arguments.write)
            return
        try:
            results.publish_to(Results(arguments.to))
        except (OSError, ValueError) as error:
            sys.exit(f"--results {arguments.results}: {error}")
        return
    everyday = slice(*map(int, arguments.everyday.split(":")))
    own_tasks = named_files(parser, "--task", getattr(arguments, "task", []), taken=TASKS)
    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in OF_RUN}
    for_run: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    experiment = Experiment(arguments.model, arguments.data, arguments.out, everyday, own_tasks, **for_run)
    measure = {"run": run, "requests": requests, "leak": leak, "positions": positions}[arguments.command]
    measure(parser, arguments, experiment)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and measure what is not there yet")
    leak = commands.add_parser("leak", help="predict, without training, how harmful requests reach an adapter")
    where = commands.add_parser("positions", help="the same by positions, number of requests and rank, in all layers")
    more = commands.add_parser("requests", help="measure the base model and the kept adapters on more requests")
    for command in (run, leak, where, more):
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
    run.add_argument("--unaligned", help="folder of the model before its alignment, which some methods need")
    run.add_argument("--sae", help="sparse autoencoders for the method sae, as SaLoRAConfig's option takes them")
    run.add_argument("--num-requests", type=int, help="ask so many of each set, spread over it (default: all)")
    run.add_argument("--num-safety-rows", type=int, help="calibrate on so many refusals (default: 128)")
    run.add_argument("--batch-size", type=int, help="rows of a step (default: 8)")
    where.add_argument(
        "--requests",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="further requests to calibrate on, one a line; can be repeated",
    )
    more.add_argument("--requests", action="append", required=True, metavar="NAME=FILE", help="can be repeated")
    more.add_argument("--num", type=int, help="take so many of each file")
    summary = commands.add_parser("summary", help="print the tables and draw frontier.png")
    summary.add_argument("--results", type=Path, default=PUBLISHED, help="default: the published runs")
    summary.add_argument(
        "--write", action="store_true", help="write the tables of docs/evidence/safety-retention.md instead"
    )
    compare = commands.add_parser("comparison", help="write the tables of docs/methods/index.md")
    compare.add_argument("--results", type=Path, help="print that of this folder instead")
    publish = commands.add_parser("publish", help="add results to the published ones, one run a line")
    publish.add_argument("--results", type=Path, required=True, help="folder of base.json and runs/")
    publish.add_argument("--to", type=Path, default=PUBLISHED, help="default: docs/evidence/safety-retention")
    return parser


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, experiment: Experiment) -> None:
    known_tasks = [*TASKS, *experiment.own_tasks]
    methods, tasks = arguments.methods.split(","), arguments.tasks.split(",") if arguments.tasks else known_tasks
    choices: tuple[tuple[list[str], Iterable[str], str], ...] = (
        (methods, METHODS, "--methods"),
        (tasks, known_tasks, "--tasks"),
    )
    for given, known, option in choices:
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option} {unknown[0]}: choose from {', '.join(known)}")
    rates = [float(rate) for rate in arguments.rates.split(",")]
    seeds, steps = ([int(number) for number in of.split(",")] for of in (arguments.seeds, arguments.steps))
    from .training import run_all

    run_all(experiment, results_of(arguments), methods, tasks, rates, seeds, steps)


def requests(parser: argparse.ArgumentParser, arguments: argparse.Namespace, experiment: Experiment) -> None:
    from ..small_model import request_sets
    from .measures import measure_requests

    files = named_files(parser, "--requests", arguments.requests, taken=request_sets(experiment.data))
    measure_requests(experiment, results_of(arguments), files, arguments.num)


def leak(parser: argparse.ArgumentParser, arguments: argparse.Namespace, experiment: Experiment) -> None:
    from .leak import leak as predict

    predict(experiment)


def positions(parser: argparse.ArgumentParser, arguments: argparse.Namespace, experiment: Experiment) -> None:
    from .positions import positions as measure

    more = {}
    for name, file in named_files(parser, "--requests", arguments.requests, taken=()).items():
        more[name] = Path(file).read_text(encoding="utf-8").splitlines()
    measure(experiment, more)


def results_of(arguments: argparse.Namespace) -> Results:
    return Results(arguments.results or arguments.out / "results")


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


if __name__ == "__main__":
    main()
