"""Verbs about configurations: what one is, may be and shall be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from plugin_substrate.config_check import effective_config
from plugin_substrate.errors import PluginConfigError, PluginError
from plugin_substrate.instance import LoadedInstance
from plugin_substrate.interface import ConfigOption, FieldOptions
from plugin_substrate.managing.state import ManagerState
from plugin_substrate.manifest import compute_config_schema_hash
from plugin_substrate.metadata import PluginInstance, PluginMeta
from plugin_substrate.stores.config import PluginConfigRecord
from plugin_substrate.worker.text import clean_line

_QUESTION_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class ConfiguringVerbs(ManagerState):
    """What a configuration is, may be and shall be."""

    def get_plugin_config(self, instance_id: str) -> dict[str, Any]:
        """Return the whole configuration of an instance; a `PluginNotLoadedError` when there is none."""
        return dict(self._settings_of(instance_id).config)

    def get_all_plugin_configs(self) -> dict[str, dict[str, Any]]:
        """Return the configurations of all instances, by instance id."""
        return {instance.settings.instance_id: dict(instance.settings.config) for instance in self._instances.all()}

    def get_plugin_config_schema(self, name: str) -> dict[str, Any]:
        """Return the schema that configurations are checked against: the manifest's, ``{}`` when there is none."""
        return dict(self._meta_of(name).config_schema)

    async def get_config_options_async(self, instance_id: str) -> dict[str, FieldOptions]:
        """Return what settings may be at the moment, as the plugin says; empty, with a warning, when it cannot."""
        self._home.adopt()
        instance = self._instances.get(instance_id)
        try:
            async with asyncio.timeout(_QUESTION_SECONDS):
                answer = await instance.ask("config_options")
            return _options_of(answer)
        except (PluginError, TimeoutError, ValueError) as error:
            _logger.warning("the live options of %s cannot be had: %s", instance_id, clean_line(str(error), 500))
            return {}

    def get_config_options(self, instance_id: str) -> dict[str, FieldOptions]:
        """Like `get_config_options_async`, synchronously."""
        return self._home.run(lambda: self.get_config_options_async(instance_id))

    async def reconfigure_async(
        self, instance_id: str, config: Mapping[str, Any], *, strict: bool = True
    ) -> PluginInstance:
        """Have an instance take over a configuration, in the place of the whole one before it, until it is unloaded.

        Waits for running calls; later ones wait. A `PluginConfigError` tells what is wrong before anything is changed.
        When the plugin cannot take it over, its error is raised, its worker is replaced, and the old configuration
        stays.
        """
        self._home.adopt()
        instance = self._instances.get(instance_id)
        meta = instance.settings.meta
        await instance.reconfigure(await checked_config(meta, config, strict=strict))
        return instance.view()

    async def update_plugin_config_async(
        self, instance_id: str, config: Mapping[str, Any], *, strict: bool = True
    ) -> PluginInstance:
        """Like `reconfigure_async`, and keep it for later loads when this is the plugin's default instance."""
        view = await self.reconfigure_async(instance_id, config, strict=strict)
        instance = self._instances.get(instance_id)
        async with instance.keeping:
            await self._persist(instance, instance.switch.enabled)
        return view

    def update_plugin_config(self, instance_id: str, config: Mapping[str, Any], *, strict: bool = True) -> bool:
        """Update synchronously. A `PluginConfigError` is raised; any other failure is logged and is False."""
        try:
            self._home.run(lambda: self.update_plugin_config_async(instance_id, config, strict=strict))
        except PluginConfigError:
            raise
        except PluginError:
            _logger.exception("the configuration of %s could not be updated", instance_id)
            return False
        return True

    def reconfigure(self, instance_id: str, config: Mapping[str, Any], *, strict: bool = True) -> PluginInstance:
        """Like `reconfigure_async`, synchronously."""
        return self._home.run(lambda: self.reconfigure_async(instance_id, config, strict=strict))

    async def _first_config(
        self, meta: PluginMeta, config: Mapping[str, Any] | None, *, strict: bool, default_instance: bool
    ) -> tuple[dict[str, Any], bool]:
        """Return what to load with, and whether enabled: the caller's, else the kept one, else the defaults.

        A setting that is kept and that the plugin no longer has must not keep it from being loaded.
        """
        kept = await asyncio.to_thread(self._config_store.get, meta.name) if default_instance else None
        if not config and kept is not None:
            config, strict = kept.config, False
        whole = await checked_config(meta, config or {}, strict=strict)
        return whole, kept.enabled if kept is not None else True

    async def _persist(self, instance: LoadedInstance, enabled: bool) -> None:
        """Keep how a default instance is configured, and whether enabled, while its ``keeping`` is held."""
        settings = instance.settings
        if settings.instance_id == settings.meta.name:
            record = PluginConfigRecord(plugin_name=settings.meta.name, config=settings.config, enabled=enabled)
            await asyncio.to_thread(self._config_store.set, record)

    async def _note_drift(self, instance: LoadedInstance) -> None:
        """Compare the code's schema with the one of its manifest, which stays the one that counts."""
        settings = instance.settings
        manifest = settings.meta.manifest
        if not self._drift_detection:
            return
        try:
            async with asyncio.timeout(_QUESTION_SECONDS):
                live = await instance.ask("config_schema")
            found = compute_config_schema_hash(live)
        except (PluginError, TimeoutError, TypeError, ValueError) as error:
            _logger.info("the live schema of %s cannot be had: %s", settings.meta.name, clean_line(str(error), 500))
            return
        written = manifest.drift_tracking.config_schema_hash or compute_config_schema_hash(manifest.code.config_schema)
        if found == written:
            return
        instance.live_config_schema = live
        _logger.warning(
            "the configuration schema of plugin %s is not the one of its manifest, which stays in force; "
            "`cjm-ctl regenerate-manifest %s` takes the new one over",
            settings.meta.name,
            settings.meta.name,
        )


async def checked_config(meta: PluginMeta, config: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Check a configuration beside the event loop: a schema that is foreign may take seconds."""
    if not meta.config_schema:
        return effective_config(meta.name, {}, config)
    return await asyncio.to_thread(effective_config, meta.name, meta.config_schema, config, strict=strict)


def _options_of(answer: object) -> dict[str, FieldOptions]:
    """Read what a plugin answered; a ValueError when it has another form."""
    match answer:
        case dict():
            return {str(name): _field_options(entry) for name, entry in answer.items()}
    raise ValueError(f"the answer is {type(answer).__name__}, not an object")


def _field_options(entry: object) -> FieldOptions:
    match entry:
        case {"options": list() as options, "constraints": dict() as constraints}:
            return FieldOptions([_option(option) for option in options], constraints)
    raise ValueError("a field's options have another form")


def _option(option: object) -> ConfigOption:
    match option:
        case {"value": value, "label": str() as label, "metadata": dict() as metadata}:
            return ConfigOption(value, clean_line(label), metadata)
    raise ValueError("an option has another form")
