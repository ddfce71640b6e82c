"""Decode attention: one query token a row against its prompt's cache and its own."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.decode_attention import pallas_hopper, pallas_tpu, xla
from kernels.decode_attention.cache import check_layer

# One entry an implementation; a backend is one more file and one more line here, chosen by platform in `_run`.
IMPLEMENTATIONS = {
    "xla": xla.decode_attention,
    "packed_xla": xla.packed,
    "pallas_tpu": pallas_tpu.decode_attention,
    "pallas_hopper": pallas_hopper.decode_attention,
}


def decode_attention(
    queries: Float[Array, "B H hd"],
    keys: Float[Array, "*L B S KV hd"],
    values: Float[Array, "*L B S KV hd"],
    *,
    lengths: Int[Array, " B"],
    prompt_keys: Float[Array, "*L Q P KV hd"] | None = None,
    prompt_values: Float[Array, "*L Q P KV hd"] | None = None,
    prompt_lens: Int[Array, " Q"] | None = None,
    prompt_index: Int[Array, " B"] | None = None,
    layer: int | Int[Array, ""] | None = None,
    num_shards: int = 1,
    soft_cap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B H hd"]:
    """softmax(soft_cap tanh(scale q k / soft_cap)) v over the row's prompt, then its own first ``lengths[b]`` tokens.

    Row b sees ``prompt_keys[prompt_index[b]][: prompt_lens[prompt_index[b]]]`` and ``keys[b, : lengths[b]]``, which
    counts the token just written. Query head h reads key head ``h // (H / KV)``. Softmax and sums are in fp32 at
    least; the result has the queries' dtype. A row of length 0 gives zeros. What the caches hold past those lengths
    may be anything, NaN included.

    ``scale`` defaults to ``hd ** -0.5``. ``window=w`` keeps the last w tokens of prompt and completion together, the
    query's own included; it may be traced. ``layer`` (may be traced) picks from stacked caches ``[L, ...]``; the
    prompt caches are then stacked too. ``num_shards=n`` says that rows and prompts lie in n equal contiguous blocks
    and that ``prompt_index`` counts within the row's own block, so that a sharded leading axis needs no exchange.

    ``implementation``: "xla" (products a head), "packed_xla" (products over all heads: CPUs and GPUs), "pallas_hopper" (a
    kernel for GPUs of compute capability 9.0: heads of 64 or 128, bf16 or fp16, caches of a multiple of 8 positions),
    "pallas_tpu" (a kernel for TPUs, not for float64) or None, by the platform that it is compiled for. The kernels read no
    block of positions outside a row's length and window, and a prompt once for as many of its rows as have 64 queries a key
    head (Hopper) or 128 queries (TPU), wherever those rows are. None is one of them where ``num_shards`` is 1 and no mesh of
    several devices is in use (``jax.set_mesh``), but inside ``shard_map``: "pallas_hopper" where it fits and the GPU
    is a Hopper; "pallas_tpu" for heads of multiples of 128. It was not timed on a chip yet, but for "xla" the compiler's
    text has a copy of all layers' values in every layer.
    """
    check_layer("decode_attention", keys.ndim, layer)
    num_rows, num_heads, head_dim = queries.shape
    num_kv = keys.shape[-2]
    if num_heads % num_kv:
        raise ValueError(
            f"decode_attention: queries have {num_heads} heads, not a multiple of the {num_kv} heads of keys; "
            "repeat or pad the query heads"
        )
    prompt = _prompt(prompt_keys, prompt_values, prompt_lens, prompt_index)
    if prompt is not None:
        num_prompts = prompt[2].shape[0]
        if num_shards < 1 or num_rows % num_shards or num_prompts % num_shards:
            raise ValueError(
                f"decode_attention: num_shards={num_shards} must divide both the {num_rows} rows and the "
                f"{num_prompts} prompts; pad them, or use num_shards=1 with a global prompt_index"
            )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"decode_attention: soft_cap={soft_cap} must be positive; None for no cap")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"decode_attention: window={window} must be at least 1 token; None for no window")
    layer = None if layer is None else jnp.asarray(layer).astype(jnp.int32)
    window = None if window is None else jnp.asarray(window).astype(jnp.int32)
    scale = head_dim**-0.5 if scale is None else scale
    options = dict(num_shards=num_shards, soft_cap=soft_cap)
    arrays = queries, keys, values, lengths.astype(jnp.int32), prompt, layer, window, scale
    return _run(implementation, arrays, options)


def _run(implementation, arrays, options):
    def bound(name):
        return lambda *arrays: _call(arrays, name=name, **options)

    if implementation is not None:
        dispatch.named("decode_attention", IMPLEMENTATIONS, implementation)
        return bound(implementation)(*arrays)
    queries, keys, _, _, prompt, *_ = arrays
    own = dispatch.on_one_device() and options["num_shards"] == 1  # no compiler cuts a kernel over devices
    hopper = own and not pallas_hopper.unfit(queries, keys, prompt) and dispatch.on_hopper()
    lanes = own and pallas_tpu.fills_lanes(queries)
    # Decided when lowered, not when traced: a CPU machine may be compiling for a TPU.
    return jax.lax.platform_dependent(
        *arrays,
        cpu=bound("packed_xla"),
        cuda=bound("pallas_hopper" if hopper else "packed_xla"),
        tpu=bound("pallas_tpu" if lanes else "xla"),
        default=bound("xla"),
    )


# Under jit of its own, so that a model's layers lower it once: a kernel takes half a second.
@functools.partial(jax.jit, static_argnames=("name", "num_shards", "soft_cap"))
def _call(arrays, *, name, num_shards, soft_cap):
    queries, keys, values, lengths, prompt, layer, window, scale = arrays
    arrays = queries, keys, values, lengths, prompt, layer
    return IMPLEMENTATIONS[name](*arrays, num_shards, soft_cap, window, scale)


def _prompt(keys, values, lens, index) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None:
    """The four prompt arguments, all or none of them."""
    given = dict(prompt_keys=keys, prompt_values=values, prompt_lens=lens, prompt_index=index)
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise ValueError(
            f"decode_attention: prompt caches need all of {', '.join(given)}; missing {', '.join(missing)}"
        )
    return keys, values, lens.astype(jnp.int32), index.astype(jnp.int32)
