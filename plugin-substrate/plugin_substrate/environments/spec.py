"""``plugins.yaml``: which plugins this host should have. Everything wrong with it is named, with its line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plugin_substrate.environments.env_file import REQUIREMENT, read_env_file
from plugin_substrate.errors import PluginConfigError
from plugin_substrate.manifest import NAME_PATTERN
from plugin_substrate.worker.isolation import IsolationTerms, parse_required_layers, parse_terms

_REQUIRED = ("name", "env_name", "package")
_OPTIONAL = ("python_version", "env_file", "isolation", "require", "interface_libs")
_STRUCTURED = ("isolation", "require")


@dataclass(frozen=True, kw_only=True)
class PluginSpec:
    """One wished plugin. ``package`` is as written; ``folder`` is where it lies when it is a local path.

    ``isolation`` is what the operator grants it, ``require`` the layers it must not run without. ``interface_libs`` are
    packages that plugin and host both need, such as one with a common interface. ``env_requirements`` are what an
    ``env_file`` wants in the environment besides.
    """

    name: str
    env_name: str
    package: str
    python_version: str = ""
    folder: Path | None = None
    editable: bool = False
    isolation: IsolationTerms = field(default_factory=IsolationTerms)
    require: tuple[str, ...] = ()
    interface_libs: tuple[str, ...] = ()
    env_requirements: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """The package as an installer takes it."""
        return str(self.folder) if self.folder else self.package


def load_plugins_file(path: Path) -> list[PluginSpec]:
    """Read the file; a `PluginConfigError` lists every violation with its line."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PluginConfigError(f"{path} cannot be read: {error}") from error
    problems: list[str] = []
    specs = [_spec(entry, path.parent, problems) for entry in _entries(node, problems)]
    names = [spec.name for spec in specs if spec]
    problems += [f"the name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]
    versions: dict[str, str] = {}
    for spec in filter(None, specs):
        if versions.setdefault(spec.env_name, spec.python_version) != spec.python_version:
            problems.append(f"{spec.name!r} wants another python_version for {spec.env_name!r} than a plugin before it")
    if problems:
        raise PluginConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return [spec for spec in specs if spec]


def _entries(node: Any, problems: list[str]) -> list[Any]:
    top = _mapping(node, "the top level", ("plugins",), problems)
    plugins = top.get("plugins")
    if isinstance(plugins, yaml.SequenceNode):
        return list(plugins.value)
    problems.append("the top level must have a list 'plugins'")
    return []


def _spec(node: Any, base: Path, problems: list[str]) -> PluginSpec | None:
    found = len(problems)
    line = node.start_mark.line + 1
    values: dict[str, Any] = {}
    structured: dict[str, Any] = {}
    for key, value in _mapping(node, "a plugin", (*_REQUIRED, *_OPTIONAL), problems).items():
        if key in _STRUCTURED:
            structured[key] = _isolation_value(key, value, problems)
        elif key == "interface_libs":
            structured[key] = _libraries(value, base, problems)
        elif isinstance(value, yaml.ScalarNode) and value.value.strip():
            values[key] = value.value.strip()
        else:
            problems.append(f"line {value.start_mark.line + 1}: {key} must be text")
    problems += [f"line {line}: {key} is missing" for key in _REQUIRED if key not in values and len(problems) == found]
    for key in ("name", "env_name"):
        if key in values and not NAME_PATTERN.fullmatch(values[key]):
            problems.append(f"line {line}: {key} must be 1 to 64 letters, digits, - or _, not {values[key]!r}")
    structured["env_requirements"] = _environment(values, base, line, problems)
    if len(problems) > found:
        return None
    editable = values["package"].startswith("-e ")
    package = values["package"].removeprefix("-e ").strip()
    local = editable or package.startswith((".", "/"))
    if not local and not REQUIREMENT.fullmatch(package):
        problems.append(
            f"line {line}: package must be a requirement ('name', 'name==1.0', 'name @ url') or a path that starts "
            f"with '.' or '/', not {package!r}"
        )
        return None
    folder = (base / package).resolve() if local else None
    return PluginSpec(**{**values, "package": package}, **structured, folder=folder, editable=editable)


def _environment(values: dict[str, Any], base: Path, line: int, problems: list[str]) -> tuple[str, ...]:
    """Take the ``env_file`` out of a plugin's values and put in what it says of Python; returns its requirements."""
    name = values.pop("env_file", None)
    if name is None:
        return ()
    if "python_version" in values:
        problems.append(f"line {line}: env_file and python_version exclude each other; name Python in the file")
        return ()
    if "://" in name:
        problems.append(f"line {line}: env_file must be a path; download {name!r:.80} and name the file")
        return ()
    try:
        wanted = read_env_file((base / name).resolve())
    except PluginConfigError as error:
        problems.append(f"line {line}: {error}")
        return ()
    if wanted.python_version:
        values["python_version"] = wanted.python_version
    return wanted.requirements


def _libraries(node: Any, base: Path, problems: list[str]) -> tuple[str, ...]:
    """Return requirements; those that are paths are made whole."""
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    libraries = []
    for item in items:
        text = item.value.strip() if isinstance(item, yaml.ScalarNode) else ""
        if text.startswith((".", "/")):
            libraries.append(str((base / text).resolve()))
        elif isinstance(node, yaml.SequenceNode) and REQUIREMENT.fullmatch(text):
            libraries.append(text)
        else:
            problems.append(f"line {item.start_mark.line + 1}: interface_libs must be a list of requirements or paths")
    return tuple(libraries)


def _isolation_value(key: str, node: Any, problems: list[str]) -> Any:
    """Return the grants or the required layers; the rules are those of the manifest."""
    found: list[str] = []
    parse = parse_terms if key == "isolation" else parse_required_layers
    try:
        plain = _plain(node)
    except RecursionError:  # an alias of itself
        plain = "a value that contains itself"
    value = parse(plain, key, found)
    problems += [f"line {node.start_mark.line + 1}: {problem}" for problem in found]
    return value


def _plain(node: Any) -> Any:
    """Return the value of a node as SafeLoader makes it; what it cannot make, or a repeated key, comes as a text."""
    if isinstance(node, yaml.MappingNode):
        values = {str(_plain(key)): _plain(value) for key, value in node.value}
        return values if len(values) == len(node.value) else "a mapping with the same key twice"
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError):
        return str(node.value)


def _mapping(node: Any, what: str, known: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """Return the values of a mapping node by key; unknown and repeated keys are problems."""
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node is not None else 1
        problems.append(f"line {line}: {what} must be a mapping")
        return {}
    values: dict[str, Any] = {}
    for key, value in node.value:
        if key.value not in known:
            problems.append(f"line {key.start_mark.line + 1}: unknown key {key.value!r}; known: {', '.join(known)}")
        elif key.value in values:
            problems.append(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
        else:
            values[key.value] = value
    return values


def distribution_name(spec: PluginSpec) -> str:
    """Return the name of the distribution that a spec installs; a `PluginConfigError` when nothing says it."""
    if spec.folder is None:
        match = REQUIREMENT.fullmatch(spec.package)
        return match.group(1) if match else spec.package
    import tomllib

    file = spec.folder / "pyproject.toml"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise PluginConfigError(
            f"{file} cannot be read: {error.strerror}; a plugin is a Python project of its own"
        ) from error
    try:
        name = tomllib.loads(text)["project"]["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise PluginConfigError(f"{file} does not say [project] name: {error!r}") from error
    if not isinstance(name, str) or not REQUIREMENT.fullmatch(name):
        raise PluginConfigError(f"{file}: {name!r} is not a project name")
    return name
