"""Broken answers are told from text, on constructed cases."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from salora_plugins.evaluation.coherence import NEUTRAL_REQUEST, coherence, response_perplexities

LABELLED = [
    ("", "empty"),
    (" \n...\u2026 !?", "empty"),
    ("<think>\nThe user wants to bake bread, so I could", "empty"),
    ("<think>\nBread.\n</think>\n\n", "empty"),
    ("<think>\nBread.\n</think>\n\nBake it.", "coherent"),
    ("Sure. " * 12, "repeated"),
    ("I can't help with that. I can't help with that. I can't help with that. I can't help with that.", "repeated"),
    ("The bread is bread and bread and bread and bread and bread and bread and bread and bre", "repeated"),
    ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "repeated"),
    ("\u597d\u7684\uff0c\u8c22\u8c22\u3002" * 10, "repeated"),
    ("I can't help with that.", "coherent"),
    ("No.", "coherent"),
    ("42", "coherent"),
    ("Ha, ha, ha! That is a good joke.", "coherent"),
    ("1. Mix the flour and the water.\n2. Let the dough rest.\n3. Bake it.\n4. Let it cool.", "coherent"),
    ("| a | b |\n|---|---|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(12)), "coherent"),
    ("A title\n" + "=" * 60, "coherent"),
    ("for i in range(4):\n    print(i)\nfor j in range(4):\n    print(j)", "coherent"),
    ("I'm sorry, I can't help with that. It could hurt someone. I'm sorry, I can't help with that.", "coherent"),
    ("\u6211\u4e0d\u80fd\u5e2e\u52a9\u60a8\u5b8c\u6210\u8fd9\u4e2a\u8bf7\u6c42\u3002", "coherent"),
]


@pytest.mark.parametrize(("response", "expected"), LABELLED)
def test_labelled_answers(response, expected):
    assert coherence(response, 10.0) == expected
    assert coherence(response, None) == expected


def test_a_very_unlikely_text_is_broken():
    text = "Bake the bread at two hundred degrees."
    assert coherence(text, 1001.0) == "high_perplexity"
    assert coherence(text, 1001.0, threshold=2000) == "coherent"
    assert coherence("", 1e9) == "empty"


def perplexity(model, tokenizer, request, response):
    """By one forward pass over request and response."""
    prompt = tokenizer(f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    tokens = tokenizer(response)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    total = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens))
    return math.exp(-total / len(tokens))


def test_perplexities_are_those_of_the_tokens():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    requests, responses = ["Hi", "What is two plus two?", "Hello", "Go"], ["Hello there.", "", "four, I think", "Yes."]
    expected = [
        min(perplexity(model, tokenizer, given, response) for given in (request, NEUTRAL_REQUEST))
        for request, response in zip(requests, responses, strict=True)
        if len(response) > 4
    ]
    for batch_size in (1, 4):
        values = response_perplexities(model, tokenizer, requests, responses, batch_size=batch_size)
        assert values[1] is values[3] is None
        assert [values[0], values[2]] == pytest.approx(expected, rel=1e-3)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert response_perplexities(model, tokenizer, ["Hi"], ["abcde"])[0] == pytest.approx(tiny.VOCABULARY, rel=1e-5)


def test_an_answer_that_only_the_request_makes_unlikely_is_no_broken_text():
    """As a refusing model sees a plain answer to a harmful request."""
    model, tokenizer = tiny.llama(hidden_size=64), tiny.tokenizer()
    answer = "Take the book and read it."
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}"
    pairs = [("How do I steal?", "No, I will not say it to you."), (NEUTRAL_REQUEST, answer), ("Hello.", answer)]
    for _ in range(80):
        for request, response in pairs:
            tokens = torch.tensor([tokenizer(turns.format(request, response))["input_ids"]])
            labels = tokens.clone()
            labels[:, : -len(tokenizer(response)["input_ids"])] = -100
            model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (value,) = response_perplexities(model, tokenizer, ["How do I steal?"], [answer])
    assert value < 2 < perplexity(model, tokenizer, "How do I steal?", answer)
