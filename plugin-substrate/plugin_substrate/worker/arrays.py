"""numpy arrays, without numpy: only who has imported it has arrays, so it is looked for among the loaded modules."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

# Booleans, whole and floating numbers, complex ones, and times with their unit: all that is only bytes.
_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[mM]8(?:\[\d*[A-Za-z]{1,2}\])?)")
_MAX_DIMENSIONS = 32


def is_array(value: object) -> bool:
    """Whether this is exactly a numpy array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is getattr(numpy, "ndarray", None)


def array_parts(array: Any) -> tuple[str, list[int], bytes]:
    """Return dtype, shape and the bytes in C order; a ValueError for a dtype that is more than bytes."""
    dtype = array.dtype.str
    if array.dtype.hasobject or array.dtype.names is not None or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"an array of dtype {array.dtype} cannot cross; convert it to numbers, or to a list")
    return dtype, list(array.shape), array.tobytes()


def array_from(dtype: object, shape: object, data: bytes) -> Any:
    """Return a new, writable array; a ValueError when the parts do not make one, an ImportError without numpy."""
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{dtype!r:.40} is not a dtype that can cross")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape!r:.80} is not the shape of an array")
    numpy = sys.modules.get("numpy")
    if numpy is None:
        raise ImportError("numpy is not imported here")
    if math.prod(shape) * numpy.dtype(dtype).itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are not an array of {dtype} and {shape!r:.80}")
    return numpy.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
