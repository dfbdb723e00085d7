"""The objective against one key: a smoothed mean with its band over a scale, means with intervals over a choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST = 6
"""Points below which no curve is drawn through them."""
PLACES = 80
SHORTEST = 0.1
"""Length scale in parts of the range: bends closer than this are taken for noise."""


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """A curve through noisy points. All (PLACES,)."""

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """The 95 % band of the mean, not of a single run."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs that share one value of a choice."""

    value: Any
    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    """95 % t-interval of the mean; null for one run."""


def smooth(at: Sequence[float], values: Sequence[float], *, log: bool, least_noise: float = 0.0) -> Smooth | None:
    """A Gaussian process over one key: what the other keys do is noise to it. None for too few points or one place.

    `log`: the key is drawn evenly in the logarithm; `least_noise`: standard deviation between seeds, below which the
    process may not take its points for exact.
    """
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    places = np.log10(at) if log else np.asarray(at, dtype=float)
    low, high = float(places.min()), float(places.max())
    spread = float(np.std(values))
    if len(places) < LEAST or high <= low or spread == 0.0:
        return None
    x, y = (places - low) / (high - low), (np.asarray(values) - np.mean(values)) / spread
    floor = min(1.0, max(1e-3, (least_noise / spread) ** 2))
    kernel = ConstantKernel(1.0, (1e-2, 10.0)) * RBF(0.5, (SHORTEST, 3.0)) + WhiteKernel(max(0.3, floor), (floor, 3.0))
    fitted = _fitted(GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0), x, y)
    signal, error = fitted.kernel_.k1, fitted.kernel_.k2.noise_level
    # The level is not known better than its points tell it, however flat the line: a constant of its own.
    level = ConstantKernel(1.0)
    # scikit-learn's stub knows no None here, which its documentation asks for where the kernel is to stay.
    line = GaussianProcessRegressor(signal + level, alpha=error, optimizer=None)  # pyright: ignore[reportArgumentType]
    line.fit(x[:, None], y)
    grid = np.linspace(0.0, 1.0, PLACES)
    mean, deviation = map(np.asarray, line.predict(grid[:, None], return_std=True)[:2])
    middle, half = np.mean(values) + spread * mean, 1.96 * spread * deviation
    shown = low + (high - low) * grid
    return Smooth(at=10**shown if log else shown, mean=middle, low=middle - half, high=middle + half)


def _fitted(process: Any, x: np.ndarray, y: np.ndarray) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # A key that does nothing drives its length scale to the longest one allowed: that is the answer.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(x[:, None], y)


def groups(possible: Sequence[Any], drawn: Sequence[Any], values: Sequence[float]) -> list[Group]:
    """One per possible value of a choice that was drawn, in the space's order."""
    told: list[Group] = []
    for value in possible:
        own = tuple(v for d, v in zip(drawn, values, strict=True) if d == value)
        if own:
            low, high = mean_interval(own) or (None, None)
            told.append(Group(value=value, values=own, mean=sum(own) / len(own), low=low, high=high))
    return told


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t-interval of a mean; None for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return mean - half, mean + half
