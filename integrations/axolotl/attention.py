"""A base model whose attention Axolotl has rewritten for its fused LoRA kernels, before there is an adapter."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault
    from torch import nn


def attach_plain_projections(model: nn.Module, cfg: DictDefault) -> None:
    """
    Let the model run before Axolotl has attached its fused kernels.

    Axolotl has rewritten the attention to call `apply_qkv` and `apply_o`, but sets them only once there is an adapter;
    calibration comes before. These are the stand-ins that Axolotl itself uses for layers without a kernel.
    """
    # Private parts of Axolotl: the class whose methods it has rewritten, and what it calls where there is no kernel.
    from axolotl.monkeypatch.lora_kernels import (
        get_attention_cls_from_config,
        original_apply_o,
        original_apply_qkv_optional_v,
    )

    attention = get_attention_cls_from_config(cfg)
    for module in model.modules():
        if isinstance(module, attention):
            module.apply_qkv = MethodType(original_apply_qkv_optional_v, module)
            module.apply_o = MethodType(original_apply_o, module)
