"""The tasks, by name. A new one is a ``Relation`` in a file of its domain, listed in that file's TASKS."""

import difflib

from rl_reason.tasks import arithmetic, automata, graphs, grids, search, sequences
from rl_reason.tasks.relation import Relation

TASKS: dict[str, Relation] = {
    task.name: task for domain in (arithmetic, sequences, automata, graphs, grids, search) for task in domain.TASKS
}


def get(name: str) -> Relation:
    """The task of that name. Raises KeyError with the nearest names.

    >>> get("sort").levels
    (1, 2, 3, 4)
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name), TASKS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise KeyError(f"no task {name!r}; {hint}There are {', '.join(sorted(TASKS))}.")
