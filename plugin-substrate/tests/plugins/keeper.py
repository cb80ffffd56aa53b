"""A plugin that keeps whatever it is told, wherever a process can keep something, and tells what it finds there."""

# ruff: noqa: T201 - printing is what is tested
from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path

from plugin_substrate.interface import PluginInterface, plugin_action

KEPT: list[str] = []


class Keeper(PluginInterface):
    name = "keeper"
    version = "1.0"

    def initialize(self, config):
        self.kept = []

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return {}

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    @plugin_action("keeper.keep")
    def keep(self, secret):
        KEPT.append(secret)
        self.kept.append(secret)
        os.environ["KEPT"] = secret
        sys.modules["kept"] = secret
        Path("kept").write_text(secret)
        Path(tempfile.gettempdir(), "kept").write_text(secret)
        Path("~/.kept").expanduser().write_text(secret)
        (self.data_dir / "kept-too").write_text(secret)
        os.write(2, f"printed {secret}\n".encode())
        threading.Thread(target=threading.Event().wait, name=secret, daemon=True).start()
        return os.getpid()

    @plugin_action("keeper.bury")
    def bury(self, secret, depth):
        """Keep it so deep that no path, no stack and no number of open folders leads there; nobody may look in."""
        for _ in range(depth):
            os.mkdir("d")  # noqa: PTH102 - a path would be too long
            os.chdir("d")
        Path("kept").write_text(secret)
        os.mkdir("closed", 0o300)  # noqa: PTH102
        Path("closed/kept").write_text(secret)

    @plugin_action("keeper.find")
    def find(self):
        places = [Path.cwd(), Path(tempfile.gettempdir()), Path("~").expanduser()]
        return {
            "memory": [*KEPT, *self.kept],
            "environment": dict(os.environ),
            "modules": str(sys.modules.get("kept")),
            "files": [path.read_text() for place in places for path in place.iterdir() if path.is_file()],
            "threads": [thread.name for thread in threading.enumerate()],
        }

    @plugin_action("keeper.say")
    def say(self, text):
        print(text)
        os.write(2, f"{text}\n".encode())

    @plugin_action("keeper.meet")
    def meet(self):
        """The tenants of all calls that this process has served, this one among them."""
        KEPT.append(self.call.tenant_id)
        return KEPT

    @plugin_action("keeper.look_into")
    def look_into(self, folder):
        """What can be done in a folder that is known by its path."""
        outcome = {}
        for name, attempt in {
            "list": lambda: list(Path(folder).iterdir()),
            "read": lambda: Path(folder, "kept-too").read_text(),
            "write": lambda: Path(folder, "planted").write_text("x"),
            "link": lambda: Path("neighbour").symlink_to(folder),
            "read through the link": lambda: Path("neighbour", "kept-too").read_text(),
        }.items():
            try:
                attempt()
            except OSError as error:
                outcome[name] = type(error).__name__
            else:
                outcome[name] = "done"
        return outcome

    @plugin_action("keeper.places")
    def places(self):
        return {"cwd": str(Path.cwd()), "tmp": tempfile.gettempdir(), "data": os.environ.get("CJM_PLUGIN_DATA_DIR", "")}

    @plugin_action("keeper.pid")
    def pid(self):
        return os.getpid()

    @plugin_action("keeper.wait")
    def wait(self):
        """Runs until it is cancelled."""
        self.report_progress(0.5, "running")
        woken = threading.Event()
        with self.cancel_signal_to(woken.set):
            woken.wait()
        return os.getpid()

    @plugin_action("keeper.die")
    def die(self):
        os.write(2, b"last words\n")
        os.abort()
