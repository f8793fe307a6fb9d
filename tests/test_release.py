"""A release, and what runs where the repository is published: commands of the Makefile, on what is declared."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = ROOT / ".github" / "workflows"
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
release_notes = runpy.run_path(str(ROOT / "tools" / "write_release_notes.py"))["release_notes"]

# A source distribution has no hidden folders.
in_the_repository = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="not a checkout of the repository")


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))


def commands(job: dict[str, Any]) -> list[str]:
    """Every command of a job, for every row of its matrix."""
    rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    found = []
    for row in rows:
        for step in job["steps"]:
            filled = re.sub(
                r"\$\{\{ matrix\.([\w-]+) \}\}", lambda match, row=row: str(row[match[1]]), step.get("run", "")
            )
            found += filled.splitlines()
    return found


def pythons(job: dict[str, Any]) -> set[str]:
    rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
    return {row["python"] for row in rows}


@in_the_repository
def test_every_job_runs_a_target_that_exists():
    jobs = workflow("ci.yml")["jobs"]
    for name, job in jobs.items():
        made = [command.split()[1] for command in commands(job) if command.startswith("make ")]
        assert made, name
        assert set(made) <= TARGETS, name
        assert all(command.startswith("make ") for command in commands(job)), name


@in_the_repository
def test_all_that_the_repositorys_own_run_makes_is_made():
    published = {c.split()[1] for job in workflow("ci.yml")["jobs"].values() for c in commands(job)}
    own = set(re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"test", "test-newest", "test-lowest", "docs", "lint"} <= own
    assert own == published


@in_the_repository
def test_every_python_that_is_named_is_run():
    named = {match[1] for text in PROJECT["classifiers"] if (match := re.search(r":: (3\.\d+)$", text))}
    assert pythons(workflow("ci.yml")["jobs"]["tests"]) == named
    assert PROJECT["requires-python"] == f">={min(named, key=lambda version: int(version[2:]))}"


@in_the_repository
def test_every_python_that_is_run_is_one_that_its_environment_is_made_with():
    script = (ROOT / "tools" / "setup_environment.sh").read_text(encoding="utf-8")
    lists = dict(re.findall(r'^    (\w+,\S+)\) versions="([\d. ]+)"', script, re.MULTILINE))
    kinds = {"test-lowest": "lowest,*", "test": "newest,*", "test-newest": "newest,test"}
    for row in workflow("ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["include"]:
        assert row["python"] in lists[kinds[row["target"]]].split(), row


@in_the_repository
def test_a_release_is_built_from_its_tag_and_published_only_where_that_was_asked_for():
    jobs = workflow("release.yml")["jobs"]
    assert workflow("release.yml")[True] == {"push": {"tags": ["v*"]}}  # YAML's `on`
    assert commands(jobs["build"]) == ["make dist TAG=${{ github.ref_name }}"]
    assert jobs["publish"]["if"] == "vars.PUBLISH == 'true'"
    assert jobs["publish"]["needs"] == "build"
    # A tag may be of a commit that was never pushed to a branch.
    assert jobs["build"]["needs"] == "tests" and jobs["tests"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in workflow("ci.yml")[True]
    # The notes wait for what is published; a job that is skipped would skip them without a condition.
    assert jobs["notes"]["needs"] == ["build", "publish"]
    assert "needs.build.result == 'success'" in jobs["notes"]["if"] and "needs.publish.result" in jobs["notes"]["if"]
    # Who may write what is said job by job.
    assert workflow("release.yml")["permissions"] == workflow("ci.yml")["permissions"] == {"contents": "read"}


CHANGELOG = "# Changelog\n\n## 0.2.0 (unreleased)\n\n- Not yet.\n\n## 0.1.0 (2026-12-01)\n\n- One.\n- Two.\n"


def test_the_notes_are_the_section_of_the_version():
    assert release_notes(CHANGELOG, "0.1.0", "v0.1.0") == "# salora-plugins 0.1.0\n\n- One.\n- Two.\n"
    assert release_notes(CHANGELOG, "0.2.0") == "# salora-plugins 0.2.0\n\n- Not yet.\n"


@pytest.mark.parametrize(
    "version, tag, message",
    [
        ("0.3.0", None, "0 sections of version 0.3.0"),
        ("0.1.0", "v0.1.1", "tag v0.1.1 is not of version 0.1.0"),
        ("0.1.0", "0.1.0", "Tag it v0.1.0"),
        ("0.2.0", "v0.2.0", r"## 0.2.0 (unreleased) has no date yet"),
    ],
)
def test_no_release_where_tag_version_and_changelog_differ(version, tag, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        release_notes(CHANGELOG, version, tag)


def test_an_empty_section_is_no_release():
    with pytest.raises(ValueError, match="is empty"):
        release_notes("## 0.2.0 (2027-01-01)\n\n## 0.1.0\n\n- One.\n", "0.2.0")


def test_the_changelog_has_notes_of_this_version(tmp_path):
    notes = tmp_path / "notes.md"
    script = ROOT / "tools" / "write_release_notes.py"
    subprocess.run([sys.executable, script, notes, "--tag", ""], check=True, capture_output=True)
    first, _, *lines = notes.read_text(encoding="utf-8").splitlines()
    assert first == f"# salora-plugins {PROJECT['version']}"
    assert lines[0].startswith("- ") and not any(line.startswith("## ") for line in lines)
    stopped = subprocess.run([sys.executable, script, notes, "--tag", "v999"], capture_output=True, text=True)
    assert stopped.returncode == 1 and stopped.stderr.startswith("Error: The tag v999")


def test_the_version_stands_in_one_place():
    """Besides, it stands in the changelog, and with what was measured."""
    version = re.compile(rf"(?<![\d.]){re.escape(PROJECT['version'])}(?![\d.])")
    files = [path for folder in ("salora_plugins", "integrations", "tools") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / name for name in ("setup.py", "Makefile", "README.md", "CITATION.cff", "mkdocs.yml")]
    assert not [str(path.relative_to(ROOT)) for path in files if version.search(path.read_text(encoding="utf-8"))]


def test_authors_are_those_of_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert [author["name"] for author in PROJECT["authors"]] == [author["name"] for author in citation["authors"]]
    assert PROJECT["urls"]["Paper"] == citation["preferred-citation"]["url"]
    assert PROJECT["license"] == citation["license"] and PROJECT["name"] == citation["title"]
