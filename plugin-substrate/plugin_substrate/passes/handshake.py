"""A plugin's questions and their answers, checked on both ways. The shape is the one of an MCP elicitation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from plugin_substrate.passes.records import InputRequiredPayload
from plugin_substrate.worker.text import clean_text

__all__ = ["MalformedError", "parse_question", "parse_result"]

_STATUSES = frozenset({"modified", "skipped", "described", "failed", "input_required"})
_RESULTS = {"success": 0, "failed": None, "input_required": 2}
_FIELD_KEYS = frozenset({"id", "label", "type", "required", "choices"})
_MAX_FIELDS = 100
_MAX_TEXT = 1 << 20


class MalformedError(Exception):
    """A worker said what no worker of ours says."""


def parse_question(plugin: str, asked: object) -> InputRequiredPayload:
    """Check what a plugin asks; a `MalformedError` names what is wrong with it."""
    if not isinstance(asked, dict):
        raise MalformedError("it came without a question")
    fields, reason = asked.get("fields", []), asked.get("reason", "")
    if not isinstance(reason, str):
        raise MalformedError("its reason is no text")
    if not isinstance(fields, list) or len(fields) > _MAX_FIELDS:
        raise MalformedError(f"its fields are no list of at most {_MAX_FIELDS}")
    parsed = tuple(_field(entry) for entry in fields)
    if len({entry["id"] for entry in parsed}) != len(parsed):
        raise MalformedError("two of its fields have the same id")
    return InputRequiredPayload(plugin=plugin, fields=parsed, reason=clean_text(reason, _MAX_TEXT))


def _field(entry: object) -> Mapping[str, Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not entry["id"]:
        raise MalformedError("a field has no id")
    name = f"field {entry['id']!r:.80}"
    unknown = [key for key in entry if key not in _FIELD_KEYS]
    if unknown:
        raise MalformedError(f"{name} has an unknown key {unknown[0]!r:.80}")
    field = {"label": entry["id"], "type": "string", "required": False, **entry}
    if not isinstance(field["label"], str) or not isinstance(field["type"], str):
        raise MalformedError(f"{name}: label and type must be texts")
    if not isinstance(field["required"], bool):
        raise MalformedError(f"{name}: required must be true or false")
    if "choices" in field and not isinstance(field["choices"], list):
        raise MalformedError(f"{name}: choices must be a list")
    return {**field, "label": clean_text(field["label"], _MAX_TEXT)}


def parse_result(answer: object, files: frozenset[str], *, most_bytes: int) -> dict[str, Any]:
    """Check what a worker says of its run; a `MalformedError` names what is wrong with it."""
    if not isinstance(answer, dict):
        raise MalformedError("malformed_result: it is no object")
    try:
        size = len(json.dumps(answer, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise MalformedError("malformed_result: it is no JSON") from None
    if size > most_bytes:
        raise MalformedError("ipc_frame_oversize")
    result, exit_code, per_file = answer.get("result"), answer.get("exit_code"), answer.get("per_file")
    if (
        not isinstance(result, str)
        or result not in _RESULTS
        or type(exit_code) is not int
        or exit_code not in ((1, 3) if result == "failed" else (_RESULTS[result],))
    ):
        raise MalformedError("malformed_result: result and exit code do not fit")
    if not isinstance(per_file, list) or not all(_is_file_result(entry, files) for entry in per_file):
        raise MalformedError("malformed_result: per_file")
    return answer


def _is_file_result(entry: object, files: frozenset[str]) -> bool:
    if not isinstance(entry, dict):
        return False
    path, status = entry.get("path"), entry.get("status")
    return isinstance(path, str) and path in files and isinstance(status, str) and status in _STATUSES
