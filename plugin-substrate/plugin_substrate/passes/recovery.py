"""Makes a tree whole that a host was killed over, in whichever way its plugin worked on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from plugin_substrate.passes.backup_record import BackupRecord
from plugin_substrate.passes.carry_over import CarryOverError, undo_unfinished
from plugin_substrate.passes.in_place import ProtectedBackup
from plugin_substrate.passes.work_folder import folders_of_killed_hosts, protected_in, replaced_beside
from plugin_substrate.removal import remove_tree
from plugin_substrate.sweep import start_of, sweep_dead_hosts

__all__ = ["recover"]

_SECONDS_TO_DIE = 10.0
_MOST_TOLD = 20
_logger = logging.getLogger(__name__)


def recover(root: Path, work_dir: Path | None = None) -> bool:
    """Make a tree what it was before a host was killed over it, as far as it can be.

    What it was carrying over is taken back, and where a plugin worked in place, what is protected is put back. Every
    pass does this before it looks at its tree. ``work_dir`` is that of the killed host. Tells whether there was
    anything to be done. A `CarryOverError` says what somebody has to look at, and that another pass is at work; any
    other OSError what could not be put back.
    """
    put_back = _put_protected_back(root, work_dir)
    return undo_unfinished(root) or put_back


def _put_protected_back(root: Path, work_dir: Path | None) -> bool:
    found = False
    for store, record in _backups_of(root, work_dir):
        _wait_until_its_plugin_is_dead(record)
        _put_back(root, store, record)
        record.discard(store)
        found = True
    return found


def _backups_of(root: Path, work_dir: Path | None) -> Iterator[tuple[Path, BackupRecord]]:
    for folder in folders_of_killed_hosts(work_dir):
        for store in protected_in(folder):
            record = BackupRecord.read(store)
            if record is not None and record.is_of(root):
                yield store, record


def _wait_until_its_plugin_is_dead(record: BackupRecord) -> None:
    """A supervisor outlives its host until everything below it is dead; only then nothing undoes what we do."""
    sweep_dead_hosts()
    pid, started = record.supervisor
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while started and start_of(pid) == started:
        if time.monotonic() > deadline:
            raise CarryOverError(f"process {pid}, whose host was killed over this tree, is still at work on it")
        time.sleep(0.01)


def _put_back(root: Path, store: Path, record: BackupRecord) -> None:
    """Put back what differs, but keep what stood there: somebody may have changed it since the kill."""
    backup = ProtectedBackup.found(root, store, record)
    try:
        changed: list[str] = []
        try:
            changed = backup.changed()
            if changed:
                _keep(root, replaced_beside(store), record)
        except OSError:  # a plugin can make what nobody can read, and then it is not kept
            _logger.warning("what stood at protected paths cannot be kept", exc_info=True, extra={"tree": record.tree})
        backup.restore()
    finally:
        backup.close()
    if changed:
        told = {"tree": record.tree, "paths": changed[:_MOST_TOLD], "kept_in": str(replaced_beside(store))}
        _logger.warning("protected paths were changed under a host that was killed, and are put back", extra=told)


def _keep(root: Path, place: Path, record: BackupRecord) -> None:
    """Copy what stands at protected paths now, unless an earlier try got so far."""
    if BackupRecord.read(place) is None:
        remove_tree(place)
        place.mkdir(mode=0o700)
        ProtectedBackup.make(
            root, place, protected=record.protected, depth=record.depth, supervisor=record.supervisor
        ).close()
