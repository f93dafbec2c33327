"""``diffora.search(..., ensemble=n)`` and ``diffora.select(..., ensemble=n)``: calls with other seeds, averaged."""

import numpy as np
import pytest
import torch
from library import Net, entropy_loss, pairs, state
from torch.utils.data import DataLoader, TensorDataset

import diffora
from diffora.core.ensemble import member_seed
from diffora.errors import UserError


def net():
    torch.manual_seed(0)
    return Net()


def loader():
    generator = torch.Generator().manual_seed(1)
    rows = TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 2, (24,), generator=generator))
    return DataLoader(rows, batch_size=4, shuffle=True)


def standardised(rows, over):
    values = np.array(rows, dtype=float)
    return (values - values.mean(over, keepdims=True)) / values.std(over, keepdims=True)


@pytest.mark.parametrize(("scope", "over"), [("layer", 1), ("global", None)])
def test_an_ensemble_is_the_mean_of_searches_with_other_seeds(scope, over):
    shared = {"loss": entropy_loss, "rounds": 2, "gamma_lr": 0.1, "scope": scope, "k": 1, "progress": False}
    found = diffora.search(net(), loader(), ensemble=3, seed=5, **shared)
    alone = [diffora.search(net(), loader(), seed=member_seed(5, number), **shared) for number in range(3)]
    assert len({str(each.gamma_bar) for each in alone}) == 3
    wanted = np.mean([standardised(np.log(each.gamma_bar), over) for each in alone], axis=0)
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-6, atol=1e-9)
    assert found.gamma_bar is None and found.ensemble == 3
    assert found.config["members"] == [member_seed(5, number) for number in range(3)]
    assert sum(map(sum, found.confidence)) == pytest.approx(len(found.names()))


def test_an_ensemble_of_scores_uses_other_batches_for_each_member():
    shared = {"loss": entropy_loss, "n_batches": 2, "k": 1, "progress": False}
    found = diffora.select(net(), "gradient", loader(), ensemble=2, **shared)
    alone = [diffora.select(net(), "gradient", loader(), seed=member_seed(0, number), **shared) for number in range(2)]
    wanted = np.mean([standardised(each.scores, 1) for each in alone], axis=0)
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-6, atol=1e-9)
    assert found.confidence is not None and "2 of" not in str(alone[0]).splitlines()[1]
    assert found.certainty == str(found).splitlines()[1]


def test_the_model_is_left_as_it_was():
    model = net()
    before = state(model)
    diffora.search(model, loader(), loss=entropy_loss, rounds=1, ensemble=2, progress=False)
    after = state(model)
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())
    assert torch.equal(after["random"], before["random"])
    rest = ("flags", "grads", "objects", "modes", "hooks")
    assert [after[key] for key in rest] == [before[key] for key in rest]


def test_the_same_batches_for_all_members_give_no_confidence(caplog):
    found = diffora.select(net(), "gradient", pairs(8), loss=entropy_loss, ensemble=4, progress=False)
    assert found.confidence is None and "have the same scores" in caplog.text
    assert found.selected == diffora.select(net(), "gradient", pairs(8), loss=entropy_loss, progress=False).selected


@pytest.mark.parametrize(
    ("ensemble", "batches", "words"),
    [
        (0, loader, "ensemble=0 must be a whole number from 1 to 100"),
        (2.0, loader, "ensemble=2.0 must be a whole number from 1 to 100"),
        (2, lambda: iter(pairs(8)), "can be read only once"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(ensemble, batches, words):
    for call in (lambda: diffora.search(net(), batches(), pairs(8), rounds=1, ensemble=ensemble),
                 lambda: diffora.select(net(), "gradient", batches(), ensemble=ensemble)):  # fmt: skip
        with pytest.raises(UserError, match=words.replace("(", r"\(")):
            call()


def test_a_choice_within_a_time_budget_has_no_confidence_of_the_choice_before():
    found = diffora.select(net(), "random", ensemble=3, k=1)
    batch = next(iter(loader()))
    within = diffora.within_time(net(), found, batch, 0.9, loss=entropy_loss)
    assert found.confidence is not None and within.confidence is None
    assert within.scores == found.scores and within.lowest_layer > 0
