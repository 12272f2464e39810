"""A reward that runs elsewhere: images go out as PNG over HTTP, scores come back.

rewards: [{name: http, options: {url: "http://scorer:8000", token_env: PRDP_SCORER_TOKEN}}]

docs/http_reward.md describes the protocol; `prdp serve-reward` is a server that speaks it.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import logging
import math
import os
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
from PIL import Image

from prdp_fast.core.errors import RewardError
from prdp_fast.rewards.base import Reward, RewardOutput

LONGEST_WAIT_S = 60.0
ANSWER_BYTES = 16 * 2**20  # of one answer, unpacked; a batch of numbers has a few kilobytes
SHARE_OF_TIME = 0.95  # of what a call has, for attempts: the rest is for the error that says why they failed
TOKEN_PREFIX = "PRDP_"  # a recipe may be somebody else's, and must not choose which secret is sent to a server of its choice
FLOAT32_MAX = torch.finfo(torch.float32).max
logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a server says of one batch."""

    scores: list[float]  # NaN: could not be scored
    details: dict[str, list[float]]


class TryAgain(Exception):
    """The server is there and cannot answer now."""


class HttpReward(Reward):
    """Asks `url`/score, one batch after the other.

    What may pass is tried again: no connection, no answer in time, HTTP 5xx and 429. Anything else, and a server that still fails
    after the last attempt, raises: an image without a score never counts as zero.
    """

    name = "http"

    def __init__(
        self,
        *,
        url: str,
        batch_size: int = 16,
        timeout_s: float = 120.0,
        retries: int = 6,
        backoff_s: float = 1.0,
        token_env: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            url: where the server is, without "/score".
            batch_size: images a request at most.
            timeout_s: seconds to wait for a connection and then for an answer, in each attempt.
            retries: attempts after the first; with the default pauses a server may be away for a minute.
            backoff_s: seconds before the second attempt; doubles with every further one, up to a minute.
            token_env: name of the environment variable that holds the bearer token; it starts with PRDP_.
            arguments: sent with every request, for servers that take some.
        Raises: ValueError if a value is wrong or the token is not set. Nothing is asked of the server yet.
        """
        self.url = checked_url(url)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected an integer from 1")
        if not is_number(timeout_s) or not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s!r}; expected a number of seconds above 0")
        if type(retries) is not int or retries < 0:
            raise ValueError(f"retries is {retries!r}; expected an integer from 0")
        if not is_number(backoff_s) or not 0 <= backoff_s < math.inf:
            raise ValueError(f"backoff_s is {backoff_s!r}; expected a number of seconds from 0")
        self.batch_size, self.retries, self.backoff_s = batch_size, retries, float(backoff_s)
        self.timeout_s_of_attempt = float(timeout_s)
        self._headers = {"content-type": "application/json"}
        if token_env is not None:
            if not isinstance(token_env, str) or not token_env.startswith(TOKEN_PREFIX):
                raise ValueError(
                    f"token_env names no variable that starts with {TOKEN_PREFIX}; a recipe can have only those sent: "
                    f"export the token as {TOKEN_PREFIX}SCORER_TOKEN, say, and name that"
                )
            self._headers["authorization"] = f"Bearer {read_token(token_env)}"
        try:
            self.arguments = json.loads(json.dumps(dict(arguments or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments are {arguments!r}; expected a mapping that JSON can hold ({error})") from error
        self._client: Any = None  # httpx2.Client from `prepare` on
        self._proxy = proxy_of(self.url)

    def prepare(self) -> None:
        """Nothing is asked of the server: it may still be starting."""
        if self._client is not None:
            return
        try:
            import httpx2
            import tenacity  # noqa: F401
        except ImportError as error:
            raise RewardError(
                f"reward 'http' needs {error.name}, which is not installed; pip install 'prdp-fast[rewards]'"
            ) from error
        try:
            # Without a proxy the variables are not read at all: a broken one is no obstacle on the way to this machine.
            self._client = httpx2.Client(timeout=self.timeout_s_of_attempt, headers=self._headers, trust_env=bool(self._proxy))
        except (ImportError, ValueError) as error:
            raise RewardError(
                f"reward 'http': {self.url} cannot be reached through the proxy of {self._proxy} "
                f"({type(error).__name__}: {plain(str(error)).partition(', ')[0].partition('. ')[0]}); expected an http or https "
                f"proxy, or NO_PROXY={urlsplit(self.url).hostname}"
            ) from None

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        if not len(images):
            return RewardOutput(torch.zeros(0))
        scores: list[float] = []
        details: dict[str, list[float]] = {}
        pixels = images.cpu()
        until = math.inf if self.timeout_s is None else time.monotonic() + SHARE_OF_TIME * self.timeout_s
        for start in range(0, len(pixels), self.batch_size):
            part = slice(start, start + self.batch_size)
            answer = self._ask(pixels[part], prompts[part], metadata[part], until)
            if start and answer.details.keys() != details.keys():
                raise self._fault(f"details {names(answer.details)} after {names(details)}", "the same details with every batch")
            scores += answer.scores
            for key, values in answer.details.items():
                details.setdefault(key, []).extend(values)
        if all(map(math.isnan, scores)):
            raise self._fault(f"no score for any of {len(scores)} images", "one at least: see the server's log")
        return RewardOutput(torch.tensor(scores), {key: torch.tensor(values) for key, values in details.items()})

    def _ask(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], until: float) -> Answer:
        request = {"images": list(map(encode_png, images)), "prompts": list(prompts), "metadata": list(map(dict, metadata))}
        if self.arguments:
            request["arguments"] = self.arguments
        try:
            body = json.dumps(request, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward 'http': the metadata of a prompt cannot be sent as JSON: {error}") from error
        content = self._post(body, until)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise self._fault(f"{one_line(content)!r}", "a JSON object") from None
        if not isinstance(answer, dict) or "scores" not in answer:
            raise self._fault(f"{one_line(content)!r}", 'a JSON object with "scores"')
        details = answer.get("details") or {}
        if not isinstance(details, dict):
            raise self._fault(f"{type(details).__name__} as details", "an object of lists")
        return Answer(
            self._numbers("scores", answer["scores"], len(images)),
            {key: self._numbers(f"detail {key!r}", values, len(images)) for key, values in details.items()},
        )

    def _numbers(self, what: str, values: Any, count: int) -> list[float]:
        """The list as floats, null as NaN. Raises: RewardError if it is anything but `count` numbers or nulls."""
        if not isinstance(values, list):
            raise self._fault(f"{type(values).__name__} as {what}", f"a list of {count} numbers")
        if len(values) != count:
            raise self._fault(f"{len(values)} {what} for {count} images", "one an image, in their order")
        for value in values:
            fits = is_number(value) and (value != value or -FLOAT32_MAX <= value <= FLOAT32_MAX)
            if value is not None and not fits:
                raise self._fault(f"{one_line(json.dumps(value).encode(), 60)} among the {what}", "float32 numbers, or null")
        return [math.nan if value is None else float(value) for value in values]

    def _post(self, body: bytes, until: float) -> bytes:
        """The content of the first good answer.

        Args: until: time.monotonic() that no attempt goes beyond.
        Raises: RewardError after the last attempt, or at once for what will not pass.
        """
        self.prepare()
        import httpx2
        import tenacity

        client = self._client

        def attempt() -> bytes:
            left = min(self.timeout_s_of_attempt, max(0.001, until - time.monotonic()))
            with client.stream("POST", f"{self.url}/score", content=body, timeout=left) as response:
                status, content = response.status_code, self._read(response, until)
            if status >= 500 or status == 429:
                raise TryAgain(f"HTTP {status}: {said(content)}")
            if status != 200:
                raise self._fault(f"HTTP {status}: {said(content)}", ADVICE.get(status, f"HTTP 200 from {self.url}/score"))
            return content

        def is_late(state: tenacity.RetryCallState) -> bool:
            return time.monotonic() + pause(state) >= until

        def report(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None and state.next_action is not None
            logger.warning(
                "reward 'http': %s: %s; attempt %d of %d in %g s", self.url, self._why(state.outcome.exception()),
                state.attempt_number + 1, self.retries + 1, state.next_action.sleep,
            )  # fmt: skip

        pause = tenacity.wait_exponential(multiplier=self.backoff_s, max=LONGEST_WAIT_S)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_any(tenacity.stop_after_attempt(self.retries + 1), is_late),  # type: ignore[arg-type]
            wait=pause,
            retry=tenacity.retry_if_exception_type((httpx2.RequestError, TryAgain)),
            before_sleep=report,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except httpx2.InvalidURL as error:
            raise RewardError(f"reward 'http': {self.url} is no address ({plain(str(error))}); check url") from error
        except (httpx2.RequestError, TryAgain) as error:
            made = retrying.statistics["attempt_number"]
            times = f"{made} attempts" if made > 1 else "the only attempt"
            proxy = f" (through the proxy of {self._proxy})" if self._proxy else ""
            advice = (
                f"look at the server and its log, or raise timeout_s ({self.timeout_s_of_attempt:g}) or retries ({self.retries})"
            )
            if made <= self.retries and self.timeout_s is not None:
                advice = f"look at the server and its log, or raise schedule.reward_timeout_s ({self.timeout_s:g})"
            raise RewardError(
                f"reward 'http': {self.url}{proxy} gave no scores in {times}, at last: {self._why(error)}; {advice}"
            ) from error

    def _read(self, response: Any, until: float) -> bytes:
        """The body, as long as it is one of scores. Raises: RewardError, TryAgain."""
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            if len(content) > ANSWER_BYTES:
                raise self._fault(f"more than {ANSWER_BYTES // 2**20} MB", "a few numbers an image")
            if time.monotonic() > until:
                raise TryAgain("an answer that does not end")
        return bytes(content)

    def _why(self, error: BaseException | None) -> str:
        import httpx2

        if isinstance(error, httpx2.TimeoutException):
            what = "connection" if isinstance(error, httpx2.ConnectTimeout) else "answer"
            return f"no {what} within {self.timeout_s_of_attempt:g} s"
        if isinstance(error, TryAgain):
            return str(error)
        return f"{type(error).__name__}: {one_line(str(error).encode())}"

    def _fault(self, got: str, expected: str) -> RewardError:
        return RewardError(f"reward 'http': {self.url} answered with {got}; expected {expected}")


# What follows "expected" for answers that another attempt would not change.
ADVICE = {
    401: "a token that the server knows: check token_env",
    403: "a token that the server knows: check token_env",
    404: "a server of docs/http_reward.md there: check url",
    413: "room for a batch: lower batch_size",
}


def checked_url(url: str) -> str:
    """The URL without a slash at its end. Raises: ValueError if it is none of a server; one with a password is not repeated."""
    form = "expected 'http://HOST:PORT' or 'https://HOST/PATH'"
    if not isinstance(url, str):
        raise ValueError(f"url is {url!r}; {form}")
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port != 0
    except ValueError as error:
        raise ValueError(f"url is no address ({error}); {form}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"url has a user name or a password; {form}, and the secret in the variable that token_env names")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or any(map(str.isspace, url)):
        raise ValueError(f"url is {url!r}; {form}")
    if parts.query or parts.fragment or parts.path.rstrip("/").endswith("/score"):
        raise ValueError(f"url is {url!r}; {form}, without '/score', '?' and '#': '/score' is added")
    return url.rstrip("/")


def proxy_of(url: str) -> str | None:
    """The name of the environment variable whose proxy stands between here and the URL. None: there is none.

    This machine itself is never reached through one, whatever NO_PROXY says.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_this_machine(host) or proxy_bypass(host):
        return None
    found = getproxies()
    scheme = next((name for name in (parts.scheme, "all") if found.get(name)), None)
    return None if scheme is None else f"{scheme.upper()}_PROXY"


def is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(variable: str) -> str:
    """Raises: ValueError if the variable is not set or holds no token. Neither is repeated: the name may be the secret itself."""
    token = os.environ.get(variable, "").strip() if isinstance(variable, str) else ""
    if not token:
        raise ValueError("token_env names no environment variable that is set; export the token under that name first")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the environment variable that token_env names holds no bearer token; expected one ASCII word")
    return token


def encode_png(image: torch.Tensor) -> str:
    """(3, H, W) uint8 on the CPU -> base64 of a PNG, which keeps every bit. Level 1: time matters more than size here."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def names(details: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, details)) or "none"


# What a terminal would obey: ECMA-48 control sequences, operating system commands, other escapes.
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]", re.DOTALL)


def plain(text: str) -> str:
    """One line of what can be shown: without escapes, control characters, and marks that turn the direction of writing."""
    text = " ".join(ESCAPES.sub("", text).split())
    return "".join(character for character in text if unicodedata.category(character) not in ("Cc", "Cf", "Cs"))


def one_line(text: bytes, length: int = 200) -> str:
    line = plain(text[: 4 * length].decode(errors="replace"))
    return line if len(line) <= length else f"{line[:length]}..."


def said(content: bytes) -> str:
    """The reason in the body of an error: {"error": ...}, FastAPI's {"detail": ...}, or its beginning."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict):
        for key in ("error", "detail"):
            if isinstance(answer.get(key), str):
                return one_line(answer[key].encode(), 500)
    return one_line(content) or "no reason given"
