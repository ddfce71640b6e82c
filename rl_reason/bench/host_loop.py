"""Sampling as minimal trainers do it: a Python loop, one compiled call a token, a batch in lock step until all ended.

It is what the compiled loop is compared with, so it is written to be fast: prompts are prefilled by one compiled call
and shared by their group, the cache is donated and written in place, the sampler and the random numbers are the
compiled loop's own (hence the same tokens), and only the drawn tokens come to the host at every step, to look for EOS.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from kernels.decode_attention import decode_attention, write_cache
from rl_reason import rollout as rollout_lib
from rl_reason import sampling as sampling_lib
from rl_reason.models import rope, transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.rollout import RolloutConfig
from rl_reason.sampling import Sampling
from rl_reason.sharding import constrain_rows
from rl_reason.types import Prompts, Rollout


class Held(typing.NamedTuple):
    """What every decode step of a batch reads: R rows of Q prompts."""

    prompt_cache: PyTree[Array]  # a layer: keys and values [Q P KV hd]
    prompt_len: Int[Array, " Q"]
    keys: Key[Array, " R"]


class _Step(typing.NamedTuple):
    """What a decode step draws."""

    token: Int[Array, " R"]
    rollout_logprob: Float[Array, " R"]
    sampled_logprob: Float[Array, " R"]
    stopped: Bool[Array, " R"]


class HostLoop:
    """Draws what ``rollout.generate`` draws, one call a token, ``num_slots`` rows at a time."""

    def __init__(self, config: ModelConfig, rollout: RolloutConfig):
        self._config, self._rollout = config, rollout
        self._cast = jax.jit(self._make_weights)
        self._prefill = jax.jit(self._make_prefill)
        self._step = jax.jit(self._make_step, donate_argnums=4)

    def _make_weights(self, params: PyTree) -> PyTree:
        """The decoding weights: cast once, one tree a layer."""
        params = jax.tree.map(lambda x: x.astype(self._config.dtype), params)
        layers = [transformer.layer(params["layers"], i) for i in range(self._config.num_layers)]
        return params | {"layers": layers}

    def _make_prefill(self, params: PyTree, prompts: Prompts, key: Key[Array, ""]):
        """(what the steps read, an empty cache a layer, the token each row feeds first)."""
        config, group_size = self._config, self._rollout.group_size
        params = jax.tree.map(lambda x: x.astype(config.dtype), params)
        stacked = rollout_lib.prefill(params, prompts, config, self._rollout)
        prompt_cache = [transformer.layer(stacked, i) for i in range(config.num_layers)]
        rows = prompts.tokens.shape[0] * group_size
        sample = jnp.arange(rows) % group_size
        of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.repeat(prompts.uid, group_size))
        last = jnp.take_along_axis(prompts.tokens, prompts.prompt_len[:, None] - 1, axis=1)[:, 0]
        shape = (rows, self._rollout.completion_len, config.num_kv_heads, config.head_dim)
        cache = [tuple(constrain_rows(jnp.zeros(shape, config.dtype)) for _ in "kv") for _ in range(config.num_layers)]
        held = Held(prompt_cache, prompts.prompt_len, jax.vmap(jax.random.fold_in)(of_prompt, sample))
        return held, cache, constrain_rows(jnp.repeat(last, group_size))

    def _make_step(
        self,
        params: PyTree,
        held: Held,
        token: Int[Array, " R"],
        matched: Int[Array, "R K"],
        cache: PyTree,
        count: Int[Array, ""],
        sampling: Sampling,
    ) -> tuple[_Step, Int[Array, "R K"], PyTree]:
        """One token of every row; what of stop texts is written; the cache."""
        config, shards = self._config, self._rollout.num_shards
        rows = token.shape[0]
        of_row = jnp.repeat(jnp.arange(held.prompt_len.shape[0]), self._rollout.group_size)
        lengths = jnp.full((rows,), count + 1, jnp.int32)
        turns = rope.rotations(held.prompt_len[of_row] - 1 + count, config)
        x = constrain_rows(transformer.embed(params, token, config))
        new = []
        for layer, own, prompt, windowed in zip(
            params["layers"], cache, held.prompt_cache, config.windowed, strict=True
        ):

            def attend(q, k, v, own=own, prompt=prompt, windowed=windowed):
                turn = rope.of_layer(turns, windowed)
                q, k = rope.rotate(q, turn), rope.rotate(k, turn)
                keys, values = (write_cache(old, x, lengths - 1) for old, x in zip(own, (k, v), strict=True))
                out = decode_attention(
                    q,
                    keys,
                    values,
                    lengths=lengths,
                    prompt_keys=prompt[0],
                    prompt_values=prompt[1],
                    prompt_lens=held.prompt_len - 1,
                    prompt_index=of_row % (held.prompt_len.shape[0] // shards),
                    num_shards=shards,
                    **config.attends(windowed),
                )
                return out, (keys, values)

            out: typing.Any = transformer.Block(config).apply({"params": layer}, x, attend, jnp.ones(rows, bool))
            x, kept, *_ = out
            new.append(kept)
        hidden = transformer.final_norm(params, x, config)
        logits = transformer.logits(hidden, transformer.unembedding(params, config), config)
        keys = jax.vmap(jax.random.fold_in, (0, None))(held.keys, count)
        drawn = sampling_lib.sample(keys, logits, sampling)
        stopped, matched = rollout_lib.stops(drawn[0], matched, self._rollout)
        return _Step(*drawn, stopped), matched, new

    def __call__(
        self,
        params: PyTree,
        prompts: Prompts,
        key: Key[Array, ""],
        sampling: Sampling,
        max_new_tokens: np.ndarray | None = None,
    ) -> tuple[Rollout, int]:
        """Completions of all prompts (numpy), in batches of ``num_slots`` rows, and the number of calls that took.

        Raises:
            ValueError: prompts that do not fill whole batches.
        """
        rollout, batch = self._rollout, prompts.tokens.shape[0]
        at_a_time = min(rollout.num_slots // rollout.group_size, batch)
        if not at_a_time or batch % at_a_time:
            raise ValueError(
                f"{batch} prompts do not fill lock-step batches of {at_a_time} ({rollout.num_slots} slots, groups of "
                f"{rollout.group_size}); make num_slots a multiple of the group size that divides the rows."
            )
        weights = self._cast(params)
        limit = np.full(batch * rollout.group_size, rollout.completion_len)
        if max_new_tokens is not None:
            limit = np.clip(max_new_tokens, 1, rollout.completion_len)
        drawn, steps = [], 0
        for first in range(0, batch, at_a_time):
            some = jax.tree.map(lambda x, first=first: x[first : first + at_a_time], prompts)
            rows = slice(first * rollout.group_size, (first + at_a_time) * rollout.group_size)
            drawn.append(self._batch(weights, params, some, key, sampling, limit[rows]))
            steps += len(drawn[-1].tokens)
        return assemble(drawn, prompts, rollout), steps

    def _batch(self, weights, params, prompts: Prompts, key, sampling: Sampling, limit: np.ndarray) -> "Drawn":
        """One batch, until its last row ended."""
        held, cache, token = self._prefill(params, prompts, key)
        running, truncated = np.ones(len(limit), bool), np.zeros(len(limit), bool)
        length = np.zeros(len(limit), np.int64)
        matched = jnp.zeros((len(limit), len(self._rollout.stop)), jnp.int32)
        tokens, scores = [], []
        while running.any():
            count = np.int32(len(tokens))
            (token, *both, ended), matched, cache = self._step(weights, held, token, matched, cache, count, sampling)
            tokens.append(np.asarray(token))
            scores.append(both)
            length += running
            stopped = np.asarray(ended)  # waits for the device: whether to go on depends on it
            truncated |= running & ~stopped & (length >= limit)
            running &= ~stopped & (length < limit)
        full, sampled = (np.stack(x) for x in zip(*jax.device_get(scores), strict=True))
        return Drawn(np.stack(tokens), full, sampled, length, truncated)


class Drawn(typing.NamedTuple):
    """What a batch drew, [steps R], how much of it counts, and which rows hit their limit, [R]."""

    tokens: np.ndarray
    rollout_logprobs: np.ndarray
    sampled_logprobs: np.ndarray
    length: np.ndarray
    truncated: np.ndarray


def assemble(drawn: list[Drawn], prompts: Prompts, rollout: RolloutConfig) -> Rollout:
    """Rows of prompt, completion, padding, from what the batches drew."""
    batch, prompt_width = prompts.tokens.shape
    spread = lambda x: np.repeat(np.asarray(x), rollout.group_size, axis=0)
    prompt_len = spread(prompts.prompt_len)
    length = np.concatenate([d.length for d in drawn])
    index = np.arange(prompt_width + rollout.completion_len) - prompt_len[:, None]  # position in the completion
    mask = (index >= 0) & (index < length[:, None])
    column = np.clip(index, 0, rollout.completion_len - 1)

    def place(name):
        pieces = [getattr(d, name) for d in drawn]
        whole = [np.pad(x, ((0, rollout.completion_len - len(x)), (0, 0))) for x in pieces]
        return np.where(mask, np.take_along_axis(np.concatenate(whole, axis=1).T, column, axis=1), 0)

    prompt_tokens = np.pad(spread(prompts.tokens), ((0, 0), (0, rollout.completion_len)))
    fields = dict(
        tokens=np.where(mask, place("tokens"), np.where(index < 0, prompt_tokens, rollout.pad_id)),
        prompt_len=prompt_len,
        completion_mask=mask,
        rollout_logprobs=place("rollout_logprobs"),
        sampled_logprobs=place("sampled_logprobs"),
        prompt_id=np.repeat(np.arange(batch, dtype=np.int32), rollout.group_size),
        truncated=np.concatenate([d.truncated for d in drawn]),
        off_policy=np.zeros(len(mask), bool),
    )
    return Rollout(**{name: jnp.asarray(x) for name, x in fields.items()})
