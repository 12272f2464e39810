"""Philox against the known answers of Random123, a scalar implementation, and the statistics of a normal."""

import math

import pytest
import torch
from compare import DEVICE
from properties import given, settings, st

from prdp_kernels import derive_seeds, philox_normal
from prdp_kernels.philox import reference

M = 0xFFFFFFFF
INT64 = st.integers(-(2**63), 2**63 - 1)


def scalar_philox(counter, key):
    """Python integers: nothing to overflow."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & M, (p >> 32) ^ d ^ m, p & M
        k, m = (k + 0x9E3779B9) & M, (m + 0xBB67AE85) & M
    return [a, b, c, d]


def scalar_normal(seed, step, element):
    block = element // 4
    counter = (block & M, block >> 32, step & M, reference.NORMAL_STREAM)
    words = scalar_philox(counter, (seed & M, (seed >> 32) & M))
    x, y = words[0:2] if element % 4 < 2 else words[2:4]
    u1, angle = (x + 0.5) * 2.0**-32, 2 * math.pi * y * 2.0**-32
    radius = math.sqrt(-2 * math.log(u1))
    return radius * (math.sin(angle) if element % 2 else math.cos(angle)), radius


def words(*values):
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((M, M, M, M), (M, M), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    assert [w.item() for w in reference.philox_4x32_10(words(*counter), words(*key))] == list(answer)
    assert scalar_philox(counter, key) == list(answer)


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, M)] * 4), st.tuples(*[st.integers(0, M)] * 2))
def test_words_equal_the_scalar_implementation(counter, key):
    assert [w.item() for w in reference.philox_4x32_10(words(*counter), words(*key))] == scalar_philox(counter, key)


@settings(deadline=None, max_examples=50)
@given(INT64, st.integers(0, M), st.integers(1, 23))
def test_normals_equal_the_scalar_implementation(seed, step, size):
    got = philox_normal(torch.tensor([seed]), (size,), step=step)[0]
    expected, radius = torch.tensor([scalar_normal(seed, step, e) for e in range(size)], dtype=torch.float64).unbind(1)
    # The angle is off by half an ulp of 2 pi; u1 near 1 by half an ulp, which the square root magnifies by 1 / radius.
    assert ((got.double() - expected).abs() <= 4e-6 + 1e-7 / radius.clamp(min=1e-4)).all()


def test_box_muller_is_finite_at_both_ends():
    x = torch.tensor([0, 0, M, M])
    for z in reference.box_muller(x, x.flip(0)):
        assert z.isfinite().all() and z.abs().max() < 6.77


def test_blocks_beyond_32_bits_differ():
    low, high = reference.split(torch.tensor([5, 2**32 + 5, -1]))
    assert low.tolist() == [5, 5, M] and high.tolist() == [0, 1, M]


@settings(deadline=None, max_examples=30)
@given(st.lists(INT64, min_size=1, max_size=5), st.lists(st.integers(1, 5), max_size=3), st.integers(0, M))
def test_an_element_depends_on_seed_step_and_index_alone(seeds, shape, step):
    seeds, size = torch.tensor(seeds), math.prod(shape)
    batch = philox_normal(seeds, shape, step=step)
    assert batch.shape == (len(seeds), *shape) and batch.dtype == torch.float32
    longer = philox_normal(seeds, (size + 9,), step=step)
    assert torch.equal(batch.flatten(1) if shape else batch.reshape(-1, 1), longer[:, :size])
    for i in range(len(seeds)):
        assert torch.equal(batch[i : i + 1], philox_normal(seeds[i : i + 1], shape, step=step))
    assert torch.equal(batch.flip(0), philox_normal(seeds.flip(0), shape, step=step))


def test_steps_may_differ_by_row():
    seeds, steps = torch.tensor([3, 3, -7]), torch.tensor([0, 49, 2**32 - 1])
    rows = philox_normal(seeds, (5,), step=steps)
    for i, step in enumerate(steps.tolist()):
        assert torch.equal(rows[i], philox_normal(seeds[i : i + 1], (5,), step=step)[0])
    assert not torch.equal(rows[0], rows[1])


def test_empty():
    assert philox_normal(torch.zeros(0, dtype=torch.int64), (4, 2)).shape == (0, 4, 2)
    assert philox_normal(torch.tensor([1]), (0, 3)).shape == (1, 0, 3)


def kolmogorov(z):
    """sqrt(n) sup |empirical - normal| distribution; above 1.95 with probability 0.001."""
    z = z.double().sort().values
    cdf, n = 0.5 * (1 + torch.erf(z / math.sqrt(2))), len(z)
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((rank[1:] - cdf).max().item(), (cdf - rank[:-1]).max().item())


# (seeds, elements of a row): the interpreter of Triton takes its time for every row, little for what is in it.
@pytest.mark.parametrize(("backend", "rows", "size"), [("torch", 128, 256), ("triton", 16, 2048)])
def test_statistics(backend, rows, size):
    """Of consecutive seeds and steps, which is how a careless counter would show."""
    if backend == "triton":
        pytest.importorskip("triton")
    seeds = torch.arange(-rows // 2, rows // 2, device=DEVICE if backend == "triton" else "cpu")
    z = torch.stack([philox_normal(seeds, (size,), step=s, backend=backend).cpu() for s in range(4)]).double()
    n = z.numel()
    # Moments within 4 standard errors: var(z) = 1, var(z^2) = 2, var(z^3) = 15, var(z^4) = 96.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert kolmogorov(z.flatten()) < 1.95
    for k in range(4):
        assert kolmogorov(z[..., k::4].flatten()) < 1.95
    # Correlations, also of squares, between steps, seeds and elements (the halves of a Box-Muller pair included).
    for x in (z, (z.square() - 1) / math.sqrt(2)):
        for dim in range(3):
            for lag in (1, 2):
                m = z.shape[dim] - lag
                product = x.narrow(dim, 0, m) * x.narrow(dim, lag, m)
                assert abs(product.mean().item()) < 4.5 / math.sqrt(product.numel())
    # No number drawn twice, beyond what 2^32 words in float32 explain.
    assert z.unique().numel() > 0.99 * n


def test_derived_seeds():
    prompt, image = torch.meshgrid(torch.arange(40), torch.arange(16), indexing="ij")
    prompt, image = prompt.flatten(), image.flatten()
    seeds = {
        (seed, epoch): derive_seeds(seed, epoch, prompt, image)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (-1, 7), (2**63 - 1, 0))
    }
    everything = torch.cat(list(seeds.values()))
    assert everything.dtype == torch.int64 and everything.unique().numel() == 5 * 640
    assert torch.equal(derive_seeds(0, 1, prompt[5:9], image[5:9]), seeds[0, 1][5:9])
    # Order matters: prompt 3, image 2 is not prompt 2, image 3.
    assert not torch.equal(derive_seeds(0, 0, prompt[:16], image[:16]), derive_seeds(0, 0, image[:16], prompt[:16]))
    bits = (everything.unsqueeze(1) >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(len(everything))
    # The integers are part of what makes a run repeatable, so they may never change.
    assert derive_seeds(1, 2, torch.tensor([3]), torch.tensor([4])).item() == scalar_derive(1, 2, 3, 4)
    assert derive_seeds(-1, 2, torch.tensor([2**40]), torch.tensor([-4])).item() == scalar_derive(-1, 2, 2**40, -4)
    assert derive_seeds(0, 0, torch.tensor([0]), torch.tensor([0])).item() == PINNED


def scalar_derive(seed, *integers):
    state = seed & (2**64 - 1)
    for position, value in enumerate(integers):
        counter = (value & M, (value >> 32) & M, position, reference.SEED_STREAM)
        low, high, _, _ = scalar_philox(counter, (state & M, state >> 32))
        state = high << 32 | low
    return state - 2**64 if state >= 2**63 else state


PINNED = -8677100248800622823


def test_one_million_seeds_do_not_collide():
    n = 2**17
    seeds = derive_seeds(42, 0, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    assert seeds.unique().numel() == n


@pytest.mark.parametrize(
    ("seeds", "shape", "step", "error", "match"),
    [
        ([1], (2,), 0, TypeError, "seeds must be a torch.Tensor"),
        (torch.tensor([1.0]), (2,), 0, TypeError, "seeds must be torch.int64"),
        (torch.tensor([1], dtype=torch.int32), (2,), 0, TypeError, "int64"),
        (torch.tensor(1), (2,), 0, ValueError, "expected \\(N,\\)"),
        (torch.tensor([1]), (2, -1), 0, ValueError, "non-negative"),
        (torch.tensor([1]), (2.0,), 0, ValueError, "non-negative"),
        (torch.tensor([1]), (2,), -1, ValueError, "step is -1"),
        (torch.tensor([1]), (2,), 2**32, ValueError, "2\\*\\*32"),
        (torch.tensor([1]), (2,), 0.5, TypeError, "step must be"),
        (torch.tensor([1]), (2,), torch.tensor([1.0]), TypeError, "step must be torch.int64"),
        (torch.tensor([1]), (2,), torch.tensor([1, 2]), ValueError, "step has shape"),
    ],
)
def test_validation(seeds, shape, step, error, match):
    with pytest.raises(error, match=match):
        philox_normal(seeds, shape, step=step)


def test_derive_seeds_validation():
    one = torch.tensor([1])
    for args, error in (
        ((1.0, 0, one, one), TypeError),
        ((0, True, one, one), TypeError),
        ((2**63, 0, one, one), ValueError),
        ((0, 0, one.float(), one), TypeError),
        ((0, 0, one, torch.tensor([1, 2])), ValueError),
        ((0, 0, one[0], one[0]), ValueError),
    ):
        with pytest.raises(error):
            derive_seeds(*args)
