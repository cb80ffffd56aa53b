"""Linux capabilities and the user of a process: what it gives up of them, and whether it really has."""

from __future__ import annotations

import os
import struct

from plugin_substrate.worker.kernel import (
    PR_CAP_AMBIENT,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_SET_SECUREBITS,
    prctl,
    read_back,
    system_call,
)
from plugin_substrate.worker.syscall_numbers import CAPGET, CAPSET

_CAPABILITY_VERSION_3 = 0x20080522
_CLEAR_ALL_AMBIENT = 4
_NO_ROOT_LOCKED = 0b11  # executing a program as user 0 gives no capabilities, and this cannot be changed back
_CAP_SETPCAP = 8
_MOST_CAPABILITIES = 64


def drop_capabilities(machine: str) -> bool:
    """Give up every Linux capability for good, in the bounding set too where that is allowed.

    True when none is left. Without no_new_privs a program with set-id bits or file capabilities could bring them back.
    """
    if machine not in CAPSET:
        return False
    if _permitted(machine) >> _CAP_SETPCAP & 1:
        prctl(PR_SET_SECUREBITS, _NO_ROOT_LOCKED)
        _empty_bounding_set()
    prctl(PR_CAP_AMBIENT, _CLEAR_ALL_AMBIENT)
    system_call(CAPSET[machine], struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
    return _held(machine) == 0


def bound_capabilities(machine: str) -> None:
    """See that no program that is executed from here on gives a capability, where this process may decide that.

    A supervisor does it once for all its workers, which inherit it: it takes a third of all that confines one of them.
    It alone can still hand down what it holds, to bubblewrap; a worker gives that up with the rest.
    """
    if machine in CAPGET and _permitted(machine) >> _CAP_SETPCAP & 1:
        _make_inheritable(machine)
        _empty_bounding_set()


def become(uid: int) -> bool:
    """Take a user and group id of its own, with no other groups; False where this container has no such id."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:
        return False
    return os.getresuid() == (uid, uid, uid)


def become_or_exit(uid: int) -> None:
    """Take a user id of its own, in a forked child that must not go on as who it was."""
    if not become(uid):
        os._exit(1)


def _empty_bounding_set() -> None:
    for capability in range(_MOST_CAPABILITIES):
        try:
            if prctl(PR_CAPBSET_READ, capability):
                prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # the kernel knows no more
            return


def _make_inheritable(machine: str) -> None:
    """Let programs that this process executes keep what it holds, if they are root's too."""
    low, high = _sets(machine)
    sets = struct.pack("=6I", low[0], low[1], low[1], high[0], high[1], high[1])
    system_call(CAPSET[machine], struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), sets)


def _held(machine: str) -> int:
    """Return the permitted and inheritable capabilities as one set of bits."""
    low, high = _sets(machine)
    return (low[1] | low[2]) | (high[1] | high[2]) << 32


def _permitted(machine: str) -> int:
    low, high = _sets(machine)
    return low[1] | high[1] << 32


def _sets(machine: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the effective, permitted and inheritable capabilities: their low halves, and the high ones."""
    answer = read_back(CAPGET[machine], struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 24)
    numbers = struct.unpack("=6I", answer)
    return numbers[:3], numbers[3:]
