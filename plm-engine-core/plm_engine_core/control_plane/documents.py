"""Files that operators write: YAML in, a checked model out, and otherwise a message that leads to the entry."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from plm_engine_core.control_plane.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

_SHOWN = 120
_SCALARS = (str, int, float)


def load_document(path: Path, model: type[Model], what: str) -> Model:
    """Read a YAML file into `model`; `what` is how messages call it.

    Raises:
        InvalidRequest: naming the file and the entry that is missing, unknown, doubled or wrong.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506  # a SafeLoader
    except OSError as error:
        raise InvalidRequest(
            f"the {what} {path} cannot be read: {error.strerror}; check the path and its permissions", field=what
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the {what} {path} is not YAML: {_where(error)}; correct it there", field=what) from error
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or what
        problem = first["msg"].removeprefix("Value error, ")
        given = f" (given: {_shortened(repr(first['input']))})" if isinstance(first["input"], _SCALARS) else ""
        raise InvalidRequest(f"{path}: {where}: {problem}{given}; correct it in that file", field=where) from error


def _where(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """The place and the problem on one line; YAML's own text draws a picture."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with the same key twice: YAML forbids it, and the parser would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping", node.start_mark, f"found {key!r} twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)
