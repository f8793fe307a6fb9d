"""The configuration: contradictions are refused with advice, and it survives being saved."""

import copy
import dataclasses
import json
import warnings

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import EvaConfig

import fresh
from salora_plugins import SaLoRAConfig
from tiny import llama, token_rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"use_dora=True cannot be combined with SaLoRA\. .*set use_dora=False"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' cannot be combined .*choose init='task', 'pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights=False cannot be combined"),
        ({"target_parameters": ["experts.down_proj"]}, "name them in target_modules"),
        ({"lora_bias": True}, "set lora_bias=False"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "replicate the layers in the base model first"),
        ({"alora_invocation_tokens": [1, 2]}, "Leave alora_invocation_tokens at its default"),
        ({"use_qalora": True}, "Leave use_qalora at its default"),
        ({"eva_config": EvaConfig()}, "eva_config=.*cannot be combined"),
        ({"init": "kaiming"}, "init='kaiming': choose one of 'task', 'pissa', 'zero'"),
        ({"variant": "one-sided"}, "variant='one-sided': choose one of 'two-sided', 'paper'"),
        ({"variant": "paper", "input_safety_rank": 4}, "variant='paper' has no input side. Leave it out"),
        ({"variant": "paper", "input_safety_rank_pattern": {"q_proj": 4}}, "has no effect without an input side"),
        ({"safety_positions": "last"}, "safety_positions='last': choose one of"),
        ({"safety_rank": 0}, "safety_rank=0: give a whole number of at least 1"),
        ({"safety_rank": 2.5}, "safety_rank=2.5: give a whole number"),
        ({"input_safety_rank": -1}, "input_safety_rank=-1: give a whole number of at least 0"),
        ({"calibration_max_length": 1}, "calibration_max_length=1: give a whole number of at least 2"),
        ({"task_data": "builtin"}, "task_data='builtin': there is no built-in task data"),
        ({"lora_alpha": 0, "init": "task"}, "lora_alpha=0: init='task' divides by the scaling"),
    ],
)
@pytest.mark.filterwarnings("ignore:`eva_config` specified")
def test_contradicting_options(options, message):
    with pytest.raises(ValueError, match=message):
        SaLoRAConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"bias": "lora_only"}, {"trainable_token_indices": [0, 1]}],
)
def test_weights_outside_the_safety_module_are_warned_about(options):
    with pytest.warns(UserWarning, match=f"{next(iter(options))}=.* trains weights that the safety module does not"):
        SaLoRAConfig(**options)


def test_ordinary_options_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SaLoRAConfig(lora_dropout=0.1, use_rslora=True, target_modules="all-linear", target_parameters=[])


def test_plain_config_keeps_the_scaling_of_every_layer():
    options = {"r": 8, "lora_alpha": 12, "init": "task"}
    config = SaLoRAConfig(**options, rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 5})
    plain = config.to_lora_config()
    assert type(plain) is LoraConfig
    assert (plain.r, plain.lora_alpha) == (16, 24)
    assert (plain.rank_pattern, plain.alpha_pattern) == ({"v_proj": 4}, {"k_proj": 10})
    rank_stabilized = SaLoRAConfig(**options, use_rslora=True).to_lora_config()
    assert rank_stabilized.lora_alpha / 16**0.5 == pytest.approx(12 / 8**0.5)
    zero = SaLoRAConfig(**{**options, "init": "zero"}).to_lora_config()
    assert (zero.r, zero.lora_alpha) == (8, 12)


def test_default_start():
    assert SaLoRAConfig().init == SaLoRAConfig(input_safety_rank=4).init == "zero"
    assert SaLoRAConfig(variant="paper").init == SaLoRAConfig(input_safety_rank=0).init == "task"
    assert SaLoRAConfig(task_data=[{"prompt": "a", "response": "b"}]).init == "task"  # it would be ignored
    assert SaLoRAConfig(task_rank=8).init == SaLoRAConfig(num_task_samples=8).init == "task"
    assert SaLoRAConfig(init="pissa").init == "pissa"


@pytest.mark.parametrize("option", [{"task_data": "rows.jsonl"}, {"task_rank": 8}, {"num_task_samples": 8}])
def test_options_of_another_start_are_not_ignored_in_silence(option):
    with pytest.warns(UserWarning, match=f"{next(iter(option))} has no effect with init='zero'"):
        SaLoRAConfig(**option, init="zero", input_safety_rank=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SaLoRAConfig(**option, init="task")


def test_the_tasks_rows_count_for_the_leak_with_any_start():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SaLoRAConfig(task_data="rows.jsonl", init="zero")
    for option in ({"safety_module": "safety.safetensors"}, {"task_rank": 8}):
        with pytest.warns(UserWarning, match="has no effect with init='zero'"):
            SaLoRAConfig(task_data="rows.jsonl", init="zero", **option)


def test_configuration_without_a_model_round_trips(tmp_path):
    config = SaLoRAConfig(
        safety_rank=5, input_safety_rank=3, target_modules=["q_proj"], safety_data="data.jsonl", seed=4
    )
    config.save_pretrained(tmp_path)
    for read in (SaLoRAConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(read) is SaLoRAConfig
        assert read.to_dict() == config.to_dict()


def test_configuration_is_read_in_a_process_that_has_made_none(tmp_path):
    SaLoRAConfig(seed=4).save_pretrained(tmp_path)
    read = "import sys; from salora_plugins import SaLoRAConfig; print(SaLoRAConfig.from_pretrained(sys.argv[1]).seed)"
    result = fresh.run(["-c", read, tmp_path], check=True)
    assert result.stdout.split()[-1] == "4"


def test_paths_are_taken_as_their_names(tmp_path):
    delta = SaLoRAConfig(basis_method="weight-delta", unaligned_model=tmp_path / "unaligned")
    assert delta.unaligned_model == str(tmp_path / "unaligned")
    assert SaLoRAConfig(basis_method="sae", sae=tmp_path).sae == str(tmp_path)
    of_layers = {12: tmp_path / "twelve", "20": "release:twenty"}
    config = SaLoRAConfig(basis_method="sae", sae=of_layers)
    assert config.sae == {"12": str(tmp_path / "twelve"), "20": "release:twenty"}
    assert json.loads(json.dumps(config.to_dict()["sae"], sort_keys=True)) == config.sae
    assert list(of_layers) == [12, "20"]  # the caller's stays as it is


def test_objects_are_not_written(tmp_path):
    config = SaLoRAConfig(safety_data=[{"prompt": "a", "response": "b"}], tokenizer=object())
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["safety_data"] == "<list>" and "tokenizer" not in saved
    for options, message in (
        ({"safety_data": "<list>"}, "safety_data='<list>': a saved configuration .* Give the data again"),
        ({"safety_module": "<SafetyModule>"}, "safety_module='<SafetyModule>': a saved configuration .*, or its file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            get_peft_model(llama(), SaLoRAConfig(target_modules=["q_proj"], **options))


def test_an_adapters_configuration_is_compared_and_made_anew_as_a_configuration():
    config = SaLoRAConfig(target_modules=["q_proj"], safety_rank=4, safety_data=token_rows(8))
    model = get_peft_model(llama(), config)
    own = model.peft_config["default"]
    again = dataclasses.replace(own, r=3)
    assert type(again) is SaLoRAConfig and again.r == 3 and again != own
    assert dataclasses.replace(own, r=own.r) == own
    assert copy.deepcopy(own) == own and type(copy.deepcopy(own)) is type(own)
    model = get_peft_model(llama(), dataclasses.replace(again, safety_data=token_rows(8)))
    assert model.base_model.safety_module() is not None
