"""Whatever a file plugin does, its pass ends, has a record, and leaves the folder and its surroundings alone."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from file_passes import REFERENCE, Write, one, snapshot
from plugin_substrate.passes import PassLimits
from plugin_substrate.passes import host as host_module

SOAK = float(os.environ.get("SOAK", "0.05"))
MANY = round(1_000_000 * SOAK)

JOURNAL = """
with open(place + '/journal', 'w') as journal:
    json.dump({'folder': os.stat(place).st_ino, 'steps': [['README.md', '', '1']]}, journal)
"""

#: What a plugin does, and the statuses that its record may have.
HOSTILE: dict[str, tuple[str, tuple[str, ...]]] = {
    "blocks every signal and hangs": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: time.sleep(9)",
        ("timeout",),
    ),
    "stops itself": ("os.kill(os.getpid(), 19)", ("timeout",)),
    "says that it ended well, and dies": ("os._exit(0)", ("failed",)),
    "closes everything": ("os.closerange(0, 256)\nwhile True: time.sleep(9)", ("failed", "timeout")),
    "writes nonsense to every descriptor": (
        "for fd in range(256):\n    try: os.write(fd, b'\\xff' * 100_000)\n    except OSError: pass",
        ("failed", "timeout"),
    ),
    "forks": ("os.fork()", ("failed",)),
    "says no end of lines": ("while True: sys.stderr.write('x' * 100_000)", ("timeout", "failed")),
    "raises what cannot be shown": (
        "class E(Exception):\n    def __str__(self): raise RuntimeError('no')\nraise E()",
        ("failed",),
    ),
    "raises what cannot be caught": ("raise GeneratorExit('bye')", ("failed",)),
    "asks without end": (
        "import itertools\nraise PluginInputRequired({'id': str(n)} for n in itertools.count())",
        ("failed", "timeout"),
    ),
    "takes memory": ("held = [bytearray(1 << 20) for _ in range(4096)]", ("failed", "timeout")),
    "makes a sparse file of 10 GB": ("with path.open('r+b') as file: file.truncate(10 << 30)", ("failed",)),
    "makes sparse files that are large together": (
        "[open(f'{ctx.dst_root}/{n}', 'wb').truncate(900 << 20) for n in range(3)]",
        ("policy_violation",),
    ),
    "makes many files": (
        f"os.makedirs('many', exist_ok=True)\n[open(f'many/{{n}}', 'w').close() for n in range({MANY})]",
        ("policy_violation", "timeout"),
    ),
    "goes deeper than a path can be long": (
        "os.chdir(ctx.dst_root)\nfor _ in range(1200):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)",
        ("policy_violation", "timeout"),
    ),
    "takes all rights away": (
        "for place in (path, path.parent, ctx.dst_root): os.chmod(place, 0)",
        ("skipped", "failed"),
    ),
    "gives everybody rights": ("os.chmod(path, 0o777)", ("skipped",)),
    "sets extended attributes": ("os.setxattr(path, 'user.x', b'1')", ("skipped", "failed")),
    "makes its file unchangeable": (
        "import array, fcntl\nfcntl.ioctl(os.open(path, os.O_RDONLY), 0x40086602, array.array('l', [0x10]))",
        ("failed",),
    ),
    "links to a file outside": ("os.link('/etc/hostname', ctx.dst_root / 'hostname')", ("failed", "policy_violation")),
    "puts a link in the place of its folder": (
        "os.chdir('/')\nos.rename(ctx.dst_root, f'{ctx.dst_root}-away')\nos.symlink('/etc', ctx.dst_root)",
        ("failed",),
    ),
    "puts a pipe in the place of a file": ("path.unlink()\nos.mkfifo(path)", ("policy_violation",)),
    "puts a file in the place of a pipe": ("(ctx.dst_root / 'pipe').write_text('x')", ("policy_violation",)),
    "removes a folder that holds a pipe": ("__import__('shutil').rmtree(path.parent)", ("policy_violation",)),
    "leaves a journal to be recovered from": (
        "place = '.file-pass-unfinished'\nos.mkdir(place, 0o700)\n" + JOURNAL,
        ("policy_violation",),
    ),
    "has no class any more": ("del sys.modules['plugin_substrate.worker.file_pass']\n1 / 0", ("failed",)),
}  # fmt: skip

FORGED: dict[str, str] = {
    "nothing": "None",
    "no object": "['success']",
    "no status": "{'result': 'success', 'exit_code': 0}",
    "a success that failed": "{'result': 'success', 'exit_code': 3, 'per_file': []}",
    "a failure that succeeded": "{'result': 'failed', 'exit_code': 0, 'per_file': []}",
    "results that are no texts": "{'result': ['success'], 'exit_code': 0, 'per_file': []}",
    "codes that are no numbers": "{'result': 'failed', 'exit_code': True, 'per_file': []}",
    "files that are none": "{'result': 'success', 'exit_code': 0, 'per_file': [1]}",
    "a file outside": (
        "{'result': 'success', 'exit_code': 0, 'per_file': [{'path': '../x', 'status': 'modified', 'changes': None}]}"
    ),
    "a number that is none": "{'result': 'success', 'exit_code': 0, 'per_file': [], 'x': float('nan')}",
    "bytes": "{'result': 'success', 'exit_code': 0, 'per_file': [], 'x': b'x'}",
    "more than a frame holds": "{'result': 'success', 'exit_code': 0, 'per_file': [], 'x': 'x' * (1 << 21)}",
    "no question": "{'result': 'input_required', 'exit_code': 2, 'per_file': [], 'input_required': 'what?'}",
}


async def hostile(packages: Path, tree: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """One pass, over which neither time nor anything else gets lost."""
    work, outside = tmp_path / "work", tmp_path / "outside"
    work.mkdir()
    outside.write_text("outside")
    os.mkfifo(tree / "sub" / "pipe")
    before = snapshot(tree)
    async with asyncio.timeout(120):
        record = await one(packages, tree, work_dir=work, files=["sub/0.txt", "sub/1.txt"], **options)
    assert json.loads(json.dumps(record)) == record
    assert record["error" if record["status"] == "failed" else "status"]
    assert len(json.dumps(record)) < 1 << 20
    if record["status"] != "success":
        assert snapshot(tree) == before
    assert list(work.iterdir()) == []
    assert outside.read_text() == "outside"
    return record


@pytest.mark.parametrize("case", HOSTILE)
async def test_a_hostile_plugin_is_a_record(
    packages: Path, tree: Path, write: Write, tmp_path: Path, case: str
) -> None:
    body, statuses = HOSTILE[case]
    seconds = 1 if "timeout" in statuses else 60
    write(
        manifest=f"isolation: {{timeout_seconds: {seconds}, memory_mb: 128}}",
        transform=body,
    )
    record = await hostile(packages, tree, tmp_path, limits=PassLimits(staged_files=MANY // 10))
    assert record["status"] in statuses, record


IN_PLACE = {
    "goes too deep": "os.makedirs('/'.join('d' * 150))",
    "goes too deep where it may not": "os.makedirs('.exlab-wizard/' + '/'.join('d' * 150))",
    "puts a full folder in the place of a protected file": (
        "os.unlink('README.md')\nos.makedirs('README.md/a/b')\nopen('README.md/a/x', 'w').close()"
    ),
    "puts a file in the place of a protected folder": (
        "import shutil\nshutil.rmtree('.exlab-wizard')\nopen('.exlab-wizard', 'w').close()"
    ),
    "puts a link in the place of a protected folder": (
        "os.rename('.exlab-wizard', 'away')\nos.symlink('away', '.exlab-wizard')"
    ),
    "takes rights away": "os.chmod('.exlab-wizard', 0)\nos.chmod('README.md', 0)\nos.unlink('.exlab-answers.yml')",
    "leaves a journal": "place = '.file-pass-unfinished'\nos.mkdir(place, 0o700)\n" + JOURNAL,
    "makes the same file again with other rights": (
        "text = open('README.md').read()\nos.unlink('README.md')\nopen('README.md', 'w').write(text)"
    ),
    "stands in the way": "open('.README.md.restored', 'w').close()\nopen('README.md', 'w').close()",
    "dies in the middle": "open('README.md', 'w').close()\nos._exit(0)",
}


@pytest.mark.parametrize("case", IN_PLACE)
async def test_what_is_protected_is_put_back_whatever_happened_to_it_in_place(
    packages: Path, tree: Path, write: Write, case: str
) -> None:
    write(post_transform_all=IN_PLACE[case])
    before = {path: entry for path, entry in snapshot(tree).items() if REFERENCE.covers(path)}
    async with asyncio.timeout(120):
        record = await one(packages, tree, limits=PassLimits(staged_files=3))
    assert record["status"] == "policy_violation", record
    after = {path: entry for path, entry in snapshot(tree).items() if REFERENCE.covers(path)}
    assert after.keys() == before.keys()
    for path, (mode, _, _, content) in before.items():
        assert (after[path][0], after[path][3]) == (mode, content), path


async def test_a_tree_too_deep_to_be_read_is_a_record(packages: Path, tree: Path, write: Write) -> None:
    write(transform="path.write_text('x')")
    (tree / "/".join("d" * 150)).mkdir(parents=True)
    before = snapshot(tree)
    record = await one(packages, tree)
    assert (record["status"], record["isolation"]["exit_code"]) == ("failed", 3)
    assert record["error"].startswith("staging_failed: ")
    assert "lies too deep" in record["error"]
    assert snapshot(tree) == before


@pytest.mark.parametrize("case", FORGED)
async def test_a_forged_result_carries_nothing_over(
    packages: Path, tree: Path, write: Write, tmp_path: Path, case: str
) -> None:
    write(
        transform="import plugin_substrate.worker.file_pass as ours\n"
        f"ours._Run._result = lambda *_, **__: {FORGED[case]}\npath.write_text('forged')"
    )
    record = await hostile(packages, tree, tmp_path)
    assert record["status"] == "failed", record


@pytest.mark.parametrize(
    "hook", ["can_handle", "pre_transform_all", "post_transform_all", "on_plugin_failure", "validate_variables"]
)
async def test_every_hook_may_hang(
    packages: Path, tree: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.setattr(host_module, "_VALIDATION_SECONDS", 1.0)
    failing = "raise PluginError('no')" if hook == "on_plugin_failure" else "pass"
    write(manifest="isolation: {timeout_seconds: 1}", **{"transform": failing, hook: "while True: pass"})
    assert (await hostile(packages, tree, tmp_path))["status"] == "timeout"


@pytest.mark.parametrize("code", ["while True: pass", "import os; os._exit(0)", "1 / 0", "syntax error", "Plugin = 3"])
async def test_a_package_that_cannot_be_imported_is_a_record(
    packages: Path, tree: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(host_module, "_VALIDATION_SECONDS", 1.0)
    (write() / "__init__.py").write_text(code)
    record = await hostile(packages, tree, tmp_path)
    assert record["status"] in ("failed", "timeout"), record


@pytest.mark.parametrize("errors", ["None", "'text'", "[1, None]", "{'a': 1}", "3", "['x' * 3_000_000]"])
async def test_whatever_the_variables_are_found_to_be_is_a_record(
    packages: Path, tree: Path, write: Write, tmp_path: Path, errors: str
) -> None:
    write(validate_variables=f"return {errors}", transform="path.write_text('x')")
    assert (await hostile(packages, tree, tmp_path))["status"] == "failed"


async def test_a_plugin_that_fills_the_disk_is_ended_while_it_does(
    packages: Path, tree: Path, write: Write, tmp_path: Path
) -> None:
    write(
        manifest="isolation: {timeout_seconds: 120}",
        transform="""
            for number in range(40):
                with open(number.__str__(), "wb") as file:
                    file.write(bytes(1 << 20))
            while True:
                time.sleep(9)
        """,
    )
    record = await hostile(packages, tree, tmp_path, limits=PassLimits(growth_bytes=10 << 20))
    assert "disk" in record["error"] or record["status"] == "policy_violation", record


async def test_nothing_is_written_after_the_end(packages: Path, tree: Path, write: Write, tmp_path: Path) -> None:
    write(
        pre_transform_all="""
            import threading
            def swap():
                for number in range(1_000_000_000):
                    try:
                        (ctx.dst_root / "late").write_text(str(number))
                        os.rename(ctx.dst_root / "sub", ctx.dst_root / "aside")
                        os.symlink("/etc", ctx.dst_root / "sub")
                        os.unlink(ctx.dst_root / "sub")
                        os.rename(ctx.dst_root / "aside", ctx.dst_root / "sub")
                    except OSError:
                        pass
            threading.Thread(target=swap, daemon=True).start()
        """,
        post_transform_all="while not (ctx.dst_root / 'late').exists(): pass",
    )
    record = await hostile(packages, tree, tmp_path)
    after = snapshot(tree)
    assert record["status"] in ("success", "policy_violation"), record
    assert [path for path in after if path.startswith("sub/") and "hostname" in path] == []
    await asyncio.sleep(0)
    assert snapshot(tree) == after


async def test_a_change_that_hides_behind_size_and_time_is_seen(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform="""
            was = path.stat()
            path.write_bytes(path.read_bytes()[::-1])
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        """
    )
    record = await one(packages, tree, files=["sub/0.txt"])
    assert record["files_affected"] == ["sub/0.txt"]
    assert (tree / "sub/0.txt").read_bytes() == b"\n0 txet"


async def test_strange_names_are_carried_over_and_shown_as_escapes(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform="""
            for name in ("a\\nb", "\\x1b[31mred", "-rf", "SUB", "readme.md", "é", "e\\u0301"):
                (ctx.dst_root / name).write_text(name)
        """
    )
    record = await one(packages, tree, files=["sub/0.txt"])
    assert record["status"] == "success", record
    assert record["files_affected"] == ["-rf", "SUB", "\\x1b[31mred", "a\\nb", "e\u0301", "readme.md", "é"]
    assert (tree / "a\nb").read_text() == "a\nb"
