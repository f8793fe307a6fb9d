"""Runs of `axolotl train` in two processes of a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from processes import AS_ON_GPUS, CPUS_AS_GPUS, free_port, run_ranks
from tiny import llama, refusal_rows, sum_rows, tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
ON_CPUS = """
# Axolotl takes every process of several to have a GPU, also where accelerate has told it otherwise.
torch.cuda.can_device_access_peer = lambda *devices: True
from accelerate.parallelism_config import ParallelismConfig
from transformers import PreTrainedModel
build_device_mesh, load = ParallelismConfig.build_device_mesh, PreTrainedModel.from_pretrained.__func__
ParallelismConfig.build_device_mesh = lambda self, device_type: build_device_mesh(self, "cpu")
PreTrainedModel.from_pretrained = classmethod(lambda cls, *args, device_map=None, **rest: load(cls, *args, **rest))
"""
TRAIN = (
    ON_CPUS
    + """
import gc
import json
import os

if __name__ == "__main__":  # what Axolotl starts imports this file
    from axolotl.cli.main import cli

    gc.collect()
    gc.freeze()  # Axolotl collects garbage at every turn, among all that it imported
    for port, file in zip(json.loads(sys.argv[2]), sys.argv[3:], strict=True):
        child = os.fork()  # a run leaves more behind than can be undone
        if not child:
            os.environ["MASTER_PORT"] = str(port)
            cli(["train", file, "--launcher", "python"], standalone_mode=False)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, file
"""
)


def axolotl_train(
    folder: Path, example: str, changes: dict[str, Any], runs: dict[str, dict[str, Any]], *, as_on_gpus: bool = True
) -> None:
    """
    Train a tiny model in four steps with a configuration of examples/, once for every run; a checkpoint is at two.

    Args:
        folder: Gets the model in `base`, rows for the safety module in `safety.jsonl`, and a folder for every run.
        example: Name of the file in examples/.
        changes: Of its keys, for all runs; None removes one.
        runs: Name -> further changes.
        as_on_gpus: Sharded runs need it; DDP knows CPUs.
    """
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in sum_rows()]
    for name, of_file in {"rows": rows, "safety": refusal_rows()}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    data = {
        "path": str(folder / "rows.jsonl"),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
    }
    config = yaml.safe_load((EXAMPLES / example).read_text()) | {
        **{"base_model": str(folder / "base"), "datasets": [data], "dataset_prepared_path": str(folder / "prepared")},
        **{"dataset_num_proc": 1, "sequence_len": 256, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
        **{"max_steps": 4, "save_steps": 2, "saves_per_epoch": None, "logging_steps": 1},
        **{"bf16": False, "fp16": False, "tf32": False, "output_dir": None},
        **changes,
    }
    files = []
    for name, change in runs.items():
        changed = config | {"output_dir": str(folder / name)} | change
        files.append(folder / f"{name}.yml")
        files[-1].write_text(yaml.safe_dump({key: value for key, value in changed.items() if value is not None}))
    own = {"SALORA_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    ports = json.dumps([free_port() for _ in files])  # on which the ranks of each run meet
    if as_on_gpus:
        run_ranks(AS_ON_GPUS + TRAIN, folder, ports, *map(str, files), **CPUS_AS_GPUS, **own)
    else:
        run_ranks(TRAIN, folder, ports, *map(str, files), **own)
