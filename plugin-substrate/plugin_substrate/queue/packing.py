"""How arguments are kept in memory while their call waits: as bytes, so that nobody changes what was submitted."""

from __future__ import annotations

import marshal
from collections.abc import Mapping, Sequence
from typing import Any

from plugin_substrate.worker.values import decode_value, encode_value

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def pack_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """Return arguments as bytes of this interpreter; a `WireValueError` names what of them cannot cross to a plugin."""
    args, kwargs = list(args), dict(kwargs)
    segments: list[bytes] = []
    encoded = [encode_value(args, "args", segments), encode_value(kwargs, "kwargs", segments)]
    if not segments and encoded == [args, kwargs]:  # nothing but what JSON knows: it stands for itself
        return marshal.dumps((args, kwargs))
    return marshal.dumps((*encoded, [bytes(segment) for segment in segments]))


def unpack_arguments(packed: bytes) -> Arguments:
    """Return the arguments that `pack_arguments` was given."""
    args, kwargs, *segments = marshal.loads(packed)  # noqa: S302 - made above, by this process
    if segments:
        args, kwargs = decode_value([args, kwargs], segments[0])
    return tuple(args), kwargs
