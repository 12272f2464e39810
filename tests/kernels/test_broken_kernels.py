"""The tests of the kernels notice: a kernel that is broken in one place fails some of them, and by a comparison, not a crash."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from compare import INTERPRETED

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip(
        "breaks are shown once, where the tests run on a CPU: compiling all of them takes minutes", allow_module_level=True
    )

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "kernels" / "prdp_kernels"

# Small pieces of the suite, by what they look at; each runs for less than a second.
TRANSITION = [
    "test_triton_transition.py::test_contiguous[odd-5.0-mean]",
    "test_triton_transition.py::test_contiguous[one program of a large row-None-sum]",
    "test_triton_transition.py::test_channels_last_output[odd-5.0]",
    "test_triton_transition.py::test_dtypes[torch.float32-torch.float32]",
]
STEP = [
    "test_triton_transition.py::test_seeds_are_philox_noise[(3, 5, 7)]",
    "test_triton_transition.py::test_deterministic_rows[torch.float32-mean]",
    "test_triton_transition.py::test_log_prob_of_a_step_has_the_bits_of_its_evaluation[mean-5.0-contiguous]",
]
NOISE = [
    "test_triton_philox.py::test_equals_the_reference[(3, 5, 7)]",
    "test_triton_philox.py::test_blocks_beyond_32_bits[4-17179869188-True-17179869184]",
    "test_triton_transition.py::test_noise_does_not_depend_on_the_layout[channels_last]",
    "test_triton_philox.py::test_every_path_makes_the_noise_of_the_reference[unaligned planes-(3, 3, 5)]",
]
LOSS = [
    "test_triton_loss.py::test_stats_keys_and_values",
    "test_triton_loss.py::test_clip_edge_passes_its_gradient",
    "test_triton_loss.py::test_sizes[3-3-7]",
    "test_triton_loss.py::test_sizes[1-17-50]",
    "test_triton_loss.py::test_sizes[1-100-1000]",
    "test_triton_loss.py::test_backward_of_a_large_group_has_the_bits_of_the_scaled_gradient[torch.float32-2-64-100]",
    "test_triton_loss.py::test_equal_images_of_a_large_group_tie",
    "test_triton_loss.py::test_the_branch_at_the_paper_s_beta_and_epsilon",
    "test_triton_loss.py::test_removed_images[nan]",
]
WRITTEN = "test_triton_memory.py::test_all_of_the_output_and_nothing_else_is_written"
SEMAPHORES = [f"{WRITTEN}[loss (3, 5, 7)]", f"{WRITTEN}[loss (2, 100, 50)]", f"{WRITTEN}[log_prob (16385,) contiguous]"]

NORM = [
    "test_triton_group_norm.py::test_shapes[odd-True-True]",
    "test_triton_group_norm.py::test_shapes[two blocks of channels, one short-False-True]",
    "test_triton_group_norm.py::test_shapes[nine chunks of two tiles, one short-True-False]",
    "test_triton_group_norm.py::test_a_mean_far_from_zero_costs_its_own_digits_only",
]
NORM_SEMAPHORES = [f"{WRITTEN}[group_norm (1, 64, 33, 33)]"]

MIXED_UP = ["test_launch.py::test_no_two_signatures_are_mixed_up", "test_launch.py::test_kernels_of_a_plan_are_bounded"]

TILE, LOG_PROB, DENOISE = "tile.py", "gaussian_log_prob/kernel.py", "denoise_step/kernel.py"
PHILOX, PRDP, LAYOUT, LAUNCH = "philox/kernel.py", "prdp_loss/kernel.py", "layout.py", "launch.py"
GROUP_NORM = "group_norm/kernel.py"


class Break(NamedTuple):
    """One piece of text for another, in one file; `tests` then fail."""

    file: str
    right: str
    wrong: str
    tests: list[str]


BREAKS = {
    "the shift is left out of the mean": Break(GROUP_NORM, "modifier=\".cg\") + shift\n", "modifier=\".cg\")\n", NORM),
    "the last chunk counts as a whole one": Break(
        GROUP_NORM, "of_chunk = tl.minimum(chunk, pixels - number * chunk)", "of_chunk = (chunk + 0 * number)", NORM
    ),
    "squares are summed about zero": Break(
        GROUP_NORM, "tl.where(inside, x - pivot[None, :], 0.0)", "tl.where(inside, x, 0.0)", NORM
    ),
    "pixels past the end of a chunk count": Break(
        GROUP_NORM, "x = tl.where(inside, x - pivot[None, :], 0.0)", "x = x - pivot[None, :]", NORM
    ),
    "eps is left out": Break(GROUP_NORM, "tl.sqrt(variance + tl.full((), eps, tl.float64).to(COMPUTE))", "tl.sqrt(variance)",
        ["test_triton_group_norm.py::test_constant_groups_are_finite"]),
    "SiLU's gradient is its sigmoid": Break(GROUP_NORM, "dy * s * (1.0 + z * (1.0 - s))", "dy * s", NORM),
    "the gradient forgets that the mean moves": Break(
        GROUP_NORM, "(a[None, :] + xhat * b[None, :])", "(xhat * b[None, :])", NORM
    ),
    "the gradient forgets that the variance moves": Break(GROUP_NORM, "(a[None, :] + xhat * b[None, :])", "(a[None, :])", NORM),
    "the shift's gradient forgets the variance": Break(GROUP_NORM, "(a[:, None] + mean_xhat * b[:, None])", "a[:, None]", NORM),
    "the norm's semaphore is left as it is": Break(
        GROUP_NORM, "        tl.store(semaphore_ptr + row, 0)\n        finish_moments", "        finish_moments", NORM_SEMAPHORES
    ),
    "the norm's rows are finished by the last program but one": Break(
        GROUP_NORM, "    if arrived == slices * c_blocks - 1:\n        tl.store(semaphore_ptr + row, 0)\n        finish_sums",
        "    if arrived == slices * c_blocks - 2:\n        tl.store(semaphore_ptr + row, 0)\n        finish_sums",
        NORM + NORM_SEMAPHORES,
    ),
    "the residual has the other sign": Break(LOG_PROB, "grad = r * slope", "grad = -r * slope", TRANSITION),
    "a coefficient has the other sign": Break(
        TILE, "fma(-sample_coef, sample, prev_sample)", "fma(sample_coef, sample, prev_sample)", TRANSITION
    ),
    "guidance takes its halves the other way round": Break(
        TILE, "fma(scale, cond - output, output)", "fma(scale, output - cond, cond)", TRANSITION
    ),
    "the unconditional half gets the whole gradient": Break(LOG_PROB, "((1.0 - scale) * grad)", "(grad)", TRANSITION),
    "the conditional half gets no factor": Break(LOG_PROB, "(scale * grad)", "(grad)", TRANSITION),
    "the last tile is left out where it is not full": Break(
        TILE, "tl.cdiv(pixels - first, P_BLOCK)", "(pixels - first) // P_BLOCK", TRANSITION
    ),
    "a program walks one tile of its four": Break(
        LOG_PROB, "range(tiles_left(first, pixels, P_BLOCK, TILES))", "range(1)",
        ["test_triton_transition.py::test_contiguous[four tiles, one short-None-mean]"],
    ),
    "noise past the end of the row counts": Break(
        DENOISE, "noise = tl.where(mask, noise, 0.0)", "noise = tl.where(mask, noise, noise)", STEP
    ),
    "stores go past the end of the row": Break(
        DENOISE, "tl.store(prev_at, prev_sample, mask=mask)", "tl.store(prev_at, prev_sample, mask=mask | True)",
        [f"{WRITTEN}[step by noise (3, 5, 7) contiguous]"],
    ),
    "the gradient is half precision before it is scaled": Break(
        LOG_PROB, "grad = r * slope", "grad = (r * slope).to(tl.float16).to(COMPUTE)", TRANSITION
    ),
    "squares add up in half precision": Break(
        LOG_PROB, "squares = fma(z, z, squares)", "squares = fma(z, z, squares).to(tl.float16).to(COMPUTE)", TRANSITION
    ),
    "log std is dropped": Break(TILE, "tl.log(std).to(tl.float64) + ", "0 * std.to(tl.float64) + ", TRANSITION),
    "the residual is not divided by std": Break(LOG_PROB, "z = r * inverse_std", "z = r", TRANSITION),
    "the gradient is divided by std once": Break(
        LOG_PROB, "output_coef * inverse_std * inverse_std", "output_coef * inverse_std", TRANSITION
    ),
    "the reciprocal is the guess it starts from, at half precision": Break(
        TILE, "    y = 1.0 / x\n", "    return (1.0 / x).to(tl.float16).to(x.dtype)\n    y = 1.0 / x\n", TRANSITION
    ),
    "mean is sum and sum is mean": Break(TILE, "    if MEAN:\n", "    if not MEAN:\n", TRANSITION),
    "the mean's gradient is the sum's": Break(
        LOG_PROB, "slope = slope / size.to(COMPUTE)", "slope = slope / 1.0", TRANSITION
    ),
    "the last program writes its own sum": Break(
        TILE, "write_log_prob(total, std", "write_log_prob(squares.to(tl.float64), std",
        ["test_triton_transition.py::test_contiguous[nine programs, the last with one element-None-mean]"],
    ),
    "the last program but one finishes a row": Break(
        TILE, "if arrived == splits - 1:", "if arrived == splits - 2:", SEMAPHORES
    ),
    "semaphores are not put back": Break(
        TILE, "tl.store(semaphore_ptr + row, 0)", "tl.store(semaphore_ptr + row, splits)", SEMAPHORES
    ),
    "the loss does not put its semaphore back": Break(
        PRDP, "tl.store(semaphore_ptr, 0)", "tl.store(semaphore_ptr, numbers)", SEMAPHORES
    ),
    "slices of the steps are left out": Break(
        PRDP, "for start in range(0, slices, S_BLOCK):", "for start in range(0, 1, S_BLOCK):", LOSS
    ),
    "a slice is its first tile": Break(
        PRDP, "tl.minimum(first + tiles * T_BLOCK, steps)", "tl.minimum(first + T_BLOCK, steps)", LOSS
    ),
    "the pairs of a large group are those of some images": Break(
        PRDP, "for first in range(0, B_BLOCK, 4096 // B_BLOCK):", "for first in range(0, B_BLOCK // 2, 4096 // B_BLOCK):", LOSS
    ),
    "an image of a large group has the mean of another": Break(
        PRDP, "is_image = image[:, None] == other[None, :]", "is_image = (image[:, None] ^ 1) == other[None, :]", LOSS
    ),
    "the mean over the steps of a large group is a sum": Break(
        PRDP, "tl.where(other_kept, log_ratios / count, 0.0)", "tl.where(other_kept, log_ratios, 0.0)", LOSS
    ),
    "every block of a group without a pair counts": Break(
        PRDP, "(all_pairs == 0) & (block == 0)", "(all_pairs == 0) & (block >= 0)",
        ["test_triton_loss.py::test_large_groups_without_a_pair_and_removed_images"],
    ),
    "the backward forgets the upstream gradient": Break(
        PRDP, "upstream * at_outside, upstream * at_inside", "upstream * at_outside, at_inside", LOSS
    ),
    "channels-last is read as if it were contiguous": Break(
        LAYOUT, "alike = all(s == strides[0] for s in strides)", "alike = True",
        ["test_triton_transition.py::test_layouts[contiguous]", *TRANSITION],
    ),
    "noise is numbered by memory": Break(
        LAYOUT, "(not in_order and is_dense(tensors[0]))", "is_dense(tensors[0])",
        ["test_triton_transition.py::test_all_channels_last_rows_are_not_numbered_by_memory"],
    ),
    "offsets inside a tile wrap at 32 bits": Break(
        TILE, "pixel = pixel.to(tl.int64)", "pixel = pixel.to(tl.int32)",
        ["test_triton_transition.py::test_offsets_beyond_32_bits[1048576-1-2097152-1-2048]"],
    ),
    "the step adds noise without std": Break(DENOISE, "std * noise", "noise", STEP),
    "a deterministic row gets a log-prob": Break(DENOISE, "std, std == 0, log_prob_ptr", "std, False, log_prob_ptr", STEP),
    "the step's log-prob is that of the noise": Break(
        DENOISE, "z = residual(prev_sample, sample, output, sample_coef, output_coef) * inverse_std", "z = noise",
        ["test_triton_transition.py::test_log_prob_of_a_step_has_the_bits_of_its_evaluation[mean-5.0-contiguous]"],
    ),
    "the noise has another key": Break(
        PHILOX, "k0, k1 = seed.to(tl.uint32), (seed >> 32)", "k0, k1 = seed.to(tl.uint32), (seed >> 31)", NOISE
    ),
    "Philox has nine rounds": Break(PHILOX, "tl.static_range(10)", "tl.static_range(9)", NOISE),
    "the counter has one word": Break(PHILOX, ".to(tl.uint32) ^ c1 ^ k0", ".to(tl.uint32) ^ k0", NOISE),
    "the step is not in the counter": Break(
        PHILOX, "product1 = tl.mul(c2.to(tl.uint64)", "product1 = tl.mul((c2 ^ 1).to(tl.uint64)", NOISE
    ),
    "sin and cos change places": Break(
        PHILOX, "radius * sine_at(n + 1, sine, cosine), radius * sine_at(n, sine, cosine)",
        "radius * sine_at(n, sine, cosine), radius * sine_at(n + 1, sine, cosine)", NOISE,
    ),
    "the logarithm lacks a term": Break(PHILOX, "p = plus(p, f, 0.0833329953963)", "p = plus(p, f, 0.0)", NOISE),
    "the logarithm of 2 has a wrong digit": Break(
        PHILOX, "-1.652591659e-07", "-1.652590295e-07", ["test_triton_philox.py::test_box_muller_is_right_to_a_few_roundings"]
    ),
    "the lower half of the circle has the wrong sign": Break(PHILOX, "((n << 30) & 0x80000000)", "((n << 30) & 0)", NOISE),
    "an odd plane's elements take the other half of their pair": Break(
        PHILOX, "sine_at(n + 1 - (word & 1), sine, cosine)", "sine_at(n + (word & 1), sine, cosine)", NOISE
    ),
    "an odd plane's elements take the other pair": Break(
        PHILOX, "radius_of(tl.where(first, a, c))", "radius_of(tl.where(first, c, a))", NOISE
    ),
    "words of a block change places": Break(
        PHILOX, "        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (P_BLOCK,))",
        "        return tl.reshape(tl.join(tl.join(n0, n1), tl.join(n2, n3)), (P_BLOCK,))", NOISE,
    ),
    "nothing is clipped": Break(
        PRDP, "return delta - tl.minimum(tl.maximum(delta, -clip), clip)", "return 0 * delta", LOSS
    ),
    "the clip passes its gradient outside": Break(
        PRDP, "return (through_all * slope).to", "return (through_all * slope + through_inside * slope).to", LOSS
    ),
    "the clip passes its gradient outside where the gradient waits": Break(
        PRDP, "grad = tl.where(is_clipped(delta, clip), at_outside, at_inside)",
        "grad = tl.where(is_clipped(delta, clip), at_inside, at_inside)", LOSS,
    ),
    "the clip passes its gradient outside in two tiles": Break(
        PRDP, "tl.where(is_clipped(delta, clip), at_outside[:, None], at_inside[:, None])",
        "tl.where(is_clipped(delta, clip), at_inside[:, None], at_inside[:, None])",
        ["test_triton_loss.py::test_sizes[1-16-130]", "test_triton_loss.py::test_sizes[1-64-34]"],
    ),
    "the clip's edge passes no gradient": Break(
        PRDP, "return tl.abs(delta) > clip", "return tl.abs(delta) >= clip", LOSS
    ),
    "pairs have the other sign": Break(
        PRDP, "target = quotient(difference,", "target = quotient(-difference,", LOSS
    ),
    "a quotient lacks its correction, and has half its digits": Break(
        PRDP, "    q = x * inverse\n", "    return (x * inverse).to(tl.float32).to(tl.float64)\n    q = x * inverse\n", LOSS
    ),
    "the smaller branch is taken": Break(PRDP, "(2 * u + shift) <= 0) == 0", "(2 * u + shift) <= 0) != 0", LOSS),
    "branches are compared by their squares, in float32": Break(
        PRDP, "clipped = (shift * (2 * u + shift) <= 0) == 0",
        "clipped = ((u + shift) * (u + shift)).to(tl.float32) > (u * u).to(tl.float32)", LOSS,
    ),
    "the mean over steps is a sum": Break(
        PRDP, "tl.where(kept, tl.sum(log_ratios, 1) / count, 0.0)", "tl.where(kept, tl.sum(log_ratios, 1), 0.0)", LOSS
    ),
    "the gradient is not divided by the steps": Break(
        PRDP, "slope = 2 * weight / count", "slope = 2 * weight", LOSS
    ),
    "removed images are in pairs": Break(
        PRDP, "both = kept[:, None] & other_kept[None, :]", "both = (kept[:, None] | True) & (other_kept[None, :] | True)", LOSS
    ),
    "only the first sixteen images are in pairs": Break(
        PRDP, "for first in range(0, images, OTHERS)", "for first in range(0, 1)", LOSS
    ),
    "the weight forgets the groups": Break(PRDP, "1.0 / (groups * tl.maximum", "1.0 / (1.0 * tl.maximum", LOSS),
    "statistics change places": Break(PRDP, "tl.where(of_image == 7, right", "tl.where(of_image == 7, targets", LOSS),
    "statistics are off by one": Break(PRDP, "tl.store(stats_ptr + column - 1,", "tl.store(stats_ptr + (column + 6) % 8,", LOSS),
    "plans do not look at strides": Break(LAUNCH, "t.shape, t.stride(), t.dtype", "t.shape, t.dtype", MIXED_UP),
    "plans do not look at dtypes": Break(LAUNCH, "t.stride(), t.dtype, t.device", "t.stride(), t.device", MIXED_UP),
    "plans do not look at shapes": Break(LAUNCH, "(type(t), t.shape, t.stride()", "(type(t), t.stride()", MIXED_UP),
    "plans do not look at options": Break(LAUNCH, "return op, options, tuple(", "return op, tuple(", MIXED_UP),
    "kept kernels do not look at alignment": Break(LAUNCH, "if low & 15 else 0", "if False else 0", MIXED_UP),
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    """Asks run_broken.py: (folder of kernels, tests) -> (exit status, output)."""
    command = [sys.executable, str(HERE / "run_broken.py")]
    env = {name: value for name, value in os.environ.items() if name != "PRDP_TEST_SHARE"}  # of the selected tests, all
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:

        def ask(kernels: Path, tests: list[str]) -> tuple[int, str]:
            request = {"kernels": str(kernels), "tests": [f"tests/kernels/{test}" for test in tests]}
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, "run_broken.py ended"
            answer = json.loads(line)
            return answer["status"], answer["output"]

        yield ask
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "prdp_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_copy_that_is_not_broken_passes(server, copy):
    status, output = server(copy, sorted({test for broken in BREAKS.values() for test in broken.tests}))
    assert status == 0, output[-4000:]


def test_the_copy_is_what_runs(server, copy):
    """And not the repository's own kernels, with which every break below would pass for none."""
    (copy / "prdp_kernels" / "tile.py").write_text("raise RuntimeError('the copy')\n")
    status, output = server(copy, TRANSITION[:1])
    assert status != 0 and "the copy" in output


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_noticed(name, server, copy):
    broken = BREAKS[name]
    file = copy / "prdp_kernels" / broken.file
    text = file.read_text()
    assert text.count(broken.right) == 1, f"{broken.file} has {broken.right!r} {text.count(broken.right)} times: mend this test"
    file.write_text(text.replace(broken.right, broken.wrong))
    status, output = server(copy, broken.tests)
    assert status == 1, f"no test noticed that {name}" if status == 0 else output[-4000:]
    assert re.search(r"^E +(assert |AssertionError)", output, re.M), f"{name}: fails without a comparison\n{output[-4000:]}"
    crashes = [error for error in re.findall(r"^E +(?:\w+\.)*(\w+Error)\b", output, re.M) if error != "AssertionError"]
    assert not crashes, f"{name}: fails by {', '.join(crashes)}, not by a comparison\n{output[-4000:]}"
