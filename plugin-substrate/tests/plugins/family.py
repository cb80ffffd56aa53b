"""A plugin with descendants of every kind: a child, one in a session of its own, and a daemon of a dead parent."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time

from plugin_substrate.interface import PluginInterface


class Family(PluginInterface):
    name = "family"
    version = "1.0"

    def initialize(self, config):
        self.config = config

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self, token, afterwards="return"):
        command = ["sleep", token]
        subprocess.Popen(command)
        subprocess.Popen(command, start_new_session=True)
        between = os.fork()
        if between == 0:
            subprocess.Popen(command, start_new_session=True)
            os._exit(0)
        os.waitpid(between, 0)
        self.report_progress(0.5, "they are there")
        if afterwards == "hold the interpreter":
            sum(range(10**18))
        elif afterwards == "compute":  # in C, without the interpreter
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
        elif afterwards == "sleep":
            time.sleep(1000)
        return os.getpid()
