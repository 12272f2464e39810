"""What a campaign found, as JSON and as a page."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launching import ROOT

from benchmarks.lib import provenance
from campaign.judge import HEADINGS, VERDICTS
from campaign.scene import Case, Scene

SCHEMA = 1
LONGEST = 150  # characters of a line in the table


@dataclass
class Row:
    fault: str
    setting: str
    when: str
    statuses: list[int | None]
    seconds: list[float]
    line: str  # of the start that the fault was in
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    skipped: str | None = None  # why the fault cannot be made here
    injected: int = 0
    compared: str = ""

    @property
    def is_sound(self) -> bool:
        return not any(self.verdicts.values())


def row_of(case: Case, scene: Scene, verdicts: dict[str, list[str]], skipped: str | None) -> Row:
    return Row(
        case.name, str(case.setting), "; ".join(scene.injected), [one.status for one in scene.starts],
        [one.seconds for one in scene.starts], plain(scene.starts[0].line, scene) if scene.starts else "", verdicts, skipped,
        len(scene.injected), case.compare,
    )  # fmt: skip


def plain(line: str, scene: Scene) -> str:
    """Without the places of this machine, and not longer than a table has room for."""
    line = line.replace(str(scene.run), "RUN").replace(str(scene.folder), "DIR").replace(f"{ROOT}/", "")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


class Table:
    """Rows as they come; the files are whole after every one."""

    def __init__(self, output: Path | None, command: str, seed: int) -> None:
        head, dirty = provenance.commit()
        self.output, self.rows, self.began = output, [], time.monotonic()
        self.rows: list[Row] = []
        self.head: dict[str, Any] = {
            "schema": SCHEMA, "status": "unfinished", "date": provenance.now(), "commit": head, "dirty": dirty,
            "command": command, "seed": seed, "machine": provenance.machine(),
        }  # fmt: skip

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def totals(self) -> dict[str, int]:
        done = [row for row in self.rows if row.skipped is None]
        counts = {
            "faults": len(done),
            "not possible here": len(self.rows) - len(done),
            "starts": sum(len(row.statuses) for row in done),
        }
        return counts | {HEADINGS[name]: sum(bool(row.verdicts[name]) for row in done) for name in VERDICTS}

    def finish(self) -> None:
        self.head["status"] = "finished"
        self.write()

    def write(self) -> None:
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        minutes = round((time.monotonic() - self.began) / 60, 1)
        content = self.head | {"minutes": minutes, "totals": self.totals(), "rows": [asdict(row) for row in self.rows]}
        self.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        self.output.with_suffix(".md").write_text(self.page(minutes))

    def page(self, minutes: float) -> str:
        head = self.head
        machine = f"{head['machine']['cpu']}, {head['machine']['cores']} cores, torch {head['machine']['torch']}"
        lines = [
            "# Faults put into running jobs", "",
            f"`{head['command']}`, seed {head['seed']}, {head['date']}, commit {head['commit'][:10]}"
            f"{' with changes' if head['dirty'] else ''}, {minutes:g} minutes, {head['status']}. {machine}.", "",
            "| what | number |", "|---|---|",
            *[f"| {name} | {number} |" for name, number in self.totals().items()], "",
            "| # | fault | setting | when and what | status | seconds | what the first start says last | verdict |",
            "|---|---|---|---|---|---|---|---|",
            *[self.line(number, row) for number, row in enumerate(self.rows, 1)], "",
        ]  # fmt: skip
        return "\n".join(lines)

    @staticmethod
    def line(number: int, row: Row) -> str:
        cells = [
            str(number), row.fault, row.setting, row.when, ", ".join(map(str, row.statuses)), ", ".join(map(str, row.seconds)),
            row.line, verdict(row),
        ]  # fmt: skip
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def verdict(row: Row) -> str:
    """Of one row, in words."""
    if row.skipped is not None:
        return f"not possible here: {row.skipped}"
    if row.is_sound:
        return {"exact": "sound, bit for bit", "rounding": "sound, equal to rounding", "no": "sound"}[row.compared]
    return "; ".join(f"**{HEADINGS[name]}**: {', '.join(found)}" for name, found in row.verdicts.items() if found)
