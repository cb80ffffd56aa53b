"""What a process gives up before it runs foreign code. Every function says which layers really hold.

`confine_worker` and `confine_supervisor` run in the child itself, after the fork: what a process gives up here it
cannot take back, so this is as strong as an outer launcher. Outside Linux the layers made of system calls are absent.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

from plugin_substrate.records import record, replace
from plugin_substrate.worker import bubblewrap, kernel, landlock, privileges, seccomp
from plugin_substrate.worker.isolation import IsolationProfile
from plugin_substrate.worker.landlock import Access
from plugin_substrate.worker.reach import OUR_FILES, PLAIN_DEVICES, environment_paths, readable_paths

__all__ = [
    "FIRST_FREE_DESCRIPTOR", "OUR_FILES", "Confinement", "ConfinementError", "Plan", "close_descriptors",
    "confine_forked_worker", "confine_supervisor", "confine_worker", "die_with_parent", "environment_paths",
    "file_rules", "make_plan",
]  # fmt: skip

#: The first descriptor after standard input, output and error.
FIRST_FREE_DESCRIPTOR = 3
#: Not RLIMIT_NOFILE: what is open above a limit stays open when the limit is lowered. This is the kernel's own bound.
_HIGHEST_DESCRIPTOR = 1 << 20
_OUT_OF_THE_WAY = 16  # of the numbers that are given anew

#: Private memory over the limit on resident memory: the stacks of 128 threads, which mostly are never touched.
_UNTOUCHED_BYTES = 1 << 30
#: Timers and queued signals; the kernel counts those of a user's processes together.
_QUEUED_SIGNALS = 1024
_LINUX = sys.platform == "linux"


class ConfinementError(OSError):
    """A layer that this system has could not be put in place; the process must not go on."""


@record(kw_only=True)
class Plan:
    """What the layers of a profile come to on this machine, all but what each worker has of its own.

    It is made once, by the process that workers are forked from, which then share it: for each to make it anew would
    touch some hundred pages of memory, and take longer than everything else that confines it.
    """

    profile: IsolationProfile
    landlock_abi: int
    file_rules: tuple[tuple[str, int], ...]
    filter_program: bytes
    asking_program: bytes = b""  #: the filter of a template


@record(kw_only=True)
class Confinement:
    """How to confine one worker. ``folder`` is its own, ``parent`` the process whose end must be its own too.

    ``apart`` says that it is the first process of a process id namespace, and tied to its parent already; ``grouped``
    that it is in a control group, which its host ends when the supervisor is killed; ``own_uid`` is who it has become,
    None where it is still its parent's user; ``mounts`` is the mount namespace that it has entered, None for its
    parent's. ``ask_through`` is for a template: the socket to the process that it has
    to ask before each fork, and which is sent the descriptor for that.
    """

    plan: Plan
    folder: str
    parent: int
    apart: bool = False
    grouped: bool = False
    own_uid: int | None = None
    mounts: bubblewrap.Identity | None = None
    ask_through: socket.socket | None = None


def make_plan(profile: IsolationProfile, *, template: bool = False) -> Plan:
    """Work out what confines any worker with a profile, or a template and its copies."""
    abi = landlock.spoken_abi() if _LINUX else 0
    rules = seccomp.FilterRules(
        network=profile.network, processes=profile.processes > 0, pid=seccomp.ANY_PID, landlock_abi=abi
    )
    return Plan(
        profile=profile,
        landlock_abi=abi,
        file_rules=tuple(_file_rules(profile)),
        filter_program=seccomp.prepare(rules),
        asking_program=seccomp.prepare(replace(rules, asks_to_fork=True)) if template else b"",
    )


def confine_worker(confinement: Confinement) -> tuple[str, ...]:
    """Confine this process and return the layers that hold. Raises `ConfinementError`; the caller must then exit."""
    os.setsid()
    os.umask(0o077)
    _limit_resources(confinement.plan.profile)
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
        privileges.bound_capabilities(os.uname().machine)


def die_with_parent(death_signal: signal.Signals, parent: int) -> None:
    """Have the kernel send ``death_signal`` when the parent ends; prctl(2) asks to check that it is not too late."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != parent:
        raise ConfinementError("the parent process is gone")


def close_descriptors(keep: Sequence[int], errors_to: int) -> None:
    """Keep some, renumbered from 3 on; send standard output and error to ``errors_to``; close everything else."""
    keep = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _OUT_OF_THE_WAY) for descriptor in keep]
    errors_to = os.dup(errors_to)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(errors_to, 1)
    os.dup2(errors_to, 2)
    for number, descriptor in enumerate(keep, FIRST_FREE_DESCRIPTOR):
        os.dup2(descriptor, number, inheritable=False)
    os.closerange(FIRST_FREE_DESCRIPTOR + len(keep), _HIGHEST_DESCRIPTOR)


def _confine_on_linux(confinement: Confinement) -> list[str]:
    """Put the layers in place in the one order that works: each still needs what the next takes away."""
    plan = confinement.plan
    if not confinement.apart:  # there, nobody can see the parent
        die_with_parent(signal.SIGKILL, confinement.parent)
    layers = ["disk_sampled", "memory_sampled", "parent_death_signal", *_end_of_descendants(confinement)]
    if confinement.mounts is not None:
        if bubblewrap.mount_namespace() != confinement.mounts:
            raise ConfinementError("it is not in the mount namespace that was made for it")
        layers.append("bubblewrap")
    if confinement.own_uid is not None and os.getresuid() == (confinement.own_uid,) * 3:
        layers.append(f"own_uid:{confinement.own_uid}")
    if privileges.drop_capabilities(os.uname().machine):
        layers.append("capabilities_dropped")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    layers += ["no_new_privs", "not_dumpable"]
    if plan.landlock_abi:
        landlock.restrict(file_rules(plan, confinement.folder), plan.landlock_abi, tcp=plan.profile.network)
        layers.append(f"landlock:{plan.landlock_abi}")
    if confinement.ask_through is not None:
        _ask_before_forks(plan, confinement.ask_through)
    elif plan.filter_program:
        seccomp.install(plan.filter_program, os.getpid())
    if plan.filter_program:
        layers.append("seccomp")
    return layers


def confine_forked_worker(plan: Plan, supervisor: int) -> None:
    """Do, in the child of a template, what a process does not inherit. The supervisor sees to it that it is done."""
    os.setsid()
    die_with_parent(signal.SIGKILL, supervisor)
    seccomp.install(plan.filter_program, os.getpid())


def file_rules(plan: Plan, folder: str) -> tuple[tuple[str, int], ...]:
    """Return what a worker may do with files, its own folder among them: rights below paths."""
    return (*plan.file_rules, (folder, Access.CHANGE))


def _ask_before_forks(plan: Plan, supervisor: socket.socket) -> None:
    gate = seccomp.install_asking(plan.asking_program, os.getpid())
    try:
        socket.send_fds(supervisor, [b"gate"], [gate])
    finally:
        os.close(gate)


def _end_of_descendants(confinement: Confinement) -> list[str]:
    """Return what ends the processes that a plugin may have: the kernel, or who of us finds them."""
    by_kernel = ["pid_namespace"] if confinement.apart else []
    if confinement.grouped and confinement.plan.landlock_abi:  # else root could walk out of it
        by_kernel.append("cgroup")
    may_leave_some = confinement.plan.profile.processes or confinement.ask_through
    return by_kernel or (["descendants_swept"] if may_leave_some else [])


def _file_rules(profile: IsolationProfile) -> Iterator[tuple[str, int]]:
    """Return what may be done where, besides the worker's own folder. What a plugin wrote it may never execute."""
    read = Access.RUN if profile.processes else Access.READ
    for path in (*environment_paths(), *readable_paths(network=profile.network), *profile.read_paths):
        yield path, read
    for path in (*PLAIN_DEVICES, *profile.devices):
        yield path, Access.DEVICE
    for path in profile.write_paths:
        yield path, Access.CHANGE


def _limit_resources(profile: IsolationProfile) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, profile.open_files)
    _lower(resource.RLIMIT_FSIZE, profile.file_bytes)
    _lower(resource.RLIMIT_DATA, profile.memory_bytes + _UNTOUCHED_BYTES)
    if _LINUX:
        _lower(resource.RLIMIT_SIGPENDING, _QUEUED_SIGNALS)
    if profile.cpu_seconds is not None:
        _lower(resource.RLIMIT_CPU, profile.cpu_seconds)


def _lower(kind: int, wanted: int) -> None:
    """Set a limit, soft and hard, never above what the process already has."""
    hard = resource.getrlimit(kind)[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (value, value))
