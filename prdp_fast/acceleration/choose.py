"""What makes a denoiser call cheaper on this machine, chosen once when a job starts: `auto` takes what works and is faster.

Nothing here changes what is computed beyond rounding: every choice is compared with the plain model on the job's own shapes.
Rank 0 chooses for all ranks, or they would round differently.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from prdp_fast.acceleration import attention, channels_last, shared_halves
from prdp_fast.acceleration.compile import (
    CompiledForward,
    compile_blocks,
    compile_frozen,
    compile_trained,
    own_forward,
    raise_recompile_limit,
    take_code_of,
    uncompile,
    uncompiled,
)
from prdp_fast.acceleration.cuda_graph import CudaGraphForward
from prdp_fast.acceleration.payback import WorkLeft, count_blocks, key_of, learn_seconds, learnt_seconds, payback
from prdp_fast.acceleration.probe import (
    MARGIN,
    Decision,
    DenoiserShapes,
    Probe,
    choose_variant,
    fastest,
    first_line,
    quiet,
)
from prdp_fast.config.recipe import PerformanceSettings
from prdp_fast.core.errors import UserError
from prdp_fast.core.format import format_bytes

NO_FASTER = "no faster"
PROBE_ROWS = {"cpu": 16, "cuda": 32}  # enough to compare kernels by, and short
# Of the largest attention, up to which compiled code may write out the matrix of all pairs of tokens.
FEW_TOKENS = 256


@dataclass
class Acceleration:
    """What was chosen and why, by setting."""

    decisions: dict[str, Decision] = field(default_factory=dict)
    # What the rollout calls for a denoiser that `ZeroEngine.sampling_denoiser` gives it.
    sampling_view: Callable[[nn.Module], Callable[..., Any]] = lambda denoiser: denoiser

    def __str__(self) -> str:
        return "\n".join(["performance", *(f"  {name:16} {decision}" for name, decision in self.decisions.items())])

    @property
    def shares_halves(self) -> bool:
        """Whether guided calls are to give latents and timesteps once: `Family.predict` with shared=True."""
        decision = self.decisions.get("shared_halves")
        return decision is not None and decision.value == "on"

    def record(self) -> dict[str, Any]:
        return {name: asdict(decision) for name, decision in self.decisions.items()}


# ------------------------------------------------------------------------------------------------------------------- choices
def choose_attention(setting: str, probe: Probe, compiling: bool, remembered: str | None) -> Decision:
    """Choose and set the kernel of the probe's denoiser. Raises: UserError if the one that was set does not work."""
    variants: dict[str, Callable[[], None]] = {
        name: partial(attention.set_attention, probe.denoiser, name) for name in attention.candidates(probe.device)
    }
    if setting != "auto":
        if setting not in variants:
            raise UserError(f"performance.attention is {setting}, which needs a CUDA device; set auto or sdpa")
        return Decision(try_attention(setting, probe, variants), "as set")
    lost = ""
    if remembered is not None:
        try:
            if remembered not in variants:
                raise UserError(f"{remembered} needs another device than {probe.device.type}")
            return Decision(try_attention(remembered, probe, variants), "as this run chose when it started")
        except UserError as error:
            lost = f"; {error}"
    tokens = probe.shapes.attention_tokens
    if compiling and probe.device.type == "cpu" and tokens <= FEW_TOKENS:
        # Torch's CPU kernel is opaque to the compiler, which fuses the plain arithmetic with what surrounds it.
        with contextlib.suppress(UserError):
            reason = f"compiled, and no more than {FEW_TOKENS} tokens{lost}"
            return Decision(try_attention("math", probe, variants), reason)
    needed, most = attention.math_bytes(probe.denoiser, probe.rows, tokens), probe.room()
    too_large = {}
    if setting == "auto" and needed > most:
        del variants["math"]
        too_large["math"] = f"it would take {format_bytes(needed)}, and a try may take {format_bytes(most)}"
    chosen, times, faults = choose_variant(probe, variants, "sdpa")
    faults |= too_large
    if "xformers" in faults and (known := attention.xformers_fault()):
        faults["xformers"] = known
    out = "".join(f"; no {name}: {reason}" for name, reason in faults.items())
    return Decision(chosen, f"fastest forward and backward, {probe.rows} rows{out}{lost}", times)


def try_attention(name: str, probe: Probe, variants: dict[str, Callable[[], None]]) -> str:
    inputs = probe.inputs()
    variants["sdpa"]()
    expected = probe.run(inputs)
    try:
        with quiet():
            variants[name]()
            probe.check(probe.run(inputs), expected)
    except Exception as error:
        variants["sdpa"]()
        raise UserError(f"performance.attention {name} does not work here: {first_line(error)}; set auto or sdpa") from None
    return name


def choose_switch(
    name: str, setting: str, probe: Probe, on: Callable[[], Any], off: Callable[[], Any], remembered: str | None
) -> Decision:
    """A switch of the probe's denoiser, compared with the plain call, and measured where the choice is ours.

    Raises: UserError if `on` is set and it does not work.
    """
    what = f"forward and backward, {probe.rows} rows" if probe.gradients else f"reference, forward of {probe.rows} rows"
    if setting == "auto" and remembered is None:
        chosen, times, faults = choose_variant(probe, {"off": off, "on": on}, "off")
        return Decision(chosen, faults.get("on", what), times)
    only = "" if probe.gradients else "; reference only"
    value, reason = (remembered, "as this run chose when it started") if setting == "auto" else (setting, f"as set{only}")
    if value == "on":
        inputs = probe.inputs()
        off()
        expected = probe.run(inputs)
        try:
            with quiet():
                on()
                probe.check(probe.run(inputs), expected)
        except Exception as error:
            off()
            if setting == "auto":
                return Decision("off", first_line(error))
            raise UserError(f"performance.{name} is on, but fails here: {first_line(error)}; set auto or off") from None
    return Decision(str(value), reason)


def choose_fuse_qkv(setting: str, probe: Probe, kernel: str, remembered: str | None) -> Decision:
    denoiser = probe.denoiser
    if not any(attention.is_plain(layer) for layer in attention.attention_layers(denoiser)):
        reason = "no attention layers of the kind that it knows"
        if setting == "on":
            raise UserError(f"performance.fuse_qkv is on, but {reason}; set auto or off")
        return Decision("off", "as set" if setting == "off" else reason)

    def on() -> None:
        attention.fuse_qkv(denoiser)
        attention.set_attention(denoiser, kernel)

    def off() -> None:
        attention.unfuse_qkv(denoiser)
        attention.set_attention(denoiser, kernel)

    decision = choose_switch("fuse_qkv", setting, probe, on, off, remembered)
    if decision.value == "off":
        attention.unfuse_qkv(denoiser, forget=True)
    return decision


def choose_channels_last(setting: str, probe: Probe, stage: int, remembered: str | None) -> Decision:
    denoiser = probe.denoiser
    reason = "a CPU's convolutions reorder their inputs in any case" if probe.device.type == "cpu" and setting == "auto" else ""
    if stage == 3:
        reason = "at ZeRO-3 weights are gathered in hooks of the layers that this goes past"
    elif not any(run is channels_last.residual_block for _, run in channels_last.rewrites(denoiser)):
        reason = "no residual blocks of the kind that it knows"
    if not reason:
        return choose_switch(
            "channels_last", setting, probe, lambda: channels_last.enable(denoiser), lambda: channels_last.disable(denoiser),
            remembered,
        )  # fmt: skip
    if setting == "on":
        raise UserError(f"performance.channels_last is on, but {reason}; set auto or off")
    return Decision("off", "as set" if setting == "off" else reason)


def choose_shared_halves(setting: str, probe: Probe, guided: bool, remembered: str | None) -> Decision:
    """Whether guided calls compute once what both halves have in common. Raises: UserError if it is set and does not work.

    Args: probe: of the denoiser that is enabled, or left as it was.
    """
    if setting == "off":
        return Decision("off", "as set")
    reason = shared_halves.fault(probe.denoiser) if guided else "sampling is without guidance"
    if reason is None and setting == "auto":
        if remembered == "off":
            return Decision("off", "as this run chose when it started")
        if remembered is None and probe.device.type != "cuda":
            return Decision("off", "auto on a CPU, where results stay the bits of plain calls")
    times: dict[str, float] = {}
    if reason is None:
        insists = setting == "on" or remembered == "on"
        try:
            times = try_shared_halves(replace(probe, shared=True))
            # It is part of the plain call's work, so a difference that noise makes is no reason against it.
            if insists or fastest(times, "on", MARGIN[probe.device.type]) == "on":
                why = "what both halves have in common is computed once" if remembered is None else "as when this run started"
                return Decision("on", "as set" if setting == "on" else why, times)
            reason = NO_FASTER
        except Exception as error:  # of a U-Net that is less plain than it looks
            reason = first_line(error)
        shared_halves.disable(probe.denoiser)
    if setting == "on":
        raise UserError(f"performance.shared_halves is on, but {reason}; set auto or off")
    return Decision("off", reason, times)


def try_shared_halves(probe: Probe) -> dict[str, float]:
    """Enable the probe's denoiser, compare it with plain calls, and time both. Raises: whatever goes wrong."""
    inputs, plain = probe.inputs(), shared_halves.doubling(probe.denoiser)
    expected = probe.run(inputs, plain)
    with quiet():
        shared_halves.enable(probe.denoiser)
        probe.check(probe.run(inputs), expected)
        return probe.time({"off": partial(probe.run, inputs, plain), "on": partial(probe.run, inputs)})


ROLES = ("trained", "rollout", "reference")


def plan_compiling(setting: str, device: torch.device, stage: int, past: dict[str, str]) -> dict[str, Decision]:
    """How each denoiser is to be compiled, and why. Nothing is tried yet."""
    if setting == "off":
        return dict.fromkeys(ROLES, Decision("off", "as set"))
    if setting == "auto" and device.type != "cuda":
        reason = "auto on a CPU: compiling takes minutes and saves 10 to 15%; full pays in jobs of hours, or from compile_cache"
        return dict.fromkeys(ROLES, Decision("off", reason))
    # The trained one's blocks start soon and leave DeepSpeed's hooks between them; the others have none.
    auto = {"trained": "blocks", "rollout": "full", "reference": "full"}
    plan = {role: Decision(mode if setting == "auto" else setting, setting) for role, mode in auto.items()}
    if setting == "auto":
        failed = Decision("off", "as this run chose when it started")
        plan |= {role: failed for role in ROLES if past.get(f"compile {role}", past.get("compile")) == "off"}
    if stage == 3:
        plan["trained"] = Decision("off", "ZeRO-3 gathers weights in hooks of every layer, at every call")
    return plan


def keep_what_pays(
    plan: dict[str, Decision], past: dict[str, str], work: WorkLeft, probes: Mapping[str, Probe], key: str, layout: Decision
) -> dict[str, Decision]:
    """The plan without what takes longer to compile than it saves in the rest of the job. What the run had stays.

    Args:
        probes: of each role, few rows; timed as they are.
        layout: what was chosen for channels_last, with its times.
    """
    learnt, kept = learnt_seconds(key), dict(plan)
    times = layout.milliseconds
    gained = times["off"] / times["on"] if layout.value == "on" and {"off", "on"} <= times.keys() else 1.0
    for role, probe in probes.items():
        if plan[role].value == "off" or f"compile {role}" in past:
            continue
        inputs = probe.inputs()
        milliseconds = probe.time({"plain": lambda probe=probe, inputs=inputs: probe.run(inputs)})["plain"]  # type: ignore[misc]
        blocks = count_blocks(probe.denoiser, probe.shapes.repeated_blocks)
        found = payback(role, work, milliseconds / 1000 / probe.rows, blocks, learnt, gained)
        if not found.pays:
            kept[role] = Decision("off", str(found))
    return kept


# ---------------------------------------------------------------------------------------------------------------- compiling
@dataclass(frozen=True)
class Ranks:
    """What choosing needs of the process group, which this floor does not know."""

    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # every rank's value, on every rank

    def first(self, run: Callable[[], Decision]) -> Decision:
        """What rank 0 decides, undisturbed by the others, who wait. Its UserError is raised on all."""
        decision, fault = None, None
        if self.rank == 0:
            try:
                decision = run()
            except UserError as error:
                fault = str(error)
        decision, fault = self.gather((decision, fault))[0]
        if decision is None:
            raise UserError(fault)
        return decision

    def in_turn(self, run: Callable[[], str | None]) -> str | None:
        """Rank 0 before the others, which then find what it compiled in the cache. Returns: the first fault of any rank."""
        fault = run() if self.rank == 0 else None
        faults = self.gather(fault)
        if not any(faults) and len(faults) > 1:
            faults = self.gather(run() if self.rank else None)
        return next((fault for fault in faults if fault), None)


def try_fast(probe: Probe, build: Callable[[], Callable[..., Any]], times: dict[str, float]) -> None:
    """Build a fast forward of the probe's denoiser, compare it with the plain one, and time both. Raises: whatever goes wrong."""
    inputs = probe.inputs()

    def plain() -> list[torch.Tensor]:
        with uncompiled():
            return probe.run(inputs, own_forward(probe.denoiser))

    expected = plain()
    start = time.perf_counter()
    with quiet():
        fast = build()
        probe.check(probe.run(inputs, fast), expected)
    times["first call"] = round((time.perf_counter() - start) * 1000)
    times |= probe.time({"plain": plain, "fast": lambda: probe.run(inputs, fast)})


def choose_fast(
    name: str,
    setting: str,
    probe: Probe,
    ranks: Ranks,
    build: Callable[[], Callable[..., Any]],
    undo: Callable[[], None],
    *,
    insists: bool,
    remembered: bool = False,
) -> Decision:
    """Keep a fast forward if it works on every rank and, where the choice is ours, is faster on rank 0.

    Args:
        setting: what is logged if it is kept.
        insists: the user set it: a fault is a UserError, and a slower one stays.
        remembered: the run that is resumed had it: a slower one stays.
    """
    times: dict[str, float] = {}

    def run() -> str | None:
        try:
            try_fast(probe, build, times)
        except Exception as error:  # a compiler, its toolchain, a wrong result: the plain model is there for all of them
            return first_line(error)
        return None

    fault = ranks.in_turn(run)
    if fault is None and not insists and not remembered and ranks.gather(times["fast"] >= times["plain"])[0]:
        fault = NO_FASTER
    if fault is None:
        return Decision(setting, f"{probe.rows} rows" + (", forward and backward" if probe.gradients else ", forward"), times)
    undo()
    if insists:
        raise UserError(f"performance.{name} does not work here: {fault}; set auto or off")
    return Decision("off", fault, times)


@dataclass(frozen=True)
class Denoisers:
    """Of one rank. The trained one's weights are whole in `gathered` alone at ZeRO-3."""

    trained: nn.Module
    gathered: nn.Module | None
    reference: nn.Module | None  # None with an adapter, where it is `sampled` without it, and if the objective needs none
    has_adapter: bool = False

    @property
    def sampled(self) -> nn.Module:
        return self.trained if self.gathered is None else self.gathered

    def __iter__(self) -> Iterator[nn.Module]:
        return (denoiser for denoiser in (self.trained, self.gathered, self.reference) if denoiser is not None)


def compile_denoisers(
    denoisers: Denoisers,
    plan: dict[str, Decision],
    past: dict[str, str],
    insists: bool,
    probe: Callable[..., Probe],
    train_rows: int,
    sample_rows: int,
    ranks: Ranks,
    blocks: Collection[str],
) -> tuple[dict[str, Decision], Callable[..., Any] | None]:
    """Compile each denoiser as planned. Returns: decisions, and what the rollout calls; None: the denoiser itself."""
    if all(decision.value == "off" for decision in plan.values()):
        reasons = {decision.reason for decision in plan.values()}
        return {"compile": plan["rollout"]} if len(reasons) == 1 else {f"compile {role}": plan[role] for role in ROLES}, None
    raise_recompile_limit()
    trained, sampled, reference = denoisers.trained, denoisers.sampled, denoisers.reference
    # Not the trained denoiser's compiled forward: that one keeps activations for a backward, and a rollout has none.
    rollout = [own_forward(sampled)]

    def build_trained() -> Callable[..., Any]:
        compile_trained(trained, plan["trained"].value, blocks, {train_rows, sample_rows})
        return trained

    def build_rollout() -> Callable[..., Any]:
        if plan["rollout"].value == "full":
            rollout.append(CompiledForward(rollout[0], [sample_rows]))
        elif sampled is not trained:  # otherwise its blocks are compiled already
            compile_blocks(sampled, blocks, [sample_rows])
        return rollout[-1]

    def build_reference() -> Callable[..., Any]:
        assert reference is not None
        if plan["reference"].value == "full" and train_rows == sample_rows and len(rollout) > 1:
            take_code_of(sampled, reference)
        compile_frozen(reference, plan["reference"].value, blocks, [train_rows])
        return reference

    def undo_rollout() -> None:
        del rollout[1:]
        if sampled is not trained:
            uncompile(sampled)

    tries: dict[str, tuple[Probe, Callable[[], Callable[..., Any]], Callable[[], None]]] = {
        "trained": (probe(trained, train_rows, gradients=True), build_trained, lambda: uncompile(trained)),
        "rollout": (probe(sampled, sample_rows), build_rollout, undo_rollout),
    }
    if reference is not None:
        tries["reference"] = (probe(reference, train_rows), build_reference, lambda: uncompile(reference))
    decisions: dict[str, Decision] = {}
    for role, (of, build, undo) in tries.items():
        name, decision = f"compile {role}", plan[role]
        if decision.value != "off":
            decision = choose_fast(
                "compile", decision.value, of, ranks, build, undo, insists=insists, remembered=name in past
            )  # fmt: skip
        decisions[name] = decision
        if role == "trained" and decision.value == "off" and decision.reason not in (NO_FASTER, plan[role].reason):
            return {"compile": decision}, None  # a compiler that fails once fails again, and takes as long
    return decisions, rollout[-1]


def capture(
    setting: str, stage: int, probe: Probe, rollout: Callable[..., Any] | None, ranks: Ranks
) -> tuple[Callable[..., Any] | None, Decision]:
    """Capture what the rollout calls. Returns: the new callable, or the one given."""
    reason = "as set"
    if probe.device.type != "cuda":
        reason = "needs a CUDA device"
    elif stage == 3:
        reason = "at ZeRO-3 the rollout's weights move to the host after every rollout, and a graph knows addresses"
    if setting == "off" or reason != "as set":
        if setting == "on":
            raise UserError(f"performance.cuda_graphs is on, but {reason}; set auto or off")
        return rollout, Decision("off", reason)
    captured = CudaGraphForward(rollout or own_forward(probe.denoiser), [probe.rows])
    decision = choose_fast(
        "cuda_graphs", "on", probe, ranks, lambda: captured, captured.graphs.clear, insists=setting == "on"
    )  # fmt: skip
    return (rollout if decision.value == "off" else captured), decision


# ------------------------------------------------------------------------------------------------------------------ the whole
def choose_kernels(
    denoisers: Denoisers,
    performance: PerformanceSettings,
    plan: dict[str, Decision],
    past: dict[str, str],
    chooser: Probe,
    stage: int,
    ranks: Ranks,
) -> dict[str, Decision]:
    """Attention and layout, the same in every denoiser; joined projections of the reference alone, which is never trained.

    Args: chooser: of the sampled denoiser, few rows, forward and backward: most of the time goes into the update.
    """
    compiling = any(decision.value != "off" for decision in plan.values())
    decisions = {
        "attention": ranks.first(
            lambda: choose_attention(performance.attention, chooser, compiling, past.get("attention"))
        )
    }  # fmt: skip
    kernel = decisions["attention"].value
    for denoiser in denoisers:
        attention.set_attention(denoiser, kernel)
    decisions["channels_last"] = ranks.first(
        lambda: choose_channels_last(performance.channels_last, chooser, stage, past.get("channels_last"))
    )
    for denoiser in denoisers:
        (channels_last.enable if decisions["channels_last"].value == "on" else channels_last.disable)(denoiser)
    if denoisers.reference is not None:
        frozen = replace(chooser, denoiser=denoisers.reference, gradients=False)
        decisions["fuse_qkv"] = ranks.first(lambda: choose_fuse_qkv(performance.fuse_qkv, frozen, kernel, past.get("fuse_qkv")))
        if decisions["fuse_qkv"].value == "on":
            attention.fuse_qkv(denoisers.reference)
        else:
            attention.unfuse_qkv(denoisers.reference, forget=True)
        attention.set_attention(denoisers.reference, kernel)
    elif denoisers.has_adapter:
        if performance.fuse_qkv == "on":
            raise UserError(
                "performance.fuse_qkv is on, but with model.lora nothing is frozen whose weights it could join; set auto or off"
            )
        decisions["fuse_qkv"] = Decision("off", "model.lora: the layers of an adapter stay three products")
    return decisions


def accelerate(
    denoisers: Denoisers,
    performance: PerformanceSettings,
    shapes: DenoiserShapes,
    *,
    train_rows: int,
    sample_rows: int,
    stage: int,
    device: torch.device,
    dtype: torch.dtype,
    guided: bool = False,
    ranks: Ranks = Ranks(),
    remembered: dict[str, Any] | None = None,
    work: WorkLeft | None = None,
) -> Acceleration:
    """Choose, set and check everything that is about a denoiser. Every rank must call it, before the first forward.

    Args:
        train_rows, sample_rows: denoiser rows of a micro-batch of the update (and the reference pass) and of a rollout step.
        guided: whether these are two halves of the same latents, for classifier-free guidance.
        remembered: on rank 0, the `record` of the run that is resumed, whose measured choices it keeps: others would round
            differently.
        work: what is left of the job: `auto` compiles only what pays in it. None: as if there were no end.
    Raises: UserError if a setting insists on what does not work here.
    """
    past = {name: decision["value"] for name, decision in (ranks.gather(remembered)[0] or {}).items()}
    plan = plan_compiling(performance.compile, device, stage, past)

    result = Acceleration()

    def probe(denoiser: nn.Module, rows: int, gradients: bool = False) -> Probe:
        return Probe(denoiser, shapes, rows, device, dtype, gradients, result.shares_halves)

    decisions = result.decisions
    few_rows = min(PROBE_ROWS.get(device.type, PROBE_ROWS["cpu"]), train_rows)
    chooser = probe(denoisers.sampled, few_rows, gradients=True)
    decisions |= choose_kernels(denoisers, performance, plan, past, chooser, stage, ranks)
    # A run that was started before there was a choice goes on as it was.
    had = past.get("shared_halves", "off" if past else None)
    decisions["shared_halves"] = ranks.first(
        lambda: choose_shared_halves(performance.shared_halves, chooser, guided, had)
    )  # fmt: skip
    for denoiser in denoisers:
        (shared_halves.enable if result.shares_halves else shared_halves.disable)(denoiser)
    chooser = replace(chooser, shared=result.shares_halves)
    key = key_of(denoisers.trained, train_rows, device)
    if performance.compile == "auto" and work is not None and any(decision.value != "off" for decision in plan.values()):
        probes = {"trained": chooser, "rollout": probe(denoisers.sampled, few_rows)}
        if denoisers.reference is not None:
            probes["reference"] = probe(denoisers.reference, few_rows)
        plan = ranks.gather(keep_what_pays(plan, past, work, probes, key, decisions["channels_last"]))[0]
    made, rollout = compile_denoisers(
        denoisers, plan, past, performance.compile != "auto", probe, train_rows, sample_rows, ranks, shapes.repeated_blocks
    )
    decisions |= made
    if ranks.rank == 0:
        learn_seconds(key, made)
    rollout, decisions["cuda_graphs"] = capture(
        performance.cuda_graphs, stage, probe(denoisers.sampled, sample_rows), rollout, ranks
    )  # fmt: skip
    if rollout is not None:
        result.sampling_view = lambda denoiser: rollout
    return result
