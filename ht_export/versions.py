"""The versions of packages, as what is written says them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PROJECT = "hidden-transfer"
# In a clone the project runs where it is not installed.
UNKNOWN = "not installed"


def version_of(package: str) -> str:
    """Return the version of a package that is installed, and `UNKNOWN` for one that is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN
