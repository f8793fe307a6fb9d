"""What MkDocs does not know of our pages and docstrings."""

from __future__ import annotations

import posixpath
import re
from typing import Any

# The Hugging Face libraries' form of a name in a docstring, [`~peft.LoraConfig`].
_NAME = re.compile(r"\[<code>~?([\w.]+)</code>\]")
# And of a type, (`int` or `float`, defaults to 32), which is code already.
_TYPE = re.compile(r"<code>(`[^<]*)</code>")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links to files outside of docs/, which work where the repository is read, are their text only."""
    folder = posixpath.dirname(page.file.src_uri)

    def text_where_it_leaves(link: re.Match) -> str:
        leaves = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if leaves else link[0]

    return _LINK.sub(text_where_it_leaves, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """The name alone: most are of other libraries, to whose pages there is no link without a network."""
    html = _TYPE.sub(lambda kind: f"<code>{kind[1].replace('`', '')}</code>", html)
    return _NAME.sub(r"<code>\1</code>", html)
