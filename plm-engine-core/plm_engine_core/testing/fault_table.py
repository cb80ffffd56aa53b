"""The table of `docs/reasons.md` under "Under faults": what each operation answers when something around it fails."""

from __future__ import annotations

from enum import StrEnum

GOES_ON = "goes on"
CANNOT_BE = "cannot be: "


class Fault(StrEnum):
    """A column of the table."""

    EVALUATOR = "an evaluator raises, hangs or answers nonsense"
    STORAGE_GONE = "the storage is gone"
    STORAGE_SLOW = "the storage is slow"
    NO_POLICY = "the policy is missing"
    CLOCK_AHEAD = "the clock jumps an hour ahead"
    CLOCK_BACK = "the clock jumps an hour back"


def read_fault_table(page: str) -> dict[Fault, dict[str, str]]:
    """By fault and operation: a reason, `GOES_ON`, or why the cell cannot be, after `CANNOT_BE`.

    Raises:
        ValueError: a column is no fault.
    """
    lines = [line for line in page.partition("## Under faults")[2].splitlines() if line.startswith("|")]
    (_, *faults), _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        Fault(fault): {operation: cells[number].strip("`") for operation, *cells in rows}
        for number, fault in enumerate(faults)
    }


def due(table: dict[Fault, dict[str, str]], fault: Fault, operations: tuple[str, ...]) -> dict[str, str]:
    """What these operations are to answer under a fault, without those that cannot meet it."""
    return {name: table[fault][name] for name in operations if not table[fault][name].startswith(CANNOT_BE)}
