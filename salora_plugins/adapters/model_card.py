"""The model card of a saved adapter: a section of README.md that is renewed with every save, and its metadata."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..inspection import is_without_safety_data, leak_line, positions_counted
from ..ranks import Side
from ..safety_module import SafetyModule
from ..support.files import atomic_write
from ..support.hub import is_model_name
from ..support.numbers import tiny_share
from ..support.texts import markdown, markdown_code
from .digest import card_mark
from .saved import CARD_FILE

START, END = "<!-- salora-plugins: renewed with every save -->", "<!-- end of the part by salora-plugins -->"

PAPER = "[SaLoRA](https://arxiv.org/abs/2501.01765)"
PACKAGE = "[salora-plugins](https://pypi.org/project/salora-plugins/)"

TO_LOAD = """```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```"""

# PEFT's own save_pretrained leaves our part of the card as it is, whatever it writes beside it.
TO_CHECK = """Whoever trains or changes the weights without salora-plugins leaves this text as it is. `salora audit`
says whether they are still the weights that the certificate names, and measures those that are there."""

# The part between the markers. Not from a marker that lost its end to the end of another part.
_PART = re.compile(rf"{re.escape(START)}(?:(?!{re.escape(START)}).)*?{re.escape(END)}", re.DOTALL)


# What an empty field of the hub's template for cards holds, which PEFT writes into every folder; and the heading of
# what PEFT itself adds behind it.
_UNFILLED, _OF_PEFT = "[More Information Needed]", "### Framework versions"
_HEADING = re.compile("(#+) ")
_PLACE = "\0"  # of our part, while the text around it is looked at


def write_card(
    folder: str | os.PathLike,
    base_model: str | None,
    section: str,
    *,
    tags: tuple[str, ...],
    replaces: bool = False,
) -> None:
    """
    Put a section into a folder's README.md: in the place of the one written before, or at the beginning, but behind a
    text that has a title. Other text stays; the empty fields of the hub's template are taken away.

    Args:
        folder: A saved adapter.
        base_model: Name of the base model. What is no name of the hub, such as a folder of this machine, is left out of
            the metadata, which the hub would refuse.
        section: Markdown.
        tags: Added to those that the card has.
        replaces: Whether the card is that of another adapter, which named its own base model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder) / CARD_FILE
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    except Exception as error:  # of several types, from the YAML parser's to the library's own
        raise ValueError(f"{path} is not a model card ({error}). Mend its first lines, or take it away.") from error
    data: Any = card.data  # ModelCardData, which the library annotates as its base class
    nameless = base_model is None or os.path.isdir(base_model) or not is_model_name(base_model)
    if nameless:
        data.base_model = None
    elif replaces or not data.base_model:
        data.base_model = base_model
    data.library_name = "peft"
    gone = {"salora"} if replaces else set()
    kept = {
        tag
        for tag in data.tags or []
        if tag not in gone and not ((nameless or replaces) and tag.startswith("base_model:adapter:"))
    }
    data.tags = sorted({*kept, *tags})
    block = f"{START}\n{section.strip()}\n{END}"
    parts = iter([_PLACE])
    text, found = _PART.subn(lambda _: next(parts, ""), card.text)
    text = _without_placeholders(text).strip()
    if not found:
        text = f"{text}\n\n{_PLACE}" if text.startswith("# ") else f"{_PLACE}\n\n{text}"
    card.text = text.replace(_PLACE, block).strip() + "\n"
    atomic_write(path, str(card).encode())


def _without_placeholders(text: str) -> str:
    """A card without the lines of the hub's template that nobody has filled in, nor the headings above them."""
    if _UNFILLED not in text:
        return text
    from huggingface_hub import ModelCard, ModelCardData

    of_template = set(ModelCard.from_template(ModelCardData()).text.splitlines()) - {""}
    lines = text.splitlines()
    kept: list[str] = []
    dropped = False
    for number, line in enumerate(lines):
        if line in of_template and not _is_filled(line, lines[number + 1 :], of_template):
            dropped = True
        elif line or not (dropped and kept and not kept[-1]):  # no second empty line where something stood between
            kept.append(line)
            dropped = dropped and not line
    return "\n".join(kept)


def _is_filled(line: str, below: list[str], of_template: set[str]) -> bool:
    """Whether a line of the template has a text of somebody's in its section, which it is to stand above."""
    heading = _HEADING.match(line)
    if _UNFILLED in line or line.startswith("<!--") or (heading and len(heading[1]) == 1):
        return False
    for other in below:
        ends = _HEADING.match(other)
        if other == _OF_PEFT or (ends and (heading is None or len(ends[1]) <= len(heading[1]))):
            return False
        if other and other not in of_template:
            return True
    return False


def certificate_row(shares: Mapping[Side, float], digest: str) -> str:
    """What a card says of the largest shares in the safety directions, and of which weights."""
    if not shares:
        return "not computed: the file holds no lora_A and lora_B of a linear layer"
    formulas: dict[Side, str] = {"output": "‖U_Cᵀ ΔW‖ / ‖ΔW‖", "input": "‖ΔW V_C‖ / ‖ΔW‖"}
    parts = [f"{formulas[side]} ≤ {tiny_share(share)}" for side, share in shares.items()]
    return f"{', '.join(parts)} in every target layer, for the {card_mark(digest)} and no others, computed from them"


def provenance_rows(safety_module: SafetyModule) -> dict[str, str]:
    """What the safety module says of itself; it may be another's, so that none of it is taken for Markdown."""
    known = safety_module.provenance
    sources = [(_name_only(name), number) for name, number in (known.get("safety_sources") or {}).items()]
    data = ", ".join(name for name, _ in sources) or _name_only(known.get("safety_data", "unknown"))
    samples = f"{known.get('safety_samples', '?')} samples"
    if sources:
        samples += f" ({', '.join(f'{number} of {name}' for name, number in sources)})"
    if "requests" in known:
        samples += f" ({known.get('refusals', '?')} refusals to {known['requests']} requests)"
    digest = markdown_code(known.get("safety_data_sha256", "unknown"))
    method = f"{known.get('basis_method', 'unknown')}, {known.get('engine', 'unknown')} statistics"
    if "engine" not in known and is_without_safety_data(known):
        method = str(known.get("basis_method", "unknown"))
    base_model = markdown(_name_only(known.get("base_model") or "an unnamed model"))
    versions = ", ".join(f"{package} {number}" for package, number in known.get("versions", {}).items())
    return {
        "Safety module of": f"{base_model} (fingerprint `{safety_module.fingerprint}`)",
        **_of_other_sources(known),
        **(
            {}
            if is_without_safety_data(known)
            else {
                "Safety data": f"{markdown(data)}, {markdown(samples)}, SHA-256 {digest}",
                "Positions": markdown(positions_counted(known)),
            }
        ),
        **({"Leak": markdown(leak)} if (leak := _leak(known)) else {}),
        "Basis method": markdown(method),
        "Versions": markdown(versions),
    }


def _of_other_sources(known: Mapping[str, Any]) -> dict[str, str]:
    """What a basis method read beside the safety data."""
    rows = {}
    if "unaligned_model" in known:
        digest = markdown_code(known.get("unaligned_sha256", "unknown"))
        rows["Unaligned model"] = f"{markdown(_name_only(known['unaligned_model']))}, fingerprint {digest}"
    if "sae" in known:
        digest = markdown_code(known.get("contrastive_data_sha256", "unknown"))
        data, pairs = _name_only(known.get("contrastive_data")), known.get("contrastive_samples", "?")
        rows["Sparse autoencoders"] = markdown(_name_only(known["sae"]))
        rows["Contrastive data"] = f"{markdown(data)}, {markdown(f'{pairs} pairs')}, SHA-256 {digest}"
    if "utility_data" in known:
        digest = markdown_code(known.get("utility_data_sha256", "unknown"))
        data, samples = _name_only(known["utility_data"]), known.get("utility_samples", "?")
        rows["Utility data"] = f"{markdown(data)}, {markdown(f'{samples} samples')}, SHA-256 {digest}"
    return rows


def _name_only(source: Any) -> str:
    """Of a path on the machine that it was on, the last part."""
    return os.path.basename(os.path.normpath(str(source))) if os.path.isabs(str(source)) else str(source)


def _leak(known: Mapping[str, Any]) -> str:
    line = leak_line(known).removeprefix("Leak: ").removeprefix("Leak ")
    return line[:1].upper() + line[1:]


def table(rows: Mapping[str, str]) -> str:
    """A Markdown table of two columns, whose cells are Markdown already."""
    cells = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
