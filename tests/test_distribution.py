"""What is installed: the wheel, built from the source distribution, where there is nothing but what it declares."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NOT_OURS = (".*", "build", "dist", "*.egg-info", "__pycache__", "demo-results", "outputs", "site", "integrations")

IMPORT_ALL = """
import importlib, pkgutil, salora_plugins
for module in pkgutil.walk_packages(salora_plugins.__path__, "salora_plugins."):
    try:
        importlib.import_module(module.name)
        print("imported", module.name)
    except ModuleNotFoundError as error:
        print("missing", error.name.partition(".")[0])
"""

# Two layers whose safety data is tokenized, so that nothing but the core is needed.
TRAIN = """
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from salora_plugins import SaLoRAConfig

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes))
tokens = torch.randint(0, 64, (8, 12))
rows = [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in tokens.tolist()]
before = model(tokens).logits
config = SaLoRAConfig(target_modules=["q_proj"], safety_data=rows, safety_rank=4, input_safety_rank=4)
model = get_peft_model(model, config)
assert torch.allclose(model(tokens).logits, before, atol=1e-6)
model.train()(input_ids=tokens, labels=tokens).loss.backward()
assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
print("trained", type(model.base_model).__name__)
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """Build in a process of its own, since setuptools works in the current folder."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it; those of a folder that `make dist` names."""
    if given := os.environ.get("SALORA_DISTRIBUTIONS"):
        (archive,), (wheel,) = Path(given).glob("*.tar.gz"), Path(given).glob("*.whl")
        return archive, wheel
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    # `integrations` is left out wherever it is, and comes from the root only: it may be linked into the package.
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_OURS))
    shutil.copytree(ROOT / "integrations", tree / "integrations", ignore=shutil.ignore_patterns("__pycache__"))
    archive = build("sdist", tree, folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return archive, build("wheel", source, folder)


def needed(requirements: list[str], extra: str = "") -> Iterator[Distribution]:
    """The installed distributions that these requirements lead to."""
    seen: dict[str, Distribution] = {}
    waiting = [(requirement, extra) for requirement in requirements]
    while waiting:
        text, of_extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        for wanted in {"", *requirement.extras}:
            key = f"{re.sub(r'[-_.]+', '-', requirement.name).lower()}[{wanted}]"
            if key not in seen:
                seen[key] = distribution(requirement.name)
                waiting += [(inner, wanted) for inner in seen[key].requires or []]
    yield from {found.metadata["Name"]: found for found in seen.values()}.values()


@pytest.fixture(scope="module")
def python(distributions, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel and what its metadata asks for without any extra."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(packages)
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    requirements = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    for found in needed(requirements):
        for file in found.files or ():
            top = packages / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(Path(str(found.locate_file(file.parts[0]))))
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    result = subprocess.run([python, "-W", "ignore", *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_every_module_and_file(distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    wanted = {f"salora_plugins/{path.relative_to(ROOT / 'salora_plugins')}" for path in package_files("salora_plugins")}
    wanted |= {f"salora_plugins/{path.relative_to(ROOT)}" for path in package_files("integrations")}
    assert not wanted - names
    strangers = {name for name in names - wanted if ".dist-info/" not in name}
    assert not strangers


def package_files(folder: str) -> list[Path]:
    found = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path for path in found if path.relative_to(ROOT).parts[:2] != ("salora_plugins", "integrations")]


def test_the_source_distribution_holds_documents_examples_and_tests(distributions):
    with tarfile.open(distributions[0]) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", "setup.py"} <= names
    for folder in ("docs", "examples", "tests", "benchmarks", "tools"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {file for file in files if "__pycache__" not in file and "/." not in file} <= names, folder


def test_it_runs_with_core_dependencies_only(python):
    *lines, trained = run(python, "-c", IMPORT_ALL + TRAIN).splitlines()
    assert trained == "trained SaLoRAModel"
    assert len([line for line in lines if line.startswith("imported ")]) > 80
    missing = {line.removeprefix("missing ") for line in lines if line.startswith("missing ")}
    assert missing <= {"trl", "axolotl", "datasets"}
    script = "import sys; from importlib.metadata import entry_points as e; sys.argv[0] = 'salora'; "
    help_text = run(python, "-c", script + "e(group='console_scripts')['salora'].load()()", "--help")
    assert "calibrate" in help_text and "evaluate" in help_text
    assert run(python, "-c", "import salora_plugins; print(salora_plugins.__version__)").strip()
