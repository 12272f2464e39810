"""Text of others, such as a library's error, without what should not be printed or written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SHORTEST = 6  # characters of a variable's value that is taken for a secret: shorter ones occur in any text


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without user and password of URLs, and without the values of variables that are named like secrets."""
    values = [
        value for name, value in (os.environ if environment is None else environment).items()
        if _SECRET_NAME.search(name) and len(value) >= SHORTEST
    ]  # fmt: skip
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return re.sub(r"(//)[^/\s@]+@", r"\1***@", text)
