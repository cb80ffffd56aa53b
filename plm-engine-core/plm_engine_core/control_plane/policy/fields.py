"""Fields by path: what a condition may look at, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from plm_engine_core.control_plane.vocabulary import EvaluationPhase

FieldPath = str | tuple[str, ...]

ROOTS = {
    "agent": "the agent's name in the run",
    "arguments": "the arguments of the call, as they would be carried out",
    "autonomy": "the autonomy level in force: L1, L2 or L3",
    "capability": "the registered capability: id, version, mode, plugin, certified, idempotent",
    "claims": "what the agent says of its proposal; untrusted",
    "principal": "on whose behalf the run acts: user_id, actor_kind, scopes",
    "resource": "the resource the call is for",
}
"""The first part of every path, and what stands there."""

PHASE_ROOTS = {
    EvaluationPhase.INPUT: {
        "agent": ROOTS["agent"],
        "input": "what the run is given",
        "principal": ROOTS["principal"],
    },
    EvaluationPhase.CALL: ROOTS,
    EvaluationPhase.OUTPUT: {
        "artifacts": "the files that the call left: name, mime_type, size_bytes, sha256; not there without any",
        "capability": ROOTS["capability"],
        "error": "how the call failed; not there where it did not",
        "output": "what the call returned; not there where it failed",
    },
}
"""By phase, the first part of every path that an evaluator may look at."""

_PLAIN = frozenset({"agent", "autonomy", "resource"})
_MEMBERS = {
    "capability": frozenset({"id", "version", "mode", "plugin", "certified", "idempotent"}),
    "principal": frozenset({"user_id", "actor_kind", "scopes"}),
}


class Missing:
    """What stands at a path where there is nothing; not even null."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()


def parts(path: FieldPath) -> tuple[str, ...]:
    """A path's names: a text is split at its dots, a list is taken as it is."""
    return tuple(path.split(".")) if isinstance(path, str) else path


def shown(path: FieldPath) -> str:
    """A path as messages write it."""
    return path if isinstance(path, str) else "/".join(path)


def check_path(path: FieldPath) -> FieldPath:
    """Refuse a path that can never lead anywhere, so that a slip is no condition that is always false.

    Raises:
        ValueError: naming the paths there are.
    """
    return check_path_of(EvaluationPhase.CALL, path)


def check_path_of(phase: EvaluationPhase, path: FieldPath) -> FieldPath:
    """The same for what an evaluator looks at in a phase.

    Raises:
        ValueError: naming the paths there are.
    """
    roots = PHASE_ROOTS[phase]
    if not path:
        raise ValueError(f"the path is empty; it starts with one of {', '.join(sorted(roots))}")
    root, *rest = parts(path)
    if root not in roots:
        raise ValueError(f"{shown(path)!r} starts with none of {', '.join(sorted(roots))}")
    if not all(rest) or (root in _PLAIN and rest):
        raise ValueError(f"{shown(path)!r} leads nowhere: {root} is {roots[root]}")
    if root in _MEMBERS and (len(rest) != 1 or rest[0] not in _MEMBERS[root]):
        raise ValueError(f"{shown(path)!r} leads nowhere: {root} has {', '.join(sorted(_MEMBERS[root]))}")
    return path


Lookup = Callable[[Mapping[str, Any]], Any]


def lookup(path: FieldPath) -> Lookup:
    """A function that finds the field in a mapping of roots; a number is an index of a list."""
    root, *rest = parts(path)
    if not rest:
        return lambda fields: fields.get(root, MISSING)

    def walk(fields: Mapping[str, Any]) -> Any:
        found = fields.get(root)
        for name in rest:
            found = member(found, name)
        return found

    return walk


def member(holder: Any, name: str) -> Any:
    """What a mapping or a list holds under a name."""
    if isinstance(holder, Mapping):
        return holder.get(name, MISSING)
    if isinstance(holder, list | tuple) and name.isascii() and name.isdigit() and len(name) < 10:
        index = int(name)
        return holder[index] if index < len(holder) else MISSING
    return MISSING
