"""The base model's own refusals of harmful requests, as conversations."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..activations.errors import CalibrationError
from ..calibration.cache import cache_folder
from ..calibration.refusals import warn_of_compliance
from ..hookspecs import Judge
from ..inference.greedy import end_tokens, greedy_answers
from ..models.embeddings import vocabulary_size
from ..models.fingerprint import model_fingerprint
from ..models.running import adapters_disabled, check_base_is_unchanged, evaluation_mode, on_accelerator
from ..options import check_number
from ..plugins import judges
from ..rows.errors import DataError
from ..rows.examples import Example, select_examples
from ..rows.reading import MAX_ROWS, load_examples
from ..rows.rendering import tokenizer_of
from ..rows.tokenizing import render_prompts
from ..support.distributed import gather_json, rank_and_world_size
from ..support.files import atomic_write
from ..support.notices import tell
from ..support.texts import without_reasoning

logger = logging.getLogger(__name__)

RESPONSE_TOKENS = 64
"""Length of an answer, of which as few lines are kept as refuse."""

_CUT = 2
"""Of the way in which answers are cut: part of their name in the cache, so that none is taken that was cut before."""

# Chinese and Japanese put no space behind a sentence.
_SENTENCE_END = re.compile(r"[.!?\u061f\u0964]+[\"')\u201d\u2019]*(?=\s|$)|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d]*")


@dataclass(frozen=True)
class Refusal:
    """A harmful request with the answer that refuses it."""

    messages: tuple[dict[str, Any], ...]
    """The conversation up to the request, each with `role` and `content`."""

    response: str

    @property
    def example(self) -> Example:
        return Example(self.messages, self.response)


def own_refusals(
    model: nn.Module,
    tokenizer: Any,
    requests: Any = "builtin",
    *,
    num: int = 128,
    batch_size: int = 32,
    max_new_tokens: int = RESPONSE_TOKENS,
    judge: str = "keyword",
    seed: int = 0,
    cache: bool = True,
) -> list[Refusal]:
    """
    Have the base model answer harmful requests, and keep the answers that refuse.

    Greedy answers, with adapters disabled; of each the first line, or as many as refuse by themselves. Under
    torch.distributed, where every rank must call it, each answers its share, and all return the same. The answers are
    kept in the folder of the calibrated safety modules and taken from there the next time, unless an adapter has whole
    modules of its own (modules_to_save) or the weights are sharded (FSDP2, DeepSpeed ZeRO-3).

    Args:
        model: The aligned model, with or without adapters; it is left as it was found.
        tokenizer: Its tokenizer, or a processor with one.
        requests: As `safety_data` of [`SaLoRAConfig`]. Rows that come with a response are taken as they are.
        num: How many to return at the most; no more are answered than needed.
        batch_size: Requests per generation.
        max_new_tokens: Longest answer.
        judge: Name of the judge that tells a refusal.
        seed: Of the order in which the requests are taken.
        cache: Whether to keep the answers for the next time.

    Returns:
        At least one refusal, in the order of their choice.

    Raises:
        CalibrationError: The model refuses none of the requests.
        DataError: The requests cannot be read, or are no conversations.
        ValueError: There is no judge of that name, or an adapter has changed the base model's weights.
    """
    check_number("num", num, 1)
    check_base_is_unchanged(model)
    if judge not in (known := judges()):
        raise ValueError(f"judge={judge!r} is not registered. Choose one of {', '.join(sorted(known))}.")
    tokenizer = tokenizer_of(tokenizer)
    examples = _conversations(requests, seed, num, vocabulary_size(model))
    asked = [example for example in examples if example.response is None]
    given = ((example.request, example.response) for example in examples if example.response is not None)
    warn_of_compliance(given, known[judge], "requests")
    prompts = dict(zip(map(id, asked), render_prompts(asked, tokenizer), strict=True))
    key = _key(model, tokenizer, list(prompts.values()), num, batch_size, max_new_tokens, judge) if cache else None
    answers = _load(key, len(asked))
    if answers is None:
        wanted = num - min(num, len(examples) - len(asked))
        with adapters_disabled(model), on_accelerator(model), evaluation_mode(model):
            answers = _refusing_answers(
                model, tokenizer, asked, list(prompts.values()), wanted, known[judge], batch_size, max_new_tokens
            )
        _store(key, answers)
    by_example = {id(example): text for example, text in zip(asked, answers, strict=False)}
    found = [
        Refusal(example.messages, response)
        for example in examples
        if (response := example.response or by_example.get(id(example)))
    ][:num]
    if not found:
        raise CalibrationError(
            f"The model refused none of {len(answers)} requests, so there is no refusal to train on. Use an aligned "
            "(instruction-tuned, safety-trained) model with its chat template, or give requests with the responses "
            "that it should keep."
        )
    if asked:
        refused = sum(map(bool, answers))
        tell(logger, "The base model refused %d of %d requests that it was asked.", refused, len(answers))
    return found


def refusals_digest(refusals: Sequence[Refusal]) -> str:
    """SHA-256 of the refusals in their order, as 64 hexadecimal digits."""
    rows = [[refusal.messages, refusal.response] for refusal in refusals]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def refusing_part(text: str, refuses: Callable[[str], bool], *, is_whole: bool) -> str:
    """
    As few of an answer's first lines as refuse by themselves, mostly one; nothing where the answer does not refuse.

    Args:
        text: The answer. What it thinks before is left out.
        refuses: Whether a text is a refusal.
        is_whole: Whether the answer has ended. Otherwise a last sentence that was cut short is left out.
    """
    text = without_reasoning(text).strip()
    if not text or not refuses(text):
        return ""
    lines = text.split("\n")
    parts = ("\n".join(lines[:count]).strip() for count in range(1, len(lines)))
    if part := next((part for part in parts if part and refuses(part)), None):
        return part
    ends = [] if is_whole else [match.end() for match in _SENTENCE_END.finditer(text)]
    return shorter if ends and refuses(shorter := text[: ends[-1]]) else text


def _conversations(requests: Any, seed: int, num: int, vocabulary: int | None) -> list[Example]:
    examples = load_examples(
        requests,
        option="requests",
        allow_missing_response=True,
        max_rows=max(MAX_ROWS, num),
        vocabulary=vocabulary,
    )
    chosen = []
    for example in select_examples(examples, len(examples), seed):
        if not isinstance(example, Example) or not example.messages:
            raise DataError(
                "requests: there are rows of token ids or of plain text among them. Give conversations: rows with "
                "`prompt` or `messages`."
            )
        chosen.append(example)
    return chosen


def _refusing_answers(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Example],
    prompts: Sequence[list[int]],
    wanted: int,
    judge: Judge,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The answers to the first requests, "" where they do not refuse, up to the `wanted`th that does."""
    rank, world_size = rank_and_world_size()
    answers: list[str] = []
    found = 0
    ends = end_tokens(model, tokenizer)
    for start in range(0, len(asked) if wanted else 0, batch_size * world_size):
        mine = range(start + rank * batch_size, min(start + (rank + 1) * batch_size, len(asked)))
        generated = []
        if mine:
            generated = greedy_answers(model, tokenizer, [prompts[i] for i in mine], max_new_tokens=max_new_tokens)
        shown = [
            refusing_part(_text(tokenizer, answer), partial(judge, asked[i].request), is_whole=answer[-1] in ends)
            for i, answer in zip(mine, generated, strict=True)
        ]
        answers += [text for share in gather_json(shown) for text in share]
        found = sum(map(bool, answers))
        if found >= wanted:
            break
    return answers


def _text(tokenizer: Any, answer: list[int]) -> str:
    # No file could hold half a character, as some tokenizers decode cut answers.
    return tokenizer.decode(answer, skip_special_tokens=True).strip().encode(errors="replace").decode()


def _key(model: nn.Module, tokenizer: Any, prompts: list[list[int]], *settings: Any) -> str | None:
    """A name for all that the answers depend on; None where they are not to be kept."""
    base = model
    if isinstance(model, PeftModel) and isinstance(model.base_model, BaseTuner):
        base = model.get_base_model()
    if not prompts or not _is_known_by_its_weights(base):
        return None
    decides = [
        version("salora-plugins"),
        _CUT,
        version("transformers"),
        model_fingerprint(base),
        sorted(end_tokens(model, tokenizer)),
        hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        *settings,
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _is_known_by_its_weights(base: nn.Module) -> bool:
    """Whether every weight is here and whole, and none is a copy that an adapter trains and that stays without it."""
    return not (
        any(isinstance(parameter, DTensor) or not parameter.numel() for parameter in base.parameters())
        or any(isinstance(module, AuxiliaryTrainingWrapper) for module in base.modules())
    )


def _load(key: str | None, most: int) -> list[str] | None:
    """The answers that were kept; under torch.distributed only if every rank finds them."""
    folder, found = cache_folder(), None
    if key is not None and folder is not None:
        try:
            values = json.loads((folder / f"{key}.refusals.json").read_text(encoding="utf-8"))
            if isinstance(values, list) and len(values) <= most and all(isinstance(value, str) for value in values):
                found = values
        except (OSError, ValueError):
            pass  # not there, or not whole: answered again
    return found if all(gather_json(found is not None)) else None


def _store(key: str | None, answers: list[str]) -> None:
    folder = cache_folder()
    if key is None or folder is None or rank_and_world_size()[0] != 0:
        return
    try:
        atomic_write(folder / f"{key}.refusals.json", json.dumps(answers).encode())
    except OSError as error:
        logger.warning("The refusals are not kept for the next run: %s.", error)
