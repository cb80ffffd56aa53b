"""``plm-cli why``: why a run, an attempt, a ticket or a budget stands where it stands."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from plm_engine_core.cli.output import AsJson, one_line, show
from plm_engine_core.cli.storage import with_books
from plm_engine_core.control_plane.why import Why, why


def why_command(
    asked: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="RUN, TICKET, RUN/STEP, RUN/STEP/ATTEMPT, RUN/UNIT, TENANT/UNIT or SCOPE/NAME/UNIT, then /PERIOD.",
        ),
    ],
    tenant_id: Annotated[UUID, typer.Option(help="Whose.")],
    as_json: AsJson = False,
) -> None:
    """Say what was decided, at which stage, by which rule or limit, and what would unblock it.

    Everything comes from the records; nothing is changed. Status 0: said; 1: no such thing in this tenant, or the
    database refused; 2: wrong arguments; 3: no address.
    """
    answer = with_books(lambda books: why(books.storage, tenant_id, asked), as_json=as_json)
    show(answer.to_json(), "\n".join(map(one_line, _lines(answer))), as_json=as_json)


def _lines(answer: Why, indent: str = "") -> list[str]:
    lines = [f"{indent}{answer.kind} {answer.id}: {answer.state}" + (f" ({answer.reason})" if answer.reason else "")]
    lines += [f"{indent}  {answer.message}"] if answer.message else []
    named = {"stage": answer.stage, "rule": answer.rule, "policy": answer.policy_digest}
    lines += [f"{indent}  {name}: {value}" for name, value in named.items() if value]
    for what, said in {"limit": answer.limit, "lock": answer.lock}.items():
        if said:
            lines.append(f"{indent}  {what}: {', '.join(f'{name} {value}' for name, value in said.items())}")
    if answer.unblocked_by:
        lines.append(f"{indent}  unblocked by {answer.unblocked_by}")
    return lines + (_lines(answer.because, f"{indent}  ") if answer.because is not None else [])
