"""What a session leaves: one JSON, whole after every row, and one Markdown page, drawn anew after every part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prdp_fast.core.files import write_json, write_text

SCHEMA = 1
SOUND = {"passed", "measured", "clean", "told", "skipped test", "xpass", "not available", "does not fit"}
# Not columns of their own.
NAMES = ("task", "name", "status", "note")
HIDDEN = ("row", "machine", "detail")


class Record:
    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.value: dict[str, Any] = {"schema": SCHEMA, "status": "unfinished"} | head | {"parts": {}}
        self.write()

    @property
    def path(self) -> Path:
        return self.folder / "gpu-session.json"

    @property
    def page(self) -> Path:
        return self.folder / "gpu-session.md"

    def write(self) -> None:
        self.value["seconds"] = round(time.monotonic() - self.started, 1)
        write_json(self.path, self.value)

    def begin(self, part: str, limit_s: float) -> None:
        self.value["parts"][part] = {"status": "unfinished", "limit_s": round(limit_s, 1), "seconds": 0.0, "rows": []}
        self.write()

    def add(self, part: str, task: str, rows: list[dict[str, Any]]) -> None:
        """Rows of a task; one of a test replaces what was said of it before, unless it says less."""
        kept = self.value["parts"][part]["rows"]
        places = {(row["task"], row["name"]): number for number, row in enumerate(kept)}
        for row in rows:
            self.value["machine"] = row.get("machine") or self.value.get("machine")
            place = places.get((task, row["name"]))
            if place is None or not row["name"].startswith("tests/"):
                places[(task, row["name"])] = len(kept)
                kept.append({"task": task, "note": ""} | row)
            elif kept[place].get("note", "") == "":
                kept[place] = {"task": task} | row
        self.write()

    def finish(self, part: str, seconds: float) -> str:
        """Judge a part by its rows. Returns: its status."""
        entry = self.value["parts"][part]
        bad = faults(entry)
        entry["seconds"], entry["status"] = round(seconds, 1), f"{len(bad)} fault(s)" if bad else "sound"
        self.write()
        self.draw()
        return entry["status"]

    def close(self) -> bool:
        """Returns: whether every part was sound."""
        self.value["status"] = "finished"
        self.write()
        self.draw()
        return all(entry["status"] == "sound" for entry in self.value["parts"].values())

    def draw(self) -> None:
        try:
            text = "\n\n".join(sections(self.value))
        except Exception as error:  # a package that the tables need, say: the JSON has all, and the session goes on
            text = f"This page could not be drawn: {type(error).__name__}: {error}. {self.path.name} holds everything."
        write_text(self.page, text + "\n")


def faults(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in entry["rows"] if row["status"] not in SOUND]


# The page


def sections(value: dict[str, Any]) -> Iterator[str]:
    from prdp_fast.reporting.tables import Table

    machine = value.get("machine") or {}
    yield "# A session on a GPU" + (" (rehearsal on a CPU: no number here is a result)" if value.get("rehearsal") else "")
    yield (
        "\n".join(f"- {name}: {machine[name]}" for name in machine if machine[name] is not None)
        or "The machine was not described."
    )
    overview = [
        (name, entry["status"], f"{entry['seconds']:.0f} of {entry['limit_s']:.0f}", str(len(entry["rows"])))
        for name, entry in value["parts"].items()
    ]
    yield Table(("part", "status", "seconds", "rows"), tuple(overview)).markdown()
    for name, entry in value["parts"].items():
        yield f"## {name}"
        yield from part_sections(entry)


def part_sections(entry: dict[str, Any]) -> Iterator[str]:
    from prdp_fast.reporting.tables import Table

    bad = faults(entry)
    if bad:
        told_of = [(f"{row['task']}: {row['name']}", row["status"], row.get("note", "")) for row in bad]
        yield Table(("what", "status", "note"), tuple(told_of)).markdown()
    tests = [row for row in entry["rows"] if row["name"].startswith("tests/")]
    if tests:
        counts: dict[str, dict[str, int]] = {}
        for row in tests:
            of = counts.setdefault(row["task"], {})
            of[row["status"]] = of.get(row["status"], 0) + 1
        kinds = sorted({kind for of in counts.values() for kind in of})
        rows = [(task, *(str(of.get(kind, 0)) for kind in kinds)) for task, of in counts.items()]
        yield Table(("tests", *kinds), tuple(rows)).markdown()
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in entry["rows"]:
        if "row" in row:
            kernels.setdefault(row["task"], []).append(row["row"])
    for task, rows_of in kernels.items():
        yield kernel_table(task, rows_of)
    plain = [row for row in entry["rows"] if not row["name"].startswith("tests/") and "row" not in row]
    by_columns: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in plain:
        columns = tuple(key for key in row if key not in NAMES + HIDDEN)
        if columns and row["name"] != "(whole)":
            by_columns.setdefault(columns, []).append(row)
    for columns, rows_of in by_columns.items():
        cells = [(f"{row['task']}: {row['name']}", row["status"], *(cell(row[key]) for key in columns)) for row in rows_of]
        yield Table(("what", "status", *(key.replace("_", " ") for key in columns)), tuple(cells)).markdown()
    told = [f"- {row['task']}: {row['name']}: {row['note']}" for row in plain if row["status"] in SOUND and row.get("note")]
    if told:
        yield "\n".join(told)


def kernel_table(task: str, rows: list[dict[str, Any]]) -> str:
    """The kernels' own table, as `make gpu-check` has always printed it."""
    from benchmarks.kernels import report

    found = [report.row_from_json(row) for row in rows]
    words = {True: "met", False: "MISSED", None: "not measured"}
    goals = "\n".join(f"- {goal.name}: {words[goal.met]} ({goal.detail})" for goal in report.goals(found))
    return f"{task}\n\n```\n{report.table(found, None)}\n```\n\n{goals}"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
