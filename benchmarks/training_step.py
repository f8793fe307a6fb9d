"""What a training step costs with SaLoRA, over one with LoRA of the same r (docs/evidence/benchmarks.md).

    python -m benchmarks.training_step time
    python -m benchmarks.training_step memory
    python -m benchmarks.training_step operations --shape 24-small-layers --tokens 16
    python -m benchmarks.training_step time --shape 8b --batch-size 4 --gradient-checkpointing    # on a GPU

A step is forward, backward, AdamW and zero_grad, with all linear layers adapted. The "dense projector" is what the
paper's code does: it multiplies every token's update with C = I - U_C U_C^T, a d_out x d_out matrix.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from salora_plugins import SaLoRAConfig

from .measuring import LLAMA_8B, interleaved, machine, operations, peak_tensor_bytes

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory", "operations"))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="two-layers")
    parser.add_argument("--methods", default="lora,salora,paper,dense", help="of lora, salora, paper, dense")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an example")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if "lora" not in methods:
        parser.error("--methods: lora is what the others are compared with")
    result: dict[str, Any] = vars(arguments) | {"machine": machine()}
    base = base_model(arguments.shape)
    if arguments.what == "time":
        steps = {method: training_step(base, method, arguments)[0] for method in methods}
        times = interleaved(steps, arguments.repeats, warmup=3)
        result["seconds"] = times
        # Within a turn, since what else the machine does changes from turn to turn.
        ratios = {m: [a / b for a, b in zip(times[m], times["lora"], strict=True)] for m in methods}
        result["over_lora"] = {method: round(median(values), 3) for method, values in ratios.items()}
    elif arguments.what == "operations":
        counts = {method: operations(training_step(base, method, arguments)[0]) for method in methods}
        result["operations"] = counts
        result["over_lora"] = {method: round(count / counts["lora"], 3) for method, count in counts.items()}
    else:
        # Alone, so that no other method's adapter is in memory.
        peaks = {method: memory(base, method, arguments) for method in methods}
        result["peak_MB"] = {method: round(peak / 1e6, 1) for method, peak in peaks.items()}
        result["over_lora"] = {method: round(peak / peaks["lora"], 3) for method, peak in peaks.items()}
    print(json.dumps(result, indent=1))


def base_model(shape: str) -> LlamaForCausalLM:
    """Randomly initialized: bf16 on a GPU, float32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
        return model.to(torch.bfloat16 if on_gpu else torch.float32)


def training_step(base: LlamaForCausalLM, method: str, arguments: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A function that does one step, and the bytes that weights, adapter and optimizer take between steps."""
    model = with_shared_weights(base)
    tokens = torch.randint(0, base.config.vocab_size, (arguments.batch_size, arguments.tokens), device=base.device)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(model, method)
    # As torch does it on GPUs, so that the count is that of a GPU.
    foreach = True if arguments.what == "operations" else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=foreach)
    model.train()

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimizer's state, and the task initialization
    return step, resident_bytes(model, optimizer)


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
    if method == "lora":
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
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def memory(base: LlamaForCausalLM, method: str, arguments: argparse.Namespace) -> int:
    step, resident = training_step(base, method, arguments)
    peak = resident + peak_tensor_bytes(step)
    del step
    gc.collect()
    return peak


if __name__ == "__main__":
    main()
