"""Which room of the package may import which: no circles, and nothing from a lower level up."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import fresh

ROOT = Path(__file__).parent.parent

# From the lowest to the highest. A module may import from its own room and from rooms of lower levels, not from another
# room of its level. Imports within functions and those for type checkers count; those by name (importlib) are few:
# plugins, the exports of the package, and `registration`.
LAYERS = (
    ("support",),
    ("ranks", "initialization", "provenance"),
    ("options",),
    ("safety_module",),
    ("inspection", "models"),
    ("activations",),
    ("hookspecs",),
    ("plugins",),
    ("prompts", "rows"),
    ("inference",),
    ("bases",),
    ("lora_options",),
    ("config",),
    ("calibration", "parametrization"),
    ("adapters",),
    ("tuning",),
    ("tuner",),
    ("registration", "resuming", "evaluation", "replay", "doctor"),
    ("attribution", "repair"),
    ("commands", "integrations"),
    ("demo",),
    ("__init__", "cli"),
)
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Module name within the package -> its file."""
    found = {}
    for folder, prefix in ((ROOT / "salora_plugins", ()), (ROOT / "integrations", ("integrations",))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == "salora_plugins" and parts[0] == "integrations":
                continue  # a link to the other folder
            found[".".join((*prefix, *parts))] = path
    return found


MODULES = modules()

IMPORTS_EACH_FIRST = """
import gc, importlib, json, os, sys
for hosts, names in json.loads(sys.argv[1]):
    for host in hosts:
        importlib.import_module(host)
    gc.freeze()  # a collection in a child would copy the memory of all of them
    for name in names:
        child = os.fork()
        if not child:
            try:
                importlib.import_module(name)
            except BaseException as error:
                print(f"FAILED {name}: {error!r}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in the file."""
    package = f"salora_plugins.{name}".rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (_module(f"{target}.{alias.name}") or _module(target) or "" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (_module(alias.name) or "" for alias in node.names)


def _module(name: str) -> str | None:
    if name == "salora_plugins":
        return "__init__"
    inside = name.removeprefix("salora_plugins.")
    return next((found for found in (inside, f"{inside}.__init__") if inside != name and found in MODULES), None)


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_a_layer():
    assert {room(name) for name in MODULES} == set(LEVELS)


def test_nothing_imports_upwards():
    upwards = [
        f"{name} imports {target}"
        for name in MODULES
        for target in imports(name)
        if target and room(target) != room(name) and LEVELS[room(target)] >= LEVELS[room(name)]
    ]
    assert not upwards


def test_no_circles():
    graph = {name: {target for target in imports(name) if target and target != name} for name in MODULES}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"a circle among {sorted(graph)}"


def test_what_is_imported_by_name_is_listed():
    """Plugins and lazy exports are; nothing else passes the test above by writing a module's name as a text."""
    users = {n for n, path in MODULES.items() if "import_module(" in path.read_text(encoding="utf-8")}
    assert users == {"__init__", "plugins", "rows.sources"}


def test_no_function_is_longer_than_90_lines():
    files = [*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90
    ]
    assert not long


def test_few_modules_at_the_top():
    assert len([name for name in MODULES if "." not in name]) <= 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_imported_first():
    """
    Each in a process of its own, forked from one in which this package is not: those of the core from one with what it
    imports itself, those of the integrations from one with all hosts, too.
    """
    hosts = [host for host in ("trl", "axolotl") if importlib.util.find_spec(host)]
    names = [f"salora_plugins.{name.removesuffix('.__init__')}" for name in MODULES]
    names = [n for n in names if not any(f"integrations.{h}" in n and h not in hosts for h in ("trl", "axolotl"))]
    of_core = [name for name in names if ".integrations." not in name]
    stages = [
        (["torch", "transformers", "peft", "pydantic", "typer"], of_core),
        (hosts, [name for name in names if name not in of_core]),
    ]
    result = fresh.run(["-c", IMPORTS_EACH_FIRST, json.dumps(stages)])
    problems = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    assert result.returncode == 0 and not problems, "\n".join(problems) + result.stderr
