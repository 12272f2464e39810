"""What libraries read from the environment when they are imported: the entry points set it before anything heavy is."""

from __future__ import annotations

import os


def prepare() -> None:
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    # One thread pool per rank: without this every rank would start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local_ranks)))
    # transformers and diffusers speak while they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
