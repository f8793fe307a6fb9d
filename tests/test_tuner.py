"""What SaLoRA promises of an adapter: same function at the start, exact base, plain LoRA when saved, certificate."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import fresh
from certificate import largest_share_inside
from salora_plugins import SafetyModule, SaLoRAConfig, SaLoRAModel, calibrate, load_adapter, load_for_training
from salora_plugins.calibration import task_bases
from salora_plugins.parametrization import safe_factor, trained_factor
from tiny import (
    ARCHITECTURES,
    llama,
    refusal_rows,
    relative_difference,
    sum_rows,
    token_batch,
    token_rows,
    tokenizer,
)
from tiny import salora_config as config


def train(model: PeftModel, steps: int = 4, learning_rate: float = 1e-2, seed: int = 5) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for step in range(steps):
        tokens = token_batch(seed=seed + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


TITLES = {"llama": "Llama", "qwen2": "Qwen2 (biases)", "qwen3": "Qwen3", "gpt2": "GPT-2 (Conv1D)"}


@pytest.mark.parametrize("init", ["task", "pissa", "zero"])
@pytest.mark.parametrize("input_safety_rank", [0, 8])
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=pytest.mark.compatibility("Models", title)) for name, title in TITLES.items()],
)
def test_adapter_from_start_to_saved_file(architecture, init, input_safety_rank, tmp_path):
    build, targets = ARCHITECTURES[architecture]
    tokens = token_batch()
    expected = build()(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT switches fan_in_fan_out on for Conv1D
        model = get_peft_model(build(), config(init=init, input_safety_rank=input_safety_rank, target_modules=targets))
    assert relative_difference(model(tokens).logits, expected) < 1e-4
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)

    train(model)
    trained = model(tokens).logits
    assert relative_difference(trained, expected) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)

    model.save_pretrained(tmp_path)
    assert largest_share_inside(tmp_path) <= 1e-5
    reloaded = PeftModel.from_pretrained(build(), tmp_path)
    assert type(reloaded.peft_config["default"]) is LoraConfig
    assert relative_difference(reloaded(tokens).logits, trained) < 1e-5
    assert relative_difference(reloaded.merge_and_unload(safe_merge=True)(tokens).logits, trained) < 1e-5
    continued = load_for_training(build(), tmp_path)
    assert relative_difference(continued.eval()(tokens).logits, trained) < 1e-5


def test_layer_computes_the_papers_formula():
    """y = W x + s C B A P x - s C B_0 A_0 P x with dense projectors."""
    model = get_peft_model(llama(), config(init="pissa", input_safety_rank=8, lora_alpha=6))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    start_a, start_b = (trained_factor(linears["default"]).detach().clone() for linears in (layer.lora_A, layer.lora_B))
    train(model)
    a, b = (trained_factor(linears["default"]) for linears in (layer.lora_A, layer.lora_B))
    u, v = safe_factor(layer.lora_B["default"]).basis, safe_factor(layer.lora_A["default"]).basis
    c, p = torch.eye(64) - u @ u.T, torch.eye(64) - v @ v.T
    x = torch.randn(3, 64)
    expected = layer.base_layer(x) + 1.5 * x @ (c @ (b @ a - start_b @ start_a) @ p).T
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_start_factors_reconstruct_the_weight():
    """s B_0 A_0 is the best rank-r part of W, restricted on the output side to U_T for init="task"."""
    base = llama()
    weight = base.model.layers[0].self_attn.v_proj.weight.detach().double()
    rows = token_rows(16, seed=3)
    options = config(init="task", task_data=rows, use_rslora=True)
    basis = task_bases(llama(), options)["model.layers.0.self_attn.v_proj"].double()
    assert basis.device == weight.device  # also where the model was on an accelerator in between
    model = get_peft_model(base, options)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    product = (
        layer.scaling["default"]
        * trained_factor(layer.lora_B["default"]).double()
        @ trained_factor(layer.lora_A["default"]).double()
    )
    u, s, vh = torch.linalg.svd(weight)
    expected = basis @ basis.T @ (u[:, :4] * s[:4]) @ vh[:4]
    assert torch.allclose(product, expected, atol=1e-5)


def test_only_the_two_factors_train():
    model = get_peft_model(llama(), config())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.endswith(".default.parametrizations.weight.original") for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == 4 * 4 * (64 + 64)


def test_first_training_batch_sets_the_task_initialization():
    model = get_peft_model(llama(), config())
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    before = trained_factor(layer.lora_B["default"]).detach().clone()
    tokens = token_batch(batch=1, length=12)
    labels = tokens.clone()
    labels[:, :5] = -100

    model.eval()
    model(input_ids=tokens, labels=labels)
    assert torch.equal(trained_factor(layer.lora_B["default"]), before)

    rows = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: rows.append(output[0, 5:]))
    model.train()
    loss = model(input_ids=tokens, labels=labels).loss
    handle.remove()
    basis = torch.linalg.svd(rows[0].double().T, full_matrices=False).U[:, :7]
    expected = basis @ basis.T @ before.double()
    assert torch.allclose(trained_factor(layer.lora_B["default"]).double(), expected, atol=1e-5)
    assert torch.allclose(loss, llama()(input_ids=tokens, labels=labels).loss, rtol=1e-4)
    loss.backward()

    after = trained_factor(layer.lora_B["default"]).detach().clone()
    model(input_ids=token_batch(seed=9), labels=token_batch(seed=9))
    assert torch.equal(trained_factor(layer.lora_B["default"]), after)
    assert not model.base_model.waiting_for_task_data


def test_initialize_from_task_data_equals_task_data_option():
    rows = token_rows(8, seed=3)
    given = get_peft_model(llama(), config(task_data=rows))
    later = get_peft_model(llama(), config())
    later.base_model.initialize_from_task_data(rows)
    for a, b in zip(given.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="has its start values already"):
        later.base_model.initialize_from_task_data(rows)


def test_the_input_side_by_default(tmp_path):
    model = get_peft_model(llama(), config())
    model.save_pretrained(tmp_path)
    module = SafetyModule.load(tmp_path)
    assert {basis.shape for basis in module.input_bases.values()} == {(64, 16)}  # a quarter of the inputs
    assert module.provenance["safety_positions"] == "prompt"
    shared = {"safety_data": token_rows(16), "target_modules": ["q_proj", "v_proj"], "safety_rank": 8}
    few = config(safety_data=token_rows(1, length=14))
    assert _input_ranks(get_peft_model(llama(), few)) == {8}  # all positions that there are
    # A given module decides where nothing else is asked for.
    given = calibrate(llama(), **shared, input_safety_rank=5)
    assert _input_ranks(get_peft_model(llama(), config(safety_module=given))) == {5}
    assert _input_ranks(get_peft_model(llama(), config(safety_module=given, input_safety_rank=3))) == {3}
    assert _input_ranks(get_peft_model(llama(), config(safety_module=given, input_safety_rank=0))) == {0}
    by_name = config(safety_module=given, input_safety_rank_pattern={"q_proj": 3})
    bases = get_peft_model(llama(), by_name).base_model.safety_module().input_bases
    assert {(name.endswith("q_proj"), basis.shape[1]) for name, basis in bases.items()} == {(True, 3), (False, 5)}
    with pytest.raises(ValueError, match=r"variant=.paper. takes the positions of the response, .* 'prompt' positions"):
        get_peft_model(llama(), config(safety_module=given, variant="paper"))
    of_response = calibrate(llama(), **shared, input_safety_rank=5, safety_positions="response")
    assert _input_ranks(get_peft_model(llama(), config(safety_module=of_response, variant="paper"))) == {0}
    given = calibrate(llama(), **shared, variant="paper")
    with pytest.warns(UserWarning, match="no input side.*or set variant='paper'"):
        assert _input_ranks(get_peft_model(llama(), config(safety_module=given))) == {0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(), config(safety_module=given, variant="paper"))
    with pytest.raises(ValueError, match="input_safety_rank=20, but the safety module has only 16"):
        get_peft_model(llama(), config(safety_module=module, input_safety_rank=20))
    with pytest.raises(ValueError, match="input_safety_rank=3, but the safety module has only 0"):
        get_peft_model(llama(), config(safety_module=given, input_safety_rank=3))


def test_data_beside_a_safety_module_is_not_left_out_without_a_word(tmp_path):
    rows = [json.dumps(row) + "\n" for row in refusal_rows()]
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    own.write_text("".join(rows))
    other.write_text("".join(rows[:4]))
    shared = {"target_modules": ["q_proj"], "safety_rank": 4}
    given = calibrate(llama(), tokenizer(), safety_data=str(own), **shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for options in ({}, {"safety_data": own}, {"num_safety_samples": len(rows)}):
            get_peft_model(llama(), SaLoRAConfig(safety_module=given, **shared, **options))
    for options, message in (
        ({"safety_data": other}, r"safety_data='.*other.jsonl' has no effect .* computed from '.*own.jsonl'"),
        ({"num_safety_samples": 2}, f"num_safety_samples=2 has no effect .* computed from {len(rows)} examples"),
    ):
        with pytest.warns(UserWarning, match=message):
            get_peft_model(llama(), SaLoRAConfig(safety_module=given, **shared, **options))


def test_a_pattern_of_the_calibration_is_no_rank_of_the_training():
    """The default rank of a training is its own, however many directions single modules of the file have."""
    targets = {"target_modules": ["q_proj", "down_proj"], "input_safety_rank": 4}
    given = calibrate(
        llama(), safety_data=token_rows(12), safety_rank_pattern={"down_proj": 40}, calibration_cache=False, **targets
    )
    assert {given.bases[name].shape[1] for name in given.bases if "down_proj" in name} == {40}
    taken = get_peft_model(llama(), SaLoRAConfig(safety_module=given, **targets)).base_model.safety_module()
    assert {basis.shape[1] for basis in taken.bases.values()} == {32}


def _input_ranks(model) -> set[int]:
    return {model.base_model.safety_module("default").input_safety_rank}


def test_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    model = get_peft_model(llama(), config(input_safety_rank=4))
    optimizer = train(model)
    model.save_pretrained(tmp_path)
    resumed = get_peft_model(llama(), config(input_safety_rank=4))
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = load_for_training(llama(), tmp_path)
    tokens = token_batch(seed=20)
    for other in (resumed, loaded):
        state = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
        state.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(3):
            other.train()(input_ids=tokens, labels=tokens).loss.backward()
            state.step()
            state.zero_grad()
    for _ in range(3):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for other in (resumed, loaded):
        assert relative_difference(other.eval()(tokens).logits, model.eval()(tokens).logits) < 1e-5


def test_loading_the_weights_of_another_safety_module_is_refused(tmp_path):
    """Where nothing tells which one it was; from a folder it is taken, as the next test has it."""
    model = get_peft_model(llama(), config())
    train(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(llama(), config(safety_data=token_rows(16, seed=77)))
    with pytest.raises(ValueError, match="trained with another safety module"):
        set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"))
    narrow = get_peft_model(llama(), config(r=2))
    with pytest.raises(ValueError, match="the saved weight has shape"):
        narrow.load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize("options", [{}, {"input_safety_rank": 4}, {"input_safety_rank": 4, "init": "zero"}])
def test_a_resumed_run_takes_the_safety_module_of_its_checkpoint(tmp_path, caplog, options):
    """A trainer resumes with `load_adapter`, after it has calibrated: on another day, or on other data, differently."""
    model = get_peft_model(llama(), config(**options))
    train(model)
    model.save_pretrained(tmp_path / "checkpoint")
    saved = model.base_model.safety_module()
    other = get_peft_model(llama(), config(**options, safety_data=token_rows(16, seed=77)))
    assert not torch.equal(*(next(iter(m.bases.values())) for m in (saved, other.base_model.safety_module())))
    with caplog.at_level("INFO", logger="salora_plugins"):
        other.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert "goes on with the safety module that was saved in" in caplog.text
    tokens = token_batch(seed=20)
    assert relative_difference(other.eval()(tokens).logits, model.eval()(tokens).logits) < 1e-5
    train(other)
    other.save_pretrained(tmp_path / "resumed")
    module = SafetyModule.load(tmp_path / "resumed")
    assert all(torch.equal(module.bases[name], basis) for name, basis in saved.bases.items())
    assert largest_share_inside(tmp_path / "resumed") < 1e-5


def test_another_number_of_directions_in_the_checkpoint_is_said(tmp_path, caplog):
    model = get_peft_model(llama(), config(init="zero"))
    train(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(llama(), config(init="zero", safety_rank=4))
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert "which has other numbers of directions" in caplog.text
    assert other.base_model.safety_module().safety_rank == 8
    train(other)
    other.save_pretrained(tmp_path / "resumed")
    assert load_for_training(llama(), tmp_path / "resumed").base_model.safety_module().safety_rank == 8


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_saved_adapter_is_loaded_beside_one_in_training(tmp_path, is_trainable):
    model = get_peft_model(llama(), config(init="zero"))
    train(model)
    model.save_pretrained(tmp_path)
    other = config(init="zero", safety_data=token_rows(16, seed=77))
    for start in (load_for_training(llama(), tmp_path, adapter_name="policy"), get_peft_model(llama(), other)):
        active = start.active_adapter
        with pytest.raises(ValueError, match=r"salora_plugins\.load_adapter loads a saved SaLoRA adapter"):
            start.load_adapter(tmp_path, "reference")
        load_adapter(start, tmp_path, "reference", is_trainable=is_trainable)
        assert start.active_adapter == active
        trained = {p.requires_grad for name, p in start.named_parameters() if ".reference." in name}
        assert trained == {is_trainable}
        start.set_adapter("reference")
        tokens = token_batch(seed=20)
        assert relative_difference(start.eval()(tokens).logits, model.eval()(tokens).logits) < 1e-5
        bases = start.base_model.safety_module("reference").bases
        assert all(torch.equal(bases[name], basis) for name, basis in model.base_model.safety_module().bases.items())
    with pytest.raises(ValueError, match="has no SaLoRA adapter"):
        load_adapter(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tmp_path, "reference")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 64}, r"trained with the scaling 2, and adapter 'default' has 16.*lora_alpha"),
        ({"use_rslora": True}, r"scaling 2, .* has 4"),
        ({"init": "zero", "r": 8}, r"scaling 2, .* has 1"),  # factors of the same shapes
        ({"target_modules": ["q_proj"]}, r"of 2 layers that adapter 'default' does not have .*v_proj"),
    ],
)
@pytest.mark.filterwarnings("ignore:task_rank")
def test_what_would_be_loaded_as_something_else_is_refused(options, message, tmp_path):
    """As a run that is resumed with other options does."""
    get_peft_model(llama(), config(init="pissa")).save_pretrained(tmp_path)
    model = get_peft_model(llama(), config(**{"init": "pissa", **options}))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_pickle_beside_older_weights_is_refused(tmp_path):
    """PEFT would load the older file, and the safety module's files would certify it."""
    model = get_peft_model(llama(), config(init="zero"))
    model.save_pretrained(tmp_path / "first", safe_serialization=False)
    model.save_pretrained(tmp_path / "first")  # from now on this file is the one that counts
    train(model)
    with pytest.raises(ValueError, match=r"safe_serialization=False: .*beside an older adapter_model\.safetensors"):
        model.save_pretrained(tmp_path / "first", safe_serialization=False)


def test_what_another_peft_would_save_is_noticed(tmp_path, monkeypatch):
    """Stands for a PEFT that no longer calls the tuner's hook: raw factors under keys of their own, or under LoRA's."""
    model = get_peft_model(llama(), config())
    train(model)
    plain = LoraModel._get_adapter_state_dict.__func__

    def renamed(cls, *args, **kwargs):
        state = plain(LoraModel, *args, **kwargs)
        return {key.replace("parametrizations.weight.original", "weight"): value for key, value in state.items()}

    for hook, message in (
        (lambda cls, *args, **kwargs: plain(LoraModel, *args, **kwargs), "has no lora_A.weight of"),
        (renamed, "lies in the safety directions"),
    ):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=message):
            patch.setattr(SaLoRAModel, "_get_adapter_state_dict", classmethod(hook))
            model.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter" / "salora.safetensors").exists()
    model.save_pretrained(tmp_path / "adapter")
    assert largest_share_inside(tmp_path / "adapter") < 1e-5


def test_load_for_training_needs_the_side_files(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no salora_config\.json"):
        load_for_training(llama(), tmp_path)


@pytest.mark.parametrize("argument", ["revision", "subfolder", "is_trainable", "config", "token", "cache_dir"])
def test_arguments_that_load_for_training_would_pass_over(argument):
    with pytest.raises(TypeError, match=rf"{argument}=None: load_for_training does not take it: \w"):
        load_for_training(llama(), "organization/name", **{argument: None})


def test_a_hub_repository_can_be_trained_further(tmp_path, monkeypatch):
    """From the hub's cache on disk, as it is after a download."""
    import huggingface_hub.constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some-team--adapter"
    model = get_peft_model(llama(), config())
    train(model)
    model.save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    tokens = token_batch()
    loaded = load_for_training(llama(), "some-team/adapter").eval()
    assert relative_difference(loaded(tokens).logits, model(tokens).logits) < 1e-5
    with pytest.raises(FileNotFoundError, match="'some-team/other' is neither a file nor a folder here"):
        load_for_training(llama(), "some-team/other")


def test_saved_adapter_loads_where_salora_cannot_be_imported(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    tokens = token_batch()
    torch.save(model(tokens).logits, tmp_path / "logits.pt")
    program = f"""
import sys
assert "salora_plugins" not in sys.modules
sys.modules["salora_plugins"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
expected = torch.load({str(tmp_path / "logits.pt")!r})
logits = model(torch.tensor({tokens.tolist()})).logits
assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
"""
    fresh.run(["-c", program], check=True)
    known = set(LoraConfig().to_dict())
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and set(saved) <= known
    shapes = {tuple(t.shape) for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()}
    assert shapes == {(8, 64), (64, 8), (4, 64), (64, 4)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_certificate_and_the_start(dtype, tmp_path):
    base = llama().to(dtype)
    tokens = token_batch()
    expected = base(tokens).logits
    model = get_peft_model(base, config(init="pissa", input_safety_rank=4))
    # as a trainer does to the trainable weights of a quantized model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    assert relative_difference(model(tokens).logits.float(), expected.float()) < 2e-2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.to(dtype).save_pretrained(tmp_path)
    assert largest_share_inside(tmp_path) <= 1e-5


def test_projection_is_exact_under_autocast():
    model = get_peft_model(llama(), config())
    train(model)
    linear = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = linear.weight
    assert weight.dtype == torch.float32
    assert torch.linalg.norm(safe_factor(linear).basis.T @ weight) < 1e-5 * torch.linalg.norm(weight)


def test_merge_unmerge_and_deepcopy():
    model = get_peft_model(llama(), config())
    train(model)
    tokens = token_batch()
    expected = model(tokens).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, expected)
    model.merge_adapter()
    assert relative_difference(model(tokens).logits, expected) < 1e-5
    model.unmerge_adapter()
    assert relative_difference(model(tokens).logits, expected) < 1e-5


def test_a_copy_of_an_adapter_shares_its_module_and_has_its_weights():
    """
    What DPOTrainer does with a ready PeftModel: a frozen copy as "ref", without a second calibration. The configuration
    that the user has makes another adapter, which starts anew.
    """
    shared = config(task_data=token_rows(8, seed=3))
    model = get_peft_model(llama(), shared)
    train(model)
    model.add_adapter("ref", model.peft_config["default"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for linears in (layer.lora_A, layer.lora_B):
        assert torch.equal(linears["ref"].weight, linears["default"].weight)
        assert safe_factor(linears["ref"]).basis is safe_factor(linears["default"]).basis
    model.add_adapter("second", shared)
    start = get_peft_model(llama(), shared).base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_B["second"].weight, start.lora_B["default"].weight)
    assert not any(p.requires_grad for p in layer.lora_A["ref"].parameters())
    train(model)
    assert not torch.equal(layer.lora_B["ref"].weight, layer.lora_B["default"].weight)


def test_several_adapters_on_one_base(tmp_path):
    tokens = token_batch()
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config(safety_rank=4, r=2, init="zero"))
    train(model)
    first = model(tokens).logits
    model.set_adapter("second")
    assert torch.allclose(model(tokens).logits, llama()(tokens).logits, atol=1e-5)
    train(model)
    second = model(tokens).logits
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, first)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path)
    reloaded.load_adapter(tmp_path / "second", "second")
    assert relative_difference(reloaded(tokens).logits, first) < 1e-5
    reloaded.set_adapter("second")
    assert relative_difference(reloaded(tokens).logits, second) < 1e-5
    reloaded.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="svd", svd_rank=10)
    with pytest.raises(ValueError, match="add_weighted_adapter cannot combine SaLoRA adapters"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    model.delete_adapter("default")
    assert relative_difference(model(tokens).logits, second) < 1e-5


def values_of(config):
    return {name: copy.copy(value) for name, value in vars(config).items() if name != "base_model_name_or_path"}


def test_a_configuration_is_a_value(tmp_path):
    """Several models can be given one; calibration and injection do not write to it (PEFT notes the model's name)."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        llama(seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    options = {"safety_data": refusal_rows(), "target_modules": ["q_proj"], "input_safety_rank": 4}
    shared = config(**options)
    before = values_of(shared)
    models = [get_peft_model(LlamaForCausalLM.from_pretrained(folder), shared) for folder in folders]
    assert values_of(shared) == before
    for model, folder in zip(models, folders, strict=True):
        train(model)
        model.save_pretrained(folder / "adapter")
        own = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config(**options))
        for side in ("bases", "input_bases"):
            saved = getattr(SafetyModule.load(folder / "adapter"), side)
            expected = getattr(own.base_model.safety_module(), side)
            assert all(torch.equal(saved[name], basis) for name, basis in expected.items())
        assert largest_share_inside(folder / "adapter") < 1e-5
        load_for_training(LlamaForCausalLM.from_pretrained(folder), folder / "adapter")


def test_given_safety_module_skips_calibration(tmp_path):
    module = calibrate(llama(), safety_data=token_rows(16), target_modules=["q_proj", "v_proj"], safety_rank=8)
    module.save(tmp_path / "module.safetensors")
    for given in (module, tmp_path / "module.safetensors", str(tmp_path / "module.safetensors")):
        model = get_peft_model(llama(), config(safety_module=given, safety_data="there is no such data"))
        basis = safe_factor(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]).basis
        assert torch.equal(basis, module.bases["model.layers.0.self_attn.q_proj"])


def test_text_data_with_the_models_own_tokenizer(tmp_path):
    llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(base, config(safety_data=refusal_rows(), task_data=sum_rows()))
    assert "tokenizer" not in model.peft_config["default"].to_dict()


def test_configuration_of_a_saved_adapter(tmp_path):
    model = get_peft_model(llama(), config(input_safety_rank=4))
    model.save_pretrained(tmp_path)
    read = SaLoRAConfig.from_pretrained(tmp_path)
    assert (read.r, read.safety_rank, read.input_safety_rank, read.init) == (4, 8, 4, "task")
    assert read.target_modules == {"q_proj", "v_proj"}
    assert SafetyModule.load(tmp_path).provenance["safety_samples"] == 16


def test_unsupported_targets_and_modes_are_refused():
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' is a Embedding, which SaLoRA does not support"):
        get_peft_model(llama(), config(target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ValueError, match="matches no module of LlamaForCausalLM"):
        get_peft_model(llama(), config(target_modules=["query"]))
    with pytest.raises(ValueError, match="low_cpu_mem_usage=True leaves the new factors without values"):
        get_peft_model(llama(), config(), low_cpu_mem_usage=True)
    convolution = nn.Sequential(nn.Conv2d(3, 64, 3))
    with pytest.raises(ValueError, match="'0' is a Conv2d, which SaLoRA does not support"):
        get_peft_model(convolution, config(target_modules=["0"], task_type=None))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_an_earlier_call_has_changed_is_refused_where_that_would_stay():
    """As when a cell of a notebook is run again with the same base model."""
    for earlier in (LoraConfig(target_modules=["o_proj"]), config(target_modules=["q_proj", "v_proj", "o_proj"])):
        base = llama()
        first = get_peft_model(base, earlier)
        with pytest.raises(ValueError, match=r"The model is no base model: .*o_proj' has the adapter of an earlier"):
            get_peft_model(base, config())
        get_peft_model(first.unload(), config())
    base = llama()
    get_peft_model(base, config())
    again = get_peft_model(base, config())  # the new layers take the places of all old ones
    assert again.base_model.safety_module().safety_rank == 8
    with pytest.raises(TypeError, match="takes the base model and then the adapter's folder"):
        load_for_training("outputs", base)


def test_defaults_know_the_target_modules():
    model = get_peft_model(llama(), SaLoRAConfig(safety_data=token_rows(16), safety_rank=8, task_rank=8))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    assert len(model.base_model.targeted_module_names) == 2 * 7
