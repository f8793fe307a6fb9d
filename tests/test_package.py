"""The package as a whole: what its names stand for, and what it declares to need."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import fresh

ROOT = Path(__file__).parent.parent

# In a process of its own: in this one, other tests have imported what they needed, in their own order.
NAMES = """
import importlib, json, pkgutil, types
import salora_plugins

found = [name for _, name, _ in pkgutil.walk_packages(salora_plugins.__path__, "salora_plugins.")]
missing, modules = [], {"salora_plugins": salora_plugins}
for name in found:
    try:
        modules[name] = importlib.import_module(name)
    except ImportError as error:  # a host or an extra that is not installed
        missing.append([name, error.name])
exports, clashes, as_modules = 0, [], []
for name, module in modules.items():
    names = getattr(module, "__all__", ())
    exports += len(names)
    as_modules += [f"{name}.{export}" for export in names if isinstance(getattr(module, export), types.ModuleType)]
    inside = [other.removeprefix(name + ".") for other in found if other.startswith(name + ".")]
    clashes += [f"{name}.{export}" for export in names if export in inside]
    # Nor does any other value of a package hide one of its submodules.
    here = {part: vars(module)[part] for part in inside if part in vars(module)}
    clashes += [f"{name}.{part}" for part, value in here.items() if value is not modules.get(f"{name}.{part}")]
found = {"modules": len(modules), "exports": exports, "clashes": clashes, "as modules": as_modules}
print(json.dumps({**found, "missing": missing}))
print(json.dumps([type(getattr(salora_plugins, name)).__name__ for name in salora_plugins.__all__]))
"""


def test_no_name_is_taken_by_a_submodule_whatever_was_imported_before():
    result = fresh.run(["-c", NAMES], check=True)
    found, kinds = (json.loads(line) for line in result.stdout.splitlines()[-2:])
    assert found["clashes"] == found["as modules"] == []
    assert found["modules"] > 60 and found["exports"] > 20
    assert all(not str(name).startswith("salora_plugins") for _, name in found["missing"]), found["missing"]
    assert set(kinds) == {"type", "ABCMeta", "function", "str"}


# Of what the extras hold, what may be imported where; everything else is a dependency of every installation.
EXTRAS = {
    "data": ["datasets"],
    "plot": ["matplotlib"],
    "lm-eval": ["lm_eval"],
    "sae": ["sae_lens"],
    "trl": ["trl", "datasets"],
    "axolotl": ["axolotl", "click"],
}


OF_A_HOST = {"deepspeed"}
"""Imported only where the parameters at hand are its own already."""


def imported(folder: Path) -> dict[str, str]:
    """Top-level module that is imported anywhere in a folder, also within functions -> a file that does."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.partition(".")[0]: str(file.relative_to(folder.parent)) for name in names}
    return {name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, "salora_plugins"}}


def module_names(requirements: list[str]) -> set[str]:
    names = {re.match(r"[\w.-]+", requirement).group().lower().replace("-", "_") for requirement in requirements}
    return names - {"salora_plugins"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = module_names(project["dependencies"])
    assert all(re.search(r">=\d", requirement) for requirement in project["dependencies"])
    optional = project["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert set(modules) <= module_names(optional[extra]), extra
    core = imported(ROOT / "salora_plugins")
    in_extras = {name for modules in EXTRAS.values() for name in modules}
    undeclared = {name: file for name, file in core.items() if name not in needed | in_extras | OF_A_HOST}
    assert not undeclared
    assert not needed - set(core), "declared, but imported nowhere"
    integrations = imported(ROOT / "integrations")
    assert not {name: file for name, file in integrations.items() if name not in needed | in_extras}
