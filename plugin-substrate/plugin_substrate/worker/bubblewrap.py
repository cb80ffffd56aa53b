"""bubblewrap (bwrap(1)) makes a mount namespace with nothing in it but a view, and workers enter it.

It is run by the supervisor, for as long as it takes to make the namespace, and is nobody's parent: an open descriptor
is what keeps the namespace. So the tree of our processes, and all that ends it, is the same with it and without it.
What a worker of an ordinary user enters is a user namespace as well, without which that user could make no other; it
has all capabilities in there until it drops them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import ExitStack, suppress

from plugin_substrate.worker import kernel
from plugin_substrate.worker.mount_view import DEVICE, READ, WRITE, View

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000

_OPTIONS = {READ: "--ro-bind-try", WRITE: "--bind-try", DEVICE: "--dev-bind-try"}
_TRUE = ("/usr/bin/true", "/bin/true")
_SECONDS = 5.0  # for some milliseconds of work
_MOST_TOLD = 4096
_ENTERED = b"entered"
_REAPED_BY_ANOTHER = 255
_MOST = 32  # of views, each of which is two descriptors
_AGAIN_SECONDS = 60.0

Identity = tuple[int, int]  # device and inode, which is how the kernel names a namespace


class CannotEnterError(OSError):
    """A namespace was made, and this process may not enter it."""


class MountNamespace:
    """One that a view was made in. Owns the descriptors by which it is entered."""

    def __init__(self, mounts: int, user: int | None = None) -> None:
        """``user`` is the user namespace that it belongs to, None where that is our own."""
        self.identity = _identity(os.fstat(mounts))
        self._mounts = mounts
        self._user = user

    @property
    def makes_privileged(self) -> bool:
        """Whether who enters holds all capabilities in there, whoever it was."""
        return self._user is not None

    def enter(self) -> None:
        """Enter it for good; an OSError when that is refused."""
        if self._user is not None:
            kernel.setns(self._user, _CLONE_NEWUSER)
        kernel.setns(self._mounts, _CLONE_NEWNS)

    def fork(self) -> int:
        """Like ``os.fork``, but the child is in the namespace; a `CannotEnterError` when that is refused."""
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            self._enter_and(tell)
            os.close(told)
            os.close(tell)
            return 0
        os.close(tell)
        try:
            refused = os.read(told, _MOST_TOLD)
        finally:
            os.close(told)
        if refused != _ENTERED:
            os.waitpid(child, 0)
            reason = refused.decode(errors="replace") or "who tried it was killed"
            raise CannotEnterError(None, f"what it makes cannot be entered: {reason}")
        return child

    def _enter_and(self, tell: int) -> None:
        """Enter it, or tell why not and exit: nothing may climb into the parent's stack."""
        try:
            self.enter()
            os.write(tell, _ENTERED)
        except BaseException as error:  # noqa: BLE001 - see above
            os.write(tell, str(getattr(error, "strerror", None) or error).encode())
            os._exit(1)

    def close(self) -> None:
        """Give up the descriptors; who is in the namespace stays there."""
        for descriptor in (self._mounts, self._user):
            if descriptor is not None:
                os.close(descriptor)


class MountNamespaces:
    """The namespaces of one supervisor: one for each view that its workers have had lately."""

    def __init__(self, begun: Making | None = None) -> None:
        """``begun`` is the first of them that will be asked for, most likely."""
        self._begun = begun
        self._made: dict[View, MountNamespace] = {}
        self._failed: dict[View, tuple[float, str]] = {}  # when, and why

    def get(self, program: str, view: View) -> tuple[MountNamespace | None, str]:
        """Return the namespace of a view, made now or before; None and the reason where bubblewrap can make none.

        What has failed is tried again after a minute.
        """
        when, reason = self._failed.get(view, (0.0, ""))
        if reason and time.monotonic() - when < _AGAIN_SECONDS:
            return None, reason
        namespace = self._made.pop(view, None)
        if namespace is None:
            try:
                namespace = self._making(program, view).result()
            except OSError as error:
                return None, self._note_failure(program, view, error)
        self._failed.pop(view, None)
        self._made[view] = namespace  # as the one used last
        if len(self._made) > _MOST:
            self._made.pop(next(iter(self._made))).close()
        return namespace, ""

    def _making(self, program: str, view: View) -> Making:
        begun, self._begun = self._begun, None
        if begun is not None and (begun.program, begun.view) == (program, view):
            return begun
        if begun is not None:
            begun.give_up()
        return Making(program, view)

    def give_up(self, program: str, namespace: MountNamespace, error: CannotEnterError) -> str:
        """Take the view of a namespace for one that cannot be had, for a minute; returns the reason."""
        view = next(view for view, made in self._made.items() if made is namespace)
        self._made.pop(view).close()
        return self._note_failure(program, view, error)

    def _note_failure(self, program: str, view: View, error: OSError) -> str:
        if len(self._failed) >= _MOST:
            self._failed.clear()
        reason = f"{program}: {reason_of(error)}"
        self._failed[view] = (time.monotonic(), reason)
        return reason

    def close(self) -> None:
        """Give up all of them."""
        while self._made:
            self._made.popitem()[1].close()


def reason_of(error: OSError) -> str:
    """Return what an error of `make` says, for a person."""
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)


def mount_namespace() -> Identity:
    """Return the namespace that this process is in."""
    return _identity(os.stat("/proc/self/ns/mnt"))


def reason_against(program: str, view: View) -> str:
    """Try whether a process can be given a view here; empty when it can."""
    try:
        namespace = make(program, view)
        try:
            child = namespace.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
        finally:
            namespace.close()
    except OSError as error:
        return f"{program}: {reason_of(error)}"
    return ""


def make(program: str, view: View) -> MountNamespace:
    """Have bubblewrap make the namespace of a view; an OSError says why it cannot."""
    return Making(program, view).result()


class Making:
    """bubblewrap at work on the namespace of a view. It does not end before `result` is asked for, or `give_up`.

    So its number means nobody else till then.
    """

    def __init__(self, program: str, view: View) -> None:
        """Start it; an OSError when it cannot be started."""
        self.program = program
        self.view = view
        self._deadline = 0.0
        self._descriptors = ExitStack()
        self._held = ExitStack()
        info, info_end = self._pipe()
        errors, errors_end = self._pipe()
        held_end, held = os.pipe()
        self._held.callback(os.close, held)
        self._info, self._errors = info, errors
        try:
            self._pid = _start(program, view, info=(info, info_end), held=held_end, errors=errors_end)
        except BaseException:
            self.give_up()
            raise
        finally:
            for end in (info_end, held_end, errors_end):
                os.close(end)
        self._pidfd = os.pidfd_open(self._pid)
        self._descriptors.callback(os.close, self._pidfd)

    def result(self) -> MountNamespace:
        """Wait until it is made; an OSError says why it is not. To be asked once."""
        self._deadline = time.monotonic() + _SECONDS
        namespace = None
        try:
            namespace = _namespace_of(self._read())
        finally:
            self._held.close()
            problem = _problem(namespace, self._wait(), self._errors)
            self.give_up()
        if namespace is None or problem:
            if namespace is not None:
                namespace.close()
            raise OSError(None, problem)
        return namespace

    def give_up(self) -> None:
        """Take no more interest in it: it ends by itself, and whoever reaps all children finds it."""
        self._held.close()
        self._descriptors.close()

    def _pipe(self) -> tuple[int, int]:
        here, there = os.pipe()
        self._descriptors.callback(os.close, here)
        return here, there

    def _read(self) -> str:
        """Return the one JSON object that it writes; less when it ended, or is late."""
        told = b""
        while b"}" not in told and self._is_ready(self._info):
            part = os.read(self._info, _MOST_TOLD)
            if not part:
                break
            told += part
        return told.decode(errors="replace")

    def _wait(self) -> int:
        """Reap it and return how it ended; who is late is killed."""
        if not self._is_ready(self._pidfd):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        except ChildProcessError:  # it failed so early that who reaps all children found it
            return _REAPED_BY_ANOTHER

    def _is_ready(self, descriptor: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, 1000 * (self._deadline - time.monotonic()))))


def _start(program: str, view: View, *, info: tuple[int, int], held: int, errors: int) -> int:
    """Start it, so that it comes to its end by itself, whatever becomes of us.

    ``info`` are both ends of a pipe: with nobody to read, it would end before its child may go on, which then waits for
    ever. For the same reason it is not tied to our end.
    """
    for descriptor in (*info, held):
        os.set_inheritable(descriptor, True)
    command = [program, "--info-fd", str(info[1]), "--block-fd", str(held), *_shown(view)]
    return os.posix_spawn(
        program, [*command, "--", *_something_that_ends()], {}, file_actions=[(os.POSIX_SPAWN_DUP2, errors, 2)]
    )


def _shown(view: View) -> list[str]:
    """Return the arguments that make a view, and nothing else.

    Folders on the way to what is shown are open to everybody, as a worker may be another user than who made them.
    """
    folders = [argument for path in view.folders for argument in ("--dir", path)]
    options = _OPTIONS if view.read_only else {**_OPTIONS, READ: _OPTIONS[WRITE]}
    mounts = [argument for path, manner, *_ in view.mounts for argument in (options[manner], path, path)]
    links = [argument for path, text in view.links for argument in ("--symlink", text, path)]
    return [*folders, *mounts, *links, *(("--remount-ro", "/") if view.read_only else ())]


def _something_that_ends() -> list[str]:
    """Return a command that any view has and that does nothing: that it ran says that all was made before."""
    program = next((path for path in _TRUE if os.path.exists(path)), "")
    return [program] if program else [sys.executable, "-I", "-S", "-B", "-c", ""]


def _namespace_of(told: str) -> MountNamespace | None:
    """Take hold of the namespace of the process that was told of; None when none was."""
    try:
        pid = int(json.loads(told)["child-pid"])
    except (ValueError, KeyError, TypeError):
        return None
    mounts = _open(f"/proc/{pid}/ns/mnt")
    try:
        own_user = _identity(os.stat(f"/proc/{pid}/ns/user")) == _identity(os.stat("/proc/self/ns/user"))
        return MountNamespace(mounts, None if own_user else _open(f"/proc/{pid}/ns/user"))
    except OSError:
        os.close(mounts)
        raise


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _problem(namespace: MountNamespace | None, status: int, errors: int) -> str:
    """Return what is wrong with what was made; empty when it is well."""
    if status or namespace is None:
        return _last_words(errors) or f"it ended with {status}, and told of no process of its own"
    return "it made no mount namespace of its own" if namespace.identity == mount_namespace() else ""


def _last_words(errors: int) -> str:
    os.set_blocking(errors, False)
    with suppress(BlockingIOError):
        return os.read(errors, _MOST_TOLD).decode(errors="replace").strip()
    return ""


def _identity(seen: os.stat_result) -> Identity:
    return seen.st_dev, seen.st_ino
