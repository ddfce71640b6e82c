"""Graphs, with several right answers each: proper 3-colourings, topological orders."""

import itertools

import numpy as np

from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, Relation, digits_of, joined, shown

NUM_COLORS = 3


def _ask_color(data: Data) -> str:
    return f"{data['nodes']},{NUM_COLORS}:{joined(f'{a}{b}' for a, b in data['edges'])}?"


def _ask_topo(data: Data) -> str:
    return f"{data['nodes']}:{joined(f'{a}{b}' for a, b in data['edges'])}?"


def _some(rng: np.random.Generator, pairs: list[tuple[int, int]], count: int) -> list[list[int]]:
    """So many of the pairs, in ascending order."""
    return sorted(list(pairs[int(i)]) for i in rng.choice(len(pairs), size=count, replace=False))


def _free_colors(edges: list[list[int]], colors: list[int]) -> list[int]:
    """Colours that the next node may take, given those of the nodes before it."""
    node = len(colors)
    taken = {colors[a] for a, b in edges if b == node}  # a < b, so that b's coloured neighbours are its a's
    return [color for color in range(NUM_COLORS) if color not in taken]


def _coloring(num_nodes: int, edges: list[list[int]]) -> list[int] | None:
    """The first proper colouring in dictionary order; None where there is none."""

    def extend(colors: list[int]) -> list[int] | None:
        if len(colors) == num_nodes:
            return colors
        return next((done for c in _free_colors(edges, colors) if (done := extend([*colors, c]))), None)

    return extend([])


def _sample_color(rng: np.random.Generator, num_nodes: int, num_edges: int) -> Data:
    """Edges between classes of equal size, so that a colouring exists; a fixed one is rarely right."""
    hidden = (rng.permutation(num_nodes) % NUM_COLORS).tolist()
    pairs = [pair for pair in itertools.combinations(range(num_nodes), 2) if hidden[pair[0]] != hidden[pair[1]]]
    return {"nodes": num_nodes, "edges": _some(rng, pairs, num_edges)}


def _work_color(data: Data) -> Solution:
    """Node by node, ``colours still free>the one taken``."""
    colors, steps = _coloring(data["nodes"], data["edges"]), []
    assert colors is not None, "a graph that has no 3-colouring"
    for node, color in enumerate(colors):
        steps.append(f"{joined(_free_colors(data['edges'], colors[:node]), '')}>{color}")
    return Solution(joined(steps, " "), joined(colors, ""))


def _check_color(answer: str, data: Data) -> str:
    colors = digits_of(answer, data["nodes"], 0, NUM_COLORS - 1)
    if colors is None:
        return f"{shown(answer)} is not {data['nodes']} digits 0 to {NUM_COLORS - 1}"
    clash = next(((a, b) for a, b in data["edges"] if colors[a] == colors[b]), None)
    return f"nodes {clash[0]} and {clash[1]} have the same colour" if clash else ""


def _sample_topo(rng: np.random.Generator, num_nodes: int, num_edges: int) -> Data:
    """Edges that agree with a hidden order."""
    pairs = list(itertools.combinations(rng.permutation(num_nodes).tolist(), 2))
    return {"nodes": num_nodes, "edges": _some(rng, pairs, num_edges)}


def _work_topo(data: Data) -> Solution:
    """``nodes that nothing left must precede>the one taken``, the smallest."""
    edges, left, order, steps = data["edges"], list(range(data["nodes"])), [], []
    while left:
        ready = [node for node in left if not any(b == node and a in left for a, b in edges)]
        steps.append(f"{joined(ready, '')}>{ready[0]}")
        order.append(ready[0])
        left.remove(ready[0])
    return Solution(joined(steps, " "), joined(order, ""))


def _check_topo(answer: str, data: Data) -> str:
    order = digits_of(answer, data["nodes"], 0, data["nodes"] - 1)
    if order is None or len(set(order)) != data["nodes"]:
        return f"{shown(answer)} does not order the nodes 0 to {data['nodes'] - 1}"
    late = next(((a, b) for a, b in data["edges"] if order.index(a) > order.index(b)), None)
    return f"{late[0]} must come before {late[1]}" if late else ""


TASKS = (
    Relation(
        "color",
        ((5, 6), (6, 9), (7, 12), (8, 15)),
        _sample_color,
        _ask_color,
        _work_color,
        _check_color,
    ),
    Relation(
        "topo",
        ((4, 4), (5, 6), (6, 8), (8, 12)),
        _sample_topo,
        _ask_topo,
        _work_topo,
        _check_topo,
    ),
)
