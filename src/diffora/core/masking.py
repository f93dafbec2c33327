"""Gradient masks of GM-LoRA: which directions of an adapter are trained in a step ([R] Algorithm 1)."""

import numpy as np
import torch
from torch import Tensor


def draw_rows(ranks: list[int], count: int | str, independent: bool, *where: int) -> list[tuple[Tensor, Tensor]]:
    """Draw for each adapter the rows of A and of B^T that are trained.

    Args:
        ranks: rank R of each adapter.
        count: how many directions are trained; ``half`` for half of each R, at least one. An adapter with this many
            directions or fewer is trained as a whole.
        independent: draw the rows of B^T separately (the second version of the released code); otherwise they are the
            same as those of A.
        where: whole numbers, such as seed and step. The draw depends on nothing else.

    Returns:
        For each adapter (rows of A, rows of B^T), sorted.

    >>> [(rows_of_a, rows_of_bt)] = draw_rows([8], 3, False, 0, 1)  # rank 8, seed 0, step 1
    >>> len(rows_of_a), torch.equal(rows_of_a, rows_of_bt)
    (3, True)
    """
    generator = np.random.default_rng(where)
    drawn = []
    for rank in ranks:
        size = max(1, rank // 2) if count == "half" else min(int(count), rank)
        sets = [torch.from_numpy(np.sort(generator.permutation(rank)[:size])) for _ in range(1 + independent)]
        drawn.append((sets[0], sets[-1]))
    return drawn


def train_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """The matrix with the same values, where only the given rows (dim 0) pass a gradient on."""
    trained = torch.zeros(len(matrix), 1, dtype=torch.bool, device=matrix.device)
    trained[rows] = True
    return torch.where(trained, matrix, matrix.detach())
