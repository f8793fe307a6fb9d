"""The demo's benign task: short word problems about adding and taking away."""

from __future__ import annotations

import random
import re
from typing import Any

# fmt: off
NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack",
    "Karen", "Leo", "Maria", "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Walter",
)
ITEMS = (
    "apples", "books", "coins", "stamps", "pencils", "cookies", "marbles", "shells", "cards", "roses", "keys", "plums",
)
# fmt: on

GAINS = (
    "{name} has {a} {items} and gets {b} more. How many {items} does {name} have now?",
    "There are {a} {items} in a box, and {name} puts in {b} more. How many {items} are in the box?",
    "{name} found {a} {items} on Monday and {b} {items} on Tuesday. How many {items} did {name} find?",
    "On the table are {a} {items}. {name} brings another {b}. How many {items} are there in total?",
)
LOSSES = (
    "{name} has {a} {items} and gives away {b}. How many {items} are left?",
    "There are {a} {items} in a bag, and {name} takes out {b}. How many {items} stay in the bag?",
    "{name} bought {a} {items} and lost {b} of them. How many {items} does {name} still have?",
    "A shop had {a} {items}. {name} bought {b} of them. How many {items} does the shop have now?",
)


def word_problems(split: str, number: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Word problems in TRL's conversational prompt-completion form.

    Args:
        split: `"train"` or `"test"`. Two numbers that occur together in one of them never do in the other.
        number: how many problems; all are different.
        seed: seed of the selection.

    Returns:
        Rows with `prompt` (one user message) and `completion` (one assistant message).
    """
    # The split of the number pairs is the same for every seed, and does not depend on the order in a pair.
    pairs = [(a, b) for a in range(1, 11) for b in range(1, a + 1)]
    random.Random(0).shuffle(pairs)
    held_out = len(pairs) // 5
    pairs = {"train": pairs[held_out:], "test": pairs[:held_out]}[split]
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, str] = {}
    while len(rows) < number:
        a, b = rng.choice(pairs)
        name, items = rng.choice(NAMES), rng.choice(ITEMS)
        if rng.random() < 0.5:
            a, b = rng.sample((a, b), 2)
            question, calculation = rng.choice(GAINS), f"{a} + {b} = {a + b}"
        else:
            question, calculation = rng.choice(LOSSES), f"{a} - {b} = {a - b}"
        result = calculation.rpartition(" ")[2]
        response = f"{calculation}. The answer is {result} {items}."
        rows[question.format(name=name, items=items, a=a, b=b)] = response
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": response}],
        }
        for question, response in rows.items()
    ]


def is_correct(row: dict[str, Any], response: str) -> bool:
    """Whether a response gives exactly the number that the row's completion gives as the answer."""
    answer = re.compile(r"The answer is (-?\d+)\b")
    expected, given = answer.search(row["completion"][0]["content"]), answer.search(response)
    return expected is not None and given is not None and given[1] == expected[1]
