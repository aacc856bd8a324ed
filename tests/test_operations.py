"""Counts that can be told by eye."""

import torch
import torch.nn.functional as F

from lora_nb.operations import count_operations

X, W = torch.randn(2, 3, 5), torch.randn(7, 5)


def test_a_linear_layer_is_one_product_however_many_views_it_takes() -> None:
    assert count_operations(lambda: F.linear(X, W)) == (1, 2 * (2 * 3) * 5 * 7)


def test_what_is_added_in_place_counts() -> None:
    into, a, b = torch.zeros(4, 6), torch.randn(4, 3), torch.randn(3, 6)
    assert count_operations(lambda: into.addmm_(a, b, alpha=0.5)) == (1, 2 * 4 * 3 * 6)


def test_a_matrix_times_a_vector_counts() -> None:
    """As LoRA computes a single token."""
    into, v = torch.zeros(7), torch.randn(5)
    assert count_operations(lambda: torch.mv(W, v)) == (1, 2 * 7 * 5)
    assert count_operations(lambda: into.addmv_(W, v, alpha=0.5)) == (1, 2 * 7 * 5)


def test_views_are_free_and_elementwise_operations_are_not() -> None:
    assert count_operations(lambda: X.view(6, 5).T[1:3].unsqueeze(0)) == (0, 0)
    assert count_operations(lambda: (X + 1).mul_(2)) == (2, 0)


def test_what_is_computed_once_and_kept_is_not_counted() -> None:
    kept: list[torch.Tensor] = []

    def run() -> None:
        if not kept:
            kept.append(W @ W.T)
        X.neg()

    assert count_operations(run) == (1, 0)
