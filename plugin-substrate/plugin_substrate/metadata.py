"""What the host knows about plugins: those it found, and those it loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from plugin_substrate.declarations import (
    PluginTaxonomy,
    parse_taxonomy,
    parse_worker_env,
)
from plugin_substrate.hashing import hash_dict_canonical
from plugin_substrate.interface import EnvVarSpec
from plugin_substrate.manifest import ManifestV2
from plugin_substrate.requirements import ResourceRequirements


@dataclass(frozen=True, kw_only=True)
class PluginMeta:
    """A plugin that was found: its manifest and where that lies.

    The rest is of its default instance, when a manager was asked for it: ``instance`` is None when none is loaded,
    ``config_schema_drift`` tells that the code's schema is no longer the manifest's, and ``live_config_schema`` is then
    the code's. What configurations are checked against stays the manifest's.
    """

    manifest: ManifestV2
    source: Path | None = None
    instance: PluginInstance | None = None
    enabled: bool = True
    last_executed: datetime | None = None
    config_schema_drift: bool = False
    live_config_schema: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The name, unique among the plugins of a host."""
        return self.manifest.code.name

    @property
    def version(self) -> str:
        """The plugin's own version."""
        return self.manifest.code.version

    @property
    def description(self) -> str:
        """One line for people."""
        return self.manifest.code.description

    @property
    def interface(self) -> str:
        """The dotted name of the class it implements."""
        return self.manifest.code.interface

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The operations it serves through ``execute(action=...)``."""
        return self.manifest.code.capabilities

    @property
    def idempotent(self) -> bool:
        """Whether a call may be repeated under the same step key."""
        return self.manifest.code.idempotent

    @property
    def stateless(self) -> bool:
        """Whether one worker may serve several tenants: the plugin says so, and the operator does not object."""
        return self.manifest.code.stateless and bool(self.manifest.overrides.get("stateless", True))

    @property
    def preload(self) -> bool:
        """Whether its workers are copies of a template: the plugin asks for it, and the operator does not object."""
        return self.manifest.preload

    @property
    def resources(self) -> ResourceRequirements:
        """What it needs of the machine."""
        return self.manifest.resources

    @property
    def config_schema(self) -> Mapping[str, Any]:
        """The JSON Schema of its configuration, empty when there is none."""
        return self.manifest.code.config_schema or {}

    @property
    def taxonomy(self) -> PluginTaxonomy:
        """Where it belongs."""
        return parse_taxonomy(self.manifest.code.taxonomy or {}, "code.taxonomy", [])

    @property
    def worker_env(self) -> tuple[EnvVarSpec, ...]:
        """The variables its worker reads."""
        return parse_worker_env(self.manifest.code.worker_env, "code.worker_env", [])

    @property
    def plain_env(self) -> dict[str, str]:
        """The variables of its workers that are no secrets: declared defaults, and over them the manifest's."""
        declared = self.worker_env
        secret = {spec.name for spec in declared if spec.secret}
        defaults = {spec.name: spec.default for spec in declared if spec.default is not None}
        found = {**defaults, **self.manifest.install.env_vars}
        return {name: value for name, value in found.items() if name not in secret}

    @property
    def category(self) -> str:
        """The heading it stands under: the operator's word, else the domain's label."""
        return str(self.manifest.overrides.get("category_override") or self.taxonomy.label)


@dataclass(frozen=True, kw_only=True)
class PluginLoadSpec:
    """One plugin among several to load: as `PluginManager.load_plugin_async` takes it."""

    meta: PluginMeta
    config: Mapping[str, Any] | None = None
    instance_id: str | None = None
    new_instance: bool = False
    max_concurrent_requests: int = 1


@dataclass(frozen=True, kw_only=True)
class RejectedManifest:
    """A manifest that discovery did not take, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """One worker of an instance at one moment: ``layers`` names the confinement it reported as in force.

    ``shared`` tells that it serves all tenants, as the plugin is stateless; an empty ``tenant_id`` then means nothing,
    and else the calls without a tenant.
    """

    tenant_id: str
    shared: bool
    alive: bool
    pid: int | None
    supervisor_pid: int | None
    running_calls: int
    python_version: str
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PluginInstance:
    """A loaded plugin at one moment, with its ``workers``, the one used last first.

    ``pid``, ``supervisor_pid``, ``python_version`` and ``layers`` are those of the first. ``max_concurrent_requests``
    counts the calls that one worker takes at a time. ``config`` is the whole configuration, defaults included.
    """

    instance_id: str
    plugin_name: str
    plugin_version: str
    config: Mapping[str, Any]
    enabled: bool
    created_at: datetime
    last_executed: datetime | None
    max_concurrent_requests: int
    running_calls: int
    alive: bool
    pid: int | None
    supervisor_pid: int | None
    python_version: str
    layers: tuple[str, ...]
    stateless: bool = False
    idempotent: bool = False
    resources: ResourceRequirements = field(default_factory=ResourceRequirements)
    workers: tuple[WorkerView, ...] = ()

    @property
    def config_hash(self) -> str:
        """The digest of the configuration."""
        return hash_dict_canonical(self.config)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTerms:
    """What a queue of calls must know of an instance: of all that a `PluginInstance` tells, what costs nothing."""

    instance_id: str
    plugin_name: str
    enabled: bool
    stateless: bool
    idempotent: bool
    resources: ResourceRequirements


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """What a call gave: the value, the last usage it reported, and the last lines it logged."""

    value: Any
    usage: Mapping[str, float] = field(default_factory=dict)
    logs: tuple[str, ...] = ()
    duration_seconds: float = 0.0
