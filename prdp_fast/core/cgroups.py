"""What the control groups of this process leave of the memory: in a container, and under a queue, less than the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# By version: files of the limit and of what is used, and the line of memory.stat with what the kernel drops when it is asked to.
FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
         2: ("memory.max", "memory.current", "inactive_file")}  # fmt: skip


def memory_room(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that may still be used: the least of this process's own group and of all above. None: there is no limit.

    Args: root: where the groups are mounted. own: says which ones are this process's.
    """
    rooms = [room for version, group in groups(root, own) if (room := room_in(version, group)) is not None]
    return min(rooms, default=None)


def groups(root: Path, own: Path) -> Iterator[tuple[int, Path]]:
    """Version and directory of each group that may have a limit of memory."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            version, mount = 2, root if (root / "cgroup.controllers").exists() else root / "unified"
        elif "memory" in controllers.split(","):
            version, mount = 1, root / "memory"
        else:
            continue
        group = mount / name.strip("/")
        # A container may see its own group as the top, and be told its name outside.
        yield from ((version, one) for one in (group, *group.parents) if one == mount or mount in one.parents)


def room_in(version: int, group: Path) -> int | None:
    """Of one group; None without a limit."""
    limit, used, dropped = FILES[version]
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(most) - int((group / used).read_text()) + int(stat.get(dropped, 0)))
    except (OSError, ValueError):
        return None
