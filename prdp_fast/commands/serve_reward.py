"""Serve a reward over HTTP, for the `http` reward of jobs elsewhere.

    prdp serve-reward jpeg_size --option quality=80 --port 8000
    prdp serve-reward python --option function=my_reward.py:brightness --host 0.0.0.0 --token-env PRDP_SCORER_TOKEN

docs/http_reward.md describes the protocol. Requests are scored one at a time, in the order in which they came.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from typing import Any

import torch

from prdp_fast.config.load import parse_value
from prdp_fast.core.errors import UserError
from prdp_fast.rewards.http import is_this_machine, read_token
from prdp_fast.rewards.registry import build_reward
from prdp_fast.rewards.scoring_model import choose_device
from prdp_fast.rewards.server import build_app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of a reward, as in a recipe")
    parser.add_argument(
        "--option", dest="options", action="append", default=[], metavar="KEY=VALUE", help="of the reward; VALUE is YAML"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token that requests must bear")
    parser.add_argument("--max-images", type=int, default=64, metavar="N", help="of one request (default: %(default)s)")
    parser.add_argument("--device", help="where images are scored (default: the first GPU, or the CPU without one)")


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted. Raises: UserError if the reward, an option, the token or the port cannot be had."""
    if args.max_images < 1:
        raise UserError(f"--max-images is {args.max_images}; expected at least 1")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port is {args.port}; expected 0 to 65535")
    try:
        token = None if args.token_env is None else read_token(args.token_env)
    except ValueError as error:
        raise UserError(f"--token-env: {error}") from None
    reward = build_reward(args.name, parse_options(args.options))
    device = usable_device(args.device)
    try:
        import uvicorn

        app = build_app(reward, token=token, max_images=args.max_images, device=device)
    except ImportError as error:
        raise UserError(f"serve-reward needs {error.name}, which is not installed; pip install 'prdp-fast[rewards]'") from error
    reward.prepare()  # before the port is there: a client that finds it finds a model behind it
    with listen(args.host, args.port) as listener:
        host, port = listener.getsockname()[:2]
        if token is None and not is_this_machine(host):
            print(
                f"warning: whoever reaches {host} can use this server; give --token-env, or --host 127.0.0.1",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        print(f"serving {reward.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Raises: UserError unless each is KEY=VALUE with a value that recipes could hold."""
    parsed: dict[str, Any] = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator or not key:
            raise UserError(f"--option {option!r}: expected KEY=VALUE, e.g. --option quality=80")
        if key in parsed:
            raise UserError(f"--option {key} is given twice; keep one")
        try:
            parsed[key] = parse_value(text)
        except ValueError as error:
            raise UserError(f"--option {option!r}: {error}") from None
    return parsed


def usable_device(name: str | None) -> torch.device:
    try:
        device = choose_device(name or "auto")
        torch.zeros(1, device=device)
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r} cannot be used here; expected cpu, cuda or cuda:N") from error
    return device


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a port that is taken shows before anything is served. Raises: UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host!r} is no address of this machine ({error.strerror})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port or --host") from error
    return listener
