import hashlib

import numpy as np
import torch

from blip_pipelines.objectives import draws


def splitmix64(key: int, row: int) -> float:
    """The published algorithm on unbounded integers."""
    mask = 2**64 - 1
    x = (key + (row + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x = x ^ (x >> 31)
    return (x >> 11) / 2**53


def test_draws_are_splitmix64_of_seed_step_purpose_and_row():
    rows = torch.tensor([0, 1, 2, 77, 10**12])
    key = int.from_bytes(hashlib.blake2b(b"7/3/negatives", digest_size=8).digest(), "little")
    expected = [splitmix64(key, int(row)) for row in rows]
    assert draws.uniform(7, 3, "negatives", rows).tolist() == expected


def test_splitmix64_matches_the_published_first_outputs():
    # First outputs of the reference implementation for seed 1234567, as whole 64-bit numbers.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, row) for row in range(3)] == [(x >> 11) / 2**53 for x in published]


def test_a_row_draws_the_same_number_in_any_company():
    rows = torch.arange(64)
    whole = draws.uniform(1, 2, "x", rows)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws.uniform(1, 2, "x", rows[shuffled]), whole[shuffled])
    assert torch.equal(torch.cat([draws.uniform(1, 2, "x", rows[:20]), draws.uniform(1, 2, "x", rows[20:])]), whole)


def test_draws_are_uniform_and_uncorrelated_over_rows_steps_and_purposes():
    count = 2**16
    rows = torch.arange(count)
    base = draws.uniform(0, 0, "a", rows).numpy()
    assert base.min() >= 0 and base.max() < 1
    # 64 bins: chi-square has mean 63 and standard deviation 11.2; 6 deviations are below one in a million.
    bins = np.bincount((base * 64).astype(int), minlength=64)
    assert ((bins - count / 64) ** 2 / (count / 64)).sum() < 63 + 6 * 11.2
    others = [draws.uniform(*args, rows).numpy() for args in [(1, 0, "a"), (0, 1, "a"), (0, 0, "b")]]
    for other in [*others, np.roll(base, 1)]:
        assert abs(np.corrcoef(base, other)[0, 1]) < 6 / count**0.5
