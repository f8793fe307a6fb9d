"""Hosts of other releases than those that the package declares: named, with the range, and never a bare traceback."""

from __future__ import annotations

import os
import re
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import salora_plugins
from salora_plugins import SafetyModule, SaLoRAConfig
from salora_plugins.cli import create_cli, main
from salora_plugins.support import hosts
from tiny import llama, salora_config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEXT_MAJORS = {"torch": "3.0.0", "transformers": "6.0.1", "peft": "1.0.0", "trl": "2.0.0", "axolotl": "0.22.0"}


def requirements() -> list[Requirement]:
    """All that the project declares, with the extras."""
    optional = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *optional]]


@pytest.fixture
def installed(monkeypatch):
    """Versions by distribution that the environment is made to have; the ranges are those of pyproject.toml."""
    versions: dict[str, str] = {}
    real = metadata.version
    monkeypatch.setattr(hosts, "version", lambda name: versions.get(name) or real(name))
    monkeypatch.setattr(hosts, "requires", lambda name: [str(requirement) for requirement in requirements()])
    monkeypatch.setattr(hosts, "_said", set())
    return versions


@pytest.mark.parametrize("host", NEXT_MAJORS)
def test_the_next_major_is_outside_of_what_is_declared(installed, host):
    installed[host] = NEXT_MAJORS[host]
    with pytest.warns(RuntimeWarning) as caught:
        hosts.warn_of_unsupported(host)
    (warning,) = caught
    text = str(warning.message)
    assert f"{host} {NEXT_MAJORS[host]} is installed, it is for {host}>=" in text
    (declared,) = {requirement.specifier for requirement in requirements() if requirement.name == host}
    (wanted,) = re.findall(rf"pip install '{host}([^']+)'", text)
    assert SpecifierSet(wanted) == declared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosts.warn_of_unsupported(host)  # once a process


@pytest.mark.skipif("SALORA_LOWEST" not in os.environ, reason="only where the lowest releases are installed")
def test_what_is_installed_here_is_the_lowest_that_is_declared():
    optional = PROJECT["optional-dependencies"]
    declared = [Requirement(text) for text in [*PROJECT["dependencies"], *optional["trl"], *optional["plot"]]]
    lowest = {each.name: [spec.version for spec in each.specifier if spec.operator == ">="] for each in declared}
    installed = {name: metadata.version(name) for name in lowest}
    assert {name: [Version(text)] for name, text in installed.items()} == {
        name: [Version(text) for text in texts] for name, texts in lowest.items()
    }


@pytest.mark.parametrize("version", ["0.20.9", "1.0.0.dev0", "1.0.0rc1", "2"])
def test_outside(installed, version):
    installed["peft"] = version
    with pytest.warns(RuntimeWarning, match=rf"peft {re.escape(version)} is installed, it is for peft>=0\.21.*,<1"):
        hosts.warn_of_unsupported(*hosts.CORE)


@pytest.mark.parametrize("host, version", [("peft", "0.99.1.dev0"), ("torch", "2.99.0+cu130"), ("axolotl", "0.21.9")])
def test_inside(installed, host, version):
    installed[host] = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosts.warn_of_unsupported(host)


def test_what_is_not_installed_or_not_declared_is_left_to_its_import(installed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hosts.warn_of_unsupported("no-such-host", "packaging")


def test_the_first_name_that_is_used_warns(installed, monkeypatch):
    monkeypatch.delitem(vars(salora_plugins), "SaLoRAConfig", raising=False)
    installed["transformers"] = "6.0.1"
    with pytest.warns(RuntimeWarning, match=r"transformers 6\.0\.1 is installed"):
        assert salora_plugins.SaLoRAConfig is SaLoRAConfig


def test_an_adapter_is_made_in_a_process_with_another_trainer(installed, monkeypatch):
    """Which was imported after the package's own names were."""
    monkeypatch.setitem(sys.modules, "trl", sys.modules.get("trl") or type(sys)("trl"))
    installed["trl"] = "2.0.0"
    model, config = llama(), salora_config()
    from peft import get_peft_model

    with pytest.warns(RuntimeWarning, match=r"trl 2\.0\.0 is installed"):
        get_peft_model(model, config)


@pytest.mark.parametrize("error", [ImportError("cannot import name 'LoraModel'"), AttributeError("no 'LoraModel'")])
def test_a_failing_import_is_explained_by_the_range(installed, error):
    installed["peft"] = "1.0.0"
    wanted = r"peft 1\.0\.0 .* peft>=.*,<1'.* What failed: .*LoraModel"
    with pytest.raises(ImportError, match=wanted) as caught, hosts.explained(*hosts.CORE):
        raise error
    assert caught.value.__cause__ is error


def test_a_failing_import_is_raised_as_it_is_where_the_hosts_are_as_declared(installed):
    with pytest.raises(ImportError, match=r"^something else$"), hosts.explained("peft"):
        raise ImportError("something else")


def test_a_command_ends_in_one_line(installed, monkeypatch, capsys, tmp_path):
    def fails(*args, **kwargs):
        raise ImportError("cannot import name 'LoraModel'")

    monkeypatch.setattr(SafetyModule, "load", fails)
    installed["peft"] = "1.0.0"
    monkeypatch.setattr(sys, "argv", ["salora", "inspect", str(tmp_path)])
    with pytest.warns(RuntimeWarning, match=r"peft 1\.0\.0"), pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ") and "peft 1.0.0 is installed, it is for peft>=" in line and "LoraModel" in line


def test_help_asks_no_host(installed):
    installed["peft"] = "1.0.0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CliRunner().invoke(create_cli(), ["audit", "--help"]).exit_code == 0
