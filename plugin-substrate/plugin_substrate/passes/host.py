"""The one-shot pass over the files of one folder: a list of plugins, each confined, each with all or nothing."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.errors import PluginError
from plugin_substrate.file_plugin import PluginContext
from plugin_substrate.lifecycle import Supervisor
from plugin_substrate.passes.carry_over import TreeChangedError
from plugin_substrate.passes.handshake import MalformedError, parse_question, parse_result
from plugin_substrate.passes.log import PassLog, run_id_of
from plugin_substrate.passes.part import EXIT_FAILED, EXIT_HOST, EXIT_INPUT_REQUIRED, Part
from plugin_substrate.passes.pass_worker import PassWorker, WorkerTerms
from plugin_substrate.passes.records import (
    InputDeclined,
    InputRequiredPayload,
    PassLimits,
    PluginPassResult,
    PluginRecord,
    PluginRegistryProtocol,
    PluginStatus,
    ProtectedPaths,
)
from plugin_substrate.passes.workspace import Stage, Workspace

__all__ = ["PluginHost"]

_VALIDATION_SECONDS, _VALIDATION_CPU_SECONDS, _VALIDATION_MEMORY_BYTES = 10.0, 5, 256 << 20

_CANCELLED = "cancelled"

Answer = Mapping[str, Any] | InputDeclined | None
OnInputRequired = Callable[[InputRequiredPayload], Awaitable[Answer]]


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What the parts of one pass share."""

    ctx: PluginContext
    root: Path
    workspace: Workspace
    supervisor: Supervisor
    on_input_required: OnInputRequired


class PluginHost:
    """Runs file plugins over a folder. Whatever a plugin does, a pass ends and has a record for each plugin.

    Each plugin works on a copy of the folder, in a worker of its own that may read nothing else but its own package and
    the interpreter. When its hooks have returned and its worker is dead, the copy is compared with the folder; what is
    allowed is carried over, all of it or nothing. A violation, a failure, a time-out, a cancel and a dry run leave the
    folder as it was. Carrying over makes a file that had several names one of its own, and does not keep extended
    attributes of changed files. A tree beyond `PassLimits` is worked on in place instead, and its record says so: there
    only what is protected is put back.
    """

    def __init__(
        self,
        registry: PluginRegistryProtocol,
        *,
        central_log_dir: Path | None = None,
        protected: ProtectedPaths | None = None,
        limits: PassLimits | None = None,
        env_prefix: str = "",
        forward_env: Iterable[str] = (),
        fatal_variable: str = "",
        run_unlisted: bool = True,
        work_dir: Path | None = None,
    ) -> None:
        """``protected`` names what no plugin may touch.

        Of the host's environment a worker gets the variables in ``forward_env``, all of which begin with
        ``env_prefix``; anything else is a ValueError. ``fatal_variable`` names the variable of a pass that makes the
        first failure its end. ``run_unlisted`` has plugins that match a file run after those that were listed, by name.
        Copies are made in ``work_dir``: on the file system of the folder they may share its blocks.
        """
        self._registry = registry
        self._log_dir = central_log_dir
        self._protected = protected or ProtectedPaths()
        self._limits = limits or PassLimits()
        self._forward_env = tuple(forward_env)
        foreign = [name for name in self._forward_env if not env_prefix or not name.startswith(env_prefix)]
        if foreign:
            raise ValueError(f"forward_env: {foreign[0]!r} does not begin with env_prefix, which is {env_prefix!r}")
        self._fatal_variable = fatal_variable
        self._run_unlisted = run_unlisted
        self._work_dir = work_dir

    async def run_pass(
        self,
        ctx: PluginContext,
        file_paths: Sequence[str | Path],
        plugin_order: Sequence[str],
        on_input_required: OnInputRequired,
    ) -> PluginPassResult:
        """Run the plugins in the order given over those files that each supports.

        ``file_paths`` are absolute or relative to ``ctx.dst_root``, and lie in it; a ValueError names one that does
        not. A folder that is not there is a FileNotFoundError. ``on_input_required`` answers questions: a mapping is
        handed to the plugin, `InputDeclined` fails it, and None cancels the pass. What that function raises is raised
        here, with the folder as it was.
        """
        root = ctx.dst_root.resolve(strict=True)
        files = [_relative(root, path) for path in file_paths]
        supervisor = Supervisor(sys.executable)
        workspace = Workspace(
            root, self._work_dir, protected=self._protected, limits=self._limits, supervisor=supervisor.pid
        )
        try:
            one_pass = _Pass(
                ctx=ctx,
                root=root,
                workspace=workspace,
                supervisor=supervisor,
                on_input_required=on_input_required,
            )
            return await self._run(one_pass, files, plugin_order)
        finally:
            await supervisor.close()
            await workspace.do(workspace.close)

    async def _run(self, one_pass: _Pass, files: Sequence[str], plugin_order: Sequence[str]) -> PluginPassResult:
        applied: list[dict[str, Any]] = []
        aborted, stopped_by = False, ""
        for name in [*plugin_order, *self._unlisted(files, plugin_order)]:
            record = self._registry.get_record(name)
            part = Part(name=name, record=record)
            matching = list(filter(record.supports, files)) if record else []
            if record is None:
                part.fail(EXIT_HOST, f"unknown plugin {name!r}")
            elif stopped_by:
                part.error = f"not run: {stopped_by} failed, and {self._fatal_variable} is set"
            elif matching:
                aborted = await self._run_one(one_pass, part, record, matching)
            applied.append(part.applied())
            if aborted:
                break
            failed = part.status not in (PluginStatus.SUCCESS, PluginStatus.SKIPPED)
            if failed and self._fatal_variable and one_pass.ctx.variables.get(self._fatal_variable):
                stopped_by = stopped_by or name
        return PluginPassResult(applied=applied, aborted=aborted)

    def _unlisted(self, files: Sequence[str], listed: Sequence[str]) -> list[str]:
        if not self._run_unlisted:
            return []
        others = [record for record in self._registry.list_all() if record.name not in listed]
        return sorted(record.name for record in others if any(map(record.supports, files)))

    async def _run_one(self, one_pass: _Pass, part: Part, record: PluginRecord, files: list[str]) -> bool:
        """Run one plugin to its record; tells whether the pass was cancelled over it."""
        try:
            stage = await one_pass.workspace.do(one_pass.workspace.stage)
            log = PassLog(record.name, self._log_path(one_pass.ctx, record), most_bytes=self._limits.log_bytes)
        except OSError as error:
            part.fail(EXIT_HOST, f"staging_failed: {error}")
            return False
        part.staging = stage.how
        cancelled = False
        try:
            if await self._is_valid(one_pass, part, record, stage, log):
                cancelled = await self._transform(one_pass, part, record, stage, log, files)
            await self._judge(one_pass, part, stage)
        except BaseException:
            await one_pass.workspace.do(stage.reject)
            raise
        finally:
            log.close()
        return cancelled

    async def _is_valid(self, one_pass: _Pass, part: Part, record: PluginRecord, stage: Stage, log: PassLog) -> bool:
        """Have the plugin look at the variables, in a worker with the bounds of a look."""
        terms = self._terms(
            one_pass, stage, log, _VALIDATION_SECONDS, _VALIDATION_CPU_SECONDS, _VALIDATION_MEMORY_BYTES
        )
        worker = PassWorker(one_pass.supervisor, record, terms)
        try:
            await worker.start()
            answer = await worker.ask("validate", variables=dict(one_pass.ctx.variables))
            errors = answer.get("errors") if isinstance(answer, dict) else None
            if not isinstance(errors, list) or not all(isinstance(error, str) for error in errors):
                part.fail(EXIT_HOST, "malformed_result: validate_variables", crash=True)
            elif errors:
                part.fail(EXIT_FAILED, "; ".join(errors))
        except PluginError as error:
            part.fail_with(error)
        finally:
            await worker.end()
            part.count(worker)
        return part.status is PluginStatus.SKIPPED

    async def _transform(
        self, one_pass: _Pass, part: Part, record: PluginRecord, stage: Stage, log: PassLog, files: list[str]
    ) -> bool:
        request = {
            "plugin_module": record.module_name,
            "context": _context_json(one_pass.ctx, one_pass.root, stage.tree),
            "files": files,
            "dry_run": one_pass.ctx.dry_run,
        }
        if _json_bytes({**request, "extra_inputs": None}) > self._limits.frame_bytes:
            part.fail(EXIT_HOST, "ipc_frame_oversize")
            return False
        seconds = float(record.timeout_seconds)
        terms = self._terms(one_pass, stage, log, seconds, 2 * record.timeout_seconds, record.memory_mb << 20)
        worker = PassWorker(one_pass.supervisor, record, terms)
        try:
            await worker.start()
            return await self._converse(one_pass, part, worker, request, frozenset(files))
        except PluginError as error:
            part.fail_with(error)
        finally:
            await worker.end()
            part.count(worker)
        return False

    async def _converse(
        self, one_pass: _Pass, part: Part, worker: PassWorker, request: dict[str, Any], files: frozenset[str]
    ) -> bool:
        """Ask for the run, and put the plugin's questions until it has ended."""
        answer = await worker.ask("run", **request, extra_inputs=None)
        for _ in range(self._limits.questions + 1):
            try:
                result = parse_result(answer, files, most_bytes=self._limits.frame_bytes)
                part.heard(result)
                if result["result"] != "input_required":
                    return False
                question = parse_question(part.name, result["input_required"])
            except MalformedError as error:
                part.fail(EXIT_INPUT_REQUIRED if part.exit_code == EXIT_INPUT_REQUIRED else EXIT_HOST, str(error))
                return False
            inputs = await self._put(one_pass, part, question)
            if inputs is None:
                return part.error == _CANCELLED
            if _json_bytes(inputs) > self._limits.frame_bytes:
                part.fail(EXIT_HOST, "ipc_frame_oversize")
                return False
            answer = await worker.ask("resume", extra_inputs=dict(inputs))
        part.fail(EXIT_INPUT_REQUIRED, f"it asked more than {self._limits.questions} times")
        return False

    async def _put(self, one_pass: _Pass, part: Part, question: InputRequiredPayload) -> Mapping[str, Any] | None:
        """Put a question; None when there is no answer, and then the record says why."""
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                answer: object = await one_pass.on_input_required(question)
        except TimeoutError:
            part.fail(EXIT_INPUT_REQUIRED, f"no answer in {self._limits.answer_seconds:g} s")
            return None
        if answer is None:
            part.fail(EXIT_INPUT_REQUIRED, _CANCELLED)
            return None
        if isinstance(answer, InputDeclined):
            part.fail(EXIT_INPUT_REQUIRED, "declined")
            return None
        if not isinstance(answer, Mapping):
            part.fail(EXIT_INPUT_REQUIRED, f"malformed_answer: it is a {type(answer).__name__} and no mapping")
            return None
        return answer

    async def _judge(self, one_pass: _Pass, part: Part, stage: Stage) -> None:
        """Compare, then carry over or have nothing of it. The worker is dead."""
        do = one_pass.workspace.do
        try:
            changes = await do(stage.changes)
            if changes.violations:
                part.violated(changes)
            elif part.status is PluginStatus.SKIPPED and not one_pass.ctx.dry_run:
                await do(stage.accept, changes)
                part.changed(changes)
                return
        except TreeChangedError as error:
            part.fail(EXIT_HOST, f"tree_changed: {error}")
        except OSError as error:
            part.fail(EXIT_HOST, f"apply_failed: {error}")
        try:
            await do(stage.reject)
        except OSError as error:
            part.error = f"restore_failed: {error}; {part.error}"

    def _terms(
        self, one_pass: _Pass, stage: Stage, log: PassLog, seconds: float, cpu_seconds: int, memory_bytes: int
    ) -> WorkerTerms:
        return WorkerTerms(
            tree=stage.tree,
            scratch=one_pass.workspace.scratch(),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            memory_bytes=memory_bytes,
            file_bytes=self._limits.file_bytes,
            disk_bytes=stage.disk_bytes,
            look=one_pass.ctx.dry_run and not stage.is_copy,
            environment={name: os.environ[name] for name in self._forward_env if name in os.environ},
            on_line=log.line,
        )

    def _log_path(self, ctx: PluginContext, record: PluginRecord) -> Path | None:
        if self._log_dir is None:
            return None
        run_id = run_id_of(str(ctx.variables.get("run_id") or ""), ctx.project, ctx.template_name, ctx.dst_root.name)
        return self._log_dir / "plugins" / record.name / f"{run_id}.stderr"


def _relative(root: Path, path: str | Path) -> str:
    """Return a file's path below the root, with slashes; a ValueError when it does not lie there."""
    whole = Path(os.path.normpath(root / path))
    if not whole.is_relative_to(root) or whole == root:
        raise ValueError(f"file_paths: {str(path)!r} does not lie in {str(root)!r}")
    return whole.relative_to(root).as_posix()


def _context_json(ctx: PluginContext, root: Path, tree: Path) -> dict[str, Any]:
    """Return the context as it crosses to the worker, with the copy in the place of the folder."""
    answers = ctx.answers_file and Path(os.path.normpath(root / ctx.answers_file))
    return {
        "variables": dict(ctx.variables),
        "dst_root": str(tree),
        "answers_file": str(tree / answers.relative_to(root)) if answers and answers.is_relative_to(root) else None,
        "template_name": ctx.template_name,
        "template_version": ctx.template_version,
        "run_kind": ctx.run_kind,
        "equipment_id": ctx.equipment_id,
        "project": ctx.project,
        "dry_run": ctx.dry_run,
    }


def _json_bytes(value: Any) -> int:
    """Return the size of a value as JSON; 0 for what is none, which the worker's connection refuses and names."""
    try:
        return len(json.dumps(value, default=str))
    except (TypeError, ValueError, RecursionError):
        return 0
