"""The supervisor's hold on a template: a process that has imported a plugin's modules, and forks workers of it.

Foreign code has run in a template, so nothing that it says is believed. It cannot fork unless the supervisor is just
waiting for that, and then twice: for a process in between, which ends, so that the worker becomes the supervisor's own
child. Who then, as such a child, asks to have its end tied to the supervisor's is the worker; only now it is given its
socket, its log and its environment, and it cannot undo the tie.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Container
from contextlib import suppress
from typing import Any

from plugin_substrate.errors import PluginConfigError
from plugin_substrate.worker.fork_gate import ForkGate

_FORKS = 2


class Order:
    """A worker that is wanted: what the host asked for, and the door behind which the worker waits for it."""

    def __init__(self, request: dict[str, Any], descriptors: list[int], door: socket.socket) -> None:
        self.request = request
        self.descriptors = descriptors
        self.door = door
        self.forks_left = _FORKS

    def hand_over(self) -> None:
        """Give the worker what is its own; one that died meanwhile needs nothing."""
        raw = json.dumps({"env": self.request["env"], "cwd": self.request["cwd"]}).encode()
        with suppress(OSError):
            socket.send_fds(self.door, [raw], self.descriptors)
        self.close()

    def close(self) -> None:
        """Give up what the worker was to get."""
        self.door.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


class TemplateLink:
    """One template, as its supervisor sees it: at most one worker of it is on its way."""

    def __init__(self, channel: socket.socket, poll: select.poll) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._poll = poll
        self._gate: ForkGate | None = None
        self.watched = -1  #: the descriptor that is polled for it: where its gate comes from, and then the gate
        self.order: Order | None = None
        self._watch(channel.fileno())

    def place(self, request: dict[str, Any], descriptors: list[int]) -> None:
        """Have it fork a worker; an OSError or a `PluginConfigError` when it cannot."""
        if self.order is not None:
            raise PluginConfigError("its template is forking another worker")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                socket.send_fds(self._channel, [b"fork"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        self.order = Order(request, [os.dup(descriptor) for descriptor in descriptors], ours)

    def hear(self, known: Container[int]) -> tuple[int, Order] | None:
        """Answer one question; returns a worker that is complete now, by its pid, and what it was ordered with.

        ``known`` holds the pids that are workers already.
        """
        if self._gate is None:
            self._take_gate()
            return None
        question = self._gate.receive()
        if question is None:
            return None
        order = self.order
        if order is not None and question.call == "clone" and order.forks_left:
            if self._gate.answer(question, allow=True):
                order.forks_left -= 1
        elif order is not None and question.call == "prctl" and _is_new_child(question.pid, known):
            if self._gate.answer(question, allow=True):
                self.order = None
                return question.pid, order
        else:
            self._gate.answer(question, allow=False)
        return None

    def close(self) -> Order | None:
        """Let go of a template that is dead; returns the order that nobody will carry out now."""
        order, self.order = self.order, None
        self._watch(-1)
        if self._gate is not None:
            self._gate.close()
        self._channel.close()
        return order

    def _take_gate(self) -> None:
        """Take what it sent before it imported anything: the first message of this channel, and the last one read."""
        try:
            _, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:  # it was another's number that was ready
            return
        if descriptors:
            self._gate = ForkGate(descriptors[0])
        self._watch(descriptors[0] if descriptors else -1)  # else it is dead, as will be heard

    def _watch(self, descriptor: int) -> None:
        if self.watched >= 0:
            self._poll.unregister(self.watched)
        self.watched = descriptor
        if descriptor >= 0:
            self._poll.register(descriptor, select.POLLIN)


def _is_new_child(pid: int, known: Container[int]) -> bool:
    """Whether a process is a living child of ours that nobody knows: it, and not a thread of another."""
    if pid in known:
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False
