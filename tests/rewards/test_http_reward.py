"""The `http` reward against real servers on free ports: the shipped one, and crooked ones."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch
import uvicorn
from PIL import Image

from prdp_fast import cli
from prdp_fast.core.errors import RewardError, UserError
from prdp_fast.rewards import Reward, RewardOutput, server
from prdp_fast.rewards.http import HttpReward, encode_png
from prdp_fast.rewards.registry import build_reward
from prdp_fast.rewards.server import build_app, decode_images
from prdp_fast.world import scenes

N = 5
IMAGES = torch.randint(0, 256, (N, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
PROMPTS = [f"prompt {number}, é" for number in range(N)]
METADATA = [{"bonus": number} for number in range(N)]


def client(url: str, **options) -> HttpReward:
    return build_reward("http", {"url": url, "retries": 2, "backoff_s": 0.01, "timeout_s": 10.0} | options)


def ask(reward: HttpReward) -> RewardOutput:
    return reward.score(IMAGES, PROMPTS, METADATA)


# The shipped server


class Recorded(Reward):
    """Scores by pixels, prompt and metadata, at most one call at a time, and keeps what it saw."""

    name = "recorded"

    def __init__(self) -> None:
        self.running = self.most_at_once = 0
        self.images: list[torch.Tensor] = []
        self.raises: Exception | None = None
        self.pause = 0.0

    def score(self, images, prompts, metadata):
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        time.sleep(self.pause)
        self.running -= 1
        if self.raises:
            raise self.raises
        self.images.append(images)
        scores = images.float().mean((1, 2, 3)) / 7 + torch.tensor([len(p) + m["bonus"] for p, m in zip(prompts, metadata)])
        scores[[m["bonus"] == 3 for m in metadata]] = math.nan
        return RewardOutput(scores, {"first": images[:, 0, 0, 0] / 3})


@contextlib.contextmanager
def served(reward: Reward, *, token: str | None = None, max_images: int = 64) -> Iterator[str]:
    app = build_app(reward, token=token, max_images=max_images, device=torch.device("cpu"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.mark.parametrize("batch_size", [2, 16])
def test_scores_and_details_are_those_of_the_local_reward(batch_size):
    reward = Recorded()
    local = Recorded().score(IMAGES, PROMPTS, METADATA)
    with served(reward) as url:
        output = ask(client(url, batch_size=batch_size))
    torch.testing.assert_close(output.scores, local.scores, rtol=0, atol=0, equal_nan=True)
    assert output.scores.isnan().tolist() == [False, False, False, True, False]
    assert torch.equal(output.details["first"], local.details["first"])
    assert torch.equal(torch.cat(reward.images), IMAGES)
    assert [len(images) for images in reward.images] == ([2, 2, 1] if batch_size == 2 else [5])


def test_a_png_keeps_every_bit():
    assert torch.equal(decode_images([encode_png(image) for image in IMAGES]), IMAGES)


def test_the_server_scores_one_request_at_a_time():
    reward = Recorded()
    reward.pause = 0.05
    with served(reward) as url:
        jobs = [threading.Thread(target=ask, args=(client(url, batch_size=2),)) for _ in range(3)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    assert len(reward.images) == 9 and reward.most_at_once == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RewardError("reward 'recorded' wants scenes"), "wants scenes"), (KeyError("lost"), "KeyError: 'lost'")],
)
def test_a_failing_reward_says_so_and_the_server_goes_on(error, reason):
    reward = Recorded()
    with served(reward) as url:
        reward.raises = error
        with pytest.raises(RewardError, match=f"3 attempts, at last: HTTP 500: .*{reason}"):
            ask(client(url))
        reward.raises = None
        assert ask(client(url)).scores[0].isfinite()


def test_the_token(monkeypatch):
    monkeypatch.setenv("PRDP_RIGHT", "s3cret")
    monkeypatch.setenv("PRDP_WRONG", "other")
    with served(Recorded(), token="s3cret") as url:
        assert ask(client(url, token_env="PRDP_RIGHT")).scores[0].isfinite()
        for options in ({}, {"token_env": "PRDP_WRONG"}):
            started = time.monotonic()
            with pytest.raises(RewardError, match=r"HTTP 401: .*check token_env") as caught:
                ask(client(url, backoff_s=5.0, **options))
            assert time.monotonic() - started < 4  # a wrong token is not tried again
            assert "s3cret" not in str(caught.value) and "other" not in str(caught.value)
        assert httpx2.get(f"{url}/health").json() == {"reward": "recorded", "max_images": 64}


def png(mode: str = "RGB", size: tuple[int, int] = (4, 4), form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format=form)
    return base64.b64encode(buffer.getvalue()).decode()


GOOD = png()


@pytest.mark.parametrize(
    ("status", "request_body", "reason"),
    [
        (413, {"images": [GOOD] * 4, "prompts": ["a"] * 4}, "4 images; this server takes 3 at once"),
        (422, "no json", "no JSON"),
        (422, ["a"], "the request is list"),
        (422, {"images": [], "prompts": []}, "at least one"),
        (422, {"images": [3], "prompts": ["a"]}, "a list of base64 texts"),
        (422, {"images": [GOOD], "prompts": ["a", "b"]}, "1 images, 2 prompts"),
        (422, {"images": [GOOD], "prompts": [1]}, "prompts: expected"),
        (422, {"images": [GOOD], "prompts": ["a"], "metadata": [1]}, "metadata: expected"),
        (422, {"images": [GOOD, GOOD[:40]], "prompts": ["a", "b"]}, "image 1 is no whole PNG"),
        (422, {"images": [encode_png(IMAGES[0])[:-400]], "prompts": ["a"]}, "image 0 is no whole PNG"),
        (422, {"images": ["?"], "prompts": ["a"]}, "image 0 is no whole PNG"),
        (422, {"images": [png(form="JPEG")], "prompts": ["a"]}, "image 0 is no whole PNG"),
        (422, {"images": [png("RGBA")], "prompts": ["a"]}, "mode RGBA"),
        (422, {"images": [GOOD, png(size=(4, 5))], "prompts": ["a", "b"]}, "4 x 4 and 4 x 5 pixels"),
        (422, {"images": [GOOD], "prompts": ["a"], "arguments": {"x": 1}}, "arguments: this server takes none"),
    ],
)
def test_what_the_server_refuses(three_at_most, status, request_body, reason):
    content = request_body if isinstance(request_body, str) else json.dumps(request_body)
    response = httpx2.post(f"{three_at_most}/score", content=content)
    assert response.status_code == status and reason in response.json()["error"]


@pytest.fixture(scope="module")
def three_at_most():
    with served(Recorded(), max_images=3) as url:
        yield url


def header_of(width: int, height: int) -> str:
    """A PNG that says it is so large, and holds nearly nothing."""
    data = bytearray(base64.b64decode(GOOD))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return base64.b64encode(bytes(data)).decode()


@pytest.mark.parametrize(
    ("status", "request_body", "reason"),
    [
        (
            413,
            {"images": [header_of(30_000, 30_000)], "prompts": ["a"]},
            "1 images of 30000 x 30000 pixels; this server takes 67108864",
        ),
        (413, {"images": [header_of(5000, 5000)] * 3, "prompts": ["a"] * 3}, "3 images of 5000 x 5000"),
        (422, {"images": [GOOD, header_of(30_000, 30_000)], "prompts": ["a"] * 2}, "4 x 4 and 30000 x 30000 pixels"),
        (422, {"images": [base64.b64encode(b"\x89PNG\r\n").decode()], "prompts": ["a"]}, "image 0 is no whole PNG"),
        (413, '{"images": [' + "[]," * 600_000, "more than 1048576 commas and brackets"),
    ],
)
def test_bombs_are_refused_before_they_are_unpacked(three_at_most, status, request_body, reason, monkeypatch):
    monkeypatch.setattr(Image, "open", None if status == 413 else Image.open)
    content = request_body if isinstance(request_body, str) else json.dumps(request_body)
    response = httpx2.post(f"{three_at_most}/score", content=content)
    assert response.status_code == status and reason in response.json()["error"]


def test_a_few_requests_at_once_are_in_memory(monkeypatch):
    """The first is being scored and the second read; the third waits unread."""
    monkeypatch.setattr("prdp_fast.rewards.server.AT_ONCE", 2)
    reading, most, plain = set(), [], server.read_body

    async def watched(request, max_images):
        reading.add(id(request))
        most.append(len(reading))
        return await plain(request, max_images)

    monkeypatch.setattr(server, "read_body", watched)

    def answer(*arguments):
        time.sleep(0.05)
        reading.clear()
        return {"scores": [0.0]}

    monkeypatch.setattr(server, "decode_and_answer", answer)
    with served(Recorded()) as url:
        body = json.dumps({"images": [GOOD], "prompts": ["a"]})
        threads = [threading.Thread(target=lambda: httpx2.post(f"{url}/score", content=body, timeout=30)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(most) == 8 and max(most) <= 2


def test_a_request_that_never_arrives(monkeypatch):
    monkeypatch.setattr("prdp_fast.rewards.server.PATIENCE_S", 0.2)
    with served(Recorded()) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection(("127.0.0.1", port), timeout=20) as long:
            long.sendall(b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n")
            assert long.recv(100).startswith(b"HTTP/1.1 413")  # by what it says itself


def test_an_open_host_without_a_token_is_warned_of(capsys, monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    monkeypatch.setenv("PRDP_T", "secret")
    for arguments, warned in (
        (["--host", "0.0.0.0"], True),
        ([], False),
        (["--host", "0.0.0.0", "--token-env", "PRDP_T"], False),
    ):
        assert cli.main(["serve-reward", "jpeg_size", "--port", "0", "--device", "cpu", *arguments]) == 0
        assert ("warning: whoever reaches 0.0.0.0" in capsys.readouterr().err) == warned


def test_a_body_beyond_the_limit(three_at_most, monkeypatch):
    monkeypatch.setattr("prdp_fast.rewards.server.IMAGE_BYTES", 1000)
    with served(Recorded(), max_images=3) as url:
        assert httpx2.post(f"{url}/score", content=b"x" * 3001).status_code == 413
        with pytest.raises(RewardError, match=r"HTTP 413: .*lower batch_size"):
            ask(client(url))


# Crooked servers


class Crooked:
    """Answers by a list of (status, body, seconds to wait); the last is repeated. A body None breaks the connection."""

    def __init__(self, *answers: tuple[int, object, float]) -> None:
        self.answers, self.requests = answers, []

    def __enter__(self) -> Crooked:
        crooked = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                crooked.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                status, body, wait = crooked.answers[min(len(crooked.requests), len(crooked.answers)) - 1]
                time.sleep(wait)
                if body is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


FINE = (200, {"scores": [0.5] * N}, 0.0)
DOWN = (500, {"error": "out of memory"}, 0.0)


@pytest.mark.parametrize("trouble", [DOWN, (503, b"", 0.0), (429, b"slow down", 0.0), (0, None, 0.0), (200, FINE[1], 0.5)])
def test_what_passes_is_tried_again(trouble):
    with Crooked(trouble, trouble, FINE) as server:
        assert ask(client(server.url, timeout_s=0.2)).scores.tolist() == [0.5] * N
    assert len(server.requests) == 3 and server.requests[0] == server.requests[2]


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (DOWN, "HTTP 500: out of memory"),
        ((0, None, 0.0), "RemoteProtocolError|ReadError"),
        ((200, FINE[1], 0.5), r"no answer within 0\.2 s"),
    ],
)
def test_what_does_not_pass_ends_the_job(trouble, reason):
    with Crooked(trouble) as server, pytest.raises(RewardError, match=f"no scores in 3 attempts, at last: ({reason})") as caught:
        ask(client(server.url, timeout_s=0.2))
    assert len(server.requests) == 3 and "\n" not in str(caught.value)


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it
        with pytest.raises(RewardError, match=r"at last: ConnectError.*look at the server"):
            ask(client(f"http://127.0.0.1:{taken.getsockname()[1]}"))


def test_the_pauses_grow():
    with Crooked(DOWN, DOWN, DOWN, FINE) as server:
        started = time.monotonic()
        ask(client(server.url, retries=3, backoff_s=0.1))
        assert 0.1 + 0.2 + 0.4 <= time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "who are you"}, 0.0), "HTTP 400: who are you"),
        ((404, b"not found", 0.0), "HTTP 404: not found; .*check url"),
        ((422, {"detail": "no such model"}, 0.0), "HTTP 422: no such model"),
        ((307, b"", 0.0), "HTTP 307: no reason given"),
        ((200, b"<html>", 0.0), "'<html>'; expected a JSON object"),
        ((200, [1.0] * N, 0.0), 'expected a JSON object with "scores"'),
        ((200, {"score": [1.0] * N}, 0.0), 'expected a JSON object with "scores"'),
        ((200, {"scores": [1.0] * (N - 1)}, 0.0), "4 scores for 5 images"),
        ((200, {"scores": [1.0] * (N + 1)}, 0.0), "6 scores for 5 images"),
        ((200, {"scores": 1.0}, 0.0), "float as scores; expected a list of 5 numbers"),
        ((200, {"scores": ["1"] * N}, 0.0), '"1" among the scores'),
        ((200, {"scores": [True] * N}, 0.0), "true among the scores"),
        ((200, {"scores": [1e39] + [0] * 4}, 0.0), r"1e\+39 among the scores"),
        ((200, b'{"scores": [Infinity, 0, 0, 0, 0]}', 0.0), "Infinity among the scores"),
        ((200, {"scores": [None] * N}, 0.0), "no score for any of 5 images"),
        ((200, {"scores": [1.0] * N, "details": {"x": [1]}}, 0.0), "1 detail 'x' for 5 images"),
        ((200, {"scores": [1.0] * N, "details": [1]}, 0.0), "list as details"),
    ],
)
def test_answers_that_are_none(answer, message):
    with Crooked(answer) as server, pytest.raises(RewardError, match=message) as caught:
        ask(client(server.url))
    assert len(server.requests) == 1 and "\n" not in str(caught.value)  # asking again would not help


def test_null_and_nan_mark_an_image():
    with Crooked((200, b'{"scores": [1, null, NaN, 2.5, -3], "details": {"x": [null, 1, 2, 3, 4]}}', 0.0)) as server:
        output = ask(client(server.url))
    assert output.scores.isnan().tolist() == [False, True, True, False, False]
    assert output.scores[[0, 3, 4]].tolist() == [1, 2.5, -3] and output.details["x"].isnan().tolist() == [True] + [False] * 4


def test_what_is_sent():
    with Crooked(FINE) as server:
        ask(client(f"{server.url}/", arguments={"scale": 2}))
    (request,) = server.requests
    assert torch.equal(decode_images(request.pop("images")), IMAGES)
    assert request == {"prompts": PROMPTS, "metadata": METADATA, "arguments": {"scale": 2}}


def test_details_that_change_between_batches():
    half = [(200, {"scores": [1.0] * 3, "details": {"x": [1] * 3}}, 0.0), (200, {"scores": [1.0] * 2}, 0.0)]
    with Crooked(*half) as server, pytest.raises(RewardError, match="details none after 'x'"):
        ask(client(server.url, batch_size=3))


def test_an_answer_without_end():
    with Crooked((200, b'{"scores": [' + b"0," * 9_000_000, 0.0)) as server, pytest.raises(RewardError, match="more than 16 MB"):
        ask(client(server.url))
    packed = gzip.compress(b'{"scores": [' + b" " * 40_000_000)

    class Packed(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(packed)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(packed)

        def log_message(self, *_: object) -> None:
            pass

    crooked = ThreadingHTTPServer(("127.0.0.1", 0), Packed)
    threading.Thread(target=crooked.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        with pytest.raises(RewardError, match="more than 16 MB"):
            ask(client(f"http://127.0.0.1:{crooked.server_address[1]}"))
    finally:
        crooked.shutdown()
        crooked.server_close()


@pytest.mark.parametrize(
    "said",
    [
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07red",
        "\x1b]8;;http://x\x1b\\red",
        "\x9b31mred",
        "r\x08ed",
        "r\u202eed",
        "\x1bcred",
        "red\x1b]2;t",
    ],
)
def test_a_server_does_not_command_the_terminal(said):
    for answer in ((400, {"error": said}, 0.0), (400, said.encode(), 0.0)):
        with Crooked(answer) as server, pytest.raises(RewardError) as caught:
            ask(client(server.url))
        assert "HTTP 400: red;" in str(caught.value) and str(caught.value).isprintable()


def test_all_attempts_fit_into_the_time_of_a_call():
    """Seven attempts of 120 s would be too many for a second."""
    with Crooked(DOWN) as server:
        reward = build_reward("http", {"url": server.url, "backoff_s": 0.2})
        reward.timeout_s = 1.0
        started = time.monotonic()
        with pytest.raises(
            RewardError, match=r"in [23] attempts, at last: HTTP 500: out of memory; .*schedule.reward_timeout_s \(1\)"
        ):
            ask(reward)
        assert time.monotonic() - started < 5
    with Crooked((200, FINE[1], 30.0)) as server:
        reward = build_reward("http", {"url": server.url})
        reward.timeout_s = 0.5
        started = time.monotonic()
        with pytest.raises(RewardError, match="no answer within"):
            ask(reward)
        assert time.monotonic() - started < 5


# Proxies


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture
def shell(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9/", "nonsense"])
@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_this_machine_is_reached_without_a_proxy(shell, variable, proxy):
    shell(variable, proxy)
    with Crooked(FINE) as server:
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            assert ask(client(url)).scores.tolist() == [0.5] * N


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9/", "ftp://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named_before_any_work(shell, proxy):
    shell("ALL_PROXY", proxy)
    with pytest.raises(
        RewardError, match=r"http://192\.0\.2\.1 cannot be reached through the proxy of ALL_PROXY .*NO_PROXY=192\.0\.2\.1"
    ):
        client("http://192.0.2.1").prepare()
    shell("NO_PROXY", "192.0.2.1")
    client("http://192.0.2.1").prepare()


def test_a_proxy_in_the_way_is_named(shell):
    shell("HTTP_PROXY", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(RewardError, match=r"http://192\.0\.2\.1 \(through the proxy of HTTP_PROXY\) gave no scores") as caught:
        ask(client("http://192.0.2.1", retries=0))
    assert "hunter2" not in str(caught.value)


# Options


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "prdp_token", "", 3])
def test_a_recipe_cannot_have_any_secret_sent(name, monkeypatch):
    for variable in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "prdp_token"):
        monkeypatch.setenv(variable, "s3cret")
    with pytest.raises(UserError, match="token_env names no variable that starts with PRDP_") as caught:
        build_reward("http", {"url": "http://scorer", "token_env": name})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "scorer:8000"}, "expected 'http://HOST:PORT'"),
        ({"url": "ftp://scorer"}, "expected 'http://HOST:PORT'"),
        ({"url": "http://scorer:99999"}, "no address"),
        ({"url": "http://scorer/score"}, "without '/score'"),
        ({"url": "http://scorer/?a=1"}, "without '/score'"),
        ({"url": 3}, "url is 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"backoff_s": "1"}, "backoff_s is '1'"),
        ({"arguments": {"x": math.nan}}, "JSON can hold"),
        ({"token_env": "PRDP_NO_SUCH_TOKEN"}, "names no environment variable"),
    ],
)
def test_options_are_checked_before_any_work(options, message):
    with pytest.raises(UserError, match=message):
        build_reward("http", {"url": "http://scorer"} | options)


def test_a_password_in_the_url_is_not_repeated():
    with pytest.raises(UserError, match="user name or a password") as caught:
        build_reward("http", {"url": "http://me:hunter2@scorer"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("library", ["httpx2", "tenacity"])
def test_a_missing_library_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RewardError, match=rf"needs {library}, .*pip install 'prdp-fast\[rewards\]'"):
        ask(client("http://127.0.0.1:9"))


# The command


@contextlib.contextmanager
def command(*arguments: str, directory: Path | None = None) -> Iterator[tuple[subprocess.Popen, str]]:
    """`prdp serve-reward` on a port of its own choice, and its address."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "prdp_fast.cli", "serve-reward", *arguments, "--port", "0"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        found = re.search(r"at (http://\S+)", said)
        assert found, (said, process.stderr.read())
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_the_command_scores_like_the_job_itself():
    chosen = [scenes.scene_at(number) for number in (5, 70_000, 150_000)]
    images, prompts = scenes.render(chosen), [scene.prompt() for scene in chosen]
    images[1] = 255 - images[1]
    local = build_reward("shapes_alignment", {}).score(images, prompts, [{}] * 3)
    with command("shapes_alignment", "--device", "cpu") as (process, url):
        output = client(url, timeout_s=60.0).score(images, prompts, [{}] * 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (130, 0)  # 0 where the shell above runs jobs with the interrupt ignored
    assert torch.equal(output.scores, local.scores) and len(set(local.scores.tolist())) > 1
    assert output.details.keys() == local.details.keys()
    for key, values in local.details.items():
        torch.testing.assert_close(output.details[key], values.float(), rtol=0, atol=0, equal_nan=True)


def test_a_server_killed_in_the_middle_of_a_call(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def score(images, prompts):\n    pathlib.Path('called').touch()\n    time.sleep(60)\n    return [1.0] * len(images)\n"
    )
    with command("python", "--option", "function=slow.py:score", directory=tmp_path) as (process, url):

        def kill() -> None:
            while not (tmp_path / "called").exists():
                time.sleep(0.02)
            process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(RewardError, match="3 attempts, at last: ConnectError"):
            ask(client(url, timeout_s=30.0))
        killer.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jpeg_sise"], "did you mean 'jpeg_size'"),
        (["jpeg_size", "--option", "quality"], "expected KEY=VALUE"),
        (["jpeg_size", "--option", "quality=0"], "quality is 0"),
        (["jpeg_size", "--option", "quality=["], "not valid YAML"),
        (["jpeg_size", "--option", "quality=1", "--option", "quality=2"], "given twice"),
        (["jpeg_size", "--token-env", "PRDP_NO_SUCH_TOKEN"], "--token-env: .*no environment variable"),
        (["jpeg_size", "--max-images", "0"], "--max-images is 0"),
        (["jpeg_size", "--device", "gpu"], "--device 'gpu' cannot be used"),
        (["jpeg_size", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["jpeg_size", "--port", "70000"], "--port is 70000"),
    ],
)
def test_commands_that_cannot_serve(arguments, message, capsys):
    assert cli.main(["serve-reward", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
