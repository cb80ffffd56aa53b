"""Start of every process of ours in a plugin's interpreter: ``python -I -S -B .../worker/__main__.py MODE ...``.

Nothing of ours is installed in a plugin's environment. A finder offers the files that lie beside this one, and only
those that a plugin may see, so that plugin and host can never run different versions of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "plugin_substrate"
_OFFERED = ("interface", "errors", "worker")


class HostFiles(MetaPathFinder):
    """Finds ``plugin_substrate.interface``, ``.errors`` and ``.worker``; the package itself is an empty shell."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the finder protocol has it
        target: ModuleType | None = None,  # noqa: ARG002 - the finder protocol has it
    ) -> ModuleSpec | None:
        """Return the spec of an offered module, None for every other."""
        package, *names = fullname.split(".")
        if package != _PACKAGE:
            return None
        if not names:
            shell = ModuleSpec(fullname, None, is_package=True)
            shell.submodule_search_locations = []
            return shell
        if names[0] not in _OFFERED:
            return None
        place = _ROOT.joinpath(*names)
        if place.is_dir():
            return spec_from_file_location(fullname, place / "__init__.py", submodule_search_locations=[str(place)])
        file = place.with_suffix(".py")
        return spec_from_file_location(fullname, file) if file.is_file() else None


def main(arguments: list[str]) -> None:
    """Run one mode: ``supervise FD HOST_PID`` or ``describe FD DISTRIBUTION``."""
    sys.meta_path.insert(0, HostFiles())
    mode, descriptor, subject = arguments
    if mode == "supervise":
        import socket

        from plugin_substrate.worker.supervisor import supervise

        supervise(socket.socket(fileno=int(descriptor)), int(subject))
    elif mode == "describe":
        from plugin_substrate.worker.describe import describe

        describe(int(descriptor), subject)
    else:
        sys.exit(f"unknown mode {mode!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
