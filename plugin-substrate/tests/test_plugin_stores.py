"""The stores of a host: each form keeps the same promises, and the files keep more."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from plugin_substrate.errors import StoreError
from plugin_substrate.stores.config import (
    InMemoryPluginConfigStore,
    LocalPluginConfigStore,
    PluginConfigRecord,
    PluginConfigStore,
)
from plugin_substrate.stores.sealing import KEY_VARIABLE
from plugin_substrate.stores.secret import InMemorySecretStore, LocalSecretStore, SecretStore, default_secret_store


@pytest.fixture(params=["memory", "file"])
def secrets(request: pytest.FixtureRequest, tmp_path: Path) -> SecretStore:
    return InMemorySecretStore() if request.param == "memory" else LocalSecretStore(tmp_path / "s" / "secrets.json")


@pytest.fixture(params=["memory", "file"])
def configs(request: pytest.FixtureRequest, tmp_path: Path) -> PluginConfigStore:
    return InMemoryPluginConfigStore() if request.param == "memory" else LocalPluginConfigStore(tmp_path / "c" / "c.db")


# -- secrets, in any form


def test_secrets_are_kept_by_scope_plugin_and_key(secrets: SecretStore) -> None:
    assert secrets.get_secret("reader", "TOKEN") is None
    assert secrets.list_keys("reader") == []
    secrets.set_secret("reader", "TOKEN", "one")
    secrets.set_secret("reader", "KEY", "two")
    secrets.set_secret("reader", "TOKEN", "other", scope="test")
    assert secrets.get_secret("reader", "TOKEN") == "one"
    assert secrets.get_secret("reader", "TOKEN", scope="test") == "other"
    assert secrets.get_secret("writer", "TOKEN") is None
    assert secrets.list_keys("reader") == ["KEY", "TOKEN"]
    secrets.set_secret("reader", "TOKEN", "three")
    assert secrets.get_secret("reader", "TOKEN") == "three"


def test_a_deleted_secret_is_gone_and_leaves_the_others(secrets: SecretStore) -> None:
    secrets.set_secret("reader", "TOKEN", "one")
    secrets.set_secret("writer", "TOKEN", "two")
    assert secrets.delete_secret("reader", "TOKEN")
    assert not secrets.delete_secret("reader", "TOKEN")
    assert secrets.list_keys("reader") == []
    assert secrets.get_secret("writer", "TOKEN") == "two"


@pytest.mark.parametrize(("key", "value"), [("", "s3cret"), ("A=B", "s3cret"), ("A\nB", "s3cret"), ("A", "s3cret\0")])
def test_what_no_variable_can_hold_is_refused_without_quoting_it(secrets: SecretStore, key: str, value: str) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        secrets.set_secret("reader", key, value)
    assert "s3cret" not in str(caught.value)


# -- secrets, in a file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "secrets.json"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_this_user_can_read_the_file_whatever_the_umask(file: Path) -> None:
    before = os.umask(0)
    try:
        LocalSecretStore(file).set_secret("reader", "TOKEN", "one")
    finally:
        os.umask(before)
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)


def test_a_file_that_others_could_read_is_closed_with_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LocalSecretStore(file)
    store.set_secret("reader", "TOKEN", "s3cret")
    file.chmod(0o644)
    file.parent.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        assert store.get_secret("reader", "TOKEN") == "s3cret"
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert "could be used by others (mode 0644): closed to 0600" in caplog.text
    assert "s3cret" not in caplog.text


def test_a_link_in_the_place_of_the_file_is_refused(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir(mode=0o700)
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(StoreError, match="is a link"):
        LocalSecretStore(file).set_secret("reader", "TOKEN", "one")
    assert not (tmp_path / "elsewhere.json").exists()


def test_what_is_no_file_is_refused_and_stays_as_it_is(file: Path) -> None:
    """A device, as root's: to close that to others would close it for the whole system."""
    file.parent.mkdir(mode=0o700)
    os.mkfifo(file)
    file.chmod(0o666)
    with pytest.raises(StoreError, match="is no file"):
        LocalSecretStore(file).get_secret("reader", "TOKEN")
    assert file.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"__default__": {"reader": {"TOKEN": 1}}}', b"[]", b"\xff", b"[" * 99999]
)
def test_a_file_that_cannot_be_read_refuses_every_change_and_stays_as_it_is(file: Path, content: bytes) -> None:
    file.parent.mkdir(mode=0o700)
    file.write_bytes(content)
    file.chmod(0o600)
    store = LocalSecretStore(file)
    uses: list[Callable[[], object]] = [
        lambda: store.get_secret("reader", "TOKEN"),
        lambda: store.set_secret("reader", "OTHER", "two"),
        lambda: store.delete_secret("reader", "TOKEN"),
        lambda: store.list_keys("reader"),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="is not a file of secrets") as caught:
            use()
        assert caught.value.path == str(file)
    assert file.read_bytes() == content


def test_many_writers_at_once_lose_nothing(file: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from plugin_substrate.stores.secret import LocalSecretStore\n"
        "store = LocalSecretStore(Path(sys.argv[1]))\n"
        "for n in range(20): store.set_secret('reader', f'KEY_{sys.argv[2]}_{n}', 'value')"
    )
    others = [subprocess.Popen([sys.executable, "-c", script, str(file), str(number)]) for number in range(2)]
    store = LocalSecretStore(file)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: store.set_secret("reader", f"KEY_{n}", "value"), range(20)))
    assert [other.wait(60) for other in others] == [0, 0]
    assert len(store.list_keys("reader")) == 60
    assert {path.name for path in file.parent.iterdir()} == {"secrets.json", ".secrets.json.lock"}


def test_a_writer_that_fails_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalSecretStore(file)
    store.set_secret("reader", "TOKEN", "one")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StoreError, match="No space left"):
        store.set_secret("reader", "TOKEN", "two")
    monkeypatch.undo()
    assert store.get_secret("reader", "TOKEN") == "one"
    assert {path.name for path in file.parent.iterdir()} == {"secrets.json", ".secrets.json.lock"}


# -- configurations, in any form


def test_configurations_are_kept_by_plugin(configs: PluginConfigStore) -> None:
    assert configs.get("reader") is None
    assert configs.list_all() == []
    configs.set(PluginConfigRecord(plugin_name="writer", config={"a": [1, {"b": None}]}))
    configs.set(PluginConfigRecord(plugin_name="reader", config={"x": 1}, enabled=False))
    first = configs.get("reader")
    assert first is not None
    assert (first.config, first.enabled) == ({"x": 1}, False)
    assert [record.plugin_name for record in configs.list_all()] == ["reader", "writer"]
    configs.set(PluginConfigRecord(plugin_name="reader", config={"y": 2}))
    second = configs.get("reader")
    assert second is not None
    assert (second.config, second.enabled) == ({"y": 2}, True)
    assert second.updated_at >= first.updated_at > 0


def test_a_deleted_configuration_is_gone(configs: PluginConfigStore) -> None:
    assert not configs.delete("reader")
    configs.set(PluginConfigRecord(plugin_name="reader"))
    assert configs.delete("reader")
    assert configs.get("reader") is None


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x"])
def test_a_configuration_that_is_not_json_is_refused(configs: PluginConfigStore, value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        configs.set(PluginConfigRecord(plugin_name="reader", config={"a": value}))


# -- configurations, in a file


def test_reading_makes_no_file_and_writing_one_for_this_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "data" / "plugin_configs.db"
    store = LocalPluginConfigStore(file)
    store.get("reader")
    store.list_all()
    store.delete("reader")
    assert not file.parent.exists()
    store.set(PluginConfigRecord(plugin_name="reader"))
    assert mode(file) == 0o600
    file.parent.chmod(0o755)  # a plugin that runs as another user has to pass through
    store.set(PluginConfigRecord(plugin_name="reader"))
    assert mode(file.parent) == 0o755
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_damaged_file_or_row_is_an_error_and_never_an_empty_configuration(tmp_path: Path) -> None:
    file = tmp_path / "plugin_configs.db"
    store = LocalPluginConfigStore(file)
    store.set(PluginConfigRecord(plugin_name="reader", config={"a": 1}))
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("UPDATE plugin_configs SET config_json = '{'")
    connection.close()
    with pytest.raises(StoreError, match="'reader'"):
        store.get("reader")
    store.set(PluginConfigRecord(plugin_name="reader", config={"a": 2}))
    assert store.get("reader") is not None
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"plugin_configs\.db"):
        store.get("reader")


def test_writers_in_several_threads_wait_for_each_other(tmp_path: Path) -> None:
    store = LocalPluginConfigStore(tmp_path / "plugin_configs.db")

    def write(number: int) -> None:
        store.set(PluginConfigRecord(plugin_name=f"p{number}", config={"n": number}))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(40)))
    assert len(store.list_all()) == 40


def test_hosts_that_start_at_once_make_one_store_and_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from plugin_substrate.stores.config import LocalPluginConfigStore as Store, PluginConfigRecord as Record\n"
        "print('there', flush=True); sys.stdin.readline()\n"
        "for folder in range(10):\n"
        "    store = Store(Path(sys.argv[1], str(folder), 'configs.db'))\n"
        "    for n in range(3): store.set(Record(plugin_name=f'reader-{sys.argv[2]}-{n}', config={'n': n}))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    hosts = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for number in range(3)
    ]
    for host in hosts:
        assert host.stdout is not None
        assert host.stdout.readline() == b"there\n"
    for host in hosts:
        host.communicate(b"\n", 120)
    assert [host.returncode for host in hosts] == [0, 0, 0]
    for folder in range(10):
        assert len(LocalPluginConfigStore(tmp_path / str(folder) / "configs.db").list_all()) == 9


# -- secrets that are encrypted


def key() -> str:
    return Fernet.generate_key().decode()


def test_with_a_key_in_the_environment_no_secret_stands_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key())
    default_secret_store(tmp_path).set_secret("reader", "TOKEN", "s3cret", "a-tenant")
    content = (tmp_path / "secrets" / "secrets.json").read_bytes()
    assert not any(word in content for word in (b"s3cret", b"TOKEN", b"reader", b"a-tenant"))
    assert default_secret_store(tmp_path).get_secret("reader", "TOKEN", "a-tenant") == "s3cret"


def test_a_file_in_plain_text_is_encrypted_by_the_next_change(file: Path) -> None:
    LocalSecretStore(file).set_secret("reader", "TOKEN", "s3cret")
    store = LocalSecretStore(file, cipher=Fernet(key()))
    assert store.get_secret("reader", "TOKEN") == "s3cret"
    store.set_secret("reader", "OTHER", "x")
    assert b"s3cret" not in file.read_bytes()
    assert store.list_keys("reader") == ["OTHER", "TOKEN"]


@pytest.mark.parametrize("cipher", [None, Fernet(Fernet.generate_key())], ids=["no key", "another key"])
def test_without_its_key_an_encrypted_file_is_neither_read_nor_written(file: Path, cipher: Fernet | None) -> None:
    LocalSecretStore(file, cipher=Fernet(key())).set_secret("reader", "TOKEN", "s3cret")
    before = file.read_bytes()
    store = LocalSecretStore(file, cipher=cipher)
    for change in (lambda: store.set_secret("reader", "A", "x"), lambda: store.get_secret("reader", "TOKEN")):
        with pytest.raises(StoreError, match=KEY_VARIABLE):
            change()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-8], lambda raw: raw[:50] + (b"B" if raw[50:51] == b"A" else b"A") + raw[51:]]
)
def test_an_encrypted_file_that_was_changed_is_refused(file: Path, damage: Callable[[bytes], bytes]) -> None:
    store = LocalSecretStore(file, cipher=Fernet(key()))
    store.set_secret("reader", "TOKEN", "s3cret")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StoreError, match="damaged"):
        store.get_secret("reader", "TOKEN")


# Runs in a process of its own, which kills itself at one of its calls.
ROTATION = """
import os, pathlib, signal, sys
from plugin_substrate.stores.secret import default_secret_store

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

match sys.argv[2]:
    case "before it is on the disk": os.fsync = die
    case "before it is in place": pathlib.Path.replace = die
    case "when it is in place":
        is_folder = lambda descriptor: os.path.isdir(f"/proc/self/fd/{descriptor}")
        os.fsync = lambda descriptor: die() if is_folder(descriptor) else None
default_secret_store(pathlib.Path(sys.argv[1])).seal_anew()
"""


@pytest.mark.parametrize(
    "moment", ["before it is on the disk", "before it is in place", "when it is in place", "never"]
)
def test_keys_are_changed_while_hosts_run_and_a_change_that_is_killed_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old, new = key(), key()

    def with_keys(*keys: str) -> SecretStore:
        monkeypatch.setenv(KEY_VARIABLE, ",".join(keys))
        return default_secret_store(tmp_path)

    with_keys(old).set_secret("reader", "TOKEN", "s3cret")
    with_keys(new, old)
    done = subprocess.run([sys.executable, "-c", ROTATION, str(tmp_path), moment], check=False)
    assert done.returncode == (0 if moment == "never" else -signal.SIGKILL)
    assert with_keys(new, old).get_secret("reader", "TOKEN") == "s3cret", "a host that has both reads it in any case"
    assert default_secret_store(tmp_path).seal_anew()
    assert with_keys(new).get_secret("reader", "TOKEN") == "s3cret"
    with pytest.raises(StoreError):
        with_keys(old).get_secret("reader", "TOKEN")
    assert sorted(left.name for left in (tmp_path / "secrets").iterdir()) == [".secrets.json.lock", "secrets.json"]


def test_what_a_killed_writer_left_in_plain_text_goes_with_the_next_change(file: Path) -> None:
    store = LocalSecretStore(file)
    store.set_secret("reader", "TOKEN", "s3cret")
    (file.parent / f".{file.name}.abandoned").write_bytes(file.read_bytes())
    LocalSecretStore(file, cipher=Fernet(key())).seal_anew()
    assert not any(b"s3cret" in left.read_bytes() for left in file.parent.iterdir())


@pytest.mark.parametrize("text", ["hunter2", "hunter2,", "{key},hunter2"])
def test_what_is_no_key_is_said_without_repeating_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, text.format(key=Fernet.generate_key().decode()))
    with pytest.raises(StoreError, match="32 bytes") as caught:
        default_secret_store(tmp_path)
    assert "hunter2" not in str(caught.value)
