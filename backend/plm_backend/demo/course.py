"""The demo from its set-up to its farewell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from plm_backend.database import open_database, upgrade_all
from plm_backend.demo import preparation
from plm_backend.demo.client import ApiClient
from plm_backend.demo.display import Display
from plm_backend.demo.story import Review, Reviewer, show
from plm_backend.errors import BackendError, SetupError
from plm_backend.settings import Settings

ENVIRONMENT = "env"  # in place of a file: the environment this runs in


def perform(settings: Settings, display: Display, bill: str | None, *, interactive: bool, deny: bool) -> dict[str, Any]:
    """Review a bill, or the samples, from nothing; answers what became of it, as the command prints it.

    Raises:
        BackendError: a part of the platform did not come up, or did not do what it should.
        httpx.HTTPError: the server went away.
    """
    if bill and bill != ENVIRONMENT and not Path(bill).expanduser().is_file():
        raise SetupError(f"the input {bill} is not a file; give a CycloneDX JSON or CSV file, or '{ENVIRONMENT}'")
    display.say("[bold]set-up[/]")
    with ExitStack() as stack:
        with display.stage("plugins, each in its environment") as record:
            record.update(preparation.install_plugins(settings))
        with display.stage("database and migrations") as record:
            database = stack.enter_context(open_database(settings))
            if database.owner is None:
                raise SetupError("set PG_ADMIN_DSN to the database owner's address as well: the demo creates a tenant")
            upgrade_all(database.owner)
            preparation.create_tenant(database.owner)
            record["note"] = f"embedded PostgreSQL {database.server.major}" if database.server else "from PG_DSN"
        bills = _bills(settings, bill)
        with display.stage("API and run worker") as record:
            url = stack.enter_context(preparation.running_server(settings, database.app))
            record["note"] = url
        tokens = preparation.issue_tokens()
        requester, approver = ApiClient(url, tokens.requester), ApiClient(url, tokens.approver)
        stack.callback(requester.close)
        stack.callback(approver.close)
        reviewer = Reviewer(
            requester=requester,
            approver=approver,
            display=display,
            decide=lambda _: display.ask("approve this write?") if interactive else not deny,
            output=settings.state_dir / "demo",
        )
        reviews = [_review(reviewer, display, path) for path in bills]
        chains = _verify(display, database.app)
    succeeded = all(review.state == "succeeded" for review in reviews) and all(chain["consistent"] for chain in chains)
    following = _next_commands()
    display.say("\n[bold]go on with[/]")
    for command, meaning in following.items():
        display.say(f"  {command}\n      [dim]{meaning}[/]")
    return {
        "succeeded": succeeded,
        "stages": display.stages,
        "reviews": [vars(review) for review in reviews],
        "events": chains,
        "next": following,
    }


def _bills(settings: Settings, bill: str | None) -> list[Path]:
    if not bill:
        return list(preparation.SAMPLES)
    if bill == ENVIRONMENT:
        folder = settings.state_dir / "demo"
        folder.mkdir(parents=True, exist_ok=True)
        return [preparation.environment_bill(settings, folder)]
    return [Path(bill).expanduser().resolve()]


def _review(reviewer: Reviewer, display: Display, bill: Path) -> Review:
    display.say(f"\n[bold]review of {bill.name}[/]")
    review = reviewer.review(bill)
    show(display, review)
    return review


def _verify(display: Display, app_dsn: str) -> list[dict[str, Any]]:
    """Verify every event chain of the tenant, by the command an operator would use."""
    command = [
        str(Path(sys.executable).with_name("plm-cli")),
        "events",
        "verify",
        "--tenant-id",
        str(preparation.TENANT),
        "--json",
    ]
    done = subprocess.run(command, env={**os.environ, "PG_DSN": app_dsn}, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise BackendError(f"the events could not be verified: {done.stderr.strip()}")
    chains: list[dict[str, Any]] = json.loads(done.stdout)["streams"]
    events = sum(chain["events"] for chain in chains)
    bad = [chain for chain in chains if not chain["consistent"]]
    verdict = "[green]consistent[/]" if not bad else f"[red]{len(bad)} are not[/]"
    display.say(f"\n[bold]event chains[/]\n  {len(chains)} streams, {events} events: {verdict}")
    return chains


def _next_commands() -> dict[str, str]:
    cli = os.path.relpath(Path(sys.executable).with_name("plm-cli"))
    verify = f"{cli} events verify --tenant-id {preparation.TENANT}"
    return {
        "make demo INPUT=my-bom.json": "review your own bill of materials; INPUT=env reviews this environment",
        f"{cli} serve": "keep the API and a run worker running, with this database",
        f'eval "$({cli} local-env)" && {verify}': "meanwhile, in another terminal, verify the record yourself",
    }
