"""How an exception crosses the border: its class by name, its fields, its text. The host trusts none of them."""

from __future__ import annotations

import json
import math
from typing import Any

from plugin_substrate.errors import WIRE_ERRORS, PluginError, PluginFatalError, as_plugin_error, classify_exception

_MAX_TEXT = 16_384


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return the JSON object that stands for any exception; fields that are not JSON are left out."""
    typed = as_plugin_error(error)
    return {
        "class": classify_exception(error).__name__,
        "message": str(typed)[:_MAX_TEXT],
        "fields": _as_json(typed.to_fields()),
        "repr": (typed.original_exc_repr or repr(error))[:_MAX_TEXT],
        "traceback": typed.remote_traceback[-_MAX_TEXT:],
    }


def restore_error(data: object) -> PluginError:
    """Return the typed error that a frame describes.

    The data comes from a plugin's process: an unknown class or a field of the wrong shape becomes a `PluginFatalError`
    with the text that could be read.
    """
    described = data if isinstance(data, dict) else {}
    message = _text(described, "message") or "the plugin failed without a message"
    fields = described.get("fields")
    cls = WIRE_ERRORS.get(_text(described, "class"), PluginFatalError)
    try:
        error = cls.from_fields(message, _checked(fields if isinstance(fields, dict) else {}))
    except (TypeError, ValueError):
        error = PluginFatalError(message)
    error.original_exc_repr = _text(described, "repr")
    error.remote_traceback = _text(described, "traceback")
    return error


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Let only fields of their documented types through; numbers are finite and not negative."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "retriable":
            fits = isinstance(value, bool)
        elif name == "path":
            fits = isinstance(value, str)
        elif name == "fields_invalid":
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        elif name == "resource_shortfall":
            fits = value is None or (isinstance(value, dict) and _is_amount(value.get("needed")))
        else:
            fits = value is None or _is_amount(value)
        if not fits:
            raise ValueError(f"{name} has the wrong shape")
        kept[name] = value
    return kept


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        try:
            kept[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return kept


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    return value[:_MAX_TEXT] if isinstance(value, str) else ""
