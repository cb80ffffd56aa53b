"""How every benchmark reports: a table, or with --json one object of figures."""

from __future__ import annotations

import argparse
import json
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


def command_line(purpose: str) -> argparse.ArgumentParser:
    """What every benchmark can be asked; a script adds its own options."""
    parser = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", dest="as_json", help="one object of figures instead of a table")
    return parser


def report(title: str, figures: dict[str, Figure], *, as_json: bool) -> None:
    """Print the figures."""
    if as_json:
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
