"""Programs that tests run in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
    file = folder / "program.py"
    file.write_text(PREAMBLE + program)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    subprocess.run([*launcher, str(file), str(folder), *arguments], check=True, timeout=600, env=environment)
