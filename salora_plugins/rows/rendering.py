"""
Chat examples to the token ids that a model sees, and where the response lies among them.

For everything in this package: calibration, generation, losses, margins. With a chat template the ids are those of
`apply_chat_template` itself. A rendered text that is encoded again can have others: some tokenizers, such as
mistral-common's, have control tokens that no text stands for.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..support.callers import argument_of_caller
from .errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .examples import Example

# Stand for the content of a turn, to see what is written around it. Their beginnings differ, so that no response begins
# as both do.
_MARKER, _OTHER_MARKER = "salora-content", "Another content"

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What chat templates that write today's date are told, so that the same rows are the same ids every day."""


class Renderer:
    """
    Renders conversations, or plain text, with one tokenizer.

    What there is to find out about its chat template is found out once, so that a renderer is for many rows.

    Args:
        tokenizer: With or without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._has_template = has_template(tokenizer)
        self._options = template_options(tokenizer)
        self._reads_parts = self._reads_parts_alone()
        self._requests: list[tuple[str, str, str, list[int]]] | None = None

    def prompt_ids(self, example: Example, name: str) -> list[int]:
        """Token ids of what stands before the response, up to where the model begins to answer.

        Args:
            example: its response is not looked at.
            name: what to call the example in messages.

        Raises:
            DataError: the chat template refuses the conversation, or there is none for one of several turns with a
                response.
        """
        if self._uses_template(example, name):
            return self._template_ids(example.messages, name, add_generation_prompt=True)
        # Without a template a request is plain text that is to be continued, and so are several turns.
        turns = [text for message in example.messages if (text := message.get("content"))]
        return _encode("\n\n".join(turns) or example.request, self._tokenizer)

    def prompt_and_response_ids(self, example: Example, name: str) -> tuple[list[int], int]:
        """Token ids of the whole exchange, and how many of them precede the response.

        The response is what a model that is asked would write: from where it begins to answer up to the token that ends
        its turn, with that token. What a template writes behind it (ChatML: a line break) is left out. A token that
        spans the border to the prompt belongs to the response.

        Args:
            example: with a response.
            name: as for `prompt_ids`.

        Raises:
            DataError: as `prompt_ids`, or there is no response, or it cannot be told apart.
        """
        if example.response is None:
            raise DataError(f"{name} has no response")
        prompt = self.prompt_ids(example, name)
        if not self._uses_template(example, name):
            text, end = example.request + example.response, self._tokenizer.eos_token
            if end and not text.endswith(end):
                text += end
            whole = _encode(text, self._tokenizer)
            return whole, common_prefix_length(prompt, whole)
        whole = self._answered_ids(example.messages, example.response, name)
        start = len(prompt)
        if whole[:start] != prompt:
            # Answered, the template writes the prompt differently than when it asks for an answer: DeepSeek-R1's leaves
            # out `<think>`, Mistral's moves the system turn. Other answers show where this one begins.
            others = [self._answered_ids(example.messages, text, name) for text in (_MARKER, _OTHER_MARKER)]
            start = min(common_prefix_length(other, whole) for other in others)
            if start + 1 < self._end_of_request(example.messages, example.response, whole, name):
                start = len(whole)
        if start == len(whole):
            raise DataError(
                f"{name}: the tokenizer's chat template renders the conversation in such a way that the tokens of the "
                "response cannot be told apart from those of the prompt. Give rows with input_ids and labels, or set "
                "another `tokenizer.chat_template`."
            )
        return whole[: _end_of_turn(whole, start, self._tokenizer)], start

    def headers(self, *requests: str) -> tuple[tuple[int, ...], ...]:
        """
        What the template writes behind a request up to the answer, as token ids, once for each of its forms that has
        any: the tokens at the end that these requests, none of which ends as another does, have in common.

        Raises:
            DataError: The template refuses a lone request, and one behind a system turn.
        """
        if not self._has_template:
            return ()
        found = []
        for form in self._forms():
            first, *others = (self._request_ids(request, form)[::-1] for request in requests)
            common = min(common_prefix_length(first, other) for other in others)
            found.append(tuple(first[:common][::-1]))
        return tuple(form for form in dict.fromkeys(found) if form)

    def _request_ids(self, request: str, form: Mapping[str, Any]) -> list[int]:
        turn = {"role": "user", "content": request}
        try:
            return self._template_ids((turn,), "a lone request", True, form)
        except DataError:  # some want a system turn
            system = {"role": "system", "content": _OTHER_MARKER}
            return self._template_ids((system, turn), "a request behind a system turn", True, form)

    def _forms(self) -> list[dict[str, Any]]:
        """The options of every form of the template: with what it is given here, and as it is by itself."""
        forms = [self._options]
        if "enable_thinking" in self._options:
            forms.append({key: value for key, value in self._options.items() if key != "enable_thinking"})
        return forms

    def _reads_parts_alone(self) -> bool:
        """
        Whether the template reads contents that are lists of parts alone, as those of some vision-language models do:
        of a text such a template writes nothing, without an error.
        """
        user = {"role": "user", "content": _MARKER}
        for messages in ([user], [{"role": "system", "content": _OTHER_MARKER}, user]):
            if self._writes_request(messages):
                return False
            if self._writes_request(_with_parts(messages)):
                return True
        return False

    def _writes_request(self, messages: list[dict[str, Any]]) -> bool:
        if not self._tokenizer.chat_template:
            return True  # by code, which knows texts, or not at all
        try:
            return _MARKER in self._tokenizer.apply_chat_template(messages, tokenize=False, **self._options)
        except Exception:  # a template raises what it likes
            return False

    def _uses_template(self, example: Example, name: str) -> bool:
        if not example.messages or self._is_rendered(example, name):
            return False
        if not self._has_template and example.response is not None and not _is_single_request(example):
            raise DataError(
                f"{name} is a conversation of several turns, and the tokenizer has no chat template to render "
                "it. Set `tokenizer.chat_template`, or give `prompt` and `completion` as plain text."
            )
        return self._has_template

    def _is_rendered(self, example: Example, name: str) -> bool:
        """
        Whether the request went through the chat template already, as in data made for plain-text training.

        Raises:
            DataError: It did, and its control tokens cannot be read from text.
        """
        if not self._has_template or not _is_single_request(example):
            return False
        for begin, end, rendered, ids in self._rendered_requests(name):
            request = example.request.rstrip()
            # The end alone may be what is asked about, or stand there to mislead the model.
            if end and request.endswith(end) and begin in request.removesuffix(end):
                if list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"]) != ids:
                    raise DataError(
                        f"{name}: it ends with {end!r}, as if it were rendered already, and the tokenizer does not "
                        "read its control tokens from text. Give the conversation as `messages`."
                    )
                return True
        return False

    def _rendered_requests(self, name: str) -> list[tuple[str, str, str, list[int]]]:
        """
        What is written in front of a request and behind it, in every form of the template; and a whole one as text and
        as ids.
        """
        if self._requests is None:
            conversation = ({"role": "user", "content": _MARKER},)
            found = []
            for form in self._forms():
                ids = self._template_ids(conversation, name, True, form)
                rendered = self._as_text(conversation, name, form)
                before, _, behind = rendered.rpartition(_MARKER)
                found.append((self._in_front(before, name, form), behind.strip(), rendered, ids))
            self._requests = found
        return self._requests

    def _in_front(self, before: str, name: str, form: Mapping[str, Any]) -> str:
        """
        What is written directly in front of any request: of what stands before a lone one, the part that does not
        depend on the system turn.
        """
        with_system = ({"role": "system", "content": _OTHER_MARKER}, {"role": "user", "content": _MARKER})
        try:
            other = self._as_text(with_system, name, form).rpartition(_MARKER)[0]
        except DataError:
            other = before
        common = common_prefix_length(before[::-1], other[::-1])
        return before[len(before) - common :].strip() or before.removeprefix(self._tokenizer.bos_token or "").strip()

    def _as_text(self, messages: Sequence[dict[str, Any]], name: str, form: Mapping[str, Any]) -> str:
        if self._tokenizer.chat_template:
            return self._apply_template(messages, name, True, form, tokenize=False)
        return str(self._tokenizer.decode(self._template_ids(messages, name, True, form)))

    def _answered_ids(self, messages: Sequence[dict[str, Any]], response: str, name: str) -> list[int]:
        """A finished conversation."""
        conversation = (*messages, {"role": "assistant", "content": response})
        if self._tokenizer.chat_template:
            return self._template_ids(conversation, name)
        try:
            return self._template_ids(conversation, name)
        except DataError:
            # mistral-common renders only what a model is to answer or to go on with; it ends its turns by this token.
            unfinished = self._template_ids(conversation, name, options={"continue_final_message": True})
            end = self._tokenizer.eos_token_id
            return unfinished if end is None else [*unfinished, end]

    def _end_of_request(self, messages: Sequence[dict[str, Any]], response: str, whole: list[int], name: str) -> int:
        """How many tokens of a whole exchange end with the request's last: another request changes none behind."""
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            return 0
        others = list(messages)
        others[last] = others[last] | {"content": _MARKER}
        changed = self._answered_ids(others, response, name)
        return len(whole) - common_prefix_length(changed[::-1], whole[::-1])

    def _template_ids(
        self,
        messages: Sequence[dict[str, Any]],
        name: str,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation, up to where the model is to answer if `add_generation_prompt`."""
        ids = self._apply_template(messages, name, add_generation_prompt, options, tokenize=True)
        return list(ids["input_ids"] if isinstance(ids, Mapping) else ids)

    def _apply_template(
        self,
        messages: Sequence[dict[str, Any]],
        name: str,
        add_generation_prompt: bool,
        options: Mapping[str, Any] | None,
        *,
        tokenize: bool,
    ) -> Any:
        options = self._options if options is None else options
        try:
            return self._tokenizer.apply_chat_template(
                _with_parts(messages) if self._reads_parts else list(messages),
                tokenize=tokenize,
                add_generation_prompt=add_generation_prompt,
                return_dict=False,
                **options,
            )
        except Exception as error:  # a template raises what it likes
            roles = [message["role"] for message in messages]
            if roles[:2] in (["system", "user"], ["developer", "user"]):
                # Templates such as Gemma's refuse a system turn; their models read it in front of the request.
                system, user = messages[:2]
                merged = user | {"content": f"{system.get('content')}\n\n{user.get('content')}"}
                return self._apply_template(
                    (merged, *messages[2:]), name, add_generation_prompt, options, tokenize=tokenize
                )
            raise DataError(
                f"The tokenizer's chat template refuses {name}: {type(error).__name__}: {error} (roles: "
                f"{', '.join(roles)}). Change the conversation, or set another `tokenizer.chat_template`."
            ) from error


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer renders conversations: by a chat template, or by code of its own, as mistral-common's do."""
    return bool(tokenizer.chat_template) or _renders_by_code(tokenizer)


def template_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a chat template is given besides the conversation."""
    template = str(tokenizer.chat_template)
    options: dict[str, Any] = {}
    if "enable_thinking" in template:
        # Without its thinking, a reasoning model's answer begins at once: the response is what the user reads.
        options["enable_thinking"] = False
    if "strftime_now" in template:
        options["chat_template"] = _with_a_fixed_date(tokenizer.get_chat_template())
    return options


def _with_a_fixed_date(template: str) -> str:
    """
    A chat template that takes every day for `TEMPLATE_DATE`: a macro stands before the function that transformers gives
    to templates. The function itself cannot be handed over as an argument, which transformers makes plain data.
    """
    written = {f"%{letter}": TEMPLATE_DATE.strftime(f"%{letter}") for letter in "aAbBcdFHIjmMpSTuUVwWxXyY"}
    # "%-d" is the day without a zero in front, where the platform knows it.
    written |= {f"%-{letter}": written[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSUVWy"}
    replaced = "".join(f" | replace({directive!r}, {text!r})" for directive, text in written.items())
    # A block at the end of a line, which jinja removes with its line break: the rest renders as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, with the chat template that the processor renders with; a tokenizer as it is."""
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "apply_chat_template"):
        return processing_class
    template = getattr(processing_class, "chat_template", None)
    if template and template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's chat template, as 64 hexadecimal digits; of nothing where it has none."""
    return hashlib.sha256(str(getattr(tokenizer, "chat_template", None) or "").encode()).hexdigest()


def trainer_tokenizer() -> Any:
    """
    What a trainer that is being made now renders with: PEFT hands a tuner only its configuration.

    Returns:
        The tokenizer of a trainer of transformers whose `__init__` is running; None where there is no such, or where it
        has not loaded one yet, which it then takes from the model's own folder.
    """
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    found = argument_of_caller(
        "processing_class", "__init__", lambda variables: isinstance(variables.get("self"), module.Trainer)
    )
    tokenizer = tokenizer_of(found)
    return tokenizer if hasattr(tokenizer, "apply_chat_template") else None  # such as an image processor


def _renders_by_code(tokenizer: PreTrainedTokenizerBase) -> bool:
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is not None and own is not PreTrainedTokenizerBase.apply_chat_template


def _with_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every text as a list of one part."""
    return [
        message | {"content": [{"type": "text", "text": text}]}
        if isinstance(text := message.get("content"), str)
        else message
        for message in messages
    ]


def _is_single_request(example: Example) -> bool:
    return len(example.messages) == 1 and example.messages[0]["role"] == "user"


def _end_of_turn(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the response that begins at `start` ends: behind the token that ends it, by which generation stops, too."""
    special = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if isinstance(added, Mapping):
        special |= {token_id for token_id, token in added.items() if token.special}
    if tokenizer.eos_token_id in ids[start:]:
        end = ids.index(tokenizer.eos_token_id, start)
        # Phi's templates end the turn by a token of its own, and then the whole conversation by this one.
        before = next((i for i in range(end - 1, start, -1) if str(tokenizer.decode([ids[i]])).strip()), start)
        return before + 1 if before > start and ids[before] in special else end + 1
    # The template ends turns with another token than the tokenizer names.
    last = max((index for index in range(start, len(ids)) if ids[index] in special), default=None)
    return len(ids) if last is None or str(tokenizer.decode(ids[last + 1 :])).strip() else last + 1


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of plain text, with the tokenizer's own token of the beginning."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    input_ids = tokenizer(text)["input_ids"]
    if tokenizer.eos_token:
        # Some tokenizers close every text, even a prompt that is to be continued.
        closed = [tokenizer.eos_token_id] * (1 + text.endswith(tokenizer.eos_token))
        if input_ids[-len(closed) :] == closed:
            return input_ids[:-1]
    return input_ids
