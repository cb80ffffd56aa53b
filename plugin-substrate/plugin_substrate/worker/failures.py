"""How an exception crosses the border: its class by name, its fields, its text. The host trusts none of them."""

from __future__ import annotations

import json
from typing import Any

from plugin_substrate.errors import WIRE_ERRORS, PluginError, PluginFatalError, as_plugin_error, classify_exception
from plugin_substrate.interface import is_amount
from plugin_substrate.worker.text import clean_line, clean_text

_MAX_TEXT = 4096
_MAX_TRACEBACK = 8192
_MAX_NAME = 1000
_MAX_NAMES = 1000


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return the JSON object that stands for any exception; fields that are not JSON are left out."""
    try:
        return _describe(error)
    except BaseException:  # noqa: BLE001 - printing an exception runs its own code, which may raise anything
        text = f"{type(error).__name__}, which cannot be printed"
        return _describe(classify_exception(error)(text))


def _describe(error: BaseException) -> dict[str, Any]:
    typed = as_plugin_error(error)
    return {
        "class": classify_exception(error).__name__,
        "message": str(typed)[:_MAX_TEXT],
        "fields": _as_json(typed.to_fields()),
        "repr": (typed.original_exc_repr or repr(error))[:_MAX_TEXT],
        "traceback": typed.remote_traceback[-_MAX_TRACEBACK:],
    }


def restore_error(data: object) -> PluginError:
    """Return the typed error that a frame describes.

    The data comes from a plugin's process: an unknown class or a field of the wrong shape becomes a `PluginFatalError`
    with the text that could be read. Text is cut, and what cannot be shown in it is escaped.
    """
    described = data if isinstance(data, dict) else {}
    message = _text(described, "message", _MAX_TEXT) or "the plugin failed without a message"
    fields = described.get("fields")
    cls = WIRE_ERRORS.get(_text(described, "class", _MAX_NAME), PluginFatalError)
    try:
        error = cls.from_fields(message, _checked(fields if isinstance(fields, dict) else {}))
    except (TypeError, ValueError):
        error = PluginFatalError(message)
    error.original_exc_repr = _text(described, "repr", _MAX_TEXT)
    error.remote_traceback = _text(described, "traceback", _MAX_TRACEBACK)
    return error


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of their documented types; a ValueError when one is not. Numbers are finite and not negative."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        match name, value:
            case "retriable", bool():
                kept[name] = value
            case (("path" | "config_class" | "plugin_name"), str()):
                kept[name] = clean_line(value, _MAX_NAME)
            case "fields_invalid", list() if all(isinstance(item, str) for item in value):
                kept[name] = [clean_line(item, _MAX_NAME) for item in value[:_MAX_NAMES]]
            case "resource_shortfall", {"resource": str(), "needed": needed, "available": available} if is_amount(
                needed
            ) and is_amount(available):
                kept[name] = {**value, "resource": clean_line(value["resource"], _MAX_NAME)}
            case (("resource_shortfall" | "retry_after_seconds" | "timeout_seconds"), None):
                kept[name] = None
            case (("retry_after_seconds" | "timeout_seconds"), amount) if is_amount(amount):
                kept[name] = amount
            case _:
                raise ValueError(f"{name} is unknown or has the wrong shape")
    return kept


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        try:
            kept[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return kept


def _text(data: dict[str, Any], key: str, limit: int) -> str:
    value = data.get(key)
    return clean_text(value, limit) if isinstance(value, str) else ""
