"""The plugin that the tests load: each action shows one behaviour. It runs in a worker, never in the tests' process."""

# ruff: noqa: T201 - printing is what is tested
from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from plugin_substrate.errors import (
    PluginConfigError,
    PluginInputError,
    PluginResourceError,
    PluginTransientError,
    ResourceShortfall,
)
from plugin_substrate.interface import OutputFile, PluginInterface, plugin_action


class Probe(PluginInterface):
    name = "probe"
    version = "1.0"

    def initialize(self, config):
        self.config = config
        self.calls = 0
        self.together = threading.Barrier(2)
        self.lock = threading.Lock()
        self.inside = 0

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self, action, **arguments):
        self.calls += 1
        return self.run_action(action, **arguments)

    def cleanup(self):
        with (self.data_dir / "cleanups").open("a") as file:
            file.write("cleaned\n")

    @plugin_action("probe.echo")
    def echo(self, **values):
        return values

    @plugin_action("probe.count")
    def count(self):
        return self.calls, os.getpid()

    @plugin_action("probe.context")
    def context(self):
        return vars(self.call)

    @plugin_action("probe.surroundings")
    def surroundings(self):
        links = {}
        for path in list(Path("/proc/self/fd").iterdir()):
            try:
                links[path.name] = str(path.readlink())
            except FileNotFoundError:
                continue  # the listing itself
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        return {
            "descriptors": links,
            "environment": dict(os.environ),
            "session": os.getsid(0),
            "pid": os.getpid(),
            "no_new_privs": status["NoNewPrivs"].strip(),
            "cwd": str(Path.cwd()),
            "modules": sorted(name for name in sys.modules if name.startswith("plugin_substrate")),
        }

    @plugin_action("probe.report")
    def report(self, steps):
        for step in range(steps):
            self.report_progress(step / steps, f"step {step}")
        self.report_usage({"pages": 1})
        self.report_usage({"pages": 2, "bytes": 10.5})
        return OutputFile("report.txt", "text/plain", b"done")

    @plugin_action("probe.print")
    def print_lines(self, lines):
        for line in lines:
            print(line)
        print("to stderr, without an end", end="", file=sys.stderr)
        sys.stdout.buffer.write(b"\x00\x00\x00\x02\x00\x00\x00\x02{}\n")

    @plugin_action("probe.print_below_python")
    def print_below_python(self, text):
        os.write(1, text.encode() + b"\n")
        while True:  # the pipe is another way than the answer's: stay until the line was heard
            self.check_cancel()
            time.sleep(0.001)

    @plugin_action("probe.fail")
    def fail(self, how):
        failures = {
            "input": PluginInputError("bad rows", fields_invalid=["rows", "unit"]),
            "transient": PluginTransientError("later", retry_after_seconds=7.5),
            "resource": PluginResourceError("too big", resource_shortfall=ResourceShortfall("ram", 10, 4)),
            "config": PluginConfigError("wrong setting"),
            "bare": KeyError("missing"),
            "os": ConnectionResetError("peer"),
            "strange": ZeroDivisionError("x"),
            "exit": SystemExit(3),
            "not_retriable": PluginInputError("never", retriable=False),
        }
        raise failures[how]

    @plugin_action("probe.unencodable")
    def unencodable(self):
        return {"rows": [{"weight": 1.0}, {"weight": float("nan")}]}

    @plugin_action("probe.polite")
    def polite(self):
        """Runs until it is cancelled."""
        self.report_progress(0.5, "running")
        while True:
            self.check_cancel()
            time.sleep(0.001)

    @plugin_action("probe.waits_for_callback")
    def waits_for_callback(self):
        woken = threading.Event()
        with self.cancel_signal_to(woken.set):
            self.report_progress(0.5, "running")
            woken.wait()
        return "finished all the same"

    @plugin_action("probe.stubborn")
    def stubborn(self):
        self.report_progress(0.5, "running")
        while True:
            time.sleep(60)

    @plugin_action("probe.busy")
    def busy(self):
        """Never lets go of the interpreter: not even the reader thread runs."""
        self.report_progress(0.5, "running")
        sum(range(10**18))

    @plugin_action("probe.die")
    def die(self, number):
        os.write(2, b"last words\n")
        os.kill(os.getpid(), number)
        signal.pause()

    @plugin_action("probe.leave")
    def leave(self, status):
        os._exit(status)

    @plugin_action("probe.daemon")
    def daemon(self):
        """Leaves a grandchild in a session of its own behind."""
        script = (
            "import subprocess; from subprocess import DEVNULL;"
            "print(subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=DEVNULL).pid)"
        )
        done = subprocess.run([sys.executable, "-I", "-S", "-c", script], stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    @plugin_action("probe.bare_daemon")
    def bare_daemon(self):
        """Leaves a grandchild behind that has a session of its own and never started a program; tells its pid."""
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            for limit in (resource.RLIMIT_NOFILE, 10):  # and it would like to look like nobody's
                with contextlib.suppress(OSError, ValueError):
                    resource.setrlimit(limit, (1, 1))
            os.environ.clear()
            os.write(writing, str(os.getpid()).encode())
            while True:
                time.sleep(1000)
        os.close(writing)
        os.waitpid(between, 0)
        return int(os.read(reading, 20))

    @plugin_action("probe.meet")
    def meet(self):
        """Returns only when a second call is in the worker at the same time."""
        self.together.wait(30)
        return self.call.call_id

    @plugin_action("probe.together")
    def count_together(self):
        """How many calls are in the worker at once, this one among them."""
        with self.lock:
            self.inside += 1
            seen = self.inside
        time.sleep(0.02)
        with self.lock:
            self.inside -= 1
        return seen

    @plugin_action("probe.break_protocol")
    def break_protocol(self):
        os.write(3, b"\xff" * 64)
        signal.pause()

    @plugin_action("probe.forge_answer")
    def forge_answer(self):
        body = b'{"type":"result","id":"somebody-else","segments":[]}'
        os.write(3, len(body).to_bytes(4, "big") * 2 + body)
        signal.pause()


class RaisesOnCreate(Probe):
    def __init__(self):
        print("about to fail")
        raise RuntimeError("no such device")


class RaisesOnInitialize(Probe):
    def initialize(self, config):
        print("reading settings")
        raise PluginConfigError("threshold must be positive", fields_invalid=["threshold"])


class DiesOnInitialize(Probe):
    def initialize(self, config):
        os.write(2, b"out of luck\n")
        os.kill(os.getpid(), signal.SIGSEGV)


class NeverReady(Probe):
    def initialize(self, config):
        time.sleep(1000)


class NoPlugin:
    pass


class SlowStart(Probe):
    """Takes longer than the limit, and says all the time how far it is; then, if told to, falls silent."""

    def initialize(self, config):
        super().initialize(config)
        for step in range(config["steps"]):
            self.report_progress(step / config["steps"], f"step {step}")
            time.sleep(0.1)
        while config.get("fall_silent"):
            self.report_progress(1.0, "the same again")
            time.sleep(0.01)
