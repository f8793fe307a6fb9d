"""What a safety module holds, as a text, a table, JSON values and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from .options import OPTIONS
from .ranks import SIDES, Side, of_side
from .safety_module import SafetyModule, SideBases
from .support.numbers import percent
from .support.plotting import new_figure, save_png
from .support.tables import TableOfNames
from .support.texts import one_line

LARGE_LEAK = 0.1
"""Above this median leak of a kind of layer, a safety module is said to leak."""
_HEADER_WEIGHT = 10  # that is advised
_WORST = 3  # layers that are named


def what_helps(header_counts: bool) -> str:
    """
    Against a leak.

    Args:
        header_counts: Whether the header counts as much as it is advised to already.
    """
    then = "" if header_counts else f" then header_weight={_HEADER_WEIGHT},"
    return (
        "What helps: more, and more varied, safety data (safety_data, num_safety_samples),"
        f"{then} then a larger input_safety_rank."
    )


def header_counts(positions: str, header_weight: float) -> bool:
    """Whether the header's positions count as much as is advised where the module leaks, or nothing beside them."""
    return positions == "header" or header_weight >= _HEADER_WEIGHT


def positions_counted(provenance: Mapping[str, Any]) -> str:
    """How many positions of the safety data counted, of which kind and with which weight."""
    text = f"{provenance.get('positions_counted', '?')} {provenance.get('safety_positions', '')} positions"
    weight = provenance.get("header_weight", 1)
    return text if weight == 1 else f"{text} (those of the header {weight:g} times)"


def describe(safety_module: SafetyModule) -> dict[str, Any]:
    """Everything but the bases themselves, as JSON values."""
    return {
        "fingerprint": safety_module.fingerprint,
        "modules": _modules(safety_module),
        "provenance": dict(safety_module.provenance),
    }


def is_without_safety_data(provenance: Mapping[str, Any]) -> bool:
    """Whether a method found the directions that reads none."""
    return "basis_method" in provenance and not {"safety_data", "safety_samples"} & provenance.keys()


_IN_DATA: dict[Side, str] = {
    "output": "the layers' outputs on the safety data",
    "input": "the layers' inputs on the safety data",
}
_OF_WEIGHTS: dict[Side, str] = dict.fromkeys(SIDES, "the weights' change by alignment")
_OF_METHODS: dict[str, tuple[str, Mapping[Side, str]]] = {
    "salora": ("directions that carried the base model's refusals on the safety data", _IN_DATA),
    "actsvd": (
        "directions that carried the base model's refusals on the safety data and that the utility data does not use",
        _IN_DATA,
    ),
    "weight-delta": (
        "directions in which the base model's weights differ most from the unaligned model's",
        _OF_WEIGHTS,
    ),
    "sae": (
        "directions of sparse-autoencoder features that tell safe from unsafe responses",
        {"output": "the decoder directions of the kept features", "input": _IN_DATA["input"]},
    ),
}


@dataclass(frozen=True)
class WhatDirections:
    """What the directions of a safety module are, in words."""

    sentence: str
    """Behind "the"; of both sides together."""
    spectra: Mapping[Side, str]
    """Side -> whose singular values and energy there are."""


def what_directions(provenance: Mapping[str, Any]) -> WhatDirections:
    """By the basis method: only data of refusals gives directions of refusals. What names none is of "salora"."""
    method = str(provenance.get("basis_method") or "salora")
    sentence, spectra = _OF_METHODS.get(
        method,
        (
            f"directions that the basis method {method!r} found",
            dict.fromkeys(SIDES, "what the basis method decomposed"),
        ),
    )
    if method == "sae" and "safety_samples" in provenance:
        sentence += ", and, on the input side, those in which the safety data comes in"
    return WhatDirections(sentence, spectra)


def facts(provenance: Mapping[str, Any]) -> str:
    """What a calibration found, in one line: requests, positions, directions, layers, tokenizer and template."""
    parts = []
    if "requests" in provenance:
        parts.append(f"{provenance['refusals']} of {provenance['requests']} requests refused")
    elif not is_without_safety_data(provenance):
        parts.append(f"{provenance.get('safety_samples', '?')} examples")
    if not is_without_safety_data(provenance):
        parts.append(positions_counted(provenance))
    if "utility_samples" in provenance:
        parts.append(f"{provenance['utility_samples']} utility examples")
    directions = provenance.get("directions", {})
    for side in (side for side in SIDES if side in directions):
        least, most = directions[side]
        text = f"{least}" if least == most else f"{least} to {most}"
        parts.append(f"{text} {side} directions{_why_so_many(provenance, side)}")
    if "modules" in provenance:
        parts.append(f"{provenance['modules']} layers")
    if "tokenizer" in provenance:
        template = "its chat template" if provenance.get("has_chat_template") else "no chat template"
        parts.append(f"tokenizer {provenance['tokenizer']} with {template}")
    return "Safety module: " + one_line(", ".join(parts))


def _why_so_many(provenance: Mapping[str, Any], side: Side) -> str:
    """In parentheses, where the number of directions is not simply the one that was asked for."""
    method = provenance.get("basis_method", "salora")
    if method == "sae" and side == "output" and provenance.get("safety_rank") == OPTIONS["safety_rank"].default:
        return " (the default with sae: a share of the variance, layer by layer)"
    if of_side(side, "safety_rank_cut") in provenance:
        return f" ({'the data has' if method == 'salora' else 'there are'} no more)"
    return ""


def leak_line(provenance: Mapping[str, Any]) -> str:
    """The leak by kind of layer and where it is largest, or why it was not measured; empty where nothing is said."""
    leaks: Mapping[str, float] = provenance.get("leak") or {}
    if not leaks:
        reason = provenance.get("leak_unknown")
        return f"Leak: not measured, since {one_line(reason)}" if reason else ""
    worst = sorted(leaks, key=lambda name: -leaks[name])[:_WORST]
    return (
        f"Leak at the last prompt token, on {provenance.get('leak_requests', '?')} harmful requests that were held out "
        f"(0: an update cannot react to them, 1: as to {_everyday(provenance)}; median): "
        + ", ".join(f"{one_line(kind)} {value:.3f}" for kind, value in leak_by_kind(leaks).items())
        + "; largest: "
        + ", ".join(f"{one_line(name)} {leaks[name]:.3f}" for name in worst)
    )


def _everyday(provenance: Mapping[str, Any]) -> str:
    return "those of task_data" if provenance.get("leak_everyday") == "task_data" else "everyday ones"


def leak_by_kind(leaks: Mapping[str, float]) -> dict[str, float]:
    """Last part of the layers' names, such as "q_proj" -> median of their leaks."""
    return {kind: median(leaks[name] for name in names) for kind, names in _by_last_name(dict(leaks)).items()}


def leak_warning(provenance: Mapping[str, Any]) -> str:
    """What to do where a kind of layer leaks more than `LARGE_LEAK`; empty where none does."""
    large = {kind: leak for kind, leak in leak_by_kind(provenance.get("leak") or {}).items() if leak > LARGE_LEAK}
    if not large:
        return ""
    found = ", ".join(f"{one_line(kind)} {leak:.2f}" for kind, leak in large.items())
    counts = header_counts(str(provenance.get("safety_positions")), provenance.get("header_weight", 1))
    return (
        f"The safety module leaks: an update could react to harmful requests that calibration did not see (median leak "
        f"above {LARGE_LEAK}: {found}), so that training which teaches compliance may cost refusals. "
        f"{what_helps(counts)}"
    )


def summary(safety_module: SafetyModule) -> str:
    """A few lines: how many modules and directions, how much they capture, and where they come from."""
    provenance = safety_module.provenance
    lines = [_extent(side, found) for side, found in safety_module.sides.items()]
    base_model = one_line(provenance.get("base_model") or "unnamed")
    lines.append(f"Base model: {base_model} (fingerprint {safety_module.fingerprint[:16]})")
    if not safety_module.protects:
        lines.insert(0, "SAILS: directions that a training starts in. Nothing is protected.")
    lines += _data_lines(provenance)
    engine = one_line(provenance.get("engine", "none" if is_without_safety_data(provenance) else "unknown"))
    if "sketch_width" in provenance:
        inputs = f", of inputs {provenance['input_sketch_width']}" if "input_sketch_width" in provenance else ""
        engine += f" (width {provenance['sketch_width']}{inputs})"
    lines.append(f"Method: {one_line(provenance.get('basis_method', 'unknown'))}, engine: {engine}")
    if "directions" in provenance:
        lines.append(facts(provenance).replace("Safety module", "Calibration"))
    lines += [line for line in (leak_line(provenance), leak_warning(provenance)) if line]
    versions = provenance.get("versions", {})
    lines.append("Versions: " + one_line(", ".join(f"{package} {number}" for package, number in versions.items())))
    return "\n".join(lines)


def _data_lines(provenance: Mapping[str, Any]) -> list[str]:
    """What the directions were computed from."""
    lines = []
    if "unaligned_model" in provenance:
        weights = one_line(str(provenance.get("unaligned_sha256", "unknown"))[:16])
        lines.append(f"Unaligned model: {one_line(provenance['unaligned_model'])} (fingerprint {weights})")
    if not is_without_safety_data(provenance):
        data = f"Safety data: {one_line(provenance.get('safety_data', 'unknown'))}"
        data += f", {provenance.get('safety_samples', '?')} examples"
        if "requests" in provenance:
            data += f" ({provenance.get('refusals', '?')} refusals to {provenance['requests']} requests)"
        if sources := provenance.get("safety_sources"):
            data += f" ({one_line(', '.join(f'{number} of {name}' for name, number in sources.items()))})"
        lines.append(f"{data}, {one_line(positions_counted(provenance))}")
    if "sae" in provenance:
        share = provenance.get("sae_feature_share", "?")
        lines.append(f"Sparse autoencoders: {one_line(str(provenance['sae']))}, {share} of their features")
        pairs, name = provenance.get("contrastive_samples", "?"), provenance.get("contrastive_data", "unknown")
        positions = provenance.get("contrastive_positions", "")
        lines.append(f"Contrastive data: {one_line(str(name))}, {pairs} pairs, {one_line(str(positions))} positions")
    if "utility_data" in provenance:
        samples = provenance.get("utility_samples", "?")
        lines.append(f"Utility data: {one_line(provenance['utility_data'])}, {samples} examples")
    return lines


def table(safety_module: SafetyModule) -> TableOfNames:
    """One row a module."""
    what = what_directions(safety_module.provenance)
    spectra = dict.fromkeys(what.spectra[side] for side in safety_module.sides)
    caption = f"Captured: share of the energy of {', '.join(spectra)}."
    headers = [header for side in safety_module.sides for header in (f"{side} rank", "captured", "values")]
    result = TableOfNames("Module", headers, f"{caption} Values: singular values, first and last.")
    for name, sides in _modules(safety_module).items():
        cells = []
        for found in sides.values():
            share, values = found["captured_energy"], found["singular_values"]
            cells += [
                str(found["rank"]),
                "?" if share is None else percent(share),
                f"{values[0]:.3g} .. {values[-1]:.3g}" if values else "?",
            ]
        result.add_row(name, *cells)
    return result


def write_plot(path: Path, safety_module: SafetyModule) -> None:
    """
    Draw how the singular values decay in every module, and what share of the energy the directions capture; PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(13, 4.2 * len(safety_module.sides))

    from matplotlib import colormaps

    what = what_directions(safety_module.provenance)
    rows = figure.subplots(len(safety_module.sides), 2, squeeze=False)
    for (spectrum_axis, share_axis), (side, found) in zip(rows, safety_module.sides.items(), strict=True):
        spectra, shares = found.singular_values, found.captured_energy
        groups = _by_last_name(spectra)
        for number, (group, names) in enumerate(groups.items()):
            color = colormaps["tab10"](number % 10)
            for index, name in enumerate(names):
                values = spectra[name]
                label = group if index == 0 else None
                spectrum_axis.semilogy(
                    range(1, len(values) + 1), (values / values[0]).clamp(min=1e-8), color=color, alpha=0.4, label=label
                )
            known = [(index, shares[name]) for index, name in enumerate(names) if name in shares]
            if known:
                share_axis.plot(*zip(*known, strict=True), ".-", color=color, label=group)
        spectrum_axis.set_title(f"Singular values of {what.spectra[side]}", fontsize=10)
        spectrum_axis.set_xlabel(f"{side} direction")
        spectrum_axis.set_ylabel("relative to the largest")
        spectrum_axis.legend(fontsize=8)
        share_axis.set_title(f"Share of their energy that the {side} directions capture", fontsize=10)
        share_axis.set_xlabel("layer, in the model's order")
        share_axis.set_ylim(0, 1.02)
        for axis in (spectrum_axis, share_axis):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    save_png(path, figure)


def _modules(safety_module: SafetyModule) -> dict[str, dict[Side, dict[str, Any]]]:
    """Module name -> side -> what is shown of it."""
    shares = {side: found.captured_energy for side, found in safety_module.sides.items()}
    return {
        name: {
            side: {
                "dimension": found.bases[name].shape[0],
                "rank": found.bases[name].shape[1],
                "captured_energy": shares[side].get(name),
                "singular_values": found.singular_values[name].tolist() if name in found.singular_values else [],
            }
            for side, found in safety_module.sides.items()
        }
        for name in safety_module.bases
    }


def _extent(side: Side, found: SideBases) -> str:
    ranks = [basis.shape[1] for basis in found.bases.values()]
    number = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)} (mean {mean(ranks):.1f})"
    text = f"{len(ranks)} modules, {number} {side} directions each"
    if shares := list(found.captured_energy.values()):
        extent = f"{percent(min(shares))} to {percent(max(shares))}"
        text += f", which capture {extent} of the energy (mean {percent(mean(shares))})"
    return text


def _by_last_name(values: dict[str, Any]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    return groups
