"""The main job, as a client of the API and as a user of `plm-cli demo` sees it."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

SAMPLES = Path(__file__).parents[2] / "dev" / "samples"
BILLS = {"environment.cdx.json": "application/json", "assembly.csv": "text/csv"}


@pytest.mark.parametrize("bill", BILLS)
def test_a_bill_is_reviewed_under_control_from_request_to_artifacts(bom_platform: Any, bill: str) -> None:
    client = bom_platform.client(scopes=("plm.runs.create", "bom.read", "bom.write"))
    approver = bom_platform.client(scopes=("plm.hitl.resolve",))
    content = (SAMPLES / bill).read_text(encoding="utf-8")
    run_id = client.run("bom-review", files={"bom": {"name": bill, "mime_type": BILLS[bill], "text": content}})[
        "run_id"
    ]

    asked = client.wait(run_id, "approval_requested")["answer"]["ticket_id"]
    waiting = approver.get("/v1/approvals", params={"state": "pending", "limit": 200}).json()["items"]
    ticket = next(ticket for ticket in waiting if ticket["ticket_id"] == asked)
    assert (ticket["capability"], ticket["risk"]) == ("bom.quarantine", "high")
    assert ticket["arguments"]["blocking"], "the human sees exactly what would be written"
    approver.post(f"/v1/approvals/{asked}/decision", json={"decision": "approve"}).raise_for_status()

    run = client.finished(run_id)
    assert run["state"] == "succeeded"
    assert [step["step_id"] for step in run["steps"]] == ["read", "review", "report", "quarantine"]
    result = run["result"]
    assert result["summary"]["blocking"] == len(ticket["arguments"]["blocking"])
    files = {name: client.get(f"/v1/artifacts/{result[name]['$artifact']}") for name in ("report", "chart", "list")}
    assert files["report"].content.lstrip().lower().startswith(b"<!doctype html>")
    assert files["chart"].content.startswith(b"\x89PNG")
    listed = json.loads(files["list"].content)
    assert {each["component"] for each in ticket["arguments"]["blocking"]} <= set(_texts(listed))

    row = client.get(f"/v1/runs/{run_id}/mcrc").json()
    spent = {(each["scope"], each["unit"]): Decimal(each["spent"]) for each in run["budgets"]}
    assert (row["connector_call_count"], row["telemetry_event_count"]) == (4, 4)
    assert Decimal(row["connector_cost_eur"]) == spent["run", "EUR"] > 0
    assert spent["run", "calls"] == 4
    assert {each["reserved"] for each in run["budgets"]} == {"0"}
    verified = bom_platform.cli("events", "verify", "--tenant-id", str(bom_platform.tenant), "--json")
    assert verified.returncode == 0, verified.stderr
    assert all(stream["consistent"] for stream in json.loads(verified.stdout)["streams"])


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


@pytest.fixture
def demo(cli: Any, environment: Any, plugins_dir: Path, tmp_path: Path) -> Any:
    """Runs `plm-cli demo` as a stranger would: nothing set, an embedded database of its own."""
    settings = environment(PLM_STATE_DIR=str(tmp_path / "state"), PLM_PLUGINS_DIR=str(plugins_dir))

    def run(*arguments: str) -> Any:
        return cli("demo", *arguments, environment=settings)

    return run


def test_the_demo_reviews_both_samples_and_says_what_it_did(demo: Any) -> None:
    done = demo("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["succeeded"] is True
    assert report.keys() >= {"stages", "reviews", "events", "next", "seconds"}
    assert all("seconds" in stage for stage in report["stages"])
    assert len(report["next"]) == 3
    assert report["events"]
    assert all(stream["consistent"] for stream in report["events"])
    assert [Path(review["input"]).name for review in report["reviews"]] == list(BILLS)
    for review in report["reviews"]:
        assert (review["state"], review["decision"]) == ("succeeded", "approve")
        assert review["approval"]["arguments"]["blocking"]
        assert review["findings"]["findings"] > 0
        assert {budget["unit"] for budget in review["budget"]} == {"EUR", "calls"}
        assert review["files"].keys() == {"report", "chart", "list"}
        assert all(Path(file).stat().st_size > 0 for file in review["files"].values())
        assert review["mcrc"]["run_id"] == review["run_id"]
    csv_review = report["reviews"][1]
    assert csv_review["column_mapping"]
    assert csv_review["bad_rows"]
    assert all(row["reason"] for row in csv_review["bad_rows"])


def test_the_demo_with_a_denied_write_fails_and_writes_nothing(demo: Any) -> None:
    done = demo("--deny", "--json", "--input", str(SAMPLES / "assembly.csv"))
    assert done.returncode == 1
    (review,) = json.loads(done.stdout)["reviews"]
    assert (review["state"], review["reason"], review["decision"]) == ("failed", "approval_denied", "deny")
    assert review["files"].keys() == {"report", "chart"}


def test_the_demo_in_words_tells_the_same(demo: Any) -> None:
    done = demo("--input", str(SAMPLES / "assembly.csv"))
    assert done.returncode == 0, done.stderr
    for words in ("set-up", "bom.quarantine", "approved", "succeeded", "consistent", "go on with"):
        assert words in done.stdout, words


def test_an_input_that_is_no_file_is_one_sentence(demo: Any) -> None:
    done = demo("--input", "no-such-bill.json")
    assert done.returncode == 3
    assert done.stderr.startswith("plm-cli: the input no-such-bill.json is not a file")
    assert len(done.stderr.splitlines()) == 1
