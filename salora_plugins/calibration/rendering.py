"""Chat examples to token ids, with the chat template where the tokenizer has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import Example


# Stands for the content of a turn, to see what a chat template writes around it.
_MARKER = "salora-content"


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of what stands before the response, up to where the model begins to answer.

    Args:
        example: its response is not looked at.
        tokenizer: with or without a chat template.
        name: what to call the example in messages.

    Raises:
        DataError: the chat template refuses the conversation, or there is none for one of several turns.
    """
    uses_template = _uses_template(example, tokenizer, name)
    return _encode(_prompt_text(example, uses_template, tokenizer, name), tokenizer, uses_template)


def prompt_and_response_ids(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[int], int]:
    """Token ids of the whole exchange, with the end of turn, and how many of them precede the response.

    These are what the prompt and the whole have in common at their beginning; a token that spans the border
    belongs to the response.
    """
    uses_template = _uses_template(example, tokenizer, name)
    prompt = _prompt_text(example, uses_template, tokenizer, name)
    if uses_template:
        whole = _render_answered(example, example.response, tokenizer, name)
        if not whole.startswith(prompt):
            # Answered, the template writes the prompt differently than when it asks for an answer: DeepSeek-R1's
            # leaves out `<think>`, Mistral's moves the system turn. Another answer shows where this one begins.
            before = _render_answered(example, _MARKER, tokenizer, name).partition(_MARKER)[0]
            prompt = before if whole.startswith(before) else prompt
        # What a template writes behind the end of the turn (ChatML: a line break), no model generates.
        stripped = whole.rstrip()
        if stripped.endswith(tuple(filter(None, tokenizer.all_special_tokens))):
            whole = stripped
    else:
        whole = prompt + example.response
        if tokenizer.eos_token and not whole.endswith(tokenizer.eos_token):
            whole += tokenizer.eos_token
    whole_ids = _encode(whole, tokenizer, uses_template)
    return whole_ids, common_prefix_length(_encode(prompt, tokenizer, uses_template), whole_ids)


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _uses_template(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    if not example.messages or _is_rendered(example, tokenizer, name):
        return False
    if not tokenizer.chat_template and not _is_single_request(example):
        raise DataError(
            f"{name} is a conversation of several turns, and the tokenizer has no chat template to render "
            "it. Set `tokenizer.chat_template`, or give `prompt` and `completion` as plain text."
        )
    return bool(tokenizer.chat_template)


def _is_single_request(example: Example) -> bool:
    return len(example.messages) == 1 and example.messages[0]["role"] == "user"


def _is_rendered(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the request went through the chat template already, as in data made for plain-text training."""
    if not tokenizer.chat_template or not _is_single_request(example):
        return False
    for options in ({}, template_options(tokenizer)):
        rendered = _render(({"role": "user", "content": _MARKER},), tokenizer, name, options=options)
        end_of_request = rendered.rpartition(_MARKER)[2].strip()
        if end_of_request and example.request.rstrip().endswith(end_of_request):
            return True
    return False


def _prompt_text(example: Example, uses_template: bool, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    return _render(example.messages, tokenizer, name) if uses_template else example.request


def _render_answered(example: Example, response: str, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    answer = {"role": "assistant", "content": response}
    return _render((*example.messages, answer), tokenizer, name, generation_prompt=False)


def template_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a chat template is given besides the conversation."""
    # Without its thinking, a reasoning model's answer begins at once: the response is what the user reads.
    return {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}


def _render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    generation_prompt: bool = True,
    options: dict[str, Any] | None = None,
) -> str:
    """A conversation as text, up to where the model is to answer if `generation_prompt`."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **(template_options(tokenizer) if options is None else options),
        )
    except (TemplateError, ValueError) as error:
        roles = [message["role"] for message in messages]
        if roles[:2] in (["system", "user"], ["developer", "user"]):
            # Templates such as Gemma's refuse a system turn; their models read it in front of the request.
            system, user = messages[:2]
            merged = user | {"content": f"{system['content']}\n\n{user['content']}"}
            return _render(
                (merged, *messages[2:]), tokenizer, name, generation_prompt=generation_prompt, options=options
            )
        raise DataError(
            f"The tokenizer's chat template refuses {name}: {error} (roles: {', '.join(roles)}). Change the "
            "conversation, or set another `tokenizer.chat_template`."
        ) from error


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, has_special_tokens: bool) -> list[int]:
    """Token ids; a chat template writes the special tokens itself, plain text gets those of the tokenizer."""
    if has_special_tokens or (tokenizer.bos_token and text.startswith(tokenizer.bos_token)):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    input_ids = tokenizer(text)["input_ids"]
    if tokenizer.eos_token:
        # Some tokenizers close every text, even a prompt that is to be continued.
        closed = [tokenizer.eos_token_id] * (1 + text.endswith(tokenizer.eos_token))
        if input_ids[-len(closed) :] == closed:
            return input_ids[:-1]
    return input_ids
