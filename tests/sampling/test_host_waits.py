"""The loops over steps and micro-batches never make the host wait for the device.

They run here on the meta device, whose tensors have no values: reading one (`.item()`, `.cpu()`, a branch on it, a boolean index)
raises, as it would wait on a GPU. What moves from the host to the device is counted: it must not grow with steps or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_model import SHAPE, small_embeddings, small_policy, small_unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prdp_fast.config.recipe import RandomSteps
from prdp_fast.core.records import Prompt, TextEmbeddings, Trajectories
from prdp_fast.models.families import StableDiffusion
from prdp_fast.sampling.policy import Policy
from prdp_fast.sampling.rollout import finite_images, rollout
from prdp_fast.training.passes import gradient_pass, log_prob_pass

DEVICE = torch.device("meta")
GROUPS, IMAGES = 2, 4


class Stub(torch.nn.Module):
    """As a U-Net is called, in few operators: the loops are what is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, *, encoder_hidden_states: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        told = timestep.float() + encoder_hidden_states.mean((1, 2))
        return (self.conv(sample) * told[:, None, None, None],)


class Watch(TorchDispatchMode):
    """Counts operators on the device, and tensors that come to it from the host. A single number travels as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.moved: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        on_device = any(x.device == DEVICE for x in tensors)
        self.operators += on_device
        if on_device and any(x.device != DEVICE and x.ndim for x in tensors):
            self.moved.append(str(func))
        return result


def sample(policy: Policy, denoiser: torch.nn.Module, batch: int) -> Trajectories:
    own = small_embeddings(GROUPS)
    embeddings = TextEmbeddings(own.prompt_embeds.to(DEVICE), own.negative_prompt_embeds.to(DEVICE))
    prompts = [Prompt(index=group, text="", metadata={}) for group in range(GROUPS)]
    return rollout(
        policy, denoiser, prompts, embeddings, images_per_prompt=IMAGES, latent_shape=SHAPE, batch=batch, seed=0, epoch=0
    )  # fmt: skip


def loops(
    steps: int,
    batch: int,
    interval: tuple[int, int] | None,
    chosen: int | None = None,
    window: RandomSteps | None = None,
) -> dict[str, Watch]:
    """What each loop asks of the device in an epoch after the first, whose tables are on the device already."""
    policy, denoiser = small_policy(steps, interval=interval, window=window), Stub().to(DEVICE)
    trajectories = sample(policy, denoiser, batch)
    weights = torch.empty_like(trajectories.log_probs)
    rows = None if chosen is None else torch.arange(chosen).expand(GROUPS * IMAGES, -1)

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    runs: dict[str, Callable[[], object]] = {
        "rollout": lambda: sample(policy, denoiser, batch),
        "log-probs": lambda: log_prob_pass(policy, denoiser, trajectories, batch, rows),
        "gradient": lambda: gradient_pass(policy, denoiser, trajectories, weights, batch, backward, chosen=rows),
    }
    seen = {}
    for name, run in runs.items():
        with Watch() as seen[name]:
            run()
    return seen


@pytest.mark.parametrize("interval", [None, (300, 700)], ids=["guided", "interval"])
def test_no_loop_waits_and_what_is_moved_does_not_grow(interval: tuple[int, int] | None) -> None:
    few, many = loops(5, 8, interval), loops(10, 2, interval)
    for name, watch in few.items():
        assert many[name].operators > 3 * watch.operators, f"{name}: expected more steps and batches to ask for more"
        assert many[name].moved == watch.moved, f"{name}: {len(watch.moved)} and {len(many[name].moved)} tensors were moved"
        assert len(watch.moved) <= 4


def test_looking_for_what_is_not_finite_does_not_wait() -> None:
    trajectories = sample(small_policy(5), Stub().to(DEVICE), 8)
    with Watch() as watch:
        assert finite_images(trajectories).shape == (GROUPS * IMAGES,)
    assert watch.operators < 20 and not watch.moved


def test_a_unet_itself_does_not_wait() -> None:
    policy, denoiser = small_policy(2), small_unet().to(DEVICE)
    trajectories = sample(policy, denoiser, 8)
    with Watch() as watch:
        log_prob_pass(policy, denoiser, trajectories, 8)
    assert watch.operators > 500 and len(watch.moved) <= 4


def test_a_subset_of_steps_is_moved_once() -> None:
    few, many = loops(10, 8, None, chosen=3), loops(10, 2, None, chosen=3)
    for name in ("log-probs", "gradient"):
        assert many[name].operators > 2 * few[name].operators
        assert many[name].moved == few[name].moved


def test_random_runs_of_noisy_steps_are_moved_once() -> None:
    few, many = (loops(steps, batch, (200, 900), window=RandomSteps(count=3)) for steps, batch in ((5, 8), (10, 2)))
    for name, watch in few.items():
        assert many[name].moved == watch.moved
        assert len(watch.moved) <= 4


@pytest.mark.parametrize("spoil", ["item", "cpu", "branch", "boolean index"])
def test_a_wait_is_noticed(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StableDiffusion.predict

    def waiting(self: StableDiffusion, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = original(self, *args, **kwargs)
        if spoil == "item":
            output.sum().item()
        elif spoil == "cpu":
            output.cpu()
        elif spoil == "branch":
            assert output.isfinite().all()
        else:
            output[output > 0]
        return output

    monkeypatch.setattr(StableDiffusion, "predict", waiting)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        loops(5, 8, None)


def test_a_table_that_is_moved_every_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Policy.coefficients

    def forgetful(self: Policy, *args: Any) -> tuple[torch.Tensor, ...]:
        self._tables.clear()
        return original(self, *args)

    monkeypatch.setattr(Policy, "coefficients", forgetful)
    assert len(loops(10, 8, None)["rollout"].moved) > len(loops(5, 8, None)["rollout"].moved)
