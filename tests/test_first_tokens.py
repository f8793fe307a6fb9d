"""Refusal margins and the KL divergence at the first answer tokens, against computations by hand."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import tiny
from salora_plugins.demo.experiment import known_requests, load_demo_model
from salora_plugins.evaluation import generate_responses
from salora_plugins.evaluation.first_tokens import first_token_kl, first_token_reference, refusal_margins
from salora_plugins.evaluation.judges.keyword import is_refusal
from salora_plugins.evaluation.request_sets import Request, load_requests, requests_digest
from salora_plugins.inference.logits import _cache_name
from salora_plugins.prompts.builtin import builtin_prompts, plain_prompts

REQUESTS = ["How do I bake bread?", "Hi", "Tell me a long story about a small town by the sea, please."]
REFUSING, COMPLYING = ("I can't", "No", "I am sorry"), ("Sure", "Yes", "Of course", "Sure thing")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def prompt_ids(tokenizer, request: str) -> list[int]:
    text = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text)["input_ids"]


@torch.no_grad()
def log_probability(model, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """One forward pass a token, without padding or cache."""
    total = torch.zeros((), dtype=torch.float64)
    for position, token in enumerate(continuation):
        logits = model(torch.tensor([prompt + continuation[:position]])).logits[0, -1]
        total += logits.log_softmax(-1)[token]
    return total


ARCHITECTURES = {
    "llama": tiny.llama,
    "GPT-2": tiny.gpt2,
    "Gemma 3": tiny.gemma3,
    "Mixtral": tiny.mixtral,
    "Mamba": tiny.mamba,
    "Jamba": tiny.jamba,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_margins_are_the_openings_probabilities(name, tokenizer):
    model = ARCHITECTURES[name]()
    expected = []
    for request in REQUESTS:
        prompt = prompt_ids(tokenizer, request)
        # "Sure thing" is part of "Sure": it is not counted twice.
        sums = [
            torch.stack([log_probability(model, prompt, tokenizer(text)["input_ids"]) for text in texts]).logsumexp(0)
            for texts in (REFUSING, COMPLYING[:3])
        ]
        expected.append((sums[0] - sums[1]).item())
    for batch_size in (1, 2, 8):
        margins = refusal_margins(
            model, tokenizer, REQUESTS, refusing=REFUSING, complying=COMPLYING, batch_size=batch_size
        )
        assert margins.dtype == torch.float64
        assert margins.tolist() == pytest.approx(expected, abs=2e-3)


def test_margins_without_a_cache_are_the_same(tokenizer, monkeypatch):
    model = tiny.llama()
    expected = refusal_margins(model, tokenizer, REQUESTS)
    forward = model.forward

    def without_cache(*args, **kwargs):
        output = forward(*args, **kwargs)
        output[_cache_name(model)] = None
        return output

    monkeypatch.setattr(model, "forward", without_cache)
    assert torch.allclose(refusal_margins(model, tokenizer, REQUESTS), expected, atol=1e-3)


def test_a_model_that_names_no_cache_gets_the_whole_prompt_again(tokenizer):
    class OwnCode(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask, **options):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    model = tiny.llama()
    own = OwnCode(model.config).eval()
    own.load_state_dict(model.state_dict())
    expected = refusal_margins(model, tokenizer, REQUESTS)
    assert torch.allclose(refusal_margins(own, tokenizer, REQUESTS), expected, atol=1e-3)


def test_a_uniform_model_has_the_margin_of_its_openings_number(tokenizer):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    margins = refusal_margins(model, tokenizer, REQUESTS, refusing=("a", "b", "c"), complying=("d",))
    assert margins.tolist() == pytest.approx([torch.tensor(3.0).log().item()] * 3, abs=1e-5)


def test_openings_that_cannot_be_told_apart(tokenizer):
    with pytest.raises(ValueError, match="share an opening: 'Yes'"):
        refusal_margins(tiny.llama(), tokenizer, REQUESTS, refusing=("Yes", "No"), complying=("Yes",))
    with pytest.raises(ValueError, match="at least one opening"):
        refusal_margins(tiny.llama(), tokenizer, REQUESTS, refusing=())


def test_kl_is_the_mean_over_the_base_models_answer(tokenizer):
    base, tuned = tiny.llama(), tiny.llama(seed=1)
    for batch_size in (1, 8):
        reference = first_token_reference(base, tokenizer, REQUESTS, num_tokens=3, batch_size=batch_size)
        values = first_token_kl(tuned, reference, batch_size=batch_size)
        for request, answer, value in zip(REQUESTS, reference.answers, values.tolist(), strict=True):
            prompt = prompt_ids(tokenizer, request)
            expected = []
            for position, token in enumerate(answer):
                ids = torch.tensor([prompt + answer[:position]])
                with torch.no_grad():
                    p, q = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (base, tuned))
                assert p.argmax() == token
                expected.append((p.exp() * (p - q)).sum().item())
            assert value == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_kl_of_an_adapter_is_zero_while_it_does_nothing(tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config).train()
    with model.disable_adapter():
        reference = first_token_reference(model, tokenizer, REQUESTS)
    assert model.training
    assert first_token_kl(model, reference).abs().max() < 1e-9
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert (first_token_kl(model, reference) > 1e-3).all()
    with model.disable_adapter():
        assert first_token_kl(model, reference).abs().max() < 1e-9
    with pytest.raises(ValueError, match="vocabulary of 300 tokens"):
        first_token_kl(tiny.llama(vocab_size=300), reference)


def test_margins_tell_what_an_aligned_model_refuses():
    model, tokenizer = load_demo_model()
    requests = [row["prompt"] for rows in known_requests("evaluation").values() for row in rows[::4]]
    answers = generate_responses(model, tokenizer, requests, max_new_tokens=24, batch_size=64, progress=False)
    refused = torch.tensor([is_refusal(answer) for answer in answers])
    margins = refusal_margins(model, tokenizer, requests)
    assert 0.2 < refused.float().mean() < 0.9
    # The share of pairs of a refused and an answered request whose margins are in that order.
    assert (margins[refused][:, None] > margins[~refused]).float().mean() > 0.9


def test_requests(tmp_path, caplog):
    (tmp_path / "requests.txt").write_text("One?\n\nTwo?\nOne?\n")
    assert [request.prompt for request in load_requests(tmp_path / "requests.txt", option="harmful")] == [
        "One?",
        "Two?",
    ]
    (tmp_path / "requests.TXT").write_bytes("\ufeffOne?\r\nTwo?\r\n".encode())
    assert [request.prompt for request in load_requests(tmp_path / "requests.TXT", option="harmful")] == [
        "One?",
        "Two?",
    ]
    assert load_requests(["One?", "Two?"], option="harmful") == [Request("One?"), Request("Two?")]
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "category": "sums"},
        {"prompt": "Bad?", "completion": "Yes.", "label": 0},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
    ]
    expected = [Request("Add.\n\n1 and 2", "sums", "3"), Request("Bad?")]
    assert load_requests(rows, option="harmless") == expected
    assert "harmless: 1 rows whose last turn only calls tools are left out" in caplog.text
    (tmp_path / "latin.txt").write_bytes(b"Caf\xe9?\n")
    with pytest.raises(ValueError, match=r"harmful=.*latin\.txt is not UTF-8 text \(byte 3\)"):
        load_requests(tmp_path / "latin.txt", option="harmful")
    (tmp_path / "requests.csv").write_text("prompt,category\nOne?,\nTwo?,x\n")
    assert [request.category for request in load_requests(tmp_path / "requests.csv", option="harmful")] == [None, "x"]
    assert load_requests([{"prompt": "One?", "category": 0}], option="harmful")[0].category == "0"
    rows = [{"prompt": f"{c}{i}?", "category": c} for c in "abc" for i in range(10)]
    chosen = load_requests(rows, option="harmful", num=7, seed=3)
    assert sorted([request.category for request in chosen].count(c) for c in "abc") == [2, 2, 3]
    assert (
        chosen == load_requests(rows, option="harmful", num=7, seed=3) != load_requests(rows, option="harmful", num=7)
    )
    answered = load_requests([{"prompt": "Two and two?", "completion": "Four."}], option="harmless")
    assert (answered[0].prompt, answered[0].response) == ("Two and two?", "Four.")
    builtin = load_requests("builtin", option="harmful")
    assert len(builtin) == len(builtin_prompts("evaluation")) >= 300
    assert {request.prompt for request in builtin}.isdisjoint(plain_prompts(builtin_prompts("calibration")))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    several = load_requests([{"messages": turns}, {"prompt": "One?"}], option="harmful")
    assert several == [Request("user: a\n\nassistant: b\n\nuser: c", messages=tuple(turns)), Request("One?")]
    assert [request.asked for request in several] == [tuple(turns), "One?"]
    assert requests_digest(several[1:]) == requests_digest([Request("One?")]) != requests_digest(several)
    (tmp_path / "more.txt").write_text("Three?\n")
    both = load_requests([tmp_path / "requests.txt", tmp_path / "more.txt"], option="harmful")
    assert [request.prompt for request in both] == ["One?", "Two?", "Three?"]
    tool = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}, turns[0]]
    with pytest.raises(ValueError, match=r"row 1 of harmful: not a request\. Give rows with `prompt`"):
        load_requests([{"messages": tool}], option="harmful")
    with pytest.raises(ValueError, match="no request"):
        load_requests([], option="harmful")
