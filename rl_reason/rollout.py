"""Sampling completions inside a compiled program: slots, a queue they refill from, and prompt caches held once a group.

A fixed number of slots decodes in lock step. A finished slot takes the next row of its shard's queue in the same step:
a refill writes an index, because prompt keys and values were computed before the loop and are shared by their group.
The loop asks "is anything left" only every few steps; that is its one reduction over devices.

Randomness is ``fold_in(key, uid, sample, position)``: a sample depends on its prompt, its weights and its own key, not on
slot, schedule, batch or device count.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from rl_reason import sampling as sampling_lib
from rl_reason import tags
from rl_reason.models import lora, rope, transformer
from rl_reason.models.attention import keep_keys_values
from rl_reason.models.cached_attention import attend_cached
from rl_reason.models.transformer import ModelConfig
from rl_reason.sampling import Sampling
from rl_reason.sharding import ROWS, constrain, constrain_rows, heads_axis, make_resident
from rl_reason.types import Prompts, Rollout, struct
from rl_reason.written import Written

LAYOUTS = "train", "decode"
_REDRAW = 2**31 - 1  # counted down from: no sample has such a number


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """The static side of sampling. Lengths in tokens."""

    group_size: int
    completion_len: int
    num_slots: int  # rows decoded at a time, over all shards
    check_every: int  # decode steps between finish checks
    prefill_rows: int  # prompts prefilled at a time; 0 is all at once
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...] = ()  # each ends a completion as EOS does
    stop: tuple[str, ...] = ()  # so does the token that completes one of these texts, however it is cut into tokens
    piece_bytes: tuple[bytes, ...] = ()  # what each id writes, where there are such texts
    record_experts: bool = False  # of a mixture of experts: which experts each token that is fed was given to
    num_shards: int = 1  # pieces the rows are cut into; each has its own queue
    merge_adapters: bool = True  # into the weights, so that decoding is as fast as without
    layout: str = "train"  # of the weights while sampling: as they are stored, or "decode"; one of LAYOUTS


@struct
class _Slots:
    """What each decoding slot holds. R shards, W slots, N rows; ``row`` = N/R means idle."""

    row: Int[Array, "R W"]  # its row, local to the shard
    count: Int[Array, "R W"]  # tokens drawn so far
    token: Int[Array, "R W"]  # the token it feeds next
    matched: Int[Array, "R W K"]  # how much of each of the K stop texts its last bytes are


class _Queue(typing.NamedTuple):
    """What a slot needs to know of each row, cut by shard."""

    last_token: Int[Array, "R B"]
    prompt_len: Int[Array, "R B"]
    keys: Key[Array, "R N"]
    limit: Int[Array, "R N"]


class _Loop(typing.NamedTuple):
    slots: _Slots
    next_row: Int[Array, " R"]
    written: Written
    cache: PyTree
    steps: Int[Array, ""]


def prefill(params: PyTree, prompts: Prompts, config: ModelConfig, rollout: RolloutConfig) -> PyTree:
    """Keys and values of all prompts, [L B P KV hd], some rows at a time so that activations stay small."""
    tokens = prompts.tokens
    batch, width = tokens.shape

    def run(tokens, prompt_len):
        valid = jnp.arange(width) < prompt_len[:, None]
        return transformer.forward(params, tokens, valid, config, keep_keys_values).cache

    rows = rollout.prefill_rows or batch
    if batch <= rows:
        return run(tokens, prompts.prompt_len)
    # A chunk takes its share from every shard, so that all devices work on each.
    shards, chunks = rollout.num_shards, batch // rows

    def cut(x):
        x = x.reshape(shards, chunks, rows // shards, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(chunks, rows, *x.shape[3:])

    def fill(cache, chunk):  # in its place: stacked and then joined, prompts would be in memory twice
        index, *prompts = chunk
        put = lambda x, new: x.at[:, :, index].set(new.reshape(new.shape[0], shards, -1, *new.shape[2:]))
        return jax.tree.map(put, cache, run(*prompts)), None

    shape = (config.num_layers, shards, chunks, rows // shards, width, config.num_kv_heads, config.head_dim)
    empty = constrain(jnp.zeros(shape, config.dtype), None, ROWS, None, None, None, heads_axis(config.num_kv_heads))
    parts = jnp.arange(chunks), cut(tokens), cut(prompts.prompt_len)
    cache, _ = jax.lax.scan(fill, (empty, empty), parts)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], batch, *x.shape[4:]), cache)


def _decode_layers(params, cache, prompt_cache, x, attend_with, config: ModelConfig):
    """Applies all layers to one token a slot, reading and writing the cache in place. Gives the experts [M L K] last.

    ``attend_with(q, k, v, cache, prompt_cache, layer, windowed)``.
    """
    valid = jnp.ones(x.shape[:1], bool)

    def block(layer_params, x, attend):
        out = transformer.Block(config).apply({"params": layer_params}, x, attend, valid)
        x, cache, _, experts = typing.cast(tuple, out)
        return x, cache, experts

    if config.scan_decode:
        mixed = len(set(config.windowed)) > 1

        def body(carry, layer_params):
            x, cache, index = carry
            windowed = jnp.array(config.windowed)[index] if mixed else config.windowed[0]
            attend = lambda q, k, v: attend_with(q, k, v, cache, prompt_cache, index, windowed)
            x, new, experts = block(layer_params, x, attend)
            return (x, new, index + 1), experts

        (x, cache, _), experts = jax.lax.scan(body, (x, cache, jnp.int32(0)), params["layers"])
        return x, cache, None if experts is None else jnp.moveaxis(experts, 0, 1)
    new, chosen = [], []
    for layer_params, own, prompt, kind in zip(params["layers"], cache, prompt_cache, config.windowed, strict=True):
        attend = lambda q, k, v, c=own, p=prompt, w=kind: attend_with(q, k, v, c, p, None, w)
        x, own, experts = block(layer_params, x, attend)
        new.append(own)
        chosen.append(experts)
    return x, new, jnp.stack(chosen, axis=1) if config.num_experts else None


def _refill(slots: _Slots, finished: Bool[Array, "R W"], next_row: Int[Array, " R"], queue: _Queue, group_size: int):
    """Gives each finished slot the next row of its shard's queue, in slot order."""
    rows = queue.keys.shape[1]
    taken = next_row[:, None] + jnp.cumsum(finished, axis=1, dtype=jnp.int32) - 1
    row = jnp.where(finished, jnp.minimum(taken, rows), slots.row)
    first = jnp.take_along_axis(queue.last_token, jnp.minimum(row, rows - 1) // group_size, axis=1)
    slots = _Slots(
        row=row,
        count=jnp.where(finished, 0, slots.count),
        token=jnp.where(finished, first, slots.token),
        matched=jnp.where(finished[..., None], 0, slots.matched),
    )
    return slots, jnp.minimum(next_row + finished.sum(1, dtype=jnp.int32), rows)


def stops(
    token: Int[Array, " W"], matched: Int[Array, "W K"], rollout: RolloutConfig
) -> tuple[Bool[Array, " W"], Int[Array, "W K"]]:
    """Whether a drawn token ends its completion, and how much of each stop text has been written with it."""
    stopped = jnp.isin(token, jnp.array((rollout.eos_id, *rollout.stop_ids)))
    if not rollout.stop:
        return stopped, matched
    compiled = tags.automata(rollout.stop, rollout.piece_bytes)
    owner = jnp.minimum(token, len(rollout.piece_bytes))  # ids beyond the tokenizer's write nothing
    follow, count, *_ = jnp.moveaxis(tags.advance(compiled, jnp.asarray(compiled.kind)[owner], matched), -1, 0)
    return stopped | (count > 0).any(-1), follow


def _make_step(params, queue: _Queue, prompt_cache, sampling: Sampling, config: ModelConfig, rollout: RolloutConfig):
    """One decode step of all slots: feed, draw, write out, refill."""
    shards, rows = queue.keys.shape
    head = transformer.unembedding(params, config)
    prompt_width = jax.tree.leaves(prompt_cache)[0].shape[-3]
    turns = rope.rotations(jnp.arange(prompt_width + rollout.completion_len), config)

    def step(loop: _Loop, _) -> tuple[_Loop, None]:
        slots = loop.slots
        width = slots.row.shape[1]
        active = slots.row < rows
        row = jnp.minimum(slots.row, rows - 1)
        prompt = row // rollout.group_size
        prompt_len = jnp.take_along_axis(queue.prompt_len, prompt, axis=1)
        flat = lambda x: constrain_rows(x.reshape(shards * width, *x.shape[2:]))
        count = flat(slots.count)
        position = flat(prompt_len) - 1 + count
        here = jax.tree.map(lambda table: table[position], turns)

        def attend_with(q, k, v, cache, prompt_cache, index, windowed):
            turn = rope.of_layer(here, windowed)
            q, k = rope.rotate(q, turn), rope.rotate(k, turn)
            shared = queue.prompt_len.reshape(-1) - 1, flat(prompt)
            how = dict(num_shards=shards, **config.attends(windowed))
            return attend_cached(q, k, v, tuple(cache), tuple(prompt_cache), count, *shared, index, **how)

        x = constrain_rows(transformer.embed(params, flat(slots.token), config))
        x, cache, experts = _decode_layers(params, loop.cache, prompt_cache, x, attend_with, config)
        experts = None if experts is None else experts.reshape(shards, width, -1)
        logits = transformer.logits(transformer.final_norm(params, x, config), head, config)

        keys = jax.vmap(jax.random.fold_in)(flat(jnp.take_along_axis(queue.keys, row, axis=1)), count)
        drawn = sampling_lib.sample(keys, logits, sampling)
        token, full, sampled = (x.reshape(shards, width) for x in drawn)

        stopped, matched = jax.vmap(functools.partial(stops, rollout=rollout))(token, slots.matched)
        limit = jnp.take_along_axis(queue.limit, row, axis=1)
        ended = active & (stopped | (slots.count + 1 >= limit))
        written = loop.written.add(slots.row, slots.count, token, full, sampled, ended, ended & ~stopped, experts)
        moved = _Slots(slots.row, slots.count + 1, token, matched)
        refilled, next_row = _refill(moved, ended, loop.next_row, queue, rollout.group_size)
        # An idle slot stays at position 0: it must not run past the end of its cache.
        refilled = dataclasses.replace(refilled, count=jnp.where(refilled.row < rows, refilled.count, 0))
        return _Loop(refilled, next_row, written, cache, loop.steps + active.any()), None

    return step


def _row_keys(key: Key[Array, ""], prompts: Prompts, group_size: int) -> Key[Array, "B G"]:
    of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.uid)
    if prompts.redraws is not None:
        again = jax.vmap(jax.random.fold_in)(of_prompt, _REDRAW - prompts.redraws)
        of_prompt = jnp.where(prompts.redraws > 0, again, of_prompt)
    return jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (None, 0))(k, jnp.arange(group_size)))(of_prompt)


def _start(config: ModelConfig, rollout: RolloutConfig, queue: _Queue, dtype) -> _Loop:
    """All slots filled from the head of each shard's queue, caches and buffers empty."""
    shards, rows = queue.keys.shape
    width, length = rollout.num_slots // shards, rollout.completion_len
    shape, heads = (rollout.num_slots, length, config.num_kv_heads, config.head_dim), heads_axis(config.num_kv_heads)
    if config.scan_decode:
        empty = constrain(jnp.zeros((config.num_layers, *shape), config.dtype), None, ROWS, None, heads)
        cache: PyTree = (empty, empty)
    else:
        empty = constrain(jnp.zeros(shape, config.dtype), ROWS, None, heads)
        cache = [(empty, empty) for _ in range(config.num_layers)]
    idle = _Slots(
        row=jnp.full((shards, width), rows, jnp.int32),
        count=jnp.zeros((shards, width), jnp.int32),
        token=jnp.zeros((shards, width), jnp.int32),
        matched=jnp.zeros((shards, width, len(rollout.stop)), jnp.int32),
    )
    slots, next_row = _refill(
        idle, jnp.ones((shards, width), bool), jnp.zeros(shards, jnp.int32), queue, rollout.group_size
    )
    chosen = config.num_layers * config.experts_per_token if rollout.record_experts else 0
    written = Written.empty((shards, rows, length), rollout.pad_id, dtype, chosen, config.num_experts)
    slots, written = constrain_rows((slots, written))
    return _Loop(slots, next_row, written, cache, jnp.int32(0))


def check(rollout: RolloutConfig, batch: int) -> None:
    """Refuses what slots, shards and prefill cannot hold, before anything is traced.

    Raises:
        ValueError: naming the key, with the derived values.
    """
    shards, rows = rollout.num_shards, rollout.prefill_rows
    if rollout.layout not in LAYOUTS:
        raise ValueError(f"config.rollout.layout={rollout.layout!r}; there are {', '.join(LAYOUTS)}.")
    if rollout.check_every < 1 or rollout.completion_len < 1:
        raise ValueError(
            f"rollout.check_every={rollout.check_every} and completion_len={rollout.completion_len} must be at least 1."
        )
    if batch % shards or rollout.num_slots % shards or rollout.num_slots < shards:
        raise ValueError(
            f"{batch} prompts and rollout.num_slots={rollout.num_slots} must both be multiples of the {shards} row "
            "shards (mesh data x fsdp x expert)."
        )
    if rows and rows < batch and (batch % rows or rows % shards):
        raise ValueError(
            f"rollout.prefill_rows={rows} must divide {batch} prompts and be a multiple of {shards} shards."
        )


def generate(
    params: PyTree,
    prompts: Prompts,
    key: Key[Array, ""],
    sampling: Sampling,
    config: ModelConfig,
    rollout: RolloutConfig,
    max_new_tokens: Int[Array, " N"] | None = None,
) -> tuple[Rollout, Int[Array, ""]]:
    """Draws ``group_size`` completions a prompt. Returns them and the number of decode steps the slots ran.

    ``max_new_tokens`` limits single rows, from 1 to ``completion_len``.

    Raises:
        ValueError: prompts, slots and shards that do not divide.
    """
    batch = prompts.tokens.shape[0]
    check(rollout, batch)
    shards, rows = rollout.num_shards, batch * rollout.group_size
    by_shard = lambda x: constrain_rows(x.reshape(shards, -1, *x.shape[1:]))
    last = jnp.take_along_axis(prompts.tokens, prompts.prompt_len[:, None] - 1, axis=1)[:, 0]
    full = jnp.full(rows, rollout.completion_len, jnp.int32)
    queue = _Queue(
        last_token=by_shard(last),
        prompt_len=by_shard(prompts.prompt_len),
        keys=by_shard(_row_keys(key, prompts, rollout.group_size).reshape(-1)),
        limit=by_shard(full if max_new_tokens is None else jnp.clip(max_new_tokens, 1, rollout.completion_len)),
    )
    cast = lambda tree: jax.tree.map(lambda x: x.astype(config.dtype), tree)  # once, not at every token
    place = make_resident if rollout.layout == "decode" else lambda tree: tree
    prompt_cache = prefill(place(cast(params)), prompts, config, rollout)
    prompt_cache = constrain(prompt_cache, None, ROWS, None, heads_axis(config.num_kv_heads))
    layers = params["layers"]
    merge = lora.merged if rollout.merge_adapters else lambda layers: layers
    if config.scan_decode:
        layers = merge(layers)
    else:  # one array a layer: a slice of a stack would be copied at every step
        unstack = lambda tree: [transformer.layer(tree, i) for i in range(config.num_layers)]
        layers, prompt_cache = [merge(layer) for layer in unstack(layers)], unstack(prompt_cache)
    params = place(cast(params | {"layers": layers}))

    step = _make_step(params, queue, prompt_cache, sampling, config, rollout)
    body = lambda loop: jax.lax.scan(step, loop, length=rollout.check_every)[0]
    start = _start(config, rollout, queue, jnp.promote_types(config.dtype, jnp.float32))
    local_rows = rows // shards
    loop = jax.lax.while_loop(lambda loop: (loop.slots.row < local_rows).any(), body, start)
    return loop.written.assemble(prompts, rollout.pad_id), loop.steps
