"""Programs that tests run in several processes."""

from __future__ import annotations

import os
import shlex
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
AS_ON_GPUS = """
# accelerate and Axolotl have several processes with FSDP or DeepSpeed on accelerators only. Here they are given what
# they find there, with gloo in the place of NCCL.
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda self, *given: ("gloo", DistributedType.MULTI_GPU)
torch.cuda.can_device_access_peer = lambda *devices: True
"""
CPUS_AS_GPUS = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
"""Environment of programs that begin with AS_ON_GPUS."""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


def run(launcher: list[str], program: str, folder: Path, *arguments: str, **environment: str) -> None:
    """Run a program behind PREAMBLE by a launcher; it finds its folder and arguments in sys.argv."""
    command = [*launcher, str(_file(program, folder)), str(folder), *arguments]
    subprocess.run(command, check=True, timeout=600, env=_environment(environment))


def run_alone(program: str, folder: Path, *arguments: str, **environment: str) -> None:
    """Run a program behind PREAMBLE in one process."""
    fresh.run([_file(program, folder), folder, *arguments], env=_environment(environment), check=True)


def run_launched(command: str, folder: Path, *arguments: str, **environment: str) -> None:
    """
    Run the script of an `accelerate launch` command as on two GPUs, in float32.

    Args:
        command: What follows `accelerate launch`; paths in it are seen from the repository.
        folder: For what is written.
        arguments: More of them for the script, of which the last ones count.
        environment: What else is to be set.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    repository = Path(__file__).parents[1]
    parsed = launch_command_parser().parse_args(shlex.split(command))
    if parsed.config_file:
        parsed.config_file = str(repository / parsed.config_file)
    parsed.num_processes, parsed.mixed_precision = 2, "no"
    launched = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    set_by_it = {key: value for key, value in launched.items() if os.environ.get(key) != value}
    given = [parsed.training_script, *parsed.training_script_args, *arguments]
    program = "import runpy\nsys.argv = sys.argv[2:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    environment = {**set_by_it, **CPUS_AS_GPUS, **environment}
    run_ranks(AS_ON_GPUS + program, folder, *given, cwd=repository, **environment)


def free_port() -> int:
    """A port that nobody listens at: another run of the tests, or a training, may have the launchers' 29500."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(
    program: str, folder: Path, *arguments: str, count: int = 2, cwd: Path | None = None, **environment: str
) -> None:
    """Run a program behind PREAMBLE in processes that can make a group, as torch.distributed.run starts them."""
    file, errors = _file(program, folder), [folder / f"errors-{rank}.txt" for rank in range(count)]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    group |= {"LOCAL_WORLD_SIZE": str(count)}
    own = {**environment, **group}
    ranks = [
        fresh.start(
            [file, folder, *arguments],
            env=_environment({**own, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            cwd=cwd,
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
