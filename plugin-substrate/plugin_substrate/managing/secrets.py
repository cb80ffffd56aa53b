"""Verbs about the variables of workers. Whether one is set can be asked, what it is set to never."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from plugin_substrate.errors import PluginError
from plugin_substrate.interface import EnvVarSpec
from plugin_substrate.managing.state import ManagerState
from plugin_substrate.metadata import PluginMeta

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerEnvStatus:
    """A declared variable, and where its value comes from: ``secret``, ``manifest``, ``default`` or, unset, nowhere."""

    spec: EnvVarSpec
    source: str

    @property
    def is_set(self) -> bool:
        """Whether the worker finds a value."""
        return bool(self.source)


class SecretVerbs(ManagerState):
    """What workers find in their environment."""

    async def set_plugin_secret_async(
        self, name: str, key: str, value: str, *, scope: str | None = None, reload: bool = True
    ) -> None:
        """Keep a secret of a plugin, named by itself or an instance, and replace the workers of all its instances.

        Every instance is tried; the first error of a worker that did not come up again is raised at the end. A secret
        of the default scope reaches every worker; one whose scope is a tenant's id takes its place in the workers of
        that tenant, and reaches no other, nor one that all tenants share.
        """
        self._home.adopt()
        meta = self._meta_of(name)
        if key not in {spec.name for spec in meta.worker_env if spec.secret}:
            _logger.warning("plugin %s declares no secret %s, so its workers will not find it", meta.name, key)
        await asyncio.to_thread(self._secret_store.set_secret, meta.name, key, value, scope)
        if not reload:
            return
        failed: list[PluginError] = []
        for instance in self._instances.all():
            if instance.settings.meta.name == meta.name:
                try:
                    await instance.restart()
                except PluginError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    def set_plugin_secret(
        self, name: str, key: str, value: str, *, scope: str | None = None, reload: bool = True
    ) -> None:
        """Like `set_plugin_secret_async`, synchronously."""
        self._home.run(lambda: self.set_plugin_secret_async(name, key, value, scope=scope, reload=reload))

    def get_worker_env_status(self, name: str) -> list[WorkerEnvStatus]:
        """Return each variable that a plugin declares and where its value comes from, never the value."""
        meta = self._meta_of(name)
        kept = set(self._secret_store.list_keys(meta.name)) if any(spec.secret for spec in meta.worker_env) else set()
        return [WorkerEnvStatus(spec=spec, source=_source(spec, meta, kept)) for spec in meta.worker_env]

    def missing_required_env(self, name: str) -> list[str]:
        """Return the names of the required variables that are not set."""
        found = self.get_worker_env_status(name)
        return [status.spec.name for status in found if status.spec.required and not status.is_set]

    def _warn_of_missing_env(self, meta: PluginMeta) -> None:
        kept = set(self._secret_store.list_keys(meta.name)) if any(spec.secret for spec in meta.worker_env) else set()
        missing = [spec.name for spec in meta.worker_env if spec.required and not _source(spec, meta, kept)]
        if missing:
            _logger.warning(
                "plugin %s lacks %s; `cjm-ctl set-secret %s NAME` keeps a secret",
                meta.name,
                ", ".join(missing),
                meta.name,
            )

    def _worker_env(self, meta: PluginMeta, tenant_id: str) -> dict[str, str]:
        """Return what a worker finds: defaults, over them the manifest's variables, over those secrets."""
        defaults = {spec.name: spec.default for spec in meta.worker_env if spec.default is not None}
        found = {**defaults, **meta.manifest.install.env_vars}
        for spec in meta.worker_env:
            for scope in (None, tenant_id or None) if spec.secret else ():
                value = self._secret_store.get_secret(meta.name, spec.name, scope)
                if value is not None:
                    found[spec.name] = value
        return found


def _source(spec: EnvVarSpec, meta: PluginMeta, kept: set[str]) -> str:
    if spec.secret and spec.name in kept:
        return "secret"
    if spec.name in meta.manifest.install.env_vars:
        return "manifest"
    return "default" if spec.default is not None else ""
