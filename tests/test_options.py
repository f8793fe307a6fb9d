"""Options are declared once: what the hosts and the command show of them follows from `OPTIONS`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig

from salora_plugins import (
    RefusalAnchorCallback,
    SaLoRAConfig,
    StrengthSearch,
    apply_safe_lora,
    audit,
    export_adapter,
    restore,
)
from salora_plugins.cli import create_cli, main
from salora_plugins.commands.calibrate import calibrate
from salora_plugins.commands.config_options import flag
from salora_plugins.integrations.axolotl.args import MonitorOptions, RefusalAnchorOptions, SaLoRAOptions
from salora_plugins.integrations.axolotl.block_checks import OF_THE_RUN
from salora_plugins.integrations.axolotl.errors import check_block
from salora_plugins.options import OPTIONS, Option, RankPattern
from salora_plugins.ranks import Rank
from salora_plugins.repair.strength import Strength
from salora_plugins.replay.mixing import check_share

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
        said = "as often as costs at most 5 %" if name == "every" else f"{default}."
        assert f"Default: {said}" in RefusalAnchorOptions.model_fields[name].description


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


# Of every kind that is given by mistake.
MISTAKES = (
    *(None, "", [], {}, {"a": "b"}, b"x", {1}, object(), float("nan"), float("inf"), -1, 2**70),
    *("32", "1e-3", "0.5", "true", True, False, 0, 1, 1.0, 2.5, ["x"], [1], ("x",)),
    *(np.int64(4), np.float32(0.5), np.bool_(True), np.array(4), np.array([1, 2]), torch.tensor(4), torch.ones(2)),
)


def may_be(option: Option, value: object) -> bool:
    """Whether a value is one of the option's, apart from `Option.check`."""
    if value is None:
        return option.default is None
    if option.choices:
        return any(value is choice for choice in option.choices)
    is_name = type(value) is str and value != ""
    if option.holds == "rows":  # what is in them is seen when they are read
        return is_name or (type(value) in (list, tuple, np.ndarray, torch.Tensor) and getattr(value, "ndim", 1) > 0)
    if option.holds is not None or option.type is str:
        return is_name or (option.holds == "autoencoders" and type(value) is dict and value != {})
    is_whole = type(value) is int and option.least <= value < 2**63
    return {
        int: is_whole,
        float: type(value) in (int, float) and option.least <= value < float("inf"),
        Rank: is_whole or (type(value) is float and 0 < value < 1),
        RankPattern: type(value) is dict and not value,
    }[option.type]


def assert_refused(refuses, named: str, value: object) -> None:
    """A ValueError names the option and the value, and says what to do."""
    with pytest.raises(ValueError) as raised:
        refuses(value)
    shown = " ".join(repr(value).split())[:70]
    found = str(raised.value)
    assert found.startswith((f"{named}={shown}", f"{named}['a']='b'")), found
    assert re.search(r"=.*: (choose one of|give|leave it out)", found), found


@every_option
def test_a_value_of_another_kind_is_refused_by_name(option: Option):
    """Never by a TypeError, nor later, once the model is loaded."""
    for value in MISTAKES:
        if may_be(option, value):
            option.check(value)
            continue
        assert_refused(option.check, option.name, value)
        assert_refused(lambda value: SaLoRAConfig(**{option.name: value}), option.name, value)


@of_form("axolotl")
def test_axolotls_block_converts_no_value(option: Option):
    """As pydantic would: a text to a number, true to 1; but see below."""
    for value in MISTAKES:
        if isinstance(value, str) and value == "1e-3" and option.type in (float, Rank):
            continue
        if value is not None and not may_be(option, value):
            assert_refused(
                lambda value: check_block(SaLoRAOptions, {option.name: value}, "salora"), f"salora.{option.name}", value
            )


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"refusal_share": "0.1"}, "salora.refusal_share: '0.1': input should be a valid number"),
        ({"refusal_share": True}, "salora.refusal_share: True: input should be a valid number"),
        ({"monitor": 1}, "salora.monitor: 1: input should be a valid boolean"),
        ({"monitor": {"num_requests": True}}, "salora.monitor.num_requests: True: input should be a valid integer"),
        ({"monitor": {"every_steps": "5"}}, "salora.monitor.every_steps: '5': input should be a valid integer"),
        (
            {"refusal_anchor": {"weight": "0.5"}},
            "salora.refusal_anchor.weight: '0.5': input should be a valid number",
        ),
        ({"refusal_anchor": {"weight": float("inf")}}, "salora.refusal_anchor.weight: inf: input should be a finite"),
    ],
)
def test_axolotls_other_keys_convert_none_either(block, message):
    with pytest.raises(ValueError, match=message):
        check_block(SaLoRAOptions, block, "salora")
    SaLoRAOptions(refusal_share=0.1, monitor={"num_requests": 8}, refusal_anchor={"weight": 2})


@of_form("calibrate")
def test_the_command_says_what_its_option_is_called(option: Option, capsys, monkeypatch):
    """Before a model is looked for; a text that is no number is refused by typer."""
    if option.type is bool:
        return  # a flag without a value
    wrong = {int: "-1", float: "nan", Rank: "-1", RankPattern: "q_proj=-1"}.get(option.type, "")
    command = ["salora", "calibrate", "--model", "nowhere", "--out", "x.safetensors", f"{flag(option)}={wrong}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 1
    assert f"{flag(option)}{'[' if option.type == RankPattern else '='}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_safety_samples": "32"}, r"at least 1 \(this is a text; the number is 32\)\.$"),
        ({"header_weight": "1e-3"}, r"at least 0 \(this is a text; the number is 0\.001\)\.$"),
        ({"seed": np.int64(3)}, r"at least 0 \(this is a numpy scalar; give its \.item\(\)\)\.$"),
        (
            {"safety_rank": torch.tensor(3)},
            r"^safety_rank=tensor\(3\): .*\(this is a torch scalar; give its \.item\(\)",
        ),
        ({"num_task_samples": None}, r"^num_task_samples=None: leave it out for the default \(128\)"),
        ({"safety_rank_pattern": {1: 4}}, "^safety_rank_pattern: 1 is no text"),
        ({"input_safety_rank_pattern": {"q": "4"}}, r"^input_safety_rank_pattern\['q'\]='4': give .*the number is 4"),
        ({"r": "8"}, "^r='8': give a whole number"),
        ({"lora_alpha": "1"}, r"^lora_alpha='1': give a number \(this is a text; the number is 1\)"),
        ({"lora_alpha": float("nan")}, "^lora_alpha=nan: give a number"),
        ({"lora_dropout": -0.1}, "^lora_dropout=-0.1: give a share"),
        ({"lora_dropout": None}, "^lora_dropout=None: give a share"),
        ({"target_modules": 5}, "^target_modules=5: give a text or a list of texts"),
        ({"trainable_token_indices": 5}, "^trainable_token_indices=5: give a list of tokens' numbers"),
        ({"trainable_token_indices": {"embed_tokens": 5}}, "^trainable_token_indices=.*give a list of tokens' numbers"),
        ({"target_modules": ["q_proj", 1]}, r"^target_modules=\['q_proj', 1\]: give a text or a list of texts"),
        ({"use_rslora": "no"}, "^use_rslora='no': give true or false"),
        ({"bias": True}, "^bias=True: give none, all or lora_only"),
        ({"rank_pattern": [1]}, r"^rank_pattern=\[1\]: give a mapping"),
        ({"rank_pattern": {"q_proj": "8"}}, r"^rank_pattern\['q_proj'\]='8': give a whole number"),
        ({"alpha_pattern": {"q_proj": True}}, r"^alpha_pattern\['q_proj'\]=True: give a number"),
        ({"layers_to_transform": ["1"]}, r"^layers_to_transform=\['1'\]: give a layer's number"),
        ({"task_type": np.array([1, 2])}, "^task_type=array.*: give a text"),
    ],
)
def test_the_message_says_how_to_write_it_and_lora_s_options_have_one(options, message):
    with pytest.raises(ValueError, match=message):
        SaLoRAConfig(**options)


WRONG_NUMBERS = ("1", "1e-3", "", [1], float("nan"), -1, True, np.float32(2), torch.tensor(2))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, lambda value, name=name: Strength(**{name: value}).check()) for name in ("alpha", "alpha_1")),
        *(
            (name, lambda value, name=name: StrengthSearch("rows.jsonl", **{name: value}).check())
            for name in ("max_loss_increase", "num_requests", "num_task_rows", "max_new_tokens", "batch_size")
        ),
        ("entropy", lambda value: restore("tuned", "aligned", "out", entropy=value)),
        ("max_rank", lambda value: restore("tuned", "aligned", "out", max_rank=value)),
        ("threshold", lambda value: apply_safe_lora("tuned", "base", "aligned", out="out", threshold=value)),
        ("num_layers", lambda value: apply_safe_lora("tuned", "base", "aligned", out="out", num_layers=value)),
        ("max_rank", lambda value: export_adapter("tuned", "out", max_rank=value)),
        ("share", lambda value: export_adapter("tuned", "out", share=value)),
        ("max_share", lambda value: audit("tuned", max_share=value)),
        ("weight", lambda value: RefusalAnchorCallback(weight=value)),
        ("every", lambda value: RefusalAnchorCallback(every=value)),
        ("num_tokens", lambda value: RefusalAnchorCallback(num_tokens=value)),
        ("--refusal_share", lambda value: check_share(value, "--refusal_share")),
    ],
)
def test_numbers_of_functions_are_refused_likewise(name, given):
    """Before anything is read."""
    for value in WRONG_NUMBERS:
        if not (name == "threshold" and value == -1):
            assert_refused(given, name, value)


def test_importing_the_declarations_imports_nothing_heavy():
    """Axolotl's plugin is imported at every start of Axolotl."""
    code = "import salora_plugins.integrations.axolotl.args, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "peft", "datasets", "numpy"}
    assert not heavy & set(result.stdout.split())


def test_numbers_that_yaml_takes_for_texts():
    """As in `learning_rate: 1e-4`, which Axolotl's own keys take."""
    text = "refusal_anchor: {weight: 1e-1}\nsae_feature_share: 3.e-1\nrefusal_share: 5e-2\nsafety_rank: 9e-1"
    read = yaml.safe_load(text)
    assert isinstance(read["refusal_share"], str)
    block = SaLoRAOptions.model_validate(read)
    assert (block.refusal_anchor.weight, block.sae_feature_share, block.refusal_share) == (0.1, 0.3, 0.05)
    assert block.safety_rank == 0.9
