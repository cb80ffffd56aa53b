"""CSV bills: delimiter and headers are found; a row that cannot be used is reported with its line and the reason."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator

from plugin_substrate.errors import PluginInputError

from bom_reader.bill import BadRow, Bill, Component, clean
from bom_reader.columns import SYNONYMS, map_columns, squeeze, usable

DELIMITERS = ",;\t|"
HEADER_WITHIN = 20  # titles and blank lines may stand above the headers

Row = tuple[int, list[str]]


def read_csv(name: str, text: str, check_cancel: Callable[[], None]) -> Bill:
    """Read a CSV bill; a PluginInputError when no delimiter gives a header row that names parts."""
    delimiter, header_line, headers = _find_headers(name, text)
    mapping = map_columns(headers)
    bill = Bill(
        file_name=clean(name),
        format="csv",
        column_mapping={field: clean(headers[column]) for field, column in mapping.items()},
        unmapped_columns=[clean(one) for column, one in enumerate(headers) if column not in mapping.values()],
    )
    squeezed = [squeeze(header) for header in headers]
    rows = _rows(text, delimiter)
    while True:
        check_cancel()
        try:
            line, cells = next(rows)
        except StopIteration:
            return bill
        except csv.Error as error:
            raise _refused(f"{name} is not readable as CSV: {error}") from error
        if line > header_line and any(cell.strip() for cell in cells):
            _add_row(bill, line, cells, mapping, squeezed, decimal_comma=delimiter != ",")


def _rows(text: str, delimiter: str) -> Iterator[Row]:
    """Yield rows with the line each begins on: a quoted cell may run over several."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begins = 1
    for cells in reader:
        yield begins, cells
        begins = reader.line_num + 1


def _find_headers(name: str, text: str) -> tuple[str, int, list[str]]:
    """Return delimiter, line and cells of the header row: the one near the top that names the most fields."""
    best: tuple[int, str, int, list[str]] | None = None
    top = "\n".join(text.splitlines()[: HEADER_WITHIN + 1])
    for delimiter in DELIMITERS:
        for line, cells in _top_rows(top, delimiter):
            mapping = map_columns(cells)
            if usable(mapping) and (best is None or len(mapping) > best[0]):
                best = (len(mapping), delimiter, line, cells)
    if best is None:
        wanted = "; ".join(f"{field}: {', '.join(names[:3])}" for field, names in SYNONYMS.items())
        raise _refused(
            f"{name} has no header row that names parts within its first {HEADER_WITHIN} lines. Name the columns, for "
            f"example {wanted}. Delimiters may be comma, semicolon, tab or |."
        )
    return best[1], best[2], best[3]


def _top_rows(top: str, delimiter: str) -> Iterator[Row]:
    rows = _rows(top, delimiter)
    while True:
        try:
            yield next(rows)
        except (StopIteration, csv.Error):  # the cut may run through a quoted cell, and a delimiter may be wrong
            return


def _add_row(
    bill: Bill, line: int, cells: list[str], mapping: dict[str, int], squeezed: list[str], *, decimal_comma: bool
) -> None:
    """Add the row as a component, as a bad row, or as both when only its quantity is wrong."""
    width = len(squeezed)
    problem = ""
    if [squeeze(cell) for cell in cells] == squeezed:
        problem = "the header row again"
    elif any(cell.strip() for cell in cells[width:]):
        problem = f"{len(cells)} cells under {width} headers: an unquoted delimiter?"
    if problem:
        bill.bad_rows.append(BadRow(where=line, reason=problem, kept=False))
        return
    try:
        values = {field: clean(cells[column]) if column < len(cells) else "" for field, column in mapping.items()}
        component = _component(line, values, decimal_comma=decimal_comma)
    except ValueError as error:
        bill.bad_rows.append(BadRow(where=line, reason=str(error), kept=False))
        return
    bill.components.append(component)
    if "quantity" in mapping and component.quantity is None:
        stated = values["quantity"]
        reason = f"quantity {stated!r} is not a positive number" if stated else "the quantity is missing"
        bill.bad_rows.append(BadRow(where=line, reason=reason, kept=True))


def _component(line: int, values: dict[str, str], *, decimal_comma: bool) -> Component:
    name = values.get("name") or values.get("ref") or values.get("description", "")
    if not name:
        raise ValueError("no name, part number or description")
    return Component(
        ref=values.get("ref") or name,
        name=name,
        description=values.get("description", ""),
        version=values.get("version", ""),
        purl=values.get("purl", ""),
        supplier=values.get("supplier", ""),
        quantity=_quantity(values.get("quantity", ""), decimal_comma=decimal_comma),
        licenses=(values["licenses"],) if values.get("licenses") else (),
        line=line,
    )


def _quantity(text: str, *, decimal_comma: bool) -> float | None:
    """Return a positive number, else None: a quantity is never guessed."""
    try:
        number = float(text.replace(",", ".") if decimal_comma else text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 and "_" not in text else None


def _refused(message: str) -> PluginInputError:
    return PluginInputError(message, fields_invalid=["bom"])
