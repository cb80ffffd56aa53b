"""Verbs that bring instances and take them away."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from plugin_substrate.concurrent_loading import result_keys, run_concurrently
from plugin_substrate.errors import PluginError
from plugin_substrate.managing.configuring import ConfiguringVerbs, checked_config
from plugin_substrate.managing.finding import FindingVerbs
from plugin_substrate.managing.secrets import SecretVerbs
from plugin_substrate.manifest import NAME_PATTERN
from plugin_substrate.metadata import PluginInstance, PluginLoadSpec, PluginMeta
from plugin_substrate.stores.files import PASSAGE, private_folder
from plugin_substrate.tenant_worker import InstanceSettings

_logger = logging.getLogger(__name__)

_SUFFIX_CHARACTERS = len("-123abc")


class LoadingVerbs(FindingVerbs, ConfiguringVerbs, SecretVerbs):
    """Bring instances and take them away."""

    async def load_plugin_async(
        self,
        meta: PluginMeta,
        config: Mapping[str, Any] | None = None,
        *,
        strict: bool = True,
        instance_id: str | None = None,
        new_instance: bool = False,
        max_concurrent_requests: int = 1,
        tenant_id: str = "",
    ) -> PluginInstance:
        """Start a worker and initialise the plugin in it; an id that is loaded already is returned as it is.

        The id is ``instance_id``, or a new one of the plugin's name and six hexadecimal digits, or else the plugin's
        name: its default instance. Without a configuration that one takes the one kept by `update_plugin_config`, and
        is enabled or disabled as it was left.

        Concurrent loads of one id give one worker. A `PluginConfigError` is found before anything is started; a
        `PluginLoadError` names plugin, phase and last log lines, and leaves no process (a `PluginConfinementError`: for
        want of a required layer); a `PluginNotLoadedError` tells that it was unloaded meanwhile. Cancelling the
        awaiting task does not stop the load.

        The worker that is started is the one of ``tenant_id``; every other tenant's starts at its first call.
        """
        self._home.adopt()
        chosen = self._choose_id(meta, instance_id, new_instance)
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, not {max_concurrent_requests}")
        if chosen in self._instances:
            return self.get_instance(chosen)

        async def prepare() -> InstanceSettings:
            default_instance = chosen == meta.name
            whole, enabled = await self._first_config(meta, config, strict=strict, default_instance=default_instance)
            self._warn_of_missing_env(meta)
            return self._settings(chosen, meta, whole, enabled=enabled, max_concurrent_requests=max_concurrent_requests)

        await self._instances.load(chosen, prepare, tenant_id)
        await self._note_drift(self._instances.get(chosen))
        return self.get_instance(chosen)

    def load_plugin(
        self,
        meta: PluginMeta,
        config: Mapping[str, Any] | None = None,
        *,
        strict: bool = True,
        instance_id: str | None = None,
        new_instance: bool = False,
        max_concurrent_requests: int = 1,
    ) -> bool:
        """Load synchronously; a failure is logged and is False. A wrong ``instance_id`` is a ValueError."""
        try:
            self._home.run(
                lambda: self.load_plugin_async(
                    meta,
                    config,
                    strict=strict,
                    instance_id=instance_id,
                    new_instance=new_instance,
                    max_concurrent_requests=max_concurrent_requests,
                )
            )
        except PluginError:
            _logger.exception("plugin %s could not be loaded", meta.name)
            return False
        return True

    async def load_plugins_concurrent(
        self, specs: Sequence[PluginLoadSpec], *, max_concurrency: int | None = None, fail_fast: bool = False
    ) -> dict[str, str | Exception]:
        """Load side by side; return the instance id or the error of each under its `result_keys`.

        With ``fail_fast`` nothing is begun after the first error. Two specs of one instance are a ValueError.
        """
        self._home.adopt()
        work = {key: partial(self._load_spec, spec) for key, spec in zip(result_keys(specs), specs, strict=True)}
        return await run_concurrently(work, max_concurrency=max_concurrency, fail_fast=fail_fast)

    async def unload_plugins_concurrent(
        self, instance_ids: Sequence[str], *, max_concurrency: int | None = None, fail_fast: bool = False
    ) -> dict[str, bool | Exception]:
        """Unload side by side; return under each id whether it was loaded, or the error."""
        self._home.adopt()
        work = {instance_id: partial(self.unload_plugin_async, instance_id) for instance_id in instance_ids}
        return await run_concurrently(work, max_concurrency=max_concurrency, fail_fast=fail_fast)

    async def load_all_async(
        self, configs: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, PluginInstance | PluginError]:
        """Load every discovered plugin, by name; one that fails stands there with its error and stops no other."""
        loaded: dict[str, PluginInstance | PluginError] = {}
        for meta in list(self._discovered.values()):
            try:
                loaded[meta.name] = await self.load_plugin_async(meta, (configs or {}).get(meta.name))
            except PluginError as error:
                _logger.exception("plugin %s could not be loaded", meta.name)
                loaded[meta.name] = error
        return loaded

    def load_all(self, configs: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, bool]:
        """Load every discovered plugin and tell of each whether it is loaded."""
        loaded = self._home.run(lambda: self.load_all_async(configs))
        return {name: isinstance(found, PluginInstance) for name, found in loaded.items()}

    async def reload_plugin_async(
        self, instance_id: str, config: Mapping[str, Any] | None = None, *, strict: bool = True
    ) -> PluginInstance:
        """Replace the workers of an instance, dead or alive, with another configuration if one is given.

        Everything else about it stays, whether it is enabled and how many calls it takes included. Calls still running
        lose their worker after the grace. A wrong configuration is a `PluginConfigError` and changes nothing; when the
        new worker does not come up, a `PluginLoadError` says why, and the next call starts one as it was before.
        """
        self._home.adopt()
        instance = self._instances.get(instance_id)
        if config is not None:
            config = await checked_config(instance.settings.meta, config, strict=strict)
        await instance.restart(config)
        return instance.view()

    def reload_plugin(self, instance_id: str, config: Mapping[str, Any] | None = None, *, strict: bool = True) -> bool:
        """Reload synchronously; a failure is logged and is False."""
        try:
            self._home.run(lambda: self.reload_plugin_async(instance_id, config, strict=strict))
        except PluginError:
            _logger.exception("%s could not be reloaded", instance_id)
            return False
        return True

    async def unload_plugin_async(self, instance_id: str) -> bool:
        """Unload; False when nothing has this id. Calls still running lose their worker after the grace.

        A load in progress is given up. Cancelling the awaiting task does not stop the unloading.
        """
        self._home.adopt()
        return await self._instances.unload(instance_id)

    def unload_plugin(self, instance_id: str) -> bool:
        """Unload synchronously; False when nothing has this id."""
        return self._home.run(lambda: self.unload_plugin_async(instance_id))

    async def unload_all_async(self) -> None:
        """Unload everything; when this returns no process of any plugin is left."""
        self._home.adopt()
        await self._instances.unload_all()
        self._home.release()

    def unload_all(self) -> None:
        """Unload everything, synchronously."""
        self._home.run(self._instances.unload_all)
        self._home.release()

    def _settings(
        self,
        instance_id: str,
        meta: PluginMeta,
        config: Mapping[str, Any],
        *,
        enabled: bool,
        max_concurrent_requests: int,
    ) -> InstanceSettings:
        isolation = meta.manifest.isolation_profile(self._isolation)
        if self._models_dir is not None:
            isolation = replace(isolation, read_paths=(*isolation.read_paths, str(self._models_dir)))
        if self._keeps_files:
            private_folder(
                self._data_dir, PASSAGE
            )  # before a worker starts, so that its user does not lose its way in later
        return InstanceSettings(
            instance_id=instance_id,
            meta=meta,
            config=config,
            data_dir=self._data_dir / "data" / meta.name,
            log_path=self._log_path(instance_id),
            worker_env=lambda tenant_id: self._worker_env(meta, tenant_id),
            enabled=enabled,
            max_concurrent_requests=max_concurrent_requests,
            max_workers=self._max_tenant_workers,
            grace_seconds=self._grace_seconds,
            load_timeout=self._load_timeout,
            revive=self._revive,
            isolation=isolation,
            required_layers=(*self._require, *meta.manifest.required_layers),
            models_dir=self._models_dir,
        )

    async def _load_spec(self, spec: PluginLoadSpec) -> str:
        loaded = await self.load_plugin_async(
            spec.meta,
            spec.config,
            instance_id=spec.instance_id,
            new_instance=spec.new_instance,
            max_concurrent_requests=spec.max_concurrent_requests,
        )
        return loaded.instance_id

    def _choose_id(self, meta: PluginMeta, instance_id: str | None, new_instance: bool) -> str:
        if instance_id is not None:
            if not NAME_PATTERN.fullmatch(instance_id):
                raise ValueError(f"instance_id must be 1 to 64 letters, digits, - or _, not {instance_id!r:.80}")
            return instance_id
        if not new_instance:
            return meta.name
        while True:
            chosen = f"{meta.name[: 64 - _SUFFIX_CHARACTERS]}-{secrets.token_hex(3)}"
            if chosen not in self._instances:
                return chosen
