"""What MkDocs does not know of our docstrings: names in the form of the Hugging Face libraries, [`~peft.LoraConfig`]."""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(r"\[<code>~?([\w.]+)</code>\]")


def on_page_content(html: str, **kwargs: Any) -> str:
    """The name alone: most are of other libraries, to whose pages there is no link without a network."""
    return _NAME.sub(r"<code>\1</code>", html)
