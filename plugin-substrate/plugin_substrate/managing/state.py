"""What the verbs of a manager share."""

from __future__ import annotations

from pathlib import Path

from plugin_substrate.errors import PluginNotLoadedError
from plugin_substrate.home_loop import HomeLoop
from plugin_substrate.instances import InstanceTable
from plugin_substrate.manifest import NAME_PATTERN
from plugin_substrate.metadata import PluginMeta, RejectedManifest
from plugin_substrate.recorder import EmpiricalRecorder
from plugin_substrate.revival import Revival
from plugin_substrate.stores.config import PluginConfigStore
from plugin_substrate.stores.secret import SecretStore
from plugin_substrate.tenant_worker import InstanceSettings
from plugin_substrate.worker.isolation import IsolationProfile


class ManagerState:
    """The parts of a manager; `PluginManager` fills them."""

    _data_dir: Path
    _folders: list[Path]
    _home: HomeLoop
    _instances: InstanceTable
    _keeps_files: bool
    _discovered: dict[str, PluginMeta]
    _rejected: tuple[RejectedManifest, ...]
    _config_store: PluginConfigStore
    _secret_store: SecretStore
    _drift_detection: bool
    _grace_seconds: float
    _isolation: IsolationProfile
    _load_timeout: float
    _max_tenant_workers: int
    _models_dir: Path | None
    _recorder: EmpiricalRecorder | None
    _require: tuple[str, ...]
    _revive: Revival
    _prefetch_stall_seconds: float

    def _settings_of(self, instance_id: str) -> InstanceSettings:
        return self._instances.get(instance_id).settings

    def _meta_of(self, name: str) -> PluginMeta:
        """Return the plugin of a loaded instance, else the discovered one; a `PluginNotLoadedError` for neither."""
        if name in self._instances:
            return self._settings_of(name).meta
        for instance in self._instances.all():
            if instance.settings.meta.name == name:
                return instance.settings.meta
        if name in self._discovered:
            return self._discovered[name]
        raise PluginNotLoadedError(f"no plugin is loaded or discovered as {name!r}")

    def _log_path(self, instance_id: str) -> Path:
        if not NAME_PATTERN.fullmatch(instance_id):
            raise ValueError(f"instance_id must be 1 to 64 letters, digits, - or _, not {instance_id!r:.80}")
        return self._data_dir / "logs" / f"{instance_id}.log"
