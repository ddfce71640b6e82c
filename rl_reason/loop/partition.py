"""Which parameters learn: gradients and optimizer state exist for those alone.

Both halves are the whole tree with None in place of the other's leaves, so that paths stay what they are.
"""

from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from rl_reason.sharding import path_matches


def split(params: PyTree, frozen: Sequence[str]) -> tuple[PyTree, PyTree]:
    """(what learns, what is fixed): fixed is a parameter whose path a pattern is found in, as in ``layers/moe/router``."""

    def half(fixed: bool) -> PyTree:
        pick = lambda path, x: x if path_matches(path, frozen) == fixed else None
        return jax.tree_util.tree_map_with_path(pick, params)

    return half(False), half(True)


def join(learned: PyTree, fixed: PyTree) -> PyTree:
    """The parameters that ``split`` cut in two."""
    return jax.tree.map(lambda a, b: b if a is None else a, learned, fixed, is_leaf=lambda x: x is None)
