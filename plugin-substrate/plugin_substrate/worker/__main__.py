"""Start of every process of ours in a plugin's interpreter: ``python -I -S -B .../worker/__main__.py MODE ...``.

Nothing of ours is installed in a plugin's environment. A finder offers the files that lie beside this one, and only
those that a plugin may see, so that plugin and host can never run different versions of them.
"""

from __future__ import annotations

import gc
import os.path
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader

# Everything here is paid for at every start of a supervisor: what pulls in half of the standard library (importlib.abc,
# importlib.util, pathlib, typing) is not imported.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_PACKAGE = "plugin_substrate"
_OFFERED = ("interface", "errors", "records", "file_plugin", "validation", "worker")


class HostFiles:
    """Finds what is offered of ``plugin_substrate``; the package itself offers the public names of the same modules."""

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
            shell = ModuleSpec(fullname, Shell(), is_package=True)  # type: ignore[arg-type] # it is one without saying so
            shell.submodule_search_locations = []
            return shell
        if names[0] not in _OFFERED:
            return None
        place = os.path.join(_ROOT, *names)
        if os.path.isdir(place):
            return _spec(fullname, os.path.join(place, "__init__.py"), package=place)
        file = place + ".py"
        return _spec(fullname, file) if os.path.isfile(file) else None


class Shell:
    """Loads the package itself: nothing, until a name is asked for."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Have an empty module made."""

    def exec_module(self, module: ModuleType) -> None:
        """Have names looked up in the modules that they stand in, as where the package is installed."""
        module.__getattr__ = _public_name  # type: ignore[method-assign] # this is how a module has one


def _public_name(name: str) -> object:
    from importlib import import_module

    for offered in () if name.startswith("_") else _OFFERED[:-1]:
        module = import_module(f"{_PACKAGE}.{offered}")
        found: object = getattr(module, name, None)
        if getattr(found, "__module__", "") == module.__name__:
            return found
    raise AttributeError(f"a plugin's process has no {name!r} of {_PACKAGE}: it has {', '.join(_OFFERED[:-1])}")


def _spec(fullname: str, file: str, package: str | None = None) -> ModuleSpec:
    spec = ModuleSpec(fullname, SourceFileLoader(fullname, file), origin=file, is_package=package is not None)
    spec.has_location = True
    if package is not None:
        spec.submodule_search_locations = [package]
    return spec


def main(arguments: list[str]) -> None:
    """Run one mode: ``supervise FD HOST_PID`` or ``describe FD DISTRIBUTION``."""
    sys.meta_path.insert(0, HostFiles())
    mode, descriptor, subject = arguments
    if mode == "supervise":
        gc.disable()  # until all is there that is never garbage: to look for some takes a twentieth of the start
        import socket

        from plugin_substrate.worker import confine, first_order

        control = socket.socket(fileno=int(descriptor))
        control.set_inheritable(False)
        confine.confine_supervisor(int(subject))  # before anything is executed: a set-id bubblewrap gains nothing
        begun = first_order.begin(control)  # which goes on while the rest is imported
        from plugin_substrate.worker.supervisor import supervise

        supervise(control, int(subject), begun)
    elif mode == "describe":
        from plugin_substrate.worker.describe import describe

        describe(int(descriptor), subject)
    else:
        sys.exit(f"unknown mode {mode!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
