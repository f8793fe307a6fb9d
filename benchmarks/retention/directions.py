"""Directions of the input side that tell harmful from harmless requests, as basis methods of the package's own hook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from salora_plugins import plugins
from salora_plugins.activations.capture import collect_statistics
from salora_plugins.activations.statistics import Engine, ModuleStatistics
from salora_plugins.hookspecs import BasisNeeds, RegisterBasisMethod, hookimpl
from salora_plugins.options import Positions
from salora_plugins.rows.batching import batches
from salora_plugins.rows.examples import TokenizedExample

from .tasks import TokenRow

Grams = dict[str, Tensor]
"""Module name -> a (d_in, d_in) matrix for its inputs."""


def input_grams(model: Any, names: Iterable[str], rows: Sequence[TokenRow], positions: Positions) -> Grams:
    """Module name -> the outer products of its inputs at the positions, summed to trace 1, (d_in, d_in), float64."""
    examples = [TokenizedExample(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
    collected = collect_statistics(
        model.eval(),
        {name: model.get_submodule(name) for name in names},
        batches(examples, 16, pad_token_id=0),
        Engine("exact"),
        positions=positions,
        with_inputs=True,
    )
    return {name: _input_gram(entry) for name, entry in collected.items()}


def _input_gram(statistics: ModuleStatistics) -> Tensor:
    """The Gram matrix of the inputs with trace 1, (d_in, d_in) float64."""
    if statistics.input is None:
        raise ValueError(f"{statistics.name}: its inputs were not gathered")
    gram = statistics.input.gram().double()
    return gram / gram.trace()


def strongest(harmful: Tensor, harmless: Tensor | None, rank: int) -> Tensor:
    """The top eigenvectors of the harmful inputs' Gram matrix, (d, rank): the input side of SaLoRA."""
    return torch.linalg.eigh(harmful).eigenvectors[:, -rank:]


def contrastive(harmful: Tensor, harmless: Tensor, rank: int) -> Tensor:
    """Those of the difference of the Gram matrices of harmful and harmless requests, each of trace 1."""
    return torch.linalg.eigh(harmful - harmless).eigenvectors[:, -rank:]


def ratio(harmful: Tensor, harmless: Tensor, rank: int) -> Tensor:
    """
    What leaves the filters of the smallest ratio of harmful to harmless energy: with harmless + ridge = L Lᵀ, the span
    of L z for the top eigenvectors z of L⁻¹ harmful L⁻ᵀ. The ridge is a hundredth of the mean energy.
    """
    ridge = torch.eye(len(harmless), dtype=harmless.dtype, device=harmless.device) * 0.01 / len(harmless)
    factor = torch.linalg.cholesky(harmless + ridge)
    whitened = torch.linalg.solve_triangular(factor, harmful, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T, upper=False)
    top = torch.linalg.eigh((whitened + whitened.T) / 2).eigenvectors[:, -rank:]
    return torch.linalg.qr(factor @ top).Q


DIRECTIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "strongest": strongest,
    "contrastive": contrastive,
    "ratio": ratio,
}


def against_harmless(
    find: Callable[[Tensor, Tensor, int], Tensor], statistics: ModuleStatistics, rank: int, side: str
) -> tuple[Tensor, Tensor]:
    """SaLoRA's own directions of the outputs; those of the inputs by comparison with the utility rows."""
    if side == "output" or statistics.input is None or statistics.utility is None:
        return statistics.output.top(rank)
    basis = find(_input_gram(statistics), _input_gram(statistics.utility), rank)
    # The same span by its harmful energy, strongest first: a basis method has to say singular values.
    inside = basis.T @ statistics.input.product(basis)
    energies, rotation = torch.linalg.eigh((inside + inside.T) / 2)
    return (basis @ rotation.flip(1)).float(), energies.flip(0).clamp(min=0).sqrt().float()


@hookimpl
def register_basis_methods(register: RegisterBasisMethod) -> None:
    for name in ("contrastive", "ratio"):
        register(name, partial(against_harmless, DIRECTIONS[name]), BasisNeeds(utility_rows=True))


def make_known() -> None:
    """Let `basis_method` know the names above; once."""
    manager = plugins.plugin_manager()
    if not manager.has_plugin(__name__):
        manager.register(sys.modules[__name__], name=__name__)
