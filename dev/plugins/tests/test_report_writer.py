from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import CallContext
from plugin_substrate.manager import PluginManager

Call = Callable[..., Any]

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{7*7}}$\\frac{1}{2}$"
BLOCKING = [{"component": "thing", "version": "1.0", "reason": "copyleft-strong: GPL-3.0-only"}]


@pytest.fixture
def step_key() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def journal(plugins_dir: Path) -> Callable[[str], list[str]]:
    """The lines written for a step key."""

    def lines(step_key: str) -> list[str]:
        files = plugins_dir.glob("data/report-writer/*/blocking-lists/*")
        written = [line for file in files for line in file.read_text().splitlines()]
        return [line for line in written if json.loads(line)["step_key"] == step_key]

    return lines


def report_of(call: Call, text: str = "thing") -> dict[str, Any]:
    review = call("bom.review", components=[{"name": text, "version": text, "licenses": [text]}], block_at="low")
    bill = {"format": text, "bad_rows": [{"line": 3, "reason": text}], "column_mapping": {text: text}}
    result: dict[str, Any] = call("bom.report", title=text, bill=bill, review=review)
    return result


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_report_is_one_page_and_one_picture(call: Call) -> None:
    made = report_of(call)
    assert (made["report"].name, made["report"].mime_type) == ("report.html", "text/html")
    assert (made["chart"].name, made["chart"].mime_type) == ("chart.png", "image/png")
    assert made["chart"].data.startswith(b"\x89PNG\r\n")
    assert made["findings"] == 1


def test_a_report_loads_nothing_from_anywhere(call: Call) -> None:
    page = report_of(call)["report"].data.decode()
    tags = Tags(page).found
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "form", "a"}
    assert [(attributes["src"] or "")[:22] for tag, attributes in tags if tag == "img"] == ["data:image/png;base64,"]
    assert not re.search(r"url\(|@import|https?:", page)


def test_hostile_names_stay_text(call: Call) -> None:
    page = report_of(call, HOSTILE)["report"].data.decode()
    tags = Tags(page)
    harmless = Tags(report_of(call)["report"].data.decode())
    assert [tag for tag, _ in tags.found] == [tag for tag, _ in harmless.found]
    assert [sorted(attributes) for _, attributes in tags.found] == [sorted(given) for _, given in harmless.found]
    assert tags.text.count(HOSTILE) >= 5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"title": ""}, "title"),
        ({"bill": []}, "bill"),
        ({"review": {"findings": []}}, "review.summary"),
    ],
)
def test_a_wrong_part_of_the_report_is_named(call: Call, change: dict[str, Any], field: str) -> None:
    review = call("bom.review", components=[{"name": "thing"}])
    with pytest.raises(PluginInputError) as caught:
        call("bom.report", **{"title": "t", "bill": {}, "review": review, **change})
    assert caught.value.fields_invalid == (field,)


def test_a_blocking_list_holds_exactly_what_was_asked_for(call: Call, step_key: str) -> None:
    made = call("bom.quarantine", step_key=step_key, list_name="stop-using", blocking=BLOCKING)
    assert made["count"] == 1
    assert json.loads(made["list"].data) == {"list": "stop-using", "run": "run", "components": BLOCKING}


def test_a_repeated_step_writes_once_and_returns_the_same(
    call: Call, step_key: str, journal: Callable[[str], list[str]]
) -> None:
    first = call("bom.quarantine", step_key=step_key, list_name="stop-using", blocking=BLOCKING)
    assert call("bom.quarantine", step_key=step_key, list_name="stop-using", blocking=BLOCKING) == first
    assert len(journal(step_key)) == 1


def test_several_workers_with_one_step_key_write_once(
    manager: PluginManager, step_key: str, journal: Callable[[str], list[str]]
) -> None:
    meta = manager.get_discovered_meta("report-writer")
    assert meta
    workers = [f"writer-{number}" for number in range(4)]
    assert all(manager.load_plugin(meta, instance_id=worker) for worker in workers)

    def write(worker: str) -> Any:
        context = CallContext(call_id=uuid.uuid4().hex, tenant_id="tenant", step_key=step_key)
        arguments = {"action": "bom.quarantine", "list_name": "stop-using", "blocking": BLOCKING}
        return manager.execute_plugin(worker, call=context, **arguments)

    with ThreadPoolExecutor(len(workers)) as pool:
        results = list(pool.map(write, workers))
    assert all(manager.unload_plugin(worker) for worker in workers)
    assert all(result == results[0] for result in results)
    assert len(journal(step_key)) == 1


def test_a_step_key_with_other_arguments_is_refused_and_writes_nothing(
    call: Call, step_key: str, journal: Callable[[str], list[str]]
) -> None:
    call("bom.quarantine", step_key=step_key, list_name="stop-using", blocking=BLOCKING)
    written = journal(step_key)
    with pytest.raises(PluginInputError, match="other arguments"):
        call("bom.quarantine", step_key=step_key, list_name="stop-using", blocking=[])
    assert journal(step_key) == written


def test_a_write_without_a_step_key_is_refused(call: Call) -> None:
    with pytest.raises(PluginInputError, match="step_key is missing"):
        call("bom.quarantine", list_name="stop-using", blocking=BLOCKING)


@pytest.mark.parametrize("name", ["", "../up", "a/b", " a", "x" * 65, "a\nb"])
def test_a_list_name_that_could_be_a_path_is_refused(call: Call, step_key: str, name: str) -> None:
    with pytest.raises(PluginInputError, match="list_name"):
        call("bom.quarantine", step_key=step_key, list_name=name, blocking=BLOCKING)
