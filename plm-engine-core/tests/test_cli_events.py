"""`plm-cli events`: what an operator does to sign, export and check the record."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from plm_engine_core.cli import build_app
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants
from typer.testing import CliRunner


class Terminal:
    """`plm-cli events` with the settings of one installation."""

    def __init__(self, database: DatabaseUrls, folder: Path) -> None:
        self.database = database
        self.folder = folder
        (self.tenant,) = create_tenants(database, "acme")
        self.key = folder / "key.pem"
        self.public = folder / "public.pem"

    def run(self, *arguments: str | Path, status: int = 0) -> Any:
        environment = {
            "PG_DSN": self.database.app,
            "PG_ADMIN_DSN": self.database.owner,
            "PLM_EVENTS_KEY": str(self.key),
        }
        said = CliRunner().invoke(build_app(), ["events", *map(str, arguments)], env=environment)
        assert said.exit_code == status, said.stdout + said.stderr
        return said

    def json(self, *arguments: str | Path, status: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status).stdout)

    def append(self, stream: str) -> None:
        with psycopg.connect(self.database.app) as connection:
            connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(self.tenant)])
            connection.execute("SELECT engine_append_event_v1(%s, %s, 'test', 'human:x', '{}')", [self.tenant, stream])

    def forge(self, statement: str) -> None:
        with psycopg.connect(self.database.admin) as connection:
            connection.execute("ALTER TABLE events DISABLE TRIGGER ALL")
            connection.execute(statement.encode())


@pytest.fixture
def terminal(engine_database: DatabaseUrls, tmp_path: Path) -> Terminal:
    terminal = Terminal(engine_database, tmp_path)
    terminal.public.write_text(terminal.run("new-key", "--to", terminal.key).stdout, encoding="ascii")
    return terminal


@pytest.fixture
def file(terminal: Terminal) -> Path:
    """An export of two events in two streams."""
    terminal.append("a")
    terminal.append("b")
    terminal.run("checkpoint", "--tenant-id", str(terminal.tenant))
    to = terminal.folder / "events.jsonl"
    terminal.run("export", "--tenant-id", str(terminal.tenant), "--to", to)
    return to


def test_a_new_key_is_its_owners_alone_and_never_replaces_one(terminal: Terminal) -> None:
    assert terminal.key.stat().st_mode & 0o777 == 0o600
    before = terminal.key.read_bytes()
    assert "exists" in terminal.run("new-key", "--to", terminal.key, status=1).stderr
    assert terminal.key.read_bytes() == before
    assert terminal.run("public-key").stdout == terminal.public.read_text(encoding="ascii")
    assert "PRIVATE" not in terminal.public.read_text(encoding="ascii")


def test_what_was_exported_is_unforged_with_and_without_the_database(terminal: Terminal, file: Path) -> None:
    alone = terminal.json("verify-export", file, "--public-key", terminal.public)
    assert (alone["unforged"], alone["checkpoint"], alone["events"]) == (True, 1, 2)
    ours = ("verify", "--tenant-id", str(terminal.tenant))
    against = (*ours, "--export", file, "--public-key", terminal.public)
    assert terminal.json(*against)["unforged_up_to_checkpoint"] == 1
    assert "unforged" in terminal.run(*against).stdout
    assert terminal.json(*ours)["unforged_up_to_checkpoint"] is None
    assert "consistent" in terminal.run(*ours).stdout
    terminal.append("a")
    since = terminal.json(*ours, "--since-checkpoint", "--public-key", terminal.public)
    assert {each["stream"]: each["events"] for each in since["streams"]} == {"a": 1, "b": 0}


def test_a_stream_that_was_removed_is_named(terminal: Terminal, file: Path) -> None:
    terminal.forge("DELETE FROM events WHERE stream = 'b'")
    terminal.forge("DELETE FROM event_streams WHERE stream = 'b'")
    ours = ("verify", "--tenant-id", str(terminal.tenant))
    assert terminal.json(*ours)["consistent"]
    said = terminal.json(*ours, "--export", file, "--public-key", terminal.public, status=1)
    bad = [each for each in said["streams"] if not each["consistent"]]
    assert [(each["stream"], each["first_bad_seq"]) for each in bad] == [("b", 1)]


def test_a_changed_export_and_a_strangers_key_are_refused_in_one_sentence(terminal: Terminal, file: Path) -> None:
    stranger = terminal.folder / "stranger.pem"
    stranger.write_text(terminal.run("new-key", "--to", terminal.folder / "other.pem").stdout, encoding="ascii")
    said = terminal.run("verify-export", file, "--public-key", stranger, status=1)
    assert (said.stdout, said.stderr.count("\n")) == ("", 1)
    assert "not among those believed" in said.stderr
    file.write_bytes(file.read_bytes().replace(b"human:x", b"human:y"))
    said = terminal.run("verify-export", file, "--public-key", terminal.public, status=1)
    assert "a, event 1: its content does not match its hash" in said.stderr


def test_the_feed_goes_on_after_its_cursor_and_tells_who_holds_it_back(terminal: Terminal) -> None:
    ours = ("feed", "--tenant-id", str(terminal.tenant))
    for stream in ("a", "b", "a"):
        terminal.append(stream)
    first = terminal.json(*ours, "--limit", "2")
    rest = terminal.json(*ours, "--after", first["cursor"])
    shown = [(event["stream"], event["seq"]) for event in (*first["events"], *rest["events"])]
    assert shown == [("a", 1), ("b", 1), ("a", 2)]
    with psycopg.connect(terminal.database.app) as holder:
        holder.execute("SELECT pg_current_xact_id()")
        terminal.append("c")
        held = terminal.json(*ours, "--after", rest["cursor"])
        assert (held["events"], held["cursor"], held["held_back"]["events"]) == ([], rest["cursor"], 1)
        said = terminal.run(*ours, "--after", rest["cursor"]).stderr
        assert f"1 more since {held['held_back']['since']} wait for server process" in said
    assert "not a cursor" in terminal.run(*ours, "--after", "nonsense", status=2).stderr


def test_an_event_that_is_no_json_any_more_is_shown_as_it_is_stored(terminal: Terminal) -> None:
    for stream in ("a", "b"):
        terminal.append(stream)
    terminal.forge("UPDATE events SET payload = '{' WHERE stream = 'a'")
    page = terminal.json("feed", "--tenant-id", str(terminal.tenant))
    assert [event["payload"] for event in page["events"]] == [{"unreadable": "{"}, {}]
    said = terminal.run("rebuild", "--tenant-id", str(terminal.tenant)).stdout
    assert "agree" in said


def test_tables_that_say_something_else_than_the_events_are_told_of(terminal: Terminal) -> None:
    ours = ("rebuild", "--tenant-id", str(terminal.tenant))
    assert "agree: 0 runs, 0 tickets, 0 budgets" in terminal.run(*ours).stdout
    columns = "tenant_id, scope_kind, scope_id, unit, limit_amount, spent"
    tenant = terminal.tenant
    terminal.forge(f"INSERT INTO budgets ({columns}) VALUES ('{tenant}', 'tenant', '{tenant}', 'EUR', 9, 3)")  # noqa: S608  # ids of ours
    (difference,) = terminal.json(*ours, status=1)["differences"]
    assert (difference["events"], "Decimal('3" in difference["table"]) == ("None", True)


def test_an_export_is_written_whole_or_not_at_all(terminal: Terminal, file: Path) -> None:
    before = file.read_bytes()
    assert (
        "cannot be written"
        in terminal.run("export", "--tenant-id", str(terminal.tenant), "--to", file, status=1).stderr
    )
    assert file.read_bytes() == before
    later = terminal.folder / "later.jsonl"
    said = terminal.run("export", "--tenant-id", str(terminal.tenant), "--to", later, "--after", "1", status=1)
    assert "plm-cli events checkpoint" in said.stderr
    assert not later.exists()


def test_a_stream_is_unforged_only_as_far_as_an_export_holds_it(terminal: Terminal, file: Path) -> None:
    terminal.append("b")
    terminal.append("later")
    ours = ("verify", "--tenant-id", str(terminal.tenant), "--public-key", terminal.public)
    said = terminal.run(*ours, "--export", file).stdout
    assert re.findall(r"^(\w+)  (\d) events  (.+)$", said, re.MULTILINE) == [
        ("a", "1", "unforged up to event 1"),
        ("b", "2", "unforged up to event 1"),
        ("later", "1", "consistent"),
    ]


def test_a_stream_that_has_no_event_is_not_good(terminal: Terminal, file: Path) -> None:
    ours = ("verify", "--tenant-id", str(terminal.tenant), "--stream")
    assert "no events" in terminal.run(*ours, "run/1", status=1).stdout
    assert "1 events" in terminal.run(*ours, "a").stdout


def test_an_export_that_was_cut_off_after_its_first_line_is_not_what_was_signed(terminal: Terminal, file: Path) -> None:
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    for command in (("verify-export", file), ("verify", "--tenant-id", str(terminal.tenant), "--export", file)):
        said = terminal.run(*command, "--public-key", terminal.public, status=1)
        assert "holds no checkpoint" in said.stderr


def test_wrong_arguments_are_told_before_anything_is_tried(terminal: Terminal, file: Path) -> None:
    ours = ("verify", "--tenant-id", str(terminal.tenant))
    assert "--export" in terminal.run(*ours, "--public-key", terminal.public, status=2).stderr
    assert "--public-key" in terminal.run(*ours, "--export", file, status=2).stderr
    assert "--public-key" in terminal.run(*ours, "--since-checkpoint", status=2).stderr
    assert "--public-key" in terminal.run("verify-export", file, status=2).stderr
    both = (*ours, "--export", file, "--since-checkpoint", "--public-key", terminal.public)
    assert "leave out --since-checkpoint" in terminal.run(*both, status=2).stderr
    other = ("verify", "--tenant-id", str(UUID(int=1)), "--export", file, "--public-key", terminal.public)
    assert "is of tenant" in terminal.run(*other, status=2).stderr
    assert "cannot be read" in terminal.run("verify-export", "absent", "--public-key", terminal.public, status=2).stderr
    terminal.key.chmod(0o644)
    assert "chmod 600" in terminal.run("checkpoint", "--tenant-id", str(terminal.tenant), status=3).stderr


@pytest.mark.parametrize(
    "command", ["verify", "rebuild", "checkpoint", "feed", "export", "archive write", "archive prune"]
)
def test_a_tenant_that_is_not_there_is_no_empty_record(terminal: Terminal, command: str) -> None:
    options = {"export": ("--to", "x"), "archive write": ("--archive", str(terminal.folder))}
    arguments = (*command.split(), "--tenant-id", str(UUID(int=1)), *options.get(command, ()))
    assert "[not_found]" in terminal.run(*arguments, status=1).stderr


def test_an_archive_is_written_verified_and_lets_the_database_forget(terminal: Terminal) -> None:
    archive = ("--archive", str(terminal.folder / "archive"))
    ours, believed = ("--tenant-id", str(terminal.tenant)), ("--public-key", terminal.public)
    terminal.append("a")
    terminal.run("checkpoint", *ours)
    assert terminal.json("archive", "write", *ours, *archive)["checkpoint"] == 1
    assert "everything" in terminal.run("archive", "write", *ours, *archive).stdout
    alone = terminal.json("archive", "verify", *ours, *archive, *believed)
    assert (alone["unforged"], alone["events"]) == (True, 1)
    assert terminal.json("verify", *ours, *archive, *believed)["unforged_up_to_checkpoint"] == 1
    assert "nothing to prune" in terminal.run("archive", "prune", *ours).stdout
    assert "one of the two" in terminal.run("archive", "keep", *ours, status=2).stderr
    assert "30 days" in terminal.run("archive", "keep", *ours, "--days", "30").stdout
    assert "nothing to prune" in terminal.run("archive", "prune", *ours).stdout
    terminal.forge("ALTER TABLE event_checkpoints DISABLE TRIGGER ALL")
    terminal.forge("UPDATE event_checkpoints SET taken_at = taken_at - interval '31 days'")
    assert "1 events of 1 streams up to checkpoint 1 are gone" in terminal.run("archive", "prune", *ours).stdout
    told = "SELECT payload ->> 'actor', count(*) FROM audit_log WHERE tenant_id = %s GROUP BY 1"
    with psycopg.connect(terminal.database.admin) as connection:  # a checkpoint, two writings, three prunings
        assert connection.execute(told, [terminal.tenant]).fetchall() == [("system:cli", 6)]
    terminal.forge("UPDATE event_checkpoints SET taken_at = taken_at + interval '31 days'")
    assert terminal.json("verify", *ours, *archive, *believed)["consistent"]
    assert "for ever" in terminal.run("archive", "keep", *ours, "--forever").stdout
    nowhere = ("--archive", str(terminal.folder / "nowhere"))
    assert "holds nothing" in terminal.run("archive", "verify", *ours, *nowhere, *believed, status=1).stderr
    assert "no archive" in terminal.run("archive", "write", *ours, "--archive", "ftp://x", status=2).stderr


def test_a_reader_whom_pruning_overtook_is_refused_once_with_the_cursor_to_go_on_with(terminal: Terminal) -> None:
    ours = ("--tenant-id", str(terminal.tenant))
    terminal.append("tenant")
    behind = terminal.json("feed", *ours)["cursor"]
    terminal.append("tenant")
    terminal.run("checkpoint", *ours)
    terminal.run("archive", "write", *ours, "--archive", terminal.folder / "archive")
    terminal.run("archive", "keep", *ours, "--days", "5")
    with psycopg.connect(terminal.database.admin) as connection:
        connection.execute("ALTER TABLE event_checkpoints DISABLE TRIGGER ALL")
        connection.execute("UPDATE event_checkpoints SET taken_at = taken_at - interval '9 days'")
    assert terminal.json("archive", "prune", *ours)["events"] == 2
    told = terminal.run("feed", *ours, "--after", behind, status=1).stderr
    refused = terminal.json("feed", *ours, "--after", behind, status=1)
    assert (refused["refused"], refused["reason"]) == ("feed_pruned", "feed_pruned")
    assert refused["cursor"] in told
    rest = terminal.json("feed", *ours, "--after", refused["cursor"])
    assert [event["kind"] for event in rest["events"]] == ["events_pruned"]
    assert terminal.json("feed", *ours, "--after", rest["cursor"])["events"] == []


def test_an_archive_that_cannot_be_reached_or_be_one_is_told_in_a_sentence(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("MAX_ATTEMPTS", "1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        away = f"s3://events?endpoint=http://127.0.0.1:{nobody.getsockname()[1]}"
        terminal.append("a")
        ours = ("--tenant-id", str(terminal.tenant))
        terminal.run("checkpoint", *ours)
        keys = ("--public-key", terminal.public)
        for command in (("archive", "write", *ours), ("archive", "verify", *ours, *keys), ("verify", *ours, *keys)):
            said = terminal.run(*command, "--archive", away, status=1).stderr
            assert "the artifact store failed: Could not connect" in said
            for none in (terminal.public, terminal.public / "below"):
                assert "there is no archive: " in terminal.run(*command, "--archive", none, status=2).stderr
    assert "its address is empty" in terminal.run("archive", "write", *ours, "--archive", " ", status=2).stderr


def test_a_tenant_that_is_not_there_keeps_nothing(terminal: Terminal) -> None:
    nobody = ("archive", "keep", "--tenant-id", "00000000-0000-0000-0000-000000000000")
    for much in (("--days", "1"), ("--forever",)):
        assert "00000000-0000-0000-0000-000000000000 does not exist" in terminal.run(*nobody, *much, status=1).stderr
