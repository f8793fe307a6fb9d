"""What calibration costs over the forward passes that it cannot do without (docs/evidence/benchmarks.md).

    python -m benchmarks.calibration time --model DIR --data ../shared/data [--target-modules all-linear]
    python -m benchmarks.calibration reference --model DIR --data ../shared/data
    python -m benchmarks.calibration memory --model DIR --data ../shared/data --target-modules all-linear \\
        --engine sketched --variant paper
    python -m benchmarks.calibration answering --model DIR
    python -m benchmarks.calibration devices --model DIR --data ../shared/data --target-modules all-linear
    python -m benchmarks.calibration initialization --model DIR
    python -m benchmarks.calibration sketch --model DIR --data ../shared/data --target-modules all-linear
    python -m benchmarks.calibration spectra
    python -m benchmarks.calibration table

`--variant paper` is the paper's form with its start values, for which a second data set passes the model; the default
needs none. `answering` is what comes before the passes where rows have no response; `devices` compares the subspaces
that a GPU and the CPU find. Ratios are of medians of runs that take turns, since times on a shared machine drift.
`--model random-8b` is a randomly initialized Llama of 8B shape, for a GPU; `--data` may then be left out.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from salora_plugins import SaLoRAConfig
from salora_plugins.activations.collector import by_inputs, statistics_dimensions
from salora_plugins.activations.statistics import choose_engine
from salora_plugins.activations.vectors import SketchedStatistics
from salora_plugins.calibration import calibrate_with, task_bases
from salora_plugins.calibration.refusals import REQUESTS_AT_ONCE, Answerer, Answering
from salora_plugins.initialization import pissa_factors
from salora_plugins.models.running import cheap_forward_options, input_device
from salora_plugins.models.targets import default_input_ranks, target_module_names
from salora_plugins.models.weights import base_layer, layer_features, linear_weight
from salora_plugins.plugins import judges
from salora_plugins.prompts.builtin import builtin_prompts, plain_prompts
from salora_plugins.rows.batching import batches
from salora_plugins.rows.examples import RenderedRequest, TokenizedExample
from salora_plugins.rows.reading import load_examples
from salora_plugins.rows.tokenizing import render_rows, tokenize_examples

from . import tables
from .measuring import LLAMA_8B, interleaved, machine, peak_tensor_bytes
from .runs import EVIDENCE

DOCUMENT = EVIDENCE / "benchmarks.md"
SAMPLES = 128
RANK = 32
# Generation is not part of what is compared, so that every request gets the same refusal.
REFUSAL = (
    "I'm sorry, but I can't help with that. It could cause serious harm to you or to other people. If you are going "
    "through something difficult, please talk to someone you trust, and I am glad to help with anything that is safe."
)
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def main() -> None:
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.what == "table":
        if arguments.write:
            tables.write(DOCUMENT, document_tables())
        print(memory_table())
        return
    if arguments.what == "spectra":
        print(spectra_table())
        return
    if arguments.model is None:
        parser.error("--model is needed")
    model, tokenizer = load_model(arguments.model)
    if arguments.what == "answering":
        report(arguments, measure_answering(model, tokenizer))
        return
    if arguments.what == "devices" and model.device.type == "cpu":
        parser.error("devices: there is no GPU to compare the CPU with")
    if arguments.data is None and tokenizer is not None and arguments.what != "initialization":
        parser.error("--data is needed")
    config = SaLoRAConfig(
        target_modules=target_modules(arguments.target_modules),
        variant=arguments.variant,
        safety_rank=RANK,
        task_rank=RANK,
        calibration_batch_size=arguments.batch_size,
        calibration_engine=arguments.engine,
        calibration_cache=False,
        num_safety_samples=SAMPLES,
        num_task_samples=SAMPLES,
    )
    asked = {name: getattr(arguments, name) for name in ("target_modules", "variant", "batch_size")}
    if arguments.what == "initialization":
        report(arguments, asked | measure_initialization(model, config, arguments.repeats))
    else:
        config.safety_data, config.task_data = tokenized_data(tokenizer, arguments.data, model)
        measure = {
            "time": measure_time,
            "reference": measure_reference,
            "memory": measure_memory,
            "sketch": measure_sketch,
            "devices": measure_devices,
        }
        report(arguments, asked | measure[arguments.what](model, config, arguments))


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    print(json.dumps({"model": arguments.model, **result, "machine": machine()}, indent=1))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = ("time", "reference", "memory", "answering", "devices", "initialization", "sketch", "spectra", "table")
    parser.add_argument("what", choices=measured)
    parser.add_argument("--model", help="folder of a model, or random-8b")
    parser.add_argument("--data", type=Path, help="folder with math_train.jsonl")
    parser.add_argument("--target-modules", default="q_proj,v_proj", help="names with commas, or all-linear")
    parser.add_argument("--variant", choices=("two-sided", "paper"), default="two-sided")
    parser.add_argument("--engine", choices=("auto", "exact", "sketched"), default="auto")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per forward pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference-layers", type=int, default=2, help="layers that the reference really runs for")
    parser.add_argument(
        "--write", action="store_true", help="with `table`: write it to docs/evidence/benchmarks.md, too"
    )
    return parser


def load_model(name: str) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "random-8b":
        torch.manual_seed(0)
        with torch.device(device):
            random: Any = LlamaForCausalLM(LlamaConfig(**LLAMA_8B, dtype="bfloat16"))
            return random.to(torch.bfloat16).eval(), None
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def target_modules(text: str) -> str | list[str]:
    return text if text == "all-linear" else text.split(",")


def tokenized_data(
    tokenizer: Any, data: Path | None, model: Any
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """128 safety examples and 128 task examples; random tokens of like lengths where there is no tokenizer."""
    if tokenizer is None or data is None:
        generator = torch.Generator().manual_seed(0)

        def example() -> TokenizedExample:
            ids = torch.randint(0, model.config.vocab_size, (100,), generator=generator).tolist()
            return TokenizedExample(tuple(ids), (-100,) * 40 + tuple(ids[40:]))

        return [example() for _ in range(SAMPLES)], [example() for _ in range(SAMPLES)]
    safety = [
        {"prompt": prompt, "response": REFUSAL} for prompt in plain_prompts(builtin_prompts("calibration"))[:SAMPLES]
    ]
    task = [json.loads(line) for line in (data / "math_train.jsonl").read_text().splitlines()[:SAMPLES]]
    result = []
    for option, rows in (("safety_data", safety), ("task_data", task)):
        examples = load_examples(rows, option=option)
        result.append(tokenize_examples(examples, tokenizer, max_length=512, option=option))
    return result[0], result[1]


@torch.no_grad()
def bare_forward(model: Any, batch_size: int, *data: list[TokenizedExample]) -> None:
    """The forward passes alone, as calibration makes them."""
    options, device = cheap_forward_options(model), input_device(model)
    for examples in data:
        for batch in batches(examples, batch_size, pad_token_id=0):
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            model(input_ids=ids, attention_mask=mask, **options)


def calibrate(model: Any, config: SaLoRAConfig) -> None:
    """Everything: the pass over the safety data and its bases, and with the paper's start that over the task data."""
    calibrate_with(model, config)
    if config.init == "task":
        task_bases(model, config)


def data_sets(config: SaLoRAConfig) -> list[list[TokenizedExample]]:
    """What `calibrate` passes through the model."""
    return [config.safety_data, config.task_data] if config.init == "task" else [config.safety_data]


def measure_time(model: Any, config: SaLoRAConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    times = interleaved(
        {
            "bare forward": lambda: bare_forward(model, config.calibration_batch_size, *data_sets(config)),
            "calibration": lambda: calibrate(model, config),
        },
        arguments.repeats,
    )
    medians = {name: median(values) for name, values in times.items()}
    return {
        "engine": arguments.engine,
        "seconds": times,
        "ratio": round(medians["calibration"] / medians["bare forward"], 3),
    }


def measure_reference(model: Any, config: SaLoRAConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """
    The paper's procedure: for every target layer and data set one pass of the whole model that keeps the layer's
    inputs, then a low-rank SVD of its outputs with 30 iterations. It runs for some layers; all cost about the same.
    """
    names = target_module_names(model, config)
    some = names[:: max(1, len(names) // arguments.reference_layers)][: arguments.reference_layers]
    options, device = cheap_forward_options(model), input_device(model)

    @torch.no_grad()
    def reference() -> None:
        for name in some:
            layer = model.get_submodule(name)
            for data in data_sets(config):
                kept: list[torch.Tensor] = []
                handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(args[0]))
                rows = []
                for batch in batches(data, config.calibration_batch_size, pad_token_id=0):
                    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                    model(input_ids=ids, attention_mask=mask, **options)
                    rows.append(kept.pop()[batch["labels"].to(device) != -100])
                handle.remove()
                outputs = (torch.cat(rows) @ layer.weight.T).float()
                basis = torch.svd_lowrank(outputs.T, q=RANK, niter=30)[0]
                dense = torch.eye(outputs.shape[1], device=device) - basis @ basis.T
                del dense

    times = interleaved({"calibration": lambda: calibrate(model, config), "reference": reference}, arguments.repeats)
    ours, some_layers = median(times["calibration"]), median(times["reference"])
    whole = some_layers / len(some) * len(names)
    return {
        "engine": arguments.engine,
        "seconds": times,
        "reference_layers_run": len(some),
        "layers": len(names),
        "reference_seconds_extrapolated": round(whole, 1),
        "times_faster": round(whole / ours, 1),
    }


def measure_memory(model: Any, config: SaLoRAConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of tensors in the safety calibration beyond the peak of its forward passes alone."""
    bare = peak_tensor_bytes(lambda: bare_forward(model, config.calibration_batch_size, config.safety_data))
    gc.collect()
    ours = peak_tensor_bytes(lambda: calibrate_with(model, config))
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "engine": arguments.engine,
        "bare_forward_peak_MB": round(bare / 1e6, 1),
        "calibration_peak_MB": round(ours / 1e6, 1),
        "weights_in_bf16_MB": round(weights / 1e6, 1),
        "extra_share_of_weights": round((ours - bare) / weights, 4),
    }


class _NoWords:
    """In the place of a tokenizer, for a randomly initialized model."""

    eos_token_id, pad_token_id = None, 0

    def decode(self, tokens: Iterable[int], **_: Any) -> str:
        return ""


def _refuses_all(request: str, answer: str) -> bool:
    return True


def measure_answering(model: Any, tokenizer: Any) -> dict[str, Any]:
    """
    Greedy answers to 128 requests, as calibration asks for them: until it is seen whether the model refuses (the
    default), and as whole responses (`safety_positions="response"`). A random model is given random requests, and
    counts as one that refuses all.
    """
    if tokenizer is None:
        generator, tokenizer = torch.Generator().manual_seed(0), _NoWords()
        prompts = torch.randint(0, model.config.vocab_size, (SAMPLES, 40), generator=generator)
        requests = [RenderedRequest("", tuple(prompt)) for prompt in prompts.tolist()]
        is_refusal: Callable[[str, str], bool] = _refuses_all
    else:
        examples = load_examples(
            [{"prompt": prompt} for prompt in plain_prompts(builtin_prompts("calibration"))[:SAMPLES]],
            option="safety_data",
            allow_missing_response=True,
        )
        rows = render_rows(examples, tokenizer, max_length=512, option="safety_data")
        requests = [row for row in rows if isinstance(row, RenderedRequest)]
        is_refusal = judges()["keyword"]
    result: dict[str, Any] = {}
    for title, whole in (("warm-up", False), ("verdicts", False), ("whole responses", True)):
        answering = Answering()
        answerer = Answerer(model, tokenizer, is_refusal, 512, REQUESTS_AT_ONCE, whole, answering)
        answers = answerer.answers(requests[:8] if title == "warm-up" else requests)
        result[title] = {
            "requests": len(answers),
            "refused": sum(answer is not None and answer.is_refusal for answer in answers),
            "tokens": answering.tokens,
            "largest_batch": answering.largest_batch,
            "seconds": round(answering.seconds, 2),
            "tokens_a_second": round(answering.tokens / answering.seconds, 1),
        }
    del result["warm-up"]
    return result


def measure_devices(model: Any, config: SaLoRAConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """The least cosine of a principal angle between what the GPU and the CPU find, of both sides, in float32."""
    bases = []
    for device in ("cuda", "cpu"):
        module = calibrate_with(model.float().to(device), config)
        bases.append({side: found.bases for side, found in module.sides.items()})
    result: dict[str, Any] = {}
    for side, of_gpu in bases[0].items():
        least = {
            name: torch.linalg.svdvals(basis.cpu().double().T @ bases[1][side][name].cpu().double()).min().item()
            for name, basis in of_gpu.items()
        }
        worst = min(least, key=lambda name: least[name])
        result[side] = {"layers": len(least), "least_cosine": least[worst], "in": worst}
    return result


def measure_sketch(model: Any, config: SaLoRAConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the sketched bases of a model capture of what the exact ones do, the least over all layers."""
    shares = {}
    for engine in ("exact", "sketched"):
        config.calibration_engine = engine
        module = calibrate_with(model, config)
        shares[engine] = module.captured_energy
    ratios = {name: share / shares["exact"][name] for name, share in shares["sketched"].items()}
    worst = min(ratios, key=lambda name: ratios[name])
    return {
        "sketch_width": module.provenance["sketch_width"],
        "input_sketch_width": module.provenance.get("input_sketch_width"),
        "layers": len(ratios),
        "least_ratio": round(ratios[worst], 5),
        "in": worst,
        "median_ratio": round(median(ratios.values()), 5),
    }


def spectra_table() -> str:
    """The same for vectors with given singular values, with the test matrix renewed or drawn once."""
    dimension, count, rank, batch = 768, 6000, 32, 384
    index = torch.arange(1, dimension + 1, dtype=torch.float64)
    spectra = {
        "0.9^i": 0.9**index,
        "1/i": 1 / index,
        "1/sqrt(i)": index**-0.5,
        "i^(-1/4)": index**-0.25,
        "all equal": torch.ones_like(index),
    }
    widths = (2 * rank, 4 * rank)
    generator = torch.Generator().manual_seed(0)
    titles = [f"{kind} Q, w = {width}" for kind in ("fixed", "renewed") for width in widths]
    table = []

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    data = {
        name: torch.linalg.qr(normal(count, dimension)).Q * values @ torch.linalg.qr(normal(dimension, dimension)).Q
        for name, values in spectra.items()
    }
    data["independent Gaussian vectors"] = normal(count, dimension)
    for name, rows in data.items():
        best = torch.linalg.svdvals(rows)[:rank].square().sum()
        cells = []
        for width in widths:
            test = normal(dimension, width)
            image = rows.T @ (rows @ test)
            core = test.T @ image
            factor = torch.linalg.solve_triangular(torch.linalg.cholesky((core + core.T) / 2), image.T, upper=False)
            basis = torch.linalg.svd(factor, full_matrices=False).Vh[:rank].T
            cells.append(torch.linalg.norm(rows @ basis).square() / best)
        for width in widths:
            statistics = SketchedStatistics(dimension, width)
            for part in rows.float().split(batch):
                statistics.update(part)
            cells.append(torch.linalg.norm(rows @ statistics.top(rank)[0].double()).square() / best)
        table.append([name, *(f"{cell:.4f}" for cell in cells)])
    return tables.markdown(["singular values", *titles], table)


def measure_initialization(model: Any, config: SaLoRAConfig, repeats: int) -> dict[str, Any]:
    """The truncated SVDs of all target weights, r = 16."""
    names = target_module_names(model, config)
    weights: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for name in names:
        with linear_weight(model.get_submodule(name)) as weight:
            weights.setdefault(tuple(weight.shape), []).append(weight)

    def one_by_one() -> None:
        for group in weights.values():
            for weight in group:
                pissa_factors(weight, 16, 1.0)

    def together() -> None:
        for group in weights.values():
            size = max(1, 64 * 2**20 // (4 * group[0].numel()))
            for start in range(0, len(group), size):
                pissa_factors(torch.stack([weight.float() for weight in group[start : start + size]]), 16, 1.0)

    times = interleaved({"one by one": one_by_one, "in batches of 64 MiB": together}, repeats)
    return {"layers": len(names), "seconds": times}


def document_tables() -> dict[str, str]:
    """Name -> table of docs/evidence/benchmarks.md."""
    return {"memory": memory_table()}


def memory_table() -> str:
    """What the statistics of all linear layers take in large models, from their shapes."""
    rows = []
    for title, shape in (("8B", LLAMA_8B), ("70B", LLAMA_70B)):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shape))
        names = target_module_names(model, SaLoRAConfig(target_modules="all-linear"))
        layers = {name: base_layer(model.get_submodule(name)) for name in names}
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        default = default_input_ranks(model, names)
        for with_inputs in (False, True):
            outputs, inputs = statistics_dimensions(layers, with_inputs=with_inputs)
            shared = shared_inputs(layers, None if with_inputs else [n for n in names if by_inputs(layers[n])])
            bases = 4 * RANK * sum(layer_features(layer)[1] for layer in layers.values())
            rank = 0
            if with_inputs:
                rank = max(default.values())
                bases += 4 * rank * sum(shared_inputs(layers))
            for kind in ("exact", "sketched"):
                engine = choose_engine(kind, outputs, inputs, rank=RANK, input_rank=rank, num_weights=num_weights)
                size = 4 * (engine.width * sum(outputs) + engine.input_width * sum(shared))
                if kind == "exact":
                    size = 8 * sum(d * d for d in (*outputs, *shared))
                label = kind if kind == "exact" else f"{kind}, width {engine.width} and {engine.input_width}"
                sides = f"both (default), r_in = {rank}" if with_inputs else "output (paper's form)"
                share = size / (2 * num_weights)
                rows.append([title, sides, label, f"{size / 1e9:.2f} GB", f"{bases / 1e9:.2f} GB", f"{share:.1%}"])
    return tables.markdown(
        ["model", "side", "engine", "statistics", "safety module", "share of the weights in bf16"], rows
    )


def shared_inputs(layers: dict[str, torch.nn.Module], only: Iterable[str] | None = None) -> list[int]:
    """Lengths of the inputs of a Llama's layers, those that several layers read counted once."""
    leaders = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    seen: dict[tuple[str, str], int] = {}
    for name, layer in layers.items():
        if only is None or name in only:
            block, _, last = name.rpartition(".")
            seen[block, leaders.get(last, last)] = layer_features(layer)[0]
    return list(seen.values())


if __name__ == "__main__":
    main()
