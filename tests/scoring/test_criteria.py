"""The criteria as pure functions."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForSequenceClassification,
)

from diffora.core.grid import find_grid
from diffora.scoring.criteria import (
    condition_number,
    counted_tokens,
    direction_norm,
    gradient_norm,
    mean_of_types,
    mean_square,
    norm_sums,
    ranked_in_types,
    reads_targets,
    signal_to_noise,
    square_sums,
    weight_times_activation,
)
from diffora.scoring.measures import MEASURES

NAN, INF = float("nan"), float("inf")


def test_gradient_norm_is_frobenius():
    gradient = torch.randn(3, 4, dtype=torch.float64)
    expected = math.sqrt(sum(v * v for row in gradient.tolist() for v in row))
    assert gradient_norm(gradient).item() == pytest.approx(expected, rel=1e-12)


def test_weight_times_activation_against_a_plain_loop_without_padding():
    weight, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    x[mask == 0] = 100.0  # must not count
    tokens = [x[b, t].tolist() for b in range(2) for t in range(5) if mask[b, t]]
    norms = [math.sqrt(sum(token[j] ** 2 for token in tokens) / len(tokens)) for j in range(4)]
    expected = sum(abs(weight[i, j].item()) * norms[j] for i in range(3) for j in range(4)) / 12
    squares, count = square_sums(x, mask)
    assert count == 7
    assert weight_times_activation(weight, squares / count).item() == pytest.approx(expected, rel=1e-12)


def test_square_sums_add_up_over_parts():
    x, mask = torch.randn(6, 5, 4), torch.rand(6, 5) > 0.4
    whole, parts = square_sums(x, mask), [square_sums(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(whole[0], sum(p[0] for p in parts))
    assert whole[1] == sum(p[1] for p in parts)


def test_square_sums_of_half_precision_do_not_overflow():
    squares, _ = square_sums(torch.full((1, 2, 3), 1000.0, dtype=torch.float16), torch.ones(1, 2))
    assert squares.tolist() == [2e6] * 3


def test_padding_does_not_count_whatever_it_holds():
    """Positions that see no token hold NaN in some models. Masks of packed rows number the rows 1, 2, …"""
    x, mask = torch.arange(24.0).view(2, 3, 4), torch.tensor([[1, 2, 0], [3, 0, 0]])
    x[mask == 0] = NAN
    squares, count = square_sums(x, mask)
    assert count == 3
    torch.testing.assert_close(squares, x[mask != 0].square().sum(0))


@pytest.mark.parametrize("shape", [(2, 3, 5), (6, 5), (30,)])
def test_rows_of_choices_are_counted_in_the_shape_in_which_they_are_read(shape):
    mask = (torch.arange(30) % 5 < 3).view(2, 3, 5)  # rows x choices x tokens
    counted = counted_tokens(torch.zeros(*shape, 4), {"attention_mask": mask})
    assert counted.shape == shape and counted.flatten().equal(mask.flatten())
    assert counted_tokens(torch.zeros(7, 6, 4), {"attention_mask": mask}).all()  # tokens of something else


def test_tokens_x_rows_are_counted_as_rows_x_tokens():
    mask = torch.arange(12).view(3, 4) % 4 < 3
    counted = counted_tokens(torch.zeros(4, 3, 5), {"attention_mask": mask})
    assert counted.equal(mask.T)


@pytest.mark.parametrize("criterion", ["activation", "plop"])
def test_the_padding_that_longformer_adds_does_not_count(criterion):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LongformerConfig(vocab_size=50, attention_window=8, **shape)
    torch.manual_seed(0)
    model = LongformerForSequenceClassification(config).eval()
    measure = MEASURES[criterion](model, find_grid(model, candidates=["attention.self.query", "output.dense"]))
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    batch = {"input_ids": torch.randint(5, 50, (2, 11)), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    sums = measure.of(batch, lambda batch: model(**batch).loss)
    assert [int(count) for count in sums[len(sums) // 2 :]] == [17] * 4


def test_leds_encoder_pads_and_what_its_decoder_reads_of_it_is_not_padded():
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=50, attention_window=8, **shape, **heads)).eval()
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    batch = {
        "input_ids": torch.randint(5, 50, (2, 11)),
        "attention_mask": mask,
        "labels": torch.tensor([[7, 8, 2]] * 2),
    }
    read = {}
    for name, module in model.named_modules():
        if name.endswith(("encoder.layers.0.fc1", "encoder_attn.k_proj", "self_attn.longformer_self_attn.query")):
            module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    model(**batch)
    counted = [int((counted_tokens(x, batch, config=model.config) != 0).sum()) for x in read.values()]
    assert len({x.shape for x in read.values()}) == 3 and counted == [17] * 3


class Beside(nn.Module):
    """A module with others inside, by name."""

    def __init__(self, **inside):
        super().__init__()
        for name, module in inside.items():
            self.add_module(name, module)


def test_a_decoder_reads_targets_only_if_an_encoder_is_beside_it():
    def stack():
        return Beside(layer=nn.Linear(2, 2))

    def both():
        return Beside(encoder=stack(), decoder=stack())

    seq2seq, opt = Beside(model=both()), Beside(model=Beside(decoder=stack()))
    reads_images = Beside(vision=Beside(encoder=stack()), language_model=opt)  # as BLIP-2 with OPT
    assert reads_targets("model.decoder.layer", seq2seq) and not reads_targets("model.encoder.layer", seq2seq)
    assert reads_targets("decoder.model.decoder.layer", Beside(encoder=stack(), decoder=opt))
    assert not reads_targets("model.decoder.layer", opt)
    assert not reads_targets("language_model.model.decoder.layer", reads_images)


def test_xlnet_reads_tokens_before_rows_also_if_there_are_as_many():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    found = counted_tokens(torch.zeros(3, 3, 4), {"attention_mask": mask}, config=SimpleNamespace(model_type="xlnet"))
    assert torch.equal(found, mask.T)
    assert torch.equal(counted_tokens(torch.zeros(3, 3, 4), {"attention_mask": mask}), mask)


def test_the_mean_square_of_a_gradient():
    gradient = torch.randn(3, 4, dtype=torch.float64)
    assert mean_square(gradient).item() == pytest.approx(np.mean(gradient.numpy() ** 2), rel=1e-12)


def test_norm_sums_against_a_plain_loop():
    """Padding does not count, nor does a token whose input is all zero. The scale of a token does not matter."""
    weight, x = torch.randn(6, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    x[mask == 0], x[0, 3], x[0, 1] = 100.0, 0.0, 7 * x[0, 1]
    tokens = [x[b, t].numpy() for b, t in ((0, 0), (0, 1), (0, 2), (0, 4), (1, 0), (1, 1))]
    expected = sum(np.linalg.norm(weight.numpy() @ z) / np.linalg.norm(z) for z in tokens)
    total, count = norm_sums(weight, x, mask)
    assert count == 6 and total.item() == pytest.approx(expected, rel=1e-12)
    parts = [norm_sums(weight, x[:, at], mask[:, at]) for at in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(part[0] for part in parts), total)


def test_the_norm_for_random_directions_against_its_known_values():
    """For c times the identity it is c. For one row it is E|u_1|, known in closed form."""
    assert direction_norm(3.0 * torch.eye(8, dtype=torch.float64), 0).item() == pytest.approx(3.0, rel=1e-12)
    n = 16
    known = math.gamma(n / 2) / (math.sqrt(math.pi) * math.gamma((n + 1) / 2))
    row = torch.zeros(1, n, dtype=torch.float64).index_fill(1, torch.tensor([5]), 1.0)
    found = [direction_norm(row, seed).item() for seed in range(16)]
    assert np.mean(found) == pytest.approx(known, rel=0.02) and np.std(found) / known < 0.04
    assert direction_norm(row, 0) == direction_norm(row, 0) != direction_norm(row, 1)


def test_the_mean_of_a_type_is_over_the_layers_that_have_it():
    found = mean_of_types(torch.tensor([[1.0, 2.0], [3.0, NAN]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 2.0], [2.0, NAN]]), equal_nan=True)


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_the_condition_number_against_numpy(shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert condition_number(weight) == pytest.approx(values[0] / (values[-1] + 1e-8), rel=1e-4)
    assert condition_number(weight) == pytest.approx(condition_number(5 * weight), rel=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_the_signal_to_noise_ratio_against_numpy(shape):
    torch.manual_seed(0)
    weight = torch.randn(*shape, dtype=torch.float64) + 5 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    iqr = np.percentile(values, 75) - np.percentile(values, 25)
    edge = iqr / 1.349 * (1 + math.sqrt(min(shape) / max(shape)))
    signal, noise = values[values > edge].sum(), values[values <= edge].sum()
    assert noise > 0 and signal_to_noise(weight) == pytest.approx(signal / noise / values[0], rel=1e-9)
    assert signal_to_noise(2 * weight) == pytest.approx(signal_to_noise(weight) / 2)  # as published, scale matters


def test_a_weight_without_noise_or_without_signal():
    assert signal_to_noise(torch.eye(4)) == INF and signal_to_noise(torch.zeros(4, 4)) == 0.0


def test_ranks_are_within_a_type_and_values_order_equal_ranks():
    values = torch.tensor([[1.0, 100.0, INF], [2.0, 300.0, NAN], [0.5, 200.0, NAN], [2.0, 400.0, 0.0]])
    found = ranked_in_types(values)
    v = {x: x / (1 + x) for x in (1.0, 2.0, 0.5, 100.0, 300.0, 200.0, 400.0)}
    expected = [
        [(1 + v[1.0]) / 4, (0 + v[100.0]) / 4, (1 + 1) / 2],
        [(2 + v[2.0]) / 4, (2 + v[300.0]) / 4, NAN],
        [(0 + v[0.5]) / 4, (1 + v[200.0]) / 4, NAN],
        [(2 + v[2.0]) / 4, (3 + v[400.0]) / 4, 0.0],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    best_half = found >= 0.5
    assert best_half[:, 0].tolist() == [False, True, False, True] == best_half[:, 1].tolist()
