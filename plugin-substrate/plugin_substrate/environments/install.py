"""Brings a host to what ``plugins.yaml`` says: environment, package, description, manifest; a second time does nothing.

What was installed is stamped with a digest over the plugin's sources, its spec and the interpreter, so an unchanged
plugin costs reading its files. The manifest goes first and comes last: what is half-done is not there.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plugin_substrate.config_check import checker_of
from plugin_substrate.environments.spec import PluginSpec, distribution_name
from plugin_substrate.environments.uv import (
    create_environment,
    environment_python,
    find_interpreter,
    install_libraries,
    install_package,
    installing,
)
from plugin_substrate.errors import ManifestError, PluginConfigError, PluginError, PluginFatalError
from plugin_substrate.lifecycle import WORKER_MAIN, interpreter_command
from plugin_substrate.manifest import (
    FORMAT_VERSION,
    ManifestV2,
    compute_config_schema_hash,
    load_manifest,
    parse_manifest,
    parse_strict_json,
    write_manifest,
)
from plugin_substrate.stores.files import PASSAGE
from plugin_substrate.worker.isolation import IsolationProfile, profile_to_json, resolve_profile
from plugin_substrate.worker.text import clean_text

INSTALLER_VERSION = "cjm-ctl 0.1.0"
_HALF_DONE = Path(".cjm", "half-done")
"""Stands in an environment while packages are put into it; one that still has it is made anew, with all its plugins."""

_DESCRIBE_SECONDS = 120.0
_MAX_DESCRIPTION_BYTES = 1 << 20
_NOT_SOURCE = {"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
_BUILD_OUTPUT = {"build", "dist"}
_CODE_KEYS = frozenset({
    "name", "version", "description", "module", "class", "interface", "idempotent", "stateless", "preload",
    "capabilities", "taxonomy", "resources", "config_schema", "worker_env", "isolation",
})  # fmt: skip


_INSTALL_KEYS = frozenset({"python_path", "db_path", "env_vars"})


@dataclass(frozen=True, kw_only=True)
class InstallOutcome:
    """What became of one plugin: ``unchanged``, ``granted`` (new terms alone), ``installed``, or ``failed`` and why."""

    name: str
    status: str
    reason: str = ""


class Installer:
    """Installs plugins below one data directory; one run of it makes each environment at most once."""

    def __init__(self, data_dir: Path, *, force: bool = False) -> None:
        self._data_dir = data_dir.resolve()
        self._force = force
        self._made: set[str] = set()

    def install(self, spec: PluginSpec) -> InstallOutcome:
        """Bring one plugin up to date; when it cannot be, the reason is the outcome."""
        try:
            digest = _digest(spec)
            self._data_dir.mkdir(parents=True, exist_ok=True, mode=PASSAGE)
            with installing(self._data_dir / "envs") as lock:
                if not self._force and self._is_current(spec, digest):
                    status = self._grant(spec)
                else:
                    self._manifest(spec).unlink(missing_ok=True)
                    self._stamp(spec).unlink(missing_ok=True)
                    self._install(spec, lock)
                    self._stamp(spec).write_text(digest, encoding="ascii")
                    status = "installed"
                return InstallOutcome(name=spec.name, status=status, reason=self._missing_grant(spec))
        except (PluginError, OSError) as error:
            return InstallOutcome(name=spec.name, status="failed", reason=str(error))

    def _install(self, spec: PluginSpec, lock: int) -> None:
        if spec.folder is not None and not spec.folder.is_dir():
            raise PluginConfigError(f"the package folder {spec.folder} does not exist")
        folder = self._data_dir / "envs" / spec.env_name
        self._make_environment(spec, folder, lock)
        distribution = distribution_name(spec)
        half_done = folder / _HALF_DONE
        half_done.touch()
        libraries = (*spec.interface_libs, *spec.env_requirements)
        if libraries:
            install_libraries(environment_python(folder), libraries, lock=lock)
        install_package(folder, distribution, spec.requirement, lock=lock, editable=spec.editable)
        described = describe_distribution(environment_python(folder), distribution)
        if described.get("name") != spec.name:
            raise PluginConfigError(f"the plugin calls itself {described.get('name')!r}, plugins.yaml {spec.name!r}")
        compile_our_files(environment_python(folder))
        half_done.unlink()
        write_manifest(self._manifest(spec), _manifest(described, environment_python(folder), spec))

    def _grant(self, spec: PluginSpec) -> str:
        """Bring the operator's part of an installed manifest to what the spec says."""
        manifest = load_manifest(self._manifest(spec))
        kept = {key: value for key, value in manifest.overrides.items() if key not in ("isolation", "require")}
        overrides = {**kept, **_operators_part(spec)}
        if overrides == manifest.overrides:
            return "unchanged"
        write_manifest(self._manifest(spec), replace(manifest, overrides=overrides))
        return "granted"

    def _missing_grant(self, spec: PluginSpec) -> str:
        """Return why a manager with default settings will not load the plugin as long as no more is granted."""
        manifest = load_manifest(self._manifest(spec))
        try:
            resolve_profile(spec.name, manifest.asked_isolation, manifest.granted_isolation, IsolationProfile())
        except PluginConfigError as error:
            return str(error)
        return ""

    def _make_environment(self, spec: PluginSpec, folder: Path, lock: int) -> None:
        interpreter = find_interpreter(spec.python_version)
        note = folder / ".cjm" / "interpreter"
        made_with = note.read_text(encoding="utf-8") if note.is_file() else ""
        whole = environment_python(folder).exists() and not (folder / _HALF_DONE).exists()
        usable = whole and made_with == str(interpreter)
        if spec.env_name not in self._made and (self._force or not usable):
            create_environment(folder, interpreter, lock=lock)
            note.parent.mkdir(mode=0o700)
            note.write_text(str(interpreter), encoding="utf-8")
        self._made.add(spec.env_name)

    def _is_current(self, spec: PluginSpec, digest: str) -> bool:
        stamp, folder = self._stamp(spec), self._data_dir / "envs" / spec.env_name
        there = [stamp, self._manifest(spec), environment_python(folder)]
        whole = all(path.is_file() for path in there) and not (folder / _HALF_DONE).exists()
        return whole and stamp.read_text(encoding="ascii") == digest

    def _manifest(self, spec: PluginSpec) -> Path:
        return self._data_dir / "manifests" / f"{spec.name}.json"

    def _stamp(self, spec: PluginSpec) -> Path:
        return self._data_dir / "envs" / spec.env_name / ".cjm" / f"{spec.name}.stamp"


def compile_our_files(python: Path) -> None:
    """Have an interpreter compile what its supervisors will import, as they never do that themselves.

    It saves them half of their start. Where our files cannot be written beside, each start compiles them anew.
    """
    package = WORKER_MAIN.parent.parent
    files = [str(WORKER_MAIN.parent), *(str(package / f"{name}.py") for name in ("interface", "errors", "records"))]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [str(python), "-I", "-S", "-m", "compileall", "-q", *files],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DESCRIBE_SECONDS,
            check=False,
        )


def describe_distribution(python: Path, distribution: str) -> dict[str, Any]:
    """Run ``get_plugin_metadata()`` in the plugin's environment, with our interface served by path.

    It runs foreign code, as installing did before: with a clean environment, a time limit and one bounded answer, in a
    file so that whatever the code leaves behind cannot hold us up.
    """
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as output:
        try:
            subprocess.run(
                interpreter_command(str(python), "describe", str(answer.fileno()), distribution),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": tempfile.gettempdir()},
                pass_fds=(answer.fileno(),),
                start_new_session=True,
                timeout=_DESCRIBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PluginFatalError(f"describing {distribution} took longer than {_DESCRIBE_SECONDS:.0f} s") from None
        answer.seek(0)
        raw = answer.read(_MAX_DESCRIPTION_BYTES)
        output.seek(0)
        said = clean_text(output.read(2000).decode(errors="replace").strip(), 2000)
    return _described(raw, distribution, said)


def _described(raw: bytes, distribution: str, said: str) -> dict[str, Any]:
    try:
        answer = parse_strict_json(raw)
    except ValueError:
        raise PluginFatalError(f"describing {distribution} gave no answer: {said or 'it said nothing'}") from None
    match answer:
        case {"metadata": dict() as metadata}:
            return metadata
        case {"problem": str() as problem}:
            raise PluginConfigError(clean_text(problem, 2000))
    raise PluginFatalError(f"describing {distribution} gave an answer of the wrong shape")


def _manifest(described: dict[str, Any], python: Path, spec: PluginSpec) -> ManifestV2:
    install: dict[str, Any] = {
        "python_path": str(python),
        "package_source": spec.requirement,
        "installer_version": INSTALLER_VERSION,
        "installed_at": _now(),
        "source_paths": [str(spec.folder)] if spec.editable and spec.folder else [],
    }
    install |= {key: described[key] for key in ("db_path", "env_vars") if key in described}
    return manifest_of(described, install, _operators_part(spec), spec.name)


def manifest_of(described: dict[str, Any], install: dict[str, Any], overrides: dict[str, Any], name: str) -> ManifestV2:
    """Return the manifest of what a plugin says about itself, checked with the rules of every manifest.

    ``python_path`` is the installer's business, so what the plugin says of it is not heard.
    """
    unknown = sorted(set(described) - _CODE_KEYS - _INSTALL_KEYS)
    if unknown:
        raise ManifestError([f"get_plugin_metadata() has unknown keys: {', '.join(unknown)}"], source=name)
    code = {key: value for key, value in described.items() if key in _CODE_KEYS}
    schema = code.get("config_schema")
    if isinstance(schema, dict):
        checker_of(name, schema)  # an unusable one is found here, and not at the first load
    data = {
        "format_version": FORMAT_VERSION,
        "install": install,
        "code": {**code, "regenerated_at": _now()},
        "drift_tracking": {
            "config_schema_hash": compute_config_schema_hash(schema if isinstance(schema, dict) else None)
        },
        "overrides": overrides,
    }
    return parse_manifest(data, source=name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _operators_part(spec: PluginSpec) -> dict[str, Any]:
    part = {"isolation": profile_to_json(spec.isolation), "require": list(spec.require)}
    return {key: value for key, value in part.items() if value}


def _digest(spec: PluginSpec) -> str:
    """Return a digest over everything an installation depends on that can be read here."""
    digest = hashlib.sha256()
    parts = [spec.requirement, spec.env_name, spec.python_version, str(spec.editable), INSTALLER_VERSION]
    parts += [str(find_interpreter(spec.python_version)), *spec.interface_libs, *spec.env_requirements]
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    for file in _sources(spec.folder) if spec.folder else ():
        relative = str(file.relative_to(spec.folder or "")).encode()
        digest.update(b"%d:%s" % (len(relative), relative) + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _sources(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        ignored = _NOT_SOURCE | (_BUILD_OUTPUT if Path(place) == folder else set())
        folders[:] = sorted(name for name in folders if name not in ignored and not name.endswith(".egg-info"))
        for name in sorted(files):
            if not name.endswith(".pyc"):
                yield Path(place, name)
