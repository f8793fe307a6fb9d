"""The section of the model card of an adapter that was trained with a safety module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import SaLoRAConfig
from ..inspection import what_directions
from ..safety_module import SafetyModule
from ..support.texts import markdown
from .certificate import largest_shares, safety_shares
from .digest import adapter_digest
from .model_card import PACKAGE, PAPER, TO_CHECK, TO_LOAD, certificate_row, provenance_rows, table, write_card
from .saved import SavedAdapter


def write_training_card(
    folder: str | os.PathLike, config: SaLoRAConfig, safety_module: SafetyModule, notes: Mapping[str, str]
) -> None:
    """
    `write_card` with what a reader of a trained adapter should know: method, ranks, certificate, safety module, how to
    load it.

    Args:
        folder: The saved adapter; the certificate is computed from its files.
        config: The configuration that it was trained with.
        safety_module: The safety module that it was trained with.
        notes: What it was trained on beside the task: name -> text.
    """
    saved = config.to_lora_config()
    if not safety_module.protects:
        _write_card_of_sails(folder, config, safety_module, notes)
        return
    numbers = {side: _ranks(found.bases) for side, found in safety_module.sides.items()}
    sides = f"{numbers['output']} output directions per layer"
    if "input" in numbers:
        sides += f", {numbers['input']} input directions"
    rows = {
        "Rank": f"r = {config.r} trained, {saved.r} saved; scaling {_number(saved)}",
        "Start": f"`init={config.init!r}`",
        "Protected": f"{sides}, in {len(safety_module.bases)} layers",
        "Certificate": _certificate_of_files(Path(folder), safety_module),
        **provenance_rows(safety_module),
        **{markdown(name): markdown(text) for name, text in notes.items()},
    }
    section = f"""
## SaLoRA

A LoRA adapter that was trained with {PAPER} by {PACKAGE}: its update of every target layer stays out of the
{markdown(what_directions(safety_module.provenance).sentence)}. That does not promise that no refusal is lost.

{table(rows)}

{TO_CHECK}

For inference it loads without salora-plugins, as any LoRA adapter:

{TO_LOAD}

Merging it into bf16 weights rounds 1 to 12 % of the update back into the safety directions (measured on one small
model; the smaller the update, the more). Merge into float32 weights, or use it unmerged.

To train it further, load it with its safety module in force (`salora.safetensors`, `salora_config.json`):

```python
from salora_plugins import load_for_training
model = load_for_training(base_model, "this folder or repository")
```

`PeftModel.from_pretrained(..., is_trainable=True)` would train it as plain LoRA: nothing keeps the refusals then, and
nothing says so.
"""
    write_card(folder, config.base_model_name_or_path, section, tags=("lora", "salora"))


def _write_card_of_sails(
    folder: str | os.PathLike, config: SaLoRAConfig, safety_module: SafetyModule, notes: Mapping[str, str]
) -> None:
    """The card of an adapter that is to teach refusals: it has no certificate, since it is kept out of nothing."""
    saved = config.to_lora_config()
    rows = {
        "Rank": f"r = {config.r} trained, {saved.r} saved; scaling {_number(saved)}",
        "Start": f"B = 0.1 of the first r of {_ranks(safety_module.bases)} directions, in {len(safety_module.bases)} "
        "layers; A random; their product is subtracted",
        "Protected": "nothing",
        **provenance_rows(safety_module),
        **{markdown(name): markdown(text) for name, text in notes.items()},
    }
    section = f"""
## SAILS

A LoRA adapter of [SAILS](https://arxiv.org/abs/2512.23260) by {PACKAGE}: its training started in the directions of
sparse-autoencoder features that tell safe from unsafe responses. What it teaches depends on the rows that it was
trained on. Nothing is kept out of these directions, and there is no certificate: measure its refusals.

{table(rows)}

It loads without salora-plugins, as any LoRA adapter:

{TO_LOAD}

To train it further (`salora.safetensors`, `salora_config.json`): `salora_plugins.load_for_training`.
"""
    write_card(folder, config.base_model_name_or_path, section, tags=("lora", "sails"))


def _certificate_of_files(folder: Path, safety_module: SafetyModule) -> str:
    try:
        shares = largest_shares(safety_shares(SavedAdapter.load(folder), safety_module))
        return certificate_row(shares, str(adapter_digest(folder)))
    except FileNotFoundError:
        return "not computed, since the weights were not saved as safetensors"
    except ValueError as error:  # a remark on the card must not end a training run
        return f"not computed: {markdown(error)}"


def _ranks(bases: dict[str, Any]) -> str:
    ranks = sorted({basis.shape[1] for basis in bases.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _number(lora: Any) -> str:
    scaling = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    return f"{scaling:g}" + (" (by module: see the patterns in the configuration)" if lora.alpha_pattern else "")
