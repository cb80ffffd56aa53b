"""The report as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import base64
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from report_writer.content import SEVERITIES, Content

MAX_SHOWN = 5_000


def render_page(content: Content, chart_png: bytes) -> bytes:
    """Return the page in UTF-8. Every text is escaped, and a policy in the page forbids scripts and network besides."""
    page: str = _template().render(
        content=content,
        severities=SEVERITIES,
        chart=base64.b64encode(chart_png).decode("ascii"),
        shown=content.findings[:MAX_SHOWN],
        hidden=max(0, len(content.findings) - MAX_SHOWN),
    )
    return page.encode("utf-8", errors="replace")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("report_writer", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
