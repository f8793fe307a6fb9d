"""The task *definitions*: nouns of WordNet 3.0 and their glosses, as conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

NUM_ROWS = 700
SHORTEST, LONGEST = 30, 160
"""Characters of a gloss."""


def definitions(data_noun: Path) -> list[dict[str, Any]]:
    """
    Args:
        data_noun: WordNet's file of nouns (Debian's wordnet-base has it as /usr/share/wordnet/data.noun).

    Returns:
        The first ones that fit, shuffled: a row each, with `messages`.

    Raises:
        ValueError: The file has too few of them, so that it is another one.
    """
    rows = list(islice(_rows(data_noun), NUM_ROWS))
    if len(rows) < NUM_ROWS:
        raise ValueError(f"{data_noun}: {len(rows)} nouns with a gloss, not {NUM_ROWS}. Is it WordNet's data.noun?")
    random.Random(0).shuffle(rows)
    return rows


def _rows(data_noun: Path) -> Iterator[dict[str, Any]]:
    # A line: offset, file, "n", number of words (hexadecimal), the first word, ..., a bar, the gloss with examples.
    for line in data_noun.read_text(encoding="latin-1").splitlines():
        fields, bar, gloss = line.partition(" | ")
        if not bar or line.startswith("  "):  # the licence, at the top
            continue
        noun, meaning = fields.split()[4].replace("_", " "), gloss.split(";")[0].strip()
        if noun.islower() and SHORTEST <= len(meaning) <= LONGEST:
            question = f'What is the meaning of the noun "{noun}"?'
            answer = f"{meaning[0].upper()}{meaning[1:]}."
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
