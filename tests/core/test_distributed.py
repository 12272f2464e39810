"""Ranks that cannot meet: one line that names the port or the address."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from prdp_fast.core import distributed
from prdp_fast.core.errors import UserError


@pytest.fixture
def launched(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return lambda port: monkeypatch.setenv("MASTER_PORT", str(port))


def test_a_port_in_use_is_named(launched):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched(port)
        with pytest.raises(UserError, match=rf"MASTER_PORT {port} is in use on this machine") as caught:
            distributed.init()
    assert "\n" not in str(caught.value) and not dist.is_initialized()


@pytest.mark.parametrize("port", ["many", "99999999", ""])
def test_a_port_that_is_none(launched, port):
    launched(port)
    with pytest.raises(UserError, match=rf"the ranks of the job do not meet at MASTER_ADDR '127.0.0.1', MASTER_PORT '{port}'"):
        distributed.init()


def test_no_address(launched, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR")
    launched(29555)
    with pytest.raises(UserError, match=r"do not meet at MASTER_ADDR None.*MASTER_ADDR expected"):
        distributed.init()


def test_a_group_waits_a_little_longer_than_the_ranks_themselves(monkeypatch):
    asked = {}
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda **options: asked.update(options))
    distributed.init(600)
    assert asked["timeout"] == timedelta(seconds=660)


def test_a_rank_that_torchrun_starts_again_does_not_meet_the_dead(monkeypatch):
    """Its store outlives the ranks. What those of the first start have left there is not seen."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("default_pg/0/0", "the address of a rank that died")
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (variables | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **options: asked.update(options))
    distributed.init()
    assert "store" not in asked, "a first start meets as torch has it"
    for attempt in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        distributed.init()
        assert (asked["rank"], asked["world_size"]) == (1, 2)
        assert not asked["store"].check(["default_pg/0/0"])
        asked["store"].set("default_pg/0/0", attempt)
    assert store.get("default_pg/0/0") == b"the address of a rank that died"
