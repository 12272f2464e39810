"""A bounded directory of files from elsewhere, named by their SHA-256. Any number of processes may use it at once.

    <sha256>            a whole file, whose time of access says when it was last used
    <sha256>.partial    one that is being fetched, by whoever has its lock

A reader holds a shared lock on its file, and a file is removed under an exclusive one: so none goes away under a reader. What a
killed process leaves behind has no lock, and is removed like any other file.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from prdp_fast.core.errors import UserError
from prdp_fast.core.format import format_bytes

OWN = re.compile(r"[0-9a-f]{64}(\.partial)?")  # nothing else in the directory is ever counted or removed
POLL_S = 0.05  # between two looks at a file that another process is fetching


class FileCache:
    """Files by their SHA-256. They are trusted to have it only as far as whoever fetched them has checked it."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self.directory, self.most_bytes = directory, most_bytes

    def has(self, sha256: str) -> bool:
        return (self.directory / sha256).exists()

    @contextlib.contextmanager
    def held(self, sha256: str, size: int, fetch: Callable[[IO[bytes]], None], patience_s: float) -> Iterator[Path]:
        """The path of a file that stays for as long as the block runs. One process fetches it, the others wait.

        Args:
            size: bytes that there must be room for.
            fetch: writes the file, or raises; then nothing is kept.
            patience_s: to wait for another process that is fetching it.
        Raises: UserError if the directory cannot be used or waiting was in vain; whatever `fetch` raises.
        """
        path = self.directory / sha256
        while True:
            with self._usable():
                try:
                    file = path.open("rb")
                except FileNotFoundError:
                    file = None
            if file is None:
                self._fill(path, size, fetch, patience_s)
                continue
            with file:
                with self._usable():
                    _lock(file, shared=True)
                    if not _is_at(file, path):  # removed before the lock was there
                        continue
                    with contextlib.suppress(PermissionError):  # a file of another user
                        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
                yield path
            return

    def discard(self, sha256: str) -> None:
        """Forget a file, whoever may be reading it."""
        (self.directory / sha256).unlink(missing_ok=True)

    def _fill(self, path: Path, size: int, fetch: Callable[[IO[bytes]], None], patience_s: float) -> None:
        partial, until = path.with_name(f"{path.name}.partial"), time.monotonic() + patience_s
        if size > self.most_bytes:
            raise UserError(
                f"prompts.cache_gb allows {format_bytes(self.most_bytes)}, and one file alone has {format_bytes(size)}; raise it"
            )
        while not path.exists():
            with self._usable():
                self.directory.mkdir(parents=True, exist_ok=True)
                file = partial.open("ab")
            with file:
                with self._usable():
                    if not _lock(file):  # another process is at it
                        if time.monotonic() > until:
                            raise UserError(
                                f"prompt cache {self.directory}: another process has been fetching {path.name} for "
                                f"{patience_s:g} s (prompts.fetch_timeout_s); look at what it says, or raise that"
                            )
                        time.sleep(POLL_S)
                        continue
                    if not _is_at(file, partial):  # finished or given up by another process before the lock was there
                        continue
                    if path.exists():
                        partial.unlink()
                        return
                    try:
                        file.truncate(0)
                        self._make_room(size)
                        fetch(file)
                        file.flush()
                        os.replace(partial, path)
                    except BaseException:
                        partial.unlink(missing_ok=True)
                        raise

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago, until so many bytes more may come. What is in use stays."""
        files = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if OWN.fullmatch(path.name):
                    status = path.stat()
                    files.append((status.st_atime_ns, status.st_size, path))
        total = sum(bytes for _, bytes, _ in files)
        for _, bytes, path in sorted(files):
            if total + size <= self.most_bytes:
                return
            with contextlib.suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
                if _lock(file):
                    path.unlink()
                    total -= bytes

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Raises: UserError in the place of an OSError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"prompt cache {self.directory} cannot be used ({error.strerror}); set prompts.cache_dir to a directory that can "
                "be written and whose file system has locks"
            ) from error


def _lock(file: IO[bytes], *, shared: bool = False) -> bool:
    """Until the file is closed. A shared lock is waited for: it is refused for a moment only. Returns: whether it was given."""
    import fcntl  # of Unix; shards on this machine are read without

    try:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
