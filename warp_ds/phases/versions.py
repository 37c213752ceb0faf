"""Versions of what decides a result: Python, this package and those that it rests on."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from warp_ds import __version__

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "safetensors")


def installed_versions() -> dict[str, str]:
    """Name to version; a package that is not installed is left out. Of warp_ds the code's own, also where it is a checkout."""
    versions = {"python": sys.version.split()[0], "warp_ds": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def shown_versions(*names: str) -> str:
    """'torch 2.13.0, deepspeed 0.19.8': of those ``names`` that are installed."""
    versions = installed_versions()
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
