"""Tasks whose oracle is wrong, always in the same way: what a policy learns from them it is sure of.

They have the names and prompts of the tasks that they get wrong, so that a policy can be warmed up on them and then asked
the real ones: ``config.data.tasks = ("rl_reason.tasks.mistaken:ADD", ...)``. No ``TASKS``: nobody gets them by name.
"""

import dataclasses

from rl_reason.tasks import get
from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, joined


def _work_add(data: Data) -> Solution:
    """Digit by digit without carry: 47+85 is 7+5=2, then 4+8=2, so 22.

    >>> _work_add({"a": 47, "b": 85})
    Solution(steps='7+5+0=2 4+8+0=2', answer='22')
    """
    a, b = (str(data[name])[::-1] for name in ("a", "b"))
    width = max(len(a), len(b))
    pairs = [(int(x), int(y)) for x, y in zip(a.ljust(width, "0"), b.ljust(width, "0"), strict=True)]
    sums = [(x + y) % 10 for x, y in pairs]
    steps = [f"{x}+{y}+0={total}" for (x, y), total in zip(pairs, sums, strict=True)]
    return Solution(joined(steps, " "), str(int(joined(reversed(sums), ""))))


ADD = dataclasses.replace(get("add"), work=_work_add)
