"""The effects that were applied, one file of one line per step key: a repeated step finds its own."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from plugin_substrate.errors import PluginFatalError, PluginInputError


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What was applied under a step key; ``digest`` tells the call's arguments from others."""

    tenant_id: str
    step_key: str
    digest: str
    document: str


class Journal:
    """Applies each effect once, across threads, processes and their deaths at any point.

    An entry is written beside its place, flushed, and then linked to it: the link fails when the place is taken, so of
    several writers one wins, and no reader ever sees a part. What a killed writer leaves behind is never read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def apply(self, effect: Effect) -> Effect:
        """Record ``effect``, or return the one already recorded under its key.

        Raises a PluginInputError when the key was used with other arguments, a PluginFatalError for a damaged entry.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = self._folder / f"{_file_key(effect)}.json"
        if not place.exists():
            self._publish(place, effect)
        recorded = _load(place)
        if recorded.digest != effect.digest:
            raise PluginInputError(
                f"step key {effect.step_key!r} was already used with other arguments", fields_invalid=["step_key"]
            )
        return recorded

    def _publish(self, place: Path, effect: Effect) -> None:
        draft = self._folder / f".{place.stem}.{secrets.token_hex(8)}"
        try:
            with draft.open("x", encoding="utf-8") as file:
                file.write(json.dumps(vars(effect)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, place)
            except FileExistsError:
                return  # another attempt of the same step was first: its entry is the effect
            _flush_folder(self._folder)
        finally:
            draft.unlink(missing_ok=True)


def _file_key(effect: Effect) -> str:
    return hashlib.sha256(json.dumps([effect.tenant_id, effect.step_key]).encode()).hexdigest()


def _load(place: Path) -> Effect:
    try:
        return Effect(**json.loads(place.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise PluginFatalError(f"the journal entry {place.name} is damaged: {error}") from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
