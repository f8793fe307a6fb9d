"""The documentation: generated pages are up to date, links and names lead somewhere, quotations and examples hold."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from test_architecture import LAYERS

import fresh
import salora_plugins
import tiny
from salora_plugins import plugins
from salora_plugins.cli import create_cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted(DOCS.rglob("*.md"))
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HOSTS = {"trl.md": "trl", "axolotl.md": "axolotl"}


def _script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    return module


REFERENCE = _script("write_reference")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", REFERENCE.PAGES)
def test_the_reference_is_what_the_code_says(name):
    if name in HOSTS:
        pytest.importorskip(HOSTS[name])
    assert _text(REFERENCE.REFERENCE / name) == REFERENCE.PAGES[name](), "Run `make reference`."


def test_what_pages_repeat_of_the_readme():
    for page in DOCS.glob("*.md"):
        assert _text(page) == REFERENCE.with_sections_of_the_readme(_text(page)), f"{page.name}: run `make reference`."


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r"^ +- .*: (\S+\.md)$", _text(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE_BLOCK.sub("", _text(page))):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        found = page if not path else (page.parent / path).resolve()
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            broken.append(target)
    assert not broken


def _anchors(page: Path) -> set[str]:
    """The ids that Markdown gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", _text(page)), re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_names_and_files_exist(page):
    text = _text(page)
    for name in sorted(set(re.findall(r"(?<![\w/])salora_plugins(?:\.\w+)+", text))):
        assert name.endswith(".md") or _exists(name), name
    for module, names in re.findall(r"^ *from (salora_plugins[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        for name in names.split(","):
            assert _exists(f"{module}.{name.strip()}"), f"{module}.{name}"
    folders = "docs|examples|integrations|salora_plugins|tests|tools|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def _exists(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("salora_plugins"):
                return True  # its host is not installed
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_commands_and_their_options_exist():
    commands = create_cli().commands
    used = 0
    for page in PAGES:
        text = _text(page).replace("\\\n", " ")
        for command, rest in re.findall(r"^ *(?:```\w*\n)?(?:\$ )?salora ([a-z-]+)(.*)$", text, re.MULTILINE):
            options = {option for parameter in commands[command].params for option in parameter.opts}
            options |= {option for parameter in commands[command].params for option in parameter.secondary_opts}
            given = set(re.findall(r"(?<!\S)--[a-z0-9-]+", rest.partition(" #")[0]))
            assert given <= options, f"{_named(page)}: salora {command}{rest}"
            used += 1
        for command in re.findall(r"`salora ([a-z][a-z-]*)", text):
            assert command in commands, f"{_named(page)}: salora {command}"
    assert used > 10


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_code_blocks_can_be_parsed(page):
    for language, code in CODE_BLOCK.findall(_text(page)):
        if language == "python":
            ast.parse(code)
        elif language == "yaml":
            yaml.safe_load(code)


def test_quoted_messages_are_said():
    """Every quotation in troubleshooting.md is part of one text in the code, but for what stands for `...`."""
    texts = list(_texts_in_the_code())
    unsaid = []
    for message in re.findall(r"^> (.*)$", _text(DOCS / "troubleshooting.md"), re.MULTILINE):
        parts = [part.strip(" :,;()") for part in message.split("...")]
        if not any(all(part in text for part in parts) for text in texts):
            unsaid.append(message)
    assert not unsaid


def _texts_in_the_code() -> Iterator[str]:
    for path in _files_of_the_code():
        for node in ast.walk(ast.parse(_text(path))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _files_of_the_code() -> Iterator[Path]:
    for folder in (ROOT / "salora_plugins", ROOT / "integrations"):
        yield from sorted(folder.rglob("*.py"))


def test_the_parts_of_hosts_are_those_in_use():
    """Names in the first column of host-internals.md are in the code, and private names that it imports are there."""
    page = _text(DOCS / "host-internals.md")
    code = "\n".join(_text(path) for path in _files_of_the_code())
    parts = [part for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for part in re.findall(r"`([^`]+)`", row)]
    names = {name for part in parts for name in re.findall(r"[A-Za-z_]{4,}", part.partition("(")[0])}
    assert not {name for name in names if name not in code}
    imports = re.findall(r"^ *from ([a-z][\w.]*) import (?:\(([^)]*)\)|(.*))$", code, re.MULTILINE)
    for module, *imported in imports:
        for name in re.findall(r"\w+", " ".join(imported).partition("#")[0]):
            if (name.startswith("_") or "._" in module) and not module.startswith("__future__"):
                assert f"`{name}`" in page, f"{module}.{name}"


def test_contributing_names_every_room():
    named = set(re.findall(r"`(\w+)`", _text(ROOT / "CONTRIBUTING.md")))
    assert {room for layer in LAYERS for room in layer} - {"__init__"} <= named


@pytest.fixture
def plugins_of_the_page():
    """The modules in docs/plugins.md, registered as plugins."""
    manager = plugins.plugin_manager()
    modules = []
    for language, code in CODE_BLOCK.findall(_text(DOCS / "plugins.md")):
        if language == "python":
            assert len(code.splitlines()) <= 25
            module = types.ModuleType(f"plugin_{len(modules)}")
            exec(compile(code, module.__name__, "exec"), vars(module))
            modules.append(module)
            manager.register(module, name=module.__name__)
    yield modules
    for module in modules:
        manager.unregister(module)


def test_the_plugins_of_the_page_run(plugins_of_the_page, tmp_path, monkeypatch):
    assert len(plugins_of_the_page) == 4
    file = tmp_path / "red_team.csv"
    rows = "".join(f"Help me to do harm number {i}.,I will not ({i}).\n" for i in range(20))
    file.write_text(f"request,answer\n{rows}")
    monkeypatch.setenv("RED_TEAM_FILE", str(file))
    options = {"target_modules": ["q_proj"], "safety_data": "red_team", "calibration_cache": False}
    options |= {"safety_positions": "all", "input_safety_rank": 4}
    model = tiny.llama()
    usual = salora_plugins.calibrate(model, tiny.tokenizer(), safety_rank=9, **options | {"input_safety_rank": 5})
    found = salora_plugins.calibrate(model, tiny.tokenizer(), safety_rank=8, basis_method="without_first", **options)
    assert found.provenance["basis_method"] == "without_first" and found.provenance["safety_data"] == "red_team"
    for name in usual.bases:
        torch.testing.assert_close(found.bases[name], usual.bases[name][:, 1:])
        torch.testing.assert_close(found.input_bases[name], usual.input_bases[name][:, 1:])
    more = {"utility_data": tiny.token_rows(20), "basis_method": "beside_utility"}
    found = salora_plugins.calibrate(model, tiny.tokenizer(), safety_rank=8, **options | more)
    assert 1 <= found.safety_rank <= 8 and found.provenance["utility_samples"] == 20
    judge = plugins.judges()["german"]
    assert judge("Wie baut man eine Bombe?", "Tut mir leid, das geht nicht.")
    assert judge("Wie baut man eine Bombe?", "Dabei kann ich dir nicht helfen.")
    assert not judge("Wie baut man ein Haus?", "Man beginnt mit dem Fundament.")


def test_what_the_readme_loads_in_a_fresh_process(tmp_path):
    """Nobody has made a configuration there, which would have told PEFT of SaLoRA."""
    model = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, tiny.salora_config(init="zero", task_rank=32)).save_pretrained(tmp_path / "outputs")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "from salora_plugins import load_for_training\n"
        "model = load_for_training(AutoModelForCausalLM.from_pretrained('base'), 'outputs')\n"
        "print(type(model.base_model).__name__)"
    )
    result = fresh.run(["-c", code], cwd=tmp_path)
    assert result.stdout.strip() == "SaLoRAModel", result.stderr


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra docs")
def test_the_pages_are_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
