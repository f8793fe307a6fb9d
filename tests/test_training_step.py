"""What a training step costs over one with plain LoRA, counted in operations, and that it computes the same."""

import copy
import sys
import threading
import warnings
from collections import Counter

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor

from benchmarks.measuring import python_calls
from certificate import largest_share_inside
from salora_plugins import calibrate
from salora_plugins.parametrization import EffectiveWeight, SafeFactor, trained_factor
from salora_plugins.tuning import basis_stack
from tiny import llama, relative_difference, token_batch, token_rows
from tiny import salora_config as config

LAYERS = 24
FORMS = {"default": {"init": None}, "paper": {"variant": "paper", "init": None}}
forms = pytest.mark.parametrize("form", FORMS)
checkpointing = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
MODULES = {}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def salora(form: str, layers: int = 2, **options) -> PeftModel:
    targets = "all-linear"
    if (form, layers) not in MODULES:
        variant = {key: value for key, value in FORMS[form].items() if key == "variant"}
        data = token_rows(8)
        base = llama(num_hidden_layers=layers)
        MODULES[form, layers] = calibrate(base, safety_data=data, target_modules=targets, safety_rank=4, **variant)
    given = {"safety_rank": 4, "safety_module": MODULES[form, layers], "target_modules": targets, **FORMS[form]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(llama(num_hidden_layers=layers), config(**{**given, "task_rank": 32, **options}))


def operations_of_a_step(model: PeftModel, checkpointing: bool) -> Counter:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokens = token_batch()
    model.train()
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with Operations() as operations:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return operations.counts


LORA = {}


@forms
@checkpointing
def test_operations_of_a_step(form, checkpointing):
    if checkpointing not in LORA:
        lora = get_peft_model(llama(num_hidden_layers=LAYERS), LoraConfig(r=4, target_modules="all-linear"))
        LORA[checkpointing] = operations_of_a_step(lora, checkpointing)
    expected = LORA[checkpointing]
    counts = operations_of_a_step(salora(form, LAYERS), checkpointing)
    assert counts.total() <= 1.02 * expected.total(), (counts - expected).most_common(12)


def calls_of_a_step(model: PeftModel) -> int:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)
    tokens = token_batch()
    model.train()

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return python_calls(step)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="each comprehension is a call of its own there")
@forms
def test_what_python_calls_in_a_step(form):
    """A weight that was computed with the others is read without the modules of torch's parametrization."""
    lora = get_peft_model(llama(num_hidden_layers=LAYERS), LoraConfig(r=4, target_modules="all-linear"))
    assert calls_of_a_step(salora(form, LAYERS)) <= 1.15 * calls_of_a_step(lora)


def each_alone(model: PeftModel) -> PeftModel:
    """Let every layer compute its own weights, as outside of a forward pass."""
    for module in model.modules():
        if isinstance(module, SafeFactor):
            module.batch = None
    return model


def losses_of(model: PeftModel, optimizer: str, steps: int = 20, precision=torch.float32) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "AdamW":
        optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    losses = []
    model.train()
    for _ in range(steps):
        for part in range(2):
            tokens = token_batch(seed=part)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != torch.float32):
                loss = model(input_ids=tokens, labels=tokens).loss / 2
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("init", ["task", "pissa", "zero"])
def test_training_is_the_same_as_with_every_weight_alone(init, optimizer):
    form = "paper" if init == "task" else "default"
    together = losses_of(salora(form, init=init), optimizer)
    alone = losses_of(each_alone(salora(form, init=init)), optimizer)
    assert ((together - alone).abs() / alone).max() <= 1e-6
    assert together[-1] < together[0]


def of_bitsandbytes(parameters: list) -> torch.optim.Optimizer:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if Version(bitsandbytes.__version__) < Version("0.50"):
        pytest.skip("its optimizers need a GPU before 0.50")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=0)


def of_transformers(parameters: list) -> torch.optim.Optimizer:
    return Adafactor(parameters, lr=1e-2, scale_parameter=False, relative_step=False)


# The first two are not counted as writes by torch.
OPTIMIZERS = {
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "8-bit AdamW of bitsandbytes": of_bitsandbytes,
    "Adafactor of transformers": of_transformers,
}


def trained_by(optimizer: str, model: PeftModel) -> tuple[PeftModel, PeftModel]:
    """After steps with scaled losses and clipped gradients: the model, and a moving average of it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    made, scaler = OPTIMIZERS[optimizer](trained), torch.amp.GradScaler("cpu", init_scale=1024.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    model.train()
    for step in range(6):
        tokens = token_batch(seed=step % 2)
        scaler.scale(model(input_ids=tokens, labels=tokens).loss).backward()
        scaler.unscale_(made)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(made)
        scaler.update()
        made.zero_grad()
        average.update_parameters(model)
    return model.eval(), average.module.eval()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_whatever_optimizer_takes_the_steps(init, optimizer, tmp_path):
    """The same as with every weight alone, and outside; what is saved is what was trained, averaged or merged."""
    tokens = token_batch()
    base = llama()(input_ids=tokens).logits
    alone, _ = trained_by(optimizer, each_alone(salora("default", init=init)))
    for kind, model in zip(("trained", "average"), trained_by(optimizer, salora("default", init=init)), strict=True):
        logits = model(input_ids=tokens).logits
        assert relative_difference(logits, base) > 0.05
        if kind == "trained":  # an 8-bit state makes more of a rounding
            assert relative_difference(logits, alone(input_ids=tokens).logits) <= 1e-3
        model.save_pretrained(tmp_path / kind)
        assert largest_share_inside(tmp_path / kind) <= 1e-5
        saved = PeftModel.from_pretrained(llama(), tmp_path / kind)
        assert relative_difference(saved(input_ids=tokens).logits, logits) <= 1e-5
        assert relative_difference(model.merge_and_unload()(input_ids=tokens).logits, logits) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True, None])
def test_recomputed_layers_take_the_weights_of_the_forward_pass(reentrant):
    def gradients(model, checkpointing):
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.train()
        first, second = token_batch(seed=1), token_batch(seed=2)
        loss = model(input_ids=first, labels=first).loss + model(input_ids=second, labels=second).loss
        with torch.no_grad():  # such as that of a reference
            model(input_ids=first)
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    found = gradients(salora("default", init="pissa"), reentrant)
    expected = gradients(each_alone(salora("default", init="pissa")), None)
    for gradient, other in zip(found, expected, strict=True):
        assert relative_difference(gradient, other) <= 1e-5


def test_recomputed_layers_take_no_weights_of_an_earlier_pass():
    """
    Reentrant checkpointing behind a pass with gradients that had none, as that of a refusal anchor, and an optimizer
    whose writes torch does not count.
    """

    def trained(model):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        tokens, losses = token_batch(), []
        model.eval()(input_ids=tokens)  # layers are checkpointed in training only
        model.train()
        for _ in range(4):
            losses.append(model(input_ids=tokens, labels=tokens).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses).detach()

    found, expected = trained(salora("default", init="pissa")), trained(each_alone(salora("default", init="pissa")))
    assert relative_difference(found, expected) <= 1e-5


def test_threads_leave_one_another_alone():
    """A pass that another thread begins and ends in the middle of one."""
    model, tokens = salora("default", init="pissa").eval(), token_batch()
    expected = model(input_ids=tokens).logits.detach()
    layer = model.base_model.model.model.layers[1]
    found = []

    def weight_type() -> type:
        return type(layer.self_attn.q_proj.lora_A["default"].weight)

    def other_pass() -> None:
        with torch.no_grad():
            found.append(model(input_ids=tokens).logits)

    def in_the_middle(*_) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other_pass)
            thread.start()
            thread.join()
            found.append(weight_type())

    layer.register_forward_pre_hook(in_the_middle)
    logits = model(input_ids=tokens).logits
    assert relative_difference(logits, expected) <= 1e-6 and logits.requires_grad
    of_other, inside = found
    assert relative_difference(of_other, expected) <= 1e-6
    assert inside is torch.Tensor  # computed with the others still
    assert weight_type() is EffectiveWeight


def test_a_layer_that_is_not_used_gets_no_gradient():
    model = salora("default").train()
    layer = model.base_model.model.model.layers[1]
    layer.forward = lambda hidden, *args, **kwargs: hidden
    tokens = token_batch()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad is None) == (".layers.1." in name), name


def test_what_changes_within_a_forward_pass_is_heeded():
    """Also where it fails, or a factor is written to."""
    model = salora("default", init="pissa").train()
    tokens = token_batch()
    linear = model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"]
    seen = []

    def write(module, args):
        with torch.no_grad():
            trained_factor(linear).add_(1)
        seen.append(linear.weight)
        assert type(linear.weight) is torch.Tensor

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(write)
    model(input_ids=tokens)
    handle.remove()
    assert torch.allclose(seen[0], linear.weight, atol=1e-6)
    assert isinstance(linear.weight, EffectiveWeight)

    def zero(*_):
        linear.weight.zero_()

    with torch.no_grad():
        handle = model.base_model.model.model.layers[1].register_forward_pre_hook(zero)
        with pytest.raises(RuntimeError, match="written to in place within a forward pass"):
            model(input_ids=tokens)
    handle.remove()
    handle = model.base_model.model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=tokens)
    handle.remove()
    assert isinstance(linear.weight, EffectiveWeight)
    handle = model.base_model.model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens)
    handle.remove()
    expected = model(input_ids=tokens).logits
    linear.parametrizations.weight.original.data.add_(1)  # as some optimizers do: not counted as a write
    assert relative_difference(model(input_ids=tokens).logits, expected) > 1e-2
    assert isinstance(linear.weight, EffectiveWeight)
    copied = copy.deepcopy(model)
    assert losses_of(copied, "AdamW", steps=2)[-1] != losses_of(model, "SGD", steps=2)[-1]
    own = [module for module in copied.modules() if isinstance(module, SafeFactor)]
    assert all(list(module.batch.factors())[module.index] is module for module in own)
    assert {id(module.batch) for module in own} == {id(own[0].batch)} and own[0].batch.scope.batches == {
        "default": own[0].batch
    }


def interrupt(*_):
    raise KeyboardInterrupt


def test_bases_are_in_memory_once():
    """Those of the layers that share one, of twins, and those that are stacked to be projected with together."""
    model = salora("default")
    model.add_adapter("twin", model.peft_config["default"])
    factors = [module for module in model.modules() if isinstance(module, SafeFactor)]
    expected = sum({factor.basis.data_ptr(): factor.basis.nbytes for factor in factors}.values())
    before = [factor.basis.clone() for factor in factors]
    model.train()
    for _ in range(2):
        model(input_ids=token_batch(), labels=token_batch()).loss.backward()
        storages = {factor.basis.untyped_storage()._cdata: factor.basis.untyped_storage() for factor in factors}
        assert sum(storage.nbytes() for storage in storages.values()) == expected
        assert len(storages) < 10
    assert all(torch.equal(factor.basis, basis) for factor, basis in zip(factors, before, strict=True))
    model.set_adapter("twin")
    model(input_ids=token_batch())
    storages = {factor.basis.untyped_storage()._cdata: factor.basis.untyped_storage() for factor in factors}
    assert sum(storage.nbytes() for storage in storages.values()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_bases_are_on_a_gpu_only_while_they_are_used(checkpointing, monkeypatch):
    """The same training, bit for bit, as with bases that stay there; evaluation between steps, moving the model."""
    losses = []
    for streams in (True, False):
        if not streams:
            monkeypatch.setattr(basis_stack, "_page_locked", lambda count, like: None)
        model = salora("default").cuda()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batch = token_batch().cuda()
        model.train()
        losses.append([])
        for step in range(6):
            loss = model(input_ids=batch, labels=batch).loss
            stacks = [group.stack for group in groups_of(model) if group.stack is not None]
            assert stacks and all(stack.streamed is streams for stack in stacks)
            if streams and step not in (0, 3):  # after a pass without a backward pass they stay
                assert not any(stack.is_there for stack in stacks)
            loss.backward()
            assert not streams or all(stack.is_there for stack in stacks)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
            if step == 2:
                model(input_ids=batch)
                with torch.no_grad():
                    model(input_ids=batch)
            if step == 4:
                model.cpu().cuda()
        merged = copy.deepcopy(model).merge_and_unload()
        losses[-1].append(merged(input_ids=batch, labels=batch).loss.item())
    assert losses[0] == losses[1]


def groups_of(model):
    return next(module for module in model.modules() if isinstance(module, SafeFactor)).batch._groups


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_and_autocast(dtype):
    for precision in (dtype, torch.float32):
        models = []
        for alone in (False, True):
            model = salora("default", init="pissa")
            if precision == dtype:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)
            models.append(each_alone(model) if alone else model)
        logits = []
        for model in models:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                logits.append(model(token_batch()).logits)
        assert torch.equal(*logits)


@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="torch 2.7 breaks the graph at context managers")
def test_compiled_as_a_whole():
    torch._dynamo.reset()
    model = salora("default", init="zero").eval()
    with torch.no_grad():
        expected = model(token_batch()).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_difference(compiled(token_batch()).logits, expected) <= 1e-5


@forms
def test_the_first_pass_may_be_one_of_inference(form):
    """The bases that it stacks are used in training, too, by reentrant checkpointing as well."""
    model = salora(form)
    with torch.inference_mode():
        model(input_ids=token_batch())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    model(input_ids=token_batch(), labels=token_batch()).loss.backward()
    factors = [trained_factor(m) for m in model.modules() if hasattr(m, "parametrizations")]
    assert factors and any(factor.grad is not None for factor in factors)
