"""Secrets of plugins: by scope, plugin and key. They leave the host in one way only, as variables of a worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from plugin_substrate.errors import StoreError
from plugin_substrate.stores.files import lock_of, locked, make_private, private_folder, remove_abandoned, replace_file
from plugin_substrate.stores.sealing import KEY_VARIABLE, Cipher, cipher_from_environment, seal, unseal

DEFAULT_SCOPE = "__default__"

_Tree = dict[str, dict[str, dict[str, str]]]  # scope, plugin, key


class SecretStore(Protocol):
    """Where secrets are kept. A scope of None is the default one."""

    def get_secret(self, plugin_name: str, key: str, scope: str | None = None) -> str | None:
        """Return a secret, None when there is none."""
        ...

    def set_secret(self, plugin_name: str, key: str, value: str, scope: str | None = None) -> None:
        """Keep a secret. An empty name, or a value that no variable can hold, is a ValueError that never quotes it."""
        ...

    def delete_secret(self, plugin_name: str, key: str, scope: str | None = None) -> bool:
        """Forget a secret; False when there is none."""
        ...

    def list_keys(self, plugin_name: str, scope: str | None = None) -> list[str]:
        """Return the names of a plugin's secrets, sorted."""
        ...


class InMemorySecretStore:
    """Keeps secrets for as long as the process runs."""

    def __init__(self) -> None:
        self._tree: _Tree = {}

    def get_secret(self, plugin_name: str, key: str, scope: str | None = None) -> str | None:
        """Return a secret, None when there is none."""
        return _get(self._tree, plugin_name, key, scope)

    def set_secret(self, plugin_name: str, key: str, value: str, scope: str | None = None) -> None:
        """Keep a secret."""
        _set(self._tree, plugin_name, key, value, scope)

    def delete_secret(self, plugin_name: str, key: str, scope: str | None = None) -> bool:
        """Forget a secret; False when there is none."""
        return _delete(self._tree, plugin_name, key, scope)

    def list_keys(self, plugin_name: str, scope: str | None = None) -> list[str]:
        """Return the names of a plugin's secrets, sorted."""
        return _keys(self._tree, plugin_name, scope)


class LocalSecretStore:
    """Keeps secrets in one file of mode 0600 in a folder of mode 0700.

    With a ``cipher`` what is written is encrypted, a file from before included; without one it is plain text, and
    whoever is this user reads it. A file that was encrypted is never written in plain text.

    A change is one atomic replacement under a lock, so that any number of processes may share the file. A file that
    cannot be read is a `StoreError`, for changes too: nothing is ever lost by writing over it.
    """

    def __init__(self, path: Path, *, cipher: Cipher | None = None) -> None:
        self._path = path
        self._cipher = cipher

    def __repr__(self) -> str:
        return f"LocalSecretStore({str(self._path)!r})"

    def get_secret(self, plugin_name: str, key: str, scope: str | None = None) -> str | None:
        """Return a secret, None when there is none."""
        return _get(self._read(), plugin_name, key, scope)

    def set_secret(self, plugin_name: str, key: str, value: str, scope: str | None = None) -> None:
        """Keep a secret."""
        _check(plugin_name, key, value, scope)
        with self._changing() as tree:
            _set(tree, plugin_name, key, value, scope)

    def delete_secret(self, plugin_name: str, key: str, scope: str | None = None) -> bool:
        """Forget a secret; False when there is none."""
        if self.get_secret(plugin_name, key, scope) is None:
            return False
        with self._changing() as tree:
            return _delete(tree, plugin_name, key, scope)

    def list_keys(self, plugin_name: str, scope: str | None = None) -> list[str]:
        """Return the names of a plugin's secrets, sorted."""
        return _keys(self._read(), plugin_name, scope)

    def seal_anew(self) -> bool:
        """Encrypt the file with the cipher as it is now; False when there is none. Without a cipher a `StoreError`.

        Whoever is killed in the middle leaves the file as it was, or done; doing it again does no harm.
        """
        if self._cipher is None:
            raise StoreError(f"there is no key to encrypt {self._path} with; set {KEY_VARIABLE}", path=str(self._path))
        if not self._path.exists():
            return False
        with self._changing():
            pass
        return True

    @contextmanager
    def _changing(self) -> Iterator[_Tree]:
        try:
            private_folder(self._path.parent)
            with locked(lock_of(self._path)):
                tree = self._read()
                yield tree
                remove_abandoned(self._path)
                content = (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()
                replace_file(self._path, seal(content, self._cipher))
        except OSError as error:
            raise StoreError(f"secrets cannot be kept in {self._path}: {error}", path=str(self._path)) from error

    def _read(self) -> _Tree:
        make_private(self._path.parent, 0o700)
        make_private(self._path, 0o600)
        try:
            return _checked(json.loads(unseal(self._path.read_bytes(), self._cipher, self._path)))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}", path=str(self._path)) from error
        except (ValueError, RecursionError):
            # Without its cause: that would quote the file.
            raise StoreError(
                f"{self._path} is not a file of secrets; mend it, or move it away and set the secrets anew",
                path=str(self._path),
            ) from None


def default_secret_store(data_dir: Path) -> LocalSecretStore:
    """Return the store of a host's data folder, encrypted where the environment has a key for it."""
    return LocalSecretStore(data_dir / "secrets" / "secrets.json", cipher=cipher_from_environment())


def _checked(tree: object) -> _Tree:
    """Return what was read if it has the form of a tree, else a ValueError."""
    match tree:
        case dict() if all(
            isinstance(plugins, dict)
            and all(
                isinstance(keys, dict) and all(isinstance(v, str) for v in keys.values()) for keys in plugins.values()
            )
            for plugins in tree.values()
        ):
            return tree
    raise ValueError("another form")


def _check(plugin_name: str, key: str, value: str, scope: str | None) -> None:
    for what, text in (("plugin name", plugin_name), ("key", key), ("scope", scope or DEFAULT_SCOPE)):
        if not isinstance(text, str) or not text or not text.isprintable() or "=" in text:
            raise ValueError(f"the {what} of a secret must be printable text without '=', not {text!r:.80}")
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"the secret {key!r} of {plugin_name!r} must be text that is not empty and holds no NUL")


def _get(tree: _Tree, plugin_name: str, key: str, scope: str | None) -> str | None:
    return tree.get(scope or DEFAULT_SCOPE, {}).get(plugin_name, {}).get(key)


def _set(tree: _Tree, plugin_name: str, key: str, value: str, scope: str | None) -> None:
    _check(plugin_name, key, value, scope)
    tree.setdefault(scope or DEFAULT_SCOPE, {}).setdefault(plugin_name, {})[key] = value


def _delete(tree: _Tree, plugin_name: str, key: str, scope: str | None) -> bool:
    """Take a secret away, and with it the levels it leaves empty."""
    plugins = tree.get(scope or DEFAULT_SCOPE, {})
    keys = plugins.get(plugin_name, {})
    if key not in keys:
        return False
    del keys[key]
    if not keys:
        del plugins[plugin_name]
    if not plugins:
        del tree[scope or DEFAULT_SCOPE]
    return True


def _keys(tree: _Tree, plugin_name: str, scope: str | None) -> list[str]:
    return sorted(tree.get(scope or DEFAULT_SCOPE, {}).get(plugin_name, {}))
