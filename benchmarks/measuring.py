"""Times of functions that take turns, the peak memory of one, and how many operations it takes."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Times of functions that take turns, after some turns for warming up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(repeats + warmup), desc="measuring", unit="turn"):
        for name, function in functions.items():
            taken = seconds(function)
            if turn >= warmup:
                times[name].append(round(taken, 4))
    return times


def peak_tensor_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that were alive at once, beyond those before the call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()  # kept until the events are read, so that the result counts
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    del result
    alive = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def peak_allocated(step: Callable[[], Any], steps: int) -> int:
    """The most bytes that tensors took on the GPU during some steps, those from before included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], Any]) -> int:
    """
    How many of torch's operations a call dispatches, in backward passes, too: what a step of small operations costs on
    a GPU, where launching them takes longer than they do; the same on every machine.
    """
    with _Counter() as counter:
        function()
    return counter.operations


def python_calls(function: Callable[[], Any]) -> int:
    """How many functions of Python and of C a call calls, in this thread: what the interpreter has to do meanwhile."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def machine() -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
