"""What an ``env_file`` asks an environment for: a conda environment file as far as no conda is needed, or requirements.

Environments are made by uv, from an interpreter that is here. So of a conda file the version of Python and what it has
pip install are taken, and every other package of conda's is refused by name: nothing is left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from plugin_substrate.errors import PluginConfigError

#: A requirement as ``plugins.yaml`` and requirement files may name one.
REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*([=<>!~;@(].*)?")

_PYTHON = re.compile(r"python\s*={1,2}\s*(\d+\.\d+)(\.\*|\.\d+)?")
_OF_EVERY_ENVIRONMENT = {"pip", "python"}
_YAML = {".yml", ".yaml"}


@dataclass(frozen=True, kw_only=True)
class EnvFile:
    """The wishes of one file; ``python_version`` is empty where it says none."""

    python_version: str = ""
    requirements: tuple[str, ...] = ()


def read_env_file(path: Path) -> EnvFile:
    """Read a file of either kind, by its ending; a `PluginConfigError` names all that cannot be had."""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text) if path.suffix in _YAML else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise PluginConfigError(f"{path} cannot be read: {error}") from error
    problems: list[str] = []
    if path.suffix in _YAML:
        found = _of_conda(document, problems)
    else:
        found = EnvFile(requirements=_of_pip(text.splitlines(), problems))
    if problems:
        raise PluginConfigError("; ".join(f"{path}: {problem}" for problem in problems))
    return found


def _of_conda(document: object, problems: list[str]) -> EnvFile:
    listed = document.get("dependencies") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        problems.append("there is no list of dependencies")
        return EnvFile()
    version = ""
    requirements: tuple[str, ...] = ()
    for entry in listed:
        match entry:
            case str() if python := _PYTHON.fullmatch(entry.strip()):
                version = python[1]
            case str() if entry.strip() in _OF_EVERY_ENVIRONMENT:
                continue
            case {"pip": list() as lines}:
                requirements += _of_pip(lines, problems)
            case _:
                problems.append(
                    f"{entry!r:.80} would need conda; if the index has such a package, name it under pip: instead"
                )
    return EnvFile(python_version=version, requirements=requirements)


def _of_pip(lines: Sequence[object], problems: list[str]) -> tuple[str, ...]:
    wanted = [line.partition(" #")[0].strip() if isinstance(line, str) else line for line in lines]
    wanted = [line for line in wanted if line and not str(line).startswith("#")]
    problems += [
        f"{line!r:.80} is no requirement; options and paths cannot stand here"
        for line in wanted
        if not isinstance(line, str) or not REQUIREMENT.fullmatch(line)
    ]
    return tuple(line for line in wanted if isinstance(line, str))
