"""How every benchmark reports: a table, or with --json one object of figures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number; `baseline` was measured in the same run, `target` may be absent."""

    value: float
    unit: str
    better: Literal["lower", "higher"]
    target: float | None = None
    baseline: float | None = None


def percentile(samples: list[float], fraction: float) -> float:
    """The sample below which `fraction` of them lie (nearest rank)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def report(title: str, figures: dict[str, Figure]) -> None:
    """Print the figures."""
    if "--json" in sys.argv:
        print(json.dumps({"figures": {name: vars(figure) for name, figure in figures.items()}}, indent=2))
        return
    table = Table(title=title, title_justify="left")
    for column in ("figure", "measured", "baseline", "target", "better"):
        table.add_column(column)
    for name, figure in figures.items():
        cells = [
            f"{value:.3g} {figure.unit}" if value is not None else "-"
            for value in (figure.value, figure.baseline, figure.target)
        ]
        table.add_row(name, *cells, figure.better)
    Console().print(table)
