"""What is measured: operator x size x dtype, its inputs, its contestants, the bytes it has to move and the right answer.

A case is built on any device; the float64 answer comes from the plain torch reference on float64 copies of the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import prdp_kernels
from benchmarks.kernels import chains

Outputs = dict[str, torch.Tensor]
Ops = Mapping[str, Callable[..., Any]]

TRANSITIONS = (
    ("denoise_step", "fwd"),
    ("gaussian_log_prob", "fwd"),
    ("gaussian_log_prob", "fwd+bwd"),
    ("gaussian_log_prob_and_grad", "fused"),
)
LOSSES = (("prdp_loss", "fwd"), ("prdp_loss", "fwd+bwd"), ("prdp_loss_and_grad", "fused"))
DENOISER = (("group_norm", "fwd"), ("group_norm", "fwd+bwd"), ("geglu", "fwd"), ("geglu", "fwd+bwd"))
OPERATORS = (
    "philox_normal",
    "denoise_step",
    "gaussian_log_prob",
    "gaussian_log_prob_and_grad",
    "prdp_loss",
    "prdp_loss_and_grad",
    "group_norm",
    "geglu",
)

# Latents (C, H, W). Video is 21 latent frames of 60 x 104 with 16 channels, frames folded into the height.
LATENTS = {"SD": (4, 64, 64), "SDXL": (4, 128, 128), "SD3": (16, 128, 128), "video": (16, 21 * 60, 104)}
LOSS_SIZES = ((64, 8, 50), (32, 16, 50), (16, 64, 1000))
# Of 32 rows of SD 1's U-Net and 8 of SDXL's: hidden states (N, C, H, W) of residual blocks, projections (N, tokens, 2 width).
HIDDEN = {"group_norm": ((32, 320, 64, 64), (32, 1920, 32, 32), (32, 1280, 8, 8), (8, 320, 128, 128)),
          "geglu": ((32, 4096, 2560), (32, 256, 10240))}  # fmt: skip
NORM_GROUPS = 32
STATS = 8  # numbers beside the loss that prdp_loss_and_grad reports

GUIDANCE = 5.0
# Where the direct formula is well conditioned in float32, so that every contestant can compute the same numbers. At the paper's
# beta of 1e-5 it cannot: it loses the clipping (see prdp_loss/reference.py). Time does not depend on the values.
CLIP_RANGE, KL_WEIGHT = 0.1, 1.0


@dataclass(frozen=True)
class Case:
    """One row of the table. shape: (N, C, H, W) of latents or hidden states, (G, B, T) of log-probs, (N, tokens, 2 width)."""

    op: str
    mode: str  # fwd, fwd+bwd (through autograd), fused (value and gradient in one call)
    size: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32  # of the model output, everything else is float32; of all that a denoiser holds
    guidance_scale: float | None = None
    channels_last: bool = False

    @property
    def label(self) -> str:
        dims = "x".join(map(str, self.shape))
        extras = "" if self.op.startswith(("prdp", "philox")) else f" {short(self.dtype)}"
        extras += "" if self.guidance_scale is None else f" cfg {self.guidance_scale:g}"
        return f"{self.size} {dims}{extras}{' channels-last' if self.channels_last else ''}"

    @property
    def key(self) -> str:
        return f"{self.op} {self.mode} {self.label}"


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def gpu_cases() -> list[Case]:
    """The cases of the GPU check, the main ones first, in case time runs out."""
    cases = []
    for op, mode in TRANSITIONS:
        for size, n in (("SD", 8), ("SD", 64), ("SDXL", 8), ("SDXL", 64), ("SD3", 64), ("video", 8)):
            cases.append(Case(op, mode, size, (n, *LATENTS[size]), torch.bfloat16, GUIDANCE))
    for op, mode in LOSSES:
        for shape in LOSS_SIZES:
            cases.append(Case(op, mode, "loss", shape))
    for op, mode in DENOISER:
        for shape in HIDDEN[op]:
            cases.append(Case(op, mode, "hidden", shape, torch.bfloat16, channels_last=len(shape) == 4))
    for size, n in (("SD", 8), ("SD", 64), ("SDXL", 64), ("video", 16)):
        cases.append(Case("philox_normal", "fwd", size, (n, *LATENTS[size])))
    for op, mode in TRANSITIONS:
        cases.append(Case(op, mode, "SD", (64, *LATENTS["SD"]), torch.bfloat16, GUIDANCE, channels_last=True))
        for dtype in (torch.float32, torch.float16):
            cases.append(Case(op, mode, "SD", (64, *LATENTS["SD"]), dtype, GUIDANCE))
    return cases


def cpu_cases() -> list[Case]:
    """Small ones, for the CPU references."""
    cases = [Case(op, mode, "SD", (2, *LATENTS["SD"]), torch.float32, GUIDANCE) for op, mode in TRANSITIONS]
    cases += [Case(op, mode, "loss", (8, 8, 50)) for op, mode in LOSSES]
    shapes = {"group_norm": (2, 64, 16, 16), "geglu": (2, 64, 128)}
    cases += [Case(op, mode, "hidden", shapes[op], channels_last=op == "group_norm") for op, mode in DENOISER]
    return [*cases, Case("philox_normal", "fwd", "SD", (2, *LATENTS["SD"]))]


def bytes_moved(case: Case) -> int:
    """The bytes that must cross device memory: a pass reads each input once and writes each output once.

    fwd+bwd through autograd is two passes over the inputs, because the upstream gradient is known only after the first and
    nothing of the size of the inputs is kept; the fused call is one.
    """
    if case.op == "philox_normal":
        n, d = case.shape[0], math.prod(case.shape[1:])
        return 8 * n + 4 * n * d
    if case.op.startswith("prdp_loss"):
        g, b, t = case.shape
        read, grad, loss = 4 * (3 * g * b * t + g * b), 4 * g * b * t, 4
        return {"fwd": read + loss, "fwd+bwd": 2 * (read + loss) + grad, "fused": read + loss + 4 * STATS + grad}[case.mode]
    if case.op == "group_norm":
        tensor, few = math.prod(case.shape) * case.dtype.itemsize, (case.shape[0] + 2) * case.shape[1] * case.dtype.itemsize
        # A group is not normalised before all of it was seen, nor is its gradient: x, x, y; x, dy, x, dy, dx.
        return {"fwd": 3 * tensor + few, "fwd+bwd": 8 * tensor + 3 * few}[case.mode]
    if case.op == "geglu":
        half = math.prod(case.shape) // 2 * case.dtype.itemsize
        return {"fwd": 3 * half, "fwd+bwd": 8 * half}[case.mode]  # x, y; x, dy, dx
    n, d = case.shape[0], math.prod(case.shape[1:])
    model_output = (1 if case.guidance_scale is None else 2) * n * d * case.dtype.itemsize
    latent, coefficients, row = 4 * n * d, 3 * 4 * n, 4 * n
    if case.op == "denoise_step":
        return model_output + latent + coefficients + 8 * n + latent + row
    read = model_output + 2 * latent + coefficients
    forward, backward = read + row, read + row + model_output  # writes log-probs; reads their weights, writes the gradient
    return {"fwd": forward, "fwd+bwd": forward + backward, "fused": read + row + row + model_output}[case.mode]


# Inputs


def transition_inputs(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """A step in the middle of sampling: std in 0.1 .. 0.3, and a prev_sample that the transition could have drawn.

    Made on the CPU, so that the numbers are the same on every machine, and so that no foreign kernel runs on the device.
    Nearer to the end std falls below 0.1, and the float32 of the stored latents alone is worth more than 1e-6 of x' - mu.
    weights are of the order of C*H*W, as after the scaling that keeps a half-precision gradient in range.
    """
    generator = torch.Generator().manual_seed(0)
    n, d = case.shape[0], math.prod(case.shape[1:])
    normal, uniform = partial(torch.randn, generator=generator), partial(torch.rand, n, generator=generator)
    halves = 1 if case.guidance_scale is None else 2
    m = normal((halves * n, *case.shape[1:])).to(case.dtype)
    inputs = {
        "model_output": m.to(memory_format=torch.channels_last) if case.channels_last else m,
        "sample": normal(case.shape),
        "sample_coef": 1.0 + 0.02 * uniform(),
        "output_coef": -0.05 - 0.05 * uniform(),
        "std": 0.1 + 0.2 * uniform(),
        "weights": (0.5 + uniform()) * d,
        "seeds": torch.arange(n) * 7919 + 1,
    }
    table = (inputs["sample_coef"], inputs["output_coef"], inputs["std"])
    noise = normal(case.shape)
    inputs["prev_sample"] = chains.denoise_step(m, inputs["sample"], *table, case.guidance_scale, noise)[0]
    return {name: value.to(device) for name, value in inputs.items()}


def loss_inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log_probs, old, ref, rewards), half of the steps clipped, those of an image all to one side.

    No step lies near the clip edge, where a test on log-ratios rounded to float32 and one on the exact difference may disagree;
    and images are clipped by amounts of their own, so that no pair's two branches are equal to float32. Made on the CPU, like the
    others.
    """
    generator = torch.Generator().manual_seed(0)
    uniform = partial(torch.rand, generator=generator)
    old = 1.0 + 0.5 * uniform(case.shape)
    ref = old - 0.5 - 0.1 * uniform(case.shape)
    inside = uniform(case.shape) < 0.5
    beyond = 1.1 + uniform(case.shape) + 4 * uniform((*case.shape[:2], 1))
    size = CLIP_RANGE * torch.where(inside, 0.1 + 0.8 * uniform(case.shape), beyond)
    sign = torch.where(uniform((*case.shape[:2], 1)) < 0.5, -1.0, 1.0)
    log_probs, rewards = old + sign * size, torch.randn(case.shape[:2], generator=generator)
    return log_probs.to(device), old.to(device), ref.to(device), rewards.to(device)


# Contestants


@dataclass(frozen=True)
class Contestant:
    """run: one call, as timed. checked: the call whose outputs are compared with the right answer, `run` itself unless it draws
    its own noise. graph: whether a CUDA graph can hold it."""

    name: str
    run: Callable[[], Outputs]
    checked: Callable[[], Outputs]
    expected: tuple[str, ...]  # the outputs it must give
    graph: bool = True


@dataclass
class Built:
    """A case on a device."""

    case: Case
    contestants: list[Contestant]
    answer: Callable[[], Outputs]  # float64
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def operators(backend: str) -> Ops:
    """The public operators with their backend chosen; one that does not exist yet raises when it is called."""

    def missing(op: str, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(f"prdp_kernels has no {op} yet")

    found = {op: getattr(prdp_kernels, op, None) for op in OPERATORS}
    return {op: partial(run, backend=backend) if run else partial(missing, op) for op, run in found.items()}


def build(case: Case, device: torch.device | str, ops: Ops, *, name: str = "triton", compiled: bool = False) -> Built:
    """Inputs on `device`, and the contestants: `ops` under `name`, "eager", and "compiled" if asked for."""
    device = torch.device(device)
    builder = {"philox_normal": _philox, "denoise_step": _denoise, "group_norm": _of_denoiser, "geglu": _of_denoiser}.get(case.op)
    if builder is None:
        builder = _loss if case.op.startswith("prdp_loss") else _log_prob
    return builder(case, device, ops, name, _compile if compiled else None)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Every size gets its own code: shapes that the compiler must keep open would be a weaker opponent.
    return torch.compile(function, dynamic=False)


Compile = Callable[[Callable[..., Any]], Callable[..., Any]] | None


def _chains(chain: Callable[..., Any], compile_: Compile) -> list[tuple[str, Callable[..., Any]]]:
    return [("eager", chain)] + ([("compiled", compile_(chain))] if compile_ else [])


def _philox(case: Case, device: torch.device, ops: Ops, name: str, compile_: Compile) -> Built:
    n, shape = case.shape[0], case.shape[1:]
    on_host = [i * 7919 + 1 for i in range(n)]
    seeds = torch.tensor(on_host).to(device)

    def op() -> Outputs:
        return {"noise": ops["philox_normal"](seeds, shape, step=3)}

    def rows() -> Outputs:
        return {"noise": chains.generator_per_row(on_host, shape, device)}

    # Seeding a generator inside a graph is not allowed; and other streams give other numbers, which nothing is expected of.
    contestants = [Contestant(name, op, op, ("noise",)), Contestant("eager", rows, rows, (), graph=False)]
    if compile_:
        chain = compile_(chains.randn)

        def whole() -> Outputs:
            return {"noise": chain(n, shape, device)}

        contestants.append(Contestant("compiled", whole, whole, ()))
    # The reference rounds to float32 by definition of the operator: there is no float64 noise.
    answer = partial(prdp_kernels.philox_normal, seeds, shape, step=3, backend="torch")
    return Built(case, contestants, lambda: {"noise": answer().double()}, {"noise": torch.float32})


def _denoise(case: Case, device: torch.device, ops: Ops, name: str, compile_: Compile) -> Built:
    x = transition_inputs(case, device)
    scale = case.guidance_scale
    arguments = tuple(x[k] for k in ("model_output", "sample", "sample_coef", "output_coef", "std"))
    given = {"seeds": x["seeds"], "step": 3, "guidance_scale": scale}
    keys = ("prev_sample", "log_prob")

    def op() -> Outputs:
        return dict(zip(keys, ops["denoise_step"](*arguments, **given)))

    contestants = [Contestant(name, op, op, keys)]
    for label, chain in _chains(chains.denoise_step, compile_):

        def run(chain: Callable[..., Any] = chain) -> Outputs:
            with torch.no_grad():
                return dict(zip(keys, chain(*arguments, scale)))

        def checked(chain: Callable[..., Any] = chain) -> Outputs:
            noise = prdp_kernels.philox_normal(x["seeds"], case.shape[1:], step=3, backend="torch")
            with torch.no_grad():
                return dict(zip(keys, chain(*arguments, scale, noise)))

        contestants.append(Contestant(label, run, checked, keys))

    def answer() -> Outputs:
        return dict(zip(keys, prdp_kernels.denoise_step(*(a.double() for a in arguments), **given, backend="torch")))

    return Built(case, contestants, answer, dict.fromkeys(keys, torch.float32))


def _log_prob(case: Case, device: torch.device, ops: Ops, name: str, compile_: Compile) -> Built:
    x = transition_inputs(case, device)
    scale, weights = case.guidance_scale, x["weights"]
    rest = tuple(x[k] for k in ("sample", "prev_sample", "sample_coef", "output_coef", "std"))
    keys = ("log_prob",) if case.mode == "fwd" else ("log_prob", "grad")

    def forward(function: Callable[..., torch.Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with torch.no_grad():
                return {"log_prob": function(x["model_output"], *rest)}

        return run

    def both(function: Callable[..., torch.Tensor]) -> Callable[[], Outputs]:
        leaf = x["model_output"].detach().requires_grad_()

        def run() -> Outputs:
            log_prob = function(leaf, *rest)
            (grad,) = torch.autograd.grad(log_prob, leaf, weights)
            return {"log_prob": log_prob.detach(), "grad": grad}

        return run

    def fused() -> Outputs:
        arguments = (x["model_output"], *rest, weights)
        return dict(zip(keys, ops["gaussian_log_prob_and_grad"](*arguments, guidance_scale=scale)))

    wrap = forward if case.mode == "fwd" else both
    op = fused if case.mode == "fused" else wrap(partial(ops["gaussian_log_prob"], guidance_scale=scale))
    contestants = [Contestant(name, op, op, keys)]
    for label, chain in _chains(chains.gaussian_log_prob, compile_):
        run = wrap(lambda *a, chain=chain: chain(*a, scale))
        contestants.append(Contestant(label, run, run, keys))

    def answer() -> Outputs:
        leaf = x["model_output"].double().requires_grad_()
        wide = tuple(a.double() for a in rest)
        log_prob = prdp_kernels.gaussian_log_prob(leaf, *wide, guidance_scale=scale, backend="torch")
        if case.mode == "fwd":
            return {"log_prob": log_prob.detach()}
        (grad,) = torch.autograd.grad(log_prob, leaf, weights.double())
        return {"log_prob": log_prob.detach(), "grad": grad}

    return Built(case, contestants, answer, {"log_prob": torch.float32, "grad": case.dtype})


def _loss(case: Case, device: torch.device, ops: Ops, name: str, compile_: Compile) -> Built:
    log_probs, *rest = loss_inputs(case, device)
    knobs = {"clip_range": CLIP_RANGE, "kl_weight": KL_WEIGHT}
    keys = ("loss",) if case.mode == "fwd" else ("loss", "grad")

    def forward(function: Callable[..., torch.Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with torch.no_grad():
                return {"loss": function(log_probs, *rest, **knobs)}

        return run

    def both(function: Callable[..., torch.Tensor]) -> Callable[[], Outputs]:
        leaf = log_probs.detach().requires_grad_()

        def run() -> Outputs:
            loss = function(leaf, *rest, **knobs)
            (grad,) = torch.autograd.grad(loss, leaf)
            return {"loss": loss.detach(), "grad": grad}

        return run

    def fused() -> Outputs:
        loss, grad, stats = ops["prdp_loss_and_grad"](log_probs, *rest, **knobs)
        return {"loss": loss, "grad": grad, **stats}

    wrap = forward if case.mode == "fwd" else both
    op = fused if case.mode == "fused" else wrap(ops["prdp_loss"])

    def answer() -> Outputs:
        wide = (a.double() for a in (log_probs, *rest))
        loss, grad, stats = prdp_kernels.prdp_loss_and_grad(*wide, **knobs, backend="torch")
        return {"loss": loss, "grad": grad, **(stats if case.mode == "fused" else {})}

    stats = tuple(answer())[2:] if case.mode == "fused" else ()
    contestants = [Contestant(name, op, op, keys + stats)]
    for label, chain in _chains(chains.prdp_loss, compile_):
        run = wrap(chain)
        contestants.append(Contestant(label, run, run, keys))
    return Built(case, contestants, answer, {"loss": torch.float32, "grad": torch.float32})


def denoiser_inputs(case: Case, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(what the operator is differentiated in, the gradient of its result). Made on the CPU, like the others."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if case.op == "geglu":
        found = [normal(*case.shape), normal(*case.shape[:-1], case.shape[-1] // 2)]
    else:
        n, channels = case.shape[:2]
        x = 0.5 + normal(*case.shape)
        # Sums over rows and pixels are compared by 1e-6 of themselves, so their terms do not cancel.
        found = [x, 1 + 0.1 * normal(channels), normal(channels), normal(n, channels), 1 + x + normal(*case.shape)]
    format_ = torch.channels_last if case.channels_last else torch.contiguous_format
    *given, upstream = (
        t.to(device, case.dtype, memory_format=format_ if t.ndim == 4 else torch.contiguous_format) for t in found
    )
    return given, upstream


def _of_denoiser(case: Case, device: torch.device, ops: Ops, name: str, compile_: Compile) -> Built:
    """The opponents round after every operation, as a model in half precision does: nothing is expected of them."""
    given, upstream = denoiser_inputs(case, device)
    keys = ("y",) if case.mode == "fwd" else ("y", "dx", "dweight", "dbias", "dshift")[: 1 + len(given)]

    def operator(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if case.op == "geglu":
            return op
        return lambda x, weight, bias, shift: op(x, weight, bias, NORM_GROUPS, shift=shift, silu=True)

    def wrap(function: Callable[..., torch.Tensor], values: list[torch.Tensor], up: torch.Tensor) -> Callable[[], Outputs]:
        leaves = [value.detach().requires_grad_(case.mode != "fwd") for value in values]

        def run() -> Outputs:
            y = function(*leaves)
            return dict(zip(keys, [y.detach(), *(torch.autograd.grad(y, leaves, up) if case.mode != "fwd" else [])], strict=True))

        return run

    op = wrap(operator(ops[case.op]), given, upstream)
    contestants = [Contestant(name, op, op, keys)]
    for label, chain in _chains(getattr(chains, case.op), compile_):
        run = wrap(chain, given, upstream)
        contestants.append(Contestant(label, run, run, ()))

    def answer() -> Outputs:
        reference = partial(getattr(prdp_kernels, case.op), backend="torch")
        return wrap(operator(reference), [value.double() for value in given], upstream.double())()

    return Built(case, contestants, answer, dict.fromkeys(keys, case.dtype))
