"""The ridge is scikit-learn's, its leave-one-out errors are those of refitting, and R² tells structure from noise."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeCV

from diffora.scoring.additive import RIDGES, fit_additive


def masks_of(n=60, layers=3, types=4, k=2, seed=0):
    """K of N modules in each layer."""
    ranks = np.random.default_rng(seed).random((n, layers, types)).argsort(-1)
    return (ranks < k).reshape(n, -1)


def values_of(masks, noise, seed=1):
    rng = np.random.default_rng(seed)
    return 0.3 + masks @ rng.normal(size=masks.shape[1]) + noise * rng.normal(size=len(masks))


@pytest.mark.parametrize("noise", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("n", [15, 60])  # fewer selections than 12 modules and an intercept need, and enough
def test_it_is_scikit_learns_ridge_with_leave_one_out(n, noise):
    masks = masks_of(n)
    values = values_of(masks, noise)
    model = fit_additive(masks, values)
    centred = masks - masks.mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    ridges = RIDGES * np.mean(singular[singular > 1e-8] ** 2)
    reference = RidgeCV(ridges).fit(masks.astype(float), values)
    assert model.ridge == pytest.approx(reference.alpha_, rel=1e-9)
    np.testing.assert_allclose(model.effects, reference.coef_, rtol=1e-7, atol=1e-10)
    assert model.intercept == pytest.approx(reference.intercept_, rel=1e-7)
    errors, of_mean = [], []
    for i in range(n):
        rest = np.arange(n) != i
        left = Ridge(model.ridge).fit(masks[rest].astype(float), values[rest])
        errors.append(values[i] - left.predict(masks[i : i + 1].astype(float))[0])
        of_mean.append(values[i] - values[rest].mean())
    assert model.r2 == pytest.approx(1 - np.square(errors).sum() / np.square(of_mean).sum(), rel=1e-6, abs=1e-9)


def test_r2_is_one_for_effects_that_add_up_and_about_zero_for_noise():
    masks = masks_of(200)
    assert fit_additive(masks, values_of(masks, 0.0)).r2 == pytest.approx(1, abs=1e-4)
    rng = np.random.default_rng(3)
    assert max(fit_additive(masks, rng.normal(size=200)).r2 for _ in range(20)) < 0.1


def test_effects_that_the_masks_cannot_tell_apart_are_equal():
    masks = masks_of()
    masks[:, 8:10], masks[:, 10:] = True, False  # the last layer never changes
    effects = fit_additive(masks, values_of(masks, 0.1)).effects.reshape(3, 4)
    np.testing.assert_allclose(effects[:2].sum(-1), 0, atol=1e-12)
    assert not effects[2].any() and np.abs(effects[:2]).max() > 0.1


def test_equal_values_give_no_effects():
    model = fit_additive(masks_of(), np.full(60, 0.7))
    assert not model.effects.any() and model.r2 == 0 and model.intercept == pytest.approx(0.7)


def test_equal_selections_say_nothing():
    with pytest.raises(ValueError, match="all masks are equal"):
        fit_additive(np.ones((5, 4)), np.arange(5.0))
