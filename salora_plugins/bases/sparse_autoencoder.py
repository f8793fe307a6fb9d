"""Sparse autoencoders (SAEs) as sae-lens saves them: encoder, decoder directions, and where in a model they belong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..activations.errors import CalibrationError
from ..support.files import read_json_object

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
"""What a folder that sae-lens has saved holds."""

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Architecture -> its vectors over the features, beside the encoder W_enc, the decoder W_dec and its bias b_dec."""

_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
_ACTIVATIONS = ("relu", "topk")  # of sae-lens before 6, beside the name of the architecture
_EPSILON = 1e-5
# Names of a point in the residual stream, by TransformerLens and by Transformers.
_LENS_HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)")
_MODULE_HOOK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.output)?")
_ADVICE = "pip install 'salora-plugins[sae]'"


@dataclass(frozen=True)
class HookPoint:
    """Where a model is looked at."""

    layer: int
    """Number of the block."""

    kind: str
    """"resid_post": behind the block; "attn_out" and "mlp_out": what its attention or MLP adds to the stream."""


@dataclass(frozen=True)
class AutoencoderOutline:
    """What an SAE is for, and how large it is, without its weights."""

    source: str
    """Where it comes from."""
    hook_name: str
    """As its configuration names it."""
    width: int
    """Length of the activations."""
    num_features: int
    """d_sae."""

    @property
    def hook_point(self) -> HookPoint | None:
        """Where it belongs, "resid_pre" as "resid_post" of the block before; None where that is no point of these."""
        if (found := _LENS_HOOK.fullmatch(self.hook_name)) is not None:
            layer, kind = int(found[1]), found[2]
            return HookPoint(layer - 1, "resid_post") if kind == "resid_pre" else HookPoint(layer, kind)
        found = _MODULE_HOOK.fullmatch(self.hook_name)
        return None if found is None else HookPoint(int(found[1]), "resid_post")


@dataclass(frozen=True)
class SparseAutoencoder:
    """An encoder of activations into features, and the direction of each."""

    source: str
    """Where it comes from, for messages."""
    architecture: str
    hook_name: str
    """As its configuration names it."""
    encoder: Tensor
    """W_enc, (d_in, d_sae) float32."""
    decoder: Tensor
    """W_dec, (d_sae, d_in) float32."""
    decoder_bias: Tensor
    """b_dec, (d_in,)."""
    vectors: Mapping[str, Tensor]
    """Those of the architecture, (d_sae,) each."""
    subtracts_bias: bool = True
    """Whether b_dec is taken off the input."""
    normalization: str = "none"
    k: int = 0
    """Of "topk": how many features are active at once."""
    scales_by_decoder: bool = False
    """Of "topk": whether a feature is as large as its decoder row makes it."""
    of_centered_model: bool = False
    """Whether it was trained on a model whose writing weights TransformerLens had centered: their mean is 0."""

    @property
    def width(self) -> int:
        """Length of the activations."""
        return self.encoder.shape[0]

    @property
    def num_features(self) -> int:
        """d_sae."""
        return self.encoder.shape[1]

    def to(self, device: torch.device) -> SparseAutoencoder:
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("encoder", "decoder", "decoder_bias")}
        return replace(self, **tensors, vectors={name: vector.to(device) for name, vector in self.vectors.items()})

    @torch.no_grad()
    def encode(self, activations: Tensor) -> Tensor:
        """
        Feature activations, as sae-lens computes them.

        Args:
            activations: (n, d_in), any floating dtype.

        Returns:
            (n, d_sae) float32.
        """
        rows = activations.float()
        if self.of_centered_model:
            # What is written by centered weights is what is written by the others, less its mean over the width.
            rows = rows - rows.mean(dim=-1, keepdim=True)
        rows = _normalized(rows, self.normalization)
        if self.subtracts_bias:
            rows = rows - self.decoder_bias
        before = rows @ self.encoder
        if self.architecture == "gated":
            # One encoder for both: whether a feature is active, and how much.
            amount = before * self.vectors["r_mag"].exp() + self.vectors["b_mag"]
            return torch.relu(amount) * (before + self.vectors["b_gate"] > 0)
        before = before + self.vectors["b_enc"]
        if self.architecture == "jumprelu":
            return torch.relu(before) * (before > self.vectors["threshold"])
        if self.architecture == "topk":
            if self.scales_by_decoder:
                before = before * self.decoder.norm(dim=-1)
            values, indices = before.topk(min(self.k, self.num_features), dim=-1)
            return torch.zeros_like(before).scatter_(-1, indices, torch.relu(values))
        return torch.relu(before)


def _normalized(rows: Tensor, kind: str) -> Tensor:
    """What an SAE does to its input first."""
    if kind == "layer_norm":
        rows = rows - rows.mean(dim=-1, keepdim=True)
        return rows / (rows.std(dim=-1, keepdim=True) + _EPSILON)
    if kind == "constant_norm_rescale":
        return rows * (rows.shape[-1] ** 0.5 / rows.norm(dim=-1, keepdim=True))
    return rows


def load_autoencoder(source: str) -> SparseAutoencoder:
    """
    Read an SAE.

    Args:
        source: A folder with `cfg.json` and `sae_weights.safetensors`, as sae-lens saves one, which is read without
            it; or "RELEASE:ID" of sae-lens, or "organization/name:folder" of the hub.

    Raises:
        CalibrationError: There is none, or it is of an unknown kind or damaged.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _from_folder(folder, source)
    release, separator, name = source.partition(":")
    if not separator or not release or not name:
        raise CalibrationError(
            f"sae={source!r}: there is no such folder, and it is not RELEASE:ID of sae-lens. Give one of them, with "
            "{layer} where the number of the layer stands."
        )
    return _from_release(release, name, source)


def outline_of(source: str) -> AutoencoderOutline:
    """
    What an SAE is for; of a folder only its configuration and its shapes are read, while another is loaded and let go.

    Args:
        source: As for `load_autoencoder`.

    Raises:
        CalibrationError: There is none, or it cannot be read.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        whole = load_autoencoder(source)
        return AutoencoderOutline(source, whole.hook_name, whole.width, whole.num_features)
    _check_files(folder, source)
    try:
        config = _as_written_today(read_json_object(folder / CONFIG_FILE))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            shape = tuple(file.get_slice("W_enc").get_shape()) if "W_enc" in set(file.keys()) else ()
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"sae={source!r}: {folder} cannot be read ({error}).") from error
    if len(shape) != 2:
        raise CalibrationError(f"sae={source!r}: its W_enc has the shape {shape}, not (d_in, d_sae).")
    return AutoencoderOutline(source, str(config.get("hook_name") or ""), *shape)


def _check_files(folder: Path, source: str) -> None:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise CalibrationError(
                f"sae={source!r}: the folder has no {file}. Give one that sae-lens has saved (SAE.save_model), with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}."
            )


def _from_folder(folder: Path, source: str) -> SparseAutoencoder:
    _check_files(folder, source)
    try:
        return autoencoder_of(read_json_object(folder / CONFIG_FILE), load_file(folder / WEIGHTS_FILE), source)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"sae={source!r}: {folder / WEIGHTS_FILE} cannot be read ({error}).") from error


def _from_release(release: str, name: str, source: str) -> SparseAutoencoder:
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise CalibrationError(
            f"sae={source!r}: releases are loaded by sae-lens, which is not installed ({error}): {_ADVICE}. A local "
            "folder needs no sae-lens."
        ) from error
    try:
        loaded = SAE.from_pretrained(release, name, device="cpu", dtype="float32")
    except (ValueError, KeyError, OSError) as error:
        raise CalibrationError(f"sae={source!r}: sae-lens cannot load it: {error}") from error
    return autoencoder_of(loaded.cfg.to_dict(), dict(loaded.state_dict()), source)


def autoencoder_of(config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> SparseAutoencoder:
    """
    Args:
        config: Content of a `cfg.json`, of sae-lens 6 or earlier.
        weights: Name -> tensor.
        source: Where they come from, for messages.

    Raises:
        CalibrationError: The architecture is unknown, or a part is missing, of another shape or not finite.
    """
    told = f"sae={source!r}"
    config = _as_written_today(config)
    architecture = str(config.get("architecture", "standard"))
    if architecture not in ARCHITECTURES:
        raise CalibrationError(
            f"{told}: its architecture is {architecture!r}; known are {', '.join(ARCHITECTURES)} (and what sae-lens "
            "saves as one of them)."
        )
    normalization = config.get("normalize_activations") or "none"
    if normalization not in _NORMALIZATIONS:
        raise CalibrationError(
            f"{told}: normalize_activations={normalization!r} is not known here; known are "
            f"{', '.join(_NORMALIZATIONS)}. sae-lens folds others into the weights at the end of a training: give what "
            "it has saved then, or call fold_activation_norm_scaling_factor(FACTOR) and save_model on this one."
        )
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if activation not in (*_ACTIVATIONS, architecture):
        raise CalibrationError(
            f"{told}: activation_fn={activation!r} is not known here; known are {', '.join(_ACTIVATIONS)} and those of "
            "the architectures. Give an SAE with one of them."
        )
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights and not torch.allclose(weights[name], torch.ones_like(weights[name])):
            raise CalibrationError(
                f"{told}: its weights have a {name} that is not 1: features that were finetuned in size, which is "
                "not supported. Give the SAE as it was before that."
            )
    parts = {name: weights.get(name) for name in ("W_enc", "W_dec", "b_dec", *ARCHITECTURES[architecture])}
    if missing := [name for name, tensor in parts.items() if tensor is None]:
        raise CalibrationError(
            f"{told}: its weights lack {', '.join(missing)}, which the architecture {architecture} has."
        )
    tensors = {name: tensor.float() for name, tensor in parts.items() if tensor is not None}
    if tensors["W_enc"].ndim != 2:
        raise CalibrationError(f"{told}: W_enc has the shape {tuple(tensors['W_enc'].shape)}, not (d_in, d_sae).")
    d_in, d_sae = tensors["W_enc"].shape
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, (d_sae,)):
            raise CalibrationError(
                f"{told}: {name} has the shape {tuple(tensor.shape)} beside a W_enc of {(d_in, d_sae)}; expected "
                f"{shapes.get(name, (d_sae,))}."
            )
        if not torch.isfinite(tensor).all():
            raise CalibrationError(f"{told}: {name} holds NaN or infinity.")
    k = config.get("k", 0)
    if architecture == "topk" and (not isinstance(k, int) or k < 1):
        raise CalibrationError(f"{told}: k={k!r} of its configuration is not the number of active features.")
    return SparseAutoencoder(
        source=source,
        architecture=architecture,
        hook_name=str(config.get("hook_name") or ""),
        encoder=tensors.pop("W_enc"),
        decoder=tensors.pop("W_dec"),
        decoder_bias=tensors.pop("b_dec"),
        vectors=tensors,
        subtracts_bias=bool(config.get("apply_b_dec_to_input", True)),
        normalization=normalization,
        k=k if architecture == "topk" else 0,
        scales_by_decoder=bool(config.get("rescale_acts_by_decoder_norm", False)),
        of_centered_model=bool((config.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")),
    )


def _as_written_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the keys of sae-lens 6; earlier ones named the activation function, and had no metadata."""
    metadata = config.get("metadata")
    result = {**(metadata if isinstance(metadata, Mapping) else {}), **config}
    result["hook_name"] = result.get("hook_name") or result.get("hook_point") or result.get("hf_hook_name")
    options = result.get("activation_fn_kwargs")
    if "topk" in (result.get("activation_fn"), result.get("activation_fn_str")) and isinstance(options, Mapping):
        result |= {"architecture": "topk", "k": options.get("k")}
    if isinstance(normalization := result.get("normalize_activations"), bool):
        result["normalize_activations"] = "expected_average_only_in" if normalization else "none"
    return result
