"""Writes the notes of a release: what CHANGELOG.md says of the version in pyproject.toml.

    python tools/write_release_notes.py dist/RELEASE_NOTES.md              # or `make dist`
    python tools/write_release_notes.py dist/RELEASE_NOTES.md --tag v1.2.3 # or `make dist TAG=v1.2.3`

With a tag it stops where that is of another version, or where the changelog calls the version unreleased.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
_HEADING = re.compile(r"^## (?P<version>\S+)(?: \((?P<state>[^)]*)\))?$", re.MULTILINE)


def release_notes(changelog: str, version: str, tag: str | None = None) -> str:
    """
    The section of a version, under a heading of its own.

    Raises:
        ValueError: There is no such section, or it is empty; or a tag is given and is of another version, or the
            section is of something unreleased.
    """
    headings = list(_HEADING.finditer(changelog))
    numbers = [number for number, heading in enumerate(headings) if heading["version"] == version]
    if len(numbers) != 1:
        raise ValueError(
            f"CHANGELOG.md: {len(numbers)} sections of version {version}, which pyproject.toml names. Give it one, "
            f"under `## {version} (date)`."
        )
    heading, *later = headings[numbers[0] :]
    text = changelog[heading.end() : later[0].start() if later else None].strip()
    if not text:
        raise ValueError(f"CHANGELOG.md: the section of version {version} is empty.")
    if tag is not None and tag != f"v{version}":
        raise ValueError(f"The tag {tag} is not of version {version}, which pyproject.toml names. Tag it v{version}.")
    if tag is not None and heading["state"] in (None, "unreleased"):
        raise ValueError(f"CHANGELOG.md: {heading[0]} has no date yet. Write `## {version} (YYYY-MM-DD)`.")
    return f"# salora-plugins {version}\n\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="what to write")
    parser.add_argument("--tag", help="what the release is tagged with")
    arguments = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    try:
        # An empty tag is what make gives where there is none.
        notes = release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version, arguments.tag or None)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    arguments.file.write_text(notes, encoding="utf-8")
    print(f"Wrote {arguments.file}.")


if __name__ == "__main__":
    main()
