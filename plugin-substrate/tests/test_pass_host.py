"""The file pass: what a plugin did well is carried over whole, and of everything else the folder knows nothing."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from file_passes import FATAL, REFERENCE, Write, one, run, snapshot
from plugin_substrate.passes import InputRequiredPayload, PassLimits, PluginHost, PluginRegistry

# -- what is carried over


async def test_changes_of_every_kind_are_carried_over(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform="""
            if path.name == "0.txt":
                path.write_text(path.read_text().upper())
            if path.name == "1.txt":
                path.unlink()
            if path.name == "3.txt":
                path.rename(path.with_name("renamed.txt"))
                path.with_name("3.txt").mkdir()
                (path.with_name("3.txt") / "below.txt").write_text("below")
        """,
        post_transform_all="""
            (ctx.dst_root / "new" / "deep").mkdir(parents=True)
            (ctx.dst_root / "new" / "deep" / "file.md").write_text("new")
            (ctx.dst_root / "script.sh").write_text("#!/bin/sh -e\\n")
            (ctx.dst_root / "here").symlink_to("new/deep")
            (ctx.dst_root / "link").unlink()
            (ctx.dst_root / "link").symlink_to("sub/0.txt")
        """,
    )
    before = snapshot(tree)
    record = await one(packages, tree)
    assert (record["status"], record["isolation"]["exit_code"]) == ("success", 0), record
    assert record["files_affected"] == [
        "here", "link", "new/deep/file.md", "script.sh", "sub/0.txt", "sub/1.txt", "sub/3.txt", "sub/3.txt/below.txt",
        "sub/renamed.txt",
    ]  # fmt: skip
    assert (tree / "sub/0.txt").read_text() == "TEXT 0\n"
    assert not (tree / "sub/1.txt").exists()
    assert (tree / "sub/3.txt/below.txt").read_text() == "below"
    assert (tree / "sub/renamed.txt").read_text() == "text 3\n"
    assert (tree / "link").readlink() == Path("sub/0.txt")
    assert (tree / "here/file.md").read_text() == "new"
    assert stat.S_IMODE((tree / "script.sh").stat().st_mode) == 0o750, "a changed file keeps its permissions"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tree / "new/deep/file.md").stat().st_mode) == 0o666 & ~umask
    after = snapshot(tree)
    for path in ("README.md", "pipe", "second-name.dat", "sub/2.txt", ".exlab-wizard/creation.json"):
        assert after[path] == before[path], "what was not changed is the very same file"
    assert not [path for path in after if ".pass-" in path]


async def test_a_changed_file_with_two_names_changes_under_one(packages: Path, tree: Path, write: Write) -> None:
    write(transform="path.write_text('changed')")
    record = await one(packages, tree, files=["sub/2.txt"])
    assert record["files_affected"] == ["sub/2.txt"]
    assert (tree / "second-name.dat").read_text() == "text 2\n"


async def test_writing_what_is_there_already_is_no_change(packages: Path, tree: Path, write: Write) -> None:
    write(transform="path.write_bytes(path.read_bytes()); os.utime(path, (1, 1))")
    before = snapshot(tree)
    record = await one(packages, tree)
    assert (record["status"], record["files_affected"]) == ("skipped", [])
    assert snapshot(tree) == before


async def test_the_next_plugin_sees_what_the_one_before_did(packages: Path, tree: Path, write: Write) -> None:
    write("first", transform="path.write_text(path.read_text() + 'first\\n')")
    write("broken", transform="path.write_text('broken'); raise PluginError('no')")
    write("second", transform="path.write_text(path.read_text() + 'second\\n')")
    result = await run(packages, tree, ["first", "broken", "second"], files=["sub/0.txt"])
    assert [record["status"] for record in result.applied] == ["success", "failed", "success"]
    assert (tree / "sub/0.txt").read_text() == "text 0\nfirst\nsecond\n"


async def test_the_plugin_sees_a_copy_and_not_the_folder(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform=f"""
            assert not str(path).startswith({str(tree)!r})
            assert Path.cwd() == ctx.dst_root and path.is_relative_to(ctx.dst_root)
            try:
                os.listdir({str(tree)!r})
            except (PermissionError, FileNotFoundError):
                path.write_text("kept out")
        """
    )
    assert (await one(packages, tree))["status"] == "success"
    assert (tree / "sub/0.txt").read_text() == "kept out"


# -- what leaves the folder as it was

VIOLATIONS = {
    "a protected file changed": ("(ctx.dst_root / 'README.md').write_text('mine')", "README.md"),
    "a protected file deleted": ("(ctx.dst_root / '.exlab-answers.yml').unlink()", ".exlab-answers.yml"),
    "a protected name created": ("(ctx.dst_root / 'README.md.jinja').write_text('')", "README.md.jinja"),
    "something below a protected folder": (
        "deep = ctx.dst_root / '.exlab-wizard' / 'deep'\ndeep.mkdir()\n(deep / 'x').write_text('')",
        ".exlab-wizard/deep/x",
    ),
    "a protected file replaced by a link": (
        "(ctx.dst_root / 'README.md').unlink(); (ctx.dst_root / 'README.md').symlink_to('sub/0.txt')",
        "README.md",
    ),
    "an absolute link": ("(ctx.dst_root / 'out').symlink_to('/etc/passwd')", "out"),
    "a link that climbs out": ("(ctx.dst_root / 'sub' / 'out').symlink_to('../../x')", "sub/out"),
    "a link that climbs out through a folder": ("(ctx.dst_root / 'out').symlink_to('sub/../../x')", "out"),
    "a pipe": ("os.mkfifo(ctx.dst_root / 'new-pipe')", "new-pipe"),
    "a name that is no UTF-8": ("open(os.fsencode(ctx.dst_root) + b'/\\xff', 'w').close()", "\\udcff"),
    "a tree without end": (
        "place = ctx.dst_root\nfor _ in range(200):\n    place = place / 'd'\n    place.mkdir()",
        ".",
    ),
}


@pytest.mark.parametrize("case", VIOLATIONS)
async def test_a_violation_leaves_the_folder_as_it_was(packages: Path, tree: Path, write: Write, case: str) -> None:
    body, hit = VIOLATIONS[case]
    write(transform="path.write_text('allowed by itself')", post_transform_all=body)
    before = snapshot(tree)
    record = await one(packages, tree)
    assert record["status"] == "policy_violation", record
    assert hit in record["violations"]
    assert record["files_affected"] == record["violations"]
    assert snapshot(tree) == before


async def test_only_the_exact_names_are_protected(packages: Path, tree: Path, write: Write) -> None:
    write(
        post_transform_all="""
            (ctx.dst_root / 'README.md.notes.txt').write_text('')
            (ctx.dst_root / 'sub/README.md').write_text('')
        """
    )
    assert (await one(packages, tree))["files_affected"] == ["README.md.notes.txt", "sub/README.md"]


@pytest.mark.parametrize(
    ("limits", "body"),
    [
        (PassLimits(file_bytes=1000), "(ctx.dst_root / 'big').write_bytes(b'x' * 1001)"),
        (PassLimits(growth_bytes=3000), "[(ctx.dst_root / str(n)).write_bytes(b'x' * 1001) for n in range(3)]"),
    ],
    ids=["a file", "the tree"],
)
async def test_sizes_are_bounded(packages: Path, tree: Path, write: Write, limits: PassLimits, body: str) -> None:
    write(post_transform_all=body)
    before = snapshot(tree)
    record = await one(packages, tree, limits=limits)
    assert record["status"] in ("policy_violation", "failed"), record
    assert snapshot(tree) == before


ENDS = {
    "a planned failure": ("raise PluginError('not today')", "failed", 1, "not today", False),
    "an exception": ("1 / 0", "failed", 3, "ZeroDivisionError", True),
    "the end of the interpreter": ("sys.exit(5)", "failed", 3, "SystemExit", True),
    "an exit": ("os._exit(7)", "failed", 7, "status 7", False),
    "a signal": ("os.kill(os.getpid(), 9)", "failed", -9, "SIGKILL", False),
    "no end": ("while True: pass", "timeout", 124, "timeout", False),
    "an oversized answer": ("raise PluginError('x' * 3_000_000)", "failed", None, "", False),
}


@pytest.mark.parametrize("case", ENDS)
async def test_a_plugin_that_ends_badly_leaves_the_folder_as_it_was(
    packages: Path, tree: Path, write: Write, case: str
) -> None:
    body, status, exit_code, error, crash = ENDS[case]
    seconds = 1 if status == "timeout" else 60
    write(manifest=f"isolation: {{timeout_seconds: {seconds}}}", transform=f"path.write_text('half done')\n{body}")
    before = snapshot(tree)
    record = await one(packages, tree)
    assert record["status"] == status, record
    assert exit_code in (None, record["isolation"]["exit_code"])
    assert error in record["error"]
    assert len(record["error"]) <= 2000
    assert record.get("crash", False) is crash
    assert snapshot(tree) == before


async def test_a_dry_run_says_what_would_happen_and_does_nothing(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform="path.write_text('done')",
        describe_changes="""
            path.write_text('written all the same')
            return [FileChange(path=path.name, kind='rename', summary='to another name', detail={'to': 'x'})]
        """,
    )
    before = snapshot(tree)
    record = await one(packages, tree, dry_run=True, files=["sub/0.txt"])
    assert (record["status"], record["files_affected"]) == ("skipped", [])
    assert record["per_file"] == [
        {
            "path": "sub/0.txt",
            "status": "described",
            "changes": [{"path": "0.txt", "kind": "rename", "summary": "to another name", "detail": {"to": "x"}}],
        }
    ]
    assert snapshot(tree) == before


async def test_a_cancelled_pass_leaves_the_folder_as_it_was(packages: Path, tree: Path, write: Write) -> None:
    write(transform="path.write_text('half done')\nraise PluginInputRequired([], 'wait')")
    asked = asyncio.Event()

    async def hang(_: InputRequiredPayload) -> None:
        asked.set()
        await asyncio.Event().wait()

    before = snapshot(tree)
    task = asyncio.create_task(run(packages, tree, ask=hang))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert snapshot(tree) == before


async def test_what_somebody_else_changed_meanwhile_is_not_overwritten(
    packages: Path, tree: Path, write: Write
) -> None:
    write(
        transform="path.write_text('mine')",
        post_transform_all="if ctx.extra_inputs is None: raise PluginInputRequired()",
    )

    async def edit(_: InputRequiredPayload) -> dict[str, Any]:
        (tree / "sub/3.txt").write_text("somebody else's")
        return {}

    record = await one(packages, tree, ask=edit)
    assert record["status"] == "failed"
    assert "tree_changed" in record["error"]
    assert "sub/3.txt" in record["error"]
    assert (tree / "sub/0.txt").read_text() == "text 0\n"
    assert (tree / "sub/3.txt").read_text() == "somebody else's"


# -- order and choice


async def test_hooks_run_in_their_order(packages: Path, tree: Path, write: Write) -> None:
    say = "with open(ctx.dst_root / 'order', 'a') as f: f.write({!r} + '\\n')"
    write(
        pre_transform_all=say.format("pre"),
        can_handle="return path.name != '1.txt'",
        transform="with open(ctx.dst_root / 'order', 'a') as f: f.write(path.name + '\\n')",
        post_transform_all=say.format("post"),
    )
    assert (await one(packages, tree))["status"] == "success"
    assert (tree / "order").read_text().split() == ["pre", "0.txt", "2.txt", "3.txt", "post"]


async def test_a_filter_that_raises_fails_its_file_alone(packages: Path, tree: Path, write: Write) -> None:
    write(can_handle="return bool(1 / (path.name != '1.txt'))", transform="path.write_text('x')")
    record = await one(packages, tree)
    assert record["status"] == "success"
    assert record["files_affected"] == ["sub/0.txt", "sub/2.txt", "sub/3.txt"]
    assert record["error"] == "can_handle raised ZeroDivisionError: division by zero"
    assert [entry["path"] for entry in record["per_file"]] == ["sub/1.txt"]


async def test_matching_plugins_that_were_not_listed_run_after_the_others_by_name(
    packages: Path, tree: Path, write: Write
) -> None:
    for name in ("zeta", "alpha", "beta"):
        write(name, transform=f"path.write_text(path.read_text() + {name + ' '!r})")
    write("other", extensions="[.xyz]")
    result = await run(packages, tree, ["zeta"], files=["sub/0.txt"])
    assert [record["plugin"] for record in result.applied] == ["zeta", "alpha", "beta"]
    assert (tree / "sub/0.txt").read_text() == "text 0\nzeta alpha beta "
    listed = await run(packages, tree, ["zeta"], files=["sub/0.txt"], run_unlisted=False)
    assert [record["plugin"] for record in listed.applied] == ["zeta"]


async def test_an_unknown_plugin_is_a_record_and_one_without_files_is_skipped(
    packages: Path, tree: Path, write: Write
) -> None:
    write("other", extensions="[.xyz]")
    result = await run(packages, tree, ["ghost", "other"])
    assert [(record["plugin"], record["status"]) for record in result.applied] == [
        ("ghost", "failed"),
        ("other", "skipped"),
    ]
    assert result.applied[0]["error"] == "unknown plugin 'ghost'"


async def test_with_the_fatal_switch_the_first_failure_is_the_end(packages: Path, tree: Path, write: Write) -> None:
    write("bad", transform="raise PluginError('no')")
    write("good", transform="path.write_text('good')")
    before = snapshot(tree)
    result = await run(packages, tree, ["bad", "good"], variables={FATAL: True})
    assert [record["status"] for record in result.applied] == ["failed", "skipped"]
    assert result.applied[1]["error"] == f"not run: bad failed, and {FATAL} is set"
    assert not result.aborted
    assert snapshot(tree) == before
    assert [record["status"] for record in (await run(packages, tree, ["bad", "good"])).applied] == [
        "failed",
        "success",
    ]


async def test_suffixes_match_whatever_their_case_and_names_without_one_whole(
    packages: Path, tree: Path, write: Write
) -> None:
    write(extensions="[.TXT, Makefile]", transform="path.write_text('seen')")
    (tree / "makefile").write_text("")
    record = await one(packages, tree, files=["sub/0.txt", "makefile", "script.sh"])
    assert record["files_affected"] == ["makefile", "sub/0.txt"]


async def test_missing_variables_are_found_before_anything_runs(packages: Path, tree: Path, write: Write) -> None:
    folder = write(transform="path.write_text('x')")
    code = (folder / "__init__.py").read_text()
    (folder / "__init__.py").write_text(code + "\n    required_variables = ['name', 'owner']\n")
    record = await one(packages, tree, variables={"name": "n", "owner": ""})
    assert (record["status"], record["isolation"]["exit_code"]) == ("failed", 1)
    assert record["error"] == "required variable 'owner' is missing or empty"


async def test_variables_that_cannot_cross_are_no_crash_of_the_plugin(packages: Path, tree: Path, write: Write) -> None:
    write()
    before = snapshot(tree)
    record = await one(packages, tree, variables={"owner": object()})
    assert (record["status"], record.get("crash", False)) == ("failed", False)
    assert "variables.owner" in record["error"]
    assert snapshot(tree) == before


async def test_code_that_is_not_what_its_manifest_says_does_not_run(packages: Path, tree: Path, write: Write) -> None:
    folder = write(transform="path.write_text('x')")
    code = (folder / "__init__.py").read_text()
    (folder / "__init__.py").write_text(code.replace("'1.0'", "'2.0'").replace("['.txt']", "['.txt', '.md']"))
    record = await one(packages, tree)
    assert record["status"] == "failed"
    assert "version is '2.0' in its class and '1.0' in its manifest" in record["error"]
    assert "supported_extensions" in record["error"]


async def test_a_file_outside_of_the_folder_is_refused(packages: Path, tree: Path, write: Write) -> None:
    write()
    for path in ("../x.txt", "/etc/passwd", "."):
        with pytest.raises(ValueError, match="does not lie in"):
            await run(packages, tree, files=[path])


# -- sizes


async def test_a_pass_over_many_files_with_floods_of_log_ends_with_bounded_records(
    packages: Path, tree: Path, write: Write, tmp_path: Path
) -> None:
    write(
        manifest="isolation: {timeout_seconds: 120}",
        transform="""
            ctx.log.info('m' * 300_000, number=path.name)
            if path.name.endswith('00.txt'):
                sys.stderr.write('y' * 300_000 + '\\n')
            path.write_text('x')
        """,
    )
    names = [f"many/{number}.txt" for number in range(3000)]
    (tree / "many").mkdir()
    for name in names:
        (tree / name).touch()
    record = await one(
        packages, tree, files=names, central_log_dir=tmp_path / "logs", limits=PassLimits(log_bytes=1_000_000)
    )
    assert record["status"] == "success", record
    assert record["files_affected"] == sorted(names)
    assert len(json.dumps(record)) < 100_000
    log = tmp_path / "logs/plugins/editor/p-1.stderr"
    assert log.stat().st_size < 1_010_000
    assert max(map(len, log.read_text().splitlines())) <= 8192


async def test_a_request_over_the_bound_starts_no_worker(packages: Path, tree: Path, write: Write) -> None:
    write(transform="path.write_text('x')")
    record = await one(packages, tree, variables={"long": "x" * (1 << 20)})
    assert (record["status"], record["isolation"]["exit_code"], record["error"]) == ("failed", 3, "ipc_frame_oversize")


async def test_a_tree_too_large_to_copy_is_worked_on_in_place_with_what_is_protected_put_back(
    packages: Path, tree: Path, write: Write
) -> None:
    write("good", transform="path.write_text('good')")
    write("bad", transform="path.write_text('bad')", post_transform_all="""
        (ctx.dst_root / 'README.md').unlink()
        (ctx.dst_root / 'README.md').symlink_to('/etc/passwd')
        (ctx.dst_root / 'README.md.jinja').write_text('new')
        (ctx.dst_root / '.exlab-wizard' / 'creation.json').write_text('[]')
        (ctx.dst_root / '.exlab-wizard' / 'more').mkdir()
    """)  # fmt: skip
    before = snapshot(tree)
    small = PassLimits(staged_files=3)
    result = await run(packages, tree, ["good"], files=["sub/0.txt"], limits=small, run_unlisted=False)
    assert result.applied[0]["files_affected"] == ["sub/0.txt"]
    assert result.applied[0]["isolation"]["staging"].startswith("in_place: ")
    result = await run(packages, tree, ["bad"], files=["sub/1.txt"], limits=small, run_unlisted=False)
    record = result.applied[0]
    assert record["status"] == "policy_violation"
    assert record["violations"] == [
        ".exlab-wizard/creation.json", ".exlab-wizard/more", "README.md", "README.md.jinja",
    ]  # fmt: skip
    write("dry", describe_changes="path.write_text('dry'); return []")
    dry = await run(packages, tree, ["dry"], files=["sub/2.txt"], limits=small, run_unlisted=False, dry_run=True)
    assert "PermissionError" in dry.applied[0]["error"], "no copy keeps a dry run from the tree"
    after = snapshot(tree)
    assert after["sub/2.txt"] == before["sub/2.txt"]
    protected = {path for path in before if REFERENCE.covers(path)}
    assert {path for path in after if REFERENCE.covers(path)} == protected
    for path in protected:
        assert (after[path][0], after[path][3]) == (before[path][0], before[path][3]), path


# -- surroundings


async def test_a_worker_gets_listed_variables_of_the_prefix_and_nothing_else(
    packages: Path, tree: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXLAB_SITE", "north")
    monkeypatch.setenv("EXLAB_TOKEN", "secret")
    write(transform="path.write_text(json.dumps(sorted(os.environ)))")
    await one(packages, tree, env_prefix="EXLAB_", forward_env=["EXLAB_SITE"])
    assert json.loads((tree / "sub/0.txt").read_text()) == ["EXLAB_SITE", "HOME", "LANG", "PATH", "TMPDIR"]
    with pytest.raises(ValueError, match="'PGPASSWORD' does not begin with env_prefix"):
        PluginHost(PluginRegistry(packages), env_prefix="EXLAB_", forward_env=["PGPASSWORD"])


async def test_a_plugin_cannot_reach_the_network_or_start_a_process(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform="""
            for what in (lambda: socket.socket(), lambda: os.fork()):
                try:
                    what()
                except OSError:
                    continue
                raise PluginError("it could")
            path.write_text("neither")
        """
    )
    assert (await one(packages, tree, files=["sub/0.txt"]))["files_affected"] == ["sub/0.txt"]


async def test_the_stored_record_has_the_stored_keys(packages: Path, tree: Path, write: Write) -> None:
    write(transform="path.write_text('x')\nraise PluginError('no')")
    result = await run(packages, tree)
    stored = result.to_json()
    assert stored == json.loads(json.dumps(stored))
    assert stored[0].keys() == {"plugin", "version", "files_affected", "status", "isolation"}
    assert stored[0]["isolation"].keys() == {"duration_ms", "exit_code", "peak_memory_mb"}
    assert result.applied[0]["isolation"]["peak_memory_mb"] > 0


async def test_nothing_is_left_behind(packages: Path, tree: Path, write: Write, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    write(transform="path.write_text('x')\nos._exit(0) if path.name == '3.txt' else None")
    await one(packages, tree, work_dir=work)
    assert list(work.iterdir()) == []


def test_this_machine_can_make_the_sockets_that_plugins_cannot() -> None:
    socket.socket().close()
