"""
The examples can be read, say what is so, and run with stand-ins for model and data: scripts of TRL and notebooks here,
files of Axolotl in test_axolotl.py.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import sys
import tempfile
from pathlib import Path

import accelerate
import pytest
import yaml
from packaging.version import Version

from certificate import largest_share_inside
from processes import run_launched
from salora_plugins import SafetyModule, SaLoRAConfig, calibrate
from salora_plugins.integrations.axolotl.args import SaLoRAOptions
from salora_plugins.options import OPTIONS
from tiny import llama, preference_rows, refusal_rows, sum_rows, tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", [file.name for file in sorted(EXAMPLES.glob("*.y*ml"))])
def test_yaml(name):
    config = yaml.safe_load((EXAMPLES / name).read_text())
    if "adapter" in config:
        SaLoRAOptions.model_validate(config["salora"])
    else:
        from accelerate.commands.config.config_args import load_config_from_file

        assert load_config_from_file(str(EXAMPLES / name)).fsdp_config["fsdp_version"] == 2


def test_the_keys_that_are_called_defaults_are_defaults():
    text = (EXAMPLES / "axolotl-sft.yml").read_text()
    assert "every key is optional; these are the defaults" in text
    assert all(value == OPTIONS[name].default for name, value in yaml.safe_load(text)["salora"].items())


@pytest.mark.parametrize("name", [file.name for file in sorted(EXAMPLES.glob("*.json"))])
def test_json(name):
    assert json.loads((EXAMPLES / name).read_text())["zero_optimization"]["stage"] == int(name[-6])


def trl_arguments(name: str) -> list[str]:
    """The arguments of the command in a script's docstring."""
    command = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())).partition("python ")[2].partition("\n\n")[0]
    path, *arguments = shlex.split(command)
    assert path == f"examples/{name}"
    return arguments


TRL_SCRIPTS = {
    "trl_sft.py": "SFTConfig",
    "trl_dpo.py": "DPOConfig",
    "trl_kto.py": "KTOConfig",
    "trl_grpo.py": "GRPOConfig",
    "trl_reward.py": "RewardConfig",
}


def test_every_trl_script_is_tested():
    assert TRL_SCRIPTS.keys() == {file.name for file in EXAMPLES.glob("trl_*.py")}


@pytest.mark.parametrize(("name", "config"), TRL_SCRIPTS.items())
def test_the_command_of_a_script(name, config, tmp_path):
    trl = pytest.importorskip("trl")
    script = runpy.run_path(str(EXAMPLES / name))
    kinds = (script[kind] for kind in ("ScriptArguments", config, "ModelConfig", "SaLoRAArguments"))
    cpu = ["--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path)]
    parsed = trl.TrlParser(tuple(kinds)).parse_args_and_config([*trl_arguments(name), *cpu])
    made = script["get_peft_config"](parsed[2], parsed[3], seed=parsed[1].seed)
    assert isinstance(made, SaLoRAConfig) and (made.safety_rank, made.r) == (32, 16)
    assert parsed[0].dataset_name.startswith("trl-lib/")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with a tiny model, its safety module, and rows for every script."""
    folder = tmp_path_factory.mktemp("examples")
    llama().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refusal_rows()))
    calibrate(
        llama(), tokenizer(), target_modules=["q_proj", "v_proj"], safety_rank=8, safety_data=refusal_rows()
    ).save(folder / "safety.safetensors")
    pairs = preference_rows().to_list()
    rows = {
        "trl_sft.py": sum_rows().to_list(),
        "trl_dpo.py": pairs,
        "trl_kto.py": [
            {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, row in enumerate(pairs)
        ],
        "trl_grpo.py": [{"prompt": row["prompt"]} for row in pairs],
        "trl_reward.py": pairs,
    }
    for name, of_script in rows.items():
        (folder / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_script))
    return folder


SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--use_cpu"]
SHORT += ["--bf16", "False", "--report_to", "none", "--disable_tqdm", "true"]
MORE = {"trl_grpo.py": ["--num_generations", "2", "--max_completion_length", "8"]}


def run_script(name: str, arguments: list[str], stand_ins: Path, out: Path, monkeypatch) -> SafetyModule:
    """With its arguments, and stand-ins for what they would download; the last ones count. Returns what is saved."""
    pytest.importorskip("trl")
    replaced = ["--model_name_or_path", stand_ins / "model", "--dataset_name", (stand_ins / name).with_suffix(".jsonl")]
    safety = ["--safety_rank", "8", "--safety_data", stand_ins / "safety.jsonl"]
    if "--safety_module" in arguments:
        safety = ["--safety_rank", "8", "--safety_module", stand_ins / "safety.safetensors"]
    given = [*arguments, *replaced, *safety, *SHORT, *MORE.get(name, []), "--output_dir", out]
    monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert largest_share_inside(out) <= 1e-5
    return SafetyModule.load(out)


@pytest.mark.parametrize("name", TRL_SCRIPTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_script_runs(name, stand_ins, tmp_path, monkeypatch):
    assert run_script(name, trl_arguments(name), stand_ins, tmp_path, monkeypatch).safety_rank == 8
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 16


def sharded_commands() -> dict[str, str]:
    """Folder of the output -> what follows `accelerate launch` in docs/examples.md."""
    text = (EXAMPLES.parent / "docs" / "examples.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ +accelerate launch (.*)$", text, re.MULTILINE)
    return {command.rpartition("outputs/")[2]: command for command in commands}


SHARDED = {
    "fsdp2": "FSDP2 with SFTTrainer (examples/accelerate-fsdp2.yaml)",
    "zero3": "DeepSpeed ZeRO stage 3 with SFTTrainer (examples/deepspeed-zero3.json)",
}


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        pytest.param(name, when, marks=pytest.mark.compatibility("Several processes", f"{what}: calibrated {when}"))
        for name, what in SHARDED.items()
        for when in ("before", "in the run")
    ],
)
def test_the_command_of_a_sharded_run(name, computed, stand_ins, tmp_path):
    """With its own files, in two processes, as accelerate launches them on GPUs."""
    pytest.importorskip("trl")
    if name == "zero3":
        pytest.importorskip("deepspeed")
    elif Version(accelerate.__version__) < Version("1.6"):
        pytest.skip("accelerate has FSDP2 since 1.6")
    command = sharded_commands()[name]
    arguments = ["--model_name_or_path", stand_ins / "model", "--dataset_name", stand_ins / "trl_sft.jsonl"]
    arguments += ["--safety_rank", "8", *(argument for argument in SHORT if argument != "--use_cpu")]
    assert " --safety_module safety.safetensors " in command
    if computed == "before":
        arguments += ["--safety_module", stand_ins / "safety.safetensors"]
    else:
        command = command.replace("--safety_module safety.safetensors ", "")
        arguments += ["--safety_data", stand_ins / "safety.jsonl"]
    out = tmp_path / "out"
    given = [*map(str, arguments), "--dtype", "float32", "--save_steps", "1", "--output_dir", str(out)]
    run_launched(command, tmp_path, *given, SALORA_CACHE=str(tmp_path / "cache"))
    trained, expected = SafetyModule.load(out), SafetyModule.load(stand_ins / "safety.safetensors")
    for side, bases in expected.sides.items():
        for module, basis in bases.bases.items():
            # The shares of two ranks are added up in another order than one process adds.
            assert (trained.sides[side].bases[module] - basis).abs().max() < 1e-4, module
    assert largest_share_inside(out) <= 1e-5
    assert largest_share_inside(out / "checkpoint-2") <= 1e-5
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["epoch"] == pytest.approx(2 / 3)  # of 24 rows, 2 x 4 at once


NOTEBOOKS = [file.name for file in sorted(EXAMPLES.glob("*.ipynb"))]


def code_cells(name: str) -> list[dict]:
    return [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_without_outputs(name):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(name))


def run_notebook(name: str, tmp_path: Path, monkeypatch) -> dict:
    """Cell after cell in one namespace, as a kernel does; figures are drawn and not shown. Returns the namespace."""
    pytest.importorskip("trl")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(name)):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), namespace)
    assert pyplot.get_fignums()
    pyplot.close("all")
    return namespace


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_protect_and_measure(tmp_path, monkeypatch):
    table = run_notebook("protect_and_measure.ipynb", tmp_path, monkeypatch)["table"]
    refused, loss = table["harmful refused"], table["held-out loss"]
    assert refused["LoRA"] < refused["SaLoRA"]
    assert loss["SaLoRA"] < 0.5 * loss["base"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_audit_and_repair(tmp_path, monkeypatch):
    found = run_notebook("audit_and_repair.ipynb", tmp_path, monkeypatch)
    table = found["table"]
    assert not found["found"].is_outside and found["repaired"].is_outside
    assert table["harmful refused"]["adapter"] < table["harmful refused"]["repaired"]
    assert table["held-out loss"]["adapter"] < table["held-out loss"]["repaired"] < table["held-out loss"]["base"]
