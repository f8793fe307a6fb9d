"""Models and tokenizers as the options of a command name them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str,
    dtype: str = "auto",
    device_map: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    The model of a folder or a hub repository, in evaluation mode.

    Raises:
        ValueError: See `check_loading`; or the model's weights cannot be read.
    """
    check_loading(dtype, load_in_4bit, load_in_8bit)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    if load_in_4bit:
        import torch

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options).eval()
    except SafetensorError as error:
        raise ValueError(f"{source}: the model's weights cannot be read, perhaps cut short ({error}).") from error


def check_loading(dtype: str, load_in_4bit: bool, load_in_8bit: bool) -> None:
    """
    Raises:
        ValueError: There is no such dtype, or the weights are to be quantized in two ways.
    """
    import torch

    if dtype != "auto" and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise ValueError(f"dtype={dtype!r}: give 'auto' or a dtype of torch, such as float32, bfloat16 or float16.")
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both set. Choose one of them.")


def load_tokenizer(
    source: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """None where the model has none; data that needs one says so."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
