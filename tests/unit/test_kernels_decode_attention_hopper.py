"""The Hopper kernel of decode_attention in GPU interpret mode, lowered for CUDA, and on a chip (``-m gpu``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType

from kernels import dispatch
from kernels.decode_attention import decode_attention, pallas_hopper, write_cache
from kernels.decode_attention.pallas_hopper import Tiles, choose_tiles
from tests.unit.test_kernels_decode_attention import case, oracle

INTERPRET = InterpretGPUParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized", num_tma_threads_per_device=1
)
SMALL = 4, 136, 1, 2, 64, 2, 72  # rows, positions, key heads, query heads, size of a head, prompts and their positions
OPTIONS = [{}, dict(window=7), dict(soft_cap=1.5, scale=0.4), dict(window=100, num_shards=2)]
BF16 = jnp.dtype("bfloat16")


def product(a, b, onto, transpose=False):
    """The interpreter has no products with an operand in registers; and who reads shared memory must fence the next copy."""
    b = b[...].T if transpose else b[...]
    out = onto + jnp.dot(a[...].astype(jnp.float32), b.astype(jnp.float32))
    plgpu.commit_smem()
    return out


def kernel(queries, keys, values, lengths, prompt, layer=None, tiles=None, interpret=None, **options):
    prompt = tuple(prompt.values()) if prompt else None
    options = dict(num_shards=1, soft_cap=None, window=None, scale=queries.shape[-1] ** -0.5) | options
    options["window"] = None if options["window"] is None else jnp.int32(options["window"])
    arrays = queries, keys, values, lengths, prompt, layer
    return pallas_hopper.decode_attention(*arrays, **options, tiles=tiles, interpret=interpret)


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("options, splits", list(zip(OPTIONS, ((3, 1), (1, 2), (1, 1), (3, 2)), strict=True)), ids=str)
def test_interpreted(options, splits, monkeypatch):
    """Against float64, with races looked for and NaN in memory that nobody wrote."""
    monkeypatch.setattr(pallas_hopper, "_product", product)
    *arrays, lengths, prompt = case(BF16, sizes=SMALL)
    prompt["prompt_index"] %= 2 // options.get("num_shards", 1)
    got = kernel(*arrays, lengths, prompt, tiles=Tiles(64, 2, *splits), interpret=INTERPRET, **options)
    assert relative(got, oracle(*arrays, lengths, prompt, **options)) < 4e-3
    assert not got[0].any()  # length 0


def test_interpreted_layers_without_prompts(monkeypatch):
    monkeypatch.setattr(pallas_hopper, "_product", product)
    queries, keys, values, lengths, _ = case(BF16, layers=3, sizes=SMALL)
    got = kernel(queries, keys, values, lengths, {}, jnp.int32(2), Tiles(64, 3, 1, 1), INTERPRET)
    assert relative(got, oracle(queries, keys[2], values[2], lengths)) < 4e-3


def lowered(function, layers=None, positions=256, dtype=BF16):
    lead = () if layers is None else (layers,)
    cache = jax.ShapeDtypeStruct((*lead, 8, positions, 2, 64), dtype)
    queries, lengths = jax.ShapeDtypeStruct((8, 4, 64), dtype), jax.ShapeDtypeStruct((8,), jnp.int32)
    return jax.jit(function).trace(queries, cache, cache, lengths).lower(lowering_platforms=("cuda",)).as_text()


def test_a_layer_is_read_in_place():
    text = lowered(
        lambda q, k, v, n: decode_attention(q, k, v, lengths=n, layer=n[0], implementation="pallas_hopper"), 3
    )
    assert text.count("custom_call @mosaic_gpu") == 1 and "gather" not in text and "dot_general" not in text
    assert text.count("dynamic_slice") == 0


def test_where_it_is_the_default(monkeypatch):
    def chosen(**shape):
        return "mosaic_gpu" in lowered(lambda q, k, v, n: decode_attention(q, k, v, lengths=n), **shape)

    assert not chosen()  # no GPU here
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    assert chosen()
    assert not chosen(positions=252) and not chosen(dtype=jnp.float32)
    assert chosen(positions=512)  # two splits
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])):
        assert not chosen()


@pytest.mark.parametrize(
    "sizes, dtype, words",
    [
        ((4, 136, 1, 2, 64, 2, 72), np.float32, "bf16 or fp16, not float32"),
        ((4, 136, 1, 2, 32, 2, 72), BF16, "heads of 64 or 128, not 32"),
        ((4, 136, 1, 65, 64, 2, 72), BF16, "at most 64 queries a key head, not 65"),
        ((4, 130, 1, 2, 64, 2, 72), BF16, "multiple of 8 positions, not 130 and 72"),
    ],
)
def test_what_it_does_not_take(sizes, dtype, words):
    *arrays, lengths, prompt = case(dtype, sizes=sizes)
    with pytest.raises(ValueError, match=f'{words}; use "packed_xla"'):
        decode_attention(*arrays, lengths=lengths, **prompt, implementation="pallas_hopper")


def test_splits():
    assert choose_tiles(128 * 8, 1280).own == 1
    assert choose_tiles(8 * 8, 1280).own == 4  # as many as there is room for
    assert choose_tiles(8 * 8, 800).own == 3  # as many as have 4 blocks
    assert choose_tiles(1, 100).own == 1
    assert choose_tiles(128 * 8, 512, 24 * 8, 2048).shared == 1
    assert choose_tiles(128 * 8, 512, 4 * 8, 2048).shared == 8  # as many as there is room for, of 4 blocks
    assert choose_tiles(128 * 8, 512, 4 * 8, 600).shared == 2


def test_under_x64():
    with jax.enable_x64(True):
        run = lambda q, k, v, n: decode_attention(q, k, v, lengths=n, window=9, implementation="pallas_hopper")
        assert "custom_call @mosaic_gpu" in lowered(run)


CHIP = [
    ((16, 264, 8, 16, 128, 2, 64), {}),
    ((16, 328, 4, 32, 128, 4, 200), dict(soft_cap=30.0)),
    ((6, 1000, 2, 14, 64, 2, 104), dict(window=300, num_shards=2)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes, options", CHIP, ids=str)
def test_on_a_chip(sizes, options):
    queries, keys, values, lengths, prompt = case(BF16, layers=2, sizes=sizes)
    prompt["prompt_index"] %= len(prompt["prompt_lens"]) // options.get("num_shards", 1)
    own = prompt | {k: prompt[k][1] for k in ("prompt_keys", "prompt_values")}
    want = oracle(queries, keys[1], values[1], lengths, own, **options)
    for splits in ((1, 1), (3, 2)):
        got = kernel(queries, keys, values, lengths, prompt, jnp.int32(1), Tiles(64, 2, *splits), **options)
        assert relative(got, want) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [None, 3])
def test_on_a_chip_a_carried_cache_is_neither_copied_nor_cut(layers):
    shape = (64, 512, 2, 64) if layers is None else (layers, 64, 512, 2, 64)
    cache, new = jnp.zeros(shape, BF16), jnp.ones((64, 2, 64), BF16)

    def loop(keys, values, positions):
        def body(i, carry):
            q, *caches = carry
            layer = None if layers is None else i % layers
            keys, values = (write_cache(cache, new, positions + i, layer=layer) for cache in caches)
            q += decode_attention(
                q, keys, values, lengths=positions + i + 1, layer=layer, implementation="pallas_hopper"
            )
            return q, keys, values

        return jax.lax.fori_loop(0, 20, body, (jnp.ones((64, 4, 64), BF16), keys, values))

    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(cache, cache, jnp.arange(64)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes / 8
