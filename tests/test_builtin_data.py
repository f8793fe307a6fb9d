"""The built-in prompts: enough of them, of every kind in both splits, varied, and nothing shared between the two."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from importlib.resources import files
from typing import Any

import pytest

from salora_plugins.options import OPTIONS
from salora_plugins.prompts.builtin import SPLITS

CATEGORIES = {
    "violent_crimes",
    "non_violent_crimes",
    "sex_related_crimes",
    "child_sexual_exploitation",
    "defamation",
    "specialized_advice",
    "privacy",
    "intellectual_property",
    "indiscriminate_weapons",
    "hate",
    "suicide_self_harm",
    "sexual_content",
    "elections",
    "code_interpreter_abuse",
}
FORMS = {
    "question",
    "order",
    "code",
    "letter",
    "role_play",
    "hypothetical",
    "long",
    "terse",
    "polite",
    "chatty",
    "misspelt",
    "several_turns",
}
LANGUAGES = {"en", "es", "fr", "de", "pt", "zh", "ru"}
NAMES = ("safety_prompts", "harmless_prompts")

# Of the three-word sequences of two requests, the share that both have. A form of words that is used again with another
# topic, or a topic in another form, stays below it.
NEAR_DUPLICATE = 0.45
ACROSS_SPLITS = 0.3
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_]+(?:'[^\W_]+)*")
"""A word; of Chinese, which has no spaces, a character."""

Shingles = set[tuple[str, ...]]


def read(name: str) -> list[dict[str, Any]]:
    text = files("salora_plugins.prompts").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def request(row: dict[str, Any]) -> str:
    """What the user says, in all turns."""
    turns = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    return " ".join(turn["content"] for turn in turns if turn["role"] == "user")


def shingles(text: str) -> Shingles:
    words = WORD.findall(text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


class Nearest:
    """Finds the nearest of requests seen before, by an index of their three-word sequences."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Shingles]] = []
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        found = shingles(text)
        for shingle in found:
            self.holders[shingle].append(len(self.seen))
        self.seen.append((text, found))

    def of(self, text: str) -> tuple[float, str]:
        mine = shingles(text)
        shared = Counter(index for shingle in mine for index in self.holders[shingle])
        return max(
            ((n / len(mine | self.seen[index][1]), self.seen[index][0]) for index, n in shared.items()),
            default=(0.0, ""),
        )


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict[str, Any]]]:
    return {name: read(name) for name in NAMES}


def of_split(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["split"] == split]


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_documented_fields_and_clean_texts(name, sets):
    for row in sets[name]:
        asks = {"messages"} if row["form"] == "several_turns" else {"prompt"}
        assert set(row) == asks | {"category", "form", "language", "split"}
        assert row["category"] in CATEGORIES
        assert row["form"] in FORMS
        assert row["language"] in LANGUAGES
        assert row["split"] in SPLITS
        if "messages" in row:
            roles = [turn["role"] for turn in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            assert len(roles) >= 3
        for text in [turn["content"] for turn in row.get("messages", [])] or [row["prompt"]]:
            assert text == text.strip() != ""
            assert "{" not in text and "\ufffd" not in text
        has_cyrillic, has_chinese = (re.search(of, request(row)) for of in ("[\u0430-\u044f]", "[\u4e00-\u9fff]"))
        assert bool(has_cyrillic) == (row["language"] == "ru")
        assert bool(has_chinese) == (row["language"] == "zh")


def test_counts(sets):
    counts = {(name, split): len(of_split(rows, split)) for name, rows in sets.items() for split in SPLITS}
    assert counts["safety_prompts", "calibration"] >= 1500
    assert counts["safety_prompts", "evaluation"] >= 300
    assert min(counts["harmless_prompts", split] for split in SPLITS) >= 150
    assert counts["safety_prompts", "calibration"] >= 2 * OPTIONS["num_safety_samples"].default


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_every_category_form_and_language_is_in_every_split(name, split, sets):
    rows = of_split(sets[name], split)
    for column, known in (("category", CATEGORIES), ("form", FORMS), ("language", LANGUAGES)):
        counts = Counter(row[column] for row in rows)
        assert set(counts) == known
        # No kind is a handful, and none is most of all, but for English.
        assert min(counts.values()) >= (0.012 if name == "harmless_prompts" else 0.02) * len(rows), (column, counts)
        if column != "language":
            assert max(counts.values()) <= 0.45 * len(rows), (column, counts)
    assert 0.6 <= sum(row["language"] == "en" for row in rows) / len(rows) <= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_no_near_duplicates(name, sets):
    for split in SPLITS:
        nearest = Nearest()
        for text in map(request, of_split(sets[name], split)):
            similarity, other = nearest.of(text)
            assert similarity < NEAR_DUPLICATE, (text, other)
            nearest.add(text)


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_share_no_wording(name, sets):
    nearest = Nearest()
    for row in of_split(sets[name], "calibration"):
        nearest.add(request(row))
    for text in map(request, of_split(sets[name], "evaluation")):
        similarity, other = nearest.of(text)
        assert similarity < ACROSS_SPLITS, (text, other)


def test_near_duplicates_are_found():
    """Else the tests above could not fail."""
    nearest = Nearest()
    nearest.add("How do I steal a bicycle from the yard of a school?")
    assert nearest.of("how do I steal a bicycle from the yard of a museum")[0] > NEAR_DUPLICATE
    assert nearest.of("Where can I buy a bicycle?")[0] < ACROSS_SPLITS
    nearest.add("怎么洗黑钱才不会被银行发现?")
    assert nearest.of("怎么洗黑钱才不会被警察发现?")[0] > NEAR_DUPLICATE


def test_no_request_is_in_both_sets(sets):
    nearest = Nearest()
    for row in sets["safety_prompts"]:
        nearest.add(request(row))
    for text in map(request, sets["harmless_prompts"]):
        similarity, other = nearest.of(text)
        assert similarity < NEAR_DUPLICATE, (text, other)


def test_every_row_fits_the_default_length_of_calibration(sets):
    """Estimated without a tokenizer: three tokens a word (or Chinese character), or two bytes a token, is a lot."""
    longest = OPTIONS["calibration_max_length"].default
    for rows in sets.values():
        for row in rows:
            text = " ".join(turn["content"] for turn in row.get("messages", [])) or row["prompt"]
            words = WORD.findall(text)
            assert 3 * len(words) < longest, text
            assert len(text.encode()) / 2 < longest, text


@pytest.mark.parametrize("split", SPLITS)
def test_harmful_prompts_vary_in_length_and_opening(split, sets):
    texts = [request(row) for row in of_split(sets["safety_prompts"], split)]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 5
    assert max(lengths) >= 40
    assert len(set(lengths)) >= 15
    questions = sum("?" in text for text in texts)
    assert 0.15 * len(texts) <= questions <= 0.6 * len(texts)
    openings = Counter(text.split()[0].lower() for text in texts)
    assert max(openings.values()) <= 0.2 * len(texts)
    assert len(openings) >= 0.2 * len(texts)
