"""Guardrails that no linter knows, run on the sources.

BL5  Only the emitter and the migrations write raw INSERTs into the ledger. A warning; an error with --strict.
BL6  Only the places allowed here may touch ``with_system_identity`` and ``SystemIdentities``. An exemption
     needs a record in plm-engine-core/docs/adr/, named beside its entry.

Each finding is one line, ``RULE path:line message``. Status 0: clean, or warnings only; 1: violations; 2: wrong usage,
or a file that cannot be read as Python.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LEDGER_TABLES = ("telemetry_events", "llm_calls", "connector_calls", "pricing_snapshots")
LEDGER_WRITERS = {"kernel_api.py", "sqlalchemy_kernel_emitter.py"}

SYSTEM_IDENTITY = ("with_system_identity", "SystemIdentities")
SYSTEM_IDENTITY_HOMES = (
    "plm_engine_core/control_plane/identity/system.py",
    "plm_engine_core/control_plane/identity/__init__.py",
    "backend/scripts/architecture_guardrails.py",
    # plm-engine-core/docs/adr/0001-work-that-time-asks-for.md
    "plm_engine_core/control_plane/recovery.py",
    "plm_engine_core/control_plane/events/checkpointer.py",
    "plm_engine_core/control_plane/events/archive.py",
    "plm_backend/wiring.py",
)

_SKIPPED = {".git", ".venv", ".state", "build", "dist", "node_modules", "__pycache__"}
_RAW_INSERT = re.compile(
    rf"""\binsert\s+into\s+(?:only\s+)?(?:"?\w+"?\s*\.\s*)?"?({"|".join(LEDGER_TABLES)})\b""", re.IGNORECASE
)


class UnreadableFile(Exception):
    """A file that the rules cannot judge."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place that breaks a rule."""

    rule: str
    path: PurePosixPath
    line: int
    message: str

    def __str__(self) -> str:
        """Render as the script prints it."""
        return f"{self.rule} {self.path}:{self.line} {self.message}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file: its path below the root, and its text."""

    path: PurePosixPath
    text: str


def raw_ledger_inserts(source: Source) -> Iterator[Finding]:
    """BL5: a raw INSERT into a ledger table, in Python or in a .sql file, line breaks included."""
    parts = source.path.parts
    if source.path.name in LEDGER_WRITERS and "plm_shared" in parts:
        return
    if "migrations" in parts:
        return
    for match in _RAW_INSERT.finditer(source.text):
        line = source.text.count("\n", 0, match.start()) + 1
        message = f"raw INSERT INTO {match[1].lower()}; only the emitter writes the ledger"
        yield Finding(rule="BL5", path=source.path, line=line, message=message)


def system_identity_users(source: Source) -> Iterator[Finding]:
    """BL6: an import, an attribute or a name that reaches the platform's own identity, renamed or not."""
    if source.path.suffix != ".py" or _may_act_as_system(source.path):
        return
    try:
        tree = ast.parse(source.text, filename=str(source.path))
    except (SyntaxError, ValueError) as error:
        raise UnreadableFile(f"{source.path} cannot be read as Python: {error}") from error
    for node in ast.walk(tree):
        how = _use(node)
        if how:
            message = f"{how}; see plm-engine-core/docs/adr/"
            yield Finding(rule="BL6", path=source.path, line=node.lineno, message=message)  # type: ignore[attr-defined]


def _may_act_as_system(path: PurePosixPath) -> bool:
    text = str(path)
    return (
        any(text == home or text.endswith(f"/{home}") for home in SYSTEM_IDENTITY_HOMES)
        or "/plm_engine_core/cli/" in f"/{text}"
        or "tests" in path.parts
    )


def _use(node: ast.AST) -> str | None:
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        for name in SYSTEM_IDENTITY:
            if name in names:
                return f"imports {name}"
        if "*" in names and (node.module or "").rpartition(".")[2] in {"identity", "system"}:
            return f"imports with *, which may bring {SYSTEM_IDENTITY[0]}"
    if isinstance(node, ast.Attribute) and node.attr in SYSTEM_IDENTITY:
        return f"reaches {node.attr}"
    if isinstance(node, ast.Constant) and node.value in SYSTEM_IDENTITY:
        return f"names in text {node.value}"  # getattr(identity, "with_system_identity")
    return None


RULES: dict[str, Callable[[Source], Iterator[Finding]]] = {
    "BL5": raw_ledger_inserts,
    "BL6": system_identity_users,
}
WARN_ONLY = {"BL5"}


def sources(root: Path) -> Iterator[Source]:
    """Every Python and SQL file below the root, in order; what tools leave behind is skipped."""
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.suffix not in {".py", ".sql"} or not path.is_file() or _SKIPPED.intersection(below.parts):
            continue
        try:
            yield Source(path=PurePosixPath(below.as_posix()), text=path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"{below} cannot be read: {error}") from error


def check(root: Path, rules: list[str]) -> list[Finding]:
    """Apply the rules to every file below the root."""
    return [finding for source in sources(root) for rule in rules for finding in RULES[rule](source)]


def main(arguments: list[str] | None = None) -> int:
    """Run the script; answers the exit status."""
    parser = argparse.ArgumentParser(description="Check the rules that no linter knows.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="folder to check (the repository)")
    parser.add_argument("--rule", action="append", choices=sorted(RULES), help="check only this rule; may be repeated")
    parser.add_argument("--strict", action="store_true", help="warnings count as violations")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        parser.error(f"--root {options.root} is not a folder")
    try:
        findings = check(options.root, options.rule or sorted(RULES))
    except UnreadableFile as error:
        print(f"architecture_guardrails: {error}", file=sys.stderr)
        return 2
    for finding in findings:
        warning = finding.rule in WARN_ONLY and not options.strict
        print(f"{finding}{' (warning)' if warning else ''}")
    return int(any(options.strict or finding.rule not in WARN_ONLY for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
