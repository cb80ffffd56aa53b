"""The system calls that the C library has no function for, by number, with an OSError for every failure."""

from __future__ import annotations

import ctypes
import os
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47


def prctl(option: int, *arguments: int | bytes) -> int:
    """Change what the kernel keeps about this process; what is not given is 0, as most options want it."""
    values = [_argument(value) for value in [*arguments, 0, 0, 0, 0][:4]]
    return _checked(_libc.prctl(ctypes.c_int(option), *values), f"prctl({option})")


def unshare(flags: int) -> None:
    """Leave namespaces that this process shares with others."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def system_call(number: int, *arguments: int | bytes) -> int:
    """Call by number. Bytes stand for a pointer to a copy of them."""
    return _checked(_libc.syscall(ctypes.c_long(number), *map(_argument, arguments)), f"system call {number}")


def read_back(number: int, first: bytes, size: int) -> bytes:
    """Call by number with two pointers, and return what the kernel wrote behind the second."""
    answer = ctypes.create_string_buffer(size)
    _checked(_libc.syscall(ctypes.c_long(number), _argument(first), answer), f"system call {number}")
    return answer.raw


def _argument(value: int | bytes) -> Any:
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.create_string_buffer(value, len(value))


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return int(result)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
