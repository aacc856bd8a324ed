"""Which rank is chosen, on losses that are made by hand."""

import pytest
import torch

from lora_nb.rank.choice import Losses, Score, choose, compared, interval, ladder, scores, search


def same(loss: float, n: int = 20) -> Losses:
    return Losses(torch.full((n,), loss * 3, dtype=torch.float64), torch.full((n,), 3.0, dtype=torch.float64))


def test_the_ladder_ends_at_the_run_s_own_rank() -> None:
    assert ladder(1) == [1]
    assert ladder(2) == [1, 2]
    assert ladder(8) == [1, 2, 4, 8]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    assert ladder(128)[-3:] == [32, 64, 128]


@pytest.mark.parametrize("true", range(1, 49))
def test_the_gap_below_the_choice_is_closed(true) -> None:
    tried = []

    def losses(r: int) -> Losses:
        tried.append(r)
        return same(1 + max(0, true - r) * 0.1 + max(0, r - true) * 1e-3)  # too few cost, too many are noise

    rank, table = search(losses, 48, 0.0)
    assert rank == true
    assert len(tried) == len(set(tried)) <= 7 + 5
    assert list(table) == sorted(tried)


def test_a_share_of_the_lowest_loss_is_let_pass() -> None:
    table = {1: same(2.1), 2: same(2.011), 4: same(2.009), 8: same(2.0)}
    assert choose(table, 0.005) == 4
    assert choose(table, 0.006) == 2
    assert choose(table, 0.0) == 8


def test_so_is_one_standard_error_of_the_difference_not_of_the_loss() -> None:
    hard = torch.tensor([1.0, 9.0] * 10, dtype=torch.float64)  # examples differ far more than ranks do
    one = torch.ones(20, dtype=torch.float64)
    noise = torch.tensor([0.3, -0.3] * 5 + [-0.3, 0.3] * 5, dtype=torch.float64)
    table = {1: Losses(hard + 0.1, one), 2: Losses(hard + 0.05 + noise, one), 4: Losses(hard, one)}
    found = scores(table)
    assert found[1] == Score(pytest.approx(5.1), pytest.approx(0.1), pytest.approx(0.0, abs=1e-9))
    assert found[2].error == pytest.approx(0.3 / 19**0.5)
    assert choose(table, 0.0) == 2  # 0.05 is within 0.069; 0.1 is certain


def test_the_error_is_that_of_a_mean_over_tokens() -> None:
    """Against 4,000 resamples of examples of unequal length."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (80,), generator=g).double()
    one = Losses(tokens * torch.randn(80, generator=g).double(), tokens)
    other = Losses(one.sums + tokens * (0.2 + 0.5 * torch.randn(80, generator=g).double()), tokens)
    score = compared(other, one)
    i = torch.randint(80, (4000, 80), generator=g)
    resampled = (other.sums - one.sums)[i].sum(1) / tokens[i].sum(1)
    assert score.above == pytest.approx(other.mean - one.mean)
    assert score.error == pytest.approx(float(resampled.std()), rel=0.05)


def test_the_interval_is_narrow_where_examples_agree_and_wide_where_not() -> None:
    sure = {r: same(1 + max(0, 8 - r) * 0.1) for r in ladder(16)}
    assert interval(sure, 0.005, 8) == (8, 8)
    g = torch.Generator().manual_seed(0)
    torn = {
        r: Losses(1 + max(0, 8 - r) * 0.02 * (1 + 8 * torch.randn(30, generator=g).double()), torch.ones(30, dtype=torch.float64))
        for r in ladder(16)
    }
    low, high = interval(torn, 0.0, choose(torn, 0.0))
    assert low < high
    assert low <= choose(torn, 0.0) <= high
    assert interval(torn, 0.0, choose(torn, 0.0)) == (low, high)  # drawn alike each time
