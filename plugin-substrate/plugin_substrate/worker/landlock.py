"""Landlock (landlock(7)): what this process may open, connect to and signal, from now on and for all its children.

Rights only add up: what no rule gives is refused, and what a folder gives cannot be taken away below it. An older
kernel knows fewer of them; `restrict` returns the version that the kernel speaks, which says what is covered.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable

from plugin_substrate.worker.kernel import system_call

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

HIGHEST_ABI = 7
TCP_ABI = 4
SIGNAL_ABI = 6
_SINCE = ((5, 1 << 15), (3, 1 << 14), (2, 1 << 13))  # ioctl on devices, truncate, rename and link across folders


class Access:
    """Rights below a path, as the kernel numbers them; the groups are what rules are made of. Plain numbers all."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_FIFO = 1 << 10
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15

    READ = READ_FILE | READ_DIR
    RUN = READ | EXECUTE
    MAKE = MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM
    CHANGE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE | REFER | TRUNCATE
    DEVICE = READ | WRITE_FILE | IOCTL_DEV


_EVERYTHING = (1 << 16) - 1
_OF_FILES_ALONE = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV


def kernel_abi() -> int:
    """Return the version of Landlock that the kernel speaks, 0 when it has none or has it switched off."""
    try:
        return system_call(_CREATE_RULESET, 0, 0, _VERSION_FLAG)
    except OSError:
        return 0


def spoken_abi() -> int:
    """Return the version that the kernel and this module both speak."""
    return min(kernel_abi(), HIGHEST_ABI)


def restrict(rules: Iterable[tuple[str, int]], abi: int, *, tcp: bool) -> None:
    """Confine this process to the rules, rights below paths, in the version that `spoken_abi` returned; not for 0.

    Needs no_new_privs. A path that does not exist, or that this process may not see, gives nothing. Signals and
    abstract sockets reach only processes confined with it, TCP nobody unless ``tcp``; as far as the version knows them.
    """
    if abi == 0:
        return
    handled = _EVERYTHING
    for since, right in _SINCE:
        if abi < since:
            handled &= ~right
    attributes = struct.pack("QQQ", handled, 0 if tcp or abi < TCP_ABI else 0b11, 0b11 if abi >= SIGNAL_ABI else 0)
    size = 24 if abi >= SIGNAL_ABI else 16 if abi >= TCP_ABI else 8
    ruleset = system_call(_CREATE_RULESET, attributes, size, 0)
    try:
        for path, access in rules:
            _allow(ruleset, path, access & handled)
        system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= _OF_FILES_ALONE
        rule = struct.pack("=Qi", access, place)
        system_call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    except OSError as error:
        if error.errno != errno.EBADFD:  # a file that only the kernel can open, like a namespace
            raise
    finally:
        os.close(place)
