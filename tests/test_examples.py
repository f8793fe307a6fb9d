"""The examples can be read, and say what is so. They are run, or validated by their host, in the hosts' own tests."""

from __future__ import annotations

import ast
import json
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from salora_plugins import SaLoRAConfig
from salora_plugins.integrations.axolotl.args import SaLoRAOptions
from salora_plugins.options import OPTIONS

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


@pytest.mark.parametrize(("name", "config"), [("trl_sft.py", "SFTConfig"), ("trl_dpo.py", "DPOConfig")])
def test_the_command_of_a_script(name, config, tmp_path):
    trl = pytest.importorskip("trl")
    script = runpy.run_path(str(EXAMPLES / name))
    command = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())).partition("python ")[2].partition("\n\n")[0]
    path, *arguments = shlex.split(command)
    assert path == f"examples/{name}"
    kinds = (script[kind] for kind in ("ScriptArguments", config, "ModelConfig", "SaLoRAArguments"))
    cpu = ["--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path)]
    parsed = trl.TrlParser(tuple(kinds)).parse_args_and_config([*arguments, *cpu])
    made = script["get_peft_config"](parsed[2], parsed[3], seed=parsed[1].seed)
    assert isinstance(made, SaLoRAConfig) and (made.safety_rank, made.r) == (32, 16)
