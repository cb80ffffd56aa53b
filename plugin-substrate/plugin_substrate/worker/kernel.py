"""The system calls that the C library has no function for, by number, with an OSError for every failure."""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47


def prctl(option: int, *arguments: int | bytes) -> int:
    """Change what the kernel keeps about this process; what is not given is 0, as most options want it."""
    return _checked(_prctl(option, *arguments, *_ZEROS[len(arguments) :]), "prctl", option)


def unshare(flags: int) -> None:
    """Leave namespaces that this process shares with others."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare", flags)


def setns(descriptor: int, kind: int) -> None:
    """Enter a namespace."""
    _checked(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), "setns", kind)


def system_call(number: int, *arguments: int | bytes) -> int:
    """Call by number. Bytes stand for a pointer to them: not for a call that writes there."""
    return _checked(_syscall(number, *arguments, *_ZEROS[len(arguments) :], 0, 0), "system call", number)


def read_back(number: int, first: bytes, size: int) -> bytes:
    """Call by number with two pointers, and return what the kernel wrote behind the second."""
    answer = ctypes.create_string_buffer(size)
    _checked(_syscall(number, first, answer, *_ZEROS), "system call", number)
    return answer.raw


def _checked(result: int, what: str, number: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what} {number}: {os.strerror(error)}")
    return result


# With the types of their parameters said once: to wrap each argument of each call takes longer than most of the calls,
# of which a worker that is being confined makes more than a hundred.
_ZEROS = (0, 0, 0, 0)
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 6]
if sys.platform == "linux":
    _prctl = _libc.prctl
    _prctl.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4]
