"""What the factors keep through state dicts, small updates and writes from outside."""

import copy
import gc
import json
import warnings
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from certificate import largest_share_inside
from salora_plugins import calibrate, load_for_training
from salora_plugins.parametrization import (
    EffectiveWeight,
    SafeFactor,
    has_safe_factor,
    register_safe_factor,
    safe_factor,
    trained_factor,
)
from tiny import llama, relative_difference, token_batch, token_rows
from tiny import salora_config as config

SIDES = {"two-sided": {"input_safety_rank": 8}, "paper": {"variant": "paper"}}
sides = pytest.mark.parametrize("side", SIDES)
inits = pytest.mark.parametrize("init", ["task", "pissa", "zero"])
# A safety module is the same for all tests of a side: they are about the factors.
MODULES = {}


def module_of(side: str, seed: int = 0):
    if (side, seed) not in MODULES:
        options = {"target_modules": ["q_proj", "v_proj"], "safety_rank": 8, **SIDES[side]}
        MODULES[side, seed] = calibrate(llama(), safety_data=token_rows(16, seed=seed), **options)
    return MODULES[side, seed]


def fresh(init: str = "task", side: str = "two-sided", seed: int = 0, **options) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # task_rank has no effect with the other starts
        return get_peft_model(llama(), config(init=init, **SIDES[side], safety_module=module_of(side, seed), **options))


def train(model: nn.Module, steps: int = 2, learning_rate: float = 1e-2, **options) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, **options)
    model.train()
    for step in range(steps):
        tokens = token_batch(seed=5 + step)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def linears(model: nn.Module, adapter: str = "default") -> list[nn.Module]:
    return [
        part[adapter] for layer in model.modules() if hasattr(layer, "lora_A") for part in (layer.lora_A, layer.lora_B)
    ]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(token_batch()).logits


def by_accelerate(model, other, folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer's test before, in bf16
    first, second = Accelerator(cpu=True), Accelerator(cpu=True)
    first.prepare(model)
    first.save_state(str(folder))
    second.prepare(other)
    second.load_state(str(folder))


def by_safetensors(model, other, folder):
    save_model(model, str(folder / "model.safetensors"))
    load_model(other, folder / "model.safetensors")


def by_torch(model, other, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    assert not any(other.load_state_dict(torch.load(folder / "model.pt", weights_only=True)))


def by_assignment(model, other, folder):
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def by_distributed_checkpoint(model, other, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])


def by_peft(model, other, folder):
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))


WAYS = {
    by_torch: "`torch.save(model.state_dict())`, `load_state_dict`",
    by_assignment: "`load_state_dict(..., assign=True)`",
    by_safetensors: "safetensors' `save_model`, `load_model`",
    by_accelerate: "accelerate's `save_state`, `load_state`",
    by_distributed_checkpoint: "`torch.distributed.checkpoint`",
    by_peft: "PEFT's state dict into another model",
}
row = partial(pytest.mark.compatibility, "Adapters")


@pytest.mark.filterwarnings("ignore")
@inits
@pytest.mark.parametrize("way", [pytest.param(way, marks=row(what), id=way.__name__) for way, what in WAYS.items()])
def test_a_loaded_state_computes_the_same_and_goes_on(way, init, tmp_path):
    side = "paper" if init == "task" else "two-sided"
    model = train(fresh(init, side))
    expected = logits(model)
    other = fresh(init, side)
    way(model, other, tmp_path)
    tolerance = 1e-6 if way is by_peft else 0
    assert relative_difference(logits(other), expected) <= tolerance
    assert other.base_model.waiting_for_task_data == []
    tokens = token_batch(seed=30)
    other.train()(input_ids=tokens, labels=tokens)
    assert relative_difference(logits(other), expected) <= tolerance
    assert relative_difference(logits(train(other)), logits(train(model))) <= 1e-5


@sides
@inits
def test_a_state_of_another_safety_module_is_refused(init, side):
    state = train(fresh(init, side)).state_dict()
    with pytest.raises(ValueError, match=r"q_proj\.lora_.*trained with another safety module"):
        fresh(init, side, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="trained with another safety module"):
        get_peft_model_state_dict(fresh(init, side, seed=1), state_dict=state)
    # A cast of the state is no other safety module, and neither is another basis of the same directions.
    other = fresh(init, side)
    for linear in linears(other):
        factor = safe_factor(linear)
        if factor.basis is not None:
            factor.basis = factor.basis @ torch.linalg.qr(torch.randn(factor.basis.shape[1], factor.basis.shape[1])).Q
    other.load_state_dict({key: value.half() for key, value in state.items()})


def test_a_state_without_its_start_is_refused():
    model = train(fresh("pissa"))
    only_parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="without its start factor"):
        fresh("pissa").load_state_dict(only_parameters, strict=False)
    model = train(fresh("zero"))
    only_parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    other = fresh("zero")
    with pytest.warns(UserWarning, match="does not tell which safety module"):
        other.load_state_dict(only_parameters, strict=False)
    assert torch.equal(logits(other), logits(model))


def test_a_state_of_plain_lora_is_refused():
    """With strict=False it would be passed over."""
    plain = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match=r"lora_A.default.weight: the state dict is of a model with plain LoRA"):
        fresh("zero").load_state_dict(plain.state_dict(), strict=False)


def test_the_first_batch_leaves_changed_factors_alone_and_a_state_brings_its_own_answer(caplog):
    waiting = fresh().state_dict()
    model = fresh()
    changed = [torch.randn_like(trained_factor(linear)) for linear in linears(model)]
    with torch.no_grad():
        for linear, value in zip(linears(model), changed, strict=True):
            trained_factor(linear).copy_(value)
    model.train()(input_ids=token_batch(), labels=token_batch())
    assert "changed before the first training batch" in caplog.text
    assert all(torch.equal(trained_factor(lin), value) for lin, value in zip(linears(model), changed, strict=True))
    # Back to a state from before the first batch: it is set then.
    model.load_state_dict(waiting)
    assert model.base_model.waiting_for_task_data == ["default"]
    start = trained_factor(linears(model)[1]).detach().clone()
    copied = copy.deepcopy(model)
    copied.train()(input_ids=token_batch(), labels=token_batch())
    assert not torch.equal(trained_factor(linears(copied)[1]), start)
    assert model.base_model.waiting_for_task_data == ["default"] and not copied.base_model.waiting_for_task_data
    assert torch.equal(trained_factor(linears(model)[1]), start)


def test_training_in_evaluation_mode_is_told(tmp_path, caplog):
    """In which a model is that `from_pretrained` has loaded, and in which no batch sets the start."""
    model = fresh().eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        assert "evaluation mode" not in caplog.text
        model(input_ids=token_batch(), labels=token_batch()).loss.backward()
        optimizer.step()
        if step == 0:
            with pytest.raises(ValueError, match=r"evaluation mode, where model\.train\(\) was forgotten"):
                model.save_pretrained(tmp_path)
    assert "trained in evaluation mode" in caplog.text and "call model.train()" in caplog.text
    model.save_pretrained(tmp_path)
    assert relative_difference(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model)) < 1e-5


def test_averages_in_a_copy_from_before_the_first_batch_are_not_saved(tmp_path):
    """The copy has another start than the parameters that are averaged in it."""
    model = fresh()
    early = AveragedModel(model)
    train(model, 1)
    late = AveragedModel(model)
    for averaged in (early, late):
        averaged.update_parameters(model)
    with pytest.raises(ValueError, match=r"waits for its first training batch.*after the first step"):
        early.module.save_pretrained(tmp_path)
    late.module.save_pretrained(tmp_path)
    assert relative_difference(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model)) < 1e-5


def test_a_whole_model_is_not_pickled(tmp_path):
    with pytest.raises(TypeError, match=r"Save model\.state_dict\(\)"):
        torch.save(fresh(), tmp_path / "model.pt")


@row("`get_peft_model_state_dict` of a compiled model")
@pytest.mark.parametrize("compiled", ["whole", "layers"])
def test_the_adapter_of_a_compiled_model(compiled, tmp_path):
    model = train(fresh())
    expected = get_peft_model_state_dict(model)
    other = fresh()
    wrapped = other
    if compiled == "whole":
        wrapped = torch.compile(other, backend="eager")
        model = torch.compile(model, backend="eager")
    else:
        for which in (model, other):
            layers = which.base_model.model.model.layers
            for i, layer in enumerate(layers):
                layers[i] = torch.compile(layer, backend="eager")
    found = get_peft_model_state_dict(model)
    assert {key: value.sum() for key, value in found.items()} == {key: value.sum() for key, value in expected.items()}
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected.keys()
    result = set_peft_model_state_dict(wrapped, expected)
    assert not result.unexpected_keys
    assert relative_difference(logits(other), logits(model)) <= 1e-6
    assert get_peft_model_state_dict(model, state_dict=model.state_dict()).keys() == found.keys()
    with pytest.raises(ValueError, match=r"no .*original, a factor of adapter 'default'"):
        get_peft_model_state_dict(model, state_dict={f"module.{k}": v for k, v in model.state_dict().items()})


def test_layers_that_share_a_basis_share_it_on_another_device_too():
    module = calibrate(llama(), safety_data=token_rows(8), target_modules=["q_proj", "k_proj"], safety_rank=8)
    model = get_peft_model(llama(), config(init="zero", safety_module=module, target_modules=["q_proj", "k_proj"]))
    attention = model.base_model.model.model.layers[0].self_attn
    factors = [safe_factor(getattr(attention, name).lora_A["default"]) for name in ("q_proj", "k_proj")]
    assert factors[0].basis is factors[1].basis
    elsewhere = torch.device("meta")  # stands for any other
    for factor in factors:
        factor.follow(elsewhere)
    assert factors[0].basis.device == elsewhere and factors[0].basis is factors[1].basis


# Small updates


@sides
@inits
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_the_certificate_of_the_smallest_update(init, side, precision, tmp_path):
    model = fresh(init, side).train()
    if precision == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    tokens = token_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-8, weight_decay=0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    if precision == "bfloat16" and init != "zero":
        # Such a step is lost in the factors' own rounding: the update is none at all.
        for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
            start = value.chunk(2, dim=0)[0] if "lora_A" in name else value.chunk(2, dim=1)[1]
            assert not start.any()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
    assert largest_share_inside(tmp_path) <= 1e-7
    if precision == "float32":  # in memory, too, where it is merged
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                update = layer.get_delta_weight("default").double()
                inside = module_of(side).bases[name].double().T @ update
                assert inside.norm() <= 1e-5 * update.norm()


@inits
def test_the_update_is_exactly_zero_at_the_start(init):
    model = fresh(init)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            assert not layer.get_delta_weight("default").any(), name


@inits
def test_files_of_another_form_are_refused(init, tmp_path):
    model = train(fresh(init))
    model.save_pretrained(tmp_path)
    file = tmp_path / "salora_config.json"
    values = json.loads(file.read_text())
    assert values.pop("form_of_factors") == 2
    file.write_text(json.dumps(values))
    if init == "zero":
        assert relative_difference(logits(load_for_training(llama(), tmp_path)), logits(model)) < 1e-6
        return
    with pytest.raises(ValueError, match="saved in another form"):
        load_for_training(llama(), tmp_path)
    with pytest.raises(ValueError, match="saved in another form"):
        fresh(init).load_adapter(str(tmp_path), "default", is_trainable=True)
    # Without the folder, from the weights themselves.
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in weights.items():
        if "lora_A" in key:
            difference, start = value.chunk(2, dim=0)
            weights[key] = torch.cat([difference + start, start])
        else:
            trained, difference = value.chunk(2, dim=1)
            weights[key] = torch.cat([trained, difference - trained], dim=1)
    with pytest.raises(ValueError, match=r"looks like one that an earlier salora-plugins saved"):
        set_peft_model_state_dict(fresh(init), weights)


# Writes from outside


def projected(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    factor = safe_factor(linear)
    if factor.basis is None:
        return weight
    weight = weight.double()
    basis = factor.basis.double()
    if factor.side == "output":
        return (weight - basis @ (basis.T @ weight)).float()
    return (weight - (weight @ basis) @ basis.T).float()


def assign(linear, value):
    linear.weight = nn.Parameter(value.clone())


def write_to_view(linear, value):
    linear.weight.T[:, :].copy_(value.T)


def write_by_item(linear, value):
    linear.weight[:] = value


def write_data(linear, value):
    linear.weight.data.copy_(value)


def assign_data(linear, value):
    linear.weight.data = value.clone()


def write_out(linear, value):
    torch.add(value, 0, out=linear.weight.detach())


def write_twice(linear, value):
    weight = linear.weight
    weight.zero_()
    weight.add_(value)


def write_all(linear, value):
    torch._foreach_copy_([linear.weight], [value])


WRITES = [assign, write_to_view, write_by_item, write_data, assign_data, write_out, write_twice, write_all]


@inits
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_takes_effect_projected(write, init):
    side = "paper" if init == "pissa" else "two-sided"
    model = train(fresh(init, side))
    for linear in linears(model):
        value = torch.randn(linear.weight.shape)
        before = trained_factor(linear).detach().clone()
        with torch.no_grad():
            write(linear, value)
        assert not torch.equal(trained_factor(linear), before)
        assert torch.allclose(linear.weight, projected(linear, value), atol=1e-5)
        assert trained_factor(linear).requires_grad and has_safe_factor(linear)


@inits
def test_inference_mode(init):
    """A weight is read and written, a layer runs by itself, and an adapter is merged as outside of it."""
    model = train(fresh(init))
    linear = linears(model)[0]
    layer, inputs, expected = (
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj"),
        torch.ones(1, 64),
        logits(model),
    )
    of_layer = layer(inputs)
    with torch.inference_mode():
        assert torch.equal(layer(inputs), of_layer)
        assert linear.weight.norm() > 0
        merged = copy.deepcopy(model).merge_and_unload()
    assert relative_difference(merged(token_batch()).logits, expected) < 1e-5
    value = torch.randn(linear.weight.shape)
    with torch.inference_mode():
        linear.weight.copy_(value)
    assert torch.allclose(linear.weight, projected(linear, value), atol=1e-5)
    train(model)


def test_what_is_written_back_unchanged_changes_nothing():
    model = train(fresh("pissa"))
    before = copy.deepcopy(model.state_dict())
    for linear in linears(model):
        with torch.no_grad():
            linear.weight.data = linear.weight.float()
            linear.weight.mul_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@row("`reset_lora_parameters`, `torch.nn.init` and other writes to `lora_A.weight`")
@inits
def test_reset_lora_parameters(init):
    model = train(fresh(init))
    for layer in model.modules():
        if hasattr(layer, "reset_lora_parameters"):
            layer.reset_lora_parameters("default", True)
    assert torch.allclose(logits(model), llama()(token_batch()).logits, atol=1e-5)
    assert relative_difference(logits(train(model)), llama()(token_batch()).logits) > 1e-3


def test_writes_that_cannot_be_taken_over_are_refused():
    linear = linears(fresh("pissa"))[0]
    with pytest.raises(ValueError, match=r"of shape \(4, 64\) was assigned where"):
        linear.weight = nn.Parameter(torch.zeros(4, 64))
    with pytest.raises(ValueError, match="replaced by one of shape"):
        linear.weight.data = torch.zeros(3, 64)
    with pytest.raises(RuntimeError, match="leaf"):
        linear.weight.requires_grad = False


def test_the_weight_that_is_read_behaves_as_a_tensor(tmp_path):
    linear = linears(train(fresh("pissa")))[0]
    weight = linear.weight
    assert isinstance(weight, EffectiveWeight) and type(weight + 1) is type(weight.clone()) is torch.Tensor
    torch.save(weight.detach(), tmp_path / "weight.pt")
    assert torch.equal(torch.load(tmp_path / "weight.pt", weights_only=True), weight)
    with torch.no_grad():
        assert type(copy.deepcopy(linear.weight)) is torch.Tensor
    gradient = torch.autograd.grad(weight.square().sum(), trained_factor(linear))[0]
    assert gradient.shape == (4, 64) and gradient.any()

    def loss(parameters):
        return torch.func.functional_call(linear, parameters, (torch.ones(1, 64),)).square().sum()

    key = "parametrizations.weight.original"
    assert torch.func.grad(loss)({key: trained_factor(linear).detach()})[key].any()
    # Nothing keeps the graph of a step alive.
    import gc
    import weakref

    gc.disable()
    try:
        reference = weakref.ref(linear.weight)
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore")
def test_combinations_of_saved_adapters(tmp_path):
    """Which of PEFT's combinations stay outside of the safety directions, as the refusal says."""
    for seed in (1, 2):
        train(fresh("zero"), steps=seed + 1).save_pretrained(tmp_path / str(seed))
    shares = {}
    for kind in ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd"):
        model = PeftModel.from_pretrained(llama(), tmp_path / "1", adapter_name="a")
        model.load_adapter(str(tmp_path / "2"), "b")
        density = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type=kind, **density)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        update = layer.get_delta_weight("c").double()
        basis = module_of("two-sided").bases["model.layers.0.self_attn.q_proj"].double()
        shares[kind] = ((basis.T @ update).norm() / update.norm()).item()
    kept = {kind for kind, share in shares.items() if share <= 1e-5}
    assert kept == {"linear", "cat", "svd"} and all(shares[kind] > 1e-2 for kind in shares.keys() - kept)
    model = fresh("zero")
    model.add_adapter("second", config(init="zero", safety_module=module_of("two-sided")))
    with pytest.raises(ValueError, match=r"'linear', 'cat' or 'svd'.*salora project"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")


class TimesTen(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 10 * weight


def test_what_others_put_beside_a_factor_has_its_part():
    """A second parametrization, and a hook: the weight is not handed out past them."""
    model = train(fresh("zero"))
    other = copy.deepcopy(model)
    for layer in other.modules():
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 10
    for linear in linears(model)[1::2]:  # lora_B
        parametrize.register_parametrization(linear, "weight", TimesTen(), unsafe=True)
    assert relative_difference(logits(model), logits(other)) < 1e-5
    calls = []
    for linear in linears(model):
        linear.parametrizations.weight.register_forward_hook(lambda *_: calls.append(1))
    logits(model)
    assert len(calls) >= len(linears(model))

    with pytest.raises(ValueError, match=r"TimesTen, another parametrization.*Take it off"):
        get_peft_model_state_dict(model)


def set_option(option: str, value):
    def change(model: PeftModel) -> None:
        setattr(model.peft_config["default"], option, value)

    return change


def scale_layers(model: PeftModel) -> None:
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_option("lora_alpha", 64), "scaling 2, .* saved with 16. lora_alpha"),
        (set_option("alpha_pattern", {"layers.1.self_attn.v_proj": 4}), "layers.1.self_attn.v_proj: .* saved with 1"),
        (set_option("use_rslora", True), "scaling 2, .* saved with 4"),
        (set_option("r", 2), "has rank 8 .* saved with 4. r, rank_pattern and init"),
        (set_option("init", "zero"), "has rank 8 .* saved with 4"),
        (scale_layers, "scaling 1, .* saved with 2.*put it back"),
    ],
)
def test_what_is_changed_after_the_adapter_was_made_is_not_saved(change, message, tmp_path):
    """The layers compute as before, and the file would say otherwise."""
    model = fresh("pissa")
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_weights_that_were_unfrozen_are_told(tmp_path):
    """Of the model they are trained, and no file of an adapter has them."""
    model = fresh("zero", modules_to_save=["lm_head"], bias="lora_only", trainable_token_indices=[5])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not part of the adapter")
        model.save_pretrained(tmp_path)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 trainable parameters are not part of the adapter .*norm.weight"):
        model.save_pretrained(tmp_path)


def test_a_conversion_of_the_start_is_refused(tmp_path):
    """PEFT's for PiSSA, whose base weights it takes to be changed."""
    model = fresh("pissa")
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion: leave it out"):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))


def test_layers_that_were_replaced_are_not_saved(tmp_path):
    """By wider ones, in which nothing projects."""
    model = fresh("zero")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    with pytest.raises(RuntimeError, match=r"layers were replaced after it was made.*prepare_model_for_compiled"):
        train(model).save_pretrained(tmp_path)


def test_patterns_are_saved_as_they_are_computed(tmp_path):
    """rsLoRA, and patterns of names, of their ends and of regular expressions."""
    options = {"use_rslora": True, "rank_pattern": {r"^model\.layers\.0.*q_proj": 2, "v_proj": 3}}
    model = train(fresh("pissa", **options, alpha_pattern={"layers.1.self_attn.v_proj": 32}))
    model.save_pretrained(tmp_path)
    assert relative_difference(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model)) < 1e-5


def test_a_replica_of_data_parallel_computes_its_weight():
    """As torch.nn.parallel.replicate makes it: its parameters are plain attributes."""
    linear = linears(train(fresh("zero")))[0]
    replica = linear._replicate_for_data_parallel()
    lists = replica._modules["parametrizations"] = replica.parametrizations._replicate_for_data_parallel()
    holder = lists._modules["weight"] = lists.weight._replicate_for_data_parallel()
    holder.original = trained_factor(linear) + 0
    assert not holder._parameters and torch.equal(replica.weight, linear.weight)


@pytest.mark.parametrize("copied", [False, True])
def test_removing_one_layers_parametrization_leaves_the_others(copied):
    """Layers share a class, as a copy always does with its layer, and torch takes the weight's property off it."""
    model, other = train(fresh("zero")), train(fresh("zero", seed=1))
    kept = copy.deepcopy(model) if copied else model
    removed = linears(kept)[::3]
    expected, expected_of_other = logits(model), logits(other)
    for linear in removed:
        parametrize.remove_parametrizations(linear, "weight")
        assert type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    assert all(type(linear) is not nn.Linear for linear in linears(model) if linear not in removed)
    for of, before in ((model, expected), (kept, expected), (other, expected_of_other)):
        assert torch.allclose(logits(of), before, atol=1e-5)
    for of in (model, kept, other):
        train(of)  # what is left goes on computing its weights
        factors = [linear for linear in linears(of) if parametrize.is_parametrized(linear)]
        assert factors and all(has_safe_factor(linear) for linear in factors)
        for linear in factors:
            safe = safe_factor(linear)
            inside = linear.weight @ safe.basis if safe.side == "input" else safe.basis.T @ linear.weight
            assert inside.abs().max() < 1e-5 * linear.weight.abs().max()


def test_layers_of_a_shared_class_keep_their_own_weights_in_torchs_cache():
    model = train(fresh("zero"))
    expected = [linear.weight.clone() for linear in linears(model)]
    with parametrize.cached():
        assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears(model), expected, strict=True))
        train(model)


def test_a_shared_class_keeps_no_layer_alive():
    class Own(nn.Linear):
        """Of which no layer was parametrized before."""

    linear = Own(16, 4, bias=False)
    register_safe_factor(linear, SafeFactor("output", torch.eye(4)[:, :1], None))
    layer = weakref.ref(linear)
    assert not linear.weight[0].any()
    del linear
    gc.collect()
    assert layer() is None


def test_a_class_made_of_a_shared_one_lets_no_parametrization_be_removed_by_half():
    """As `fully_shard` makes one for a layer: torch finds no weight on it, and says so."""
    linear = linears(fresh("zero"))[0]
    linear.__class__ = type("Wrapped", (type(linear),), {})
    with pytest.raises(AttributeError, match="weight"):
        parametrize.remove_parametrizations(linear, "weight")
    assert has_safe_factor(linear)
