"""What can go wrong with a plugin, as classes a caller can act on. Standard library only: plugins import it too.

    PluginError                     base; ``category`` and ``retriable`` say what a caller may do
    ├── PluginInputError            change the arguments (also a ValueError)
    │   ├── PluginConfigError       change the configuration
    │   └── PluginDisabledError     enable the plugin first
    ├── PluginTransientError        try again later
    │   ├── PluginTimeoutError      the work took too long
    │   ├── PluginCancelledError    somebody asked for the end
    │   └── WorkerDiedError         the worker process ended before it answered
    ├── PluginResourceError         free or add resources
    │   └── WorkerOOMError          the worker was ended for using too much memory
    ├── PluginFatalError            a fault in the plugin: report it to its author
    │   └── PluginLoadError         the plugin could not be started; names phase and last log lines
    │       └── PluginConfinementError  its worker holds less than the operator requires; names the missing layers
    ├── PluginNotLoadedError        load the plugin first
    ├── CallNotStartedError         whoever had to allow the call did not; nothing was sent
    ├── WireValueError              a value has no encoding; names its path (also a TypeError)
    ├── ProtocolError               the other side broke the frame protocol
    ├── ManifestError               a manifest breaks its rules; lists every violation (also a ValueError)
    └── StoreError                  a file the host keeps cannot be used; names it and the remedy

``outcome_known`` is the second question a caller asks. True: the call never left the host, or the plugin itself said
how it ended. False: the call was sent and nothing trustworthy came back, so its effect may or may not have happened.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from plugin_substrate.records import field, record

if TYPE_CHECKING:
    from datetime import datetime


class ErrorCategory(StrEnum):
    """What kind of remedy an error calls for."""

    USER_INPUT = "user_input"  #: change what was asked
    TRANSIENT = "transient"  #: the same request may succeed later
    RESOURCE = "resource"  #: it may succeed when more resources are free
    FATAL = "fatal"  #: it will not succeed until code or installation changes


@record()
class ResourceShortfall:
    """How much of which resource was missing."""

    resource: str
    needed: float
    available: float


class PluginError(Exception):
    """Base of every error of this package; subclasses add fields that cross the process border unchanged."""

    category: ErrorCategory = ErrorCategory.FATAL
    retriable_by_default: ClassVar[bool] = False
    wire_fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "", *, retriable: bool | None = None, outcome_known: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.retriable = self.retriable_by_default if retriable is None else retriable
        self.outcome_known = outcome_known
        self.original_exc_repr = ""
        self.remote_traceback = ""

    def __str__(self) -> str:
        return self.message

    def to_fields(self) -> dict[str, Any]:
        """Return the fields a frame carries, as JSON values."""
        return {name: getattr(self, name) for name in ("retriable", *self.wire_fields)}

    @classmethod
    def from_fields(cls, message: str, fields: Mapping[str, Any]) -> PluginError:
        """Build the error from a frame's fields; names this class does not know are ignored."""
        known = ("retriable", *cls.wire_fields)
        return cls(message, **{name: fields[name] for name in known if name in fields})


class PluginInputError(PluginError, ValueError):
    """The arguments are wrong; ``fields_invalid`` names them where the plugin could tell."""

    category = ErrorCategory.USER_INPUT
    retriable_by_default = True
    wire_fields: ClassVar[tuple[str, ...]] = ("fields_invalid",)

    def __init__(self, message: str = "", *, fields_invalid: Sequence[str] = (), **options: Any) -> None:
        super().__init__(message, **options)
        self.fields_invalid = tuple(str(name) for name in fields_invalid)


class PluginConfigError(PluginInputError):
    """A configuration is wrong; ``config_class`` names the dataclass it was meant for, where there is one."""

    wire_fields = ("fields_invalid", "config_class")

    def __init__(self, message: str = "", *, config_class: str = "", **options: Any) -> None:
        super().__init__(message, **options)
        self.config_class = config_class


class PluginDisabledError(PluginInputError):
    """The instance is switched off; ``plugin_name`` says of which plugin."""

    wire_fields = ("fields_invalid", "plugin_name")

    def __init__(self, message: str = "", *, plugin_name: str = "", **options: Any) -> None:
        super().__init__(message, **options)
        self.plugin_name = plugin_name


class PluginTransientError(PluginError):
    """A passing condition; ``retry_after_seconds`` is the plugin's own advice, or None."""

    category = ErrorCategory.TRANSIENT
    retriable_by_default = True
    wire_fields: ClassVar[tuple[str, ...]] = ("retry_after_seconds",)

    def __init__(self, message: str = "", *, retry_after_seconds: float | None = None, **options: Any) -> None:
        super().__init__(message, **options)
        self.retry_after_seconds = retry_after_seconds


class PluginTimeoutError(PluginTransientError):
    """The work took longer than ``timeout_seconds``."""

    wire_fields = ("retry_after_seconds", "timeout_seconds")

    def __init__(self, message: str = "", *, timeout_seconds: float | None = None, **options: Any) -> None:
        super().__init__(message, **options)
        self.timeout_seconds = timeout_seconds


class PluginCancelledError(PluginTransientError):
    """The call was cancelled; ``forced`` tells that its worker had to be killed for it."""

    retriable_by_default = False

    def __init__(self, message: str = "the call was cancelled", *, forced: bool = False, **options: Any) -> None:
        super().__init__(message, **options)
        self.forced = forced


class WorkerDiedError(PluginTransientError):
    """The worker ended under a call; ``signal_name`` and ``returncode`` say how, ``log_tail`` holds its last words."""

    def __init__(
        self,
        message: str = "",
        *,
        returncode: int | None = None,
        signal_name: str = "",
        log_tail: Sequence[str] = (),
        outcome_known: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(message, outcome_known=outcome_known, **options)
        self.returncode = returncode
        self.signal_name = signal_name
        self.log_tail = tuple(log_tail)


class PluginResourceError(PluginError):
    """Too little of something; ``resource_shortfall`` has the numbers where they are known."""

    category = ErrorCategory.RESOURCE
    retriable_by_default = True
    wire_fields = ("resource_shortfall",)

    def __init__(
        self,
        message: str = "",
        *,
        resource_shortfall: ResourceShortfall | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(message, **options)
        if isinstance(resource_shortfall, Mapping):
            resource_shortfall = ResourceShortfall(**resource_shortfall)
        self.resource_shortfall = resource_shortfall

    def to_fields(self) -> dict[str, Any]:
        """Return the fields with the shortfall as a plain object."""
        shortfall = dict(vars(self.resource_shortfall)) if self.resource_shortfall else None
        return {**super().to_fields(), "resource_shortfall": shortfall}


class WorkerOOMError(PluginResourceError):
    """The worker was ended for using too much memory; ``process_returncode`` is how, ``log_tail`` its last words."""

    def __init__(
        self,
        message: str = "",
        *,
        process_returncode: int | None = None,
        log_tail: Sequence[str] = (),
        outcome_known: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(message, outcome_known=outcome_known, **options)
        self.process_returncode = process_returncode
        self.log_tail = tuple(log_tail)


class PluginFatalError(PluginError):
    """A fault that repeating will not mend."""


class PluginLoadError(PluginFatalError):
    """The plugin did not come up; no process of it is left. The cause, when typed, is ``__cause__``."""

    def __init__(
        self, message: str = "", *, plugin_name: str = "", phase: str = "", log_tail: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.plugin_name = plugin_name
        self.phase = phase
        self.log_tail = tuple(log_tail)


class PluginConfinementError(PluginLoadError):
    """A worker was not confined by every layer that is required; no plugin code ran. ``layers`` are those it holds."""

    def __init__(
        self, message: str = "", *, missing_layers: Sequence[str] = (), layers: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(message, **options)
        self.missing_layers = tuple(missing_layers)
        self.layers = tuple(layers)


class PluginNotLoadedError(PluginError):
    """No instance has this id."""


class CallNotStartedError(PluginError):
    """The last check before sending said no, or failed; the failure is then ``__cause__``. Nothing was sent."""

    category = ErrorCategory.TRANSIENT


class WireValueError(PluginError, TypeError):
    """A value cannot cross the process border; ``path`` says where it stands, like ``args[0].rows[3].weight``.

    Its category is ``user_input`` when it stands in the caller's arguments, else ``fatal``: then the plugin made it.
    """

    wire_fields = ("path",)

    def __init__(self, message: str = "", *, path: str = "", **options: Any) -> None:
        super().__init__(message, **options)
        self.path = path
        if self.of_caller:
            self.category = ErrorCategory.USER_INPUT

    @property
    def of_caller(self) -> bool:
        """Whether the value stands in the arguments of a call."""
        return self.path.startswith(("args", "kwargs"))


class ProtocolError(PluginError):
    """A frame that this protocol does not allow. The connection is closed after it."""


class ManifestError(PluginError, ValueError):
    """A manifest that may not be used; ``violations`` lists every reason, ``source`` the file."""

    def __init__(self, violations: Sequence[str], *, source: str = "") -> None:
        self.violations = tuple(violations)
        self.source = source
        super().__init__((f"{source}: " if source else "") + "; ".join(self.violations))


class StoreError(PluginError):
    """A file in which the host keeps something cannot be read, written or trusted; ``path`` is that file."""

    def __init__(self, message: str = "", *, path: str = "", **options: Any) -> None:
        super().__init__(message, **options)
        self.path = path


#: The classes whose instances cross the border whole. The host trusts only these names in an error frame.
WIRE_ERRORS: Mapping[str, type[PluginError]] = {
    cls.__name__: cls
    for cls in (
        PluginInputError,
        PluginConfigError,
        PluginDisabledError,
        PluginTransientError,
        PluginTimeoutError,
        PluginCancelledError,
        PluginResourceError,
        PluginFatalError,
        WireValueError,
    )
}

_BARE: tuple[tuple[type[BaseException], type[PluginError]], ...] = (
    (FileNotFoundError, PluginInputError),
    (NotADirectoryError, PluginInputError),
    (IsADirectoryError, PluginInputError),
    (PermissionError, PluginInputError),
    (OSError, PluginTransientError),  # includes timeouts, connections, interruptions
    (KeyError, PluginInputError),
    (ValueError, PluginInputError),
    (TypeError, PluginInputError),
    (MemoryError, PluginResourceError),
)


def classify_exception(error: BaseException) -> type[PluginError]:
    """Return the class that stands for any exception: its own, its nearest known base, or the mapping of bare ones."""
    for cls in type(error).__mro__:
        if cls.__name__ in WIRE_ERRORS and WIRE_ERRORS[cls.__name__] is cls:
            return WIRE_ERRORS[cls.__name__]
    return next((target for bare, target in _BARE if isinstance(error, bare)), PluginFatalError)


def as_plugin_error(error: BaseException) -> PluginError:
    """Return a typed error itself, and for any other the one that stands for it, with its repr and traceback."""
    if isinstance(error, PluginError):
        return error
    typed = classify_exception(error)(f"{type(error).__name__}: {error}")
    typed.original_exc_repr = repr(error)
    typed.remote_traceback = "".join(traceback.format_exception(error))
    return typed


class TracebackPolicy(StrEnum):
    """How much of an exception's own text a record keeps: it may quote what the plugin worked on."""

    FULL = "full"  #: message, repr and traceback
    REPR_ONLY = "repr_only"  #: message and repr
    NONE = "none"  #: neither, and a blank message


def _now() -> datetime:
    from datetime import UTC, datetime  # slow, and no plugin makes such a record

    return datetime.now(UTC)


@record(kw_only=True)
class JobError:
    """An error as a record: what a queue keeps after the exception is gone."""

    category: ErrorCategory
    message: str
    retriable: bool
    outcome_known: bool
    error_type: str
    original_exc_repr: str = ""
    traceback: str = ""
    retry_after_seconds: float | None = None
    fields_invalid: tuple[str, ...] = ()
    resource_shortfall: ResourceShortfall | None = None
    log_tail: tuple[str, ...] = ()
    plugin_name: str = ""
    plugin_instance_id: str = ""
    occurred_at: datetime = field(default_factory=_now)

    @classmethod
    def from_exception(
        cls,
        error: BaseException,
        *,
        plugin_name: str = "",
        plugin_instance_id: str = "",
        policy: TracebackPolicy = TracebackPolicy.FULL,
    ) -> JobError:
        """Record any exception; bare ones are mapped as `classify_exception` says."""
        typed = as_plugin_error(error)
        silent = policy is TracebackPolicy.NONE
        return cls(
            category=typed.category,
            message="" if silent else str(typed),
            retriable=typed.retriable,
            outcome_known=typed.outcome_known,
            error_type=type(typed).__name__,
            original_exc_repr="" if silent else typed.original_exc_repr or repr(error),
            traceback=typed.remote_traceback if policy is TracebackPolicy.FULL else "",
            retry_after_seconds=getattr(typed, "retry_after_seconds", None),
            fields_invalid=getattr(typed, "fields_invalid", ()),
            resource_shortfall=getattr(typed, "resource_shortfall", None),
            log_tail=() if silent else getattr(typed, "log_tail", ()),
            plugin_name=plugin_name,
            plugin_instance_id=plugin_instance_id,
        )


def map_bare_exception_to_job_error(
    error: BaseException,
    *,
    plugin_name: str = "",
    plugin_instance_id: str = "",
    policy: TracebackPolicy = TracebackPolicy.FULL,
) -> JobError:
    """Return `JobError.from_exception`, under the name it had before."""
    return JobError.from_exception(error, plugin_name=plugin_name, plugin_instance_id=plugin_instance_id, policy=policy)
