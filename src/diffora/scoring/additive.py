"""An additive model of how good a selection is: one number for each module, fitted to measured selections.

Used by the selector ``one_shot``. In the terms of Ilyas et al. (arXiv 2202.00622) it is a datamodel whose features are
modules in place of training rows.
"""

from dataclasses import dataclass

import numpy as np

RIDGES = np.logspace(-4, 4, 33)
"""Candidates for the strength of the ridge, in units of the mean squared singular value of the centred masks."""


@dataclass(frozen=True)
class Additive:
    """A fitted additive model, ``value = intercept + sum of the effects of the selected modules``.

    Attributes:
        effects: [m] by how much a module raises the value of a selection. 0 for a module that is in all or in none of
            the masks.
        intercept: the value of the empty selection, by the model.
        ridge: the strength of the penalty that was chosen.
        r2: share of the variance between selections that the model predicts for a selection that it was not fitted to
            (leave-one-out). 1: effects add up exactly; 0 or less: it predicts no better than the mean.
    """

    effects: np.ndarray
    intercept: float
    ridge: float
    r2: float


def fit_additive(masks: np.ndarray, values: np.ndarray) -> Additive:
    """Ridge regression of values on masks, with the strength that predicts best when one selection is left out.

    It minimises ``sum (value - intercept - mask @ effects)^2 + ridge * sum effects^2``. The intercept has no penalty.
    Leaving out selection i changes its residual e_i to e_i / (1 - h_i), where h_i is entry i of the diagonal of the hat
    matrix. So all leave-one-out errors of all strengths come from one singular value decomposition, without refitting.
    The strength with the smallest sum of their squares is taken (Allen's PRESS).

    All masks of one size make the columns dependent. The ridge then gives the solution in which effects that the masks
    cannot tell apart are equal: if each layer has K modules in every mask, the effects of a layer sum to 0.

    Args:
        masks: [n, m] 1 where a module is selected, otherwise 0; at least two different rows.
        values: [n] of the selections, high is good.

    Returns:
        The model, computed in float64.

    Raises:
        ValueError: all masks are equal.
    """
    x, values = np.asarray(masks, dtype=np.float64), np.asarray(values, dtype=np.float64)
    y = values - values[0]  # equal values then give exactly 0
    n, mean_x, mean_y = len(y), x.mean(0), y.mean()
    if (x == x[0]).all():
        raise ValueError("all masks are equal")
    u, d, vt = np.linalg.svd(x - mean_x, full_matrices=False)
    nonzero = d > d[0] * 1e-10
    u, d, vt = u[:, nonzero], d[nonzero], vt[nonzero]
    along = u.T @ (y - mean_y)

    def left_out(ridge: float) -> np.ndarray:
        kept = d**2 / (d**2 + ridge)
        leverage = 1 / n + u**2 @ kept
        errors: np.ndarray = (y - mean_y - u @ (kept * along)) / (1 - leverage)
        return errors

    ridges = RIDGES * np.mean(d**2)
    sums = [float(left_out(ridge) @ left_out(ridge)) for ridge in ridges]
    ridge = float(ridges[int(np.argmin(sums))])
    effects = vt.T @ (d / (d**2 + ridge) * along)
    of_mean = (y - mean_y) * n / (n - 1)  # the same errors of a model that is only a mean
    variation = float(of_mean @ of_mean)
    r2 = 1 - min(sums) / variation if variation > 0 else 0.0
    return Additive(effects, float(values[0] + mean_y - mean_x @ effects), ridge, r2)
