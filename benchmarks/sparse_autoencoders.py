"""
Train small sparse autoencoders on the residual stream of a model, with sae-lens's own trainer, in minutes on a CPU.

    python -m benchmarks.sparse_autoencoders MODEL OUT --layers 0 1 2 --text FILE ...

needs `pip install 'salora-plugins[sae]'`. OUT gets a folder a layer ("layer_0"), as sae-lens saves one: for
`SaLoRAConfig(sae="OUT/layer_{layer}")`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Conversation = list[dict[str, str]]


def residual_activations(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], layers: Sequence[int], batch_size: int = 16
) -> dict[int, Tensor]:
    """
    Layer -> what its block puts out, (n, d) float32, at all tokens but the first of each conversation: there the stream
    is many times as large as elsewhere.
    """
    from salora_plugins.models.residual import hidden_states
    from salora_plugins.rows.batching import pad_left

    rows = [
        list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)) for messages in conversations
    ]
    rows = sorted((row[:256] for row in rows), key=len)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    kept = torch.zeros(0)

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[layer].append(hidden_states(output)[kept].float().cpu())

        return hook

    handles = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    for start in range(0, len(rows), batch_size):
        tokens, mask = pad_left(rows[start : start + batch_size], device=model.device)
        kept = mask.bool() & (mask.cumsum(dim=1) > 1)
        with torch.inference_mode():
            model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def train(rows: Tensor, hook_name: str, *, features: int, active: int, samples: int, seed: int = 0) -> Any:
    """
    A TopK autoencoder of activations, trained by sae-lens.

    Args:
        rows: (n, d); every epoch takes them in another order.
        hook_name: Where they come from, as TransformerLens names it.
        features: d_sae.
        active: k.
        samples: How many vectors it is trained on.
        seed: Of the start and the order.
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    metadata = SAEMetadata(hook_name=hook_name, model_name="", context_size=256, prepend_bos=False)
    config = TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=features, k=active, metadata=metadata)
    autoencoder = TopKTrainingSAE(config)
    with torch.no_grad():  # features begin as vectors of the data, which spares most of a training
        center = rows.mean(dim=0)
        starts = rows[torch.randint(len(rows), (features,))] - center
        starts = starts / starts.norm(dim=1, keepdim=True)
        autoencoder.b_dec.copy_(center)
        autoencoder.W_dec.copy_(starts)
        autoencoder.W_enc.copy_(starts.T)
        # Features of one kind of data point alike, so that what the active ones give back adds up to too much.
        back = autoencoder.decode(autoencoder.encode(rows)) - center
        autoencoder.W_enc.mul_(((rows - center) * back).sum() / back.square().sum())
    batch = 512
    settings = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=batch,
        lr=1e-3,
        lr_end=1e-4,
        lr_decay_steps=samples // batch // 3,
    )
    trainer = SAETrainer(settings, autoencoder, _epochs(rows, batch, seed))
    return trainer.fit()


def _epochs(rows: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch]]


def explained_variance(autoencoder: Any, rows: Tensor) -> float:
    """Which share of the variance of vectors (n, d) an autoencoder gives back."""
    with torch.inference_mode():
        rest = rows - autoencoder.decode(autoencoder.encode(rows))
    return 1 - (rest.square().sum() / (rows - rows.mean(dim=0)).square().sum()).item()


def train_layers(
    activations: dict[int, Tensor], out: Path, *, features: int, active: int, samples: int
) -> dict[int, dict[str, float]]:
    """Train and save an autoencoder a layer; returns what was measured on a tenth of the vectors that was held out."""
    measured = {}
    for layer, rows in activations.items():
        start = time.monotonic()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        held_out, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
        trained = train(rows, f"blocks.{layer}.hook_resid_post", features=features, active=active, samples=samples)
        trained.save_inference_model(out / f"layer_{layer}")
        measured[layer] = {
            "explained_variance": round(explained_variance(trained, held_out), 4),
            "vectors": len(rows),
            "seconds": round(time.monotonic() - start, 1),
        }
        print(f"layer {layer}: {measured[layer]}", flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of rows with messages, a line each")
    parser.add_argument("--features", type=int, default=1152)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--samples", type=int, default=40_000)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.basicConfig(level=logging.INFO)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = [line for file in args.text for line in file.read_text(encoding="utf-8").splitlines()]
    conversations = [json.loads(line)["messages"] for line in lines]
    activations = residual_activations(model, tokenizer, conversations, args.layers)
    train_layers(activations, args.out, features=args.features, active=args.active, samples=args.samples)


if __name__ == "__main__":
    main()
