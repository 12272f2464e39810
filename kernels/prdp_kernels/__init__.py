"""Operators of PRDP finetuning: noise, one denoising step, its log-prob, the loss, a denoiser's group norm and GEGLU.

They need torch; Triton is optional.

One folder per operator: `op.py` validates and dispatches, `reference.py` is plain torch. Five functions share their folder's
name, so reach a module with `from prdp_kernels.prdp_loss import reference`, not `import prdp_kernels.prdp_loss.reference as ...`.
"""

from prdp_kernels.denoise_step.op import denoise_step
from prdp_kernels.gaussian_log_prob.op import gaussian_log_prob, gaussian_log_prob_and_grad
from prdp_kernels.geglu.op import geglu
from prdp_kernels.group_norm.op import group_norm
from prdp_kernels.philox.op import derive_seeds, philox_normal
from prdp_kernels.prdp_loss.op import prdp_loss, prdp_loss_and_grad

__all__ = [
    "denoise_step",
    "derive_seeds",
    "gaussian_log_prob",
    "gaussian_log_prob_and_grad",
    "geglu",
    "group_norm",
    "philox_normal",
    "prdp_loss",
    "prdp_loss_and_grad",
]
