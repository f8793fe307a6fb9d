"""The base model in 4 or 8 bits: Axolotl quantizes for its own adapters, and has to be asked for SaLoRA's."""

from __future__ import annotations

from typing import Any

from axolotl.loaders import ModelLoader
from axolotl.loaders.utils import load_model_config  # private: one of the attributes of _QuantizationChoice
from axolotl.utils.dict import DictDefault
from torch import nn


class _QuantizationChoice(ModelLoader):
    """
    Axolotl's model loader, up to where it has chosen how to quantize.

    Private part of Axolotl: `_set_quantization_config`, with the three attributes that it reads and writes. It is the
    only place that knows what Axolotl would choose, and it does so for its own adapters only.
    """

    def __init__(self, cfg: DictDefault) -> None:
        self.cfg = DictDefault({**cfg, "adapter": "qlora" if cfg.load_in_4bit else "lora"})
        self.model_config = load_model_config(cfg)
        self.model_kwargs: dict[str, Any] = {}
        self._set_quantization_config()


def fill_in_quantization_config(cfg: DictDefault) -> None:
    """
    Put what Axolotl would choose for `adapter: qlora` (4 bits) or `lora` (8 bits) where the config was reserved.

    The dictionary is changed in place, because the model loader holds it already.

    Args:
        cfg: Axolotl's config, after validation.

    Raises:
        ValueError: Axolotl has switched quantization off for this device.
    """
    reserved = (cfg.overrides_of_model_kwargs or {}).get("quantization_config")
    if reserved is None or reserved:
        return  # not asked for, or given by the user
    choice = _QuantizationChoice(cfg).model_kwargs.get("quantization_config")
    if choice is None:
        raise ValueError(
            f"load_in_4bit, load_in_8bit: Axolotl does not quantize on the device {cfg.device!r}. Remove them, or "
            "train on another device."
        )
    reserved.update(choice.to_dict())


def refuse_nvfp4(model: nn.Module) -> None:
    """
    Raises:
        ValueError: The weights are torchao's NVFP4, for whose training Axolotl prepares its own adapters only.
    """
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "NVFP4Tensor":
            raise ValueError(
                f"base_model: {name} is in NVFP4, which Axolotl trains with adapter: lora only. Set base_model to the "
                "model as it was before its quantization."
            )


def check_quantized(model: nn.Module, cfg: DictDefault) -> None:
    """
    Raises:
        RuntimeError: The model is not quantized as the config asks, and would be trained in full precision.
    """
    for option in ("4bit", "8bit"):
        if cfg[f"load_in_{option}"] and not getattr(model, f"is_loaded_in_{option}", False):
            raise RuntimeError(
                f"load_in_{option}: true, but {type(model).__name__} was loaded without that quantization. Remove the "
                "option to train on the base model as it is."
            )
