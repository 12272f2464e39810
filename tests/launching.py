"""The deepspeed command of this environment, on a port of its own, so that another job on the machine is not in the way."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port that is free now and that no client socket takes before the job listens on it.

    Port 0 would give one of the ephemeral range (32768 and up on Linux), which every outgoing connection draws from.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def deepspeed_command(script: Path, *arguments: str | Path, ranks: int | None = None) -> list[str]:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    return [*launcher, *(["--num_gpus", str(ranks)] if ranks else []), str(script), *map(str, arguments)]
