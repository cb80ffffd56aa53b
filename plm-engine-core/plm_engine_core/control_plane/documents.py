"""Files that operators write: YAML or JSON in, a checked model out, and otherwise a message that leads to the entry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from plm_shared.canonical_json import encodable
from pydantic import BaseModel, Strict, ValidationError

from plm_engine_core.control_plane.document_places import place_of
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.yaml_values import JsonValues, RefusedValue

Model = TypeVar("Model", bound=BaseModel)

# What is written is taken for what it is: "1" and true are no numbers, and "no" is not false.
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]

_SHOWN = 120
_SCALARS = (str, int, float)


def load_document(path: Path, model: type[Model], what: str) -> Model:
    """Read a YAML file, or JSON when its name ends in `.json`, into `model`; `what` is how messages call it.

    Raises:
        InvalidRequest: naming the file and the line, column and entry that is missing, unknown, doubled or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return parse_document(text, model, what, source=str(path), is_json=path.suffix == ".json")
    except OSError as error:
        raise InvalidRequest(
            f"the {what} {path} cannot be read: {error.strerror}; check the path and its permissions", field=what
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the {what} {path} is not YAML: {error}; correct it there", field=what) from error


def parse_document(
    text: str, model: type[Model], what: str, *, source: str, is_json: bool = False, in_file: bool = True
) -> Model:
    """Read a text as `load_document` reads a file; `source` is how messages call it.

    One that stands in no file has no lines that anybody wrote: then its entry alone says where.

    Raises:
        InvalidRequest: naming the source and the line, column and entry that is missing, unknown, doubled or wrong.
    """
    form = "JSON" if is_json else "YAML"
    try:
        document = _from_json(text) if is_json else yaml.load(text, Loader=JsonValues)  # noqa: S506  # a SafeLoader
    except RefusedValue as error:
        words = f"{source}:{error.place}: {error.problem}; correct it in that file"
        raise InvalidRequest(words, field=what) from error
    except (yaml.YAMLError, ValueError) as error:
        words = f"the {what} {source} is not {form}: {_where(error)}; correct it there"
        raise InvalidRequest(words, field=what) from error
    except RecursionError as error:
        raise InvalidRequest(f"the {what} {source} is nested too deeply; flatten it", field=what) from error
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or what
        if in_file:
            place = place_of(text, first["loc"])
            words = f"{source}{place}: {where}: {problem_of(first)}; correct it in that file"
        else:
            words = ": ".join([source, *([where] if first["loc"] else []), problem_of(first)]) + "; correct it there"
        raise InvalidRequest(words, field=where) from error


_WORDS = {
    "string_type": "must be a text; write it in quotes",
    "model_type": "must be a mapping of entries",
    "model_attributes_type": "must be a mapping of entries",
    "mapping_type": "must be a mapping of entries",
    "dict_type": "must be a mapping of entries",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "frozen_set_type": "must be a list",
    "union_tag_not_found": "needs an entry 'type' that says what it is",
}


def problem_of(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says, with the value where it is a short one, in the words of files."""
    words = _WORDS.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ")
    return f"{words} (given: {_shortened(repr(error['input']))})" if isinstance(error["input"], _SCALARS) else words


def differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two documents of JSON values differ: the place, and what stands there in each, None for nothing.

    Entries of a list that have an `id` or a `name` are told apart by it, and so is their order as a whole; of any other
    list that differs, the whole is told.
    """
    one, two = (_by_name(each) for each in (old, new))
    if one is None or two is None:
        if old != new:
            yield at, old, new
        return
    for key in [*one, *(key for key in two if key not in one)]:
        yield from differences(one.get(key), two.get(key), f"{at}.{key}" if at else key)
    if not isinstance(old, Mapping):
        names = [[key for key in each if key in one and key in two] for each in (one, two)]
        if names[0] != names[1]:
            yield f"{at}, in their order", names[0], names[1]


def _by_name(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or a list of mappings that all have a name of their own, by key; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        return None
    names = [each.get("id", each.get("name")) for each in value]
    return dict(zip(names, value, strict=True)) if all(names) and len(set(names)) == len(names) else None


def _where(error: yaml.YAMLError | ValueError) -> str:
    """The place and the problem on one line; YAML's own text draws a picture."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return " ".join(str(error).split())


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def _from_json(text: str) -> Any:
    document = json.loads(
        text, object_pairs_hook=_unique_members, parse_constant=_no_constant, parse_float=_finite, parse_int=_digits
    )
    if "\\u" in text and not encodable(json.dumps(document, ensure_ascii=False)):
        raise ValueError("found half a surrogate pair, which cannot be stored")
    return document


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"found {key!r} twice")
        members[key] = value
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{_shortened(text)} is too large a number to be kept")
    return number


def _digits(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"found a number of {len(text)} digits, which cannot be kept") from None
