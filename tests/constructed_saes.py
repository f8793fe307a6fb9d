"""Sparse autoencoders with random or planted features, in folders as sae-lens writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from salora_plugins.bases.sparse_autoencoder import ARCHITECTURES

D_IN, D_SAE = 12, 40


def weights(architecture: str, d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vectors = {name: normal(d_sae) / 4 for name in ARCHITECTURES[architecture]}
    return {"W_enc": normal(d_in, d_sae), "W_dec": normal(d_sae, d_in), "b_dec": normal(d_in), **vectors}


def config(architecture: str, **options) -> dict:
    return {
        "architecture": architecture,
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.0.0"},
        **({"k": 5} if architecture == "topk" else {}),
        **options,
    }


def saved(folder: Path, kind: dict, parts: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder as sae-lens writes it."""
    parts = weights(kind["architecture"]) if parts is None else parts
    shape = {"d_in": parts["W_enc"].shape[0], "d_sae": parts["W_enc"].shape[1]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps({**shape, "dtype": "float32", "device": "cpu", **kind}))
    save_file(parts, folder / "sae_weights.safetensors")
    return folder
