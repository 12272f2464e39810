"""Backend resolution, and what importing the package needs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from prdp_kernels import (
    denoise_step,
    dispatch,
    gaussian_log_prob,
    gaussian_log_prob_and_grad,
    philox_normal,
    prdp_loss,
    prdp_loss_and_grad,
)

CPU, CUDA = SimpleNamespace(is_cuda=False, device="cpu"), SimpleNamespace(is_cuda=True, device="cuda:0")


def reference():
    return "torch"


def kernel():
    return "triton"


@pytest.mark.parametrize(
    ("backend", "tensors", "interpreted", "installed", "chosen"),
    [
        ("auto", [CPU], True, True, reference),
        ("auto", [CUDA, CPU], False, True, reference),
        ("auto", [CUDA, CUDA], False, True, kernel),
        ("auto", [CUDA, CUDA], False, False, reference),
        ("torch", [CUDA], False, True, reference),
        ("triton", [CUDA], False, True, kernel),
        ("triton", [CPU], True, True, kernel),
    ],
)
def test_choose(monkeypatch, backend, tensors, interpreted, installed, chosen):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    monkeypatch.setattr(dispatch, "HAS_TRITON", installed)
    assert dispatch.choose("op", backend, *tensors, reference=reference, triton=kernel) is chosen


def test_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"^op: backend='triton' needs CUDA tensors, got cpu; .* TRITON_INTERPRET=1"):
        dispatch.choose("op", "triton", CUDA, CPU, reference=reference, triton=kernel)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"^op: backend='triton' needs the package triton, which is not installed"):
        dispatch.choose("op", "triton", CUDA, reference=reference, triton=kernel)


def calls():
    rows, latents = torch.ones(2), torch.zeros(2, 1, 2, 2)
    log_probs = torch.zeros(1, 2, 3)
    loss_args, loss_kwargs = (log_probs, log_probs, log_probs, torch.tensor([[0.0, 1.0]])), {"clip_range": 0.1, "kl_weight": 1.0}
    return {
        "philox_normal": lambda **k: philox_normal(torch.tensor([1, 2]), (3,), **k),
        "denoise_step": lambda **k: denoise_step(latents, latents, rows, rows, rows, noise=latents, **k),
        "gaussian_log_prob": lambda **k: gaussian_log_prob(latents, latents, latents, rows, rows, rows, **k),
        "gaussian_log_prob_and_grad": lambda **k: gaussian_log_prob_and_grad(
            latents, latents, latents, rows, rows, rows, rows, **k
        ),
        "prdp_loss": lambda **k: prdp_loss(*loss_args, **loss_kwargs, **k),
        "prdp_loss_and_grad": lambda **k: prdp_loss_and_grad(*loss_args, **loss_kwargs, **k),
    }


@pytest.mark.parametrize("op", calls())
def test_every_operator(monkeypatch, op):
    call = calls()[op]
    for backend in ("auto", "torch"):
        call(backend=backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=f"^{op}: backend='triton' needs CUDA tensors"):
        call(backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected one of 'auto', 'triton', 'torch'"):
        call(backend="cuda")


def test_import_needs_torch_only():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'diffusers', 'transformers', 'deepspeed', 'prdp_fast'])); "
        "import prdp_kernels; assert callable(prdp_kernels.denoise_step)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
