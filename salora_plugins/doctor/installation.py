"""The installation and the machine: versions, hosts, devices, the cache."""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..calibration.cache import FOLDER_VARIABLE, cache_folder
from ..plugins import plugin_manager, register_peft_types
from ..support.memory import accelerator_memory, free_memory
from ..support.numbers import size
from ..support.version import PACKAGE, package_version
from .findings import Finding, Status

# Distribution -> what it is for, and how it comes. What this package cannot do without is read from its metadata.
_OPTIONAL = {
    "trl": ("TRL's trainers and scripts", f'pip install "{PACKAGE}[trl]"'),
    "axolotl": ("adapter: salora", f'pip install "{PACKAGE}[axolotl]" (Python 3.12 or newer)'),
    "datasets": ("data sets of the hub, parquet files", f'pip install "{PACKAGE}[data]"'),
    "matplotlib": ("plots and pages", f'pip install "{PACKAGE}[plot]"'),
    "lm-eval": ("salora evaluate --lm-eval", f'pip install "{PACKAGE}[lm-eval]"'),
    "sae-lens": ("published sparse autoencoders", f'pip install "{PACKAGE}[sae]"'),
    "bitsandbytes": ("base models in 4 and 8 bits", "pip install bitsandbytes"),
    "torchao": ("base models that torchao has quantized", "pip install torchao"),
    "deepspeed": ("ZeRO", "pip install deepspeed"),
    "vllm": ("serving, and generating within GRPO", "pip install vllm"),
}
# What Axolotl finds this package by: group, name.
_AXOLOTL_ENTRY_POINTS = (("axolotl.plugins", "salora"), ("axolotl.cli_commands", "salora-calibrate"))


def examine_installation() -> list[Finding]:
    """Versions and their declared ranges, hosts and whether they find this package, devices, the cache."""
    return [*_packages(), *_hosts(), *_plugins(), *_devices(), _cache()]


def _packages() -> Iterator[Finding]:
    yield Finding("Packages", PACKAGE, package_version())
    python = metadata(PACKAGE).get("Requires-Python") or ""
    inside = python == "" or platform.python_version() in SpecifierSet(python, prereleases=True)
    yield Finding(
        "Packages",
        "Python",
        f"{platform.python_version()} (declared: {python})",
        "ok" if inside else "problem",
        "" if inside else "Make an environment with another Python",
    )
    needed, optional = _declared()
    for name, requirement in needed.items():
        yield _package(name, requirement, None)
    for name in _OPTIONAL:
        yield _package(name, optional.get(name), _OPTIONAL[name])


def _declared() -> tuple[dict[str, SpecifierSet], dict[str, SpecifierSet]]:
    """What every installation needs, and what the extras name that are for users."""
    needed: dict[str, SpecifierSet] = {}
    optional: dict[str, SpecifierSet] = {}
    for text in requires(PACKAGE) or ():
        requirement = Requirement(text)
        if requirement.marker is None or "extra" not in str(requirement.marker):
            needed[requirement.name] = requirement.specifier
        elif requirement.name in _OPTIONAL:
            optional.setdefault(requirement.name, requirement.specifier)
    return needed, optional


def _package(name: str, declared: SpecifierSet | None, optional: tuple[str, str] | None) -> Finding:
    """
    Args:
        name: The distribution.
        declared: Its range, where there is one.
        optional: What it is for and how it comes; None: nothing works without it.
    """
    install = f'pip install "{name}{declared or ""}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        if optional is None:
            return Finding("Packages", name, "not installed", "problem", install)
        return Finding("Packages", name, f"not installed; for {optional[0]}", "absent", optional[1])
    if not declared:
        return Finding("Packages", name, found)
    text = f"{found} (declared: {declared})"
    if declared.contains(found, prereleases=True):
        return Finding("Packages", name, text)
    # A package of an extra may be there for something else.
    status: Status = "problem" if optional is None else "warning"
    return Finding("Packages", name, f"{text}, outside of what was tested", status, install)


def _hosts() -> Iterator[Finding]:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    register_peft_types()
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get("SALORA")  # type: ignore[call-overload]  # keyed by PEFT's own enum, of texts
    known = tuner is not None and tuner.__module__.startswith("salora_plugins.")
    yield Finding(
        "Hosts",
        "PEFT",
        "knows the type SALORA" if known else "has another tuner under the type SALORA",
        "ok" if known else "problem",
        "" if known else "Find out which package registers it, and leave that out",
    )
    if _is_installed("trl"):
        yield Finding("Hosts", "TRL", "takes peft_config=SaLoRAConfig(...); nothing is to be registered")
    if not _is_installed("axolotl"):
        return
    for group, name in _AXOLOTL_ENTRY_POINTS:
        found = [entry for entry in entry_points(group=group, name=name) if entry.value.startswith("salora_plugins.")]
        works = bool(found) and importlib.util.find_spec(found[0].module) is not None
        yield Finding(
            "Hosts",
            f"Axolotl, {group}",
            f"finds {name}" if works else f"does not find {name}",
            "ok" if works else "problem",
            "" if works else f"Install this package again, so that its entry points are written: pip install {PACKAGE}",
        )


def _plugins() -> Iterator[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager = plugin_manager.__wrapped__()  # not the one that is there: those that fail warn only when it is made
        names = [name for name, _ in manager.list_name_plugin() if not name.startswith("salora_plugins.")]
    for name in names:
        yield Finding("Hosts", f"plugin {name}", "loaded")
    for warning in caught:
        if "is skipped" in str(warning.message):
            yield Finding("Hosts", "a plugin", str(warning.message), "warning", "Upgrade it, or uninstall it")


def _devices() -> Iterator[Finding]:
    yield Finding("Devices", "CPU", f"{os.cpu_count()} cores, {size(free_memory())} of memory free")
    for name, (free, total) in accelerator_memory().items():
        device = torch.cuda.get_device_name(torch.device(name))
        yield Finding("Devices", name, f"{device}, {size(free)} of {size(total)} free")
    if not torch.accelerator.is_available():
        yield Finding("Devices", "accelerator", "none that this torch can use: models run on the CPU", "warning")
    elif (accelerator := torch.accelerator.current_accelerator()) is not None and accelerator.type != "cuda":
        yield Finding("Devices", str(accelerator), "available")


def _cache() -> Finding:
    folder = cache_folder()
    if folder is None:
        return Finding(
            "Cache",
            "safety modules",
            "no home folder: they are not kept",
            "warning",
            f"Set {FOLDER_VARIABLE} to a folder",
        )
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    text = f"{folder}: {len(files)} kept, {size(sum(file.stat().st_size for file in files))}"
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return Finding("Cache", "safety modules", text)
    return Finding(
        "Cache",
        "safety modules",
        f"{text}; {existing} cannot be written to, so that every run calibrates anew",
        "warning",
        f"Set {FOLDER_VARIABLE} to a folder that can",
    )


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
