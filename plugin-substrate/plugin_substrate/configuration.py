"""``cjm.yaml``: where a host keeps its plugins. Everything wrong with it is named, with its line, and nothing guessed.

What counts, the first that is given: the command line, the environment (``CJM_DATA_DIR``, ``CJM_CONDA_PREFIX``,
``CJM_CONDA_TYPE``), the file, the defaults. Libraries take a `CJMConfig`; only the command line uses the default one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from plugin_substrate.errors import PluginConfigError

CONFIG_FILE = "cjm.yaml"


class RuntimeMode(StrEnum):
    """Whose conda family the environments come from."""

    LOCAL = "local"  #: one below ``runtime.prefix``
    SYSTEM = "system"  #: the one that is installed


class CondaType(StrEnum):
    """Which tool of the conda family a host uses where it uses one."""

    MICROMAMBA = "micromamba"  #: one file, without a base environment
    MINIFORGE = "miniforge"  #: conda and mamba with conda-forge
    CONDA = "conda"  #: whatever ``conda`` is on the PATH


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where a conda family is, for those who want one; ``binaries`` maps a platform to micromamba's path."""

    mode: RuntimeMode = RuntimeMode.SYSTEM
    conda_type: CondaType = CondaType.CONDA
    prefix: Path | None = None
    binaries: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SubstrateConfig:
    """What a `PluginManager` is made with."""

    drift_detection: bool = True
    empirical_tracking: bool = True
    prefetch_stall_threshold_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class CJMConfig:
    """The settings of a host."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data_dir: Path = field(default_factory=lambda: Path.home() / ".cjm")
    plugins_config: Path = Path("plugins.yaml")
    models_dir: Path | None = None
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)

    @property
    def manifests_dir(self) -> Path:
        """Where the installer puts manifests."""
        return self.data_dir / "manifests"

    @property
    def plugin_data_dir(self) -> Path:
        """What the plugins' own folders lie in."""
        return self.data_dir / "data"

    @property
    def logs_dir(self) -> Path:
        """Where the logs of instances are."""
        return self.data_dir / "logs"


def load_config(
    path: Path | None = None,
    *,
    data_dir: Path | None = None,
    conda_prefix: Path | None = None,
    conda_type: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> CJMConfig:
    """Return the settings: those given here, over the environment's, over the file's, over the defaults.

    The file is ``path``, or ``cjm.yaml`` in the current folder if there is one. A path that is given and not there, and
    anything wrong in the file or the environment, is one `PluginConfigError` with every violation.
    """
    variables = os.environ if environ is None else environ
    found = path or (Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None)
    config = _read(found) if found is not None else CJMConfig()
    chosen_dir = data_dir or _path_in(variables, "CJM_DATA_DIR")
    chosen_prefix = conda_prefix or _path_in(variables, "CJM_CONDA_PREFIX")
    where = "--conda-type" if conda_type else "CJM_CONDA_TYPE"
    chosen_type = conda_type or variables.get("CJM_CONDA_TYPE")
    if chosen_type and chosen_type not in set(CondaType):
        raise PluginConfigError(f"{where} must be one of {', '.join(CondaType)}, not {chosen_type!r:.80}")
    runtime = replace(
        config.runtime,
        prefix=chosen_prefix or config.runtime.prefix,
        conda_type=CondaType(chosen_type) if chosen_type else config.runtime.conda_type,
    )
    return replace(config, data_dir=chosen_dir or config.data_dir, runtime=runtime)


def _path_in(variables: Mapping[str, str], name: str) -> Path | None:
    return Path(variables[name]) if variables.get(name) else None


class _Default:
    """The settings of this process's command line."""

    config: CJMConfig | None = None


_default = _Default()


def get_config() -> CJMConfig:
    """Return the default settings, read at the first use."""
    if _default.config is None:
        _default.config = load_config()
    return _default.config


def set_config(config: CJMConfig) -> None:
    """Make these the default settings."""
    _default.config = config


def reset_config() -> None:
    """Forget the default settings: the next use reads them anew."""
    _default.config = None


# -- the file


def _read(path: Path) -> CJMConfig:
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise PluginConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise PluginConfigError(f"{path} cannot be read: {error}") from error
    problems: list[str] = []
    reader = _Reader(path.parent.resolve(), problems)
    values = {} if node is None else reader.section(node, "", _TOP)
    if problems:
        raise PluginConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return CJMConfig(**values)


class _Reader:
    """Turns nodes into values. What is wrong goes to ``problems`` with its line."""

    def __init__(self, base: Path, problems: list[str]) -> None:
        self._base = base
        self._problems = problems

    def section(self, node: Any, name: str, known: Mapping[str, Callable[[_Reader, Any, str], Any]]) -> dict[str, Any]:
        """Return the values of a mapping by key; unknown and repeated keys are problems."""
        values: dict[str, Any] = {}
        for key, value in self.entries(node, name or "the top level"):
            place = f"{name}.{key}" if name else key
            if key not in known:
                self.problem(value, f"unknown key {place!r}; known: {', '.join(known)}")
            elif key in values:
                self.problem(value, f"{place} is given twice")
            else:
                values[key] = known[key](self, value, place)
        return values

    def entries(self, node: Any, place: str) -> list[tuple[str, Any]]:
        import yaml

        if isinstance(node, yaml.MappingNode):
            return [(str(key.value), value) for key, value in node.value]
        self.problem(node, f"{place} must be a mapping")
        return []

    def scalar(self, node: Any, place: str, wanted: str, *tags: str) -> str | None:
        """Return a scalar's text if YAML takes it for one of the types, else None and a problem."""
        import yaml

        if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in tags and node.value.strip():
            return str(node.value)
        shown = node.value if isinstance(node, yaml.ScalarNode) else node.tag.rpartition(":")[2]
        self.problem(node, f"{place} must be {wanted}, not {shown!r:.80}")
        return None

    def truth(self, node: Any, place: str) -> bool:
        text = self.scalar(node, place, "true or false", "bool")
        return (text or "").lower() in {"true", "yes", "on"}

    def seconds(self, node: Any, place: str) -> float:
        text = self.scalar(node, place, "a number of seconds above 0", "int", "float")
        try:
            number = float(text or "1")
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.problem(node, f"{place} must be a number of seconds above 0, not {text!r:.80}")
        return number

    def path(self, node: Any, place: str) -> Path:
        text = self.scalar(node, place, "a path", "str") or "."
        if text.startswith("~"):
            self.problem(node, f"{place}: ~ is not expanded; write the whole path, or one relative to this file")
        return (self._base / text).resolve()

    def choice(self, node: Any, place: str, choices: type[StrEnum]) -> StrEnum:
        wanted = f"one of {', '.join(choices)}"
        text = self.scalar(node, place, wanted, "str")
        if text is not None and text not in set(choices):
            self.problem(node, f"{place} must be {wanted}, not {text!r:.80}")
        return choices(text) if text in set(choices) else next(iter(choices))

    def problem(self, node: Any, text: str) -> None:
        self._problems.append(f"line {node.start_mark.line + 1}: {text}")


def _runtime(reader: _Reader, node: Any, place: str) -> RuntimeConfig:
    return RuntimeConfig(**reader.section(node, place, _RUNTIME))


def _substrate(reader: _Reader, node: Any, place: str) -> SubstrateConfig:
    return SubstrateConfig(**reader.section(node, place, _SUBSTRATE))


def _binaries(reader: _Reader, node: Any, place: str) -> dict[str, Path]:
    return {key: reader.path(value, f"{place}.{key}") for key, value in reader.entries(node, place)}


_RUNTIME: Mapping[str, Callable[[_Reader, Any, str], Any]] = {
    "mode": lambda reader, node, place: reader.choice(node, place, RuntimeMode),
    "conda_type": lambda reader, node, place: reader.choice(node, place, CondaType),
    "prefix": _Reader.path,
    "binaries": _binaries,
}
_SUBSTRATE: Mapping[str, Callable[[_Reader, Any, str], Any]] = {
    "drift_detection": _Reader.truth,
    "empirical_tracking": _Reader.truth,
    "prefetch_stall_threshold_seconds": _Reader.seconds,
}
_TOP: Mapping[str, Callable[[_Reader, Any, str], Any]] = {
    "runtime": _runtime,
    "data_dir": _Reader.path,
    "plugins_config": _Reader.path,
    "models_dir": _Reader.path,
    "substrate": _substrate,
}
