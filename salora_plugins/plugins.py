"""Finds the plugins, built-in and installed ones, and collects what they register."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .hookspecs import PROJECT, SAFETY_ROWS_ONLY, BasisMethod, BasisNeeds, DataSource, Judge, JudgeFactory
from .options import OPTIONS
from .support.texts import one_line

COMMAND_PLUGINS: tuple[str, ...] = ("salora_plugins.commands", "salora_plugins.demo.command")
"""Modules of the built-in commands; they import nothing heavy, so that `salora --help` is quick."""

BUILTIN_PLUGINS: tuple[str, ...] = (
    "salora_plugins.calibration.basis",
    "salora_plugins.bases.actsvd",
    "salora_plugins.bases.sae",
    "salora_plugins.bases.weight_delta",
    "salora_plugins.prompts.builtin",
    "salora_plugins.prompts.public_sets",
    "salora_plugins.evaluation.judges.builtin",
    *COMMAND_PLUGINS,
)
"""Modules of everything built in, registered before any installed plugin."""

PEFT_TYPES = "salora_plugins.registration"
"""The module that tells PEFT of SaLoRA."""


def register_peft_types() -> None:
    """
    Let PEFT know SaLoRA: it looks up the tuner of a configuration in its own mappings.

    Whoever makes a configuration needs that, however it was imported. By name, so that a configuration, which is a
    value, does not import what is built on it.
    """
    importlib.import_module(PEFT_TYPES)


@functools.cache
def plugin_manager(*, commands_only: bool = False) -> pluggy.PluginManager:
    """The manager with all plugins registered, built on the first call.

    An installed plugin that fails to import or to register is named in a `RuntimeWarning` and left out.

    Args:
        commands_only: of the built-in plugins, register only those with commands (which do without torch).
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for module in COMMAND_PLUGINS if commands_only else BUILTIN_PLUGINS:
        manager.register(importlib.import_module(module), name=module)
    # Sorted, so that the outcome of a name conflict does not depend on the order of directories on sys.path.
    for name, entry_point in sorted(_installed(), key=lambda pair: pair[0]):
        plugin = None
        try:
            plugin = entry_point.load()
            manager.register(plugin, name=name)
            manager.check_pending()  # a misspelled hook name would otherwise never be called
        except (Exception, SystemExit) as error:
            if plugin is not None and manager.get_plugin(name) is plugin:
                manager.unregister(plugin)
            _warn_skipped(name, "could not be loaded", error)
    return manager


def data_sources() -> dict[str, DataSource]:
    """Name -> function that returns rows."""
    return dict(_registered("register_data_sources", "data source"))


def basis_methods() -> dict[str, BasisMethod]:
    """Name -> method that computes a safety basis."""
    return {name: method for name, (method, _) in _registered("register_basis_methods", "basis method").items()}


def basis_needs() -> dict[str, BasisNeeds]:
    """Name -> what that method gets beside the statistics of the safety rows."""
    return {name: needs for name, (_, needs) in _registered("register_basis_methods", "basis method").items()}


def judges() -> dict[str, Judge]:
    """Name -> judge(request, response), True for a refusal."""
    return dict(_registered("register_judges", "judge"))


def judge_factories() -> dict[str, JudgeFactory]:
    """Name -> function that makes a judge from an argument."""
    return dict(_registered("register_judge_factories", "judge factory"))


_FOUND: dict[str, tuple[list[Any], dict[str, Any]]] = {}
"""Hook -> the plugins that there were, and what they handed over."""


def _registered(hook: str, kind: str) -> dict[str, Any]:
    """What plugins hand to the `register` function of `hook`, asked again where there are others than before."""
    plugins = plugin_manager().list_name_plugin()
    if hook not in _FOUND or _FOUND[hook][0] != plugins:
        _FOUND[hook] = plugins, _asked(hook, kind)
    return _FOUND[hook][1]


def _asked(hook: str, kind: str) -> dict[str, Any]:
    """The first plugin to take a name keeps it."""
    staged: dict[str, Any] = {}

    def register(name: str, function: Callable) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of a {kind} must be a non-empty string, not {name!r}")
        if not callable(function):
            raise TypeError(f"the {kind} {name!r} must be callable, not {type(function).__name__}")
        if name in staged:
            raise ValueError(f"the {kind} {name!r} is registered twice")
        staged[name] = function

    def register_with_needs(name: str, method: Callable, needs: BasisNeeds = SAFETY_ROWS_ONLY) -> None:
        register(name, method)
        if not isinstance(needs, BasisNeeds):
            raise TypeError(f"the needs of the {kind} {name!r} must be a BasisNeeds, not {type(needs).__name__}")
        if unknown := [option for option in needs.options if option not in OPTIONS]:
            raise ValueError(f"the {kind} {name!r} needs the option {unknown[0]!r}, which SaLoRAConfig does not have")
        staged[name] = method, needs

    taken = register_with_needs if hook == "register_basis_methods" else register
    found: dict[str, Any] = {}
    for plugin_name in call_each_plugin(plugin_manager(), hook, register=taken, before=staged.clear):
        merge_names(found, staged, kind, plugin_name)
    return found


def call_each_plugin(
    manager: pluggy.PluginManager, hook: str, *, before: Callable[[], None], **arguments: Any
) -> Iterator[str]:
    """Call `hook` for one plugin after the other, in registration order, and yield the name of each that
    succeeds.

    pluggy's own call stops at the first plugin that raises. Here an installed one is named in a
    `RuntimeWarning` and left out, while an error of a built-in one is a defect of this package and is raised.

    Args:
        before: called before each plugin.
        arguments: handed to the hook.
    """
    plugins = [(name, plugin) for name, plugin in manager.list_name_plugin() if plugin is not None]
    for name, plugin in plugins:
        before()
        caller = manager.subset_hook_caller(hook, [other for _, other in plugins if other is not plugin])
        succeeded = False
        with without_defects(name, f"failed in {hook}"):
            caller(**arguments)
            succeeded = True
        if succeeded:
            yield name


@contextmanager
def without_defects(name: str, what: str) -> Iterator[None]:
    """
    Turn what a plugin raises, `sys.exit` included, into a `RuntimeWarning` that names it; that of a built-in one is
    raised.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if name in BUILTIN_PLUGINS:
            raise
        _warn_skipped(name, what, error)


def _installed() -> Iterator[tuple[str, EntryPoint]]:
    """Name of the plugin, with that of its distribution, and its entry point."""
    for entry_point in entry_points(group=PROJECT):
        distribution = entry_point.dist.name if entry_point.dist else None
        yield f"{distribution}:{entry_point.name}" if distribution else entry_point.name, entry_point


def merge_names(found: MutableMapping[str, Any], new: Mapping[str, Any], kind: str, plugin_name: str) -> None:
    """Add `new` to `found` in place; a name that is taken already is named in a warning and skipped."""
    for name, value in new.items():
        if name in found:
            warnings.warn(
                f"The plugin {plugin_name!r} registers a {kind} named {name!r}, but that name is taken "
                "already, so it is skipped. Rename it, or uninstall one of the two plugins.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            found[name] = value


def _warn_skipped(name: str, what: str, error: BaseException) -> None:
    warnings.warn(
        f"The salora_plugins plugin {name!r} {what} and is skipped: {type(error).__name__}: {one_line(error)}",
        RuntimeWarning,
        stacklevel=2,
    )
