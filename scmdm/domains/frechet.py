"""Frechet distance between two sets of features, each modelled as a Gaussian.

Legend: N samples, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Sums of features and of their products, which give mean and covariance. Moments of disjoint sets can be added."""

    count: int
    sum_F: np.ndarray
    products_FF: np.ndarray

    @classmethod
    def of(cls, features_NF: np.ndarray) -> Moments:
        """Compute the moments of features (N, F) in float64."""
        features_NF = features_NF.astype(np.float64)
        return cls(len(features_NF), features_NF.sum(0), features_NF.T @ features_NF)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum_F + other.sum_F, self.products_FF + other.products_FF)

    @property
    def mean_F(self) -> np.ndarray:
        """Mean of the features."""
        return self.sum_F / self.count

    @property
    def covariance_FF(self) -> np.ndarray:
        """Unbiased covariance; requires at least two samples."""
        return (self.products_FF - self.count * np.outer(self.mean_F, self.mean_F)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982, equation 4; Heusel et al. 2017).

    `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`, where the trace of the root is computed from the symmetric
    matrix `(C_a^(1/2) C_b C_a^(1/2))^(1/2)`. Its eigenvalues are real and non-negative, so singular covariances need no
    correction. It is NaN with fewer than two samples, which have no covariance.
    """
    if min(a.count, b.count) < 2:
        return math.nan
    values_F, vectors_FF = np.linalg.eigh(a.covariance_FF)
    root_FF = (vectors_FF * np.sqrt(values_F.clip(0))) @ vectors_FF.T
    cross = np.sqrt(np.linalg.eigvalsh(root_FF @ b.covariance_FF @ root_FF).clip(0)).sum()
    gap_F = a.mean_F - b.mean_F
    return float(gap_F @ gap_F + np.trace(a.covariance_FF) + np.trace(b.covariance_FF) - 2 * cross)
