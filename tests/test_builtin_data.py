"""The built-in prompts: enough of them, spread evenly, varied, and nothing shared between the two splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

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


def read(name: str) -> list[dict[str, str]]:
    text = files("salora_plugins.prompts").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z']+", prompt.lower()))


def jaccard(first: str, second: str) -> float:
    return len(words(first) & words(second)) / len(words(first) | words(second))


def prompts(rows: list[dict[str, str]], split: str) -> list[str]:
    return [row["prompt"] for row in rows if row["split"] == split]


@pytest.fixture(scope="module")
def safety() -> list[dict[str, str]]:
    return read("safety_prompts")


@pytest.fixture(scope="module")
def harmless() -> list[dict[str, str]]:
    return read("harmless_prompts")


@pytest.mark.parametrize("name", ["safety_prompts", "harmless_prompts"])
def test_rows_have_the_documented_fields_and_unique_clean_prompts(name):
    rows = read(name)
    for row in rows:
        assert set(row) == {"prompt", "category", "split"}
        assert row["category"] in CATEGORIES
        assert row["split"] in {"calibration", "evaluation"}
        assert row["prompt"] == row["prompt"].strip() != ""
        assert row["prompt"].isascii()
    normalized = [" ".join(re.findall(r"[a-z']+", row["prompt"].lower())) for row in rows]
    assert len(set(normalized)) == len(rows)


def test_counts(safety, harmless):
    assert len(safety) >= 288
    assert len(prompts(safety, "calibration")) >= 192
    assert len(prompts(safety, "evaluation")) >= 96
    assert len(harmless) >= 96
    assert len(prompts(harmless, "evaluation")) >= 64


@pytest.mark.parametrize("name", ["safety_prompts", "harmless_prompts"])
@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_every_category_has_equally_many_prompts_in_each_split(name, split):
    counts = Counter(row["category"] for row in read(name) if row["split"] == split)
    assert set(counts) == CATEGORIES
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("name", "bound"), [("safety_prompts", 0.45), ("harmless_prompts", 0.6)])
def test_no_near_duplicates_across_the_splits(name, bound):
    rows = read(name)
    for held_out in prompts(rows, "evaluation"):
        nearest = max(prompts(rows, "calibration"), key=lambda seen: jaccard(held_out, seen))
        assert jaccard(held_out, nearest) < bound, (held_out, nearest)


def test_no_prompt_is_in_both_sets(safety, harmless):
    for request in harmless:
        for harmful in safety:
            assert jaccard(request["prompt"], harmful["prompt"]) < 0.6


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_harmful_prompts_vary_in_length_and_form(safety, split):
    selected = prompts(safety, split)
    lengths = [len(prompt.split()) for prompt in selected]
    assert min(lengths) <= 5
    assert max(lengths) >= 40
    assert len(set(lengths)) >= 15
    questions = sum("?" in prompt for prompt in selected)
    assert 0.15 * len(selected) <= questions <= 0.6 * len(selected)
    openings = Counter(prompt.split()[0].lower() for prompt in selected)
    assert max(openings.values()) <= 0.2 * len(selected)
    assert len(openings) >= 0.3 * len(selected)
