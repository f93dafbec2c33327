import pytest
import torch
from torch import nn

from diffora.kernels.dropout import CheapDropout, kept_share, threshold_of, use_cheap_dropout


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_mean_and_independence(rate, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 101, dtype=dtype)
    y = CheapDropout(rate)(x)
    dropped = (y == 0).float()
    applied = 1 - kept_share(threshold_of(rate))
    assert applied == pytest.approx(rate, abs=1 / 512)
    error = 4 * (applied * (1 - applied) / x.numel()) ** 0.5
    assert dropped.mean().item() == pytest.approx(applied, abs=error)
    assert y.max().item() == pytest.approx(1 / (1 - applied), rel=1e-2)
    for shift in (1, 8):  # bytes of one word, and of the next
        together = (dropped[:, shift:] * dropped[:, :-shift]).mean().item()
        assert together == pytest.approx(applied**2, abs=4 * (applied**2 / x.numel()) ** 0.5)


def test_the_gradient_has_the_mask_of_the_output():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)

    def output(x):
        torch.manual_seed(1)
        return CheapDropout(0.5)(x)

    assert torch.autograd.gradcheck(output, (x,)) and torch.autograd.gradgradcheck(output, (x,))


def test_same_seed_same_mask_and_none_in_evaluation():
    x, layer = torch.randn(3, 4), CheapDropout(0.5)
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    assert layer.eval()(x) is x
    assert CheapDropout(0.0)(x) is x


def test_rates_between_two_bytes_are_exact():
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    assert not CheapDropout(1.0)(x).any()
    for rate in (0.001, 0.999):
        dropped = (CheapDropout(rate)(x) == 0).float().mean().item()
        assert dropped == pytest.approx(rate, abs=4 * (0.001 / x.numel()) ** 0.5)


def test_all_memory_layouts():
    x = torch.randn(6, 4, 5).transpose(0, 2)
    torch.manual_seed(0)
    y = CheapDropout(0.5)(x)
    torch.testing.assert_close(y[y != 0], 2 * x[y != 0])
    assert 0 < (y != 0).sum() < y.numel()


def test_every_plain_dropout_is_replaced():
    class Other(nn.Dropout):
        pass

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.1), Other(0.2))).eval()
    use_cheap_dropout(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [CheapDropout, CheapDropout, Other]
    assert model[1].p == 0.3 and not model[1].training
