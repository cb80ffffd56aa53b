"""A plugin that wishes its host ill: each action is one attack. It runs in a worker, never in the tests' process."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time

from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import OutputFile, PluginInterface, plugin_action


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text for you")

    __repr__ = __str__


class ExitsWhenPrintedError(Exception):
    def __str__(self):
        raise SystemExit(9)


class LyingError(PluginInputError):
    def to_fields(self):
        raise RuntimeError("no fields for you")

    def __str__(self):
        return 5  # noqa: PLE0307 - that is the lie


class EndlessName(str):
    __slots__ = ()

    def __str__(self):
        return self

    def __eq__(self, other):
        raise RuntimeError("not comparable")

    __hash__ = str.__hash__


class Hostile(PluginInterface):
    name = "hostile"
    version = "1.0"

    def initialize(self, config):
        self.config = config

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    def stay(self):
        self.report_progress(0.5, "done what I could")
        while True:
            signal.pause() if threading.current_thread() is threading.main_thread() else time.sleep(60)

    @plugin_action("hostile.echo")
    def echo(self, **values):
        return values

    @plugin_action("hostile.pid")
    def pid(self):
        return os.getpid()

    @plugin_action("hostile.write")
    def write(self, raw, leave=False):
        """Write to the worker's socket past the worker, and never answer."""
        while raw:
            raw = raw[os.write(3, raw) :]
        if leave:
            os._exit(0)
        signal.pause()

    @plugin_action("hostile.flood")
    def flood(self, descriptor, raw):
        """Write as fast as the host reads."""
        while True:
            os.write(descriptor, raw)

    @plugin_action("hostile.flood_descriptors")
    def flood_descriptors(self):
        host = socket.socket(fileno=os.dup(3))
        while True:
            socket.send_fds(host, [struct.pack(">II", 1 << 20, 10)], [0] * 200)

    @plugin_action("hostile.park_a_file")
    def park_a_file(self):
        """Announce a parked segment, and send a descriptor of another kind with it."""
        value = b'{"$":"bytes","segment":0}'
        parts = {"type": "result", "id": self.call.call_id, "segments": [len(value)], "parked": [[1, 1 << 20]]}
        header = json.dumps(parts).encode()
        frame = struct.pack(">II", len(header) + len(value), len(header)) + header + value
        socket.send_fds(socket.socket(fileno=os.dup(3)), [frame], [0])
        self.stay()

    @plugin_action("hostile.raise")
    def raise_error(self, how):
        failures = {
            "unprintable": UnprintableError(),
            "exits": ExitsWhenPrintedError(),
            "lying": LyingError("x"),
            "interrupt": KeyboardInterrupt(),
            "base": BaseException("base"),
            "surrogate": ValueError("bad \ud800 text \0 \x1b[31m\nsecond line"),
        }
        raise failures[how]

    @plugin_action("hostile.recursion")
    def recursion(self):
        return self.recursion()

    @plugin_action("hostile.return")
    def strange_result(self, what):
        results = {
            "subclass": lambda: EndlessName("x"),
            "digits": lambda: 10**1_000_000,
            "file": lambda: OutputFile(EndlessName("x"), "text/plain", b""),
        }
        return results[what]()

    @plugin_action("hostile.usage")
    def usage(self, amount):
        numbers = {"nan": float("nan"), "inf": float("inf"), "negative": -1, "huge": 10**400, "true": True}
        self.report_usage({"x": numbers[amount]} if amount in numbers else {str(n): 1 for n in range(100_000)})

    @plugin_action("hostile.threads_exit")
    def threads_exit(self):
        thread = threading.Thread(target=sys.exit)
        thread.start()
        thread.join()
        return "still here"

    @plugin_action("hostile.close")
    def close(self, descriptors):
        for descriptor in descriptors:
            os.close(descriptor)
        return "closed"

    @plugin_action("hostile.lose_data_dir")
    def lose_data_dir(self):
        shutil.rmtree(self.data_dir)
        self.data_dir.with_name("elsewhere").mkdir()
        os.chdir("/")
        os.umask(0)

    @plugin_action("hostile.replace_tmp")
    def replace_tmp(self):
        shutil.rmtree(self.data_dir / "tmp")
        (self.data_dir / "tmp").write_text("in the way")

    @plugin_action("hostile.stop_itself")
    def stop_itself(self):
        self.report_progress(0.5, "stopping")
        os.kill(os.getpid(), signal.SIGSTOP)

    @plugin_action("hostile.escape")
    def escape(self):
        """Leave a child with the socket in hand behind, which means to outlive everybody."""
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
            os.setsid()
            time.sleep(1000)
            os._exit(0)
        self.report_progress(0.5, str(child))
        signal.pause()

    @plugin_action("hostile.fork_and_print")
    def fork_and_print(self):
        """What an honest plugin does with multiprocessing: the child prints and is waited for."""
        child = os.fork()
        if child == 0:
            print("from the child")  # noqa: T201 - printing is what is tested
            try:
                self.report_progress(0.5, "from the child")
            except LookupError:
                os._exit(7)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    @plugin_action("hostile.return_twice")
    def return_twice(self):
        """Let a forked child come back from this call as well."""
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        return "once"

    @plugin_action("hostile.no_more_threads")
    def no_more_threads(self):
        """Leave no room for the thread that would carry a cancel request."""

        def refuse(*_):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = refuse
        self.stay()

    @plugin_action("hostile.fork_chain")
    def fork_chain(self):
        """Leave a process behind that gives way to its own child for ever."""
        if os.fork() == 0:
            os.setsid()
            while True:
                if os.fork():
                    os._exit(0)
        return True


class SlowToLoad(Hostile):
    def initialize(self, config):
        (self.data_dir / "loading").touch()
        time.sleep(1000)


class StopsItself(Hostile):
    def initialize(self, config):
        os.kill(os.getpid(), signal.SIGSTOP)
