"""The version of this package, which stands in pyproject.toml only."""

from __future__ import annotations

from importlib.metadata import version

PACKAGE = "salora-plugins"


def package_version() -> str:
    """Version of the installed package."""
    return version(PACKAGE)
