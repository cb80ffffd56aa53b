"""What a plugin author sees: the class to derive from and the values that surround a call. Standard library only.

A plugin is one class in its own environment. The host creates it in a worker process, calls ``initialize`` once with
the configuration, then ``execute`` for every call, from as many threads as the host was told to use. Progress, usage
and cancellation belong to the call that the executing thread is in, never to the worker as a whole.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from plugin_substrate.errors import PluginCancelledError, PluginInputError
from plugin_substrate.records import field, record

if TYPE_CHECKING:
    from pathlib import Path

DATA_DIR_VARIABLE = "CJM_PLUGIN_DATA_DIR"
#: Where the models lie that plugins of a host share, if it has such a folder: to be read, unless more is granted.
MODELS_DIR_VARIABLE = "CJM_MODELS_DIR"

#: The key in a dataclass field's metadata that names what a change of the field releases: see `reconfigure`.
RELOAD_TRIGGER = "reload_trigger"

#: A report of usage names at most so many units, and each in at most so many characters.
MAX_USAGE_UNITS = 100
MAX_UNIT_CHARACTERS = 100

_logger = logging.getLogger(__name__)
_MIME_TYPE = re.compile(r"(?=.{3,255}\Z)[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*(;[ -~]*)?")
_NUMBERS = (int, float)
_MAX_NAME_BYTES = 255
_ACTION_TAG = "__plugin_action__"

Method = TypeVar("Method", bound=Callable[..., Any])


@record()
class CallContext:
    """Who asked for a call and under which keys.

    ``step_key`` stays the same when a step is repeated: an idempotent plugin applies the effect of one key once.
    ``deadline`` is a Unix time in seconds, or None. A ``confidential`` call carries a secret of its step: its worker
    serves that run alone and is replaced after it.
    """

    call_id: str
    tenant_id: str = ""
    run_id: str = ""
    step_key: str = ""
    traceparent: str = ""
    deadline: float | None = None
    confidential: bool = False


@record()
class _NamedBytes:
    name: str
    mime_type: str
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if type(self.name) is not str or not self.name or self.name in {".", ".."}:
            raise ValueError(f"{kind}.name must be a file name, not {self.name!r:.80}")
        if not self.name.isprintable() or "/" in self.name or "\\" in self.name:
            raise ValueError(f"{kind}.name must not hold separators or control characters: {self.name!r:.80}")
        if len(self.name.encode()) > _MAX_NAME_BYTES:  # what the usual file systems take
            raise ValueError(f"{kind}.name must not be longer than {_MAX_NAME_BYTES} bytes: {self.name!r:.80}")
        if type(self.mime_type) is not str or not _MIME_TYPE.fullmatch(self.mime_type):
            raise ValueError(f"{kind}.mime_type must look like 'text/html', not {self.mime_type!r:.80}")
        if type(self.data) is not bytes:
            raise TypeError(f"{kind}.data must be bytes, not {type(self.data).__name__}")


@record()
class InputFile(_NamedBytes):
    """A file handed to a plugin; may stand anywhere in the arguments. ``name`` is a bare file name, never a path."""


@record()
class OutputFile(_NamedBytes):
    """A file a plugin made; may stand anywhere in the result. ``name`` is a bare file name, never a path."""


@runtime_checkable
class FileBackedDTO(Protocol):
    """Something that can stand in a file: as an argument of a call it is replaced by the path it returns."""

    def to_temp_file(self) -> str:
        """Write it and return where."""
        ...


@record()
class EnvVarSpec:
    """A variable of the environment that a plugin's worker reads.

    The host sets a ``secret`` one from its secret store and never shows it; ``default`` and ``options`` are for the
    others.
    """

    name: str
    secret: bool = False
    required: bool = False
    label: str = ""
    description: str = ""
    default: str | None = None
    options: list[str] | None = None


@record()
class ConfigOption:
    """One value that a setting may take at the moment."""

    value: Any
    label: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@record()
class FieldOptions:
    """What a setting may be at the moment: live facts, which never enter the configuration's schema."""

    options: list[ConfigOption] = field(default_factory=list)
    constraints: dict[str, Any] = field(default_factory=dict)


class ActiveCall:
    """A running call: its context, its way back to the caller, its cancel flag. Made by whoever runs plugins."""

    def __init__(
        self,
        context: CallContext,
        *,
        on_progress: Callable[[float, str], object],
        on_usage: Callable[[dict[str, float]], object],
    ) -> None:
        self.context = context
        self.on_progress = on_progress
        self.on_usage = on_usage
        self._cancelled = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def cancelled(self) -> bool:
        """Tell whether the end of this call was asked for."""
        return self._cancelled

    def request_cancel(self) -> None:
        """Set the flag and fire the callbacks in order, once; one that raises is logged and the rest still run."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _fire(callback)

    def add_callback(self, callback: Callable[[], object]) -> None:
        """Register ``callback``; it fires at once when the call is already cancelled."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        _fire(callback)

    def remove_callback(self, callback: Callable[[], object]) -> None:
        """Forget ``callback``; nothing happens when it already fired."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this the current call of the running thread."""
        token = current_call.set(self)
        try:
            yield
        finally:
            current_call.reset(token)


current_call: ContextVar[ActiveCall | None] = ContextVar("plugin_substrate_current_call", default=None)


def _fire(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception:
        _logger.exception("a cancel callback failed")


def _active() -> ActiveCall:
    call = current_call.get()
    if call is None:
        raise LookupError(
            "no call is running in this thread: call context, progress, usage and cancellation exist only inside "
            "execute() (a thread that the plugin starts needs contextvars.copy_context().run)"
        )
    return call


class PluginInterface(ABC):
    """Base class of every plugin: one has a name and a version, and overrides `execute`; all else has a default.

    ``WORKER_ENV`` declares the variables that the worker reads; ``config_class`` may name the dataclass of the
    configuration, whose fields make its schema, and whose fields' metadata says what a change of them releases.
    ``config`` is the configuration as `initialize` keeps it: a dict.
    """

    WORKER_ENV: ClassVar[Sequence[EnvVarSpec]] = ()
    config_class: ClassVar[type | None] = None
    config: Any

    @property
    @abstractmethod
    def name(self) -> str:
        """The plugin's name."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The plugin's version."""

    @abstractmethod
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work. A capability is called as ``execute(action="<capability id>", **arguments)``."""

    def initialize(self, config: dict[str, Any]) -> None:
        """Prepare for calls; called once, before the first, with ``{}`` when nothing is configured.

        Unless overridden it keeps the configuration as ``self.config``.
        """
        self.config = config

    def get_config_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the configuration: unless overridden the one of `config_class`, ``{}`` without."""
        if self.config_class is None:
            return {}
        from plugin_substrate.validation import dataclass_to_jsonschema  # few plugins need it

        return dataclass_to_jsonschema(self.config_class)

    def get_current_config(self) -> dict[str, Any]:
        """Return the configuration in use: unless overridden ``self.config``."""
        try:
            return self.config  # type: ignore[no-any-return] # or a dataclass, which stands for one
        except AttributeError:
            raise NotImplementedError(
                f"{type(self).__name__} overrides initialize() and keeps no self.config: have it call "
                "super().initialize(config), or override get_current_config() too"
            ) from None

    def execute_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Do the work piece by piece; unless overridden, in the one piece that ``execute`` returns."""
        yield self.execute(*args, **kwargs)

    def run_action(self, action: str, **arguments: Any) -> Any:
        """Call the method tagged with ``action``, for use in ``execute``; an unknown one is a `PluginInputError`."""
        actions = _actions(type(self))
        if action not in actions:
            known = ", ".join(sorted(actions)) or "none"
            raise PluginInputError(f"{self.name} has no action {action!r}; it has: {known}", fields_invalid=["action"])
        return getattr(self, actions[action])(**arguments)

    def cleanup(self) -> None:  # noqa: B027 - an optional hook: doing nothing is its right default
        """Release what is held; called once on unload."""

    def prefetch(self) -> None:  # noqa: B027 - an optional hook
        """Fetch what calls will need, such as models; reports progress like a call, or is taken for stalled."""

    def on_disable(self) -> None:  # noqa: B027 - an optional hook
        """Let go of what a plugin without calls needs not hold; called when the last call has ended."""

    def on_enable(self) -> None:  # noqa: B027 - an optional hook
        """Make ready again after `on_disable`."""

    def get_config_options(self) -> dict[str, FieldOptions]:
        """Return what settings may be at the moment, by name; only those with live options."""
        return {}

    def reconfigure(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Take over a new configuration, when no call is running.

        Releases what the changed settings hold, then calls ``_apply_config(new_config)`` if the plugin has it, else
        ``initialize(new_config)``. When this raises, the worker is replaced, with the old configuration.
        """
        self.reconfigure_with_triggers(old_config, new_config)
        apply = getattr(self, "_apply_config", self.initialize)
        apply(new_config)

    def reconfigure_with_triggers(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        """Call ``_release_<trigger>()`` once for each trigger that a changed field of `config_class` names.

        One that raises or is missing is logged, and the others still run.
        """
        changed = self.fields_that_changed(old_config, new_config)
        for trigger in _triggers(self.config_class, changed):
            try:
                getattr(self, f"_release_{trigger}")()
            except Exception:
                _logger.exception("releasing %r failed", trigger)

    @staticmethod
    def fields_that_changed(old_config: Mapping[str, Any], new_config: Mapping[str, Any]) -> set[str]:
        """Return the settings whose values differ; a missing one counts as None."""
        return {key for key in {*old_config, *new_config} if old_config.get(key) != new_config.get(key)}

    @property
    def call(self) -> CallContext:
        """The call this thread is in; a LookupError outside of one."""
        return _active().context

    @property
    def data_dir(self) -> Path:
        """The plugin's own writable folder for this tenant; a LookupError when it has none, being stateless."""
        from pathlib import Path  # slow, and not every plugin keeps something

        try:
            return Path(os.environ[DATA_DIR_VARIABLE])
        except KeyError:
            raise LookupError(
                f"this process has no {DATA_DIR_VARIABLE}: a plugin that is declared stateless keeps nothing; "
                "what a call needs for itself belongs into a temporary folder"
            ) from None

    def report_progress(self, progress: float, message: str = "") -> None:
        """Tell the caller how far this call is: 0 to 1, or -1 when nobody can know. Other numbers are a ValueError."""
        call = _active()
        if not (progress == -1 or 0 <= progress <= 1):
            raise ValueError(f"progress must be between 0 and 1, or -1 for indeterminate, not {progress!r}")
        call.on_progress(float(progress), str(message))

    def report_usage(self, usage: Mapping[str, float]) -> None:
        """Tell what this call has consumed so far, by unit; a later report replaces an earlier one.

        Units are printable text, at most 100 of up to 100 characters; amounts are finite and not negative. Anything
        else is a ValueError.
        """
        call = _active()
        check_usage(usage)
        call.on_usage(dict(usage))

    def cancel(self) -> None:
        """Ask the current call to end; runs in a thread of its own, inside the call it is meant for."""
        _active().request_cancel()

    def check_cancel(self) -> None:
        """Raise `PluginCancelledError` when the end of this call was asked for. Call it wherever stopping is safe."""
        if _active().cancelled:
            raise PluginCancelledError

    def register_cancel_callback(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when this call is cancelled, from another thread; at once when it already is."""
        _active().add_callback(callback)

    @contextmanager
    def cancel_signal_to(self, callback: Callable[[], object]) -> Iterator[None]:
        """Like `register_cancel_callback`, for the length of a with-block."""
        call = _active()
        call.add_callback(callback)
        try:
            yield
        finally:
            call.remove_callback(callback)


def _triggers(config_class: type | None, changed: set[str]) -> list[str]:
    """Return the distinct reload triggers of the changed fields, in the order of the fields."""
    from dataclasses import fields, is_dataclass  # only where it is asked for: see `records`

    if config_class is None or not is_dataclass(config_class):
        return []
    named = [entry.metadata.get(RELOAD_TRIGGER) for entry in fields(config_class) if entry.name in changed]
    return list(dict.fromkeys(str(trigger) for trigger in named if trigger))


def is_amount(value: object) -> bool:
    """Whether a value is a number from 0 to the largest float: not NaN, not infinite, not a bool."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def check_usage(usage: Mapping[str, float]) -> None:
    """Raise a ValueError unless ``usage`` keeps the rules of `PluginInterface.report_usage`."""
    if len(usage) > MAX_USAGE_UNITS:
        raise ValueError(f"usage has {len(usage)} units, more than {MAX_USAGE_UNITS}")
    for unit, amount in usage.items():
        if not isinstance(unit, str) or not unit.isprintable() or len(unit) > MAX_UNIT_CHARACTERS:
            raise ValueError(
                f"usage maps units, which are printable text of at most {MAX_UNIT_CHARACTERS} characters, "
                f"not {unit!r:.80}"
            )
        if not is_amount(amount):
            raise ValueError(f"usage maps units to finite amounts of 0 or more, not {unit!r} to {amount!r:.80}")


def plugin_action(name: str) -> Callable[[Method], Method]:
    """Tag a method as the implementation of the capability ``name``."""

    def tag(method: Method) -> Method:
        setattr(method, _ACTION_TAG, name)
        return method

    return tag


def collect_plugin_actions(cls: type) -> set[str]:
    """Return the capabilities that methods of a class and its bases are tagged with."""
    return set(_actions(cls))


def _actions(cls: type) -> dict[str, str]:
    """Map each tagged capability to its method's name, so that an overriding method needs no second tag."""
    actions: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for attribute, value in vars(base).items():
            action = getattr(value, _ACTION_TAG, None)
            if isinstance(action, str) and actions.setdefault(action, attribute) != attribute:
                raise ValueError(f"{cls.__name__}.{attribute} and .{actions[action]} are both tagged {action!r}")
    return actions
