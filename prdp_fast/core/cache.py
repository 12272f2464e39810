"""Where what can be made again is kept between jobs: prompt shards of the embedded world, compiled code."""

from __future__ import annotations

import os
from pathlib import Path

from prdp_fast.core.errors import UserError


def default_cache_dir() -> Path:
    """$PRDP_CACHE, or ~/.cache/prdp_fast. Raises: UserError if there is no home."""
    try:
        return Path(os.environ.get("PRDP_CACHE") or Path.home() / ".cache" / "prdp_fast")
    except RuntimeError:
        raise UserError("there is no home directory for the cache; set PRDP_CACHE or HOME to one that can be written") from None
