"""What PEFT's LoRA can do, with SaLoRA: weights, models, options and several adapters; or how it is refused."""

import copy
import dataclasses
import pickle
import warnings
from functools import partial
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.peft import MIN_PEFT_VERSION

import tiny
from certificate import largest_share_inside
from salora_plugins import SaLoRAConfig, load_for_training
from salora_plugins.lora_options import COMPATIBLE_LORA_FIELDS
from tiny import llama, relative_difference, salora_config, token_batch, token_rows

weights_row, models_row, options_row, adapters_row = (
    partial(pytest.mark.compatibility, area) for area in ("Weights", "Models", "Options", "Adapters")
)


config = partial(salora_config, safety_data=token_rows(8))


def add(model: nn.Module, options: SaLoRAConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # fan_in_fan_out, and weights outside the safety module, where a test wants them
        return get_peft_model(model, options)


def train(model: nn.Module, labels: torch.Tensor | None = None, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = token_batch()
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens if labels is None else labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def adapted_modules(model: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_modules()
            if name.endswith("lora_A")}  # fmt: skip


def check_from_start_to_merge(build, options: SaLoRAConfig, folder, labels=None) -> PeftModel:
    """Start, training, disabling, certificate, plain PEFT, merging and going on; returns the trained model."""
    tokens = token_batch()
    expected = build()(tokens).logits
    model = add(build(), options)
    assert relative_difference(model(tokens).logits, expected) < 1e-4
    train(model, labels)
    trained = model(tokens).logits
    assert relative_difference(trained, expected) > 1e-3
    model.save_pretrained(folder)
    assert largest_share_inside(folder) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = PeftModel.from_pretrained(build(), folder)
        assert type(reloaded.peft_config["default"]) is LoraConfig
        assert relative_difference(reloaded(tokens).logits, trained) < 1e-5
        assert relative_difference(reloaded.merge_and_unload(safe_merge=True)(tokens).logits, trained) < 1e-5
        continued = load_for_training(build(), folder).eval()
    assert relative_difference(continued(tokens).logits, trained) < 1e-5
    outside = options.modules_to_save or options.bias != "none" or options.trainable_token_indices
    with model.disable_adapter():
        assert outside or torch.equal(model(tokens).logits, expected)
    return model


MODELS = {
    "Mistral": (tiny.mistral, "all-linear"),
    "Gemma 3 (text)": (tiny.gemma3, "all-linear"),
    "Phi-3 (fused `qkv_proj`, `gate_up_proj`)": (tiny.phi3, ["qkv_proj", "gate_up_proj"]),
    "Mixtral, `all-linear`: all but the fused experts": (tiny.mixtral, "all-linear"),
    "Qwen3-MoE, `all-linear`: all but the fused experts": (tiny.qwen3_moe, "all-linear"),
    "Tied embeddings, `all-linear`": (partial(llama, tie_word_embeddings=True), "all-linear"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=models_row(name)) for name in MODELS])
def test_models(name, tmp_path):
    build, targets = MODELS[name]
    model = check_from_start_to_merge(build, config(target_modules=targets), tmp_path)
    names = adapted_modules(model)
    assert names
    assert not any("lm_head" in name or "experts" in name for name in names)


@models_row("Tied embeddings, `lm_head` as a target")
def test_a_tied_head_is_refused(refusal):
    with pytest.raises(ValueError, match="tie_word_embeddings=False") as caught:
        get_peft_model(llama(tie_word_embeddings=True), config(target_modules=["q_proj", "lm_head"]))
    refusal(caught.value)


@models_row("Fused experts by `target_parameters`")
def test_fused_experts_are_refused(refusal):
    with pytest.raises(ValueError, match="target_parameters") as caught:
        config(target_parameters=["experts.gate_up_proj"])
    refusal(caught.value)


CLASSIFIERS = {
    "Sequence classification": ("SEQ_CLS", tiny.sequence_classifier, torch.tensor([0, 1])),
    "Token classification": ("TOKEN_CLS", tiny.token_classifier, tiny.token_batch() % 2),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=models_row(name)) for name in CLASSIFIERS])
def test_classifiers_warn_of_their_head(name, tmp_path):
    task_type, build, labels = CLASSIFIERS[name]
    with pytest.warns(UserWarning, match="modules_to_save.*does not protect"):
        get_peft_model(build(), config(task_type=task_type))
    check_from_start_to_merge(build, config(task_type=task_type), tmp_path, labels)


OPTIONS = {
    '`target_modules="all-linear"`': ({"target_modules": "all-linear"}, 14),
    "`target_modules` as a regular expression": ({"target_modules": r".*layers\.1\..*\.(q|up)_proj"}, 2),
    "`exclude_modules`": ({"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]}, 10),
    "`layers_to_transform`, `layers_pattern`": ({"layers_to_transform": [1], "layers_pattern": "layers"}, 2),
    "`rank_pattern`, `alpha_pattern`": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, 4),
    "`use_rslora`": ({"use_rslora": True}, 4),
    "`use_rslora` with patterns": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        4,
    ),
    "`modules_to_save`": ({"modules_to_save": ["lm_head"]}, 4),
    "`trainable_token_indices`": ({"trainable_token_indices": [5, 6]}, 4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=options_row(name)) for name in OPTIONS])
def test_options(name, tmp_path):
    options, count = OPTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = config(**options)
    assert len(adapted_modules(check_from_start_to_merge(llama, options, tmp_path))) == count


@options_row('`bias="lora_only"`')
def test_bias(tmp_path):
    with pytest.warns(UserWarning, match="bias.*does not protect"):
        options = config(bias="lora_only")
    model = check_from_start_to_merge(tiny.qwen2, options, tmp_path)
    assert any(p.requires_grad and name.endswith("bias") for name, p in model.named_parameters())


@options_row("`lora_dropout`")
def test_dropout(tmp_path):
    """The halves of the update read the same dropped-out input, so that they cancel in training, too."""
    tokens = token_batch()
    expected = llama()(tokens).logits
    options = config(lora_dropout=0.5, init="pissa")
    assert relative_difference(add(llama(), options).train()(tokens).logits, expected) < 1e-4
    model = check_from_start_to_merge(llama, options, tmp_path)
    assert not torch.equal(model.train()(tokens).logits, model(tokens).logits)


REFUSED_OPTIONS = {
    "`use_dora`": {"use_dora": True},
    "`lora_bias`": {"lora_bias": True},
    "`layer_replication`": {"layer_replication": [(0, 2), (1, 2)]},
    '`init_lora_weights="loftq"`': {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    '`init_lora_weights="gaussian"`': {"init_lora_weights": "gaussian"},
    '`init_lora_weights="orthogonal"`': {"init_lora_weights": "orthogonal"},
    '`init_lora_weights="olora"`': {"init_lora_weights": "olora"},
    '`init_lora_weights="pissa"`': {"init_lora_weights": "pissa"},
    "`init_lora_weights=False`": {"init_lora_weights": False},
    "`alora_invocation_tokens` (aLoRA)": {"alora_invocation_tokens": [5]},
    "`use_qalora`": {"use_qalora": True},
    "`megatron_config`": {"megatron_config": {"tensor_model_parallel_size": 1}},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=options_row(name)) for name in REFUSED_OPTIONS])
def test_refused_options(name, refusal):
    if "loftq" in name:
        pytest.importorskip("scipy")  # PEFT asks for it before SaLoRA sees the option
    with pytest.raises(ValueError, match="cannot be combined with SaLoRA") as caught:
        config(**REFUSED_OPTIONS[name])
    refusal(caught.value)


# LoraConfig's fields -> a value away from the default. Of `init_lora_weights` and DoRA there are rows above.
REFUSED_FIELDS = {
    "init_lora_weights": "mica",
    "megatron_config": {"tensor_model_parallel_size": 1},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [5],
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [(0, 2), (1, 2)],
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-3},
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
}
_NEW_ROWS = {
    name: f"`{name}`"
    for name in (
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
    )
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=options_row(_NEW_ROWS[name]) if name in _NEW_ROWS else ()) for name in REFUSED_FIELDS],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of options without the initialization that they belong to
def test_refused_fields(name, refusal):
    if name not in {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip(f"this PEFT has no {name}")
    with pytest.raises(ValueError, match=f"{name}=.* cannot be combined with SaLoRA") as caught:
        config(**{name: REFUSED_FIELDS[name]})
    refusal(caught.value)


@pytest.mark.parametrize(("default", "value"), [(None, {"a": 1}), (False, True), (True, False), (1.0, 0.0)])
def test_an_option_of_a_peft_to_come_is_refused(default, value):
    newer = dataclasses.make_dataclass("Newer", [("new_option", object, default)], bases=(SaLoRAConfig,))
    newer()
    with pytest.raises(ValueError, match=r"new_option=.* cannot be combined with SaLoRA"):
        newer(new_option=value)


def test_every_field_of_lora_is_known_to_work_or_refused():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert not COMPATIBLE_LORA_FIELDS & set(REFUSED_FIELDS)
    cleared_by_peft = {"loftq_config"}  # with a warning of PEFT's, unless init_lora_weights="loftq": refused above
    unknown = fields - COMPATIBLE_LORA_FIELDS - set(REFUSED_FIELDS) - cleared_by_peft
    assert not unknown, "a new field: does it work with SaLoRA?"
    with pytest.warns(UserWarning, match="loftq_config"):
        assert not config(loftq_config={"loftq_bits": 4}).loftq_config


@options_row("`lm_head` in `target_modules`")
def test_head(tmp_path):
    model = check_from_start_to_merge(llama, config(target_modules=["q_proj", "lm_head"]), tmp_path)
    assert "lm_head" in adapted_modules(model)


@options_row("`ensure_weight_tying` with `modules_to_save`")
def test_weight_tying(tmp_path):
    build = partial(llama, tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = config(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = check_from_start_to_merge(build, options, tmp_path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = [module.modules_to_save["default"].weight for module in (embedding, head)]
    assert trained[0] is trained[1]


def _saved(folder, **options) -> torch.Tensor:
    """Train and save an adapter; returns its logits."""
    model = add(llama(), config(**options))
    train(model)
    model.save_pretrained(folder)
    return model(token_batch()).logits


@adapters_row("`hotswap_adapter` of saved adapters")
def test_hotswap(tmp_path):
    first, second = _saved(tmp_path / "first"), _saved(tmp_path / "second", init="pissa", safety_rank=4)
    model = PeftModel.from_pretrained(llama(), tmp_path / "first")
    assert relative_difference(model(token_batch()).logits, first) < 1e-5
    hotswap_adapter(model, str(tmp_path / "second"), "default")
    assert relative_difference(second, first) > 1e-3
    assert relative_difference(model(token_batch()).logits, second) < 1e-5


@adapters_row("`hotswap_adapter` onto an adapter in training")
def test_hotswap_onto_an_adapter_in_training(tmp_path, refusal):
    _saved(tmp_path)
    model = add(llama(), config())
    before = model(token_batch()).logits
    with pytest.raises(ValueError, match="Incompatible PEFT types found: SALORA and LORA") as caught:
        hotswap_adapter(model, str(tmp_path), "default")
    refusal(caught.value)
    assert torch.equal(model(token_batch()).logits, before)


@adapters_row("`disable_adapter`, as a context manager: exactly the base model")
def test_disable_adapter():
    tokens = token_batch()
    expected = llama()(tokens).logits
    model = add(llama(), config())
    train(model)
    trained = model(tokens).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, trained)
    assert not torch.equal(trained, expected)


@adapters_row("`set_adapter`: only the active adapter is computed and trained")
def test_set_adapter():
    model = add(llama(), config())
    train(model)
    first = model(token_batch()).logits
    model.add_adapter("second", config(init="zero"))
    model.set_adapter("second")
    train(model)
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    assert torch.equal(model(token_batch()).logits, first)
    assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)


TARGETS = {
    "`nn.Embedding`": nn.Embedding(8, 8),
    "`nn.Conv1d`": nn.Conv1d(8, 8, 1),
    "`nn.Conv2d`": nn.Conv2d(8, 8, 1),
    "`nn.Conv3d`": nn.Conv3d(8, 8, 1),
    "`nn.MultiheadAttention`": nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=models_row(name)) for name in TARGETS])
def test_refused_layers(name, refusal):
    model = llama()
    model.model.layers[0].extra = TARGETS[name]
    with pytest.raises(ValueError, match="which SaLoRA does not support") as caught:
        get_peft_model(model, config(target_modules=["q_proj", "extra"]))
    refusal(caught.value)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=weights_row("float32")),
        pytest.param(torch.bfloat16, marks=weights_row("bfloat16")),
        pytest.param(torch.float16, marks=weights_row("float16")),
    ],
)
def test_dtypes(dtype, tmp_path):
    """The start is exact in every dtype, since the halves of the update cancel bit by bit."""
    tokens = token_batch()
    expected = llama().to(dtype)(tokens).logits
    model = add(llama().to(dtype), config(init="pissa"))
    assert relative_difference(model(tokens).logits.float(), expected.float()) < 1e-4
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert largest_share_inside(tmp_path) <= 1e-5
    trained = model(tokens).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)
    reloaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert relative_difference(reloaded(tokens).logits.float(), trained.float()) < tolerance
    assert (
        relative_difference(model.merge_and_unload(safe_merge=True)(tokens).logits.float(), trained.float()) < tolerance
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("salora", "lora", marks=adapters_row("LoRA added to a model with SaLoRA, in training")),
        pytest.param("lora", "salora", marks=adapters_row("SaLoRA added to a model with LoRA, in training")),
    ],
)
def test_lora_and_salora_in_training(first, second, refusal):
    options = {"salora": config(), "lora": LoraConfig(r=2, target_modules=["q_proj"])}
    model = get_peft_model(llama(), options[first])
    with pytest.raises(ValueError, match="different peft types") as caught:
        model.add_adapter("second", options[second])
    refusal(caught.value)


@adapters_row("A saved SaLoRA adapter beside LoRA: switching, `add_weighted_adapter`, mixed batches, deleting")
def test_saved_salora_beside_lora(tmp_path):
    tokens = token_batch()
    base = llama()(tokens).logits
    trained = add(llama(), config())
    train(trained)
    trained.save_pretrained(tmp_path)
    ours = trained(tokens).logits
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    plain = model.eval()(tokens).logits
    model.load_adapter(tmp_path, "salora")
    assert torch.equal(model(tokens).logits, plain)
    mixed = model(tokens, adapter_names=["salora", "__base__"]).logits
    assert relative_difference(mixed[:1], ours[:1]) < 1e-5
    assert relative_difference(mixed[1:], base[1:]) < 1e-5
    model.add_weighted_adapter(["salora", "default"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    total = model(tokens).logits
    model.base_model.set_adapter(["salora", "default"])
    assert relative_difference(model(tokens).logits, total) < 1e-5
    model.set_adapter("salora")
    model.delete_adapter("default")
    assert relative_difference(model(tokens).logits, ours) < 1e-5


@adapters_row("Two SaLoRA adapters: switching, both at once, mixed batches, deleting")
def test_two_salora_adapters():
    tokens = token_batch()
    base = llama()(tokens).logits
    model = add(llama(), config())
    train(model)
    first = model(tokens).logits
    model.add_adapter("second", config(init="zero"))
    assert torch.equal(model(tokens).logits, first)
    model.set_adapter("second")
    assert relative_difference(model(tokens).logits, base) < 1e-4
    train(model)
    second = model(tokens).logits
    mixed = model(tokens, adapter_names=["default", "second"]).logits
    assert relative_difference(mixed[:1], first[:1]) < 1e-5
    assert relative_difference(mixed[1:], second[1:]) < 1e-5
    model.base_model.set_adapter(["default", "second"])
    both = model(tokens).logits
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    assert relative_difference(merged(tokens).logits, both) < 1e-5
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(tokens).logits, first)


@weights_row("transformers' FP8 (`FP8Linear`)")
def test_fp8_linear_is_refused(refusal):
    """A linear layer by its class, but its weight means nothing without the scales beside it."""
    model = llama()
    model.model.layers[0].self_attn.q_proj = FP8Linear(64, 64)
    with pytest.raises(ValueError, match="cannot read as numbers") as caught:
        get_peft_model(model, config())
    refusal(caught.value)


@adapters_row("`add_weighted_adapter`")
def test_add_weighted_adapter(refusal):
    model = add(llama(), config())
    with pytest.raises(ValueError, match="cannot combine SaLoRA adapters") as caught:
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    refusal(caught.value)


@adapters_row("`mixed=True` (`PeftMixedModel`)")
def test_mixed_models(refusal):
    with pytest.raises(ValueError) as caught:
        get_peft_model(llama(), config(), mixed=True)
    assert PeftMixedModel.__name__ in str(caught.value)
    refusal(caught.value)


@adapters_row("`merge_adapter(safe_merge=True)`, `unmerge_adapter`")
def test_merge_and_unmerge():
    tokens = token_batch()
    model = add(llama(), config())
    train(model)
    expected = model(tokens).logits
    model.merge_adapter(safe_merge=True)
    assert relative_difference(model(tokens).logits, expected) < 1e-5
    model.unmerge_adapter()
    assert relative_difference(model(tokens).logits, expected) < 1e-5


@adapters_row("`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def test_state_dict():
    tokens = token_batch()
    model = add(llama(), config(init="pissa"))
    other = add(llama(), config(init="pissa"))
    train(model)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert relative_difference(other(tokens).logits, model(tokens).logits) < 1e-5


@adapters_row("`load_adapter(..., low_cpu_mem_usage=True)` of the saved adapter")
def test_loading_with_low_memory(tmp_path):
    tokens = token_batch()
    model = add(llama(), config())
    train(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    reloaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    reloaded.set_adapter("second")
    assert relative_difference(reloaded(tokens).logits, model(tokens).logits) < 1e-5


@adapters_row("`low_cpu_mem_usage=True` of a new adapter")
def test_low_memory_is_refused(refusal):
    with pytest.raises(ValueError, match="low_cpu_mem_usage") as caught:
        get_peft_model(llama(), config(), low_cpu_mem_usage=True)
    refusal(caught.value)


@adapters_row("`inject_adapter_in_model`")
def test_injection():
    tokens = token_batch()
    model = inject_adapter_in_model(config(), llama())
    assert relative_difference(model(tokens).logits, llama()(tokens).logits) < 1e-4
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers adds adapters with PEFT {MIN_PEFT_VERSION} or newer only",
)
@adapters_row("transformers' `model.add_adapter`")
def test_transformers_add_adapter(tmp_path):
    tokens = token_batch()
    model = llama()
    model.add_adapter(config())
    assert relative_difference(model(tokens).logits, llama()(tokens).logits) < 1e-4
    train(model)
    model.save_pretrained(tmp_path)
    assert largest_share_inside(tmp_path) <= 1e-5
    reloaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert relative_difference(reloaded(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers loads adapters with PEFT {MIN_PEFT_VERSION} or newer only",
)
@adapters_row("transformers' `model.load_adapter` with a `SaLoRAConfig`")
def test_transformers_load_adapter(tmp_path, refusal):
    """Without it, the folder is loaded as plain LoRA."""
    model = add(llama(), config())
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_for_training") as caught:
        llama().load_adapter(str(tmp_path), peft_config=SaLoRAConfig.from_pretrained(tmp_path))
    refusal(caught.value)
    other = llama()
    other.load_adapter(str(tmp_path))
    assert relative_difference(other.eval()(token_batch()).logits, model(token_batch()).logits) < 1e-5


@adapters_row("Copies and pickles of the configuration")
def test_configuration_copies():
    options = config()
    add(llama(), options)
    for other in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert other == options
        add(llama(), other)


@adapters_row("`torch.compile`")
def test_compile():
    torch._dynamo.reset()
    eager, model = (add(llama(num_hidden_layers=1), config()) for _ in range(2))
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    assert train(model) == pytest.approx(train(eager), rel=1e-5)


@pytest.mark.parametrize(
    "reentrant",
    [
        pytest.param(flag, marks=adapters_row(f"Gradient checkpointing, `use_reentrant={flag}`"))
        for flag in (False, True)
    ],
)
def test_gradient_checkpointing(reentrant):
    """The first batch sets the task initialization, by a forward pass of its own."""
    plain, model = add(llama(), config()), add(llama(), config())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert train(model) == pytest.approx(train(plain), rel=1e-5)
    assert not model.base_model.waiting_for_task_data
