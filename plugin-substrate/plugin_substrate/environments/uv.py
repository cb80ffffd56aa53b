"""Environments made with uv.

It is told the interpreter by path and never downloads one; where packages come from is the user's own configuration.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from plugin_substrate.errors import PluginFatalError
from plugin_substrate.stores.files import PASSAGE

_INSTALL_SECONDS = 1800.0
_ANSWER_SECONDS = 20.0
# The certificates of the system, as for pip: many companies reach indexes through a proxy with an authority of its own.
_SETTINGS = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}  # the newer and the older name of the same setting


def find_uv() -> str:
    """Return the path of uv: the one of this environment first, then the one on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise PluginFatalError("uv is not installed; it comes with plugin-substrate's extra 'host'")
    return found


def find_interpreter(version: str = "") -> Path:
    """Return an interpreter of a version like ``3.12``, this one when none is asked for; a missing one is an error.

    Looked for on the PATH, then among pyenv's: its own command on the PATH may stand for a version it does not select.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version in ("", here):
        return Path(sys.executable)
    for candidate in _candidates(f"python{version}"):
        found = _real_interpreter(candidate, version)
        if found is not None:
            return found
    raise PluginFatalError(f"python{version} is not on the PATH; install it, or leave python_version out for {here}")


def _candidates(name: str) -> Iterator[Path]:
    folders = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += sorted((pyenv / "versions").glob("*/bin"))
    return (folder / name for folder in folders if os.access(folder / name, os.X_OK))


def _real_interpreter(candidate: Path, version: str) -> Path | None:
    """Return what a program says is its interpreter, None when it is not one of this version."""
    script = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    try:
        done = subprocess.run(
            [str(candidate), "-I", "-S", "-c", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return None
    answered, _, path = done.stdout.strip().partition(" ")
    return Path(path) if done.returncode == 0 and answered == version and path else None


@contextmanager
def installing(folder: Path) -> Iterator[int]:
    """Keep other installers of this folder out; answers the lock's descriptor, which uv is to inherit.

    A killed installer lets go by dying, but not before an uv that outlives it has ended.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=PASSAGE)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def create_environment(folder: Path, interpreter: Path, *, lock: int) -> None:
    """Make an empty environment, replacing what is there."""
    _run("venv", "--quiet", "--no-project", "--clear", "--python", str(interpreter), str(folder), lock=lock)


def install_package(folder: Path, distribution: str, requirement: str, *, lock: int, editable: bool = False) -> None:
    """Install a package into an environment, built anew; compiled at once, as workers write no bytecode."""
    target = ["--python", str(environment_python(folder)), "--reinstall-package", distribution]
    source = ["--editable", requirement] if editable else [requirement]
    _run("pip", "install", "--quiet", "--compile-bytecode", *target, *source, lock=lock)


def install_libraries(python: Path, requirements: Sequence[str], *, lock: int | None = None) -> None:
    """Install packages into the environment of an interpreter, with what they need."""
    _run("pip", "install", "--quiet", "--compile-bytecode", "--python", str(python), *requirements, lock=lock)


def environment_python(folder: Path) -> Path:
    """Return an environment's interpreter."""
    return folder / "bin" / "python"


def _run(*arguments: str, lock: int | None) -> None:
    """Run uv; its own words are the error's."""
    environment = {**_SETTINGS, **os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    try:
        done = subprocess.run(
            [find_uv(), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_INSTALL_SECONDS,
            check=False,
            pass_fds=[] if lock is None else [lock],
        )
    except subprocess.TimeoutExpired as error:
        raise PluginFatalError(f"uv {arguments[0]} took longer than {_INSTALL_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise PluginFatalError(f"uv {arguments[0]} failed: {done.stderr.strip() or f'status {done.returncode}'}")
