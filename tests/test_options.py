"""Options are declared once: what the hosts and the command show of them follows from `OPTIONS`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from typing import Any, get_args

import pytest
from peft import LoraConfig

from salora_plugins import SaLoRAConfig
from salora_plugins.cli import create_cli
from salora_plugins.commands.calibrate import calibrate
from salora_plugins.commands.config_options import flag
from salora_plugins.integrations.axolotl.args import MonitorOptions, RefusalAnchorOptions, SaLoRAOptions
from salora_plugins.integrations.axolotl.block_checks import OF_THE_RUN
from salora_plugins.options import OPTIONS, Option, RankPattern
from salora_plugins.ranks import Rank

# Form -> option that it leaves out -> why.
LEFT_OUT = {
    "axolotl": {},
    "trl": {"seed": "the run has a --seed, and get_peft_config(seed=...) hands it on"},
    "calibrate": {
        "safety_module": "it is what the command computes",
        **dict.fromkeys(("init", "task_rank", "task_data", "num_task_samples"), "of the start of a training run"),
    },
}
# In the configuration only: objects of the running process.
RUN_TIME = {"tokenizer"}

every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def of_form(form: str):
    options = {name: option for name, option in OPTIONS.items() if name not in LEFT_OUT[form]}
    return pytest.mark.parametrize("option", options.values(), ids=options)


def test_the_configuration_has_the_declared_options_and_lora_s():
    own = [f.name for f in dataclasses.fields(SaLoRAConfig)]
    inherited = [f.name for f in dataclasses.fields(LoraConfig)]
    assert own == [*inherited, *OPTIONS, *RUN_TIME]


@every_option
def test_the_configuration_has_the_declared_default(option: Option):
    default = inspect.signature(SaLoRAConfig).parameters[option.name].default
    if option.type == RankPattern:  # made anew for every configuration
        default = getattr(SaLoRAConfig(), option.name)
        assert default is not getattr(SaLoRAConfig(), option.name)
    assert default == option.default
    assert option.help.endswith(".") and option.default_in_words not in ("None", "")


@every_option
def test_the_docstring_names_the_default(option: Option):
    arguments = inspect.getdoc(SaLoRAConfig).partition("Args:")[2]
    entry = re.search(rf"^ +(?:\w+, )*{option.name}(?:, \w+)* \((.*)\):", arguments, re.MULTILINE).group(1)
    if option.default is None:
        assert entry.endswith("*optional*")
    else:
        assert ast.literal_eval(re.search(r"defaults to `?(.*?)`?$", entry).group(1)) == option.default
    for choice in option.choices if option.type is not bool else ():
        assert f'`"{choice}"`' in entry


@of_form("axolotl")
def test_axolotls_block(option: Option):
    schema = SaLoRAOptions.model_json_schema()["properties"][option.name]
    assert option.help in schema["description"]
    # Axolotl has rows and a seed of its own in the place of these two.
    assert option.name in ("task_data", "seed") or schema["description"].endswith(
        f"Default: {option.default_in_words}."
    )
    assert schema["default"] is None
    kinds = schema["anyOf"]
    assert kinds[-1] == {"type": "null"}
    assert tuple(kinds[0].get("enum", ())) == (option.choices if option.type is not bool else ())
    if option.type in (int, Rank):
        assert kinds[0] == {"type": "integer", "minimum": option.least}
    if option.type == Rank:
        assert kinds[1] == {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}


def test_axolotls_block_has_nothing_else():
    assert [*SaLoRAOptions.model_fields] == [*(n for n in OPTIONS if n not in LEFT_OUT["axolotl"]), *OF_THE_RUN]


def test_axolotls_anchor_has_the_options_of_the_callback():
    from salora_plugins.replay import RefusalAnchorCallback
    from salora_plugins.replay.anchor import AnchorOptions

    own = inspect.signature(RefusalAnchorCallback).parameters
    defaults = {name: own[name].default for name in ("weight", "every")}
    defaults |= {field.name: field.default for field in dataclasses.fields(AnchorOptions) if field.name != "seed"}
    assert defaults.keys() == RefusalAnchorOptions.model_fields.keys()
    for name, default in defaults.items():
        assert RefusalAnchorOptions.model_fields[name].description.endswith(f"Default: {default}.")


def test_axolotls_monitor_has_the_options_of_the_callback():
    from salora_plugins import SafetyMonitorCallback

    parameters = dict(inspect.signature(SafetyMonitorCallback).parameters)
    for name in ("trainer", "tokenizer", "safety_module"):  # objects that the run has
        del parameters[name]
    assert parameters.keys() == MonitorOptions.model_fields.keys()
    for name, parameter in parameters.items():
        if parameter.default is not None:
            assert MonitorOptions.model_fields[name].description.endswith(f"Default: {parameter.default}.")


@of_form("trl")
def test_trls_arguments(option: Option):
    pytest.importorskip("trl")
    from transformers import HfArgumentParser

    from salora_plugins.integrations.trl import SaLoRAArguments

    parser = HfArgumentParser(SaLoRAArguments)
    name = "salora_init" if option.name == "init" else option.name  # "--init" alone would not say of what
    action = next(action for action in parser._actions if action.dest == name)
    shown = re.sub(r"\s+", " ", parser.format_help())
    assert option.help in action.help and f"Default: {option.default_in_words}." in shown
    assert action.default is None and "(default: None)" not in shown
    assert tuple(action.choices or ()) == (option.choices if option.type is not bool else ())
    kinds = {int: int, float: float, str: str, Any: str, Rank: str, RankPattern: str}
    assert option.type not in kinds or action.type is kinds[option.type]


def test_trls_arguments_have_nothing_else():
    pytest.importorskip("trl")
    from salora_plugins.integrations.trl import SaLoRAArguments
    from salora_plugins.integrations.trl.arguments import OF_THE_RUN as OF_TRLS_RUN

    names = ["salora_init" if n == "init" else n for n in OPTIONS if n not in LEFT_OUT["trl"]]
    assert [f.name for f in dataclasses.fields(SaLoRAArguments)] == ["use_salora", *names, *OF_TRLS_RUN]


@pytest.fixture(scope="module")
def calibrate_options() -> dict:
    """Flag -> parameter of `salora calibrate`."""
    return {parameter.opts[0]: parameter for parameter in create_cli().commands["calibrate"].params}


@of_form("calibrate")
def test_options_of_salora_calibrate(calibrate_options, option: Option):
    parameter = calibrate_options[flag(option)]
    assert option.help in parameter.help
    if option.type == RankPattern or option.several:
        assert parameter.multiple and not parameter.default
        assert not option.several or option.default_in_words in parameter.help
    else:
        assert parameter.default == (str(option.default) if option.name == "safety_rank" else option.default)
    assert option.default is not None or option.default_in_words in parameter.help
    if option.choices and option.type is not bool:
        assert parameter.metavar == f"[{'|'.join(option.choices)}]"
    assert parameter.is_flag == (option.type is bool)
    annotation = inspect.signature(calibrate).parameters[parameter.name].annotation  # newer typers keep no type
    assert (get_args(annotation)[0] in (int, int | None)) == (option.type is int)


def test_salora_calibrate_leaves_out_what_is_listed(calibrate_options):
    flags = {flag(option) for option in OPTIONS.values() if option.name not in LEFT_OUT["calibrate"]}
    assert flags <= calibrate_options.keys()
    assert not {flag(OPTIONS[name]) for name in LEFT_OUT["calibrate"]} & calibrate_options.keys()


@pytest.mark.parametrize("option", [option for option in OPTIONS.values() if option.type not in (Any, str)])
def test_a_value_of_another_kind_is_refused(option: Option):
    with pytest.raises(ValueError, match=rf"^{option.name}=\['x'\]: (choose one of|give)"):
        SaLoRAConfig(**{option.name: ["x"]})
    if option.type is int or option.type == Rank:
        with pytest.raises(ValueError, match=f"give a whole number of at least {option.least}"):
            SaLoRAConfig(**{option.name: option.least - 1})
        option.check(option.least)


def test_importing_the_declarations_imports_nothing_heavy():
    """Axolotl's plugin is imported at every start of Axolotl."""
    code = "import salora_plugins.integrations.axolotl.args, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "peft", "datasets", "numpy"}
    assert not heavy & set(result.stdout.split())
