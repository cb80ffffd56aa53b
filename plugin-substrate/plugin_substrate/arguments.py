"""Arguments that stand in files: an object with ``to_temp_file()`` becomes the path that it gives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import FileBackedDTO


async def with_paths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace each `FileBackedDTO`; one that fails to write its file is a `PluginInputError` that names it.

    Writing happens in another thread. Whether the plugin may read the path is a matter of its isolation profile.
    """
    if not any_files(args, kwargs):
        return tuple(args), dict(kwargs)
    return await asyncio.to_thread(_replaced, args, kwargs)


def any_files(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether there may be a `FileBackedDTO` among them."""
    return any(hasattr(value, "to_temp_file") for value in (*args, *kwargs.values()))  # the protocol asks slowly


def _replaced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        tuple(_path(value, f"args[{index}]") for index, value in enumerate(args)),
        {name: _path(value, name) for name, value in kwargs.items()},
    )


def _path(value: Any, name: str) -> Any:
    if not isinstance(value, FileBackedDTO):
        return value
    try:
        return str(value.to_temp_file())
    except Exception as error:
        raise PluginInputError(f"{name} cannot be written to a file: {error}", fields_invalid=[name]) from error
