"""Runs tests against copies of the kernels: a server on stdin and stdout, so that torch is imported once for all copies.

A request is a line of JSON: {"kernels": folder that holds prdp_kernels, "tests": pytest arguments}. A child is forked for it
before anything of the kernels is imported; the answer is a line of JSON with pytest's exit status and what it printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy  # noqa: F401
import pytest
import torch
import torch._dynamo
import triton.language  # noqa: F401

with contextlib.suppress(ImportError):
    import hypothesis.strategies  # noqa: F401

ROOT = Path(__file__).parents[2]


def run(request: dict) -> dict:
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            # The settings of the repository put its own kernels on the path: the copy takes their place.
            paths = f"pythonpath={request['kernels']} tests"
            options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore", "-o", paths]
            status = 99
            try:
                status = int(pytest.main([*options, *request["tests"]]))
                sys.stdout.flush()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "output": log.read()}


if __name__ == "__main__":
    os.chdir(ROOT)
    torch.set_num_threads(1)
    assert "prdp_kernels" not in sys.modules
    answers = os.fdopen(os.dup(1), "w")  # what tests print goes elsewhere
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
