"""The model card of a saved adapter: a section of README.md that is renewed with every save, and its metadata."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import atomic_write
from .safety_module import SafetyModule
from .saved_adapter import WEIGHTS_FILE, SavedAdapter, largest_shares, safety_shares

if TYPE_CHECKING:
    from .config import SaLoRAConfig
    from .export import ExportReport
    from .projection import ProjectionReport

CARD_FILE = "README.md"
START, END = "<!-- salora-plugins: renewed with every save -->", "<!-- end of the part by salora-plugins -->"

_PAPER = "[SaLoRA](https://arxiv.org/abs/2501.01765)"
_PACKAGE = "[salora-plugins](https://pypi.org/project/salora-plugins/)"


def write_card(folder: str | os.PathLike, base_model: str | None, section: str, *, tags: tuple[str, ...]) -> None:
    """
    Put a section into a folder's README.md, in the place of the one written before; all other text stays.

    Args:
        folder: A saved adapter.
        base_model: Name of the base model. A folder of this machine is left out of the metadata, which the hub refuses.
        section: Markdown.
        tags: Added to those that the card has.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder) / CARD_FILE
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data = card.data
    if is_local := base_model is None or os.path.isdir(base_model):
        data.base_model = None
    elif not data.base_model:
        data.base_model = base_model
    data.library_name = "peft"
    kept = [tag for tag in data.tags or [] if not (is_local and tag.startswith("base_model:adapter:"))]
    data.tags = sorted({*kept, *tags})
    block = f"{START}\n{section.strip()}\n{END}"
    before = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    text, found = before.subn(lambda _: block, card.text, count=1)
    card.text = text if found else f"{card.text.strip()}\n\n{block}\n".lstrip()
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

It loads without salora-plugins, as any LoRA adapter:

```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

To train it further with its safety module in force (`salora.safetensors`, `salora_config.json`):

```python
from salora_plugins import load_for_training
model = load_for_training(base_model, "this folder or repository")
```
"""
    write_card(folder, config.base_model_name_or_path, section, tags=("lora", "salora"))


def export_section(report: ExportReport, safety_module: SafetyModule | None) -> str:
    """
    The same for an adapter that [`export_adapter`] wrote.

    Args:
        report: What the export found.
        safety_module: That of the exported adapter; None for adapters of plain LoRA.
    """
    saved_rank = max(module.saved_rank for module in report.modules.values())
    rows = {"Rank": f"{report.rank}, from {saved_rank}", "Lost": f"{report.lost_share:.1e} of the norm of the update"}
    if safety_module is not None and report.safety_shares is not None:
        rows |= {"Certificate": _certificate(report.safety_shares), **_provenance(safety_module)}
        origin = f"A LoRA adapter with the safety module of {_PAPER} that is described below, brought"
    else:
        origin = "A LoRA adapter, brought"
    return f"""
## Exported at a lower rank

{origin} to a lower rank by {_PACKAGE} (`salora export`). It is for inference; the original can be trained further.

{_table(rows)}

```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def projection_section(report: ProjectionReport, safety_module: SafetyModule) -> str:
    """
    The same for an adapter that [`project_adapter`] wrote.

    Args:
        report: What the projection found.
        safety_module: The one that it was projected with.
    """
    rows = {
        "Removed": f"{report.removed_share:.1%} of the norm of the update",
        "Certificate": _certificate(report.safety_shares),
        **_provenance(safety_module),
    }
    if report.not_covered:
        rows["Not protected"] = ", ".join(report.not_covered[:5]) + (", ..." if len(report.not_covered) > 5 else "")
    return f"""
## Projected out of the safety directions

A LoRA adapter whose update was projected out of the directions that carried the base model's refusals on the safety
data, by {_PACKAGE} (`salora project`). It was trained without them. That does not promise that no refusal is lost.

{_table(rows)}

```python
model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def _certificate_of(folder: Path, safety_module: SafetyModule) -> str:
    if not (folder / WEIGHTS_FILE).is_file():
        return "not computed, since the weights were not saved as safetensors"
    try:
        return _certificate(largest_shares(safety_shares(SavedAdapter.load(folder), safety_module)))
    except ValueError as error:  # a remark on the card must not end a training run
        return f"not computed: {error}"


def _certificate(shares: dict[str, float]) -> str:
    formulas = {"output": "‖U_Cᵀ ΔW‖ / ‖ΔW‖", "input": "‖ΔW V_C‖ / ‖ΔW‖"}
    parts = [f"{formulas[side]} ≤ {share:.1e}" for side, share in shares.items()]
    return f"{', '.join(parts)} in every target layer, computed from the saved files"


def _provenance(safety_module: SafetyModule) -> dict[str, str]:
    known = safety_module.provenance
    data = str(known.get("safety_data", "unknown"))
    if os.path.isabs(data):
        data = os.path.basename(data)
    samples = f"{known.get('safety_samples', '?')} samples"
    if "requests" in known:
        samples += f" ({known['refusals']} refusals to {known['requests']} requests)"
    return {
        "Safety module of": f"{_base_model(known)} (fingerprint `{safety_module.fingerprint}`)",
        "Safety data": f"{data}, {samples}, SHA-256 `{known.get('safety_data_sha256', 'unknown')}`",
        "Positions": f"{known.get('positions_counted', '?')} of kind {known.get('safety_positions', 'unknown')!r}",
        "Basis method": f"{known.get('basis_method', 'unknown')}, {known.get('engine', 'unknown')} statistics",
        "Versions": ", ".join(f"{package} {number}" for package, number in known.get("versions", {}).items()),
    }


def _base_model(known: dict[str, Any]) -> str:
    name = known.get("base_model") or "an unnamed model"
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name


def _ranks(bases: dict[str, Any]) -> str:
    ranks = sorted({basis.shape[1] for basis in bases.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _number(lora: Any) -> str:
    scaling = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    return f"{scaling:g}" + (" (by module: see the patterns in the configuration)" if lora.alpha_pattern else "")


def _table(rows: dict[str, str]) -> str:
    cells = [f"| {name} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *cells])
