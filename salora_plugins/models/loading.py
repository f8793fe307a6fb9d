"""Models and tokenizers as the options of a command name them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.files import read_json_object
from ..support.hub import is_model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_PICKLES = "Pickles are not read, as they can run code: save the model as safetensors (save_pretrained does)"
"""What is said of a model that has no weights but pickles, such as pytorch_model.bin."""


@dataclass(frozen=True)
class LoadingOptions:
    """How the weights of a model are loaded; each field's metadata says what it is, as the commands' help does."""

    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights, or 'auto': as they are stored."})
    device_map: str | None = field(
        default=None, metadata={"help": "'auto' splits a large model over GPUs and CPU (see accelerate)."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the weights as QLoRA does (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the weights to 8 bits (bitsandbytes)."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model's hub repository."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the repository's own model code."})

    def check(self) -> None:
        """
        Raises:
            ValueError: There is no such dtype, or the weights are to be quantized in two ways.
        """
        import torch

        if self.dtype != "auto" and not getattr(getattr(torch, self.dtype, None), "is_floating_point", False):
            raise ValueError(
                f"dtype={self.dtype!r}: give 'auto' or a dtype of torch, such as float32, bfloat16 or float16."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set. Choose one of them.")

    def without_revision(self) -> LoadingOptions:
        """The same for a model of another repository."""
        return replace(self, revision=None)


def load_model(source: str, options: LoadingOptions) -> PreTrainedModel:
    """
    The model of a folder or a hub repository, in evaluation mode.

    Raises:
        ValueError: See `LoadingOptions.check`; or the model's weights cannot be read.
        FileNotFoundError: There is no such folder, and it is no name of the hub.
        OSError: There is no such model, or it has no weights in safetensors: pickles are not read.
    """
    options.check()
    source = folder_or_name(source)
    check_whole_model(source)
    from huggingface_hub.constants import is_offline_mode
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "use_safetensors": True,
    }
    if options.device_map is not None:
        arguments["device_map"] = options.device_map
    if options.load_in_4bit:
        import torch

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif options.load_in_8bit:
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **arguments).eval()
    except SafetensorError as error:
        raise ValueError(f"{source}: the model's weights cannot be read, perhaps cut short ({error}).") from error
    except OSError as error:
        if f"file named {SAFE_WEIGHTS_NAME}" not in str(error) or (is_offline_mode() and not os.path.isdir(source)):
            if os.path.isdir(source):
                raise
            raise OSError(f"{source}: there is no such folder (looked in {os.getcwd()}). {error}") from error
        files = f"neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}"
        raise OSError(f"{source} has {files}. {NO_PICKLES}.") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # of a repository, which is not looked into before
        raise ValueError(f"{source} holds an adapter, and a whole model is asked for. Name its base model.")
    return model


def check_whole_model(folder: str) -> None:
    """
    Raises:
        ValueError: The folder holds an adapter, which transformers would load on its base model without a word.
    """
    from peft.utils import CONFIG_NAME

    file = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(file):
        base_model = read_json_object(Path(file)).get("base_model_name_or_path")
        named = f", {base_model}," if base_model else ""
        raise ValueError(
            f"{folder} holds an adapter ({CONFIG_NAME}), and a whole model is asked for. Name its base model{named} or "
            "a folder that it was merged into."
        )


def load_tokenizer(source: str, options: LoadingOptions) -> PreTrainedTokenizerBase | None:
    """None where the model has none; data that needs one says so."""
    try:
        source = folder_or_name(source)
        return find_tokenizer(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError):
        return None


def find_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """
    Args:
        source: Folder or hub repository of a model.
        **options: Of `AutoTokenizer.from_pretrained`.

    Raises:
        OSError, ValueError: It has no tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # Where there are no files of one, Transformers 5.1 makes it of the special tokens of the model's architecture.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{source} has no tokenizer.")
    return tokenizer


def folder_or_name(source: str) -> str:
    """
    What `from_pretrained` is to be given: a folder, its ~ expanded, or the name of a hub repository.

    Raises:
        FileNotFoundError: It is neither.
    """
    folder = os.path.expanduser(source)
    if os.path.isfile(folder):
        raise FileNotFoundError(f"{source} is a file. Name the folder of the model.")
    if not os.path.isdir(folder) and not is_model_name(source):
        raise FileNotFoundError(
            f"{source}: there is no such folder, and it is not the name of a hub repository. Check the path."
        )
    return folder
