"""The main job: have one bill of materials reviewed by an agent under control."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.markup import escape

from plm_backend.demo.client import ApiClient, News
from plm_backend.demo.display import Display

AGENT = "bom-review"
_MIME_TYPES = {".json": "application/json", ".csv": "text/csv"}

Decide = Callable[[Mapping[str, Any]], bool]


@dataclass(kw_only=True)
class Review:
    """One run as the demo tells it."""

    input: str
    run_id: str = ""
    state: str = ""
    reason: str | None = None
    message: str | None = None
    decision: str = ""
    approval: Mapping[str, Any] | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)
    column_mapping: Mapping[str, Any] | None = None
    bad_rows: list[Mapping[str, Any]] = field(default_factory=list)
    budget: list[Mapping[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    mcrc: Mapping[str, Any] = field(default_factory=dict)


class Reviewer:
    """Asks for a review as one person, and decides its write as another."""

    def __init__(
        self, *, requester: ApiClient, approver: ApiClient, display: Display, decide: Decide, output: Path
    ) -> None:
        self._requester = requester
        self._approver = approver
        self._display = display
        self._decide = decide
        self._output = output
        self._started: dict[int, float] = {}
        self._names: dict[int, tuple[str, str]] = {}

    def review(self, bill: Path) -> Review:
        """Create the run, follow it to its end, decide on the way, and fetch what it made."""
        review = Review(input=str(bill))
        run = self._requester.post("/v1/runs", self._request(bill), **{"Idempotency-Key": str(uuid4())})
        review.run_id = run["run_id"]
        self._display.say(f"  run {review.run_id}, trace {run['trace_id']}")
        with self._display.steps():
            for news in self._requester.follow(review.run_id):
                self._tell(review, news)
        self._collect(review)
        return review

    def _request(self, bill: Path) -> dict[str, Any]:
        mime_type = _MIME_TYPES.get(bill.suffix.lower(), "application/octet-stream")
        text = bill.read_text(encoding="utf-8", errors="surrogateescape")
        body = {"name": bill.name, "mime_type": mime_type, **_content(text, bill)}
        return {
            "agent": AGENT,
            "inputs": {"title": f"Review of {bill.name}", "list_name": "stop-using"},
            "files": {"bom": body},
        }

    def _tell(self, review: Review, news: News) -> None:
        payload = news.data.get("payload", {})
        match news.kind:
            case "progress":
                self._display.step_progress(news.data["step_id"], news.data["fraction"], news.data["message"])
            case "step_granted":
                self._names[payload["step"]] = (payload["step_id"], payload["capability"])
            case "step_started":
                self._started[payload["step"]] = time.perf_counter()
                self._display.step_progress(self._names[payload["step"]][0], -1.0, "")
            case "step_settled":
                self._settled(payload)
            case "step_denied":
                self._display.step_done(payload["step_id"], payload["capability"], "denied", 0.0, _reason(payload))
            case "approval_requested":
                self._decide_ticket(review, payload["answer"]["ticket_id"])
            case _:
                pass

    def _settled(self, payload: Mapping[str, Any]) -> None:
        step_id, capability = self._names[payload["step"]]
        seconds = time.perf_counter() - self._started.get(payload["step"], time.perf_counter())
        spent = payload.get("spent", {}).get("EUR", "0")
        note = f"{spent} EUR" if payload["status"] == "succeeded" else _reason(payload)
        self._display.step_done(step_id, capability, payload["status"], seconds, note)

    def _decide_ticket(self, review: Review, ticket_id: str) -> None:
        tickets = self._approver.get("/v1/approvals", state="pending")["items"]
        ticket = next(each for each in tickets if each["ticket_id"] == ticket_id)
        review.approval = ticket
        self._display.approval(ticket)
        approved = self._decide(ticket)
        review.decision = "approve" if approved else "deny"
        self._approver.post(
            f"/v1/approvals/{ticket_id}/decision", {"decision": review.decision, "comment": "decided in the demo"}
        )
        word = "[green]approved[/]" if approved else "[red]denied[/]"
        self._display.say(f"  {word} by a second identity, whose token this demo issued itself")

    def _collect(self, review: Review) -> None:
        run = self._requester.get(f"/v1/runs/{review.run_id}")
        outputs = {step["step_id"]: step["output"] for step in run["steps"] if step["state"] == "succeeded"}
        read, judged = outputs.get("read") or {}, outputs.get("review") or {}
        review.state, review.reason, review.message = run["state"], run["reason"], run["message"]
        review.budget = run["budgets"]
        review.findings = judged.get("summary", {})
        review.column_mapping = read.get("column_mapping")
        review.bad_rows = read.get("bad_rows", [])
        review.mcrc = self._requester.get(f"/v1/runs/{review.run_id}/mcrc")
        made = {**(outputs.get("report") or {}), **(outputs.get("quarantine") or {})}
        for name in ("report", "chart", "list"):
            if isinstance(made.get(name), dict):
                review.files[name] = str(self._download(review.run_id, made[name]))

    def _download(self, run_id: str, reference: Mapping[str, Any]) -> Path:
        folder = self._output / run_id
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / Path(reference["name"]).name
        target.write_bytes(self._requester.download(f"/v1/artifacts/{reference['$artifact']}"))
        return target


def show(display: Display, review: Review) -> None:
    """The end of one review, as a person reads it."""
    colour = "green" if review.state == "succeeded" else "red"
    message = f": {escape(review.message)}" if review.message else ""
    display.say(f"  the run [{colour}]{review.state}[/]{message}")
    if review.column_mapping:
        mapping = [(str(column), f"from {header!r}") for column, header in review.column_mapping.items()]
        display.pairs("columns as they were understood", mapping)
    for row in review.bad_rows:
        where = row.get("line") or row.get("path")
        display.say(f"  [yellow]bad row[/] {escape(str(where))}: {escape(str(row['reason']))}")
    rows = [("findings", _findings(review.findings))] if review.findings else []
    rows += [
        (f"budget, {each['scope']}", f"{each['spent']} of {each['limit']} {each['unit']} used")
        for each in review.budget
    ]
    rows += [(name, path) for name, path in review.files.items()]
    display.pairs("results", rows)
    display.pairs("the run's MCRC row", [(name, str(value)) for name, value in review.mcrc.items()])


def _content(text: str, bill: Path) -> dict[str, str]:
    """The file as text where it is text, else in base64."""
    import base64

    try:
        text.encode()
    except UnicodeEncodeError:
        return {"base64": base64.b64encode(bill.read_bytes()).decode()}
    return {"text": text}


def _reason(payload: Mapping[str, Any]) -> str:
    answer = payload.get("answer") or payload.get("error") or {}
    return str(answer.get("message", ""))


def _findings(summary: Mapping[str, Any]) -> str:
    severities = summary.get("by_severity", {})
    ranked = ", ".join(f"{severities[level]} {level}" for level in ("high", "medium", "low") if severities.get(level))
    return (
        f"{summary.get('findings', 0)} in {summary.get('components', 0)} components ({ranked or 'none'}); "
        f"{summary.get('blocking', 0)} components to stop using"
    )
