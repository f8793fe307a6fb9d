"""Refusal rates, intervals and losses against known values; generation leaves the model as it found it."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

import tiny
from salora_plugins.evaluation import generate_responses, generation, refusal_rate, response_loss, wilson_interval
from salora_plugins.evaluation.first_tokens import refusal_margins
from salora_plugins.evaluation.intervals import Mean, Proportion, mcnemar
from salora_plugins.evaluation.metrics import encode_conversation
from salora_plugins.inference.greedy import greedy_answers
from salora_plugins.inference.logits import render_requests
from salora_plugins.rows.reading import load_examples
from salora_plugins.rows.tokenizing import tokenize_examples


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def test_refusal_rate():
    assert refusal_rate(["I can't help with that.", "Sure, here it is.", "I'm sorry, but I won't.", "42"]) == 0.5
    with pytest.raises(ValueError, match="responses is empty"):
        refusal_rate([])


@pytest.mark.parametrize(
    ("successes", "total", "lower", "upper"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(successes, total, lower, upper):
    assert wilson_interval(successes, total) == pytest.approx((lower, upper), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (3, 7), (98, 98), (50, 100)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_bounds_are_where_the_score_test_just_rejects(successes, total, confidence):
    lower, upper = wilson_interval(successes, total, confidence)
    assert 0 <= lower <= successes / total <= upper <= 1
    z = math.sqrt(2) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
    for bound in (lower, upper):
        if 0 < bound < 1:
            score = abs(successes / total - bound) / math.sqrt(bound * (1 - bound) / total)
            assert score == pytest.approx(z, rel=1e-6)
    # Exchanging success and failure mirrors the interval.
    mirrored = wilson_interval(total - successes, total, confidence)
    assert mirrored == pytest.approx((1 - upper, 1 - lower), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0), "total=0"), ((5, 4), "successes=5"), ((-1, 4), "successes=-1"), ((1, 4, 95), "confidence=95")],
)
def test_wilson_interval_names_a_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(*arguments)


def conversation(question: str, answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


ROWS = [
    conversation("What is two plus two?", "Four."),
    conversation("Hi", "Hello there, how are you today?"),
    conversation("Say a long sentence about the weather in spring, please.", "No."),
]


def test_response_loss_is_the_mean_over_response_tokens(tokenizer):
    model = tiny.llama()
    total, count = 0.0, 0
    for row in ROWS:
        # By hand: the probability of each response character (and of the token that ends the turn), one at a time.
        prompt = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt)["input_ids"]
        for token in tokenizer(row["completion"][0]["content"] + "<|im_end|>")["input_ids"]:
            with torch.no_grad():
                probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            total -= math.log(probabilities[token].item())
            count += 1
            ids = [*ids, token]
    for batch_size in (1, 2, 8):
        assert response_loss(model, tokenizer, ROWS, batch_size) == pytest.approx(total / count, rel=1e-4)


def test_response_loss_of_a_uniform_model_is_the_log_of_the_vocabulary_size(tokenizer):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert response_loss(model, tokenizer, ROWS) == pytest.approx(math.log(tiny.VOCABULARY), rel=1e-6)


def test_response_loss_refuses_what_it_cannot_measure(tokenizer):
    model = tiny.llama()
    with pytest.raises(ValueError, match="rows is empty"):
        response_loss(model, tokenizer, [])
    silent = tiny.tokenizer()
    silent.chat_template = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"that asks 'What is two plus two\?': .* cannot be told apart"):
        response_loss(model, silent, ROWS)
    longer = tiny.tokenizer()
    longer.add_tokens(["Four"])
    with pytest.raises(
        ValueError, match=r"row 1 has the token id 259 at position \d+, and the model has embeddings for"
    ):
        response_loss(model, longer, ROWS)
    with pytest.raises(ValueError, match="has the token id 259"):
        generate_responses(model, longer, ["Four?"], progress=False)
    with pytest.raises(ValueError, match=r"the request 'Four\?' has the token id 259"):
        refusal_margins(model, longer, ["Four?"])


OPENS_THINKING = tiny.CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
EMPTY_THINKING = tiny.CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}",
).replace(
    "assistant\n{% endif %}", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, OPENS_THINKING, EMPTY_THINKING, None])
def test_the_response_is_the_same_in_calibration_and_evaluation(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    examples = load_examples(ROWS, option="task_data")
    calibrated = tokenize_examples(examples, tokenizer, max_length=512, option="task_data")
    assert [encode_conversation(tokenizer, row) for row in ROWS] == calibrated
    for row, example in zip(ROWS, calibrated, strict=True):
        response = [label for label in example.labels if label != -100]
        assert tokenizer.decode(response) == row["completion"][0]["content"] + "<|im_end|>"
    assert math.isfinite(response_loss(tiny.llama(), tokenizer, ROWS))


def test_responses_come_in_order_and_do_not_depend_on_the_batch(tokenizer):
    model = tiny.llama()
    prompts = ["Hello", "Tell me a long story about a small town by the sea.", "a", "What is the time?"]
    one_by_one = [
        generate_responses(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1, progress=False)[0]
        for prompt in prompts
    ]
    assert len(set(one_by_one)) > 1
    assert generate_responses(model, tokenizer, prompts, max_new_tokens=8, batch_size=3, progress=False) == one_by_one


def test_a_response_is_the_greedy_continuation(tokenizer):
    model = tiny.llama()
    ids = tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    begin = len(ids)
    for _ in range(6):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()
    assert generate_responses(model, tokenizer, ["Hello"], max_new_tokens=6, progress=False) == [expected]


def test_without_a_chat_template_the_plain_text_is_continued():
    plain = tiny.tokenizer()
    plain.chat_template = None
    model = tiny.llama()
    ids = plain("Hello")["input_ids"]
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].argmax().item()
    expected = plain.decode([first], skip_special_tokens=True).strip()
    assert generate_responses(model, plain, ["Hello"], max_new_tokens=1, progress=False) == [expected]


def test_generation_and_loss_leave_everything_as_it_was():
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "right"
    model = tiny.llama().train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    generate_responses(model, tokenizer, ["Hello", "Good morning!"], max_new_tokens=2, progress=False)
    response_loss(model, tokenizer, ROWS)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert tokenizer.padding_side == "right"
    assert all(parameter.grad is None for parameter in model.parameters())


# What a repository's generation_config.json can hold and `generate` would follow.
SETTINGS = {
    "num_beams": 3,
    "do_sample": True,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 150)),
    "begin_suppress_tokens": list(range(3, 150)),
    "bad_words_ids": [[token] for token in range(3, 150)],
    "sequence_bias": [[[7], 99.0]],
    "forced_bos_token_id": 8,
    "forced_eos_token_id": 8,
    "min_length": 99,
    "min_new_tokens": 12,
    "max_length": 30,
    "max_time": 1e-9,
    "stop_strings": ["a", "e"],
    "guidance_scale": 3.0,
    "exponential_decay_length_penalty": [1, 9.0],
    "return_dict_in_generate": True,
    "output_scores": True,
    "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 2,
    "use_cache": False,
    "cache_implementation": "static",
}


def greedily(model, tokenizer, request, count):
    """By hand, one forward pass a token."""
    ids = tokenizer(f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    begin = len(ids)
    while (len(ids) < begin + count and ids[-1] != tokenizer.eos_token_id) or len(ids) == begin:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[begin:]


@pytest.mark.parametrize("wrapped", [False, True])
def test_greedy_is_greedy_whatever_the_generation_configuration_says(tokenizer, wrapped):
    model = tiny.llama()
    requests = ["Hello", "What is the time?"]
    expected = [greedily(model, tokenizer, request, 10) for request in requests]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrapped else model
    for name, value in SETTINGS.items():
        settings = GenerationConfig(eos_token_id=2, pad_token_id=0)
        setattr(settings, name, value)
        model.generation_config = settings
        kept = settings.to_dict()
        assert generate_responses(outer, tokenizer, requests, max_new_tokens=10, progress=False) == texts, name
        assert model.generation_config is settings and settings.to_dict() == kept, name
    carriers = [module for module in outer.modules() if "generation_config" in vars(module)]
    assert carriers == [model]


def test_an_answer_ends_with_the_first_of_all_end_tokens(tokenizer):
    model = tiny.llama()
    long = greedily(model, tokenizer, "Hello", 10)
    model.generation_config.eos_token_id = [long[4], 2]
    prompt = render_requests(tokenizer, ["Hello"])[0]
    assert greedy_answers(model, tokenizer, [prompt], max_new_tokens=10) == [long[: long.index(long[4]) + 1]]


def test_generation_restores_the_state_after_an_error():
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.pad_token = None
    model = tiny.llama().train()
    settings = model.generation_config
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate_responses(model, tokenizer, ["Hello"], max_new_tokens=-1, progress=False)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_responses(model, tokenizer, ["Hello"], max_new_tokens=2, progress=False)
    handle.remove()
    assert model.generation_config is settings
    assert model.training
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("both", "only_first", "only_second", "neither", "p_value"),
    [
        # Armitage, Berry (1994), Statistical methods in medical research, p. 127: two culture media for sputum.
        (20, 12, 2, 16, 0.0129),
        # By hand: 2 (1 + 8) / 2^8, and twice one half, cut off at 1.
        (1, 1, 7, 12, 0.0703),
        (5, 3, 3, 5, 1.0),
        (8, 0, 0, 2, 1.0),
    ],
)
def test_mcnemar(both, only_first, only_second, neither, p_value):
    first = [True] * both + [True] * only_first + [False] * only_second + [False] * neither
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second, result.pairs) == (only_first, only_second, len(first))
    assert result.p_value == pytest.approx(p_value, abs=5e-5)
    assert mcnemar(second, first).p_value == result.p_value
    with pytest.raises(ValueError, match="first has 1 entries and second 2"):
        mcnemar([True], [True, False])


def test_a_mean_has_the_interval_of_its_standard_error():
    mean = Mean.of([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert mean.value == 2.5
    assert mean.interval == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)
    assert Mean.of([7.0]).interval == (7.0, 7.0)
    assert Proportion(count=0, total=0).rate is None
    assert Proportion(count=81, total=263).interval == wilson_interval(81, 263)


@pytest.mark.parametrize("thinks", [False, True])
def test_answers_begin_where_the_first_tokens_are_measured(monkeypatch, thinks):
    """With the thinking of a reasoning model turned off, as in calibration; else it would be cut off and judged."""
    tokenizer = tiny.tokenizer()
    if thinks:
        tokenizer.chat_template += "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}"
    prompts = []
    monkeypatch.setattr(generation, "continue_prompts", lambda model, tokenizer, ids, **_: prompts.extend(ids))
    generate_responses(None, tokenizer, ["Hi", "Two and two?"])
    assert tokenizer.decode(prompts[0]).endswith("</think>\n\n") == thinks
    assert prompts == render_requests(tokenizer, ["Hi", "Two and two?"])
