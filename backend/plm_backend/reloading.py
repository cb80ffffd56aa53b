"""The files of a node are read anew while it works: what they say replaces what was in force, or nothing does."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.identity.audit import AuditError, reload_record
from plm_engine_core.control_plane.registry import CapabilityRegistry, RegistryChanges
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import PluginMeta

from plm_backend.errors import SetupError
from plm_backend.operator_files import OperatorFiles, read_files
from plm_backend.plugin_promises import check_capabilities
from plm_backend.stopping import ReloadRequest
from plm_backend.wiring import Platform

logger = logging.getLogger(__name__)


class Reloading:
    """Reads the files of one node anew, with every check that is made when it starts.

    `manager` is that of the node's plugins, where it has a run worker.
    """

    def __init__(self, platform: Platform, manager: PluginManager | None) -> None:
        self._platform = platform
        self._manager = manager

    async def on(self, request: ReloadRequest) -> None:
        """Reload each time that is asked for, until cancelled."""
        while True:
            await request.wait()
            await self.reload(by="SIGHUP")

    async def reload(self, *, by: str) -> RegistryChanges | None:
        """Put what the files say now in force, and answer what is different; None where it was refused.

        It never raises for what stands in the files: what was in force stays, and the log and the audit log say why.
        `by` is what asked for it.
        """
        platform, source = self._platform, str(self._platform.settings.capabilities)
        try:
            files, found = await asyncio.to_thread(self._read)
            made = await platform.control_plane.reload(files.registry, record=partial(self._record, by))
            platform.agents.replace(files.agents)  # nothing was awaited since the capabilities were exchanged
            if self._manager is not None:
                self._manager.add_discovered(found)
        except (ControlPlaneError, SetupError, AuditError, OSError) as error:
            await self._refused(by, str(error))
            return None
        except Exception as error:
            logger.exception("%s could not be read anew", source)
            await self._refused(by, f"{type(error).__name__}: {error}")
            return None
        logger.info("%s was read anew, as %s asked: %s", source, by, made)
        return made

    def _read(self) -> tuple[OperatorFiles, Sequence[PluginMeta]]:
        """What the files say now, checked as at the start, and plugins installed since; nothing is in force yet.

        Raises:
            InvalidRequest, SetupError: naming the file and what is wrong with it.
        """
        files, manager = read_files(self._platform.settings), self._manager
        if manager is None:
            return files, ()
        found = self._installed_since(manager, files.registry)
        new = {meta.name: meta for meta in found}
        # Of a plugin that is known, what was found at first counts: its workers may run that.
        check_capabilities(files.registry, lambda name: manager.get_discovered_meta(name) or new.get(name))
        return files, found

    def _installed_since(self, manager: PluginManager, registry: CapabilityRegistry) -> Sequence[PluginMeta]:
        if all(manager.get_discovered_meta(each.plugin) is not None for each in registry):
            return ()
        return manager.look_for_new()

    async def _record(self, by: str, made: RegistryChanges) -> None:
        """Write down what is about to be exchanged; where audit records are required, nothing is without.

        Raises:
            AuditError: it could not be written.
        """
        try:
            await self._write({"outcome": "reloaded", "by": by, "changes": made.to_json()})
        except AuditError as error:
            if self._platform.settings.audit_required:
                raise
            logger.error("a reload is not in the audit log: %s", error)  # noqa: TRY400  # the message says it all

    async def _refused(self, by: str, why: str) -> None:
        source = self._platform.settings.capabilities
        logger.error("%s was not read anew, what was in force stays: %s", source, why)
        try:
            await self._write({"outcome": "refused", "by": by, "message": why})
        except AuditError as error:
            logger.error("a refused reload is not in the audit log: %s", error)  # noqa: TRY400  # as above

    async def _write(self, facts: Mapping[str, Any]) -> None:
        where = {"node": f"{socket.gethostname()}/{os.getpid()}", "file": str(self._platform.settings.capabilities)}
        await self._platform.audit.write(reload_record({**where, **facts}))
