"""Which directions of an adapter are trained in a step: the index sets of [R] Algorithm 1."""

import numpy as np
import torch
from torch import Tensor


def draw_rows(ranks: list[int], count: int | str, independent: bool, *where: int) -> list[tuple[Tensor, Tensor]]:
    """For each adapter, the sorted numbers of the rows of A and of B^T that are trained.

    Args:
        ranks: R of each adapter.
        count: how many directions are trained; ``half`` for half of each R, at least one. An adapter with no more
            directions than that is trained whole.
        independent: draw B's set apart from A's (the released code's second version); otherwise they are the same.
        where: whole numbers, such as seed and step, that alone determine the draw.
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
