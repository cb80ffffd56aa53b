"""What a run is given: checked against what its agent declares, before anything is stored."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plm_engine_core.agent_runtime import Plan
from plm_engine_core.control_plane.errors import InvalidRequest

from plm_backend.schemas import FileInput, RunCreate

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


@dataclass(frozen=True, kw_only=True)
class InputFileData:
    """A file of the request, decoded."""

    name: str
    mime_type: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Inputs that fit the agent: plain values with the defaults filled in, and files."""

    values: Mapping[str, Any]
    files: Mapping[str, InputFileData]


def check_inputs(plan: Plan, body: RunCreate) -> RunInputs:
    """The inputs of a request, as its agent declares them.

    Raises:
        InvalidRequest: naming the input that is unknown, missing, in the wrong place or of the wrong type.
    """
    unknown = sorted((body.inputs.keys() | body.files.keys()) - plan.inputs.keys())
    if unknown:
        place = "files" if unknown[0] in body.files else "inputs"
        raise InvalidRequest(
            f"agent {plan.agent} has no input {unknown[0]!r}; it takes {', '.join(sorted(plan.inputs)) or 'none'}",
            field=f"{place}.{unknown[0]}",
        )
    values: dict[str, Any] = {}
    files: dict[str, InputFileData] = {}
    for name, declared in plan.inputs.items():
        place, other = ("files", "inputs") if declared.type == "file" else ("inputs", "files")
        if name in getattr(body, other):
            raise InvalidRequest(
                f"{name} is of type {declared.type}; give it under {place!r}, not {other!r}", field=f"{other}.{name}"
            )
        if name in body.files:
            files[name] = _decoded(name, body.files[name])
        elif name in body.inputs:
            values[name] = _typed(name, declared.type, body.inputs[name])
        elif declared.default is not None:
            values[name] = declared.default
        else:
            raise InvalidRequest(
                f"agent {plan.agent} needs the input {name!r} of type {declared.type}; give it under {place!r}",
                field=f"{place}.{name}",
            )
    return RunInputs(values=values, files=files)


def _typed(name: str, kind: str, value: Any) -> Any:
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise InvalidRequest(f"{name} must be of type {kind}, not {value!r:.80}", field=f"inputs.{name}")
    return value


def _decoded(name: str, given: FileInput) -> InputFileData:
    if (given.text is None) == (given.base64 is None):
        raise InvalidRequest(f"give either 'text' or 'base64' of the file {name}", field=f"files.{name}")
    try:
        data = given.text.encode() if given.text is not None else base64.b64decode(given.base64 or "", validate=True)
    except ValueError as error:
        raise InvalidRequest(
            f"the content of the file {name} cannot be read: {error}; send 'text', or the bytes in base64 (RFC 4648)",
            field=f"files.{name}",
        ) from error
    return InputFileData(name=given.name, mime_type=given.mime_type, data=data)
