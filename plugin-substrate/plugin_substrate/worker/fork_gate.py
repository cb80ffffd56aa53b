"""Where a supervisor is asked whether a process may do what its filter leaves to it (seccomp_unotify(2)).

A question names the process and the call. What is asked here, a fork and a prctl, has its arguments in registers, which
the filter has looked at and nobody can change any more: so letting the kernel carry on is safe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from typing import NamedTuple

from plugin_substrate.worker.syscall_numbers import NUMBERS

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags; the call's number, ...
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, value, error, flags
_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_CARRY_ON = 1


class Question(NamedTuple):
    """Which process asks, and what for: ``clone`` or ``prctl``."""

    number: int
    pid: int
    call: str


class ForkGate:
    """Owns the descriptor of one filter; once it is closed, everything that is asked is refused by the kernel."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._readable = select.poll()
        self._readable.register(descriptor, select.POLLIN)
        numbers = NUMBERS[os.uname().machine]
        self._calls = {numbers[name]: name for name in ("clone", "prctl")}

    def fileno(self) -> int:
        """Return the descriptor, readable when there is a question."""
        return self._descriptor

    def receive(self) -> Question | None:
        """Return the next question, None when there is none: who asked may be gone."""
        if not self._readable.poll(0):
            return None  # to receive would wait
        room = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._descriptor, _RECEIVE, room)
        except OSError:
            return None
        number, pid, _, call, *_ = _NOTIFICATION.unpack(room)
        return Question(number, pid, self._calls.get(call, ""))

    def answer(self, question: Question, *, allow: bool) -> bool:
        """Let the kernel carry the call out, or refuse it; False when who asked is gone, or asks anew."""
        error, flags = (0, _CARRY_ON) if allow else (-errno.EPERM, 0)
        try:
            fcntl.ioctl(self._descriptor, _ANSWER, bytearray(_RESPONSE.pack(question.number, 0, error, flags)))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Have everything refused from now on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
