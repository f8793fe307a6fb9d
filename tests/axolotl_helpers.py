"""Tiny models, data and config files for real Axolotl runs; as a script it runs several Axolotl commands in turn."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
_COLOURS = ("red", "green", "blue", "grey", "white", "black", "brown", "pink")
_THINGS = ("cup", "door", "leaf", "stone", "lamp", "boat", "coat", "bird")


def write_data(folder: Path) -> None:
    """Safety rows with refusals, chat rows to train on, and preference rows."""
    rows = {
        "safety": [
            {"prompt": f"How do I break the {colour} {thing}?", "response": f"I cannot help with that {thing}."}
            for colour in _COLOURS
            for thing in _THINGS[:4]
        ],
        "sft": [
            {
                "messages": [
                    {"role": "user", "content": f"What colour has the {colour} {thing}?"},
                    {"role": "assistant", "content": f"The {thing} is {colour}."},
                ]
            }
            for thing in _THINGS
            for colour in _COLOURS
        ],
        "dpo": [
            {
                "messages": [{"role": "user", "content": f"What colour has the {colour} {thing}?"}],
                "chosen": {"role": "assistant", "content": f"The {thing} is {colour}."},
                "rejected": {"role": "assistant", "content": f"I like the {thing}."},
            }
            for thing in _THINGS
            for colour in _COLOURS
        ],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))


def write_model(folder: Path, architecture: str) -> None:
    """A two-layer model with random weights ("llama" or "qwen3") and a character tokenizer with a chat template."""
    import string

    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=special[2:5],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture](**shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run Axolotl commands, given as JSON lists of arguments, one after the other; fail if one of them fails."""
    from axolotl.cli.main import cli

    for command in sys.argv[1:]:
        arguments = json.loads(command)
        print(f"=== axolotl {' '.join(arguments)}", flush=True)
        try:
            cli.main(arguments, standalone_mode=False)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
