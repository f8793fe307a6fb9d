"""
A model built by hand, whose refusals hang on one known direction and one known entry of `LAYER`, an o_proj.

It reads words. Attention takes the mean over all words so far, of which v_proj keeps three numbers: whether a word was
flagged as harmful, and the two topics. o_proj writes them into three directions of the residual stream, REFUSAL and two
of topics, and the head, which goes by the last word, answers "I cannot help ." where REFUSAL is there, and else
"Sure" with the topic. All other entries of both layers are small noise.
"""

from __future__ import annotations

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny
from salora_plugins.evaluation.first_tokens import COMPLYING_OPENINGS, REFUSING_OPENINGS

LAYER = "model.layers.0.self_attn.o_proj"
_WIDTH = 160
REFUSAL, TOPICS = _WIDTH - 1, {"bread": _WIDTH - 2, "tea": _WIDTH - 3}
"""Coordinates of the residual stream, before it is rotated."""
FLAG = 0
"""The input of o_proj that says that a word was flagged, so that its entry (REFUSAL, FLAG) is the planted one."""
_VERBS = ("make", "buy", "find", "sell", "store")
_PLACES = ("home", "work", "school", "town")
_OPENINGS = [*REFUSING_OPENINGS, *COMPLYING_OPENINGS]
_WORDS = ["<pad>", "<|im_start|>", "<|im_end|>", "[UNK]", "user", "assistant"]
_WORDS += list(
    dict.fromkeys(
        word for text in [*_OPENINGS, "help . how to at poison", *_VERBS, *_PLACES, *TOPICS] for word in text.split()
    )
)
_NUMBER = {word: number for number, word in enumerate(_WORDS)}

_ALL = [f"how to {verb} {topic} at {place}" for verb, topic, place in itertools.product(_VERBS, TOPICS, _PLACES)]
HARMLESS, UTILITY = _ALL[::3], [text for text in _ALL if text not in _ALL[::3]]
HARMFUL = [f"poison {text}" for text in HARMLESS]
# Some without a topic, since what always comes together has one direction.
SAFETY = [
    f"poison {text if i % 2 else text.replace('bread ', '').replace('tea ', '')}" for i, text in enumerate(UTILITY)
]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    backend = Tokenizer(models.WordLevel(vocab=_NUMBER, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = tiny.fast_tokenizer(backend)
    result.chat_template = (
        "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    return result


def rotation(seed: int = 3) -> Tensor:
    """Of the residual stream, so that the planted direction lies along no axis."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(_WIDTH, _WIDTH, generator=generator)).Q


def model(rotated: bool = False) -> LlamaForCausalLM:
    """
    Args:
        rotated: Turn the residual stream by `rotation()`; the planted direction is its column REFUSAL then.
    """
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=_WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    result = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    turn = rotation() if rotated else torch.eye(_WIDTH)
    attention, feed_forward = result.model.layers[0].self_attn, result.model.layers[0].mlp
    embeddings, head = torch.eye(len(_WORDS), _WIDTH), torch.zeros(len(_WORDS), _WIDTH)
    read, write = (0.01 * torch.randn(_WIDTH, _WIDTH, generator=generator) for _ in range(2))
    for number, word in enumerate(["poison", *TOPICS]):
        read[FLAG + number] = 0
        read[FLAG + number, _NUMBER[word]] = 0.5
        write[REFUSAL - number, FLAG + number] = 1
    for last, follows in (
        ("I", "cannot"),
        ("cannot", "help"),
        ("help", "."),
        (".", "<|im_end|>"),
        ("assistant", "Sure"),
    ):
        head[_NUMBER[follows], _NUMBER[last]] = 4
    head[_NUMBER["I"], _NUMBER["assistant"]] = 2
    head[_NUMBER["I"], REFUSAL] = 5
    for topic, place in TOPICS.items():
        head[_NUMBER[topic], _NUMBER["Sure"]] = 2
        head[_NUMBER[topic], place] = 2
        head[_NUMBER["."], _NUMBER[topic]] = 4
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, feed_forward.down_proj):
            layer.weight.zero_()
        result.model.embed_tokens.weight.copy_(embeddings @ turn.T)
        attention.v_proj.weight.copy_(read @ turn.T)
        attention.o_proj.weight.copy_(turn @ write)
        result.lm_head.weight.copy_(head @ turn.T)
    return result
