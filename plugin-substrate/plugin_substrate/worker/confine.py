"""What a process gives up before it runs foreign code. Every function says which layers really hold.

`confine_worker` and `confine_supervisor` run in the child itself, after the fork: what a process gives up here it
cannot take back, so this is as strong as an outer launcher. Outside Linux the layers made of prctl are absent.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

from plugin_substrate.worker.isolation import IsolationProfile

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

#: The first descriptor after standard input, output and error.
FIRST_FREE_DESCRIPTOR = 3
#: Not RLIMIT_NOFILE: what is open above a limit stays open when the limit is lowered. This is the kernel's own bound.
_HIGHEST_DESCRIPTOR = 1 << 20


class ConfinementError(OSError):
    """A layer that this system has could not be put in place; the process must not go on."""


def confine_worker(profile: IsolationProfile, parent: int) -> tuple[str, ...]:
    """Confine this process and return the layers that hold. Raises `ConfinementError`; the caller must then exit.

    ``parent`` is the process id the worker was forked from: if it is gone already, so must be the worker.
    """
    os.setsid()
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, profile.open_files)
    _lower(resource.RLIMIT_FSIZE, profile.file_bytes)
    layers = ["clean_environment", "closed_descriptors", "new_session", "rlimits", "umask"]
    if sys.platform == "linux":
        die_with_parent(signal.SIGKILL, parent)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)
        layers += ["no_new_privs", "not_dumpable", "parent_death_signal"]
    return tuple(sorted(layers))


def confine_supervisor(host: int) -> None:
    """Adopt orphaned descendants, and be woken, not killed, when the host dies: the supervisor still has to sweep."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        die_with_parent(signal.SIGCONT, host)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(death_signal: signal.Signals, parent: int) -> None:
    """Have the kernel send ``death_signal`` when the parent ends; prctl(2) asks to check that it is not too late."""
    _prctl(_PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != parent:
        raise ConfinementError("the parent process is gone")


def close_descriptors(keep: int, errors_to: int) -> None:
    """Keep one descriptor, renumbered to 3; send standard output and error to ``errors_to``; close everything else."""
    keep = os.dup(keep)  # out of the way of the numbers that follow
    errors_to = os.dup(errors_to)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(errors_to, 1)
    os.dup2(errors_to, 2)
    os.dup2(keep, FIRST_FREE_DESCRIPTOR, inheritable=False)
    os.closerange(FIRST_FREE_DESCRIPTOR + 1, _HIGHEST_DESCRIPTOR)


def _lower(kind: int, wanted: int) -> None:
    """Set a limit, soft and hard, never above what the process already has."""
    hard = resource.getrlimit(kind)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (value, value))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise ConfinementError(number, f"prctl({option}): {os.strerror(number)}")


_libc = ctypes.CDLL(None, use_errno=True)
