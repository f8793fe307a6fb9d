"""The certificate, computed from saved files alone: safetensors, without peft and salora_plugins."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def largest_share_inside(folder: str | Path) -> float:
    """
    The largest ||U_C^T dW||_F / ||dW||_F over an adapter's modules, and ||dW V_C||_F / ||dW||_F with an input side.
    The scaling cancels in a share.
    """
    folder = Path(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    module = load_file(folder / "salora.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")}
    assert names
    worst = 0.0
    for name in names:
        update = weights[f"{name}.lora_B.weight"].double() @ weights[f"{name}.lora_A.weight"].double()
        assert update.norm() > 0
        short = name.removeprefix("base_model.model.")
        shares = [torch.linalg.norm(module[f"{short}.output_basis"].double().T @ update)]
        if f"{short}.input_basis" in module:
            shares.append(torch.linalg.norm(update @ module[f"{short}.input_basis"].double()))
        worst = max(worst, *(share.item() / update.norm().item() for share in shares))
    return worst
