"""Numbers for people's eyes."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def format_flop(flop: float) -> str:
    for unit in ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if flop < 1000:
            return f"{flop:.3g} {unit}"
        flop /= 1000
    return f"{flop:.4g} PFLOP"
