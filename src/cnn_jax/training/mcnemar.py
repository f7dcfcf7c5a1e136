"""McNemar's test: whether two networks classify the same examples equally well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
"""The confidence level of intervals."""


@dataclass(frozen=True)
class PairedCounts:
    """How many examples two networks classify correctly, of at least one example that both classified.

    Attributes:
        both: examples that both networks classify correctly.
        only_first: examples that only the first network classifies correctly.
        only_second: examples that only the second network classifies correctly.
        neither: the other examples.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray) -> Self:
        """Count examples, from whether each is classified correctly: two arrays bool ``[N]``."""
        masks = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(mask.sum()) for mask in masks))

    def __len__(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def accuracies(self) -> tuple[float, float]:
        """The accuracy of each network, a fraction."""
        return (self.both + self.only_first) / len(self), (self.both + self.only_second) / len(self)

    @property
    def difference(self) -> float:
        """The accuracy of the first network minus that of the second."""
        return (self.only_first - self.only_second) / len(self)

    @property
    def p_value(self) -> float:
        """The p-value of McNemar's test, exact and two-sided.

        If the networks were equally accurate, each example that only one of them classifies correctly would be one of
        the first network with probability 1/2 (McNemar, Psychometrika 12, 1947, https://doi.org/10.1007/BF02295996).
        """
        discordant = self.only_first + self.only_second
        return float(binomtest(self.only_first, discordant).pvalue) if discordant else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % confidence interval of ``difference``.

        It is Wald's interval after adding one example to both ``only_first`` and ``only_second`` (Bonett and Price,
        Journal of Educational and Behavioral Statistics 37, 2012, https://doi.org/10.3102/1076998611411915). Unlike
        Wald's own interval, it is also accurate for few examples, and its width is never 0.
        """
        total = len(self) + 2
        first, second = (self.only_first + 1) / total, (self.only_second + 1) / total
        center = first - second
        margin = norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((first + second - center**2) / total)
        return float(max(-1.0, center - margin)), float(min(1.0, center + margin))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests so that the chance of any false positive is bounded.

    If those below a level are called significant, the probability that any of these is a false positive is at most the
    level (Holm, Scandinavian Journal of Statistics 6, 1979, https://www.jstor.org/stable/4615733).

    Args:
        p_values: the p-value of each test.

    Returns:
        The adjusted p-values, in the same order.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.array(p_values)[order]))
    return adjusted.tolist()
