"""What a training step costs with SaLoRA, over one with LoRA of the same r (docs/evidence/benchmarks.md).

    python -m benchmarks.training_step table    # all that follows, on a GPU for 8B and 1B, in under 8 minutes
    python -m benchmarks.training_step time
    python -m benchmarks.training_step memory
    python -m benchmarks.training_step operations --shape 24-small-layers --tokens 16
    python -m benchmarks.training_step time --shape 8b --batch-size 4 --gradient-checkpointing    # on a GPU
    python -m benchmarks.training_step time --tokens 90 --batch-size 4 --methods lora,lora+anchor

A step is forward, backward, AdamW and zero_grad, with all linear layers adapted. The "dense projector" is what the
paper's code does: it multiplies every token's update with C = I - U_C U_C^T, a d_out x d_out matrix. "calls" are
functions that Python calls in it, most of its own time where a step is short. "start" is the time from `get_peft_model`
to the end of the first step, calibration on 4 rows of 512 tokens included. "lora+anchor" is LoRA with a penalty of the
refusal anchor before every step; "anchor_share" is what that takes of LoRA's time as often as it acts by default.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from salora_plugins import SaLoRAConfig
from salora_plugins.prompts.builtin import builtin_prompts, plain_prompts
from salora_plugins.replay import Refusal, RefusalAnchor

from .measuring import (
    LLAMA_8B,
    interleaved,
    machine,
    operations,
    peak_allocated,
    peak_tensor_bytes,
    python_calls,
    seconds,
)

What = Literal["time", "memory", "operations", "calls", "start"]
DEMO_MODEL = Path(__file__).parent.parent / "salora_plugins" / "demo" / "model"
RANK = 16
SHAPES: dict[str, dict[str, Any]] = {
    "two-layers": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "24-small-layers": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA_8B,
}


class DenseProjectorLinear(nn.Module):
    """y = W' x + s C B A x, C dense; W' = W - s C B_0 A_0 is taken as given, since it costs a step nothing."""

    def __init__(self, linear: nn.Linear, safety_rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, RANK, bias=False, device=device)
        self.lora_B = nn.Linear(RANK, linear.out_features, bias=False, device=device)
        basis = torch.linalg.qr(torch.randn(linear.out_features, safety_rank, device=device)).Q
        self.projector = torch.eye(linear.out_features, device=device) - basis @ basis.T

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) @ self.projector
        return self.linear(x) + update.to(x.dtype)


@dataclass(frozen=True)
class Measurement:
    """One row of the table."""

    what: What
    shape: str = "two-layers"
    methods: tuple[str, ...] = ("lora", "salora", "paper", "dense")
    batch_size: int = 1
    tokens: int = 512
    repeats: int = 11
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False

    @property
    def title(self) -> str:
        """What the row is called."""
        kinds = [f"{self.batch_size} x {self.tokens} tokens"]
        kinds += ["checkpointing"] if self.gradient_checkpointing else []
        kinds += ["4-bit base"] if self.load_in_4bit else []
        return f"{self.what}, {self.shape}, {', '.join(kinds)}"


_OPERATIONS = Measurement("operations", "24-small-layers", ("lora", "salora", "paper"), tokens=16)
_8B = Measurement("time", "8b", ("lora", "salora", "paper"), batch_size=4, repeats=15)
TABLE = {
    "cuda": (
        _8B,
        replace(_8B, gradient_checkpointing=True),
        replace(_8B, shape="1b", repeats=31),
        replace(_8B, what="start", methods=("lora", "salora"), repeats=1),
        replace(_8B, what="memory", gradient_checkpointing=True),
        replace(_8B, what="memory", methods=("lora", "salora"), gradient_checkpointing=True, load_in_4bit=True),
        _OPERATIONS,
        replace(_OPERATIONS, gradient_checkpointing=True),
        replace(_OPERATIONS, what="calls"),
    ),
    "cpu": (
        Measurement("time", repeats=7),
        Measurement("memory"),
        Measurement("start", methods=("lora", "salora"), repeats=1),
        Measurement("memory", methods=("lora", "salora"), load_in_4bit=True),
        _OPERATIONS,
        replace(_OPERATIONS, gradient_checkpointing=True),
        replace(_OPERATIONS, what="calls"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", *get_args(What)))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="two-layers")
    parser.add_argument(
        "--methods", default="lora,salora,paper,dense", help="of lora, salora, paper, dense, lora+anchor"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an example")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--load-in-4bit", action="store_true", help="base weights in bitsandbytes' nf4")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print(json.dumps(machine()))
        rows = [table_row(measurement) for measurement in TABLE["cuda" if torch.cuda.is_available() else "cpu"]]
        header = ["", "LoRA", "SaLoRA / LoRA", "the paper's form / LoRA", "dense projector / LoRA"]
        print("\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *rows]))
        return
    measurement = Measurement(**(vars(arguments) | {"methods": tuple(arguments.methods.split(","))}))
    if "lora" not in measurement.methods:
        parser.error("--methods: lora is what the others are compared with")
    print(json.dumps(asdict(measurement) | {"machine": machine()} | measured(measurement), indent=1))


def table_row(measurement: Measurement) -> str:
    """As a row of a Markdown table."""
    found = measured(measurement)
    gc.collect()
    of_lora = found["lora"]
    cells = [found["over_lora"].get(method, "") for method in ("salora", "paper", "dense")]
    return f"| {measurement.title} | {of_lora} | " + " | ".join(map(str, cells)) + " |"


def measured(measurement: Measurement) -> dict[str, Any]:
    """What a measurement found: the ratios over LoRA, LoRA's own figure as a text, and all figures."""
    base, methods = base_model(measurement), measurement.methods
    if measurement.what == "time":
        steps = {method: training_step(base, method, measurement)[0] for method in methods}
        times = interleaved(steps, measurement.repeats, warmup=3)
        # Within a turn, since what else the machine does changes from turn to turn.
        ratios = {m: [a / b for a, b in zip(times[m], times["lora"], strict=True)] for m in methods}
        over_lora = {method: round(median(values), 3) for method, values in ratios.items()}
        found: dict[str, Any] = {"seconds": times, "lora": f"{median(times['lora']):.3f} s", "over_lora": over_lora}
        if "lora+anchor" in methods:
            every = anchor(base).affordable_every(measurement.batch_size * measurement.tokens)
            found |= {"anchor_every": every, "anchor_share": round((over_lora["lora+anchor"] - 1) / every, 4)}
        return found
    # One after the other, so that no other method's adapter is in memory.
    figures: dict[str, float]
    if measurement.what == "operations":
        figures = {method: operations(training_step(base, method, measurement)[0]) for method in methods}
        lora = f"{figures['lora']}"
    elif measurement.what == "calls":
        figures = {method: python_calls(training_step(base, method, measurement)[0]) for method in methods}
        lora = f"{figures['lora']}"
    elif measurement.what == "start":
        seconds(training_step(base, "lora", measurement)[0])  # what the first use of a device costs
        figures = {method: seconds(partial(training_step, base, method, measurement)) for method in methods}
        lora = f"{figures['lora']:.2f} s"
    else:
        figures = {method: memory(base, method, measurement) / 1e6 for method in methods}
        lora = f"{figures['lora']:.1f} MB"
    over_lora = {method: round(figure / figures["lora"], 3) for method, figure in figures.items()}
    return {"figures": {m: round(figure, 2) for m, figure in figures.items()}, "lora": lora, "over_lora": over_lora}


def base_model(measurement: Measurement) -> LlamaForCausalLM:
    """Randomly initialized: bf16 on a GPU, float32 on a CPU; quantized where that is asked for."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[measurement.shape]))
        model = model.to(torch.bfloat16 if on_gpu else torch.float32)
    if measurement.load_in_4bit:
        quantize(model, device)
    return model


def quantize(model: Any, device: str) -> None:
    """Put bitsandbytes' nf4 layers in the place of all linear layers but the head, as load_in_4bit does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=module.weight.dtype, quant_type="nf4"
            )
            weight = module.weight.data.to("cpu")
            layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
            model.set_submodule(name, layer.to(device))
    model.is_loaded_in_4bit = True


def training_step(base: LlamaForCausalLM, method: str, measurement: Measurement) -> tuple[Callable[[], None], int]:
    """A function that does one step, and the bytes of weights, adapter and optimizer on the model's device."""
    model = copy.deepcopy(base) if measurement.load_in_4bit else with_shared_weights(base)
    tokens = torch.randint(0, base.config.vocab_size, (measurement.batch_size, measurement.tokens), device=base.device)
    if measurement.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(model, method)
    # As torch does it on GPUs, so that the count is that of a GPU.
    foreach = True if measurement.what in ("operations", "calls") else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=foreach)
    penalty = anchor(model) if method == "lora+anchor" else None
    numbers = itertools.count()
    model.train()

    def step() -> None:
        if penalty is not None:
            penalty.backward(model, next(numbers))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state, and the task initialization
    return step, resident_bytes(model, optimizer)


def anchor(model: Any) -> RefusalAnchor:
    """Of built-in requests, as the demo's tokenizer renders them: about 40 tokens with the beginning of a refusal."""
    requests = plain_prompts(builtin_prompts("calibration"))[:32]
    refusals = [
        Refusal(({"role": "user", "content": text},), "I'm sorry, but I can't help with that.") for text in requests
    ]
    return RefusalAnchor.of(model, AutoTokenizer.from_pretrained(DEMO_MODEL), refusals)


def with_shared_weights(base: LlamaForCausalLM) -> Any:
    """Another model with the same weights, which are there once."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.tie_weights()
    model.model.rotary_emb = base.model.rotary_emb
    return model


def adapted(model: Any, method: str) -> Any:
    """The model with one method's adapter on all linear layers."""
    common: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method in ("lora", "lora+anchor"):
        return get_peft_model(model, LoraConfig(**common))
    if method in ("salora", "paper"):
        rows = torch.randint(0, model.config.vocab_size, (4, 512)).tolist()
        data = [{"input_ids": row, "labels": [-100] * 256 + row[256:]} for row in rows]
        options: dict[str, Any] = {"variant": "paper"} if method == "paper" else {}
        config = SaLoRAConfig(**common, **options, safety_data=data, calibration_cache=False)
        return get_peft_model(model, config)
    if method == "dense":
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, DenseProjectorLinear(module, safety_rank=32))
        return model
    raise SystemExit(f"--methods: there is no {method!r}")


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    device = next(model.parameters()).device
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.device == device}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def memory(base: LlamaForCausalLM, method: str, measurement: Measurement) -> int:
    """The peak of a step, the base model and all that lasts included."""
    step, resident = training_step(base, method, measurement)
    if torch.cuda.is_available():
        peak = peak_allocated(step, steps=3)
    else:
        step()
        peak = resident + peak_tensor_bytes(step)
    del step
    gc.collect()
    return peak


if __name__ == "__main__":
    main()
