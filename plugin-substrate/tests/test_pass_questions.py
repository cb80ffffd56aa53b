"""Questions of file plugins: put to the host, answered, declined, cancelled; only the hook that asked runs again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from file_passes import Write, one, run, snapshot
from plugin_substrate.passes import InputDeclined, InputRequiredPayload, PassLimits

ASKING = """
    marks = ctx.dst_root / (path.name + '.marks')
    if path.name == '2.txt' and ctx.extra_inputs is None:
        field = {'id': 'who', 'label': 'Who?', 'type': 'string', 'required': True, 'choices': ['a']}
        raise PluginInputRequired([field], 'why')
    with open(marks, 'a') as f: f.write('x')
    if path.name == '2.txt':
        path.write_text(json.dumps([dict(ctx.extra_inputs), ctx.variables['__extra_inputs__']]))
"""


async def test_only_the_file_that_asked_is_replayed(packages: Path, tree: Path, write: Write) -> None:
    write(pre_transform_all="open(ctx.dst_root / 'pre', 'a').write('x')", transform=ASKING)
    asked: list[InputRequiredPayload] = []

    async def ask(question: InputRequiredPayload) -> dict[str, Any]:
        asked.append(question)
        return {"who": "me"}

    record = await one(packages, tree, ask=ask)
    assert (record["status"], record["isolation"]["exit_code"]) == ("success", 0), record
    field = {"id": "who", "label": "Who?", "type": "string", "required": True, "choices": ["a"]}
    assert asked == [InputRequiredPayload(plugin="editor", fields=(field,), reason="why")]
    assert json.loads((tree / "sub/2.txt").read_text()) == [{"who": "me"}, {"who": "me"}]
    for name in ("0.txt.marks", "1.txt.marks", "2.txt.marks", "3.txt.marks", "pre"):
        assert (tree / name).read_text() == "x", "no hook that had returned ran again"


@pytest.mark.parametrize("hook", ["pre_transform_all", "post_transform_all"])
async def test_every_hook_may_ask_and_an_empty_answer_is_one(
    packages: Path, tree: Path, write: Write, hook: str
) -> None:
    write(
        **{hook: "if ctx.extra_inputs is None: raise PluginInputRequired()\nassert ctx.extra_inputs == {}"},
        transform="path.write_text('x')",
    )

    async def nothing(_: InputRequiredPayload) -> dict[str, Any]:
        return {}

    assert (await one(packages, tree, ask=nothing))["status"] == "success"


async def test_a_declined_question_fails_its_plugin_and_a_cancelled_one_ends_the_pass(
    packages: Path, tree: Path, write: Write
) -> None:
    write("asks", transform="path.write_text('half')\nraise PluginInputRequired([], 'why')")
    write("next", transform="path.write_text('next')")

    async def decline(_: InputRequiredPayload) -> InputDeclined:
        return InputDeclined()

    async def cancel(_: InputRequiredPayload) -> None:
        return None

    before = snapshot(tree)
    cancelled = await run(packages, tree, ["asks", "next"], ask=cancel)
    assert cancelled.aborted
    assert [(record["plugin"], record["status"], record["error"]) for record in cancelled.applied] == [
        ("asks", "failed", "cancelled")
    ]
    assert snapshot(tree) == before
    declined = await run(packages, tree, ["asks", "next"], ask=decline)
    assert not declined.aborted
    assert [(record["status"], record.get("error")) for record in declined.applied] == [
        ("failed", "declined"),
        ("success", None),
    ]


async def test_rounds_and_waiting_are_bounded(packages: Path, tree: Path, write: Write) -> None:
    write(transform="raise PluginInputRequired([], 'again')")
    rounds = 0

    async def ask(_: InputRequiredPayload) -> dict[str, Any]:
        nonlocal rounds
        rounds += 1
        return {}

    async def forget(_: InputRequiredPayload) -> None:
        await asyncio.Event().wait()

    record = await one(packages, tree, ask=ask, limits=PassLimits(questions=3))
    assert (record["status"], record["error"], rounds) == ("failed", "it asked more than 3 times", 4)
    record = await one(packages, tree, ask=forget, limits=PassLimits(answer_seconds=0.05))
    assert (record["status"], record["error"]) == ("failed", "no answer in 0.05 s")


async def test_waiting_for_an_answer_is_not_working_time(packages: Path, tree: Path, write: Write) -> None:
    write(transform="if ctx.extra_inputs is None: raise PluginInputRequired()")
    loop = asyncio.get_running_loop()
    waited = 0.0

    async def think(_: InputRequiredPayload) -> dict[str, Any]:
        nonlocal waited
        began = loop.time()
        await asyncio.sleep(0.3)
        waited = loop.time() - began
        return {}

    began = loop.time()
    record = await one(packages, tree, ask=think, files=["sub/0.txt"])
    assert record["status"] == "skipped", record
    assert record["isolation"]["duration_ms"] / 1000 < loop.time() - began - waited


async def test_a_large_question_arrives_whole(packages: Path, tree: Path, write: Write) -> None:
    write(
        transform="""
            if ctx.extra_inputs is None:
                raise PluginInputRequired([{'id': 'x', 'label': 'l' * 70_000}], 'r' * 70_000)
        """
    )
    asked: list[InputRequiredPayload] = []

    async def ask(question: InputRequiredPayload) -> dict[str, Any]:
        asked.append(question)
        return {}

    await one(packages, tree, ask=ask)
    assert (asked[0].reason, asked[0].fields[0]["label"]) == ("r" * 70_000, "l" * 70_000)


@pytest.mark.parametrize(
    "fields",
    [
        "[{'label': 'no id'}]",
        "[{'id': 'x'}, {'id': 'x'}]",
        "[{'id': 'x', 'script': 1}]",
        "[{'id': 'x', 'required': 1}]",
        "[{'id': 'x', 'choices': 'a'}]",
        "[{'id': str(n)} for n in range(101)]",
    ],
)
async def test_a_malformed_question_is_a_failure(packages: Path, tree: Path, write: Write, fields: str) -> None:
    write(transform=f"raise PluginInputRequired({fields}, '')")
    record = await one(packages, tree)
    assert (record["status"], record["isolation"]["exit_code"]) == ("failed", 2)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([], "malformed_answer: it is a list and no mapping"),
        ({"x": object()}, "kwargs.extra_inputs.x"),
        ({(1, 2): 3}, "kwargs.extra_inputs"),
    ],
    ids=["no mapping", "an object", "a key that is no text"],
)
async def test_an_answer_that_is_none_carries_nothing_over(
    packages: Path, tree: Path, write: Write, answer: object, error: str
) -> None:
    write(transform="path.write_text('half done')\nif ctx.extra_inputs is None: raise PluginInputRequired()")

    async def ask(_: InputRequiredPayload) -> object:
        return answer

    before = snapshot(tree)
    record = await one(packages, tree, ask=ask)
    assert (record["status"], record.get("crash")) == ("failed", None), record
    assert record["error"].startswith(error), record
    assert snapshot(tree) == before
