"""What a measurement leaves behind: the records of the results file, the table, the goals and the verdict.

Fields are only ever added; SCHEMA rises when a meaning changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.kernels.cases import Case, bytes_moved, short
from benchmarks.lib.timing import MIB, Timing

OPERATOR, EAGER, COMPILED = "triton", "eager", "compiled"
LARGE = 64 * MIB


@dataclass
class Result:
    """One contestant of a row. status: measured, wrong, error, skipped. graph is None where no CUDA graph could hold the call."""

    name: str
    status: str
    note: str = ""
    launch: Timing | None = None
    graph: Timing | None = None


@dataclass
class Row:
    """One case. gb_per_s and copy_share are the operator's, over its graph time (launch time without one); ratios are the other's
    median over the operator's, above 1 where the operator is faster."""

    op: str
    mode: str
    case: str
    size: str
    shape: list[int]
    dtype: str
    guidance_scale: float | None
    channels_last: bool
    bytes_moved: int
    status: str
    note: str = ""
    results: list[Result] = field(default_factory=list)
    gb_per_s: float | None = None
    copy_share: float | None = None
    launch_ratio: dict[str, float] = field(default_factory=dict)
    graph_ratio: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, status: str, note: str = "") -> Row:
        dims, dtype = list(case.shape), short(case.dtype)
        fields = (case.op, case.mode, case.label, case.size, dims, dtype, case.guidance_scale, case.channels_last)
        return cls(*fields, bytes_moved(case), status, note)

    @property
    def key(self) -> str:
        return f"{self.op} {self.mode} {self.case}"

    def result(self, name: str) -> Result | None:
        return next((r for r in self.results if r.name == name), None)

    def conclude(self, copy_gb_per_s: float) -> None:
        """Fill in what follows from the times."""
        own = self.result(OPERATOR)
        if own is None or own.launch is None:
            return
        self.gb_per_s = self.bytes_moved / (own.graph or own.launch).median_ms / 1e6
        self.copy_share = self.gb_per_s / copy_gb_per_s
        for other in self.results:
            if other is not own and other.launch:
                self.launch_ratio[other.name] = other.launch.median_ms / own.launch.median_ms
            if other is not own and other.graph and own.graph:
                self.graph_ratio[other.name] = other.graph.median_ms / own.graph.median_ms


@dataclass
class Step:
    """One step of the GPU check. status: passed, failed, timed out; of a sanitizer: clean, not clean, not available too."""

    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Goal:
    """met is None where nothing that it speaks of was measured."""

    name: str
    met: bool | None
    detail: str


def wrong_in(row: Row) -> list[Result]:
    return [r for r in row.results if r.status == "wrong"]


def row_from_json(value: dict[str, Any]) -> Row:
    results = [Result(**{**r, "launch": _timing(r["launch"]), "graph": _timing(r["graph"])}) for r in value.get("results", [])]
    return Row(**{**value, "results": results})


def _timing(value: dict[str, Any] | None) -> Timing | None:
    return Timing(**value) if value else None


# Goals


def goals(rows: list[Row]) -> list[Goal]:
    """Each judged by its worst case.

    Bandwidth is the kernel's own, so graph time decides. 5x eager is what a user waits, so launch time decides, and noise, whose
    eager counterpart is one kernel a row, is in it like the rest. "Slower than compiled" is either time above compiled's upper
    quartile: within the spread two medians are the same number.
    """
    unmeasured = [row for row in rows if row.status != "measured"]
    missing = f"; {len(unmeasured)} of {len(rows)} cases not measured" if unmeasured else ""

    def judge(name: str, values: list[tuple[float, str]], least: float, unit: str) -> Goal:
        if not values:
            return Goal(name, None, "not measured")
        worst, where = min(values)
        return Goal(name, worst >= least, f"worst {worst:.3g}{unit}: {where}{missing}")

    shares = [(100 * row.copy_share, row.key) for row in rows if row.bytes_moved > LARGE and row.copy_share is not None]
    eager = [(row.launch_ratio[EAGER], row.key) for row in rows if row.size == "SD" and EAGER in row.launch_ratio]
    compiled = []
    for row in rows:
        own, other = row.result(OPERATOR), row.result(COMPILED)
        for kind in ("launch", "graph"):
            mine, theirs = getattr(own, kind, None), getattr(other, kind, None)
            if mine and theirs:
                compiled.append((theirs.q3_ms / mine.median_ms, f"{row.key} ({kind})"))
    return [
        judge(f">= 90 % of the copy bandwidth above {LARGE // MIB} MiB", shares, 90.0, " %"),
        judge(">= 5x eager at SD sizes", eager, 5.0, "x"),
        judge("never slower than compiled", compiled, 1.0, "x"),
    ]


# What is printed


def _times(result: Result | None, kind: str) -> str:
    if result is None:
        return "-"
    timing = getattr(result, kind)
    if timing is None:
        return "-" if result.status == "measured" else result.status.upper()
    return f"{timing.median_ms:.4f} ±{timing.iqr_ms:.4f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(rows: list[Row], copy_gb_per_s: float | None) -> str:
    """Two lines a case: with the launch, and as a graph replay. Milliseconds: median ± interquartile range."""
    line = "{:<33} {:>8} {:<6} {:>16} {:>16} {:>16} {:>6} {:>6} {:>7} {:>9}"
    head = ("case", "MiB", "time", "triton ms", "eager ms", "compiled ms", "GB/s", "copy", "x eager", "x compiled")
    lines, last = [line.format(*head)], ""
    for row in rows:
        if f"{row.op} {row.mode}" != last:
            last = f"{row.op} {row.mode}"
            lines.append(last)
        size = f"{row.bytes_moved / MIB:.1f}"
        if row.status != "measured":
            lines.append(f"  {row.case:<31} {size:>8} {row.status.upper()} {row.note}".rstrip())
            continue
        for kind, ratios in (("launch", row.launch_ratio), ("graph", row.graph_ratio)):
            first = kind == "launch"
            rate = row.gb_per_s is not None and (kind == "graph" or getattr(row.result(OPERATOR), "graph", None) is None)
            lines.append(
                line.format(
                    f"  {row.case}" if first else "",
                    size if first else "",
                    kind,
                    *(_times(row.result(name), kind) for name in (OPERATOR, EAGER, COMPILED)),
                    _number(row.gb_per_s if rate else None, ".0f"),
                    _number(row.copy_share if rate else None, ".0%"),
                    _number(ratios.get(EAGER), ".1f"),
                    _number(ratios.get(COMPILED), ".2f"),
                )
            )
        lines += [f"    {r.name}: {r.note}" for r in row.results if r.note]
    if copy_gb_per_s is not None:
        lines.append(f"copy bandwidth, measured in the same run: {copy_gb_per_s:.0f} GB/s")
    return "\n".join(lines)
