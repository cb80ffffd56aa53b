"""Makes the virtual environment: `python3 dev/setup.py [--dev] [--venv FOLDER]`.

It installs our packages by path, as `backend/requirements.txt` lists them, and with --dev the tools of the tests. A
second call finds the record of the first (written last, so never of half a set-up) and does nothing. A set-up that was
interrupted is made anew. Two at once wait for each other. Exit code 1 with one sentence says what has to be changed.

Needs only the standard library. It keeps to the grammar of Python 3.6, and so has no `annotations` import: an old
interpreter shall read as far as the sentence that names the versions that work.
"""

import argparse
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not (3, 11) <= sys.version_info[:2] < (3, 15):
    sys.exit(
        "set-up: Python 3.11 to 3.14 is needed, but {} is {}.{}; name another one, for example "
        "`make demo PYTHON=python3.12`.".format(sys.executable, *sys.version_info[:2])
    )

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "backend"
PACKAGES = ["plm-shared", "plm-engine-core", "plugin-substrate", "backend"]
RECORD = "plm-setup.json"
HALF_DONE = b"a set-up is under way, or was interrupted"
NETWORK_SIGNS = ["connection broken by", "ConnectionError", "NewConnectionError", "timed out", "name resolution"]


class SetupError(Exception):
    """The set-up cannot go on; the text is the one sentence for the user, the details are the failed tool's words."""

    def __init__(self, text: str, details: str = "") -> None:
        super().__init__(text)
        self.details = details


def main() -> None:
    """Read the arguments, set up, and turn a failure into a sentence and exit code 1."""
    parser = argparse.ArgumentParser(description="Make the virtual environment, or do nothing when it is current.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests and linters need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the folder to make it in (default: .venv)")
    arguments = parser.parse_args()
    try:
        set_up(arguments.venv.resolve(), dev=arguments.dev)
    except SetupError as error:
        sys.exit(f"{error.details}\nset-up: {error}" if error.details else f"set-up: {error}")
    except OSError as error:
        sys.exit(f"set-up: {no_space(arguments.venv) if error.errno == errno.ENOSPC else error}")
    except KeyboardInterrupt:
        sys.exit("set-up: interrupted; the next one starts anew.")


def set_up(venv: Path, *, dev: bool) -> None:
    """Bring the environment to what the requirement files say; print each stage with its time.

    Raises:
        SetupError: a module is missing, or venv or pip failed.
        OSError: the folder cannot be written.
    """
    started = time.monotonic()
    with locked(venv) as lock:
        record = {} if lock.interrupted else read_record(venv)
        if is_current(record, venv, dev=dev):
            say(f"set-up: {venv.name} is current, {megabytes(record['bytes'])} installed ({seconds(started)})")
            return
        say(f"set-up: {venv} with Python {python_version()}, from {sys.executable}")
        moved = record.get("venv", str(venv)) != str(venv)
        anew = lock.interrupted or moved or not is_usable(venv)
        if anew:
            check_modules()
        if anew and not lock.interrupted:
            check_replaceable(venv)
        lock.begin()
        (venv / RECORD).unlink(missing_ok=True)
        if anew:
            with stage("virtual environment"):
                make_environment(venv, lock)
        with stage("packages"):
            install(venv, lock, dev=dev)
        size = installed_bytes(venv)
        write_record(venv, {"fingerprint": fingerprint(venv), "venv": str(venv), "dev": dev, "bytes": size})
        lock.end()
        say(f"set-up: ready in {seconds(started)}, {size} bytes ({megabytes(size)}) in {venv.name}")


class Lock:
    """A locked file whose content tells whether the set-up that last held it came to its end.

    The tools it starts inherit it: one that outlives a killed set-up keeps the next one waiting until it is done.
    """

    def __init__(self, descriptor: int, venv: Path) -> None:
        self.descriptor = descriptor
        self.venv = venv
        self.interrupted = os.pread(descriptor, 1, 0) != b""

    def begin(self) -> None:
        """Note that the environment is about to be changed."""
        os.pwrite(self.descriptor, HALF_DONE, 0)

    def end(self) -> None:
        """Note that it is whole again."""
        os.ftruncate(self.descriptor, 0)


@contextmanager
def locked(venv: Path) -> Iterator[Lock]:
    """Keep other set-ups of the same environment out; a killed process lets go by dying."""
    folder = ROOT / ".state"
    folder.mkdir(exist_ok=True)
    name = "setup-" + hashlib.sha256(os.fsencode(os.path.relpath(venv, ROOT))).hexdigest()[:12] + ".lock"
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("set-up: waiting for another one to finish")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield Lock(descriptor, venv)
    finally:
        os.close(descriptor)


def fingerprint(venv: Path) -> str:
    """Everything that makes an installed environment out of date when it changes."""
    inputs = [BACKEND / "requirements.txt", BACKEND / "requirements-dev.txt"]
    inputs += [ROOT / package / "pyproject.toml" for package in PACKAGES]
    digest = hashlib.sha256()
    for part in [os.fsencode(venv), python_version().encode(), os.fsencode(sys.base_prefix)]:
        digest.update(part + b"\0")
    for path in inputs:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_record(venv: Path) -> dict[str, Any]:
    """The record of the last finished set-up; empty when there is none to trust."""
    try:
        record = json.loads((venv / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return record if isinstance(record, dict) and {"fingerprint", "dev", "bytes"} <= record.keys() else {}


def write_record(venv: Path, record: dict[str, Any]) -> None:
    """Write the record in one step, so that it is whole or not there."""
    draft = venv / (RECORD + ".draft")
    draft.write_text(json.dumps(record), encoding="utf-8")
    draft.replace(venv / RECORD)


def is_current(record: dict[str, Any], venv: Path, *, dev: bool) -> bool:
    """Whether the record speaks of what is asked for, and the interpreter is still there."""
    covered = bool(record) and (record["dev"] or not dev)
    return covered and record["fingerprint"] == fingerprint(venv) and (venv / "bin" / "python").exists()


def is_usable(venv: Path) -> bool:
    """Whether pip can bring the environment up to date, or it has to be made anew: another Python, or broken."""
    question = "import pip, sys; print('%d.%d' % sys.version_info[:2], sys.base_prefix, sys.prefix, sep='\\n')"
    try:
        answer = subprocess.run(
            [str(venv / "bin" / "python"), "-X", "utf8", "-c", question],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
    except OSError:
        return False
    expected = [python_version(), sys.base_prefix, str(venv)]
    return answer.returncode == 0 and answer.stdout.splitlines() == expected


def check_modules() -> None:
    """Refuse a Python without what environments are made with: some systems ship these modules separately."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            remedy = f"on Debian and Ubuntu install python{python_version()}-venv"
            raise SetupError(f"{sys.executable} lacks the module {module}; {remedy}.")


def check_replaceable(venv: Path) -> None:
    """Refuse to replace what is not a virtual environment."""
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
        raise SetupError(f"{venv} is not a virtual environment; move it away, or name another with --venv.")


def make_environment(venv: Path, lock: Lock) -> None:
    """Make an empty environment in place of whatever is there."""
    if venv.exists():
        shutil.rmtree(venv)
    run("making the virtual environment failed", [sys.executable, "-m", "venv", str(venv)], lock)


def install(venv: Path, lock: Lock, *, dev: bool) -> None:
    """Install with pip, in `backend/`, as relative paths in a requirements file are relative to the current folder."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "-r", "requirements.txt"]
    run("pip could not install the packages", command + (["-r", "requirements-dev.txt"] if dev else []), lock)


def run(failure: str, command: list[str], lock: Lock) -> None:
    """Run a tool in silence; a failure without a known reason shows the last lines it said.

    Without a network pip gives up sooner than by its own default.

    Raises:
        SetupError: it ended with an exit code other than 0.
    """
    done = subprocess.run(
        command,
        cwd=BACKEND,
        env={"PIP_RETRIES": "2", **os.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
        pass_fds=[lock.descriptor],
    )
    if done.returncode == 0:
        return
    if "No space left on device" in done.stdout or is_full(lock.venv) or is_full(Path(tempfile.gettempdir())):
        raise SetupError(no_space(lock.venv))
    if any(sign in done.stdout for sign in NETWORK_SIGNS):
        raise SetupError("the package index cannot be reached; check the network or pip's settings, then repeat.")
    said = "\n".join(done.stdout.strip().splitlines()[-8:])
    raise SetupError(f"{failure} (exit code {done.returncode}); its last words are above.", said)


def is_full(folder: Path) -> bool:
    """Whether nothing of any size can be written there; not every tool says so when it fails for that."""
    return shutil.disk_usage(folder if folder.exists() else folder.parent).free < 20_000_000


def no_space(venv: Path) -> str:
    """The sentence for a full disk."""
    return f"no space left in {venv} or {tempfile.gettempdir()}; make room, then repeat."


def installed_bytes(venv: Path) -> int:
    """The size of all files in the environment; links are not followed."""
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(venv) for name in names)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print a stage when it begins, and how long it took when it ends."""
    say(f"  {name} ... ", end="")
    started = time.monotonic()
    try:
        yield
    except BaseException:
        say("failed")
        raise
    say(seconds(started))


def say(text: str, end: str = "\n") -> None:
    """Print at once, and beside what `make demo ARGS=--json` prints on standard output."""
    sys.stderr.write(text + end)
    sys.stderr.flush()


def python_version() -> str:
    """The running interpreter's version, as far as an environment depends on it."""
    return "{}.{}".format(*sys.version_info[:2])


def seconds(started: float) -> str:
    """The time since then."""
    return f"{time.monotonic() - started:.2f} s"


def megabytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
