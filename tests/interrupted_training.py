"""
Fine-tunes in processes that kill themselves while they write a checkpoint.

    python interrupted_training.py MODEL SAFETY_MODULE FOLDER FILE...

For every FILE one run writes to FOLDER/FILE and is killed when it is about to write that file of checkpoint-4.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trl import SFTConfig, SFTTrainer

from tiny import sum_rows, tokenizer
from trainer_helpers import arguments, config


def trainer(model: str | Path, safety_module: str | Path, output_dir: str | Path) -> SFTTrainer:
    """Six steps of SFT, with a checkpoint after every second one, of which the last one complete is kept."""
    return SFTTrainer(
        model=str(model),
        args=arguments(SFTConfig, output_dir, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1),
        train_dataset=sum_rows(),
        processing_class=tokenizer(),
        peft_config=config(safety_module=str(safety_module)),
    )


def kill_before(file: str) -> None:
    """Send SIGKILL to this process when it opens a file for writing, or renames one to it."""

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename"):
            target = args[0] if event == "open" else args[1]
            if str(target).endswith(file):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main() -> None:
    model, safety_module, folder, *files = sys.argv[1:]
    for file in files:
        child = os.fork()
        if child == 0:
            kill_before(f"checkpoint-4/{file}")
            trainer(model, safety_module, Path(folder) / file).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    main()
