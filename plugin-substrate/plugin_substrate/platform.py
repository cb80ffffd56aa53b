"""Which platform this is, in the words of manifests: ``linux-x64``, ``linux-arm64``, ``darwin-arm64``, ``win-x64``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

_SYSTEMS = {"linux": "linux", "darwin": "darwin", "win32": "win"}
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


def get_current_platform() -> str:
    """Return the platform's name; parts without a name of their own are as the system gives them, in small letters."""
    machine = platform.machine().lower()
    return f"{_SYSTEMS.get(sys.platform, sys.platform)}-{_MACHINES.get(machine, machine)}"


def is_compatible(platforms: Sequence[str], current: str | None = None) -> bool:
    """Tell whether a plugin that lists platforms runs on one, this one unless another is named; none means all."""
    return not platforms or (current or get_current_platform()) in platforms


def is_linux() -> bool:
    """Tell whether this is Linux."""
    return sys.platform == "linux"


def is_macos() -> bool:
    """Tell whether this is macOS."""
    return sys.platform == "darwin"


def is_windows() -> bool:
    """Tell whether this is Windows."""
    return sys.platform == "win32"
