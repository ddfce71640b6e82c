"""Products of sorted groups of rows with one matrix each, and the routing of a mixture of experts around them."""

from kernels.grouped_matmul.public import grouped_matmul
from kernels.grouped_matmul.routing import Permutation, arrange, combine, permute, route
from kernels.grouped_matmul.swiglu import grouped_swiglu

__all__ = ["Permutation", "arrange", "combine", "grouped_matmul", "grouped_swiglu", "permute", "route"]
