"""What a process gives up before it runs foreign code. Every function says which layers really hold.

`confine_worker` and `confine_supervisor` run in the child itself, after the fork: what a process gives up here it
cannot take back, so this is as strong as an outer launcher. Outside Linux the layers made of system calls are absent.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from plugin_substrate.worker import kernel, landlock, privileges, seccomp
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.landlock import Access
from plugin_substrate.worker.reach import OUR_FILES, PLAIN_DEVICES, environment_paths, readable_paths

__all__ = [
    "FIRST_FREE_DESCRIPTOR", "OUR_FILES", "Confinement", "ConfinementError", "close_descriptors", "confine_supervisor",
    "confine_worker", "die_with_parent", "environment_paths",
]  # fmt: skip

#: The first descriptor after standard input, output and error.
FIRST_FREE_DESCRIPTOR = 3
#: Not RLIMIT_NOFILE: what is open above a limit stays open when the limit is lowered. This is the kernel's own bound.
_HIGHEST_DESCRIPTOR = 1 << 20

#: Private memory over the limit on resident memory: the stacks of 128 threads, which mostly are never touched.
_UNTOUCHED_BYTES = 1 << 30
_LINUX = sys.platform == "linux"


class ConfinementError(OSError):
    """A layer that this system has could not be put in place; the process must not go on."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """How to confine one worker. ``folder`` is its own, ``parent`` the process whose end must be its own too.

    ``apart`` says that it is the first process of a process id namespace, and tied to its parent already; ``own_uid``
    is who it has become, None where it is still its parent's user.
    """

    profile: IsolationProfile
    folder: str
    parent: int
    apart: bool = False
    own_uid: int | None = None


def confine_worker(confinement: Confinement) -> tuple[str, ...]:
    """Confine this process and return the layers that hold. Raises `ConfinementError`; the caller must then exit."""
    profile = confinement.profile
    os.setsid()
    os.umask(0o077)
    _limit_resources(profile)
    layers = ["clean_environment", "closed_descriptors", "new_session", "rlimits", "umask"]
    if _LINUX:
        try:
            layers += _confine_on_linux(confinement)
        except ConfinementError:
            raise
        except OSError as error:
            raise ConfinementError(error.errno, f"a layer cannot be put in place: {error.strerror}") from error
    return tuple(sorted(layers))


def confine_supervisor(host: int) -> None:
    """Adopt orphaned descendants, and be woken, not killed, when the host dies: the supervisor still has to sweep."""
    if _LINUX:
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        die_with_parent(signal.SIGCONT, host)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(death_signal: signal.Signals, parent: int) -> None:
    """Have the kernel send ``death_signal`` when the parent ends; prctl(2) asks to check that it is not too late."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, int(death_signal))
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


def _confine_on_linux(confinement: Confinement) -> list[str]:
    """Put the layers in place in the one order that works: each still needs what the next takes away."""
    profile = confinement.profile
    if not confinement.apart:  # there, nobody can see the parent
        die_with_parent(signal.SIGKILL, confinement.parent)
    layers = ["disk_sampled", "memory_sampled", "parent_death_signal", *_end_of_descendants(confinement)]
    if confinement.own_uid is not None and os.getresuid() == (confinement.own_uid,) * 3:
        layers.append(f"own_uid:{confinement.own_uid}")
    if privileges.drop_capabilities(os.uname().machine):
        layers.append("capabilities_dropped")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    layers += ["no_new_privs", "not_dumpable"]
    abi = landlock.restrict(_file_rules(confinement), tcp=profile.network)
    if abi:
        layers.append(f"landlock:{abi}")
    rules = seccomp.FilterRules(
        network=profile.network, processes=profile.processes > 0, pid=os.getpid(), landlock_abi=abi
    )
    if seccomp.install(rules):
        layers.append("seccomp")
    return layers


def _end_of_descendants(confinement: Confinement) -> list[str]:
    """Return what ends the processes that a plugin may have: the kernel, or who of us finds them."""
    if confinement.apart:
        return ["pid_namespace"]
    return ["descendants_swept"] if confinement.profile.processes else []


def _file_rules(confinement: Confinement) -> Iterator[tuple[str, Access]]:
    """Return what may be done where. What a plugin wrote it may never execute."""
    profile = confinement.profile
    read = Access.RUN if profile.processes else Access.READ
    for path in (*environment_paths(), *readable_paths(network=profile.network), *profile.read_paths):
        yield path, read
    for path in (*PLAIN_DEVICES, *profile.devices):
        yield path, Access.DEVICE
    for path in (confinement.folder, *profile.write_paths):
        yield path, Access.CHANGE


def _limit_resources(profile: IsolationProfile) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, profile.open_files)
    _lower(resource.RLIMIT_FSIZE, profile.file_bytes)
    _lower(resource.RLIMIT_DATA, profile.memory_bytes + _UNTOUCHED_BYTES)
    if profile.cpu_seconds is not None:
        _lower(resource.RLIMIT_CPU, profile.cpu_seconds)


def _lower(kind: int, wanted: int) -> None:
    """Set a limit, soft and hard, never above what the process already has."""
    hard = resource.getrlimit(kind)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (value, value))
