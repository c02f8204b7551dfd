"""Cross-validated linear maps from features to responses: ridge and partial least squares."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from rnndyn_fast.optional import require

METHODS = ("ridge", "pls")
# Relative to the mean squared length of the (centred) feature vectors, so they suit features of any scale.
ALPHAS = tuple(float(alpha) for alpha in np.logspace(-4, 4, 17))
INNER_FOLDS = 4

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def assign_folds(num_stimuli: int, num_folds: int, seed: int) -> np.ndarray:  # [S]
    """A fold 0..num_folds-1 for every stimulus, at random, sizes differing by one at most."""
    if not 2 <= num_folds <= num_stimuli:
        raise ValueError(f"num_folds: expected 2..{num_stimuli} (the number of stimuli), got {num_folds}")
    return np.random.default_rng(seed).permutation(np.arange(num_stimuli) % num_folds)


def reduced(
    features: np.ndarray,  # [M, D]
    max_dimensions: int | None,
    seed: int,
) -> np.ndarray:  # [M, min(D, M or max_dimensions)]
    """Features centred, of mean squared length 1, in at most ``max_dimensions`` dimensions.

    Where D exceeds both M and what fits, a rotation onto the M - 1 dimensions in which M points lie: ridge and PLS give the same
    predictions there. Otherwise, beyond ``max_dimensions``, the first principal components of all M vectors (responses are not
    looked at).
    """
    require("sklearn")

    from sklearn.decomposition import PCA

    values = np.asarray(features, dtype=np.float64)
    values = values - values.mean(0)
    length = np.sqrt((values * values).sum(1).mean())
    if length == 0:
        raise ValueError("features: expected features that differ between stimuli, got the same vector for all")
    values = values / length
    rows, dimensions = values.shape
    most = min(rows, dimensions, max_dimensions or dimensions)
    if dimensions <= most:
        return values
    if most == rows:
        # Through the M x M products of the vectors: much cheaper than the SVD of [M, D] where D is large.
        squares, vectors = np.linalg.eigh(values @ values.T)
        return np.asarray(vectors * np.sqrt(np.maximum(squares, 0.0)))
    return np.asarray(PCA(most, random_state=seed).fit_transform(values))


def ridge_fit(
    train_x: np.ndarray,  # [M, D]
    train_y: np.ndarray,  # [M, K]
    inner: np.ndarray,  # [M]
    test_x: np.ndarray,  # [m, D]
) -> np.ndarray:  # [m, K]
    """Ridge predictions, with the penalty of every neuron chosen by cross-validation over the ``inner`` folds.

    ``argmin_W |Y - X W|^2 + alpha |W|^2`` on centred X and Y. One decomposition serves all penalties (ALPHAS times the number
    of rows).
    """
    error = np.zeros((len(ALPHAS), train_y.shape[1]))
    for fold in np.unique(inner):
        held_out = inner == fold
        predicted = _ridge_path(train_x[~held_out], train_y[~held_out], train_x[held_out])
        for k in range(len(ALPHAS)):
            difference = predicted(np.full(train_y.shape[1], k)) - train_y[held_out]
            error[k] += (difference * difference).sum(0)
    return _ridge_path(train_x, train_y, test_x)(error.argmin(0))


def _ridge_path(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The predictions as a function of the index of each neuron's penalty in ALPHAS."""
    mean_x, mean_y = train_x.mean(0), train_y.mean(0)
    left, values, right = np.linalg.svd(train_x - mean_x, full_matrices=False)
    target = left.T @ (train_y - mean_y)
    test = (test_x - mean_x) @ right.T
    alphas = np.asarray(ALPHAS) * len(train_x)

    def predicted(index: np.ndarray) -> np.ndarray:
        shrunk = values[:, None] / (values[:, None] ** 2 + alphas[index])
        return np.asarray(test @ (shrunk * target) + mean_y)

    return predicted


def pls_fit(num_components: int) -> Fit:
    """Partial least squares (NIPALS, all neurons together), centred but not scaled, with that many components at most."""

    def fit(train_x: np.ndarray, train_y: np.ndarray, inner: np.ndarray, test_x: np.ndarray) -> np.ndarray:
        require("sklearn")

        from sklearn.cross_decomposition import PLSRegression
        from sklearn.exceptions import ConvergenceWarning

        most = min(num_components, len(train_x) - 1, train_x.shape[1])
        with warnings.catch_warnings():
            # Components beyond what the responses still hold: the fit stops there by itself.
            warnings.filterwarnings("ignore", message="y residual is constant", category=UserWarning)
            warnings.filterwarnings("ignore", category=ConvergenceWarning)
            return np.asarray(PLSRegression(most, scale=False).fit(train_x, train_y).predict(test_x)).reshape(len(test_x), -1)

    return fit


def held_out_predictions(
    x: np.ndarray,  # [M, D]
    y: np.ndarray,  # [M, K]
    stimulus: np.ndarray,  # [M]
    fold: np.ndarray,  # [S]
    fit: Fit,
    seed: int,
) -> np.ndarray:  # [M, K]
    """Predictions of every row by the map fitted to the rows whose stimuli are in other folds.

    All rows of a stimulus are in one fold, also of the inner folds by which a penalty is chosen.
    """
    out = np.empty(y.shape)
    for number in np.unique(fold):
        test = fold[stimulus] == number
        training = np.flatnonzero(fold != number)
        inner = np.full(len(fold), -1)
        inner[training] = assign_folds(len(training), min(INNER_FOLDS, len(training)), seed + 1)
        out[test] = fit(x[~test], y[~test], inner[stimulus[~test]], x[test])
    return out
