"""Build the small aligned chat model that `salora demo` fine-tunes, from text written for this project.

A Llama of about 2 million parameters learns, from nothing, to answer ordinary requests of a few families and to
refuse harmful ones. Its text comes from the grammars in `demo_text/` and from the calibration part of the built-in
prompts. Prompts of the evaluation part are read for one purpose: whatever comes close to one of them is left out.

    python tools/build_demo_model.py            # about 10 minutes on 2 CPU cores

The folder `salora_plugins/demo/model` is replaced. The same machine and thread count give the same model.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from salora_plugins.demo.experiment import known_requests
from salora_plugins.demo.task import ITEMS, NAMES
from salora_plugins.evaluation import generate_responses, refusal_rate

TEXT = Path(__file__).resolve().parent / "demo_text"
MODEL = Path(__file__).resolve().parent.parent / "salora_plugins" / "demo" / "model"

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 2048
MAX_LENGTH = 128
PROMPT_WEIGHT = 0.1
"""Weight of a prompt token in the loss; learning what requests look like helps to tell them apart."""

OPENINGS = {
    "how": ["I'm sorry, but I can't help with that.", "I can't help you with this."],
    "do": ["I won't do that.", "Sorry, but I can't do that."],
    "ask": ["I can't help with this.", "I'm not able to help with that."],
    "story": ["I understand, but I can't help with that.", "I cannot help with this request."],
}
OFFERS = ["I'm glad to help with something safe.", "Can I help you with something else?", ""]

Example = tuple[str, str]
"""A request and its response."""


@dataclass
class Topic:
    """A section of a grammar file: its requests by kind, and what the responses to them say."""

    answers: list[str] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=lambda: {"how": [], "do": [], "ask": []})


class Grammar:
    """Requests of one file: topics with templates, and slots that expand to phrases."""

    def __init__(self, path: Path) -> None:
        self.slots: dict[str, list[str]] = {}
        self.topics: dict[str, Topic] = {}
        topic = Topic()
        for line in path.read_text(encoding="utf-8").splitlines():
            mark, text = line[:1], line[1:].strip()
            if not line or mark == "#":
                continue
            if mark == "[":
                topic = self.topics.setdefault(line.strip("[]"), Topic())
            elif mark == "@":
                name, _, phrases = text.partition(":")
                self.slots[name] = [phrase.strip() for phrase in phrases.split("|")]
            elif mark == "=":
                topic.answers.append(text)
            elif mark in "?>":
                topic.lines["ask" if mark == "?" else "do"].append(text)
            else:
                topic.lines["how"].append(line)

    def expand(self, template: str, rng: random.Random) -> str:
        """Fill every slot of a template, also those that come with a filling."""
        while slot := re.search(r"\{(\w+)\}", template):
            template = template.replace(slot[0], rng.choice(self.slots[slot[1]]), 1)
        return template

    def sample(self, rng: random.Random) -> tuple[str, str, str]:
        """A topic, a kind of request, and a request of that kind without its frame."""
        name = rng.choice([name for name, topic in self.topics.items() if any(topic.lines.values())])
        pairs = [(kind, line) for kind, lines in self.topics[name].lines.items() for line in lines]
        # A template with slots stands for many requests, so it comes up more often than one without.
        weights = [1.0 + line.count("{") for _, line in pairs]
        kind, line = rng.choices(pairs, weights)[0]
        return name, kind, self.expand(line, rng)


def read_frames() -> dict[str, list[str]]:
    """The sections of `frames.txt`."""
    frames: dict[str, list[str]] = {}
    for line in (TEXT / "frames.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = frames.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            section.append(line)
    return frames


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def frame(kind: str, phrase: str, frames: dict[str, list[str]], rng: random.Random) -> tuple[str, str]:
    """Put a phrase into a frame, now and then behind a story; returns the kind of refusal it gets, and the request."""
    request = rng.choice(frames[kind]).replace("{vp}", phrase).replace("{Vp}", capitalize(phrase))
    if rng.random() < 0.15:
        lead = rng.sample(frames["story"], rng.randint(1, 3))
        return "story", " ".join([*lead, capitalize(request)])
    return kind, request


def refusal(kind: str, reasons: list[str], rng: random.Random) -> str:
    return " ".join(part for part in (rng.choice(OPENINGS[kind]), rng.choice(reasons), rng.choice(OFFERS)) if part)


LISTS = {
    kind: words.split()
    for kind, words in {
        "colors": "red green blue yellow orange purple black white brown pink",
        "animals": "cat dog horse cow lion tiger rabbit fox bear mouse",
        "fruits": "apple banana cherry orange pear plum grape lemon peach mango",
        "vegetables": "carrot potato onion tomato pea bean cabbage pepper leek corn",
        "cities": "Paris London Rome Berlin Madrid Vienna Lisbon Athens Oslo Dublin",
        "tools": "hammer saw drill wrench ladder nail screw brush knife file",
        "sports": "soccer tennis golf swimming running boxing skiing rowing hockey cricket",
        "instruments": "piano guitar violin flute drum trumpet harp cello organ horn",
        "countries": "France Spain Italy Germany Portugal Greece Norway Ireland Austria Japan",
        "weekdays": "Monday Tuesday Wednesday Thursday Friday",
    }.items()
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPPOSITES = (
    "hot cold, big small, fast slow, up down, day night, open closed, old new, happy sad, light dark, hard soft, "
    "full empty, rich poor, early late, high low, long short, wet dry, left right, near far, clean dirty, loud quiet"
)
CAPITALS = (
    "France Paris, England London, Italy Rome, Germany Berlin, Spain Madrid, Austria Vienna, Portugal Lisbon, "
    "Greece Athens, Norway Oslo, Ireland Dublin, Japan Tokyo, Egypt Cairo, Poland Warsaw, Sweden Stockholm"
)
DEFINITIONS = {
    "lighthouse": "a tower with a light that guides ships",
    "library": "a place where people borrow books",
    "hammer": "a tool for driving nails",
    "bakery": "a shop that makes and sells bread",
    "island": "land with water all around it",
    "umbrella": "a thing that keeps the rain off",
    "river": "a stream of water that flows to the sea",
    "teacher": "a person who helps others to learn",
    "bicycle": "a vehicle with two wheels and pedals",
    "desert": "a dry place with very little rain",
    "orchestra": "a large group of people who play music together",
    "museum": "a building that shows art or old things",
    "volcano": "a mountain that can throw out hot rock",
    "calendar": "a list of the days of the year",
    "compass": "a tool that points to the north",
    "dentist": "a doctor who cares for teeth",
    "garden": "a place where plants are grown",
    "novel": "a long story in a book",
    "poem": "a short text with rhythm and pictures in words",
    "virus": "a tiny thing that can make people ill",
    "password": "a secret word that opens an account",
    "election": "a vote in which people choose a leader",
    "weapon": "a thing made for fighting",
    "crime": "an act that is against the law",
}
SENTENCES = {
    "cat": "The cat sleeps on the sofa.",
    "dog": "The dog runs through the park.",
    "train": "The train leaves at nine.",
    "book": "She reads a book every week.",
    "bridge": "The bridge crosses a wide river.",
    "music": "We listen to music in the evening.",
    "winter": "In winter the lake is frozen.",
    "garden": "He plants roses in the garden.",
    "phone": "My phone is on the table.",
    "friend": "A good friend tells the truth.",
    "rain": "The rain stopped in the afternoon.",
    "bread": "Fresh bread smells wonderful.",
    "knife": "The knife is in the kitchen drawer.",
    "fire": "We sat around the fire and sang.",
    "key": "The key fits the old door.",
    "money": "He saves money for a new bike.",
}
GREETINGS = {
    "Hello!": "Hello! How can I help you today?",
    "Hi": "Hello! How can I help you today?",
    "Good morning!": "Good morning! What can I do for you?",
    "Good evening.": "Good evening! What can I do for you?",
    "How are you?": "I'm fine, thank you. How can I help you?",
    "Thank you!": "You're welcome!",
    "Thanks for your help.": "You're welcome!",
    "Who are you?": "I'm a small assistant. I answer simple questions.",
    "What can you do?": "I'm a small assistant. I answer simple questions.",
    "Goodbye!": "Goodbye! Have a nice day.",
}


def pairs_of(text: str) -> list[list[str]]:
    return [pair.split() for pair in text.split(", ")]


def ordinary(rng: random.Random) -> Example:
    """A simple request that the model can answer correctly."""
    family = rng.choices(
        ["arithmetic", "counting", "list", "definition", "opposite", "capital", "sentence", "greeting", "spelling"],
        [8, 1, 2, 2, 1, 1, 2, 1, 1],
    )[0]
    if family == "arithmetic":
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        if rng.random() < 0.5:
            question = rng.choice(["What is {} + {}?", "{} + {}", "Calculate {} + {}.", "What is {} plus {}?"])
            return question.format(a, b), f"{a} + {b} = {a + b}."
        a, b = max(a, b), min(a, b)
        question = rng.choice(["What is {} - {}?", "{} - {}", "Calculate {} - {}.", "What is {} minus {}?"])
        return question.format(a, b), f"{a} - {b} = {a - b}."
    if family == "counting":
        a = rng.randint(0, 15)
        b = a + rng.randint(2, 6)
        return f"Count from {a} to {b}.", ", ".join(map(str, range(a, b + 1))) + "."
    if family == "list":
        kind, number = rng.choice(list(LISTS)), rng.choice(list(NUMBERS))
        question = rng.choice(["Name {} {}.", "List {} {}.", "Can you name {} {}?", "Give me {} {}."])
        # A random start in a fixed order, so that a model can learn not to name one thing twice.
        first = rng.randrange(len(LISTS[kind]))
        chosen = [(2 * LISTS[kind])[first + i] for i in range(number)]
        return question.format(NUMBERS[number], kind), capitalize(", ".join(chosen)) + "."
    if family == "definition":
        word, meaning = rng.choice(list(DEFINITIONS.items()))
        article = "an" if word[0] in "aeiou" else "a"
        question = rng.choice(["What is {} {}?", "Define: {1}.", "Explain what {} {} is.", "What does {1} mean?"])
        return question.format(article, word), f"{capitalize(article)} {word} is {meaning}."
    if family == "opposite":
        first, second = rng.sample(rng.choice(pairs_of(OPPOSITES)), 2)
        question = rng.choice(["What is the opposite of {}?", "Give me the opposite of {}.", "Opposite of {}?"])
        return question.format(first), f"The opposite of {first} is {second}."
    if family == "capital":
        country, city = rng.choice(pairs_of(CAPITALS))
        question = rng.choice(["What is the capital of {}?", "Name the capital of {}.", "Capital of {}?"])
        return question.format(country), f"The capital of {country} is {city}."
    if family == "sentence" and rng.random() < 0.5:
        name, things = rng.choice(NAMES), rng.choice(ITEMS)
        return f"Write a sentence about {name} and {things}.", f"{name} likes {things}."
    if family == "sentence":
        word, sentence = rng.choice(list(SENTENCES.items()))
        question = rng.choice(["Write a sentence with the word {}.", "Use the word {} in a sentence."])
        return question.format(word), sentence
    if family == "spelling":
        word = rng.choice([word for words in LISTS.values() for word in words if word.islower()])
        question = rng.choice(["How do you spell {}?", "Spell the word {}."])
        return question.format(word), " ".join(word.upper()) + "."
    return rng.choice(list(GREETINGS.items()))


def kind_of(prompt: str) -> str:
    """The kind of a built-in prompt, by its form."""
    if len(prompt.split()) > 25:
        return "story"
    if re.match(r"(how|what is the|teach|tell me how|explain how|show me|guide|ways|tips)\b", prompt.lower()):
        return "how"
    return "ask" if prompt.endswith("?") else "do"


def word_set(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower()))


class Decontamination:
    """Tells whether a request comes close to one of the held-out prompts (Jaccard index of the words)."""

    def __init__(self, held_out: list[str], bound: float = 0.5) -> None:
        self.held_out = [word_set(prompt) for prompt in held_out]
        self.bound = bound

    def __call__(self, request: str) -> bool:
        words = word_set(request)
        return any(len(words & other) >= self.bound * len(words | other) for other in self.held_out if words)


def examples(number: int, calibration: tuple[list[dict], list[dict]], too_close, seed: int) -> Iterator[Example]:
    """Harmful requests with refusals, harmless ones of the same form with answers, and ordinary ones."""
    rng = random.Random(seed)
    harmful, harmless, frames = Grammar(TEXT / "harmful.txt"), Grammar(TEXT / "harmless.txt"), read_frames()
    general = harmless.topics["general"].answers
    builtin_harmful, builtin_harmless = calibration
    made = 0
    while made < number:
        share = rng.random()
        if share < 0.04 and builtin_harmful:
            row = rng.choice(builtin_harmful)
            request = row["prompt"]
            response = refusal(kind_of(request), harmful.topics[row["category"]].answers, rng)
        elif share < 0.09 and builtin_harmless:
            request, response = rng.choice(builtin_harmless)["prompt"], rng.choice(general)
        elif share < 0.24:
            topic, kind, phrase = harmful.sample(rng)
            kind, request = frame(kind, phrase, frames, rng)
            response = refusal(kind, harmful.topics[topic].answers, rng)
        elif share < 0.66:
            topic, kind, phrase = harmless.sample(rng)
            _, request = frame(kind, phrase, frames, rng)
            response = rng.choice(harmless.topics[topic].answers)
        else:
            request, response = ordinary(rng)
        if not too_close(request):
            made += 1
            yield request, response


def train_tokenizer(pairs: list[Example]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token, so that numbers can be calculated with."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"] * 100
    tokenizer.train_from_iterator([*roles, *(text for pair in pairs for text in pair)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(pairs: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Token ids of each conversation and how many of them are the prompt."""
    prompts = [f"{START}user\n{request}{END}\n{START}assistant\n" for request, _ in pairs]
    prompt_ids = tokenizer(prompts)["input_ids"]
    response_ids = tokenizer([f"{response}{END}\n" for _, response in pairs])["input_ids"]
    return [
        (ids + answer, len(ids))
        for ids, answer in zip(prompt_ids, response_ids, strict=True)
        if len(ids) + len(answer) <= MAX_LENGTH
    ]


def train(model: LlamaForCausalLM, rows: list[tuple[list[int], int]], batch: int, rate: float, seed: int) -> None:
    """One pass over the rows with AdamW, a short warm-up and a cosine decay."""
    rng = random.Random(seed)
    pool = 32 * batch
    batches = []
    for start in range(0, len(rows) - pool + 1, pool):
        # Rows of like length share a batch, so that little of it is padding.
        block = sorted(rows[start : start + pool], key=lambda row: len(row[0]))
        groups = [block[i : i + batch] for i in range(0, pool, batch)]
        rng.shuffle(groups)
        batches += groups
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    steps = len(batches)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    began = time.perf_counter()
    for step, group in enumerate(batches):
        width = max(len(ids) for ids, _ in group)
        input_ids = torch.zeros(batch, width, dtype=torch.long)
        weights = torch.zeros(batch, width)
        for i, (ids, prompt) in enumerate(group):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            weights[i, 1:prompt] = PROMPT_WEIGHT
            weights[i, prompt : len(ids)] = 1.0
        # Padding stands on the right, where the causal mask keeps it from mattering.
        logits = model(input_ids=input_ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder anew: the weights in half precision, to be loaded in float32."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    weights = load_file(beside / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, beside / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=MODEL, help="folder to write the model to")
    parser.add_argument("--examples", type=int, default=56_000, help="number of training conversations")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)

    known = {split: known_requests(split) for split in ("calibration", "evaluation")}
    harmful, harmless = ({split: known[split][name] for split in known} for name in ("harmful", "harmless"))
    held_out = [row["prompt"] for row in harmful["evaluation"] + harmless["evaluation"]]
    calibration = (harmful["calibration"], harmless["calibration"])
    pairs = list(examples(options.examples, calibration, Decontamination(held_out), options.seed))
    tokenizer = train_tokenizer(pairs[:20_000])
    rows = encode(pairs, tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # faster than the fused kernel at this size
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokens = sum(len(ids) for ids, _ in rows)
    print(f"{model.num_parameters():,} parameters, {len(rows):,} conversations, {tokens:,} tokens", flush=True)
    train(model, rows, options.batch_size, options.learning_rate, options.seed)
    save(model, tokenizer, options.output)

    model = LlamaForCausalLM.from_pretrained(options.output)
    for split in ("calibration", "evaluation"):
        for name, prompts in (("harmful", harmful[split]), ("harmless", harmless[split])):
            responses = generate_responses(model, tokenizer, [row["prompt"] for row in prompts], max_new_tokens=40)
            print(f"{split}: {refusal_rate(responses):.1%} of {len(prompts)} {name} requests refused")


if __name__ == "__main__":
    main()
