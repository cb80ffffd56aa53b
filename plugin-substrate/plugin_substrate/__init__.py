"""Plugins as isolated worker processes, and the queue that orders their work on one machine."""

from __future__ import annotations

from plugin_substrate.errors import (
    CallNotStartedError,
    ErrorCategory,
    JobError,
    ManifestError,
    PluginCancelledError,
    PluginConfigError,
    PluginConfinementError,
    PluginDisabledError,
    PluginError,
    PluginFatalError,
    PluginInputError,
    PluginLoadError,
    PluginNotLoadedError,
    PluginResourceError,
    PluginTimeoutError,
    PluginTransientError,
    ProtocolError,
    ResourceShortfall,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.instance import CancelOutcome
from plugin_substrate.interface import (
    CallContext,
    InputFile,
    OutputFile,
    PluginInterface,
    collect_plugin_actions,
    plugin_action,
)
from plugin_substrate.manager import PluginManager
from plugin_substrate.manifest import ManifestV2, load_manifest, write_manifest
from plugin_substrate.metadata import CallResult, PluginInstance, PluginMeta, RejectedManifest
from plugin_substrate.queue import Job, JobEvent, JobEventType, JobQueue, JobStatus, QueueStats
from plugin_substrate.worker.isolation import IsolationProfile, IsolationTerms

__all__ = [
    "CallContext",
    "CallNotStartedError",
    "CallResult",
    "CancelOutcome",
    "ErrorCategory",
    "InputFile",
    "IsolationProfile",
    "IsolationTerms",
    "Job",
    "JobError",
    "JobEvent",
    "JobEventType",
    "JobQueue",
    "JobStatus",
    "ManifestError",
    "ManifestV2",
    "OutputFile",
    "PluginCancelledError",
    "PluginConfigError",
    "PluginConfinementError",
    "PluginDisabledError",
    "PluginError",
    "PluginFatalError",
    "PluginInputError",
    "PluginInstance",
    "PluginInterface",
    "PluginLoadError",
    "PluginManager",
    "PluginMeta",
    "PluginNotLoadedError",
    "PluginResourceError",
    "PluginTimeoutError",
    "PluginTransientError",
    "ProtocolError",
    "QueueStats",
    "RejectedManifest",
    "ResourceShortfall",
    "WireValueError",
    "WorkerDiedError",
    "collect_plugin_actions",
    "load_manifest",
    "plugin_action",
    "write_manifest",
]
