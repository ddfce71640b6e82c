"""The TPU kernel of decode_attention in TPU interpret mode, against float64."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels.decode_attention import decode_attention, pallas_tpu, write_cache
from kernels.decode_attention.pallas_tpu import choose_block, fetched
from tests.interpreted import INTERPRET, no_races  # noqa: F401  watches every test here
from tests.unit.test_kernels_decode_attention import OPTIONS, case, oracle

BF16, FP32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


def kernel(queries, keys, values, lengths, prompt, layer=None, block=4, **options):
    """By default blocks of 4 of the cache's 12 positions, and of the prompts' 5: their second is cut off."""
    prompt = tuple(prompt.values()) if prompt else None
    options = dict(num_shards=1, soft_cap=None, window=None, scale=queries.shape[-1] ** -0.5) | options
    options["window"] = None if options["window"] is None else jnp.int32(options["window"])
    arrays = queries, keys, values, lengths, prompt, layer
    return pallas_tpu.decode_attention(*arrays, **options, block=block, interpret=INTERPRET)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(options):
    *arrays, lengths, prompt = case()
    got = kernel(*arrays, lengths, prompt, **options)
    np.testing.assert_allclose(got, oracle(*arrays, lengths, prompt, **options), rtol=1e-5, atol=2e-6)
    assert not got[0].any()  # length 0


@pytest.mark.parametrize("block", [5, 16])
def test_without_prompts(block):
    *arrays, lengths, _ = case(seed=block)
    got = kernel(*arrays, lengths, {}, block=block)
    np.testing.assert_allclose(got, oracle(*arrays, lengths), rtol=1e-5, atol=2e-6)


def test_bfloat16_accumulates_in_fp32():
    *arrays, lengths, prompt = case(jnp.bfloat16)
    got = kernel(*arrays, lengths, prompt)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), oracle(*arrays, lengths, prompt), atol=2e-2)


def test_stacked_caches_and_a_cache_narrower_than_the_queries():
    queries, keys, values, lengths, prompt = case(layers=3)
    stacked = ("prompt_keys", "prompt_values")
    prompt |= {k: prompt[k].astype(jnp.bfloat16) for k in stacked}
    keys, values = keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    got = kernel(queries, keys, values, lengths, prompt, jnp.int32(2), window=6)
    own = {k: v[2] if k in stacked else v for k, v in prompt.items()}
    np.testing.assert_allclose(got, oracle(queries, keys[2], values[2], lengths, own, window=6), atol=1e-2)


def test_blocks_that_a_row_does_not_see_are_not_fetched():
    # Blocks of 4; one step before the cache's turn and four in it. Positions 6 to 12 lie in blocks 1 to 3, none in block 0.
    steps = jnp.arange(-1, 4)
    assert fetched(steps, jnp.int32(6), jnp.int32(13), 4).tolist() == [1, 1, 2, 3, 3]
    assert fetched(steps, jnp.int32(0), jnp.int32(0), 4).tolist() == [0] * 5
    assert (
        fetched(steps, jnp.int32(9), jnp.int32(5), 4).tolist() == [1] * 5
    )  # a prompt that the window has left behind


def test_float64_is_refused():
    with jax.enable_x64(True):
        *arrays, lengths, _ = case(np.float64)
        with pytest.raises(ValueError, match='fp32 at most, not float64; use "xla"'):
            decode_attention(*arrays, lengths=lengths, implementation="pallas_tpu")


def test_lowers_for_a_tpu_without_a_copy_of_a_layer():
    shapes = [((8, 16, 128), jnp.bfloat16), *[((3, 8, 256, 8, 128), jnp.bfloat16)] * 2, ((8,), jnp.int32)]
    run = lambda q, k, v, n: decode_attention(q, k, v, lengths=n, layer=n[0], implementation="pallas_tpu")
    shapes = [jax.ShapeDtypeStruct(*x) for x in shapes]
    text = str(jax.export.export(jax.jit(run), platforms=["tpu"])(*shapes).mlir_module())
    assert text.count("tpu_custom_call") == 1 and "dynamic_slice" not in text and "dot_general" not in text


@pytest.mark.parametrize("shape", [(32, 4, 128), (16, 8, 128), (64, 8, 128), (4, 2, 16), (128, 128, 256)])
def test_blocks_fit(shape):
    heads, kv, head_dim = shape
    block = choose_block(*shape, jnp.dtype("bfloat16"))
    padded = block * kv * -(-head_dim // 128) * 128 * 2
    assert block % 16 == 0 and 8 * padded + 4 * heads * kv * block <= pallas_tpu.VMEM_BYTES


def test_tiles_pad_one_head_of_16_bits_to_two():
    sizes = {(kv, dtype): choose_block(16, kv, 128, dtype) for kv in (1, 2) for dtype in (BF16, FP32)}
    assert sizes[1, BF16] == sizes[2, BF16] == sizes[1, FP32] == 2 * sizes[2, FP32] == 1024


def shapes(head_dim, dtype=jnp.bfloat16, layers=4, rows=8, positions=256, kv=2, heads=4):
    cache = jax.ShapeDtypeStruct((layers, rows, positions, kv, head_dim), dtype)
    rows_of = lambda *size, dtype=dtype: jax.ShapeDtypeStruct((rows, *size), dtype)
    return rows_of(heads, head_dim), rows_of(kv, head_dim), cache, cache, rows_of(dtype=jnp.int32)


def every_layer(q, new, keys, values, lengths):
    """A decode step's loop: what each layer writes and reads of stacked caches."""

    def body(layer, carry):
        q, keys, values = carry
        keys, values = (write_cache(cache, new, lengths - 1, layer=layer) for cache in (keys, values))
        return decode_attention(q, keys, values, lengths=lengths, layer=layer).astype(q.dtype), keys, values

    return jax.lax.fori_loop(0, keys.shape[0], body, (q, keys, values))


@pytest.mark.parametrize("head_dim, dtype, kernels", [(128, BF16, 1), (256, BF16, 1), (64, BF16, 0), (128, FP32, 1)])
def test_where_it_is_the_default(head_dim, dtype, kernels):
    text = jax.jit(every_layer).trace(*shapes(head_dim, dtype)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


@pytest.mark.tpu
def test_stacked_caches_are_written_and_read_in_place():
    """By the TPU compiler's text: not a layer's keys or values are copied, and none of the stack."""
    pytest.importorskip("libtpu")
    topology = topologies.get_topology_desc("v6e:2x2", platform="tpu")
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(topology.devices[0]))
    compiled = jax.jit(every_layer, donate_argnums=(2, 3)).lower(*map(place, shapes(128))).compile()
    assert not re.search(r"bf16\[(4,|1,)?8,256,2,128\]\S* (copy|transpose)\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
