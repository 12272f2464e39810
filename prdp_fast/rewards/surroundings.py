"""What somebody else's code may leave changed in the process, put back after every call."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from prdp_fast.core.errors import RewardError
from prdp_fast.rewards.streams import Descriptor, Stream

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """One thing that a process, or a thread, has once."""

    what: str
    get: Callable[[], Any]
    put: Callable[[Any], object]


def _put_device(device: torch.device) -> None:
    torch.set_default_device(
        None if device.type == "cpu" else device
    )  # None costs nothing later; "cpu" slows every call of torch


def _autocast(kind: str) -> Setting:
    return Setting(
        f"autocast on {kind}", lambda: torch.is_autocast_enabled(kind), lambda enabled: torch.set_autocast_enabled(kind, enabled)
    )


def _flag(what: str, place: Any, name: str) -> Setting:
    return Setting(what, lambda: getattr(place, name), lambda value: setattr(place, name, value))


def _stream(name: str) -> Setting:
    return Setting(f"sys.{name}", lambda: Stream.of(name), lambda stream: stream.put(name))


def _descriptor(number: int) -> Setting:
    return Setting(f"file descriptor {number}", lambda: Descriptor(number), Descriptor.put)


SETTINGS = (
    Setting("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("the default device", torch.get_default_device, _put_device),
    Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    Setting("the precision of matrix products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _flag("TF32 of cuDNN", torch.backends.cudnn, "allow_tf32"),
    _flag("cudnn.benchmark", torch.backends.cudnn, "benchmark"),
    _flag("cudnn.deterministic", torch.backends.cudnn, "deterministic"),
    _autocast("cpu"),
    _autocast("cuda"),
    Setting("the directory", os.getcwd, os.chdir),
    _descriptor(1),  # before the streams that write to them
    _descriptor(2),
    _stream("stdout"),
    _stream("stderr"),
)
GPU = Setting("the GPU", torch.cuda.current_device, torch.cuda.set_device)


class RandomStates(NamedTuple):
    """Of the generators that everybody shares. GPUs' are left alone: the job draws nothing from them."""

    plain: Any
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def now(cls) -> RandomStates:
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002 (users draw from it)

    def restore(self) -> None:
        random.setstate(self.plain)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)


class Surroundings:
    """Runs one owner's code as a guest: what it changes in `SETTINGS` is put back, and said once.

    The shared random generators belong to the guest while it runs: it goes on with its own numbers, which it may have seeded, and
    the job's are as they were.
    """

    def __init__(self, owner: str) -> None:
        """owner: opens the warnings and errors, e.g. "reward 'python': mine.py:score"."""
        self.owner = owner
        self._random: RandomStates | None = None
        self._told: set[str] = set()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Raises: RewardError if something cannot be put back."""
        watched = (*SETTINGS, GPU) if torch.cuda.is_available() and torch.cuda.is_initialized() else SETTINGS
        before = [_read(setting) for setting in watched]
        random_before, gradients = RandomStates.now(), torch.is_grad_enabled()
        if self._random is not None:
            self._random.restore()
        try:
            # The guard puts this thread's inference mode back, whatever was entered inside and not left.
            with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(gradients):
                try:
                    yield
                finally:
                    changed = [
                        (setting, value) for setting, value in zip(watched, before, strict=True)
                        if value is not None and _read(setting) != value
                    ]  # fmt: skip
        finally:
            self._random = RandomStates.now()
            random_before.restore()
            self._put_back(changed)

    def _put_back(self, changed: list[tuple[Setting, Any]]) -> None:
        for setting, value in changed:
            try:
                setting.put(value)
                restored = _read(setting) == value
            except (RuntimeError, OSError, ValueError) as error:
                raise RewardError(
                    f"{self.owner} changed {setting.what}, which could not be put back ({error}); leave it as it was"
                ) from error
            if not restored:
                raise RewardError(f"{self.owner} changed {setting.what}, which could not be put back; leave it as it was")
        told = [setting.what for setting, _ in changed if setting.what not in self._told]
        if told:
            self._told.update(told)
            logger.warning("%s left %s changed; put back, and so after every call", self.owner, " and ".join(told))


def _read(setting: Setting) -> Any:
    """None where it cannot be known: a directory that is gone, a precision that another of torch's interfaces has set."""
    try:
        return setting.get()
    except (RuntimeError, OSError):
        return None
