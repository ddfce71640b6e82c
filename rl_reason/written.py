"""What a rollout writes: buffers that slots fill a token at a time, and the rows of prompt and completion made of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rl_reason.sharding import constrain_rows
from rl_reason.types import Prompts, Rollout, struct


@struct
class Written:
    """Completions by row. R shards, N rows of each, C columns; K experts were given to a token in L layers."""

    tokens: Int[Array, "R N C"]
    rollout_logprobs: Float[Array, "R N C"]
    sampled_logprobs: Float[Array, "R N C"]
    length: Int[Array, "R N"]
    truncated: Bool[Array, "R N"]
    expert_ids: Int[Array, "R N C LK"] | None

    @classmethod
    def empty(cls, shape: tuple[int, int, int], pad_id: int, dtype, chosen: int, num_experts: int) -> "Written":
        """[R N C]; experts are recorded where ``chosen``, their number a token over all layers, is not 0."""
        buffer = jnp.zeros(shape, dtype)
        narrow = jnp.int8 if num_experts <= 128 else jnp.int16  # they are many: layers times top-k a token
        return cls(
            tokens=jnp.full(shape, pad_id, jnp.int32),
            rollout_logprobs=buffer,
            sampled_logprobs=buffer,
            length=jnp.zeros(shape[:2], jnp.int32),
            truncated=jnp.zeros(shape[:2], bool),
            expert_ids=jnp.zeros((*shape, chosen), narrow) if chosen else None,
        )

    def add(
        self,
        row: Int[Array, "R W"],
        column: Int[Array, "R W"],
        token: Int[Array, "R W"],
        rollout_logprob: Float[Array, "R W"],
        sampled_logprob: Float[Array, "R W"],
        ended: Bool[Array, "R W"],
        truncated: Bool[Array, "R W"],
        experts: Int[Array, "R W LK"] | None,
    ) -> "Written":
        """With one token of each of W slots; those of slots whose row is past the end are dropped."""

        def put(buffer, value):
            return jax.vmap(lambda b, r, c, v: b.at[r, c].set(v, mode="drop"))(buffer, row, column, value)

        def put_row(buffer, value):
            where = jnp.where(ended, row, buffer.shape[1])
            return jax.vmap(lambda b, r, v: b.at[r].set(v, mode="drop"))(buffer, where, value)

        recorded = self.expert_ids
        return Written(
            tokens=put(self.tokens, token),
            rollout_logprobs=put(self.rollout_logprobs, rollout_logprob),
            sampled_logprobs=put(self.sampled_logprobs, sampled_logprob),
            length=put_row(self.length, column + 1),
            truncated=put_row(self.truncated, truncated),
            expert_ids=None if recorded is None or experts is None else put(recorded, experts.astype(recorded.dtype)),
        )

    def assemble(self, prompts: Prompts, pad_id: int) -> Rollout:
        """Rows of prompt, completion, padding without gaps: R * N of them, equally many to each of the prompts."""
        batch, prompt_width = prompts.tokens.shape
        rows = self.length.size
        group_size = rows // batch
        width = prompt_width + self.tokens.shape[-1]
        flat = jax.tree.map(lambda x: constrain_rows(x.reshape(rows, *x.shape[2:])), self)
        spread = lambda x: constrain_rows(jnp.repeat(x, group_size, axis=0))
        prompt_len = spread(prompts.prompt_len)
        index = jnp.arange(width) - prompt_len[:, None]  # position in the completion
        mask = (index >= 0) & (index < flat.length[:, None])

        def place(x):
            return jnp.where(mask, shifted(x, prompt_len, width), jnp.zeros((), x.dtype))

        prompt_tokens = spread(jnp.pad(prompts.tokens, ((0, 0), (0, width - prompt_width))))
        tokens = jnp.where(jnp.arange(width) < prompt_len[:, None], prompt_tokens, pad_id)
        experts = flat.expert_ids
        return Rollout(
            tokens=jnp.where(mask, place(flat.tokens), tokens),
            prompt_len=prompt_len,
            completion_mask=mask,
            rollout_logprobs=place(flat.rollout_logprobs),
            sampled_logprobs=place(flat.sampled_logprobs),
            prompt_id=jnp.repeat(jnp.arange(batch, dtype=jnp.int32), group_size),
            truncated=flat.truncated,
            off_policy=jnp.zeros(rows, bool),
            expert_ids=None if experts is None else _by_column(experts, flat.length, prompt_len, width),
        )


def shifted(x: Shaped[Array, "N C *k"], start: Int[Array, " N"], width: int) -> Shaped[Array, "N T *k"]:
    """Rows that begin at a column of their own, among zeros. A gather's indices would take 128 times their size on a TPU."""

    def shift(row, at):
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((width, *row.shape[1:]), row.dtype), row, at, axis=0)

    return jax.vmap(shift)(x, start)


def _by_column(
    recorded: Int[Array, "N C LK"], length: Int[Array, " N"], prompt_len: Int[Array, " N"], width: int
) -> Int[Array, "N LK T"]:
    """Experts by column: decode step c fed the token of column prompt_len - 1 + c. -1 elsewhere: the prompt's other tokens,
    which prefill fed, and the last token drawn, which nothing was drawn from."""
    first = prompt_len - 1
    step = jnp.arange(width) - first[:, None]
    fed = (step >= 0) & (step < length[:, None])
    return jnp.swapaxes(jnp.where(fed[..., None], shifted(recorded, first, width), -1), 1, 2)
