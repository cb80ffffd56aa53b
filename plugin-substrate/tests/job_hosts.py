"""Hosts with a queue on disk, in processes of their own: to be asked, and to be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from plugin_substrate import PluginMeta, write_manifest
from plugin_substrate.worker_folder import tenant_folder

SCRIPT = Path(__file__).parent / "plugins" / "job_host.py"


class HostProcess:
    """One host over ``folder``, and what it said was kept."""

    def __init__(self, folder: Path) -> None:
        self.kept: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._answer()
        except BaseException:
            self.kill()
            raise

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Have it do something and return what it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def hear_until(self, kept: int) -> None:
        """Listen until it has told that so many jobs are kept."""
        while len(self.kept) < kept:
            told = self._line()
            assert told is not None, "the host ended"
            self.kept += told["kept"]

    def kill(self) -> None:
        """Kill it outright, and hear what it had still said."""
        if self._process.returncode is not None:
            return
        self._process.kill()
        while (told := self._line()) is not None:
            self.kept += told.get("kept", [])
        self._end()

    def stop(self) -> None:
        """Have it end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._end()

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        while True:
            told = self._line()
            assert told is not None, "the host ended"
            if "answer" in told:
                return told["answer"]
            self.kept += told["kept"]

    def _line(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            return None
        told: dict[str, Any] = json.loads(line)
        return told


def write_manifests(folder: Path, *metas: PluginMeta) -> None:
    """Have hosts over ``folder`` load these plugins."""
    for meta in metas:
        write_manifest(folder / f"{meta.name}.json", meta.manifest)


def plugin_folder(folder: Path, name: str) -> Path:
    """Where the calls of no tenant leave their effects."""
    return folder / "data" / "data" / name / tenant_folder("")


def effects(folder: Path, name: str) -> list[str]:
    """What the jobs of a plugin did, whichever host they ran under."""
    file = plugin_folder(folder, name) / "effects"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
