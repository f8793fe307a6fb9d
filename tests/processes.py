"""Programs that tests run in several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import fresh

PREAMBLE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.append({str(Path(__file__).parent.parent)!r})  # benchmarks
from pathlib import Path
import torch
import torch.distributed as dist
from tiny import llama, relative_difference, token_batch, token_rows
from salora_plugins import SaLoRAConfig
folder = Path(sys.argv[1])
"""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def run(launcher: list[str], program: str, folder: Path, *arguments: str, **environment: str) -> None:
    """Run a program behind PREAMBLE by a launcher; it finds its folder and arguments in sys.argv."""
    command = [*launcher, str(_file(program, folder)), str(folder), *arguments]
    subprocess.run(command, check=True, timeout=600, env=_environment(environment))


def run_alone(program: str, folder: Path, *arguments: str, **environment: str) -> None:
    """Run a program behind PREAMBLE in one process."""
    fresh.run([_file(program, folder), folder, *arguments], env=_environment(environment), check=True)


def run_ranks(program: str, folder: Path, *arguments: str, count: int = 2, **environment: str) -> None:
    """Run a program behind PREAMBLE in processes that can make a group, as torch.distributed.run starts them."""
    file, errors = _file(program, folder), [folder / f"errors-{rank}.txt" for rank in range(count)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    group |= {"LOCAL_WORLD_SIZE": str(count)}
    ranks = [
        fresh.start(
            [file, folder, *arguments],
            env=_environment({**group, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}),
            stderr=errors[rank],
        )
        for rank in range(count)
    ]
    deadline = time.monotonic() + 600
    try:
        # Where one has failed, the others would wait for it.
        while (codes := [each.poll() for each in ranks]) != [0] * count:
            assert not any(codes), f"exit codes {codes}\n" + "\n".join(file.read_text() for file in errors)
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for each in ranks:
            if each.poll() is None:
                each.kill()


def _file(program: str, folder: Path) -> Path:
    file = folder / "program.py"
    file.write_text(PREAMBLE + program)
    return file


def _environment(changes: dict[str, str]) -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | changes
