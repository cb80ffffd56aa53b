"""The sections of a manifest, as they stand in its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class InstallSection:
    """Where the plugin lives on this machine: facts of the installer.

    ``source_paths`` are folders outside the environment that its code is read from: editable installations.
    """

    python_path: str
    conda_env: str = ""
    db_path: str = ""
    package_source: str = ""
    installer_version: str = ""
    installed_at: str = ""
    env_vars: dict[str, str] = field(default_factory=dict)
    source_paths: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CodeSection:
    """What the plugin says about itself in its ``meta`` module.

    ``preload`` asks for a template process that imports ``module`` once for all workers of a tenant.
    """

    name: str
    version: str
    description: str
    module: str
    class_name: str
    interface: str
    idempotent: bool = False
    stateless: bool = False
    preload: bool = False
    capabilities: tuple[str, ...] = ()
    taxonomy: dict[str, Any] | None = None
    resources: dict[str, Any] | None = None
    config_schema: dict[str, Any] | None = None
    worker_env: tuple[dict[str, Any], ...] = ()
    isolation: dict[str, Any] | None = None
    regenerated_at: str = ""


@dataclass(frozen=True, kw_only=True)
class DriftSection:
    """What the schema was when the manifest was written."""

    config_schema_hash: str | None = None
