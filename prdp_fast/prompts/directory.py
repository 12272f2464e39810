"""Where a prompt directory lies: on this machine, or behind a URL, from where its files are fetched into a bounded cache.

http and https are read with httpx2, object stores with fsspec's file systems. No other scheme is, and no chain of them: fsspec
has some that run commands, unpack archives or lead to other files.

What a file must be, its index says: never more is read than that, and nothing is used before size and SHA-256 are right.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import urlsplit

import fsspec
import tenacity

from prdp_fast.config.recipe import PromptSettings
from prdp_fast.core.cache import default_cache_dir
from prdp_fast.core.digest import content_sha256
from prdp_fast.core.errors import UserError, brief
from prdp_fast.core.secret_words import without_secrets
from prdp_fast.prompts.file_cache import FileCache

SCHEMES: dict[str, str | None] = {"http": None, "https": None, "s3": "s3", "gs": "gcs", "gcs": "gcs"}  # and the extra it needs
FORMS = "https://HOST/PATH, http://HOST/PATH, s3://BUCKET/PATH or gs://BUCKET/PATH"
LARGEST_DOCUMENT = 64 << 20  # bytes of an index: half a million shards
WAIT_S = 30.0  # for a connection, and for each piece of an answer
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before another attempt: a random time up to the first, then up to twice as much ...
MOST_REDIRECTS = 5
PIECE = LARGEST_DOCUMENT  # bytes of one request to an object store: an index, whose size nobody knows, is one request
# What s3fs and gcsfs raise for a bad moment and is no OSError, by name: neither needs to be installed.
PASSING = frozenset(
    ("TimeoutError", "ConnectionError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead",
     "ResponseParserError", "TransportError")
)  # fmt: skip
# What s3fs makes of refusals that another attempt would not change.
FINAL = frozenset(
    (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE)
)  # fmt: skip
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Entry(Protocol):
    """A file as an index has it. Its name is a bare one."""

    file: str
    bytes: int
    sha256: str


class CorruptFile(UserError):
    """A file that is there, and not what the index says."""


class MissingFile(UserError):
    """A file that the index names, or an index, that is not there."""


class _TryAgain(Exception):
    """What may go better a moment later."""


class _OtherContent(Exception):
    """A file came that is not the one in the index; how it differs."""


class LocalDirectory:
    """A directory on this machine. Its files are checked when a set is opened, see `PromptSet.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def place(self, name: str) -> str:
        return str(self.path / name)

    def document(self, name: str) -> bytes | None:
        """All of a small file; None if it is not there. Raises: OSError."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def file(self, entry: Entry) -> Iterator[Path]:
        yield self.path / entry.file

    def read(self, entry: Entry) -> bytes:
        """Raises: OSError."""
        return (self.path / entry.file).read_bytes()

    def fetch_ahead(self, entry: Entry) -> None:
        """Nothing is to be done for files of this machine."""


class RemoteDirectory:
    """A directory behind a URL, which is only read."""

    def __init__(self, source: str, settings: PromptSettings) -> None:
        """Nothing is asked of the server yet. Raises: UserError if the URL is none that is read."""
        self.url = checked_url(source)
        self._settings = settings
        place = default_cache_dir() / "prompts" / "fetched" if settings.cache_dir is None else Path(settings.cache_dir)
        self._cache = FileCache(place.expanduser(), round(settings.cache_gb * 1e9))
        self._documents: dict[str, bytes | None] = {}
        self._checked: dict[str, tuple[int, ...]] = {}  # files of the cache whose bytes were read, and when they were written
        self._ahead: threading.Thread | None = None
        scheme = self.url.partition(":")[0]
        self._pieces = self._http_pieces if scheme in ("http", "https") else self._store_pieces
        self._client = _http_client(self.url) if scheme in ("http", "https") else _file_system(scheme)

    def __str__(self) -> str:
        return self.url

    def place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def document(self, name: str) -> bytes | None:
        """All of a small file, fetched once; None if it is not there. Raises: UserError."""
        if name not in self._documents:
            try:
                content = self._with_retries(name, lambda until: b"".join(self._pieces(name, LARGEST_DOCUMENT, until)))
            except MissingFile:
                self._documents[name] = None
                return None
            if len(content) > LARGEST_DOCUMENT:
                raise UserError(f"{self.place(name)} has more than {LARGEST_DOCUMENT} bytes; expected what this package wrote")
            self._documents[name] = content
        return self._documents[name]

    @contextlib.contextmanager
    def file(self, entry: Entry) -> Iterator[Path]:
        """The path of a whole file in the cache, for as long as the block runs. One that is damaged is fetched again, once.

        Raises: CorruptFile, MissingFile, UserError if it does not arrive; each in one line with the URL.
        """
        difference: object = None
        for _ in range(2):
            try:
                with self._cache.held(
                    entry.sha256, entry.bytes, partial(self._fetch, entry), self._settings.fetch_timeout_s
                ) as path:
                    if self._is_whole(path, entry):
                        yield path
                        return
                    difference = "its copy in the cache was damaged"
                    self._cache.discard(entry.sha256)
            except _OtherContent as error:
                difference = error
        raise CorruptFile(
            f"{self.place(entry.file)} is damaged or not the one in the index ({difference}), also when it was fetched again; "
            "upload it again, or build the directory anew with 'prdp shards build'"
        )

    def read(self, entry: Entry) -> bytes:
        """A file's bytes as they are there now, whatever the cache has; of one that is too long, one more than there should be.

        Raises: MissingFile, UserError.
        """
        return self._with_retries(entry.file, lambda until: b"".join(self._pieces(entry.file, entry.bytes, until)))[
            : entry.bytes + 1
        ]

    def fetch_ahead(self, entry: Entry) -> None:
        """Have a file brought into the cache by a thread, unless it is there or the thread is still at another one.

        What goes wrong is told when the file is needed. The thread ends with the process.
        """
        if self._cache.has(entry.sha256) or (self._ahead is not None and self._ahead.is_alive()):
            return

        def fetch() -> None:
            with contextlib.suppress(UserError), self.file(entry):
                pass

        self._ahead = threading.Thread(target=fetch, name="prompts-ahead", daemon=True)
        self._ahead.start()

    def _is_whole(self, path: Path, entry: Entry) -> bool:
        """Checked once for as long as nobody writes to the file."""
        status = path.stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._checked.get(entry.sha256) != stamp:
            if content_sha256(path) != (entry.bytes, entry.sha256):
                return False
            self._checked[entry.sha256] = stamp
        return True

    def _fetch(self, entry: Entry, target: IO[bytes]) -> None:
        """Raises: _OtherContent; OSError for the target alone; UserError."""

        def attempt(until: float) -> tuple[int, str]:
            digest, size = hashlib.sha256(), 0
            target.seek(0)
            target.truncate()
            for piece in self._pieces(entry.file, entry.bytes, until):
                digest.update(piece)
                target.write(piece)
                size += len(piece)
            return size, digest.hexdigest()

        size, sha256 = self._with_retries(entry.file, attempt)
        if size != entry.bytes:
            raise _OtherContent(f"{'more' if size > entry.bytes else size} bytes, it should be {entry.bytes}")
        if sha256 != entry.sha256:
            raise _OtherContent("SHA-256 differs")

    def _with_retries(self, name: str, attempt: Callable[[float], Result]) -> Result:
        """attempt(time.monotonic() that it may last to), again and again while that may help. Raises: UserError."""
        patience = self._settings.fetch_timeout_s
        until = time.monotonic() + patience
        made = 0

        def once() -> Result:
            nonlocal made
            made += 1
            return attempt(until)

        def warn(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None and state.next_action is not None
            logger.warning(
                "%s: %s; attempt %d in %.1f s", self.place(name), state.outcome.exception(), made + 1, state.next_action.sleep
            )

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TryAgain),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
            stop=tenacity.stop_before_delay(patience),
            before_sleep=warn,
            reraise=True,
        )
        try:
            return retrying(once)
        except _TryAgain as error:
            raise UserError(
                f"{self.place(name)} did not arrive within {patience:g} s (prompts.fetch_timeout_s), in {made} "
                f"attempt{'s' * (made > 1)}, at last: {error}; look at the server and the network, or raise that"
            ) from None

    def _refusal(self, name: str, said: str) -> UserError:
        return UserError(f"{self.place(name)} cannot be read: {said}; check prompts.source and who may read it")

    def _missing(self, name: str, said: str) -> MissingFile:
        return MissingFile(f"{self.place(name)} is not there ({said}); check prompts.source, or upload what is missing")

    def _http_pieces(self, name: str, most: int, until: float) -> Iterator[bytes]:
        """A file's bytes, no more pieces than hold `most` and one. Raises: _TryAgain, UserError."""
        import httpx2

        url, size = self.place(name), 0
        try:
            with self._client.stream("GET", url, timeout=max(0.001, min(WAIT_S, until - time.monotonic()))) as response:
                status = response.status_code
                if url.startswith("https:") and any(hop.url.scheme != "https" for hop in (*response.history, response)):
                    raise self._refusal(name, "it is redirected to http, which anybody on the way can change")
                if status >= 500 or status == 429:
                    raise _TryAgain(f"HTTP {status}")
                if status in (404, 410):
                    raise self._missing(name, f"HTTP {status}")
                if status != 200:
                    raise self._refusal(name, f"HTTP {status}")
                for piece in response.iter_raw():  # as it was sent: nothing is unpacked on the way
                    yield piece
                    size += len(piece)
                    if size > most:
                        return
                    if time.monotonic() > until:
                        raise _TryAgain(f"{size} bytes came, and no end")
        except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
            raise self._refusal(name, f"it is redirected wrongly ({type(error).__name__})") from None
        except httpx2.TimeoutException as error:
            raise _TryAgain(f"no {'connection' if isinstance(error, httpx2.ConnectTimeout) else 'answer'} in time") from None
        except httpx2.TransportError as error:
            raise _TryAgain(f"{type(error).__name__}: {without_secrets(brief(error))}") from None

    def _store_pieces(self, name: str, most: int, until: float) -> Iterator[bytes]:
        """The same of an object store."""
        start = 0
        while start <= most:
            # The last request asks for one byte that should not be there, and never for that one alone.
            end = most + 1 if start + PIECE >= most else start + PIECE
            try:
                piece = self._client.cat_file(self.place(name), start=start, end=end)
            except FileNotFoundError:
                raise self._missing(name, "no such object") from None
            except Exception as error:  # of the libraries below fsspec, which have no common base
                said = f"{type(error).__name__}: {without_secrets(brief(error))}"
                raise (_TryAgain(said) if passes(error) else self._refusal(name, said)) from None
            yield piece
            start += len(piece)
            if start < end:
                return
            if time.monotonic() > until:
                raise _TryAgain(f"{start} bytes came, and no end")


Directory = LocalDirectory | RemoteDirectory


def open_directory(source: str | Path, settings: PromptSettings | None = None) -> Directory:
    """Args: source: a path, or a URL. Raises: UserError if it is a URL and none that is read. A path is not looked at."""
    if is_url(source):
        return RemoteDirectory(str(source), settings or PromptSettings())
    return LocalDirectory(Path(source).expanduser())


def is_url(source: str | Path) -> bool:
    """Whether it names a scheme, be it one that is read or not: https:, s3:, pipe:, file:."""
    return _SCHEME.match(str(source)) is not None


def checked_url(source: str) -> str:
    """The URL without a slash at its end. Raises: UserError, which repeats no secret that it may hold."""
    form = f"expected {FORMS}"
    shown = repr(without_secrets(source.partition("?")[0]))
    scheme, separator, rest = source.partition("://")
    if not separator or scheme.lower() not in SCHEMES or "::" in source:
        raise UserError(
            f"prompt source {shown} is a URL of a kind that is not read; {form}, or a directory or a .txt file on this machine"
        )
    source = f"{scheme.lower()}://{rest}"
    try:
        parts = urlsplit(source)
        has_password = parts.username is not None or parts.password is not None
        is_right = parts.port != 0 and bool(parts.hostname)
    except ValueError:
        has_password, is_right = "@" in source, False
    if has_password:
        raise UserError(
            f"prompt source has a user name or a password in its URL; {form}: credentials of object stores come from where their "
            "own tools find them"
        )
    if not is_right or parts.query or parts.fragment or not source.isprintable() or " " in source:
        raise UserError(f"prompt source {shown} is no URL of a directory; {form}, without '?' and '#'")
    return source.rstrip("/")


def passes(error: Exception) -> bool:
    """Whether another attempt at an object store may go better."""
    code = getattr(error, "code", None)  # of gcsfs
    if isinstance(code, int):
        return code >= 500 or code in (408, 429)
    if isinstance(error, OSError):
        refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden")  # of s3fs, and of gcsfs
        return not refused and error.errno not in FINAL
    return any(kind.__name__ in PASSING for kind in type(error).__mro__)


def _http_client(url: str) -> Any:
    """An httpx2.Client. Raises: UserError if the proxy that is set is none."""
    import httpx2

    host = urlsplit(url).hostname
    try:
        # This machine itself is never reached through a proxy.
        return httpx2.Client(
            headers={"accept-encoding": "identity"}, follow_redirects=True, max_redirects=MOST_REDIRECTS,
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),
        )  # fmt: skip
    except (ImportError, ValueError) as error:
        raise UserError(
            f"prompt source {url} cannot be reached through the proxy that is set ({without_secrets(brief(error))}); mend or "
            f"unset it, or set NO_PROXY={host}"
        ) from None


def _file_system(scheme: str) -> Any:
    """fsspec's, for a scheme. Raises: UserError if its package is not installed."""
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise UserError(
            f"prompt source {scheme}:// needs a package that is not installed; pip install 'prdp-fast[{SCHEMES[scheme]}]'"
        ) from None
