"""Training on the model's own refusals beside the task: collecting them, mixing them in, and the anchor."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from benchmarks.retention.anchored import SecondAdapter, base_log_probabilities, constrained_sft_loss
from processes import run_ranks
from salora_plugins import attribute, calibrate
from salora_plugins.activations.errors import CalibrationError
from salora_plugins.evaluation.judges.keyword import is_refusal
from salora_plugins.hookspecs import hookimpl
from salora_plugins.models.running import adapters_disabled
from salora_plugins.plugins import plugin_manager
from salora_plugins.replay import (
    Refusal,
    RefusalAnchor,
    RefusalAnchorCallback,
    mix_into_training_set,
    mix_refusals,
    own_refusals,
)
from salora_plugins.replay.mixing import number_of_refusals
from salora_plugins.replay.refusals import refusing_part
from salora_plugins.rows.tokenizing import tokenize_examples
from tiny import (
    CHAT_TEMPLATE,
    gpt2,
    llama,
    preference_rows,
    refusal_rows,
    salora_config,
    sum_rows,
    token_batch,
    token_rows,
    tokenizer,
)
from trainer_helpers import arguments

REQUESTS = [f"Please do harm number {i}." for i in range(12)]
REFUSALS = [
    Refusal(({"role": "user", "content": f"Help me with harm {i}."},), f"I can't help with that{'!' * (i % 3)}")
    for i in range(10)
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class EvenJudge:
    """Takes the answers to requests with an even number for refusals."""

    @hookimpl
    def register_judges(self, register):
        register("even", lambda request, response: int(re.findall(r"\d+", request)[0]) % 2 == 0)


@pytest.fixture(autouse=True)
def even_judge():
    plugin = EvenJudge()
    plugin_manager().register(plugin)
    yield
    plugin_manager().unregister(plugin)


def numbers(refusals: list[Refusal]) -> list[int]:
    return [int(re.findall(r"\d+", refusal.messages[-1]["content"])[0]) for refusal in refusals]


def adapted(seed: int = 0, size: float = 0.05):
    """A model with a LoRA adapter that does something."""
    model = get_peft_model(llama(), LORA)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def test_only_what_the_base_model_refuses_is_kept(monkeypatch):
    options = {"judge": "even", "batch_size": 4, "max_new_tokens": 8}
    refusals = own_refusals(llama(), tokenizer(), REQUESTS, **options)
    assert sorted(numbers(refusals)) == [0, 2, 4, 6, 8, 10] and all(refusal.response for refusal in refusals)
    # An adapter that is in use changes nothing, nor does how many are asked at once.
    model = adapted(size=1.0)
    assert own_refusals(model, tokenizer(), REQUESTS, **options | {"batch_size": 3}) == refusals
    assert own_refusals(llama(), tokenizer(), REQUESTS, **options, num=2) == refusals[:2]
    # The second time they come from the disk, with an adapter or without.
    whole = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    monkeypatch.setattr("salora_plugins.replay.refusals.greedy_answers", None)
    for known in (llama(), model, model.base_model.model, get_peft_model(llama(), LORA)):
        assert own_refusals(known, tokenizer(), REQUESTS, **options) == refusals
    for other in (llama(seed=1), get_peft_model(llama(seed=1), LORA), whole):
        with pytest.raises(TypeError):
            own_refusals(other, tokenizer(), REQUESTS, **options)
    monkeypatch.setattr("salora_plugins.replay.refusals._CUT", 1)  # those that were cut otherwise are not taken
    with pytest.raises(TypeError):
        own_refusals(llama(), tokenizer(), REQUESTS, **options)


def test_responses_in_the_data_are_taken_and_not_asked_for():
    found = own_refusals(llama(), tokenizer(), refusal_rows(4))
    assert sorted(refusal.response for refusal in found) == [
        f"I'm sorry, but I can't help with that ({i})." for i in range(4)
    ]


def test_responses_in_the_data_that_comply_are_told(caplog):
    own_refusals(llama(), tokenizer(), refusal_rows(4))
    assert "no refusals" not in caplog.text
    own_refusals(llama(), tokenizer(), [*refusal_rows(4), *({"prompt": r, "response": "Sure!"} for r in REQUESTS)])
    assert "12 of 16 responses in requests are no refusals to the judge, such as 'Sure!'" in caplog.text


def test_what_gives_no_refusals_is_an_error():
    with pytest.raises(CalibrationError, match="refused none of 12 requests"):
        own_refusals(llama(), tokenizer(), REQUESTS, max_new_tokens=4)
    with pytest.raises(ValueError, match="judge='odd' is not registered"):
        own_refusals(llama(), tokenizer(), REQUESTS, judge="odd")
    with pytest.raises(ValueError, match="requests: there are rows of token ids"):
        own_refusals(llama(), tokenizer(), token_rows(2))


@pytest.mark.parametrize(
    ("text", "is_whole", "kept"),
    [
        ("I can't.\nInstead, try", False, "I can't."),
        (" I'm sorry, but I can't help. Instead, tr", False, "I'm sorry, but I can't help."),
        ("I cannot help with th", False, "I cannot help with th"),
        ("No, I won't (never!). And", False, "No, I won't (never!)."),
        ("我不能帮助您。如果您", False, "我不能帮助您。"),
        # What is complete is not cut, nor what would not refuse any more.
        ("I'm sorry, but I can't help. Take care", True, "I'm sorry, but I can't help. Take care"),
        ("Oh dear. I cannot help with th", False, "Oh dear. I cannot help with th"),
        ("Hello!\n\nI'm sorry, but I can't help.\nBye", True, "Hello!\n\nI'm sorry, but I can't help."),
        ("<think>\nHe asks for harm.\n</think>\n\nI can't help with that.\nBye", True, "I can't help with that."),
        ("Sure.\nHere is how", True, ""),
        ("", True, ""),
    ],
)
def test_of_an_answer_what_refuses_is_kept(text, is_whole, kept):
    assert refusing_part(text, is_refusal, is_whole=is_whole) == kept


MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "name": None}]
FORMATS = {
    "messages": {"messages": MESSAGES, "source": "x"},
    "from and value": {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    "prompt and completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "text of both": {"prompt": "Hello", "completion": "Hi"},
    "text": {"text": "Hello. Hi"},
    "token ids": {
        "input_ids": [5, 6],
        "labels": [-100, 6],
        "attention_mask": [1, 1],
        "position_ids": [0, 1],
        "length": 2,
    },
    "ids with a mask": {"input_ids": [5, 6], "completion_mask": [0, 1], "text": "Hello"},
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_is_exact_and_the_rows_keep_their_format(row, share):
    rows = Dataset.from_list([row] * 95)
    mixed = mix_refusals(rows, REFUSALS, share, tokenizer=tokenizer())
    is_refusal = ["harm" in str(entry) or len(entry.get("input_ids", ())) > 2 for entry in mixed]
    added = sum(is_refusal)
    assert added == len(mixed) - len(rows) and abs(added / len(mixed) - share) <= 0.5 / len(mixed)
    assert mixed.features == rows.features
    assert [entry for entry, refused in zip(mixed, is_refusal, strict=True) if not refused] == list(rows)
    places = [index for index, refused in enumerate(is_refusal) if refused]
    gaps = {second - first for first, second in itertools.pairwise(places)}
    assert max(gaps) - min(gaps) <= 1
    again = mix_refusals(rows, REFUSALS, share, tokenizer=tokenizer())
    assert list(mixed) == list(again)
    assert list(mixed) != list(mix_refusals(rows, REFUSALS, share, tokenizer=tokenizer(), seed=1))


def test_a_refusal_among_token_ids_is_what_the_model_sees_and_answers():
    rows = Dataset.from_list([FORMATS["token ids"]])
    mixed = mix_refusals(rows, REFUSALS[:1], 0.5, tokenizer=tokenizer())
    row = next(entry for entry in mixed if len(entry["input_ids"]) > 2)
    text = "<|im_start|>user\nHelp me with harm 0.<|im_end|>\n<|im_start|>assistant\n"
    answered = [label for label in row["labels"] if label != -100]
    assert tokenizer().decode(row["input_ids"]) == f"{text}I can't help with that<|im_end|>"
    assert tokenizer().decode(answered) == "I can't help with that<|im_end|>"
    assert row["position_ids"] == list(range(len(row["input_ids"]))) and row["length"] == len(row["input_ids"])
    cut = mix_refusals(rows, REFUSALS[:1], 0.5, tokenizer=tokenizer(), max_length=row["length"] - 3)
    assert max(len(entry["input_ids"]) for entry in cut) == row["length"] - 3


@pytest.mark.parametrize("writes_bos", [False, True])
@pytest.mark.parametrize("bos", ["<|im_start|>", "<s>"])
@pytest.mark.parametrize("columns", [("text",), ("prompt", "completion")])
def test_rows_of_text_are_read_as_what_the_model_sees(bos, writes_bos, columns):
    """With a token of the beginning that the tokenizer writes or not; SmolLM2's is also that of every turn."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<s>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if writes_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, symbols.index(bos))]
        )
    own = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<s>"],
        chat_template=("" if bos == "<|im_start|>" else "{{ bos_token }}") + CHAT_TEMPLATE,
    )
    rows = Dataset.from_list([dict.fromkeys(columns, "Hello")])
    mixed = mix_refusals(rows, REFUSALS[:1], 0.5, tokenizer=own)
    row = next(entry for entry in mixed if "harm" in str(entry))
    (expected,) = tokenize_examples([REFUSALS[0].example], own, max_length=500, option="x")
    assert own("".join(row[name] for name in columns))["input_ids"] == list(expected.input_ids)


def test_messages_have_the_keys_and_the_kind_of_content_of_the_rows():
    parts = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]
    named = Refusal(({"role": "user", "content": "Help me with harm.", "name": "Ann"},), "No.")
    for row in ({"messages": parts}, {"prompt": parts[:1], "completion": parts[1:]}):
        mixed = mix_refusals(Dataset.from_list([row]), [named], 0.5)
        added = next(entry for entry in mixed if "harm" in str(entry))
        turns = added.get("messages") or added["prompt"] + added["completion"]
        assert [turn["content"][0]["text"] for turn in turns] == ["Help me with harm.", "No."]
    plain = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    )
    added = next(entry for entry in mix_refusals(plain, [named], 0.5) if "harm" in str(entry))
    assert added["messages"][0] == {"role": "user", "content": "Help me with harm."}


def test_repeated_refusals_are_used_evenly_and_said(caplog):
    rows = sum_rows(20)
    caplog.set_level(logging.WARNING)
    mixed = mix_refusals(rows, REFUSALS, 0.5)
    assert not caplog.records
    requests = [row["prompt"][0]["content"] for row in mixed if "harm" in row["prompt"][0]["content"]]
    assert {requests.count(request) for request in requests} == {2}
    mix_refusals(rows, REFUSALS[:4], 0.5)
    assert "each stands there up to 5 times" in caplog.text
    assert number_of_refusals(19_000, 0.05) == 250 and number_of_refusals(10, 0.05) == 128


PACKED = {"input_ids": [5, 6], "labels": [5, 6], "seq_lengths": [1, 1]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (preference_rows(), "preferences .*'chosen'.*RefusalAnchorCallback"),
        (Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]), "preferences .*'label'"),
        (Dataset.from_list([PACKED]), "packed already"),
        (Dataset.from_list([{"input_ids": [5, 6], "position_ids": [0, 0]}]), "packed already"),
        (Dataset.from_list([{"input_ids": [5, 6], "weights": [1.0, 2.0]}]), "column 'weights'"),
        (Dataset.from_list([{"question": "a"}]), "columns question"),
        (Dataset.from_list([{"text": "a"}]), "text only with the trainer's tokenizer"),
        (Dataset.from_list([{"input_ids": [5]}]).select([]), "without rows"),
        (IterableDataset.from_generator(lambda: iter([{"text": "a"}])), "IterableDataset.*not streamed"),
    ],
)
def test_what_refusals_cannot_be_mixed_into(rows, message, refusal):
    with pytest.raises(ValueError, match=message) as error:
        mix_refusals(rows, REFUSALS, 0.05)
    refusal(error.value)


@pytest.mark.parametrize("share", [0, 1, -0.1, True, "0.1"])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="share="):
        mix_refusals(sum_rows(), REFUSALS, share)


def divergence(model, refusal: Refusal, tokens: int, direction: str = "forward") -> torch.Tensor:
    """The definition: the mean KL over the first tokens of a refusal, over the whole vocabulary."""
    prompt = tokenizer().apply_chat_template(refusal.messages, add_generation_prompt=True, return_dict=False)
    answer = tokenizer()(refusal.response + "<|im_end|>")["input_ids"][:tokens]
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits[0, -len(answer) :].log_softmax(-1)
    own = model(input_ids=ids).logits[0, -len(answer) :].log_softmax(-1)
    first, second = (base, own) if direction == "forward" else (own, base)
    return (first.exp() * (first - second)).sum(-1).mean()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_anchor_is_the_divergence_from_the_base(direction):
    model = adapted().eval()
    options = {"num_tokens": 24, "direction": direction}
    whole = RefusalAnchor.of(model, tokenizer(), REFUSALS, top_tokens=10_000, **options)
    expected = torch.stack([divergence(model, refusal, 24, direction) for refusal in REFUSALS])
    assert torch.allclose(whole.kl(model), expected.detach(), rtol=1e-4)
    # What is kept of the distributions can only have less divergence.
    part = RefusalAnchor.of(model, tokenizer(), REFUSALS, top_tokens=40, **options).kl(model)
    assert (part <= expected + 1e-6).all() and (part > 0).all()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "salora"])
def test_there_is_no_gradient_before_the_first_step(kind):
    config = LORA if kind == "lora" else salora_config()
    model = get_peft_model(llama(), config)
    anchor = RefusalAnchor.of(model, tokenizer(), REFUSALS)
    loss = anchor.backward(model)
    found = gradients(model)
    assert found and all("lora_" in name for name in found)
    assert loss < 1e-6 and max(grad.abs().max() for grad in found.values()) < 1e-5
    if kind == "salora":  # the first training batch is not this one
        assert model.base_model.waiting_for_task_data == ["default"]


def test_the_batches_of_a_round_are_all_requests_once():
    model = adapted().eval()
    anchor = RefusalAnchor.of(model, tokenizer(), REFUSALS, batch_size=5)
    for first in (0, 2, 4):
        mean = (anchor.loss(model, first) + anchor.loss(model, first + 1)) / 2
        assert torch.allclose(mean, anchor.kl(model).mean(), rtol=1e-4)
    assert anchor.loss(model, 1) == anchor.loss(model, 1)


class KeepGradients(TrainerCallback):
    """Those of the adapter in every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 1}],
    ids=["float32", "bf16", "checkpointing", "no accumulation"],
)
def test_the_callback_adds_its_gradient_to_the_steps_own(tmp_path, options):
    """At a learning rate of 0 every step is the same, but for the anchor, which stands at steps 2 and 4 of 0 to 4."""
    rows, found = token_rows(4), {}
    for anchored in (False, True):
        model, keep = adapted(), KeepGradients()
        anchor = RefusalAnchor.of(model, tokenizer(), REFUSALS, batch_size=4)
        callbacks = [RefusalAnchorCallback(anchor, weight=0.5, every=2)] if anchored else []
        settings = {"learning_rate": 0.0, "max_steps": 5, "max_grad_norm": 0, "gradient_accumulation_steps": 2}
        settings |= {"per_device_train_batch_size": 2} | options
        trainer = Trainer(
            model, arguments(TrainingArguments, tmp_path, **settings), train_dataset=rows, callbacks=[*callbacks, keep]
        )
        trainer.train()
        found[anchored] = keep.steps
    for step, (plain, with_anchor) in enumerate(zip(found[False], found[True], strict=True)):
        expected = {}
        if step in (2, 4):
            reference = adapted()
            anchor.backward(reference, step // 2 - 1, weight=2 * 0.5)
            expected = gradients(reference)
        for name, grad in with_anchor.items():
            change = grad - plain[name]
            if step in (2, 4):
                tolerance = 0.1 if "bf16" in options else 1e-3
                assert (change - expected[name]).norm() <= tolerance * expected[name].norm(), (step, name)
            else:
                assert torch.equal(grad, plain[name])


def trained(kind: str, folder: Path, config, callbacks=(), **options):
    trl = pytest.importorskip("trl")
    classes = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, sum_rows()),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, preference_rows()),
    }
    trainer_class, config_class, rows = classes[kind]
    resume = options.pop("resume", None)
    trainer = trainer_class(
        llama(),
        args=arguments(config_class, folder, **{"max_steps": 12, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("adapter", ["lora", "salora"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_model_stays_nearer_to_its_base(tmp_path, kind, adapter):
    config = LORA if adapter == "lora" else salora_config(input_safety_rank=0, safety_data=refusal_rows())
    anchor = RefusalAnchorCallback(REFUSALS, weight=10.0, every=2)
    plain, anchored = (trained(kind, tmp_path, config, callbacks) for callbacks in ([], [anchor]))
    assert anchor.anchor.kl(anchored.model).mean() < 0.5 * anchor.anchor.kl(plain.model).mean()
    logged = {e["step"]: e["refusal_anchor/kl"] for e in anchored.state.log_history if "refusal_anchor/kl" in e}
    assert min(logged) == 3 and all(value > 0 for value in logged.values()) and anchor.seconds > 0
    if adapter == "salora":
        anchored.save_model(tmp_path / "adapter")
        assert "| Refusal anchor | KL to the base model on 10 of its refusals, weight 10, every 2 steps (5 of 12);" in (
            (tmp_path / "adapter" / "README.md").read_text()
        )


def test_a_callback_that_is_used_again_takes_the_base_of_the_model_that_it_is_given(tmp_path):
    callback, divergences = RefusalAnchorCallback(REFUSALS, every=2), []
    for seed in (0, 1):
        model = get_peft_model(llama(seed), LORA)
        trainer = Trainer(
            model,
            arguments(TrainingArguments, tmp_path, max_steps=1),
            train_dataset=token_rows(4),
            callbacks=[callback],
            processing_class=tokenizer(),
        )
        trainer.train()
        with model.disable_adapter():
            divergences.append(callback.anchor.kl(model).abs().max())
    assert max(divergences) < 1e-5


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def run_to_6(folder: str, **options):
        callback = RefusalAnchorCallback(REFUSALS, weight=3.0, every=2, batch_size=3)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
        return trained("sft", tmp_path / folder, LORA, [callback], **settings)

    whole = run_to_6("whole")
    resumed = run_to_6("resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    others = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.allclose(parameter, others[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_resumed_run_whose_base_is_trained_says_so(tmp_path, caplog, bias):
    def run(steps: int, resume: str | None) -> None:
        model = get_peft_model(gpt2(), LoraConfig(r=4, target_modules=["c_attn"], bias=bias))
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        callbacks = [RefusalAnchorCallback(REFUSALS, every=1)]
        trainer = Trainer(
            model,
            arguments(TrainingArguments, tmp_path, **options),
            train_dataset=token_rows(8),
            callbacks=callbacks,
            processing_class=tokenizer(),
        )
        trainer.train(resume_from_checkpoint=resume)

    run(2, None)
    assert "resumes" not in caplog.text
    run(4, str(tmp_path / "checkpoint-2"))
    assert ("step 2, where this run resumes" in caplog.text) == (bias == "all")


PARALLEL = """
from torch.nn.parallel import DistributedDataParallel
from test_replay import REFUSALS, adapted, gradients
from salora_plugins.replay import RefusalAnchor
from tiny import tokenizer

dist.init_process_group("gloo")
rank = dist.get_rank()
for view in (False, True):
    model = adapted()
    anchor = RefusalAnchor.of(model, tokenizer(), REFUSALS, batch_size=5)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=view)
    for number in (0, 1):  # the second with buffers that are there
        model.zero_grad()
        loss = anchor.backward(model, number, weight=2.0)
        with parallel.no_sync():
            tokens = token_batch(seed=10 + rank)
            parallel(input_ids=tokens, labels=tokens).loss.backward()
        tokens = token_batch(seed=20 + rank)
        parallel(input_ids=tokens, labels=tokens).loss.backward()
    torch.save((loss, gradients(model)), folder / f"{view}-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_find_the_gradient_of_one(tmp_path):
    """Of the anchor and of two accumulated batches, with and without gradients that are views of the buffers."""
    run_ranks(PARALLEL, tmp_path)
    model = adapted()
    anchor = RefusalAnchor.of(model, tokenizer(), REFUSALS, batch_size=5)
    whole = anchor.backward(model, 1, weight=2.0)
    for seed in (10, 11, 20, 21):
        tokens = token_batch(seed=seed)
        (model(input_ids=tokens, labels=tokens).loss / 2).backward()
    expected = gradients(model)
    for view in (False, True):
        parts = [torch.load(tmp_path / f"{view}-{rank}.pt") for rank in (0, 1)]
        assert torch.allclose(sum(loss for loss, _ in parts) / 2, whole, rtol=1e-4)
        for _, found in parts:
            for name, grad in expected.items():
                assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RefusalAnchorCallback(weight=0), "weight=0"),
        (lambda: RefusalAnchorCallback(every=0), "every=0"),
        (lambda: RefusalAnchorCallback(batch_size=0), "batch_size=0"),
        (lambda: RefusalAnchorCallback(direction="both"), "direction='both'"),
    ],
)
def test_options_that_an_anchor_cannot_have(make, message, refusal):
    with pytest.raises(ValueError, match=message) as error:
        make()
    refusal(error.value)


def test_a_model_without_an_adapter_has_no_base(tmp_path, refusal):
    trainer = Trainer(
        llama(),
        arguments(TrainingArguments, tmp_path),
        train_dataset=token_rows(8),
        processing_class=tokenizer(),
        callbacks=[RefusalAnchorCallback(REFUSALS)],
    )
    with pytest.raises(ValueError, match="needs a model with an adapter") as error:
        trainer.train()
    refusal(error.value)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_the_start_of_an_adapter_has_changed_is_no_base(tmp_path, start, refusal):
    base = llama()
    anchor = RefusalAnchor.of(base, tokenizer(), REFUSALS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    # What was made before is that of the model as it was, which the adapter begins as.
    assert anchor.kl(model).max() < 1e-4
    for make in (
        lambda: RefusalAnchor.of(model, tokenizer(), REFUSALS),
        lambda: own_refusals(model, tokenizer(), REQUESTS),
        lambda: calibrate(model, tokenizer(), safety_data=token_rows(16), target_modules=["v_proj"]),
        lambda: attribute(model, tokenizer(), out=tmp_path),
    ):
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*has changed") as error:
            make()
        refusal(error.value)


@pytest.mark.parametrize(("steps", "times"), [(3, 0), (4, 1)])
def test_an_anchor_that_never_acts_says_so(tmp_path, caplog, steps, times):
    callback = RefusalAnchorCallback(REFUSALS, every=3)
    trainer = Trainer(
        get_peft_model(llama(), LORA),
        arguments(TrainingArguments, tmp_path, max_steps=steps),
        train_dataset=token_rows(4),
        callbacks=[callback],
        processing_class=tokenizer(),
    )
    trainer.train()
    assert ("has no effect: it acts at every 3th step, and the training has 3" in caplog.text) == (not times)
    assert bool(callback.seconds) == bool(times)


def test_penalties_cost_at_most_a_twentieth():
    """By the estimate: in tokens where passes are long, and in passes where all are short."""
    anchor = RefusalAnchor.of(llama(), tokenizer(), REFUSALS)
    own = sum(len(reference.sequence) for reference in anchor._references) / len(anchor) * 8
    for passes, tokens in itertools.product((1, 2, 8), (0, 400, 4096, 65536)):
        every = anchor.affordable_every(tokens, passes)
        assert every >= 8 and own <= 0.05 * every * passes * (tokens + 2048)
    assert anchor.affordable_every() > 30  # such a pass takes up to 1.5 times as long as a step's
    rising = [anchor.affordable_every(tokens) for tokens in (65536, 4096, 400, 0)]
    assert rising == sorted(rising)


@pytest.mark.parametrize(
    ("kind", "options", "columns"),
    [
        ("sft", {}, ["input_ids"]),
        ("sft", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 8}, ["input_ids"]),
        ("sft", {"packing": True, "max_length": 128}, ["input_ids"]),
        ("dpo", {}, ["prompt_ids", "chosen_ids", "rejected_ids"]),
    ],
)
def test_how_often_an_anchor_acts_follows_from_the_rows(tmp_path, caplog, kind, options, columns):
    callback = RefusalAnchorCallback(REFUSALS)
    caplog.set_level(logging.INFO, "salora_plugins")
    trainer = trained(kind, tmp_path, LORA, [callback], max_steps=100, learning_rate=0.0, **options)
    rows, arguments = trainer.train_dataset, trainer.args
    tokens = arguments.per_device_train_batch_size * sum(len(row[name]) for row in rows for name in columns) / len(rows)
    assert callback.every == callback.anchor.affordable_every(tokens, arguments.gradient_accumulation_steps) < 50
    assert f"acts at every {callback.every}. step" in caplog.text
    acted = {entry["step"] for entry in trainer.state.log_history if "refusal_anchor/kl" in entry}
    assert min(acted) == callback.every + 1


def _columns(rows: list[dict], chosen: list[int]) -> dict[str, list]:
    return {name: [rows[i][name] for i in chosen] for name in rows[0]}


@pytest.mark.parametrize("rows", ["list", "stream", "made on access"])
def test_rows_of_unknown_length_are_taken_to_be_short(tmp_path, caplog, rows):
    callback = RefusalAnchorCallback(REFUSALS)
    numbers = Dataset.from_dict({"number": [0, 1, 2, 3]})
    given = {
        "list": lambda: token_rows(4),
        "stream": lambda: Dataset.from_list(token_rows(4)).to_iterable_dataset(),
        "made on access": lambda: numbers.with_transform(lambda batch: _columns(token_rows(4), batch["number"])),
    }
    trainer = Trainer(
        get_peft_model(llama(), LORA),
        arguments(TrainingArguments, tmp_path, max_steps=80, remove_unused_columns=False),
        train_dataset=given[rows](),
        callbacks=[callback],
        processing_class=tokenizer(),
    )
    trainer.train()
    assert callback.every == callback.anchor.affordable_every() and callback.seconds > 0
    trainer.args.max_steps = 10  # the same callback in a training that is too short for it
    trainer.train()
    assert callback.every == 5
    assert caplog.text.count("acts 1 times in this training") == 1 and caplog.text.count("every=8 costs about") == 1
    callback.every = 3  # set on the callback, it stays
    trainer.train()
    assert callback.every == 3


class _Packed(BatchSampler):
    """Five rows to a batch, as a sampler makes them that fills a number of tokens."""

    def __iter__(self):
        yield from (list(range(start, start + 5)) for start in range(0, 40, 5))

    def __len__(self):
        return 8


def test_rows_that_a_sampler_packs_count_as_one_pass(tmp_path):
    class PackingTrainer(Trainer):
        def get_train_dataloader(self):
            sampler = _Packed(SequentialSampler(self.train_dataset), batch_size=1, drop_last=True)
            return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    rows = [{"input_ids": [1] * 100, "labels": [1] * 100, "attention_mask": [1] * 100}] * 40
    callback = RefusalAnchorCallback(REFUSALS)
    PackingTrainer(
        get_peft_model(llama(), LORA),
        arguments(TrainingArguments, tmp_path, max_steps=80, per_device_train_batch_size=1),
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback],
        processing_class=tokenizer(),
    ).train()
    assert callback.every == callback.anchor.affordable_every(500) < callback.anchor.affordable_every(100)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_rows_that_a_trainer_has_packed_are_refused(tmp_path, strategy, refusal):
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        get_peft_model(llama(), LORA),
        arguments(trl.SFTConfig, tmp_path, packing=True, packing_strategy=strategy, max_length=64),
        train_dataset=sum_rows(),
        processing_class=tokenizer(),
    )
    with pytest.raises(ValueError, match="packing=True") as error:
        mix_into_training_set(trainer, 0.2, refusal_rows(4))
    refusal(error.value)


def test_optimizers_that_step_in_the_backward_pass_are_refused(tmp_path, refusal):
    trainer = Trainer(adapted(), arguments(TrainingArguments, tmp_path), train_dataset=token_rows(8))
    trainer.args.optim = "galore_adamw_layerwise"
    with pytest.raises(ValueError, match="steps in the backward pass") as error:
        RefusalAnchorCallback(REFUSALS).on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, processing_class=tokenizer()
        )
    refusal(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refusals_in_a_trainers_set(tmp_path):
    """With TRL's arguments: any adapter, and no option of SaLoRA's is needed."""
    trl = pytest.importorskip("trl")
    from salora_plugins.integrations.trl import SaLoRAArguments, get_peft_config, train_on_refusals

    given = SaLoRAArguments(refusal_share=0.2, refusal_anchor=2.0, safety_data=refusal_rows(4))
    model_args = trl.ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    assert type(get_peft_config(model_args, given)) is LoraConfig
    trainer = trl.SFTTrainer(
        llama(),
        arguments(trl.SFTConfig, tmp_path),
        train_dataset=sum_rows(),
        processing_class=tokenizer(),
        peft_config=get_peft_config(model_args, given),
    )
    train_on_refusals(trainer, given)
    texts = [tokenizer().decode(row["input_ids"]) for row in trainer.train_dataset]
    assert len(texts) == 30 and sum("do harm" in text for text in texts) == 6
    trainer.train()
    assert any("refusal_anchor/kl" in entry for entry in trainer.state.log_history)
    with pytest.raises(ValueError, match="--safety_data has no effect without --use_salora"):
        get_peft_config(model_args, SaLoRAArguments(safety_data="builtin"))
    preferences = trl.DPOTrainer(
        llama(),
        args=arguments(trl.DPOConfig, tmp_path),
        train_dataset=preference_rows(),
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    with pytest.raises(ValueError, match="preferences"):
        mix_into_training_set(preferences, 0.1)


def test_constrained_sft_begins_as_cross_entropy_and_fades_where_beta_is_large():
    labels = token_batch(batch=4, length=20)
    labels[:, :6] = -100
    logits = torch.randn(4, 20, 259, generator=torch.Generator().manual_seed(0), requires_grad=True)
    base = base_log_probabilities(logits.detach(), labels)
    (at_start,) = torch.autograd.grad(constrained_sft_loss(logits, base, labels), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)
    assert torch.allclose(at_start, plain, atol=1e-7)
    # Tokens that are e times as probable as to the base: less gradient, least at the tokens of the largest beta.
    (later,) = torch.autograd.grad(constrained_sft_loss(logits, base - 1, labels), logits)
    shares = (later.norm(dim=-1) / plain.norm(dim=-1))[0, 5:19]
    expected = torch.tensor([0.5, *[2.0] * 4, *[0.1] * 9]).neg().sigmoid() * 2
    assert torch.allclose(shares, expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_second_adapter_learns_from_the_anchor_alone_and_reacts_to_the_safety_directions_only():
    options = {"init": "zero", "input_safety_rank": 8, "safety_data": refusal_rows(), "tokenizer": tokenizer()}
    model = get_peft_model(llama(), salora_config(**options))
    second = SecondAdapter(model, r=4)
    anchor = RefusalAnchor.of(model, tokenizer(), REFUSALS)
    tokens = token_batch(batch=4)
    optimizer = torch.optim.AdamW([*second.first_parameters, *second.parameters], lr=1e-2)

    def train(steps: int, anchored: bool) -> float:
        for step in range(steps):
            if anchored:
                with second.trained_alone():
                    anchor.backward(model, step)
                assert all(parameter.grad is None for parameter in second.first_parameters)
            model(input_ids=tokens, labels=tokens).loss.backward()
            assert anchored or all(parameter.grad is None for parameter in second.parameters)
            optimizer.step()
            optimizer.zero_grad()
        return anchor.kl(model).mean().item()

    before = train(20, anchored=False)
    assert train(20, anchored=True) < 0.5 * before
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    directions = model.base_model.safety_module("default").input_bases["model.layers.0.self_attn.q_proj"]
    weight = layer.lora_A["refusals"].weight.detach()
    assert (weight - weight @ directions @ directions.T).norm() < 1e-5 * weight.norm()


def test_the_base_has_neither_adapters_nor_copies_of_saved_modules():
    base = llama()
    expected = base(input_ids=token_batch()).logits
    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    )
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    with adapters_disabled(model):
        assert torch.equal(model(input_ids=token_batch()).logits, expected)
    assert not torch.equal(model(input_ids=token_batch()).logits, expected)
