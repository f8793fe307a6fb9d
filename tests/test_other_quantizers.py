"""
Layers that PEFT's LoRA dispatches to and SaLoRA refuses: of quantizers that are optional, and of other frameworks.

What is not installed is skipped; all but Transformer Engine can be installed without a GPU:
`pip install gptqmodel hqq aqlm optimum-quanto neural-compressor-pt megatron-core`.
"""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.integrations.eetq import EetqLinear

from tiny import llama, salora_config, token_rows

row = partial(pytest.mark.compatibility, "Weights")
D = 64
config = partial(salora_config, safety_data=token_rows(8))


def gptq(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
    return module.TorchLinear(bits=4, group_size=32, sym=True, desc_act=False, in_features=D, out_features=D)


def awq(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq", exc_type=ImportError)
    return module.AwqTorchLinear(bits=4, group_size=32, sym=False, desc_act=False, in_features=D, out_features=D)


def hqq(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip("hqq.core.quantize", exc_type=ImportError)
    quantization = module.BaseQuantizeConfig(nbits=4, group_size=16)
    return module.HQQLinear(linear, quantization, compute_dtype=torch.float32, device="cpu")


def aqlm(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip("aqlm", exc_type=ImportError)
    return module.QuantizedLinear(
        D, D, in_group_size=8, out_group_size=1, num_codebooks=1, nbits_per_codebook=8, bias=False
    )


def quanto(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip("optimum.quanto", exc_type=ImportError)
    holder = nn.Sequential(linear)
    module.quantize(holder, weights=module.qint8)
    module.freeze(holder)
    return holder[0]


def eetq(linear: nn.Linear) -> nn.Module:
    return EetqLinear(D, D)


def not_initialized(cls: type[nn.Module]) -> nn.Module:
    """Only the class decides; these need an accelerator's calibration, or a process group, to be made properly."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    return layer


def neural_compressor(linear: nn.Linear) -> nn.Module:
    name = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
    return not_initialized(pytest.importorskip(name, exc_type=ImportError).PatchedLinear)


def megatron(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip("megatron.core.tensor_parallel", exc_type=ImportError)
    return not_initialized(module.ColumnParallelLinear)


class StandInForTransformerEngine(nn.Module):
    """As `transformer_engine.pytorch.Linear`: no subclass of `nn.Linear`, but a floating weight and its features."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = D
        self.weight = nn.Parameter(torch.zeros(D, D))


LAYERS = {
    "AQLM (`aqlm`)": aqlm,
    "AWQ (`gptqmodel`)": awq,
    "EETQ (transformers' `EetqLinear`)": eetq,
    "GPTQ (`gptqmodel`)": gptq,
    "HQQ (`hqq`)": hqq,
    "Intel Neural Compressor's FP8": neural_compressor,
    "Megatron's `ColumnParallelLinear`": megatron,
    "quanto (`optimum-quanto`), frozen": quanto,
    "Transformer Engine (a stand-in for its `Linear`)": lambda linear: StandInForTransformerEngine(),
}


@pytest.mark.parametrize("what", [pytest.param(what, marks=row(what)) for what in LAYERS])
def test_layers_that_are_refused(what, refusal):
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = LAYERS[what](attention.q_proj)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' is a \w+") as caught:
        get_peft_model(model, config())
    assert any(advice in str(caught.value) for advice in ("Load the base model in bf16", "Target linear layers"))
    refusal(caught.value)
    assert not hasattr(model.model.layers[1].self_attn.q_proj, "lora_A")  # refused before anything was changed
