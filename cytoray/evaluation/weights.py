"""How much each bag counts in each of many weightings, e.g. the draws of a bootstrap by patient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from cytoray.errors import InputError

BLOCK_VALUES = 20_000


class Weights:
    """K weightings of N bags, kept by patient where all bags of a patient weigh the same.

    A metric needs two things of them: sums of values over the bags (which are sums over patients
    of what each patient has) and the weights of some bags in some order. Neither needs the N x K
    table.

    Args:
        counts: (K, G) how much each of G patients weighs; any number type, >= 0.
        patient_of_bag: (N,) int64 in 0..G-1; None where every bag is its own patient, N = G.
    """

    def __init__(self, counts: np.ndarray, patient_of_bag: np.ndarray | None = None) -> None:
        self.counts, self.patient_of_bag = counts, patient_of_bag

    @classmethod
    def of(cls, weights: Weights | np.ndarray | None, num_bags: int) -> Weights:
        """From (N, K) weights; None weighs every bag once.

        Raises:
            InputError: weights of another number of bags.
        """
        if weights is None:
            weights = np.ones((num_bags, 1))
        made = weights if isinstance(weights, Weights) else cls(np.asarray(weights).T)
        if made.num_bags != num_bags:
            raise InputError(f"weights of {made.num_bags} bags for {num_bags} labels")
        return made

    @property
    def num_bags(self) -> int:
        """N."""
        patients = self.patient_of_bag
        return self.counts.shape[1] if patients is None else len(patients)

    @cached_property
    def total(self) -> np.ndarray:
        """Sum of the weights (K,)."""
        return self.sums(np.ones(self.num_bags))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Weighted sums over the bags: (N,) to (K,), or (M, N) to (M, K)."""
        values = np.asarray(values, dtype=np.float64)
        if self.patient_of_bag is not None:
            rows = np.atleast_2d(values)
            size = self.counts.shape[1]
            per_patient = [np.bincount(self.patient_of_bag, row, minlength=size) for row in rows]
            values = np.stack(per_patient).reshape(*values.shape[:-1], size)
        return values @ self.counts.T.astype(np.float64)

    def blocks(self) -> Iterator[Weights]:
        """The same in runs of weightings whose N x K table stays in the cache."""
        size = max(1, BLOCK_VALUES // max(1, self.num_bags))
        for start in range(0, len(self.counts), size):
            yield Weights(self.counts[start : start + size], self.patient_of_bag)

    def of_bags(self, index: np.ndarray) -> np.ndarray:
        """Weights (K, n) of the bags at `index` (n,), in that order."""
        patients = index if self.patient_of_bag is None else self.patient_of_bag[index]
        return np.take(self.counts, patients, axis=1)
