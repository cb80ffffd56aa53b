"""A process id namespace of its own for a worker that may have processes: when the worker ends, so do all of them.

The worker is the first process in there, and the kernel kills whoever is left when that one ends, however it ended and
whatever became of the supervisor. Where namespaces may not be made, the worker is forked as usual.
"""

from __future__ import annotations

import os
import signal
import socket

from plugin_substrate.worker import kernel, privileges
from plugin_substrate.worker.bubblewrap import MountNamespace

_CLONE_NEWPID = 0x20000000
_CLONE_NEWUSER = 0x10000000

_PID_BYTES = 32


def available() -> bool:
    """Try, in a process that ends at once, whether a namespace can be made here."""
    child = os.fork()
    if child == 0:
        try:
            _unshare()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fork_first_process(uid: int | None = None, mounts: MountNamespace | None = None) -> int:
    """Like ``os.fork``, but the child is the first process of a new namespace; an OSError when none can be made.

    A process that makes a namespace does not enter it, its next child does. So a process in between does both and ends;
    the child then is ours, as we are its subreaper, and only then can its end be tied to ours. With ``mounts`` it is
    in that namespace too, and with ``uid`` the child becomes that user first.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    between = os.fork()
    if between == 0:
        ours.close()
        if _make_first_process(theirs, uid, mounts) == 0:
            return 0
    theirs.close()
    with ours:
        answer = ours.recv(_PID_BYTES)
        os.waitpid(between, 0)
        if not answer.isdigit():
            raise OSError(f"no process id namespace can be made: {answer.decode(errors='replace')}")
        ours.send(b"go")
        ours.recv(1)  # it has tied its end to ours, or is dead already, which its parent will hear
    return int(answer)


def _make_first_process(supervisor: socket.socket, uid: int | None, mounts: MountNamespace | None) -> int:
    """Run in between; only the child returns, with 0."""
    try:
        if mounts is not None:
            mounts.enter()
        _unshare(privileged=mounts is not None and mounts.makes_privileged)
        pid = os.fork()
    except BaseException as error:  # noqa: BLE001 - it must not climb into the supervisor's stack
        supervisor.send(str(getattr(error, "strerror", None) or error).encode()[:_PID_BYTES])
        os._exit(1)
    if pid:
        supervisor.send(str(pid).encode())
        os._exit(0)
    if uid is not None:
        privileges.become_or_exit(uid)
    with supervisor:
        _tie_to(supervisor)
    return 0


def _tie_to(supervisor: socket.socket) -> None:
    """Have the kernel kill us when the supervisor ends; nobody in here can ask who our parent is."""
    try:
        if supervisor.recv(_PID_BYTES):
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            supervisor.send(b"t")  # fails if it ended before that
            return
    except OSError:
        pass
    os._exit(1)


def _unshare(*, privileged: bool = False) -> None:
    """Make the namespace, who may directly, else within a user namespace where we are who we were."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or privileged:
        kernel.unshare(_CLONE_NEWPID)
        return
    kernel.unshare(_CLONE_NEWUSER | _CLONE_NEWPID)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
