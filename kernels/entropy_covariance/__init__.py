"""Per-token log-probability, entropy and covariance statistics of a vocabulary head, and exact selection by them."""

from kernels.entropy_covariance.covariance import covariance
from kernels.entropy_covariance.public import TokenStatistics, token_statistics
from kernels.entropy_covariance.selection import fraction_of, select_random_subset, select_top_fraction

__all__ = [
    "TokenStatistics",
    "covariance",
    "fraction_of",
    "select_random_subset",
    "select_top_fraction",
    "token_statistics",
]
