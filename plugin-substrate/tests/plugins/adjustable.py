"""A plugin with a configuration, live options, hooks and something to fetch; it keeps a diary in its folder."""

# ruff: noqa: T201 - printing is what is tested
from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from plugin_substrate.errors import PluginConfigError, PluginInputError
from plugin_substrate.interface import (
    RELOAD_TRIGGER,
    ConfigOption,
    EnvVarSpec,
    FieldOptions,
    PluginInterface,
    plugin_action,
)


@dataclass
class Settings:
    model: str = field(default="small", metadata={RELOAD_TRIGGER: "model"})
    device: str = field(default="cpu", metadata={RELOAD_TRIGGER: "model"})
    index: str = field(default="flat", metadata={RELOAD_TRIGGER: "index"})
    threshold: float = 0.5


SCHEMA = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "default": "small", "minLength": 1},
        "device": {"enum": ["cpu", "gpu"], "default": "cpu"},
        "index": {"type": "string", "default": "flat"},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    },
}


class Adjustable(PluginInterface):
    name = "adjustable"
    version = "1.0"
    config_class = Settings
    WORKER_ENV = (EnvVarSpec("SERVICE_TOKEN", secret=True, required=True), EnvVarSpec("REGION", default="north"))

    def initialize(self, config):
        self.config = config
        self.write(f"initialize {config.get('model')}")
        if config.get("model") == "unloadable":
            raise PluginConfigError("there is no such model", fields_invalid=["model"])

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    def get_config_schema(self):
        return SCHEMA

    def get_current_config(self):
        return Settings(**self.config)

    def get_config_options(self):
        return {"device": FieldOptions([ConfigOption("cpu", "Processor", {"cores": 2})], {"maximum": 1})}

    def cleanup(self):
        self.write("cleanup")

    def on_disable(self):
        self.write("on_disable")

    def on_enable(self):
        self.write("on_enable")

    def prefetch(self):
        print("fetching")
        for step in range(3):
            self.report_progress(step / 3, "fetching")
        if self.config.get("model") == "stalled":
            time.sleep(1000)
        if self.config.get("model") == "missing":
            raise FileNotFoundError("no such model")
        self.write("prefetched")

    def _release_model(self):
        self.write("release model")
        raise RuntimeError("it is stuck")

    def _release_index(self):
        self.write("release index")

    def write(self, line):
        with (self.data_dir / "diary").open("a") as file:
            file.write(line + "\n")

    @plugin_action("adjust.config")
    def current(self):
        return dict(self.config), os.getpid()

    @plugin_action("adjust.environment")
    def environment(self, name):
        return os.environ.get(name)

    @plugin_action("adjust.print")
    def say(self, text):
        print(text)

    @plugin_action("adjust.polite")
    def polite(self):
        self.report_progress(0.5, "running")
        while True:
            self.check_cancel()
            time.sleep(0.001)

    @plugin_action("adjust.quit")
    def leave(self):
        os._exit(3)


class Applying(Adjustable):
    """Takes a new configuration over by itself."""

    def _apply_config(self, config):
        if config["model"] == "refused":
            raise PluginInputError("not this one")
        self.config = config
        self.write(f"apply {config['model']}")


class Drifted(Adjustable):
    """Its schema is not the one its manifest has."""

    def get_config_schema(self):
        return {**SCHEMA, "title": "newer"}


class NeverAnswers(Adjustable):
    def get_config_schema(self):
        time.sleep(1000)

    def get_config_options(self):
        time.sleep(1000)

    def on_disable(self):
        time.sleep(1000)


class Undescribed(Adjustable):
    def get_config_schema(self):
        raise RuntimeError("I do not know")


class Monitor(Adjustable):
    def get_system_status(self):
        return {"memory_available_mb": 1000.0}

    def list_processes(self):
        return [{"pid": os.getpid(), "gpu_memory_mb": 0.0}]


class Optionless(Adjustable):
    def get_config_options(self):
        return {"device": ["cpu"]}


class RaisesOnCreate(Adjustable):
    def __init__(self):
        print("about to fail")
        raise RuntimeError("no such device")
