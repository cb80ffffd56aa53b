"""The form of an OAuth scope, the same in tokens and in the files that ask for one."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, Field

_FORM: Final = r"^[\x21\x23-\x5b\x5d-\x7e]{1,128}$"  # RFC 6749, section 3.3


FORM_IN_WORDS: Final = (
    "an OAuth scope is 1 to 128 visible ASCII characters without blanks, quotes and backslashes; no token "
    "carries another"
)


def is_oauth_scope(scope: str) -> bool:
    """Whether a token could carry it."""
    return re.fullmatch(_FORM, scope) is not None


def _checked(scope: str) -> str:
    if not is_oauth_scope(scope):
        raise ValueError(FORM_IN_WORDS)
    return scope


OAuthScope = Annotated[str, AfterValidator(_checked), Field(json_schema_extra={"pattern": _FORM})]
