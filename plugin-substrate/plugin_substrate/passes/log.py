"""What a plugin says in a pass: to the host's log, and line by line to a file of bounded size."""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["PassLog", "run_id_of"]

_LEVELS = {
    "DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING, "WARN": logging.WARNING,
    "ERROR": logging.ERROR, "CRITICAL": logging.CRITICAL,
}  # fmt: skip
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_CUT = "the rest is not kept: this file is full\n"

_logger = logging.getLogger(__name__)


class PassLog:
    """Takes the lines of one plugin. The file is begun anew for each pass."""

    def __init__(self, plugin: str, path: Path | None, *, most_bytes: int) -> None:
        self._plugin = plugin
        self._left = most_bytes
        self._file: IO[str] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")

    def line(self, text: str) -> None:
        """Take one line; one that is a JSON object with a message goes to the host's log at the level it names."""
        self._keep(text)
        try:
            entry = json.loads(text) if text.startswith("{") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("message"), str):
            return
        context: dict[str, Any] = entry["context"] if isinstance(entry.get("context"), dict) else {}
        level = _LEVELS.get(str(entry.get("level", "INFO")).upper(), logging.INFO)
        _logger.log(level, "%s", entry["message"], extra={"plugin": self._plugin, "context": context})

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # a disk that a plugin has filled
                file.close()

    def _keep(self, text: str) -> None:
        if self._file is None or self._left <= 0:
            return
        self._left -= len(text.encode(errors="backslashreplace")) + 1
        try:
            self._file.write(text + "\n" if self._left > 0 else _CUT)
        except OSError as error:
            self.close()
            _logger.warning("what a plugin says is not kept", extra={"plugin": self._plugin, "reason": str(error)})


def run_id_of(*names: str) -> str:
    """Return the first name that is not empty, fit for a file name; ``run`` when none is."""
    name = next(filter(None, (_UNSAFE.sub("-", name).lstrip(".") for name in names)), "")
    return name[:200] or "run"
