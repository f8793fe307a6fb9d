"""
Directions of the features of sparse autoencoders that tell safe from unsafe responses: the subspace of SAILS (Wang et
al., "Interpretable Safety Alignment via SAE-Constructed Low-Rank Subspace Adaptation", arXiv 2512.23260).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.capture import full_float32
from ..activations.errors import CalibrationError
from ..activations.positions import position_mask
from ..activations.statistics import ModuleStatistics
from ..hookspecs import BasisNeeds, Preparation, RegisterBasisMethod, hookimpl
from ..models.residual import ResidualWriter, hidden_states, normalizes_outputs, residual_writer
from ..models.running import cheap_forward_options, input_device
from ..models.weights import layer_features
from ..options import Positions
from ..ranks import Rank, Side, rank_of_spectrum, rule_of
from ..rows.batching import share_of_rank
from ..rows.examples import TokenizedExample
from ..support.distributed import sum_over_ranks
from ..support.linear_algebra import eigh, svd
from ..support.module_names import advice_to_leave_out, listed
from .sparse_autoencoder import AutoencoderOutline, HookPoint, SparseAutoencoder, load_autoencoder, outline_of

logger = logging.getLogger(__name__)

VARIANCE = 0.8
"""The share of the variance of the kept decoder directions that the subspace has, where no rank is asked for."""

# Vectors that are encoded at once: of each there are several times as many features as numbers.
_ROWS_AT_ONCE = 1024
# What SAEs may take together, in bytes; others wait for a further pass of the model.
_BYTES_AT_ONCE = 4 * 2**30
# What is this much smaller than what it is compared with, is rounding error.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class FeatureSubspace:
    """What the kept features of an SAE span."""

    basis: Tensor
    """(d, m) float32, all principal directions, the one of the largest variance first."""
    values: Tensor
    """Singular values of the decoder directions, each of length 1, for these: (m,) float32."""
    energy: float
    """Sum of all squared singular values: how many features were kept."""
    source: str
    """The SAE, for messages."""


class FeatureMeans:
    """
    Mean activation of every feature over a stream of vectors.

    Args:
        autoencoder: Encodes them.
    """

    def __init__(self, autoencoder: SparseAutoencoder) -> None:
        self.autoencoder = autoencoder
        self.count = 0
        self._sums = torch.zeros(autoencoder.num_features, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Encode vectors (n, d_in), on whatever device the autoencoder is."""
        for chunk in rows.split(_ROWS_AT_ONCE):
            # Summed in float32 where there is no float64, of a thousand at a time.
            self._sums += self.autoencoder.encode(chunk).sum(dim=0).cpu().double()
        self.count += rows.shape[0]

    def over_ranks(self) -> tuple[Tensor, int]:
        """The means (d_sae,) float64 of the vectors of all ranks, and how many these are."""
        count = int(sum_over_ranks(torch.tensor([self.count])))
        return sum_over_ranks(self._sums) / max(count, 1), count


def top_features(safe: Tensor, unsafe: Tensor, share: float) -> Tensor:
    """
    The features whose mean activation differs most between safe and unsafe responses.

    Args:
        safe: Means over the safe responses, (d_sae,).
        unsafe: Over the unsafe ones, (d_sae,).
        share: How many of all features are kept, from 0 to 1; those that do not differ at all are none of them.

    Returns:
        Their numbers, the largest Delta_i = |safe_i - unsafe_i| first; empty where none differs.
    """
    difference = (safe.double() - unsafe.double()).abs()
    most = max(1, int(share * difference.shape[0]))
    order = difference.argsort(descending=True, stable=True)[:most]
    rounding = _NEGLIGIBLE * torch.maximum(safe.double().abs(), unsafe.double().abs())
    return order[(difference > rounding)[order]]


def principal_directions(directions: Tensor) -> tuple[Tensor, Tensor]:
    """
    Principal directions of decoder rows, each made of length 1, and their singular values.

    The mean is not taken out: where all kept features point one way, that is a direction, too.

    Args:
        directions: (n, d).

    Returns:
        (d, m) with orthonormal columns and (m,), descending, both float64; m is the rank.
    """
    rows = directions.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    if rows.shape[0] > rows.shape[1]:
        squares, basis = eigh(rows.T @ rows)
        values, basis = squares.flip(0).clamp(min=0).sqrt(), basis.flip(1)
    else:
        _, values, transposed = svd(rows)
        basis = transposed.T
    kept = int((values > _NEGLIGIBLE * values[0]).sum())
    return torch.linalg.qr(basis[:, :kept]).Q, values[:kept]


def subspace_size(subspace: FeatureSubspace, rank: Rank | None, name: str) -> int:
    """
    How many directions of a subspace are taken; the layer keeps at least one.

    Args:
        subspace: Of the layer's SAE.
        rank: A number, a share of the variance, or a rule of the spectrum; None: the paper's `VARIANCE`.
        name: Of the module, for messages.

    Raises:
        CalibrationError: There are not as many.
    """
    dimension, found = subspace.basis.shape
    most = min(found, dimension - 1)
    if isinstance(rank, int):
        if rank > most:
            raise CalibrationError(
                f"safety_rank={rank}, but the kept features of {subspace.source} have {most} directions for {name}. "
                "Lower it, or raise sae_feature_share, or give more contrastive_data."
            )
        return rank
    wanted = VARIANCE if rank is None else rank if isinstance(rank, float) else rule_of(rank)
    if wanted is None:
        raise CalibrationError(f"safety_rank={rank!r} is not a rank that basis_method='sae' knows.")
    number = rank_of_spectrum(subspace.values, subspace.energy, min(dimension, round(subspace.energy)), wanted)
    if rank is None:
        return min(number or most, most)
    if number is None or number > most:
        raise CalibrationError(
            f"safety_rank={rank!r}: it takes all {dimension} directions of {name}, or more than the kept features of "
            f"{subspace.source} have. Lower it, or sae_feature_share."
        )
    return number


def feature_directions(
    statistics: ModuleStatistics, rank: Any, side: Side
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]:
    """
    U of SAILS for the output side; the input side is found as by the method "salora", from the safety rows.

    Args:
        statistics: Of one layer; what `prepare` made of its SAE is in it.
        rank: As asked for; the default is the paper's share of the variance.
        side: "output" or "input".

    Returns:
        Basis (d, k) with orthonormal columns, singular values of the decoder directions (k,), both float32, and the
        sum of all their squares.
    """
    if side == "input":
        return statistics.of(side).top(rank)
    subspace: FeatureSubspace = statistics.prepared
    number = subspace_size(subspace, None if statistics.has_default_rank(side) else rank, statistics.name)
    return subspace.basis[:, :number].contiguous(), subspace.values[:number], subspace.energy


def prepare(preparation: Preparation) -> dict[str, FeatureSubspace]:
    """
    Module name -> the subspace of its layer's SAE.

    Raises:
        CalibrationError: A module does not write to the residual stream, its layer has no SAE or one for another place
            or another width, or no feature tells safe from unsafe responses.
    """
    options = preparation.options
    positions: Positions = options["contrastive_positions"]
    if positions in ("prompt", "header"):
        raise CalibrationError(
            f"contrastive_positions={positions!r}: a safe and an unsafe response share their prompt, so that no "
            "feature differs there. Choose 'response', 'predicting' or 'all'."
        )
    if not 0 < options["sae_feature_share"] <= 1:
        raise CalibrationError(f"sae_feature_share={options['sae_feature_share']!r}: give a share above 0, at most 1.")
    writers = _writers(preparation.names)
    sources = {name: _source_for(options["sae"], writer, name) for name, writer in writers.items()}
    outlines: dict[str, AutoencoderOutline] = {}
    for name, source in sources.items():
        if source not in outlines:
            outlines[source] = outline_of(source)
        _check_fits(outlines[source], preparation.model, writers[name], name)
    pairs = preparation.contrastive_rows()
    writer_of = {source: writers[name] for name, source in sources.items()}
    places = {source: _place(outlines[source], writer) for source, writer in writer_of.items()}
    found = {}
    for sources_together in _chunks(outlines):
        autoencoders = {
            source: for_model(load_autoencoder(source), preparation.model, writer_of[source])
            for source in sources_together
        }
        means = {
            kind: _feature_means(
                preparation.model,
                [(autoencoders[source], places[source]) for source in sources_together],
                [pair[index] for pair in pairs],
                positions,
                preparation.batch_size,
            )
            for index, kind in enumerate(("safe", "unsafe"))
        }
        for source, safe, unsafe in zip(sources_together, means["safe"], means["unsafe"], strict=True):
            found[source] = _subspace(autoencoders[source], safe, unsafe, options["sae_feature_share"], positions)
        del autoencoders  # before the next are loaded
    return {name: found[source] for name, source in sources.items()}


def _writers(names: Sequence[str]) -> dict[str, ResidualWriter]:
    writers = {name: residual_writer(name) for name in names}
    if others := [name for name, writer in writers.items() if writer is None]:
        raise CalibrationError(
            f"basis_method='sae': {listed(others)} do not write into the residual stream, where the features of an SAE "
            "are directions. Leave them out: target_modules=['o_proj', 'down_proj'] (GPT-2: 'attn.c_proj', "
            f"'mlp.c_proj'), or {advice_to_leave_out(others, names)}."
        )
    return {name: writer for name, writer in writers.items() if writer is not None}


def _source_for(option: Any, writer: ResidualWriter, name: str) -> str:
    """Which SAE the option `sae` names for a layer."""
    if isinstance(option, Mapping):
        source = option.get(writer.layer, option.get(str(writer.layer)))
        if source is None:
            raise CalibrationError(
                f"sae has none for layer {writer.layer}, where {name} is; it has some for "
                f"{', '.join(map(str, option))}. Add it, or leave the layer out with layers_to_transform."
            )
    elif option is None:
        raise CalibrationError(
            "basis_method='sae' needs SAEs: set sae to RELEASE:ID of sae-lens or to a folder, with {layer} in it, or "
            "to a mapping from the layers' numbers to such."
        )
    else:
        source = option
    return str(source).replace("{layer}", str(writer.layer))


def _check_fits(autoencoder: AutoencoderOutline, model: nn.Module, writer: ResidualWriter, name: str) -> None:
    told, point = f"sae={autoencoder.source!r}", autoencoder.hook_point
    if point is None:
        raise CalibrationError(
            f"{told} is for {autoencoder.hook_name!r}. For {name} it must be for the residual stream behind its layer "
            f"(blocks.{writer.layer}.hook_resid_post), or for what it adds (blocks.{writer.layer}.hook_{writer.adds})."
        )
    if point.layer != writer.layer:
        raise CalibrationError(
            f"{told} is for layer {point.layer} ({autoencoder.hook_name!r}), and {name} is in layer {writer.layer}. "
            "Put {layer} in the place of its number, give a mapping, or set layers_to_transform to those that have one."
        )
    if point.kind not in ("resid_post", writer.adds):
        raise CalibrationError(
            f"{told} is for {autoencoder.hook_name!r}, into which {name} does not write: leave "
            f"{name.rpartition('.')[2]} out of target_modules, or give SAEs of the residual stream (hook_resid_post)."
        )
    block = model.get_submodule(writer.block)
    if normalizes_outputs(block):
        if point.kind != "resid_post":
            raise CalibrationError(
                f"{told} is for {autoencoder.hook_name!r}, which a norm of {type(block).__name__} stands before. Give "
                "SAEs of the residual stream (hook_resid_post)."
            )
        logger.warning(
            "%s: a norm stands between what it writes and the residual stream, so that the features' directions are "
            "those of its output only up to the norm's weights.",
            name,
        )
    width = layer_features(model.get_submodule(name))[1]
    if width != autoencoder.width:
        raise CalibrationError(
            f"{told} is for activations of {autoencoder.width} numbers, and {name} writes {width}. It was trained on "
            "another model."
        )


def for_model(autoencoder: SparseAutoencoder, model: nn.Module, writer: ResidualWriter) -> SparseAutoencoder:
    """
    The same; TransformerLens centers the writing weights of models with LayerNorm, which takes the mean out again, and
    leaves those of others (RMSNorm) as they are.

    Raises:
        CalibrationError: It was trained on centered weights, and norms stand behind the parts of the model's blocks.
    """
    if not autoencoder.of_centered_model:
        return autoencoder
    if getattr(getattr(model, "config", None), "do_layer_norm_before", True) is False:
        raise CalibrationError(
            f"sae={autoencoder.source!r} was trained with center_writing_weights, which has no meaning for "
            f"{type(model).__name__}, whose norms stand behind what is written. It was trained on another model."
        )
    if any(isinstance(module, nn.LayerNorm) for module in model.get_submodule(writer.block).modules()):
        return autoencoder
    logger.warning(
        "sae=%r was trained with center_writing_weights, which TransformerLens passes over for models without "
        "LayerNorm, as this one: nothing is centered.",
        autoencoder.source,
    )
    return replace(autoencoder, of_centered_model=False)


def _place(autoencoder: AutoencoderOutline, writer: ResidualWriter) -> str:
    """Name of the module whose output an SAE encodes."""
    point: HookPoint | None = autoencoder.hook_point
    return writer.block if point is None or point.kind == "resid_post" else writer.part


def _chunks(autoencoders: Mapping[str, AutoencoderOutline]) -> Iterator[list[str]]:
    """SAEs that are loaded, and held by a device, together."""
    chunk: list[str] = []
    size = 0
    for source, autoencoder in autoencoders.items():
        needed = 8 * autoencoder.width * autoencoder.num_features
        if chunk and size + needed > _BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
        chunk.append(source)
        size += needed
    if chunk:
        yield chunk


def _feature_means(
    model: nn.Module,
    placed: Sequence[tuple[SparseAutoencoder, str]],
    examples: Sequence[TokenizedExample],
    positions: Positions,
    batch_size: int,
) -> list[tuple[Tensor, int]]:
    """The means of each SAE over the positions of all examples that count, of which every rank runs a share."""
    means = [FeatureMeans(autoencoder) for autoencoder, _ in placed]
    modules = [model.get_submodule(name) for _, name in placed]
    options, device = cheap_forward_options(model), input_device(model)
    for batch in share_of_rank(examples, batch_size):
        mask = position_mask(batch["labels"], positions, batch["attention_mask"])
        with torch.no_grad(), full_float32(), _encoding(modules, means, mask):
            model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), **options)
    return [found.over_ranks() for found in means]


@contextmanager
def _encoding(modules: Sequence[nn.Module], means: Sequence[FeatureMeans], mask: Tensor) -> Iterator[None]:
    """Update the means with what the modules put out at the positions of a mask (batch, length)."""

    def hook_of(found: FeatureMeans) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = hidden_states(output)
            if found.autoencoder.encoder.device != states.device:
                found.autoencoder = found.autoencoder.to(states.device)
            found.update(states[mask.to(states.device)])

        return hook

    handles = [module.register_forward_hook(hook_of(found)) for module, found in zip(modules, means, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _subspace(
    autoencoder: SparseAutoencoder,
    safe: tuple[Tensor, int],
    unsafe: tuple[Tensor, int],
    share: float,
    positions: Positions,
) -> FeatureSubspace:
    (safe_means, safe_count), (unsafe_means, unsafe_count) = safe, unsafe
    if not safe_count or not unsafe_count:
        raise CalibrationError(f"contrastive_positions={positions!r}: contrastive_data has no such position.")
    kept = top_features(safe_means, unsafe_means, share)
    if not len(kept) or not torch.isfinite(safe_means).all() or not torch.isfinite(unsafe_means).all():
        raise CalibrationError(
            f"sae={autoencoder.source!r}: no feature differs between the safe and the unsafe responses of "
            "contrastive_data, or activations are not finite. Give other pairs, or the SAE of this very model."
        )
    basis, values = principal_directions(autoencoder.decoder[kept])
    logger.info(
        "sae=%r: %d of %d features kept, on %d safe and %d unsafe positions.",
        autoencoder.source,
        len(kept),
        autoencoder.num_features,
        safe_count,
        unsafe_count,
    )
    return FeatureSubspace(basis.float(), values.float(), float(len(kept)), autoencoder.source)


@hookimpl
def register_basis_methods(register: RegisterBasisMethod) -> None:
    register(
        "sae",
        feature_directions,
        BasisNeeds(
            safety_rows="input",
            chooses_rank=True,
            prepare=prepare,
            options=("contrastive_data", "contrastive_positions", "sae", "sae_feature_share"),
        ),
    )
