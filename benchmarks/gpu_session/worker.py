"""A task's process: import, wait for the word to go, call the task's function, and write its rows, one JSON object a line.

    python -m benchmarks.gpu_session.worker MODULE:FUNCTION ROWS OPTIONS IMPORTS

What is slow to import is imported while the part before still runs. Nothing is put on the device until the word comes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STARTED = time.monotonic()


def main() -> int:
    target, path, options, imports = sys.argv[1:5]
    fault: ImportError | None = None
    module_name, function_name = target.split(":")
    try:
        for name in filter(None, [*imports.split(","), module_name]):
            importlib.import_module(name)
    except ImportError as error:
        fault = error
        traceback.print_exc()
    imported = time.monotonic() - STARTED
    if sys.stdin.readline().strip() != "go":
        return 0  # who started it has ended
    with Path(path).open("a", encoding="utf-8") as file:

        def emit(name: str, status: str = "measured", note: str = "", **values: Any) -> None:
            file.write(json.dumps({"name": name, "status": status, "note": note} | values, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

        try:
            if fault is not None:
                raise fault
            function = getattr(importlib.import_module(module_name), function_name)
            function(emit, json.loads(options) | {"imports_s": round(imported, 2)})
        except ImportError as error:
            traceback.print_exc()
            lacks = f"{error.name}: " if error.name else ""
            emit("(import)", "missing", f"{lacks}{one_line(error)}; bring the package as a wheel and pip install it")
            return 1
        except Exception as error:
            traceback.print_exc()
            emit("(task)", "error", one_line(error))
            return 1
    return 0


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no finaliser of a library can hang what has written its rows
