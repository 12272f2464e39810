"""A reward behind HTTP: the application that `prdp serve-reward` runs, for the `http` reward of jobs elsewhere.

docs/http_reward.md describes the protocol. Requests are scored one at a time, in the order in which they came.

Whoever reaches the port can send anything, so memory is bounded before it is used: a few requests at once are read, their bodies
are limited, and a picture's size is read from its header before it is unpacked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from prdp_fast.core.errors import RewardError
from prdp_fast.rewards.base import Reward, RewardOutput
from prdp_fast.rewards.registry import as_numbers

IMAGE_BYTES = 32 * 2**20  # of one image in a request, base64 and prompt and all: a PNG of 2048 x 2048 noise has 17 MB of it
BODY_BYTES = 256 * 2**20  # of a request, however many images it may have
PIXELS = 2**26  # of all images of a request, unpacked: 64 of 1024 x 1024
PIECES = 2**20  # commas and brackets of a request: each may become an object of a hundred bytes
AT_ONCE = 4  # requests in memory
PATIENCE_S = 120.0  # for a request to arrive once its turn has come
PNG = b"\x89PNG\r\n\x1a\n"
logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is answered with a reason and no scores."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Request(NamedTuple):
    """What /score is asked."""

    images: torch.Tensor  # (N, 3, H, W) uint8, on the CPU
    prompts: list[str]
    metadata: list[dict[str, Any]]


def build_app(reward: Reward, *, token: str | None, max_images: int, device: torch.device) -> Any:
    """The FastAPI application that serves one reward: POST /score and GET /health.

    Args:
        token: what requests for scores must bear; None takes requests without.
        max_images: of one request.
        device: where the reward gets its images.
    """
    import fastapi
    from fastapi.responses import JSONResponse

    app = fastapi.FastAPI(title=f"prdp reward {reward.name}", docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = asyncio.Lock()  # a model in GPU memory, or a user's function, is not made for several threads
    in_memory = asyncio.Semaphore(AT_ONCE)  # the others wait on their connections, unread

    async def health() -> Any:
        return {"reward": reward.name, "max_images": max_images}

    async def score(request: Any) -> Any:
        try:
            check_token(request.headers.get("authorization"), token)
            check_length(request.headers.get("content-length"), max_images)
            async with in_memory:
                body = await receive(request, max_images)
                async with one_at_a_time:
                    if await request.is_disconnected():  # waited longer than its client did
                        raise Refused(503, "the client has gone")
                    return JSONResponse(await asyncio.to_thread(decode_and_answer, reward, body, max_images, device))
        except Refused as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)

    # Annotations would be resolved as text among this module's names, which holds no FastAPI.
    score.__annotations__["request"] = fastapi.Request
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/score", score, methods=["POST"], response_model=None)
    return app


def check_token(header: str | None, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = (header or "").partition(" ")
    # In constant time: how long a refusal takes says nothing of the token.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise Refused(401, "this server wants its token: 'Authorization: Bearer TOKEN'")


def most_bytes(max_images: int) -> int:
    return min(max_images * IMAGE_BYTES, BODY_BYTES)


def check_length(said: str | None, max_images: int) -> None:
    """Refuse what says itself that it is too long, before it is read."""
    if said is not None and said.isdigit() and int(said) > most_bytes(max_images):
        raise too_long(max_images)


def too_long(max_images: int) -> Refused:
    return Refused(413, f"the request has more than {most_bytes(max_images)} bytes; send fewer images at once")


async def receive(request: Any, max_images: int) -> bytes:
    """The body. Raises: Refused if it is too long, too slow, or its client goes."""
    from starlette.requests import ClientDisconnect

    try:
        return await asyncio.wait_for(read_body(request, max_images), PATIENCE_S)
    except asyncio.TimeoutError:
        raise Refused(408, f"the request did not arrive within {PATIENCE_S:g} s") from None
    except ClientDisconnect:
        raise Refused(503, "the client has gone") from None


async def read_body(request: Any, max_images: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes(max_images):
            raise too_long(max_images)
    return bytes(body)


def decode_and_answer(reward: Reward, body: bytes, max_images: int, device: torch.device) -> dict[str, Any]:
    return answer(reward, decode(body, max_images), device)


def decode(body: bytes, max_images: int) -> Request:
    """Raises: Refused if the body is anything but what docs/http_reward.md asks for."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > PIECES:
        raise Refused(
            413, f"the request has more than {PIECES} commas and brackets; send fewer images, and less with them, at once"
        )
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, "the request is no JSON") from None
    if not isinstance(asked, dict):
        raise Refused(422, f"the request is {type(asked).__name__}; expected an object with images and prompts")
    images, prompts = asked.get("images"), asked.get("prompts")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise Refused(422, "images: expected a list of base64 texts, at least one")
    if len(images) > max_images:
        raise Refused(413, f"{len(images)} images; this server takes {max_images} at once")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(422, "prompts: expected a list of texts")
    metadata = asked.get("metadata")
    if metadata is None:
        metadata = [{} for _ in images]
    if not isinstance(metadata, list) or not all(isinstance(entry, dict) for entry in metadata):
        raise Refused(422, "metadata: expected a list of objects")
    if not len(images) == len(prompts) == len(metadata):
        raise Refused(422, f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; expected one each")
    if asked.get("arguments"):
        raise Refused(422, "arguments: this server takes none; give the reward its options when it is started (--option)")
    return Request(decode_images(images), prompts, metadata)


def decode_images(encoded: Sequence[str]) -> torch.Tensor:
    """base64 of PNGs -> (N, 3, H, W) uint8. Raises: Refused unless all are RGB of one size, and not too large together."""
    images: list[torch.Tensor] = []
    first: tuple[int, int] | None = None
    for number, text in enumerate(encoded):
        try:
            data = base64.b64decode(text, validate=True)
            size = png_size(data)
            first = size if first is None else first
            if size != first:
                sizes = " and ".join(f"{width} x {height}" for width, height in (first, size))
                raise Refused(422, f"images 0 and {number} are {sizes} pixels; expected one size in a request")
            if len(encoded) * size[0] * size[1] > PIXELS:
                raise Refused(
                    413, f"{len(encoded)} images of {size[0]} x {size[1]} pixels; this server takes {PIXELS} pixels at once"
                )
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                if image.mode != "RGB":
                    raise Refused(422, f"image {number} is a PNG of mode {image.mode}; expected 8-bit RGB")
                images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise Refused(422, f"image {number} is no whole PNG in base64 ({type(error).__name__})") from None
    return torch.stack(images)


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height by the header: what unpacking would take is known before. Raises: ValueError if it is no PNG."""
    if len(data) < 24 or not data.startswith(PNG) or data[12:16] != b"IHDR":
        raise ValueError("no PNG")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def answer(reward: Reward, asked: Request, device: torch.device) -> dict[str, Any]:
    """The body of a good answer. Raises: Refused with what went wrong in the reward."""
    try:
        with torch.no_grad():
            output = reward.score(asked.images.to(device), asked.prompts, asked.metadata)
        output = as_numbers(reward.name, output, len(asked.prompts))
    except RewardError as error:
        raise Refused(500, str(error)) from None
    except Exception as error:
        # A server goes on: the next request may be a better one.
        logger.exception("reward %r failed", reward.name)
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(500, f"reward {reward.name!r}: {type(error).__name__}: {reason}") from None
    return as_json(output)


def as_json(output: RewardOutput) -> dict[str, Any]:
    def finite(values: torch.Tensor) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values.tolist()]

    details: Mapping[str, torch.Tensor] = output.details
    return {"scores": finite(output.scores), "details": {key: finite(values) for key, values in details.items()}}
