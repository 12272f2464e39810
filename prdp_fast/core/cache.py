"""Where what can be made again is kept between jobs: prompt shards of the embedded world, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """$PRDP_CACHE, or ~/.cache/prdp_fast."""
    return Path(os.environ.get("PRDP_CACHE") or Path.home() / ".cache" / "prdp_fast")
