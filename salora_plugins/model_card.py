"""The model card of a saved adapter: a section of README.md that is renewed with every save, and its metadata."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import atomic_write
from .safety_module import SafetyModule
from .saved_adapter import CARD_FILE, SavedAdapter, adapter_digest, card_mark, largest_shares, safety_shares
from .texts import markdown, markdown_code

if TYPE_CHECKING:
    from .config import SaLoRAConfig
    from .export import ExportReport
    from .projection import ProjectionReport

START, END = "<!-- salora-plugins: renewed with every save -->", "<!-- end of the part by salora-plugins -->"

_PAPER = "[SaLoRA](https://arxiv.org/abs/2501.01765)"
_PACKAGE = "[salora-plugins](https://pypi.org/project/salora-plugins/)"


# PEFT's own save_pretrained leaves our part of the card as it is, whatever it writes beside it.
_TO_CHECK = """Whoever trains or changes the weights without salora-plugins leaves this text as it is. `salora audit`
says whether they are still the weights that the certificate names, and measures those that are there."""

# The part between the markers. Not from a marker that lost its end to the end of another part.
_PART = re.compile(rf"{re.escape(START)}(?:(?!{re.escape(START)}).)*?{re.escape(END)}", re.DOTALL)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def write_card(
    folder: str | os.PathLike,
    base_model: str | None,
    section: str,
    *,
    tags: tuple[str, ...],
    replaces: bool = False,
) -> None:
    """
    Put a section into a folder's README.md, in the place of the one written before; all other text stays.

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
    data = card.data
    nameless = base_model is None or os.path.isdir(base_model) or _HUB_NAME.fullmatch(base_model) is None
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
    parts = iter([block])
    text, found = _PART.subn(lambda _: next(parts, ""), card.text)
    card.text = (text if found else f"{card.text.strip()}\n\n{block}").strip() + "\n"
    atomic_write(path, str(card).encode())


def write_training_card(folder: str | os.PathLike, config: SaLoRAConfig, safety_module: SafetyModule) -> None:
    """
    `write_card` with what a reader of a trained adapter should know: method, ranks, certificate, safety module, how to
    load it.

    Args:
        folder: The saved adapter; the certificate is computed from its files.
        config: The configuration that it was trained with.
        safety_module: The safety module that it was trained with.
    """
    saved = config.to_lora_config()
    sides = f"{_ranks(safety_module.bases)} output directions per layer"
    if safety_module.input_bases:
        sides += f", {_ranks(safety_module.input_bases)} input directions"
    rows = {
        "Rank": f"r = {config.r} trained, {saved.r} saved; scaling {_number(saved)}",
        "Start": f"`init={config.init!r}`",
        "Protected": f"{sides}, in {len(safety_module.bases)} layers",
        "Certificate": _certificate_of(Path(folder), safety_module),
        **_provenance(safety_module),
    }
    section = f"""
## SaLoRA

A LoRA adapter that was trained with {_PAPER} by {_PACKAGE}: its update of every target layer stays out of the
directions that carried the base model's refusals on the safety data. That does not promise that no refusal is lost.

{_table(rows)}

{_TO_CHECK}

It loads without salora-plugins, as any LoRA adapter:

```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

Merging it into bf16 weights rounds 1 to 12 % of the update back into the safety directions (measured on one small
model; the smaller the update, the more). Merge into float32 weights, or use it unmerged.

To train it further with its safety module in force (`salora.safetensors`, `salora_config.json`):

```python
from salora_plugins import load_for_training
model = load_for_training(base_model, "this folder or repository")
```
"""
    write_card(folder, config.base_model_name_or_path, section, tags=("lora", "salora"))


def export_section(report: ExportReport, safety_module: SafetyModule | None, digest: str) -> str:
    """
    The same for an adapter that [`export_adapter`] wrote.

    Args:
        report: What the export found.
        safety_module: That of the exported adapter; None for adapters of plain LoRA.
        digest: Of the exported weights.
    """
    saved_rank = max(module.saved_rank for module in report.modules.values())
    rows = {"Rank": f"{report.rank}, from {saved_rank}", "Lost": f"{report.lost_share:.1e} of the norm of the update"}
    if safety_module is not None and report.safety_shares is not None:
        rows |= {"Certificate": _certificate(report.safety_shares, digest), **_provenance(safety_module)}
        origin = f"A LoRA adapter with the safety module of {_PAPER} that is described below, brought"
        to_check = f"\n{_TO_CHECK}\n"
    else:
        origin, to_check = "A LoRA adapter, brought", ""
    return f"""
## Exported

{origin} to rank {report.rank} by {_PACKAGE} (`salora export`). It is for inference; train the original further.

{_table(rows)}
{to_check}
```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def projection_section(report: ProjectionReport, safety_module: SafetyModule, digest: str) -> str:
    """
    The same for an adapter that [`project_adapter`] wrote.

    Args:
        report: What the projection found.
        safety_module: The one that it was projected with.
        digest: Of the projected weights.
    """
    rows = {
        "Removed": f"{report.removed_share:.1%} of the norm of the update",
        "Certificate": _certificate(report.safety_shares, digest),
        **_provenance(safety_module),
    }
    if report.not_covered:
        names = [markdown(name) for name in report.not_covered[:5]]
        rows["Not protected"] = ", ".join(names) + (", ..." if len(report.not_covered) > 5 else "")
    return f"""
## Projected out of the safety directions

A LoRA adapter whose update was projected out of the directions that carried the base model's refusals on the safety
data, by {_PACKAGE} (`salora project`). It was trained without them. That does not promise that no refusal is lost.

{_table(rows)}

{_TO_CHECK}

```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def _certificate_of(folder: Path, safety_module: SafetyModule) -> str:
    try:
        shares = largest_shares(safety_shares(SavedAdapter.load(folder), safety_module))
        return _certificate(shares, str(adapter_digest(folder)))
    except FileNotFoundError:
        return "not computed, since the weights were not saved as safetensors"
    except ValueError as error:  # a remark on the card must not end a training run
        return f"not computed: {markdown(error)}"


def _certificate(shares: dict[str, float], digest: str) -> str:
    if not shares:
        return "not computed: the file holds no lora_A and lora_B of a linear layer"
    formulas = {"output": "‖U_Cᵀ ΔW‖ / ‖ΔW‖", "input": "‖ΔW V_C‖ / ‖ΔW‖"}
    parts = [f"{formulas[side]} ≤ {share:.1e}" for side, share in shares.items()]
    return f"{', '.join(parts)} in every target layer, for the {card_mark(digest)} and no others, computed from them"


def _provenance(safety_module: SafetyModule) -> dict[str, str]:
    """What the safety module says of itself; it may be another's, so that none of it is taken for Markdown."""
    known = safety_module.provenance
    data = str(known.get("safety_data", "unknown"))
    if os.path.isabs(data):
        data = os.path.basename(data)
    samples = f"{known.get('safety_samples', '?')} samples"
    if "requests" in known:
        samples += f" ({known.get('refusals', '?')} refusals to {known['requests']} requests)"
    digest = markdown_code(known.get("safety_data_sha256", "unknown"))
    method = f"{known.get('basis_method', 'unknown')}, {known.get('engine', 'unknown')} statistics"
    versions = ", ".join(f"{package} {number}" for package, number in known.get("versions", {}).items())
    return {
        "Safety module of": f"{markdown(_base_model(known))} (fingerprint `{safety_module.fingerprint}`)",
        "Safety data": f"{markdown(data)}, {markdown(samples)}, SHA-256 {digest}",
        "Positions": markdown(f"{known.get('positions_counted', '?')} of kind {known.get('safety_positions')!r}"),
        "Basis method": markdown(method),
        "Versions": markdown(versions),
    }


def _base_model(known: dict[str, Any]) -> str:
    name = str(known.get("base_model") or "an unnamed model")
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name


def _ranks(bases: dict[str, Any]) -> str:
    ranks = sorted({basis.shape[1] for basis in bases.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _number(lora: Any) -> str:
    scaling = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    return f"{scaling:g}" + (" (by module: see the patterns in the configuration)" if lora.alpha_pattern else "")


def _table(rows: dict[str, str]) -> str:
    cells = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
