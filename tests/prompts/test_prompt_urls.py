"""Prompt sets behind URLs: what fails on the way, the cache, object stores, shards that are left out."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import httpx2
import launching
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts.shard_server import ShardServer
from prompts.test_exactly_once import write
from prompts.test_prompt_embeddings import encode

from prdp_fast import cli
from prdp_fast.config.load import load_recipe
from prdp_fast.config.recipe import PromptSettings
from prdp_fast.core.digest import content_sha256
from prdp_fast.core.errors import OneRankError, UserError
from prdp_fast.core.records import Prompt
from prdp_fast.core.run_directory import first_difference
from prdp_fast.planning.job import Job
from prdp_fast.prompts import PromptSet, PromptStream, directory, embeddings, write_index, write_shards
from prdp_fast.prompts.directory import CorruptFile, RemoteDirectory, open_directory
from prdp_fast.prompts.embeddings import MANIFEST, ROWS, StoredEmbeddings, write_embeddings
from prdp_fast.prompts.shards import INDEX, read_index
from prdp_fast.prompts.verify import describe, verify
from prdp_fast.train import claim_for_all

SHARD = "train-00001.tar.gz"


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(directory, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(directory, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def server(small_directory: Path) -> Iterator[ShardServer]:
    """Serves `small_directory`."""
    server = ShardServer(small_directory)
    yield server
    server.faults.clear()
    server.release.set()
    for thread in threading.enumerate():
        if thread.name == "prompts-ahead":
            thread.join()
    server.close()


def cached(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache/prompts/fetched"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def opened(server: ShardServer, **values: object) -> PromptSet:
    return PromptSet.open(server.url, "train", settings=PromptSettings(**values))  # type: ignore[arg-type]


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------------ reading
def test_a_url_reads_as_the_directory_does(server: ShardServer, small_directory: Path, small_prompts: list[Prompt]) -> None:
    here, there = PromptSet.open(small_directory, "train"), PromptSet.open(server.url + "/", "train")
    assert server.asked == [INDEX] and there.fingerprint == here.fingerprint and len(there) == 23
    assert list(there) == small_prompts
    ranks = [PromptStream(opened(server), seed=3, prompts_per_epoch=6, rank=rank, world_size=2) for rank in range(2)]
    whole = PromptStream(here, seed=3, prompts_per_epoch=6)
    for epoch in range(12):
        assert [prompt for one in ranks for prompt in one.epoch(epoch)] == whole.epoch(epoch)
    assert there.draw(9, seed=1) == here.draw(9, seed=1)
    assert {name: server.count(name) for name in server.asked if name != INDEX} == {f"train-0000{n}.tar.gz": 1 for n in range(4)}


def test_the_next_shard_is_fetched_meanwhile(server: ShardServer) -> None:
    stream = PromptStream(opened(server), seed=0, prompts_per_epoch=1)
    order = [f"train-{number:05d}.tar.gz" for number in (*stream._shard_order(0), stream._shard_order(1)[0])]
    drawn = 0
    for place, following in itertools.pairwise(order[:-1]):
        stream.epoch(drawn)
        wait_for(lambda name=following: name in server.asked)
        assert server.asked == [INDEX, *order[: order.index(place) + 2]], "and no more than that one"
        drawn += next(shard.count for shard in stream.prompt_set._shards if shard.file == place)
    assert stream.epoch(drawn) and stream._shard_order(1)[0] in range(4)  # the last of a pass: the next one's first is there


def test_what_is_fetched_meanwhile_does_not_keep_the_process(server: ShardServer) -> None:
    server.fail("train-00001.tar.gz", itertools.repeat("hang"))
    code = (
        "import sys; from prdp_fast.prompts import PromptSet; prompts = iter(PromptSet.open(sys.argv[1], 'train'));"
        "print(next(prompts).index)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: SHARD in server.asked or process.poll() is not None)
    assert process.communicate(timeout=10)[0] == "100\n" and process.returncode == 0 and SHARD in server.asked


def test_a_job_is_known_by_its_index(server: ShardServer) -> None:
    """Resuming compares digests, and reads no shard for that."""
    recipe = load_recipe("smoke", [f"prompts.source={server.url}", "evaluation.prompts=0"])
    record = Job.prepare(recipe, "zero2.json", world_size=1, cuda=False).full_record()
    assert server.asked == [INDEX]
    assert record["prompts"] == PromptSet.open(server.directory, "train").fingerprint


# ------------------------------------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize("faults", [[503, 503], [500], [429], ["drop", "drop"], [502, "drop", 504], ["flip"], ["cut"]], ids=str)
@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_what_passes(
    server: ShardServer, small_prompts: list[Prompt], name: str, faults: list, caplog: pytest.LogCaptureFixture
) -> None:
    if name == INDEX and faults[0] in ("flip", "cut"):
        return  # an index has no digest
    server.fail(name, faults)
    with caplog.at_level(logging.WARNING):
        assert list(opened(server)) == small_prompts
    assert server.count(name) == len(faults) + 1
    if faults[0] not in ("flip", "cut"):
        assert f"{server.url}/{name}: " in caplog.text and f"attempt {len(faults) + 1} in" in caplog.text


@pytest.mark.parametrize(
    ("fault", "how"), [("flip", "SHA-256 differs"), ("cut", "bytes, it should be"), ("endless", "more bytes")]
)
def test_a_corrupt_shard_is_fetched_again_once_and_named(tmp_path: Path, server: ShardServer, fault: str, how: str) -> None:
    server.fail(SHARD, itertools.repeat(fault))
    with pytest.raises(CorruptFile, match=f"{server.url}/{SHARD} is damaged.*{how}.*fetched again; upload it again") as caught:
        list(opened(server))
    assert "\n" not in str(caught.value)
    for _ in range(2):  # of the two files of the cache, no part of this one
        assert len(cached(tmp_path)) <= 2 and not any(name.endswith(".partial") for name in cached(tmp_path))
    assert server.count(SHARD) in (2, 4)  # 4: fetched ahead in vain, and then when it was needed
    assert server.sent < 64 << 20


@pytest.mark.parametrize("status", [401, 403, 404, 410, 400, 304])
@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_refusals_are_one_line_at_once(server: ShardServer, status: int, name: str) -> None:
    server.fail(name, itertools.repeat(status))
    with pytest.raises(UserError, match=rf"{server.url}/{name} (cannot be read|is not there)") as caught:
        opened(server).shard(1)
    assert server.count(name) == 1 and "\n" not in str(caught.value)
    assert str(status) in str(caught.value) or name == INDEX


@pytest.mark.parametrize(
    ("fault", "last"), [(503, "HTTP 503"), ("slow", r"\d+ bytes came|no answer in time"), ("hang", "no answer in time"),
                        ("drop", "RemoteProtocolError")]
)  # fmt: skip
def test_giving_up(server: ShardServer, fault: str | int, last: str) -> None:
    server.fail(SHARD, itertools.repeat(fault))
    prompts, began = opened(server, fetch_timeout_s=0.6), time.monotonic()
    with pytest.raises(
        UserError, match=rf"{SHARD} did not arrive within 0.6 s \(prompts.fetch_timeout_s\), in \d+ attempts?, at last: ({last})"
    ):
        prompts.shard(1)
    assert time.monotonic() - began < 5


def test_a_server_that_is_away(server: ShardServer) -> None:
    server.close()
    with pytest.raises(UserError, match=r"index.json did not arrive within 0.2 s.*at last: ConnectError"):
        opened(server, fetch_timeout_s=0.2)


def test_redirections(server: ShardServer, small_prompts: list[Prompt]) -> None:
    shutil.copy(server.directory / SHARD, server.directory / "elsewhere.tar.gz")
    server.fail(SHARD, ["/shards/elsewhere.tar.gz"])
    assert list(opened(server)) == small_prompts
    server.fail(INDEX, itertools.repeat(f"/shards/{INDEX}"))
    with pytest.raises(UserError, match=r"redirected wrongly \(TooManyRedirects\)"):
        opened(server)
    server.fail(INDEX, itertools.repeat("/shards/x"))
    with pytest.raises(UserError, match=r"index.json cannot be read"):
        opened(server)
    assert server.asked[-1] == "x"


def test_https_does_not_become_http(small_directory: Path) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.scheme == "https":
            return httpx2.Response(302, headers={"location": str(request.url).replace("https", "http")})
        return httpx2.Response(200, stream=Raw((small_directory / INDEX).read_bytes()))

    for scheme in ("http", "https"):
        place = RemoteDirectory(f"{scheme}://localhost/x", PromptSettings())
        place._client = httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True)
        if scheme == "http":
            assert place.document(INDEX)
        else:
            with pytest.raises(UserError, match="redirected to http, which anybody on the way can change"):
                place.document(INDEX)


def test_nothing_is_unpacked_on_the_way(server: ShardServer) -> None:
    """A server may say that the shards, which are gzip files, are packed for the way: they are taken as they are."""
    place = open_directory(server.url)
    assert isinstance(place, RemoteDirectory)
    data = (server.directory / SHARD).read_bytes()
    place._client = httpx2.Client(
        transport=httpx2.MockTransport(
            lambda request: httpx2.Response(200, headers={"content-encoding": "gzip"}, stream=Raw(data))
        )
    )
    entry = read_index(server.directory / INDEX).sets["train"].shards[1]
    assert place.read(entry) == data


class Raw(httpx2.SyncByteStream):
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self.data


def test_an_index_without_end(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "LARGEST_DOCUMENT", 1 << 20)
    server.fail(INDEX, ["endless"])
    with pytest.raises(UserError, match=r"index.json has more than 1048576 bytes"):
        opened(server)
    assert server.sent < 64 << 20


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:hunter22@host/x", "has a user name or a password"),
        ("s3://KEYKEY:hunter22@bucket/x", "has a user name or a password"),
        ("https://host:hunter22@:x/", "has a user name or a password"),
        ("ftp://me:hunter22@host/x", "of a kind that is not read"),
        ("https://host/x?X-Amz-Signature=hunter22", "without '\\?' and '#'"),
        ("https://host/x#y", "no URL of a directory"),
        ("https:///x", "no URL of a directory"),
        ("https://host/a b", "no URL of a directory"),
        ("https://host:99999/x", "no URL of a directory"),
    ],
)
def test_urls_that_are_none_repeat_no_secret(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PromptSet.open(url, "train")
    assert "hunter22" not in str(caught.value) and "https://HOST/PATH" in str(caught.value)


def test_an_error_of_a_library_is_told_without_secrets(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")

    def answer(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("no way to https://me:pass@proxy/ with hunter22")

    place = RemoteDirectory(server.url, PromptSettings(fetch_timeout_s=0.1))
    place._client = httpx2.Client(transport=httpx2.MockTransport(answer))
    with pytest.raises(UserError, match=r"ConnectError: no way to https://\*\*\*@proxy/ with \*\*\*"):
        place.document(INDEX)


# ------------------------------------------------------------------------------------------------------------------ cache
def test_a_damaged_file_of_the_cache_is_fetched_again(tmp_path: Path, server: ShardServer, small_prompts: list[Prompt]) -> None:
    assert list(opened(server)) == small_prompts
    entry = read_index(server.directory / INDEX).sets["train"].shards[1]
    copy = tmp_path / "cache/prompts/fetched" / entry.sha256
    for damage in (b"", copy.read_bytes()[:-1], copy.read_bytes()[:-1] + b"x", copy.read_bytes() + b"x"):
        copy.write_bytes(damage)
        before = server.count(SHARD)
        assert list(opened(server)) == small_prompts and server.count(SHARD) == before + 1
    copy.write_bytes(b"x")
    server.fail(SHARD, itertools.repeat("flip"))
    before = server.count(SHARD)
    with pytest.raises(CorruptFile, match=SHARD):
        opened(server).shard(1)
    assert server.count(SHARD) == before + 1 and entry.sha256 not in cached(tmp_path)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, server: ShardServer) -> None:
    shards = read_index(server.directory / INDEX).sets["train"].shards
    room = sum(shard.bytes for shard in shards[:3])
    prompts = opened(server, cache_gb=room / 1e9)
    (tmp_path / "cache/prompts/fetched").mkdir(parents=True)
    (tmp_path / "cache/prompts/fetched/of-somebody-else").write_bytes(bytes(10_000))
    for number in (0, 1, 2):
        prompts.shard(number)
    assert cached(tmp_path) == {"of-somebody-else", *(shard.sha256 for shard in shards[:3])}
    opened(server, cache_gb=room / 1e9).shard(0)  # used again, and so 1 is next to go
    prompts.shard(3)
    assert cached(tmp_path) == {"of-somebody-else", *(shards[number].sha256 for number in (0, 2, 3))}
    with pytest.raises(UserError, match=r"prompts.cache_gb allows 100 B, and one file alone has .*; raise it"):
        opened(server, cache_gb=1e-7).shard(1)


def test_a_file_in_use_stays(tmp_path: Path, server: ShardServer) -> None:
    shards = read_index(server.directory / INDEX).sets["train"].shards
    place = open_directory(server.url, PromptSettings(cache_gb=2 * max(shard.bytes for shard in shards) / 1e9))
    with place.file(shards[0]) as path:
        for shard in shards[1:]:
            with place.file(shard):
                assert path.exists()
        assert len(cached(tmp_path)) == 2
    with place.file(shards[1]), place.file(shards[2]):
        assert not path.exists()


@pytest.mark.parametrize("forgotten", [False, True])
def test_remains_of_a_killed_process(tmp_path: Path, server: ShardServer, small_prompts: list[Prompt], forgotten: bool) -> None:
    shards = read_index(server.directory / INDEX).sets["train"].shards
    folder = tmp_path / "cache/prompts/fetched"
    folder.mkdir(parents=True)
    for shard in shards:
        (folder / f"{shard.sha256}.partial").write_bytes(b"half of it")
    if forgotten:  # nobody will ever go on with this one
        (folder / f"{'0' * 64}.partial").write_bytes(bytes(10_000))
    room = sum(shard.bytes for shard in shards)
    assert list(opened(server, cache_gb=room / 1e9)) == small_prompts
    assert cached(tmp_path) == {shard.sha256 for shard in shards}


def test_another_process_is_waited_for(tmp_path: Path, server: ShardServer) -> None:
    entry = read_index(server.directory / INDEX).sets["train"].shards[1]
    folder = tmp_path / "cache/prompts/fetched"
    folder.mkdir(parents=True)
    with (folder / f"{entry.sha256}.partial").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process has been fetching .* for 0.3 s \(prompts.fetch_timeout_s\)"):
            opened(server, fetch_timeout_s=0.3).shard(1)
    assert SHARD not in server.asked and len(opened(server).shard(1)) == 7


@pytest.mark.parametrize("room", ["for all", "for two"])
def test_processes_share_a_cache(server: ShardServer, small_directory: Path, room: str) -> None:
    shards = read_index(small_directory / INDEX).sets["train"].shards
    size = sum(shard.bytes for shard in shards) if room == "for all" else 2 * max(shard.bytes for shard in shards)
    code = (
        "import json, sys; from prdp_fast.prompts import PromptSet, PromptStream\n"
        "from prdp_fast.config.recipe import PromptSettings\n"
        "prompts = PromptSet.open(sys.argv[1], 'train', settings=PromptSettings(cache_gb=float(sys.argv[2])))\n"
        "stream = PromptStream(prompts, seed=0, prompts_per_epoch=4, rank=int(sys.argv[3]), world_size=2)\n"
        "print(json.dumps([prompt.index for epoch in range(120) for prompt in stream.epoch(epoch)]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, server.url, str(size / 1e9), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    drawn = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        drawn.append(json.loads(out))
    here = PromptSet.open(small_directory, "train")
    for rank, indices in enumerate(drawn):
        stream = PromptStream(here, seed=0, prompts_per_epoch=4, rank=rank, world_size=2)
        assert indices == [prompt.index for epoch in range(120) for prompt in stream.epoch(epoch)]
    if room == "for all":
        assert {server.count(shard.file) for shard in shards} == {1}
    else:
        assert server.count(SHARD) > 2, "the cache was never too small: this test saw nothing"


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: ShardServer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"prompt cache .*file/x cannot be used \(Not a directory\); set prompts.cache_dir"):
        opened(server, cache_dir=str(tmp_path / "file/x")).shard(0)


# ---------------------------------------------------------------------------------------------------------- object stores
@pytest.fixture
def store(small_directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a copy of `small_directory` in fsspec's memory."""
    monkeypatch.setitem(directory.SCHEMES, "memory", None)
    files = fsspec.filesystem("memory")
    for path in small_directory.iterdir():
        files.pipe_file(f"memory://bucket/a/{path.name}", path.read_bytes())
    yield "memory://bucket/a"  # type: ignore[misc]
    files.rm("memory://bucket", recursive=True)


@pytest.mark.parametrize("piece", [1, 10, 64 << 20])
def test_an_object_store(store: str, small_prompts: list[Prompt], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "PIECE", piece)
    files, asked = type(fsspec.filesystem("memory")), []
    original = files.cat_file

    def cat_file(self, path, start=None, end=None, **options):  # type: ignore[no-untyped-def]
        size = len(original(self, path))
        assert path.endswith(INDEX) or start < size, "S3 refuses a range that begins behind the end"
        asked.append(path)
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(files, "cat_file", cat_file)
    assert list(PromptSet.open(store, "train")) == small_prompts
    assert set(asked) == {f"{store}/{name}" for name in (INDEX, *(f"train-0000{number}.tar.gz" for number in range(4)))}
    assert (len(asked) == 5) == (piece == 64 << 20)


class Forbidding(Exception):
    code = 403


class Throttling(Exception):
    code = 429


class HTTPClientError(Exception):
    """As botocore has one."""


class ReadTimeoutError(HTTPClientError):
    pass


class NoCredentialsError(Exception):
    """As botocore has one."""


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(16, "Please reduce your request rate"), True), (OSError(121, "internal"), True), (TimeoutError("slow"), True),
        (ConnectionResetError(104, "reset"), True), (Throttling("slow"), True), (ReadTimeoutError("slow"), True),
        (PermissionError("Access Denied"), False), (OSError("Forbidden: bucket/a\nno"), False), (Forbidding("no"), False),
        (OSError(22, "The specified bucket is not valid"), False), (NoCredentialsError("Unable to locate credentials"), False),
    ],
)  # fmt: skip
def test_errors_of_object_stores(store: str, error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    files, asked = type(fsspec.filesystem("memory")), []
    original = files.cat_file

    def cat_file(self, path, **options):  # type: ignore[no-untyped-def]
        if path.endswith(SHARD):
            asked.append(path)
            if len(asked) < 3:
                raise error
        return original(self, path, **options)

    monkeypatch.setattr(files, "cat_file", cat_file)
    prompts = PromptSet.open(store, "train")
    if passes:
        assert len(prompts.shard(1)) == 7 and len(asked) == 3
        return
    with pytest.raises(
        UserError, match=rf"{store}/{SHARD} cannot be read: {type(error).__name__}: .*; check prompts.source"
    ) as caught:
        prompts.shard(1)
    assert len(asked) == 1 and "\n" not in str(caught.value)


def test_faults_of_an_object_store(store: str) -> None:
    files = fsspec.filesystem("memory")
    prompts = PromptSet.open(store, "train")
    content = files.cat_file(f"{store}/{SHARD}")
    for wrong in (content[:-1], content + b"x", content[:-1] + bytes([content[-1] ^ 1]), b""):
        files.pipe_file(f"{store}/{SHARD}", wrong)
        with pytest.raises(CorruptFile, match=f"{store}/{SHARD} is damaged"):
            prompts.shard(1)
    files.rm(f"{store}/{SHARD}")
    with pytest.raises(UserError, match=rf"{store}/{SHARD} is not there \(no such object\)"):
        prompts.shard(1)
    with pytest.raises(UserError, match=r"prompt index memory://bucket/b/index.json cannot be read"):
        PromptSet.open("memory://bucket/b", "train")


@pytest.mark.parametrize(("scheme", "extra", "package"), [("s3", "s3", "s3fs"), ("gs", "gcs", "gcsfs"), ("gcs", "gcs", "gcsfs")])
def test_a_package_that_is_missing_is_named(scheme: str, extra: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{scheme}:// needs a package that is not installed; pip install 'prdp-fast\[{extra}\]'"
    ):
        PromptSet.open(f"{scheme}://bucket/x", "train")


# ------------------------------------------------------------------------------------------------------------- embeddings
def test_embeddings_behind_a_url(tmp_path: Path, server: ShardServer, small_prompts: list[Prompt]) -> None:
    assert StoredEmbeddings.open(server.url) is None
    write_embeddings(server.directory, encode, model="test", per_file=5)
    server.asked.clear()
    there, here = StoredEmbeddings.open(server.url), StoredEmbeddings.open(server.directory)
    assert there is not None and here is not None and len(there) == 23
    assert server.asked == [MANIFEST, INDEX, ROWS, embeddings.EMPTY]
    chosen = [small_prompts[number] for number in (12, 3, 10)]
    for row, expected in zip(there.rows(chosen), here.rows(chosen), strict=True):
        assert (row is None) == (expected is None) and (row is None or row.equal(expected))
    assert sorted(server.asked[4:]) == ["embeddings-00000.safetensors", "embeddings-00002.safetensors"]
    server.fail("embeddings-00001.safetensors", itertools.repeat("flip"))
    with pytest.raises(CorruptFile, match=r"embeddings-00001.safetensors is damaged"):
        there.rows(small_prompts[5:6])


def test_embeddings_of_an_earlier_version(server: ShardServer, small_prompts: list[Prompt]) -> None:
    write_embeddings(server.directory, encode, model="test", per_file=5)
    expected = StoredEmbeddings.open(server.directory)
    manifest = json.loads((server.directory / MANIFEST).read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["file"] != ROWS]
    (server.directory / MANIFEST).write_text(json.dumps(manifest))
    (server.directory / ROWS).unlink()
    earlier = StoredEmbeddings.open(server.directory)
    assert earlier is not None and expected is not None
    assert earlier.rows(small_prompts).prompt_embeds.equal(expected.rows(small_prompts).prompt_embeds)
    with pytest.raises(UserError, match=rf"{server.url}/{MANIFEST} names no {ROWS}; run 'prdp embed' again"):
        StoredEmbeddings.open(server.url)


@pytest.mark.parametrize(("key", "value"), [("file", "../x"), ("file", "https://host/x"), ("sha256", "../" + "0" * 61)])
def test_a_manifest_names_files_of_its_own_directory(server: ShardServer, key: str, value: str) -> None:
    write_embeddings(server.directory, encode, model="test")
    manifest = json.loads((server.directory / MANIFEST).read_text())
    manifest["files"][0][key] = value
    (server.directory / MANIFEST).write_text(json.dumps(manifest))
    for place in (server.url, server.directory):
        with pytest.raises(UserError, match=f"{MANIFEST} cannot be read"):
            StoredEmbeddings.open(place)


def test_a_job_without_the_embeddings_that_it_wants(server: ShardServer) -> None:
    recipe = load_recipe("smoke", [f"prompts={{source: '{server.url}', stored_embeddings: true}}", "evaluation.prompts=0"])
    with pytest.raises(UserError, match=r"has none; run 'prdp embed DIR --model tiny' and upload what it wrote, or set it false"):
        Job.prepare(recipe, "zero2.json", world_size=1, cuda=False)


# --------------------------------------------------------------------------------------------------------------- commands
def test_commands_take_urls(tmp_path: Path, server: ShardServer, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(server.directory, encode, model="test", per_file=5)
    assert describe(server.url) == describe(server.directory)
    assert cli.main(["shards", "info", server.url]) == 0 and "set train: 23 prompts in 4 shards" in capsys.readouterr().out
    assert cli.main(["shards", "verify", server.url]) == 0 and capsys.readouterr().out == f"{server.url}: all right\n"
    list(opened(server))  # the cache has all of it, and hides nothing
    for name, fault in ((SHARD, "flip"), ("train-00002.tar.gz", "cut"), ("train-00003.tar.gz", "endless")):
        server.fail(name, itertools.repeat(fault))
    server.fail("train-00000.tar.gz", [404])
    server.fail("embeddings-00001.safetensors", ["flip"])
    assert cli.main(["shards", "verify", server.url]) == 1
    said = capsys.readouterr().out
    for part in (
        f"{SHARD}: SHA-256 differs", "train-00002.tar.gz: ", f"{server.url}/train-00000.tar.gz is not there", "or more bytes",
        "embeddings-00001.safetensors: SHA-256 differs",
    ):  # fmt: skip
        assert part in said
    assert len(verify(server.directory)) == 0
    assert cli.main(["embed", server.url, "--model", "tiny"]) == 2
    assert "DIR is a URL; expected a directory on this machine" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- shards left out
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("damage", ["bytes", "no tar", "missing"])
def test_damaged_shards_are_found_where_they_may_be_left_out(server: ShardServer, far: bool, damage: str) -> None:
    source, path = server.url if far else str(server.directory), server.directory / SHARD
    if damage == "no tar":  # as the index says, and still none
        index = read_index(server.directory / INDEX)
        path.write_bytes(b"no tar" * 100)
        entry = index.sets["train"].shards[1]
        entry.bytes, entry.sha256 = content_sha256(path)
        (server.directory / INDEX).write_text(index.model_dump_json())
    elif damage == "bytes":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.unlink()
    if damage == "missing":  # it may be there tomorrow
        with pytest.raises(UserError, match=rf"{SHARD} is (missing|not there)"):
            PromptSet.open(source, "train", damage="skip").corrupt_shards()
        return
    prompts = PromptSet.open(source, "train", damage="skip")
    assert prompts.corrupt_shards() == [SHARD]
    kept = prompts.without([SHARD])
    assert [prompt.index for prompt in kept] == [*range(100, 107), *range(114, 123)] and len(kept) == 16
    assert kept.fingerprint != prompts.fingerprint and len(prompts) == 23
    with pytest.raises(UserError, match=r"every shard of prompt set 'train' in .* is damaged"):
        prompts.without([f"train-0000{number}.tar.gz" for number in range(4)])
    if far or damage == "no tar":
        with pytest.raises(CorruptFile, match=SHARD):
            list(PromptSet.open(source, "train"))
    else:
        with pytest.raises(UserError, match=SHARD):
            PromptSet.open(source, "train")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_prompt_of_the_whole_shards_comes_exactly_once_a_pass(data: st.DataObject) -> None:
    shards = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=6))
    damaged = data.draw(st.sets(st.integers(0, len(shards) - 1), max_size=len(shards) - 1))
    starts = [0, *itertools.accumulate(shards)]
    wanted = [index for n in range(len(shards)) if n not in damaged for index in range(starts[n], starts[n + 1])]
    per_epoch = data.draw(st.integers(1, len(wanted)))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shards)
        files = [shard.file for shard in read_index(Path(folder) / INDEX).sets["train"].shards]
        for number in damaged:
            (Path(folder) / files[number]).write_bytes(b"x")
        sequence = []
        for epoch in range(3 * len(wanted) // per_epoch + 1):
            ranks = data.draw(st.sampled_from([n for n in range(1, per_epoch + 1) if per_epoch % n == 0]))
            prompts = PromptSet.open(folder, "train", damage="skip")  # a restart, each time
            prompts = prompts.without([files[number] for number in damaged])
            for rank in range(ranks):
                stream = PromptStream(prompts, seed=1, prompts_per_epoch=per_epoch, rank=rank, world_size=ranks)
                sequence += [prompt.index for prompt in stream.epoch(epoch)]
    for start in range(0, len(sequence) - len(wanted) + 1, len(wanted)):
        assert sorted(sequence[start : start + len(wanted)]) == wanted


def test_ranks_that_read_different_indices_do_not_start(
    tmp_path: Path, server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("smoke", [f"prompts.source={server.url}", "evaluation.prompts=0"])
    job = Job.prepare(recipe, "zero2.json", world_size=2, cuda=False)
    monkeypatch.setattr("prdp_fast.core.distributed.is_main", lambda: False)
    monkeypatch.setattr("prdp_fast.core.distributed.from_main", lambda own: (None, "start", "of rank 0"))
    with pytest.raises(OneRankError, match=f"{server.url} was changed while the ranks started"):
        claim_for_all(tmp_path / "run", job, "auto")


@pytest.mark.parametrize(
    ("key", "may"), [("cache_dir", True), ("cache_gb", True), ("fetch_timeout_s", True), ("on_corrupt", False), ("source", False)]
)
def test_what_a_run_that_goes_on_may_change(key: str, may: bool) -> None:
    old, new = ({"recipe": {"prompts": {key: value}}} for value in ("a", "b"))
    assert (first_difference(old, new) is None) == may


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_from_a_url_is_the_job_from_the_directory(tmp_path: Path) -> None:
    """On two ranks, with a damaged shard left out. The second start finds it mended, and leaves it out all the same."""
    folder = tmp_path / "set"
    train = write_shards([Prompt(number, f"creature {number}", {}) for number in range(24)], folder, "train", shard_size=6)
    held = write_shards([Prompt(number, f"being {number}", {}) for number in range(30, 34)], folder, "held")
    write_index(folder, {"train": train, "seen_eval": held, "unseen_eval": held}, "1-test")
    whole = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole[:-1] + b"x")

    def start(source: str, output: str, epochs: int) -> launching.Finished:
        values = {
            "prompts.source": source, "prompts.on_corrupt": "skip", "rewards": "[{name: jpeg_size}]", "schedule.epochs": epochs,
            "sampler.num_inference_steps": 2, "schedule.images_per_prompt": 2, "evaluation.prompts": 2,
        }  # fmt: skip
        return launching.start(
            launching.TRAIN, "--config", "zero2.json", "--recipe", "smoke", "--output", tmp_path / output,
            *launching.settings(values), ranks=2, cwd=tmp_path, env={"PRDP_CACHE": str(tmp_path / "cache")},
        ).wait(200)  # fmt: skip

    def rows(output: str) -> list[dict]:
        lines = [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]
        machine = ("seconds/", "memory/", "images_per_s")
        return [{key: value for key, value in line.items() if not key.startswith(machine)} for line in lines]

    here = start(str(folder), "here", 5)
    assert here.returncode == 0, here.text[-3000:]
    server = ShardServer(folder)
    try:
        server.fail("train-00000.tar.gz", [503, "drop"])
        first = start(server.url, "there", 2)
        assert first.returncode == 0, first.text[-3000:]
        (folder / SHARD).write_bytes(whole)
        server.asked.clear()
        second = start(server.url, "there", 5)
        assert second.returncode == 0, second.text[-3000:]
    finally:
        server.close()
    assert rows("there") == rows("here") and len(rows("here")) == 5
    assert {row["skipped_shards"] for row in rows("here")} == {1}
    assert [(row["position/pass"], row["position/prompt"]) for row in rows("here")][-1] == (1, 2), "18 prompts are a pass"
    for said, place in ((here, str(folder)), (first, server.url), (second, server.url)):
        assert said.text.count(f"prompts.on_corrupt skip: prompt shard {place}/{SHARD} is damaged, and no pass") == 1
    assert "continuing after epoch 2" in second.text and SHARD not in server.asked
