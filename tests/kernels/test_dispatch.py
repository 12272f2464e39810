"""Backend resolution, and what importing the package needs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from prdp_kernels import denoise_step, dispatch, gaussian_log_prob, philox_normal, prdp_loss, prdp_loss_and_grad

CPU, CUDA = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)


def reference():
    return "torch"


def kernel():
    return "triton"


@pytest.mark.parametrize(
    ("backend", "tensors", "triton", "chosen"),
    [
        ("auto", [CPU], None, reference),
        ("auto", [CUDA], None, reference),
        ("auto", [CPU], kernel, reference),
        ("auto", [CUDA, CPU], kernel, reference),
        ("auto", [CUDA, CUDA], kernel, kernel),
        ("torch", [CUDA], kernel, reference),
        ("triton", [CUDA], kernel, kernel),
        ("triton", [CPU], kernel, kernel),  # the interpreter
    ],
)
def test_choose(backend, tensors, triton, chosen):
    assert dispatch.choose("op", backend, *tensors, reference=reference, triton=triton) is chosen


def calls():
    rows, latents = torch.ones(2), torch.zeros(2, 1, 2, 2)
    log_probs = torch.zeros(1, 2, 3)
    loss_args, loss_kwargs = (log_probs, log_probs, log_probs, torch.tensor([[0.0, 1.0]])), {"clip_range": 0.1, "kl_weight": 1.0}
    return {
        "philox_normal": lambda **k: philox_normal(torch.tensor([1, 2]), (3,), **k),
        "denoise_step": lambda **k: denoise_step(latents, latents, rows, rows, rows, noise=latents, **k),
        "gaussian_log_prob": lambda **k: gaussian_log_prob(latents, latents, latents, rows, rows, rows, **k),
        "prdp_loss": lambda **k: prdp_loss(*loss_args, **loss_kwargs, **k),
        "prdp_loss_and_grad": lambda **k: prdp_loss_and_grad(*loss_args, **loss_kwargs, **k),
    }


@pytest.mark.parametrize("op", calls())
def test_every_operator(op):
    call = calls()[op]
    for backend in ("auto", "torch"):
        call(backend=backend)
    with pytest.raises(NotImplementedError, match=f"^{op} has no Triton implementation yet; use backend='torch'$"):
        call(backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected one of 'auto', 'triton', 'torch'"):
        call(backend="cuda")


def test_import_needs_torch_only():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'diffusers', 'transformers', 'deepspeed', 'prdp_fast'])); "
        "import prdp_kernels; assert callable(prdp_kernels.denoise_step)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
