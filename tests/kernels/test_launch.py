"""Kept plans mix up no two calls, stay bounded, and hide no wrong argument: by a launcher that does everything but launch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from compare import BF16, DEVICE, F16, F32, F64, INTERPRETED, LAYOUTS, transition

from prdp_kernels import (
    checks,
    denoise_step,
    gaussian_log_prob,
    gaussian_log_prob_and_grad,
    geglu,
    group_norm,
    philox_normal,
    prdp_loss,
    prdp_loss_and_grad,
    workspace,
)
from prdp_kernels import launch as launching

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the launcher is a stand-in: this runs where the tests run on a CPU")


class Dry(launching.Launcher):
    """Takes CPU tensors for CUDA ones, and launches nothing. `launches`: (how it found its kernel, what it would launch)."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, SimpleNamespace]] = []
        self.binders: dict[object, object] = {}

    def drives(self, t: torch.Tensor) -> bool:
        return isinstance(t, torch.Tensor)

    def current_device(self) -> None:
        return None  # as the index of a CPU tensor

    def launch(self, prepared, tensors, scalars) -> None:
        assert all(t.is_contiguous() for t in tensors if t.dim() == 1), "numbers of a row are read as they lie"
        handle = prepared.handles.get(launching.alignment_of([t.data_ptr() for t in tensors]))
        wanted = self.describe(prepared, tensors, scalars)
        if handle is not None:
            # What Triton's own launcher would look up for these arguments, against what the plan has kept.
            assert handle == wanted, f"a kept kernel of {handle.kernel} is launched for another signature"
        self.launches.append(("new" if handle is None else "kept", wanted))
        self.launch_here(prepared, tensors, scalars)

    def compile(self, prepared, tensors, scalars) -> SimpleNamespace:
        return self.describe(prepared, tensors, scalars)

    def run(self, handle, prepared, pointers, scalars) -> None:
        pass

    def describe(self, prepared, tensors, scalars) -> SimpleNamespace:
        """The specialisation of the arguments as Triton works it out, the grid and every number."""
        if prepared.kernel not in self.binders:
            names = prepared.kernel.kwargs.get("do_not_specialize")
            jit = JITFunction(prepared.kernel.fn, do_not_specialize=names)
            backend = make_backend(GPUTarget("cuda", 90, 32))
            self.binders[prepared.kernel] = create_function_from_signature(jit.signature, jit.params, backend)
            constexprs = [param.name for param in jit.params if param.is_constexpr]
            assert constexprs == list(prepared.constants), "the constants of a plan are not in the order of the kernel's"
            assert len(jit.params) == len(tensors) + len(scalars) + len(prepared.numbers) + len(constexprs)
        _, specialization, _ = self.binders[prepared.kernel](*tensors, *scalars, *prepared.numbers, **prepared.constants)
        return SimpleNamespace(
            kernel=prepared.kernel.fn.__name__, specialization=specialization, numbers=prepared.numbers, grid=prepared.grid,
            options=prepared.options,
        )  # fmt: skip


@pytest.fixture
def dry(monkeypatch):
    launcher = Dry()
    monkeypatch.setattr(launching, "LAUNCHER", launcher)
    monkeypatch.setattr(launching, "PLANS", launching.Bounded(launching.LIMIT))
    monkeypatch.setattr(checks, "can_read_values", lambda t: False)
    return launcher


def calls():
    """Many calls that differ in one thing each: rows, shape, dtype, layout, alignment, options."""
    names = list(LAYOUTS)
    for n, shape in ((1, (4, 8, 8)), (2, (4, 8, 8)), (3, (3, 5, 7)), (16, (4, 8, 8)), (2, (4, 72, 64)), (2, (8, 4, 8))):
        for scale in (None, 2.0):
            for output, latents in ((F32, F32), (BF16, F32), (F16, F32), (F64, F64)):
                case = transition(n, shape, guidance_scale=scale, output=output, latents=latents)
                for i, name in enumerate(names):
                    m, x, prev, *rows = case.tensors
                    m = LAYOUTS[name](m)
                    x, prev = LAYOUTS[names[(2 * i) % len(names)]](x), LAYOUTS[names[(3 * i + 1) % len(names)]](prev)
                    if i % 3 == 1:
                        rows = [LAYOUTS["every_other_row"](t.unsqueeze(1)).squeeze(1) for t in rows]
                    seeds = torch.arange(n)
                    options = {"guidance_scale": scale, "reduction": ("mean", "sum")[i % 2], "backend": "triton"}
                    where = f"{n} rows {shape}, guidance {scale}, {output}, {name}"
                    w = torch.ones(n)
                    yield f"log_prob {where}", lambda a=(m, x, prev, *rows), o=options: gaussian_log_prob(*a, **o)
                    yield (
                        f"and_grad {where}",
                        lambda a=(m, x, prev, *rows), w=w, o=options: gaussian_log_prob_and_grad(*a, w, **o),
                    )
                    yield f"step {where}", lambda a=(m, x, *rows), s=seeds, o=options: denoise_step(*a, seeds=s, step=3, **o)
                    yield f"noise {where}", lambda a=(m, x, *rows), p=prev, o=options: denoise_step(*a, noise=p, **o)
                    steps = torch.arange(2 * n)[::2]
                    yield (
                        f"steps {where}",
                        lambda a=(m, x, *rows), s=seeds, t=steps, o=options: denoise_step(*a, seeds=s, step=t, **o),
                    )
    for n in (1, 2, 16):
        for shape in ((4, 8, 8), (5,), (70000,), (4, 64)):
            yield f"philox {n} {shape}", lambda n=n, s=shape: philox_normal(torch.arange(n), s, step=7, backend="triton")
            yield (
                f"philox steps {n} {shape}",
                lambda n=n, s=shape: philox_normal(torch.arange(2 * n)[::2], s, step=torch.arange(n), backend="triton"),
            )
    for size in ((1, 4, 5), (2, 8, 50), (2, 16, 50), (2, 64, 1000), (4, 8, 50)):
        for dtype in (F32, BF16, F64):
            args = [torch.zeros(size, dtype=dtype) for _ in range(3)] + [torch.zeros(size[:2], dtype=dtype)]
            options = {"clip_range": 0.1, "kl_weight": 0.5, "backend": "triton"}
            yield f"loss {size} {dtype}", lambda a=args, o=options: prdp_loss(*a, **o)
            yield f"loss and grad {size} {dtype}", lambda a=args, o=options: prdp_loss_and_grad(*a, **o)
            shifted = [LAYOUTS["off_by_one"](t) for t in args]
            leaves = [args[0].clone().requires_grad_(), *args[1:]]
            yield (
                f"loss and backward {size} {dtype}",
                lambda a=leaves, o=options: torch.autograd.grad(prdp_loss(*a, **o), a[0]),
            )
            yield f"loss and grad, unaligned {size} {dtype}", lambda a=shifted, o=options: prdp_loss_and_grad(*a, **o)

    for dtype in (F32, BF16, F64):
        for shape, groups in (
            ((2, 8, 4, 4), 2),
            ((1, 8, 4, 4), 4),
            ((2, 64, 33, 33), 32),
            ((2, 96, 5, 7), 32),
            ((1, 1, 1, 1), 1),
        ):
            x = torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)
            of_channels, shift = torch.zeros(shape[1], dtype=dtype), torch.zeros(shape[:2], dtype=dtype)
            for silu in (True, False):
                for added in (shift, None):
                    given = (
                        x.clone(memory_format=torch.channels_last).requires_grad_(),
                        of_channels,
                        of_channels.clone(),
                        groups,
                    )
                    options = {"shift": added, "silu": silu, "backend": "triton"}
                    where = f"{shape} {groups} {dtype} {silu} {added is None}"
                    yield f"group_norm {where}", lambda a=given, o=options: group_norm(*a, **o)
                    yield (
                        f"group_norm_backward {where}",
                        lambda a=given, o=options: torch.autograd.grad(group_norm(*a, **o), a[0], a[0].detach()),
                    )
        for shape in ((3, 26), (2, 7, 256), (2, 7, 257 * 2)):
            for name in ("contiguous", "off_by_one"):
                x = LAYOUTS[name](torch.zeros(shape, dtype=dtype)).requires_grad_()
                yield f"geglu {shape} {dtype} {name}", lambda x=x: geglu(x, backend="triton")
                yield (
                    f"geglu_backward {shape} {dtype} {name}",
                    lambda x=x: torch.autograd.grad(geglu(x, backend="triton").sum(), x),
                )


def test_no_two_signatures_are_mixed_up(dry):
    """In two orders and with warm plans, every call launches what it launches with no plan kept; Triton's own view of the
    arguments is compared at each launch, in `Dry.launch`."""
    found = list(calls())
    assert len(found) > 1000
    alone = {}
    for name, call in found:
        launching.PLANS.clear()
        dry.launches.clear()
        call()
        alone[name] = [launched for _, launched in dry.launches]
        assert alone[name] and all(how == "new" for how, _ in dry.launches)
    for order in (found, found[::-1], found[::7] + found[::3]):
        for name, call in order:
            dry.launches.clear()
            call()
            launches = [launched for _, launched in dry.launches]
            assert launches == alone[name], f"{name}: other launches than with no plan kept"
    assert len({str(d) for d in alone.values()}) > 500, "the calls are hardly different: this shows nothing"


def test_the_second_call_looks_nothing_up(dry, monkeypatch):
    some = {name.split()[0]: call for name, call in calls()}
    for name, call in some.items():
        call()
        with monkeypatch.context() as patch:
            for function in ("transition", "tensors", "floating", "shape", "same_device", "int64"):
                patch.setattr(checks, function, lambda *args, function=function, **kwargs: pytest.fail(f"checks.{function}"))
            dry.launches.clear()
            call()
        assert dry.launches and {how for how, _ in dry.launches} == {"kept"}, name


def test_plans_are_bounded(dry):
    for size in range(1, launching.LIMIT + 300):
        philox_normal(torch.tensor([1]), (size,), backend="triton")
    assert len(launching.PLANS) == launching.LIMIT
    dry.launches.clear()
    philox_normal(torch.tensor([1]), (size,), backend="triton")
    philox_normal(torch.tensor([1]), (1,), backend="triton")  # the first to be forgotten
    assert [how for how, _ in dry.launches] == ["kept", "new"]


def test_kernels_of_a_plan_are_bounded(dry):
    """One for every set of aligned pointers."""
    case = transition(2, (4, 8, 8))
    for bits in range(64):
        rows = [torch.zeros(8)[int(bits >> i & 1) :][:2].copy_(t) for i, t in enumerate(case.tensors[3:])]
        m, x, prev = (LAYOUTS["off_by_one" if bits >> (3 + i) & 1 else "contiguous"](t) for i, t in enumerate(case.tensors[:3]))
        gaussian_log_prob(m, x, prev, *rows, backend="triton")
    assert len(launching.PLANS) == 1
    (plan,) = launching.PLANS.values()
    assert 1 < len(plan.prepared.handles) <= launching.ALIGNMENTS


def test_wrong_arguments_are_still_wrong_after_right_ones(dry):
    """Each error as from the first call, by every operator, with a plan for its right twin kept."""
    case = transition(2, (4, 8, 8))
    m, x, prev, a, b, std = case.tensors
    w, seeds, lp = torch.ones(2), torch.arange(2), torch.zeros(2, 3, 4)
    options = {"backend": "triton"}
    right = [
        (gaussian_log_prob, (m, x, prev, a, b, std), options),
        (gaussian_log_prob_and_grad, (m, x, prev, a, b, std, w), options),
        (denoise_step, (m, x, a, b, std), options | {"seeds": seeds}),
        (prdp_loss, (lp, lp, lp, lp[..., 0]), options | {"clip_range": 0.1, "kl_weight": 1.0}),
        (prdp_loss_and_grad, (lp, lp, lp, lp[..., 0]), options | {"clip_range": 0.1, "kl_weight": 1.0}),
        (philox_normal, (seeds, (3,)), options),
        (group_norm, (x, torch.zeros(4), torch.zeros(4), 2), options),
        (geglu, (m,), options),
    ]
    wrong = [
        {"guidance_scale": math.nan}, {"guidance_scale": "5"}, {"guidance_scale": True}, {"guidance_scale": 5.0},
        {"reduction": "median"}, {"backend": "cuda"}, {"step": -1}, {"step": 2**32}, {"step": 1.0}, {"step": True},
        {"step": torch.zeros(2)}, {"step": torch.zeros(3, dtype=torch.int64)}, {"noise": x}, {"seeds": None},
        {"seeds": torch.zeros(2)}, {"clip_range": -0.1}, {"clip_range": math.nan}, {"kl_weight": 0.0}, {"kl_weight": math.inf},
        {"eps": 0.0}, {"shift": torch.zeros(2)}, {"shift": 1.0},
    ]  # fmt: skip
    replacements = [None, 1.0, torch.zeros(2, 4, 8, 9), torch.zeros(2, 4, 8, 8, dtype=F16), torch.zeros(5), torch.zeros(2).int()]
    tried = 0
    for function, args, kwargs in right:
        names = function.__kwdefaults__.keys() | kwargs.keys()
        attempts = [(args, kwargs | change) for change in wrong if change.keys() <= names]
        attempts += [((*args[:i], r, *args[i + 1 :]), kwargs) for i in range(len(args)) for r in replacements]
        for bad_args, bad_kwargs in attempts:
            launching.PLANS.clear()
            try:
                function(*bad_args, **bad_kwargs)
            except (TypeError, ValueError, NotImplementedError) as error:
                expected = error
            else:
                continue  # half-precision model outputs and the like are right
            function(*args, **kwargs)
            with pytest.raises(type(expected)) as caught:
                function(*bad_args, **bad_kwargs)
            assert str(caught.value) == str(expected)
            tried += 1
    assert tried > 100


def test_only_eager_calls_take_a_plan(dry, monkeypatch):
    case = transition(2, (4, 8, 8))
    gaussian_log_prob(*case.tensors, backend="triton")
    key = ("log_prob", "triton", (False, "mean", True), (*case.tensors, None))
    assert launching.known(*key) is not None
    assert launching.known(key[0], "torch", *key[2:]) is None
    with torch._subclasses.FakeTensorMode():
        assert launching.known(*key) is None
    with torch.device("cpu"):  # a function mode
        assert launching.known(*key) is None
    assert torch.func.vmap(lambda t: t + (launching.known(*key) is not None))(torch.zeros(1)).item() == 0
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert launching.known(*key) is None


def test_cpu_tensors_never_take_a_plan():
    """Their values are checked in every call."""
    assert not launching.Launcher().drives(torch.zeros(1))


def test_captures_take_semaphores_of_their_own(monkeypatch):
    """As a capture would, on a pool that lies in the CPU's memory."""
    pool = workspace.Pool(64, torch.device("cpu"))
    first, second = pool.take(7), pool.take(20)
    assert not first.any() and len(first) == 7 and len(second) == 20
    assert second.data_ptr() - first.data_ptr() == 8 * 4, "they overlap, or do not begin at multiples of 16 bytes"
    assert pool.take(40) is None and pool.take(36) is not None and pool.take(1) is None

    cuda = SimpleNamespace(type="cuda", index=0)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kwargs: zeros(*args, **kwargs))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(1)))
    monkeypatch.setattr(workspace, "current_stream", lambda index: stream)
    monkeypatch.setattr(workspace, "_POOLS", {})
    monkeypatch.setattr(workspace, "_KEPT", {})
    monkeypatch.setattr(workspace, "POOL", 16)
    capturing, stream, waited = True, 1, []
    assert len(workspace.semaphores(3, cuda)) == 3 and not workspace._POOLS, "a capture before the first launch clears its own"
    capturing = False
    kept = workspace.semaphores(3, cuda)
    assert workspace.semaphores(8, cuda) is kept and waited == [1]
    stream = 2
    assert workspace.semaphores(3, cuda) is not kept and waited == [1]
    capturing, stream = True, 1
    taken = [workspace.semaphores(8, cuda) for _ in range(3)]  # the third finds the pool used up
    assert len({t.data_ptr() for t in (*taken, kept)}) == 4
    assert taken[0].untyped_storage().data_ptr() == taken[1].untyped_storage().data_ptr() != taken[2].untyped_storage().data_ptr()
    assert DEVICE.type == "cpu"


def test_a_triton_whose_kernels_are_called_otherwise_is_launched_by_its_own_launcher(dry, monkeypatch) -> None:
    compiled: list[str] = []

    def refuse(handle, prepared, pointers, scalars) -> None:
        raise TypeError("run() takes 4 positional arguments but 17 were given")

    def through_triton(prepared, tensors, scalars):
        compiled.append(prepared.kernel.fn.__name__)
        return dry.describe(prepared, tensors, scalars)

    monkeypatch.setattr(dry, "run", refuse)
    monkeypatch.setattr(dry, "compile", through_triton)
    for count in (1, 2, 3):
        philox_normal(torch.arange(4), (4, 8, 8), backend="triton")
        assert len(compiled) == count  # each call launched once
    assert not dry.direct and launching.LAUNCHER is dry and launching.Launcher.direct
