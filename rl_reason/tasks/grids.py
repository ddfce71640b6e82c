"""Square boards, with several right answers each: a path round walls, a Latin square, queens."""

import functools
from collections import deque

import numpy as np

from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, Relation, digits_of, first_accepted, joined, shown

WALL, OPEN, BLANK = "x", ".", "."
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def _ask_board(data: Data) -> str:
    return f"{joined(data['rows'], '/')}?"


def _find(rows: list[str], char: str) -> tuple[int, int]:
    return next((r, row.index(char)) for r, row in enumerate(rows) if char in row)


def _step(rows: list[str], cell: tuple[int, int], move: str) -> tuple[int, int] | None:
    """The next cell; None off the board or in a wall."""
    r, c = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
    return (r, c) if 0 <= r < len(rows) and 0 <= c < len(rows) and rows[r][c] != WALL else None


def _shortest(rows: list[str]) -> str | None:
    """Moves of a shortest path from S to G, by breadth; None where there is none."""
    start, goal = _find(rows, "S"), _find(rows, "G")
    moves, queue = {start: ""}, deque([start])
    while queue and goal not in moves:
        cell = queue.popleft()
        for move in MOVES:
            after = _step(rows, cell, move)
            if after is not None and after not in moves:
                moves[after] = moves[cell] + move
                queue.append(after)
    return moves.get(goal)


def _sample_path(rng: np.random.Generator, size: int, min_moves: int) -> Data:
    """S and G anywhere, at least ``min_moves`` apart; three cells of ten are walls."""

    def board() -> list[str]:
        cells = [WALL if wall else OPEN for wall in rng.random(size * size) < 0.3]
        start, goal = rng.choice(size * size, size=2, replace=False)
        cells[start], cells[goal] = "S", "G"
        return ["".join(cells[r * size : (r + 1) * size]) for r in range(size)]

    return {"rows": first_accepted(board, lambda rows: len(_shortest(rows) or "") >= min_moves)}


def _work_path(data: Data) -> Solution:
    """Where S is, then each move and where it leads: ``00 D10 R11``."""
    cell, moves = _find(data["rows"], "S"), _shortest(data["rows"])
    assert moves is not None, "a board whose goal is out of reach"
    steps = [joined(cell, "")]
    for move in moves:
        cell = _step(data["rows"], cell, move) or cell
        steps.append(f"{move}{joined(cell, '')}")
    return Solution(joined(steps, " "), moves)


def _check_path(answer: str, data: Data) -> str:
    """Any moves from S that end on G, as many as the board has cells at most; they may cross themselves."""
    rows = data["rows"]
    if len(answer) > len(rows) ** 2 or not set(answer) <= set(MOVES):
        return f"{shown(answer)} is not at most {len(rows) ** 2} moves U, D, L, R"
    cell = _find(rows, "S")
    for i, move in enumerate(answer):
        after = _step(rows, cell, move)
        if after is None:
            return f"move {i + 1}, {move} from row {cell[0]} column {cell[1]}, is blocked"
        cell = after
    return "" if cell == _find(rows, "G") else f"the path ends at row {cell[0]} column {cell[1]}, not at G"


def _candidates(rows: list[list[str]], r: int, c: int) -> list[str]:
    """Digits that neither the row nor the column has."""
    size = len(rows)
    taken = {*rows[r], *(rows[i][c] for i in range(size))}
    return [digit for digit in map(str, range(1, size + 1)) if digit not in taken]


def _blanks(rows) -> list[tuple[int, int]]:
    """In reading order."""
    return [(r, c) for r, row in enumerate(rows) for c, char in enumerate(row) if char == BLANK]


def _sample_latin(rng: np.random.Generator, size: int, num_blanks: int) -> Data:
    """Shuffles of the cyclic square, so not all squares are drawn; all are accepted."""
    order, columns, symbols = (rng.permutation(size).tolist() for _ in range(3))
    cells = [str(symbols[(r + c) % size] + 1) for r in order for c in columns]
    for i in rng.choice(size * size, size=num_blanks, replace=False):
        cells[i] = BLANK
    return {"rows": ["".join(cells[r * size : (r + 1) * size]) for r in range(size)]}


def _work_latin(data: Data) -> Solution:
    """Blank by blank, ``digits still free>the one taken``; the first completion in dictionary order."""
    rows = [list(row) for row in data["rows"]]

    def fill(blanks: list[tuple[int, int]]) -> list[str] | None:
        if not blanks:
            return []
        (r, c), free = blanks[0], _candidates(rows, *blanks[0])
        for digit in free:
            rows[r][c] = digit
            if (rest := fill(blanks[1:])) is not None:
                return [f"{joined(free, '')}>{digit}", *rest]
        rows[r][c] = BLANK
        return None

    steps = fill(_blanks(rows))
    assert steps is not None, "a square that has no completion"
    return Solution(joined(steps, " "), joined((step[-1] for step in steps), ""))


def _check_latin(answer: str, data: Data) -> str:
    """The answer's digits go to the blanks in reading order."""
    size, blanks = len(data["rows"]), _blanks(data["rows"])
    if digits_of(answer, len(blanks), 1, size) is None:
        return f"{shown(answer)} is not {len(blanks)} digits 1 to {size}"
    rows = [list(row) for row in data["rows"]]
    for (r, c), digit in zip(blanks, answer, strict=True):
        rows[r][c] = digit
    twice = [f"row {i}" for i, row in enumerate(rows) if len(set(row)) < size]
    twice += [f"column {i}" for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) < size]
    return f"{twice[0]} has a digit twice" if twice else ""


@functools.cache
def _queens(size: int) -> tuple[str, ...]:
    """All placements in dictionary order: one queen a row, its column 1..size."""
    found: list[str] = []

    def extend(columns: list[int]) -> None:
        if len(columns) == size:
            found.append(joined((c + 1 for c in columns), ""))
            return
        for c in range(size):
            if all(c != other and abs(c - other) != len(columns) - r for r, other in enumerate(columns)):
                extend([*columns, c])

    extend([])
    return tuple(found)


def _sample_queen(rng: np.random.Generator, size: int, num_given: int) -> Data:
    columns = _queens(size)[int(rng.integers(len(_queens(size))))]
    given = set(rng.choice(size, size=num_given, replace=False).tolist())
    return {"columns": "".join(char if r in given else BLANK for r, char in enumerate(columns))}


def _ask_queen(data: Data) -> str:
    return f"{data['columns']}?"


def _free_columns(columns: str, row: int) -> list[int]:
    """Columns of a row that no placed queen attacks."""
    placed = [(r, int(char)) for r, char in enumerate(columns) if char != BLANK]
    return [
        column
        for column in range(1, len(columns) + 1)
        if all(column != other and abs(column - other) != abs(row - r) for r, other in placed)
    ]


def _work_queen(data: Data) -> Solution:
    """Blank row by blank row, ``columns not attacked>the one taken``."""
    columns, steps, answer = data["columns"], [], ""
    fits = (q for q in _queens(len(columns)) if all(c in (BLANK, d) for c, d in zip(columns, q, strict=True)))
    for row, column in enumerate(next(fits)):
        if columns[row] == BLANK:
            steps.append(f"{joined(_free_columns(columns, row), '')}>{column}")
            columns = columns[:row] + column + columns[row + 1 :]
            answer += column
    return Solution(joined(steps, " "), answer)


def _check_queen(answer: str, data: Data) -> str:
    """The answer's digits are the columns of the blank rows, from the top."""
    given = data["columns"]
    size, num_blanks = len(given), given.count(BLANK)
    if digits_of(answer, num_blanks, 1, size) is None:
        return f"{shown(answer)} is not {num_blanks} digits 1 to {size}"
    taken = iter(answer)
    columns = [int(next(taken) if char == BLANK else char) for char in given]
    for r, column in enumerate(columns):
        for below in range(r + 1, size):
            if column == columns[below] or abs(column - columns[below]) == below - r:
                return f"the queens of rows {r} and {below} attack each other"
    return ""


TASKS = (
    Relation(
        "path",
        ((3, 2), (4, 3), (5, 5), (6, 7)),
        _sample_path,
        _ask_board,
        _work_path,
        _check_path,
    ),
    Relation(
        "latin",
        ((3, 3), (4, 5), (4, 8), (5, 11)),
        _sample_latin,
        _ask_board,
        _work_latin,
        _check_latin,
    ),
    Relation(
        "queen",
        ((5, 2), (7, 3), (8, 3), (9, 3)),
        _sample_queen,
        _ask_queen,
        _work_queen,
        _check_queen,
    ),
)
