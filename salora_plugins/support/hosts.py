"""Whether the installed hosts are of the releases that this package declares, and how it is said where they are not."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from .version import PACKAGE, package_version

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet  # not at run time: Axolotl imports its plugins in every run

CORE = ("torch", "transformers", "peft")
TRAINERS = ("trl", "axolotl")
"""Used by some only: looked at where they are imported already."""
_said: set[str] = set()


def declared_range(host: str) -> SpecifierSet:
    """
    The releases of a host that the installed package's metadata names, in its dependencies and extras.

    Empty, which is any release, for a host that it does not name.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        requirements = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:  # a copy of the source on the path, which declares nothing
        requirements = []
    found = SpecifierSet()
    for requirement in requirements:
        if requirement.name == host:
            found &= requirement.specifier
    return found


def in_use() -> tuple[str, ...]:
    """The hosts that this process uses, or is about to."""
    return CORE + tuple(host for host in TRAINERS if host in sys.modules)


def warn_of_unsupported(*hosts: str) -> None:
    """Warn, once a process, of each installed host outside of its declared range."""
    new = [host for host in hosts if host not in _said and _is_unsupported(host)]
    _said.update(hosts)
    if new:
        warnings.warn(_explanation(new), RuntimeWarning, stacklevel=3)


@contextmanager
def explained(*hosts: str) -> Iterator[None]:
    """
    Around imports that use these hosts.

    Raises:
        ImportError: What is imported is not there, and a host is outside of its declared range: names both.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        found = [host for host in hosts if _is_unsupported(host)]
        if not found:
            raise
        raise ImportError(f"{_explanation(found)} What failed: {error}") from error


def _is_unsupported(host: str) -> bool:
    try:
        return not declared_range(host).contains(version(host), prereleases=True)
    except PackageNotFoundError:
        return False  # its import says so


def _explanation(hosts: list[str]) -> str:
    ranges = {host: host + ",".join(sorted(map(str, declared_range(host)), reverse=True)) for host in hosts}  # >= first
    installed = "; ".join(f"{host} {version(host)} is installed, it is for {ranges[host]}" for host in hosts)
    return (
        f"{PACKAGE} {package_version()} was not tried with these releases: {installed}. Install what it is for (pip "
        f"install {' '.join(repr(wanted) for wanted in ranges.values())}), or a {PACKAGE} that is for what you have."
    )
