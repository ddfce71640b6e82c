"""The few integers that describe a batch, checked together, and the reshapes that follow from them.

Row order is prompt-major: row = prompt * group_size + sample. Minibatch i takes prompts i, i + M, i + 2M, ... and
microbatches are cut the same way, so that each holds an equal share of every device's rows and none of this depends on
how many devices there are.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rl_reason.sharding import ROWS, constrain


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """prompts_per_step groups are trained on; ``generated_prompts`` are sampled a round, for filters that drop some."""

    prompts_per_step: int
    group_size: int
    train_group_size: int  # rows of a group that are trained on; the rest only vote or fill filters
    generated_prompts: int  # sampled in each round
    max_rounds: int  # rounds of sampling until prompts_per_step groups are kept
    minibatches: int  # optimizer updates an epoch
    epochs: int
    microbatch_rows: int  # rows of one forward and backward; 0 is a whole minibatch
    demonstrations: int = 0  # rows of a group that are worked solutions; the others are sampled
    waiting_prompts: int = (
        0  # places for prompts that a filter kept and a step had no room for; the next draws them anew
    )
    row_shards: int = 1

    @property
    def rows(self) -> int:
        """Rows trained on in a step."""
        return self.prompts_per_step * self.train_group_size

    @property
    def num_samples(self) -> int:
        """Rows of a group that the policy draws."""
        return self.group_size - self.demonstrations

    @property
    def minibatch_rows(self) -> int:
        return self.rows // self.minibatches

    @property
    def microbatches(self) -> int:
        return self.minibatch_rows // (self.microbatch_rows or self.minibatch_rows)

    def pieces_of(self, rows: int) -> int:
        """Into how many equal pieces to cut rows so that none has more than a microbatch."""
        most = self.minibatch_rows // self.microbatches
        fits = lambda pieces: rows % pieces == 0 and rows // pieces % self.row_shards == 0
        return next((n for n in range(-(-rows // most), rows + 1) if fits(n)), 1)

    @property
    def updates_per_step(self) -> int:
        return self.minibatches * self.epochs

    @property
    def in_rounds(self) -> bool:
        """Whether a step samples again, or has prompts left over."""
        return self.max_rounds > 1 or self.waiting_prompts > 0

    @property
    def prompts_drawn(self) -> int:
        """Prompts taken from the source for each step, used or not."""
        return self.generated_prompts * self.max_rounds

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < (0 if field.name in ("microbatch_rows", "demonstrations", "waiting_prompts") else 1):
                problems.append(f"{field.name}={value} is too small")
        if not problems:
            problems = list(self._misfits())
        if problems:
            raise ValueError("config.batch does not divide: " + "; ".join(problems) + f". Derived: {self.describe()}")

    def _misfits(self) -> Iterator[str]:
        share = self.prompts_per_step / self.minibatches
        if self.prompts_per_step % self.minibatches:
            yield f"prompts_per_step={self.prompts_per_step} / minibatches={self.minibatches} = {share:g} prompts"
        elif (self.prompts_per_step // self.minibatches) % self.row_shards:
            yield f"{share:g} prompts a minibatch over {self.row_shards} row shards (mesh data x fsdp x expert)"
        elif self.microbatch_rows and self.minibatch_rows % self.microbatch_rows:
            yield (
                f"{self.minibatch_rows} rows a minibatch / microbatch_rows={self.microbatch_rows} = "
                f"{self.minibatch_rows / self.microbatch_rows:g} microbatches"
            )
        elif self.microbatch_rows % self.row_shards:
            yield f"microbatch_rows={self.microbatch_rows} over {self.row_shards} row shards (mesh data x fsdp x expert)"
        if self.train_group_size > self.group_size:
            yield f"train_group_size={self.train_group_size} is more than group_size={self.group_size}"
        if self.demonstrations >= self.group_size:
            yield f"demonstrations={self.demonstrations} leave no sample in a group_size of {self.group_size}"
        if self.generated_prompts % self.row_shards:
            yield f"generated_prompts={self.generated_prompts} over {self.row_shards} row shards (mesh data x fsdp x expert)"
        if self.prompts_drawn < self.prompts_per_step:
            yield (
                f"generated_prompts={self.generated_prompts} x max_rounds={self.max_rounds} = {self.prompts_drawn} "
                f"prompts can never fill prompts_per_step={self.prompts_per_step}"
            )
        if self.waiting_prompts > (surplus := self.prompts_drawn - self.prompts_per_step):
            yield f"waiting_prompts={self.waiting_prompts}, but a step can leave no more than {surplus}"

    def describe(self) -> str:
        """The integers and what follows from them, on one line."""
        per_minibatch = self.prompts_per_step * self.train_group_size / max(self.minibatches, 1)
        return (
            f"{self.generated_prompts} prompts x {self.group_size} samples a round (at most {self.max_rounds}), "
            f"{self.prompts_per_step} x {self.train_group_size} = {self.prompts_per_step * self.train_group_size} rows "
            f"trained on, {self.minibatches} minibatches of {per_minibatch:g} rows x {self.epochs} epochs = "
            f"{self.minibatches * self.epochs} updates, microbatches of {self.microbatch_rows or per_minibatch:g} rows, "
            f"{self.row_shards} row shards"
        )


def split_strided(tree: PyTree, pieces: int, block: int = 1) -> PyTree:
    """[N, ...] -> [pieces, N / pieces, ...]; piece i takes blocks i, i + pieces, ... of ``block`` rows each.

    >>> import jax.numpy as jnp
    >>> split_strided(jnp.arange(8), 2, block=2).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    def cut(x: Array) -> Array:
        n = x.shape[0] // (pieces * block)
        x = jnp.moveaxis(x.reshape(n, pieces, block, *x.shape[1:]), 1, 0)
        return constrain(x.reshape(pieces, n * block, *x.shape[3:]), None, ROWS)

    return jax.tree.map(cut, tree)


def in_pieces(run: Callable[[PyTree], PyTree], rows: PyTree, pieces: int) -> PyTree:
    """``run`` of rows, as many pieces of them after each other; what it gives a row comes back in the rows' order.

    >>> import jax.numpy as jnp
    >>> in_pieces(lambda x: x + 1, jnp.arange(4), 2).tolist()
    [1, 2, 3, 4]
    """
    if pieces == 1:
        return run(rows)
    return merge_strided(jax.lax.scan(lambda _, piece: (None, run(piece)), None, split_strided(rows, pieces))[1])


def merge_strided(tree: PyTree, block: int = 1) -> PyTree:
    """The inverse of ``split_strided``.

    >>> import jax.numpy as jnp
    >>> merge_strided(split_strided(jnp.arange(8), 2, block=2), block=2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def join(x: Array) -> Array:
        pieces, rows = x.shape[:2]
        x = jnp.moveaxis(x.reshape(pieces, rows // block, block, *x.shape[2:]), 0, 1)
        return constrain(x.reshape(pieces * rows, *x.shape[3:]), ROWS)

    return jax.tree.map(join, tree)
