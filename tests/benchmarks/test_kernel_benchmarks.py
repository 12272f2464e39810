"""The benchmark of the kernels and the GPU check, as far as a CPU can tell: what is counted, refused, written and judged."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import cases, chains, checking, gpu_check, measure, report, sanitize
from benchmarks.kernels.cases import DENOISER, LOSSES, TRANSITIONS, Case
from benchmarks.kernels.report import Result, Row
from benchmarks.lib import command, timing
from benchmarks.lib.command import ROOT
from benchmarks.lib.timing import CpuStopwatch, Timing

SMALL = [Case(op, mode, "SD", (3, 4, 6, 5), torch.bfloat16, 5.0) for op, mode in TRANSITIONS]
SMALL += [Case(op, mode, "loss", (3, 5, 7)) for op, mode in LOSSES] + [Case("philox_normal", "fwd", "SD", (3, 4, 6, 5))]
HIDDEN = [Case("group_norm", mode, "hidden", (2, 64, 6, 5), torch.bfloat16, None, True) for mode in ("fwd", "fwd+bwd")]
HIDDEN += [Case("geglu", mode, "hidden", (2, 3, 26), torch.bfloat16) for mode in ("fwd", "fwd+bwd")]
NORMS = [(mode, dtype) for mode in ("fwd", "fwd+bwd") for dtype in (torch.bfloat16, torch.float32)]


def name_of(value):
    return value.key.replace(" ", "-") if isinstance(value, Case) else None


# Bytes


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # By hand, N = 2, C*H*W = 60: guided bf16 output 2*2*60*2 = 480, a latent 4*2*60 = 480, coefficients 3*4*2 = 24, seeds 16,
        # a number per row 8.
        (Case("denoise_step", "fwd", "", (2, 3, 4, 5), torch.bfloat16, 5.0), 480 + 480 + 24 + 16 + 480 + 8),
        (Case("gaussian_log_prob", "fwd", "", (2, 3, 4, 5), torch.bfloat16, 5.0), 480 + 480 + 480 + 24 + 8),
        (Case("gaussian_log_prob", "fwd+bwd", "", (2, 3, 4, 5), torch.bfloat16, 5.0), 1472 + 1464 + 8 + 480),
        (Case("gaussian_log_prob_and_grad", "fused", "", (2, 3, 4, 5), torch.bfloat16, 5.0), 1464 + 8 + 8 + 480),
        # Unguided fp32: output and gradient 4*2*60 = 480; unguided fp16: 240.
        (Case("gaussian_log_prob", "fwd", "", (2, 3, 4, 5), torch.float32), 480 + 480 + 480 + 24 + 8),
        (Case("gaussian_log_prob_and_grad", "fused", "", (2, 3, 4, 5), torch.float16), 240 + 960 + 24 + 8 + 8 + 240),
        (Case("philox_normal", "fwd", "", (2, 3, 4, 5)), 16 + 480),
        # G, B, T = 2, 3, 5: three tensors of 120 bytes, rewards 24, gradient 120, loss 4, stats 32.
        (Case("prdp_loss", "fwd", "", (2, 3, 5)), 384 + 4),
        (Case("prdp_loss", "fwd+bwd", "", (2, 3, 5)), 384 + 4 + 384 + 4 + 120),
        (Case("prdp_loss_and_grad", "fused", "", (2, 3, 5)), 384 + 4 + 32 + 120),
        # N, C, H, W = 2, 32, 4, 5, bf16: a tensor 2560, shift 128, weight and bias 64 each. x, x, y, then x, dy, x, dy, dx.
        (Case("group_norm", "fwd", "", (2, 32, 4, 5), torch.bfloat16), 3 * 2560 + 256),
        (Case("group_norm", "fwd+bwd", "", (2, 32, 4, 5), torch.bfloat16), 8 * 2560 + 3 * 256),
        # 2 x 3 tokens of two halves of 5, bf16: half 60; both and y, then both, dy and both gradients.
        (Case("geglu", "fwd", "", (2, 3, 10), torch.bfloat16), 180),
        (Case("geglu", "fwd+bwd", "", (2, 3, 10), torch.bfloat16), 180 + 300),
    ],
    ids=name_of,
)
def test_bytes_by_hand(case, expected):
    assert cases.bytes_moved(case) == expected


def test_the_cases_cover_what_is_claimed():
    listed = cases.gpu_cases()
    assert len({case.key for case in listed}) == len(listed)
    for op, mode in TRANSITIONS:
        mine = [case for case in listed if (case.op, case.mode) == (op, mode)]
        assert {case.shape[0] for case in mine} == {8, 64} and {case.size for case in mine} == {"SD", "SDXL", "SD3", "video"}
        assert {case.dtype for case in mine} == {torch.bfloat16, torch.float16, torch.float32}
        assert any(case.channels_last for case in mine)
        assert any(cases.bytes_moved(case) > report.LARGE for case in mine)
    assert {case.shape for case in listed if case.op == "prdp_loss"} == {(64, 8, 50), (32, 16, 50), (16, 64, 1000)}
    for op, mode in DENOISER:
        assert any(cases.bytes_moved(case) > report.LARGE for case in listed if (case.op, case.mode) == (op, mode))
    assert any(case.op == "philox_normal" and cases.bytes_moved(case) > report.LARGE for case in listed)


# A fair contest


@pytest.mark.parametrize(
    "case",
    [
        *SMALL,
        *(Case(op, mode, "SD", (3, 4, 6, 5), torch.float16, None, True) for op, mode in TRANSITIONS),
        *(Case(op, mode, "SD", (2, 4, 32, 32), torch.float32, 5.0) for op, mode in TRANSITIONS),
        *(Case(op, mode, "loss", (16, 64, 100)) for op, mode in LOSSES),
        *(Case("group_norm", mode, "hidden", (2, 64, 6, 5), dtype, channels_last=True) for mode, dtype in NORMS),
        *(Case("geglu", mode, "hidden", (2, 3, 26), dtype) for mode, dtype in NORMS),
    ],
    ids=name_of,
)
def test_chains_and_operators_give_the_float64_answer(case):
    results = measure.check(cases.build(case, "cpu", cases.operators("torch")))
    assert {name: (r.status, r.note) for name, r in results.items()} == {"triton": ("measured", ""), "eager": ("measured", "")}


def test_the_noise_of_the_timed_chains_is_normal():
    torch.manual_seed(0)
    seeds = list(range(64))
    case = Case("denoise_step", "fwd", "", (64, 4, 16, 16), torch.float32)
    x = cases.transition_inputs(case, torch.device("cpu"))
    table = (x["sample_coef"], x["output_coef"], x["std"])
    prev, _ = chains.denoise_step(x["model_output"], x["sample"], *table, None)
    drawn = (prev - chains.transition_mean(x["model_output"], x["sample"], *table[:2], None)) / x["std"].view(-1, 1, 1, 1)
    rows = chains.generator_per_row(seeds, (4, 16, 16), torch.device("cpu"))
    for noise in (drawn, rows, chains.randn(64, (4, 16, 16), torch.device("cpu"))):
        # 65536 normals: the mean has a standard error of 0.004, the standard deviation one of 0.003.
        assert noise.shape == (64, 4, 16, 16) and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.015
    alone = chains.generator_per_row(seeds[5:6], (4, 16, 16), torch.device("cpu"))
    torch.testing.assert_close(alone[0], rows[5], atol=0, rtol=0)


def test_inputs_keep_clear_of_the_edges_of_float32():
    case = Case("prdp_loss", "fwd", "loss", (16, 64, 100))
    log_probs, old, _, rewards = cases.loss_inputs(case, torch.device("cpu"))
    distance = (log_probs - old).abs()
    clipped = distance > cases.CLIP_RANGE
    assert 0.4 < clipped.float().mean() < 0.6 and rewards.isfinite().all()
    assert (distance - cases.CLIP_RANGE).abs().min() > 1e-3


# Refusal


def spoilt(op: str, spoil):
    """The operators, `op` with its outputs passed through `spoil`."""
    right = cases.operators("torch")
    return right | {op: lambda *a, **k: spoil(right[op](*a, **k))}


def one_element(tensor: torch.Tensor, value: float) -> torch.Tensor:
    wrong = tensor.clone()
    wrong.view(-1)[7] = value
    return wrong


def at_one_place(index: int, value: float):
    return lambda outputs: tuple(one_element(out, value) if i == index else out for i, out in enumerate(outputs))


@pytest.mark.parametrize(
    ("op", "mode", "spoil", "tensor", "index"),
    [
        ("denoise_step", "fwd", at_one_place(0, 3.0), "prev_sample", "[0, 0, 1, 2]"),
        ("denoise_step", "fwd", lambda out: (out[0], out[1] + 1e-5), "log_prob", "["),
        ("denoise_step", "fwd", lambda out: (out[0], out[1] * (1 + 2e-6)), "log_prob", "["),
        ("denoise_step", "fwd", lambda out: (out[0], out[1].roll(1)), "log_prob", "["),
        ("gaussian_log_prob", "fwd", lambda out: out * (1 + 1e-5), "log_prob", "["),
        ("gaussian_log_prob", "fwd", lambda out: out[[1, 0, 2]], "log_prob", "["),
        ("gaussian_log_prob_and_grad", "fused", lambda out: (out[0] * (1 + 1e-4), out[1]), "log_prob", "["),
        ("gaussian_log_prob", "fwd+bwd", lambda out: out * 1.0 + (out - out.detach()), "grad", "["),  # doubles the gradient
        ("gaussian_log_prob_and_grad", "fused", lambda out: (out[0], out[1] * 1.01), "grad", "["),
        ("gaussian_log_prob_and_grad", "fused", at_one_place(1, float("nan")), "grad", "[0, 0, 1, 2]"),
        ("gaussian_log_prob_and_grad", "fused", lambda out: (out[0], out[1].float()), "grad", "torch.float32"),
        ("prdp_loss", "fwd", lambda out: out * (1 + 1e-5), "loss", "[]"),
        ("prdp_loss_and_grad", "fused", lambda out: (out[0], out[1].roll(1, 0), out[2]), "grad", "["),
        ("prdp_loss_and_grad", "fused", lambda out: (*out[:2], out[2] | {"pairs": out[2]["pairs"] + 1}), "pairs", "[]"),
        ("philox_normal", "fwd", lambda out: out.roll(1), "noise", "["),
        ("group_norm", "fwd", lambda out: out * 1.02, "y", "["),
        ("group_norm", "fwd+bwd", lambda out: out * 1.0 + (out - out.detach()), "dx", "["),
        ("geglu", "fwd", lambda out: out.roll(1), "y", "["),
    ],
)
def test_a_wrong_result_is_refused_and_not_timed(op, mode, spoil, tensor, index):
    case = next(case for case in SMALL + HIDDEN if (case.op, case.mode) == (op, mode))
    row = measure.measure(case, CpuStopwatch(), spoilt(op, spoil), rounds=2, copy_gb_per_s=10.0)
    assert row.status == "wrong" and row.note.startswith(f"{tensor}: ") and index in row.note
    assert all(r.launch is None and r.graph is None for r in row.results) and row.gb_per_s is None
    assert [r.status for r in row.results] == ["wrong", "skipped"]
    assert "WRONG " + tensor in report.table([row], 10.0)


def test_noise_a_few_units_too_small_is_refused():
    """As a wrong digit in its logarithm once made it. 1e-7 of a normal passes, 5e-7 does not: all of a row's squares have it."""
    case = Case("denoise_step", "fwd", "SD", (8, 4, 64, 64), torch.bfloat16, 5.0)
    right = cases.operators("torch")

    def with_noise(relative: float):
        def step(*args, seeds, step, **kwargs):
            noise = right["philox_normal"](seeds, case.shape[1:], step=step).double() * (1 + relative)
            prev, log_prob = right["denoise_step"](*(a.double() for a in args), noise=noise, **kwargs)
            return prev.float(), log_prob.float()

        return measure.check(cases.build(case, "cpu", right | {"denoise_step": step}))["triton"]

    assert with_noise(0.0).status == with_noise(-1e-7).status == "measured"
    assert with_noise(-5e-7).status == "wrong" and with_noise(-5e-7).note.startswith("log_prob: ")


def test_a_wrong_opponent_gets_no_time_and_shows(monkeypatch):
    right = chains.gaussian_log_prob
    monkeypatch.setattr(chains, "gaussian_log_prob", lambda *a: right(*a) + 1e-3)
    row = measure.measure(SMALL[1], CpuStopwatch(), cases.operators("torch"), rounds=2, copy_gb_per_s=10.0)
    assert [(r.status, r.launch is None) for r in row.results] == [("measured", False), ("wrong", True)]
    assert row.launch_ratio == {} and "WRONG" in report.table([row], 10.0) and report.wrong_in(row)


def test_an_operator_that_raises_is_an_error_of_its_row():
    def broken(*args, **kwargs):
        raise RuntimeError("no\nkernel")

    row = measure.measure(SMALL[0], CpuStopwatch(), {"denoise_step": broken}, rounds=2, copy_gb_per_s=1.0)
    assert (row.status, row.note) == ("error", "RuntimeError: no kernel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_may_be_rounded_once_to_nearest(dtype):
    """Rounding passes, whole and subnormal; truncation, which errs by up to twice as much, and a second rounding do not."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100_000, generator=generator, dtype=torch.float64)
    assert checking.compare("x", exact.to(dtype), exact) is None
    with_small = torch.where(torch.arange(100_000) % 2 == 0, exact, exact * 1e-5)
    assert checking.compare("x", with_small.to(dtype), with_small) is None
    toward_zero = exact.to(dtype)
    over = toward_zero.double().abs() > exact.abs()
    toward_zero = torch.where(over, torch.nextafter(toward_zero, torch.zeros_like(toward_zero)), toward_zero)
    assert checking.compare("x", toward_zero, exact) is not None
    assert checking.compare("x", (exact / 3).to(dtype) * 3, exact) is not None


def test_one_wrong_element_among_many_is_found():
    exact = torch.ones(1000, 1000, dtype=torch.float64)
    got = exact.float()
    got[123, 456] += 5e-4  # 5e-7 in relative RMS, inside 1e-6
    fault = checking.compare("x", got, exact)
    assert fault.relative_rms < 1e-6 and fault.index == (123, 456)


# Timing


def test_quartiles_and_turns():
    timing_of_five = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert timing_of_five == Timing(3.0, 2.0, 4.0, 5) and timing_of_five.iqr_ms == 2.0
    order, clock = [], itertools.count(1.0)

    def contestant(name):
        return lambda: order.append(name) or next(clock)

    times = timing.interleave({name: contestant(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(order) == "abcbcacababc"  # everybody once a round, nobody always first
    assert times["a"].samples == 3 and times["a"] == Timing.of([6.0, 8.0, 10.0])


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    stopwatch = CpuStopwatch()
    monkeypatch.setattr(stopwatch, "launch", lambda run: 2.0)
    assert timing.copy_bandwidth(stopwatch, rounds=2, size=10**6) == pytest.approx(1.0)  # 2 MB in 2 ms
    assert timing.launch_floor(stopwatch) is None


class GraphStopwatch(CpuStopwatch):
    """A stopwatch with graphs, and times that are set: eager 10 ms and 6 ms as a graph, the operator 2 ms and 1 ms."""

    def __init__(self):
        self.calls = itertools.count()

    def launch(self, run):
        return 10.0 if run.__qualname__.startswith("_denoise.<locals>.run") else 2.0

    def capture(self, run):
        milliseconds = 6.0 if run.__qualname__.startswith("_denoise.<locals>.run") else 1.0
        return lambda: milliseconds


def test_a_row_derives_its_numbers_from_graph_time_and_both_ratios():
    row = measure.measure(SMALL[0], GraphStopwatch(), cases.operators("torch"), rounds=3, copy_gb_per_s=0.01)
    size = cases.bytes_moved(SMALL[0])
    assert row.gb_per_s == pytest.approx(size / 1e-3 / 1e9) and row.copy_share == pytest.approx(row.gb_per_s / 0.01)
    assert row.launch_ratio == {"eager": 5.0} and row.graph_ratio == {"eager": 6.0}
    text = report.table([row], 0.01)
    assert "2.0000 ±0.0000" in text and "1.0000 ±0.0000" in text and "5.0" in text and "6.0" in text


def test_what_cannot_be_captured_is_still_timed():
    class NoGraphs(GraphStopwatch):
        def capture(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    row = measure.measure(SMALL[0], NoGraphs(), cases.operators("torch"), rounds=2, copy_gb_per_s=1.0)
    assert row.status == "measured" and all("not permitted" in r.note and r.launch for r in row.results)
    philox = measure.measure(SMALL[-1], NoGraphs(), cases.operators("torch"), rounds=2, copy_gb_per_s=1.0)
    assert [bool(r.note) for r in philox.results] == [True, False]  # a generator per row is never captured


# The report


def row_with(op="denoise_step", size="SD", moved=1, ours=1.0, eager=10.0, compiled=2.0, share=None, status="measured"):
    def result(name, ms):
        return Result(name, "measured", "", Timing(ms, ms, ms, 5), Timing(ms, ms, ms, 5))

    row = Row(op, "fwd", f"{size} {moved}", size, [1], "bf16", None, False, moved, status)
    row.results = [result("triton", ours), result("eager", eager), result("compiled", compiled)]
    row.conclude(copy_gb_per_s=1.0)
    row.copy_share = share if share is not None else row.copy_share
    return row


def test_goals_are_judged_by_the_worst_case():
    large = report.LARGE + 1
    met = [row_with(), row_with(size="video", moved=large, share=0.95, eager=2.0)]
    assert [goal.met for goal in report.goals(met)] == [True, True, True]
    for extra, number in (
        (row_with(size="video", moved=large, share=0.89), 0),
        (row_with(eager=4.9), 1),
        (row_with(size="SDXL", compiled=0.99), 2),
    ):
        judged = report.goals([*met, extra])
        assert [goal.met for goal in judged] == [i != number for i in range(3)] and extra.key in judged[number].detail
    assert [goal.met for goal in report.goals([])] == [None, None, None]


def test_shares_of_the_kernel_tests_are_all_of_them(monkeypatch) -> None:
    monkeypatch.setenv("PRDP_TEST_DEVICE", "cuda")  # or the file would turn Triton's interpreter on
    choose = runpy.run_path(str(ROOT / "tests" / "kernels" / "conftest.py"))["pytest_collection_modifyitems"]

    def share(number: int, shares: int) -> list[int]:
        monkeypatch.setenv("PRDP_TEST_SHARE", f"{number}/{shares}")
        items = list(range(29))
        choose(items)
        return items

    assert share(0, 1) == list(range(29))
    assert sorted(item for number in range(8) for item in share(number, 8)) == list(range(29))


def test_a_run_stops_at_its_budget_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "copy_bandwidth", lambda stopwatch: 1.0)
    lines, ops = tmp_path / "rows.jsonl", cases.operators("torch")
    arguments = {"rounds": 1, "compiled": False}
    assert measure.run(SMALL[:2], CpuStopwatch(), ops, lines, budget=60, **arguments) is True
    assert [json.loads(line).get("status") for line in lines.read_text().splitlines()] == [None, "measured", "measured"]
    broken = spoilt("denoise_step", lambda out: (out[0] + 1, out[1]))
    assert measure.run(SMALL[:2], CpuStopwatch(), broken, lines, budget=60, **arguments) is False
    measure.run(SMALL[:2], CpuStopwatch(), ops, lines, budget=-1, **arguments)
    assert [json.loads(line).get("status") for line in lines.read_text().splitlines()] == [None, "skipped", "skipped"]


# The steps


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    script = f"echo begun; sleep 60 & echo $! > {pid}; sleep 60"
    status, output, took = gpu_check.execute(["sh", "-c", script], 1.0, dict(os.environ))
    assert status is None and output == "begun\n" and took < 10
    state, deadline = Path(f"/proc/{pid.read_text().strip()}/stat"), time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_steps_see_cuda_and_never_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    env = gpu_check.environment()
    assert env["PRDP_TEST_DEVICE"] == "cuda" and "TRITON_INTERPRET" not in env
    assert env["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(ROOT / "kernels")]


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "25 calls, 0 wrong\n========= ERROR SUMMARY: 0 errors\n", "clean"),
        (0, "25 calls\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (99, "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n", "not clean"),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", "not clean"),
        (1, "========= Error: Device not supported. Please refer to the user manual\n", "not available"),
        (1, "WRONG gaussian_log_prob\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (0, "it said nothing of the kind\n", "failed"),
        (None, "", "timed out"),
    ],
)
def test_the_sanitizer_is_believed_only_with_its_summary(status, output, expected):
    assert gpu_check.judge_sanitizer(status, output, 1.0, 50.0).status == expected


def test_without_a_sanitizer_the_step_is_not_available(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.run_sanitizer("memcheck").status == "not available"


def test_the_sanitizer_driver_runs_every_operator():
    assert {case.op for case in sanitize.odd_cases()} == set(cases.OPERATORS)
    assert sanitize.main(["--device", "cpu", "--backend", "torch"]) == 0


@pytest.mark.parametrize(("script", "option"), [("gpu_check", "--output"), ("measure", "--lines")])
def test_without_a_gpu_one_line_and_nothing_written(script, option, tmp_path):
    output = tmp_path / "none" / "results"
    env = command.environment() | {"CUDA_VISIBLE_DEVICES": "-1"}
    words = [sys.executable, "-m", f"benchmarks.kernels.{script}", option, str(output)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and not output.parent.exists()
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
