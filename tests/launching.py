"""The deepspeed command of this environment, on a port of its own, so that another job on the machine is not in the way."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def deepspeed_command(script: Path, *arguments: str | Path, ranks: int | None = None) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(port)]
    return [*launcher, *(["--num_gpus", str(ranks)] if ranks else []), str(script), *map(str, arguments)]
