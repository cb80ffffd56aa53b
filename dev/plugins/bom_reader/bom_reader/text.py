"""From bytes to text: the encodings a bill may have, and clear words for what is something else."""

from __future__ import annotations

from plugin_substrate.errors import PluginInputError

MAX_BYTES = 64 << 20

_OTHER_FORMATS = {
    b"PK\x03\x04": "is a ZIP archive (an Excel workbook?): save the sheet as CSV and pass that",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook: save the sheet as CSV and pass that",
    b"%PDF": "is a PDF: ask for the bill as CycloneDX JSON or CSV",
    b"\x1f\x8b": "is compressed: pass the unpacked file",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}


def decode(name: str, data: bytes) -> str:
    """Return the text of a bill, UTF-8 with or without a mark, else Windows-1252.

    Raises a PluginInputError that says what is wrong and what to do for anything else, and beyond 64 MiB.
    """
    if len(data) > MAX_BYTES:
        raise _unreadable(f"{name} has {len(data)} bytes; the limit is {MAX_BYTES}: split the bill")
    for signature, advice in _OTHER_FORMATS.items():
        if data.startswith(signature):
            raise _unreadable(f"{name} {advice}")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not text.strip():
            raise _unreadable(f"{name} is empty: pass a CycloneDX JSON or a CSV bill")
        if "\0" not in text:
            return text
        break
    raise _unreadable(f"{name} is not text in UTF-8 or Windows-1252: save it as UTF-8")


def _unreadable(message: str) -> PluginInputError:
    return PluginInputError(message, fields_invalid=["bom"])
