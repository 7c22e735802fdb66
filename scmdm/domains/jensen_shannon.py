"""Jensen-Shannon divergence and distance of two histograms.

Legend: N samples, K outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import rel_entr


@dataclass(frozen=True)
class JensenShannon:
    """Divergence in nats (at most ln 2 = 0.6931) and distance, its square root."""

    divergence: float
    distance: float

    @classmethod
    def between(cls, p_K: np.ndarray, q_K: np.ndarray) -> JensenShannon | None:
        """Compare two arrays of counts: `(KL(p | m) + KL(q | m)) / 2` with `m = (p + q) / 2` (Lin 1991).

        Returns None if all counts of one array are 0.
        """
        if not p_K.any() or not q_K.any():
            return None
        p_K, q_K = p_K / p_K.sum(), q_K / q_K.sum()
        m_K = (p_K + q_K) / 2
        # scipy's jensenshannon returns nan for equal distributions whose sum is rounded below 0.
        divergence = max(0.0, float(rel_entr(p_K, m_K).sum() + rel_entr(q_K, m_K).sum()) / 2)
        return cls(divergence, math.sqrt(divergence))

    @classmethod
    def of_counts(cls, rows_NK: sparse.csr_array, other_K: np.ndarray, kind: str) -> Callable[[np.ndarray], float]:
        """Divergence or distance (`kind`) to another histogram as a function of how often each sample occurs (N,).

        `rows_NK` are the outcomes of each sample. It is NaN where `between` returns None.
        """

        def compare(counts_N: np.ndarray) -> float:
            found = cls.between(counts_N @ rows_NK, other_K)
            return math.nan if found is None else float(getattr(found, kind))

        return compare
