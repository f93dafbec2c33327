"""GM-LoRA: the index sets, and a layer that computes gradients only for the entries in these sets."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffora.core.masking import draw_rows
from diffora.kernels.fused import lowrank_linear

SCALE = 1.5


@pytest.mark.parametrize(("count", "sizes"), [(2, [2, 2, 2]), (5, [5, 4, 2]), ("half", [4, 2, 1])])
@pytest.mark.parametrize("independent", [False, True])
def test_sets_are_distinct_sorted_and_of_the_size_asked_for(count, sizes, independent):
    drawn = draw_rows([8, 4, 2], count, independent, 0, 1)
    for (a, b), size, rank in zip(drawn, sizes, [8, 4, 2], strict=True):
        for rows in (a, b):
            assert len(rows) == size and rows.tolist() == sorted(set(rows.tolist())) and 0 <= rows[0] <= rows[-1] < rank


def test_a_rank_of_one_is_never_masked():
    assert [rows.tolist() for rows in draw_rows([1], "half", False, 3)[0]] == [[0], [0]]


def test_draws_depend_on_seed_and_step_only():
    def draw(*where):
        return [rows.tolist() for pair in draw_rows([16] * 3, 5, True, *where) for rows in pair]

    first = draw(0, 1)
    torch.manual_seed(123)
    assert draw(0, 1) == first and draw(0, 2) != first and draw(1, 1) != first
    assert len({tuple(rows) for rows in first}) > 1  # adapters differ


def test_same_sets_unless_independent():
    same = draw_rows([16] * 10, 5, False, 0)
    assert all(torch.equal(a, b) for a, b in same)
    assert any(not torch.equal(a, b) for a, b in draw_rows([16] * 10, 5, True, 0))


def test_all_directions_are_equally_likely():
    counts = torch.zeros(8)
    for step in range(4000):
        counts[draw_rows([8], 2, False, 0, step)[0][0]] += 1
    assert (counts / 4000 - 0.25).abs().max() < 0.035  # five standard deviations


def tensors(dtype=torch.float64, grad=True):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 6), (5, 6), (5,), (4, 6), (4, 5)]
    return [torch.randn(s, dtype=dtype, generator=g).requires_grad_(grad) for s in shapes]


ROWS = torch.tensor([0, 2]), torch.tensor([1, 2, 3])


def layer(x, weight, bias, lora_a, lora_bt, rows=None, dropout=0.0):
    bias = None if bias is None else bias.detach()
    return lowrank_linear(x, lora_a, lora_bt, SCALE, weight=weight.detach(), bias=bias, rows=rows, dropout=dropout)


@pytest.mark.parametrize("x_needs_grad", [True, False])
def test_masking_changes_the_gradient_and_not_the_output(x_needs_grad):
    x, weight, bias, lora_a, lora_bt = tensors()
    x.requires_grad_(x_needs_grad)
    inputs = [t for t in (x, lora_a, lora_bt) if t.requires_grad]
    upstream = torch.randn(2, 3, 5, dtype=torch.float64)
    plain = layer(x, weight, bias, lora_a, lora_bt)
    masked = layer(x, weight, bias, lora_a, lora_bt, ROWS)
    torch.testing.assert_close(masked, plain)
    *grad_x, grad_a, grad_bt = torch.autograd.grad(masked, inputs, upstream)
    *whole_x, whole_a, whole_bt = torch.autograd.grad(plain, inputs, upstream)
    for ours, theirs in zip(grad_x, whole_x, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs, rows in ((grad_a, whole_a, ROWS[0]), (grad_bt, whole_bt, ROWS[1])):
        live = torch.zeros(4, 1, dtype=torch.float64)
        live[rows] = 1
        torch.testing.assert_close(ours, theirs * live)
        assert theirs[live[:, 0] == 0].abs().max() > 0.1


def test_masked_gradients_are_not_computed():
    """The weight gradients of A and B take 2 n r (in + out) operations. The masked share of them is saved."""
    n, rank, size, count = 64, 32, 128, 8
    x, weight = torch.randn(n, size, requires_grad=True), torch.randn(size, size)
    lora_a, lora_bt = (torch.randn(rank, size, requires_grad=True) for _ in range(2))

    def backward_flops(output):
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        return counter.get_total_flops()

    rows = torch.arange(count), torch.arange(count)
    whole = backward_flops(layer(x, weight, None, lora_a, lora_bt))
    masked = backward_flops(layer(x, weight, None, lora_a, lora_bt, rows))
    assert whole - masked == 2 * n * (rank - count) * 2 * size


def test_under_autocast_the_result_is_that_of_the_plain_layer():
    x, weight, bias, lora_a, lora_bt = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masked = layer(x, weight, bias, lora_a, lora_bt, ROWS)
        plain = layer(x, weight, bias, lora_a, lora_bt)
    assert masked.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(masked, plain, rtol=0.05, atol=0.1)
    masked.float().sum().backward()
    assert lora_a.grad.dtype == torch.float32 and lora_a.grad[[1, 3]].abs().max() == 0


def test_dropout_takes_the_same_masks_in_forward_and_backward():
    x, weight, bias, lora_a, lora_bt = tensors()
    torch.manual_seed(0)
    masked = layer(x, weight, bias, lora_a, lora_bt, ROWS, dropout=0.5)
    torch.manual_seed(0)
    plain = layer(x, weight, bias, lora_a, lora_bt, dropout=0.5)
    torch.testing.assert_close(masked, plain)
    ours, theirs = (torch.autograd.grad(y.sum(), [x, lora_a]) for y in (masked, plain))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][ROWS[0]], theirs[1][ROWS[0]])
