"""The package as a whole: what its names stand for, and what it declares to need."""

from __future__ import annotations

import json
import subprocess
import sys

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
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", NAMES], capture_output=True, text=True, check=True)
    found, kinds = (json.loads(line) for line in result.stdout.splitlines()[-2:])
    assert found["clashes"] == found["as modules"] == []
    assert found["modules"] > 60 and found["exports"] > 20
    assert all(not str(name).startswith("salora_plugins") for _, name in found["missing"]), found["missing"]
    assert set(kinds) == {"type", "ABCMeta", "function", "str"}
