"""Verbs that find: the plugins of this host, by name and by what they are for, and the instances of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from plugin_substrate.discovery import find_manifests
from plugin_substrate.managing.state import ManagerState
from plugin_substrate.metadata import PluginInstance, PluginMeta, RejectedManifest
from plugin_substrate.platform import is_compatible

_logger = logging.getLogger(__name__)


class FindingVerbs(ManagerState):
    """What is there."""

    def discover_manifests(self) -> list[PluginMeta]:
        """Read the manifest folders anew and return the plugins found; what is wrong is in `rejected_manifests`."""
        found, rejected = find_manifests(self._folders)
        self._discovered = {meta.name: meta for meta in found}
        self._rejected = tuple(rejected)
        for bad in rejected:
            _logger.error("manifest %s is not used: %s", bad.path, bad.reason)
        return found

    def look_for_new(self) -> list[PluginMeta]:
        """Read the manifest folders and return plugins of names that are not discovered; takes in none."""
        found, _ = find_manifests(self._folders)
        return [meta for meta in found if meta.name not in self._discovered]

    def add_discovered(self, found: Iterable[PluginMeta]) -> None:
        """Take in what `look_for_new` found. A plugin that is discovered already stays as it was found."""
        self._discovered = {**{meta.name: meta for meta in found}, **self._discovered}

    @property
    def rejected_manifests(self) -> tuple[RejectedManifest, ...]:
        """The manifests the last discovery did not take, each with its reason."""
        return self._rejected

    def get_discovered_meta(self, name: str) -> PluginMeta | None:
        """Return what the last discovery found under a name."""
        return self._discovered.get(name)

    def get_by_role(self, role: str) -> list[PluginMeta]:
        """Return the discovered plugins of a role."""
        return self._those(lambda meta: meta.taxonomy.role == role)

    def get_by_domain(self, domain: str) -> list[PluginMeta]:
        """Return the discovered plugins of a domain."""
        return self._those(lambda meta: meta.taxonomy.domain == domain)

    def get_by_category(self, category: str) -> list[PluginMeta]:
        """Return the discovered plugins that stand under a heading."""
        return self._those(lambda meta: meta.category == category)

    def get_canonical(self, role: str) -> PluginMeta | None:
        """Return the one discovered plugin of a role; None when there is none, or, with a warning, several."""
        found = self.get_by_role(role)
        if len(found) > 1:
            names = ", ".join(meta.name for meta in found)
            _logger.warning("role %s has no canonical plugin: there are %s", role, names)
        return found[0] if len(found) == 1 else None

    def get_compatible_for_current_platform(self) -> list[PluginMeta]:
        """Return the discovered plugins that run on this platform; one that lists none runs on all."""
        return self._those(lambda meta: is_compatible(meta.resources.platforms))

    def get_plugin_meta(self, name: str) -> PluginMeta | None:
        """Return a plugin, by its name or that of an instance, with how that instance stands; None when unknown."""
        if name in self._instances:
            instance = self._instances.get(name)
            view = instance.view()
            return replace(
                instance.settings.meta,
                instance=view,
                enabled=view.enabled,
                last_executed=view.last_executed,
                config_schema_drift=instance.live_config_schema is not None,
                live_config_schema=instance.live_config_schema,
            )
        return self._discovered.get(name)

    def list_plugins(self) -> list[PluginMeta]:
        """Return the plugins of which something is loaded, each once, as `get_plugin_meta` does."""
        found: dict[str, PluginMeta] = {}
        for instance in self._instances.all():
            name = instance.settings.meta.name
            found[name] = self.get_plugin_meta(name) or instance.settings.meta
        return list(found.values())

    def get_instance(self, instance_id: str) -> PluginInstance:
        """Return an instance as it stands; a `PluginNotLoadedError` when there is none."""
        return self._instances.get(instance_id).view()

    def list_instances(self, plugin_name: str | None = None) -> list[PluginInstance]:
        """Return the loaded instances, of one plugin or of all."""
        views = [instance.view() for instance in self._instances.all()]
        return [view for view in views if plugin_name in (None, view.plugin_name)]

    def _those(self, fits: Callable[[PluginMeta], bool]) -> list[PluginMeta]:
        return [meta for meta in self._discovered.values() if fits(meta)]
