"""decode_attention and write_cache against loops over rows in float64, and what they compile to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.decode_attention import decode_attention, write_cache
from kernels.decode_attention.public import IMPLEMENTATIONS
from tests.support import portable

# None, the default, is what the other tests run; what is compiled for one platform alone is in tests of its own.
NAMES = portable(IMPLEMENTATIONS)
B, S, KV, H, HD, Q, PROMPT = 8, 12, 2, 6, 16, 4, 5


@pytest.fixture(autouse=True)
def no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def case(dtype=np.float32, seed=0, layers=None, sizes=(B, S, KV, H, HD, Q, PROMPT)):
    """Arrays, the prompt's arguments, and NaN or inf in the caches wherever nothing may be read."""
    B, S, KV, H, HD, Q, PROMPT = sizes
    rng = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)
    draw = lambda *shape: rng.normal(size=shape)
    lengths = np.array([0, 1, S, *rng.integers(1, S + 1, B - 3)])
    lens = np.array([PROMPT, 1, *rng.integers(1, PROMPT + 1, Q - 2)])
    arrays = draw(B, H, HD), draw(*lead, B, S, KV, HD), draw(*lead, B, S, KV, HD)
    prompts = draw(*lead, Q, PROMPT, KV, HD), draw(*lead, Q, PROMPT, KV, HD)
    for cache, cut, bad in [
        *zip(arrays[1:], (lengths,) * 2, (np.nan, np.inf), strict=True),
        *zip(prompts, (lens,) * 2, (np.inf, np.nan), strict=True),
    ]:
        for row, length in enumerate(cut):
            cache[..., row, length:, :, :] = bad
    as_dtype = lambda xs: [jnp.asarray(x, dtype) for x in xs]
    keys, values = as_dtype(prompts)
    prompt = dict(
        prompt_keys=keys,
        prompt_values=values,
        prompt_lens=jnp.asarray(lens, jnp.int32),
        prompt_index=jnp.asarray(rng.integers(0, 2, B), jnp.int32),
    )
    return *as_dtype(arrays), jnp.asarray(lengths, jnp.int32), prompt


def oracle(queries, keys, values, lengths, prompt=None, num_shards=1, soft_cap=None, window=None, scale=None):
    """A loop over rows and heads in float64, over the two caches joined."""
    (B, H, HD), KV = queries.shape, keys.shape[-2]
    wide = lambda x: np.asarray(x, np.float64)
    out = np.zeros(queries.shape)
    for b in range(B):
        if lengths[b] == 0:
            continue
        for h in range(H):
            head = h // (H // KV)
            k, v = wide(keys[b, : lengths[b], head]), wide(values[b, : lengths[b], head])
            if prompt:
                prompts = len(prompt["prompt_lens"]) // num_shards
                i = b // (B // num_shards) * prompts + int(prompt["prompt_index"][b])
                cut = slice(0, int(prompt["prompt_lens"][i]))
                k = np.concatenate([wide(prompt["prompt_keys"][i, cut, head]), k])
                v = np.concatenate([wide(prompt["prompt_values"][i, cut, head]), v])
            if window:
                k, v = k[-window:], v[-window:]
            s = k @ wide(queries[b, h]) * (HD**-0.5 if scale is None else scale)
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            p = np.exp(s - s.max())
            out[b, h] = p @ v / p.sum()
    return out


OPTIONS = [{}, dict(soft_cap=1.5, scale=0.9), dict(window=3), dict(window=7, num_shards=2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(name, options):
    *arrays, lengths, prompt = case()
    run = lambda lengths, prompt: decode_attention(*arrays, lengths=lengths, **prompt, **options, implementation=name)
    for chosen in (prompt, {}):
        got = jax.jit(run)(lengths, chosen)
        np.testing.assert_allclose(got, oracle(*arrays, lengths, chosen, **options), rtol=1e-5, atol=2e-6)
    assert not got[0].any()  # length 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-14), (jnp.bfloat16, 2e-2)])
def test_dtypes(name, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        *arrays, lengths, prompt = case(dtype)
        run = jax.jit(lambda *a, **prompt: decode_attention(*a, lengths=lengths, **prompt, implementation=name))
        got = run(*arrays, **prompt)
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), oracle(*arrays, lengths, prompt), atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_stacked_caches_with_a_traced_layer(name):
    queries, keys, values, lengths, prompt = case(layers=3)
    stacked = ("prompt_keys", "prompt_values")

    def scan(queries, lengths):
        def body(carry, layer):
            out = decode_attention(
                queries, keys, values, lengths=lengths, **prompt, layer=layer, window=layer + 4, implementation=name
            )
            return carry, out

        return jax.lax.scan(body, 0, jnp.arange(3))[1]

    got = jax.jit(scan)(queries, lengths)
    for layer in range(3):
        own = {k: v[layer] if k in stacked else v for k, v in prompt.items()}
        expected = oracle(queries, keys[layer], values[layer], lengths, own, window=layer + 4)
        np.testing.assert_allclose(got[layer], expected, rtol=1e-5, atol=2e-6)


def test_sharded_rows_stay_where_they_are():
    """Rows, caches and prompts over two devices: equal to one device, without moving a cache."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    *arrays, lengths, prompt = case()
    run = jax.jit(lambda q, k, v, n, prompt: decode_attention(q, k, v, lengths=n, **prompt, num_shards=2))
    placed = jax.device_put((*arrays, lengths, prompt), NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(run(*placed), run(*arrays, lengths, prompt), rtol=1e-6, atol=1e-6)
    text = run.lower(*placed).compile().as_text()
    for op in (" all-gather(", " all-to-all(", " collective-permute("):
        assert op not in text
    assert not [line for line in text.splitlines() if " all-reduce(" in line and "f32[" in line]


def test_prompts_in_one_cache_or_two():
    """A prompt written in front of the completion gives what a shared prompt cache gives."""
    rng = np.random.default_rng(3)
    keys, values = (jnp.asarray(rng.normal(size=(B, S, KV, HD)), jnp.float32) for _ in range(2))
    queries = jnp.asarray(rng.normal(size=(B, H, HD)), jnp.float32)
    joined = decode_attention(queries, keys, values, lengths=jnp.full(B, 9))
    split = decode_attention(
        queries,
        keys[:, 4:],
        values[:, 4:],
        lengths=jnp.full(B, 5),
        prompt_keys=keys[:, :4],
        prompt_values=values[:, :4],
        prompt_lens=jnp.full(B, 4),
        prompt_index=jnp.arange(B),
    )
    np.testing.assert_allclose(split, joined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_write_cache(stacked):
    rng = np.random.default_rng(0)
    cache = np.asarray(rng.normal(size=(3, B, S, KV, HD)), np.float32)
    new = np.asarray(rng.normal(size=(B, KV, HD)), np.float32)
    positions = np.array([0, 3, S - 1, S, -1, 5, 7, 10**6])
    active = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
    expected = cache.copy()
    for b in (0, 1, 2, 6):
        expected[1, b, positions[b]] = new[b]
    if stacked:
        write = jax.jit(lambda cache, new, at, active, layer: write_cache(cache, new, at, active, layer=layer))
        np.testing.assert_array_equal(write(cache, new, positions, active, 1), expected)
    else:
        got = write_cache(jnp.asarray(cache[1]), jnp.asarray(new), jnp.asarray(positions), jnp.asarray(active))
        np.testing.assert_array_equal(got, expected[1])
        everyone = write_cache(jnp.asarray(cache[1]), jnp.asarray(new, jnp.bfloat16), jnp.asarray(positions % S))
        np.testing.assert_array_equal(everyone[5, 5], np.asarray(jnp.asarray(new[5], jnp.bfloat16), np.float32))


@pytest.mark.parametrize("layers", [None, 3])
def test_a_carried_cache_is_written_in_place(layers):
    shape = (64, 128, KV, HD) if layers is None else (layers, 64, 128, KV, HD)
    cache, new = jnp.zeros(shape), jnp.ones((64, KV, HD))

    def loop(cache, positions):
        def body(i, cache):
            layer = None if layers is None else i % layers
            return write_cache(cache, new, positions + i, positions % 2 == 0, layer=layer)

        return jax.lax.fori_loop(0, 20, body, cache)

    compiled = jax.jit(loop, donate_argnums=0).lower(cache, jnp.arange(64)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes / 8


@pytest.mark.parametrize("layers", [None, 3])
def test_a_sharded_cache_is_written_where_it_lies(layers):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    lead = () if layers is None else (None,)
    shape = (B, S, KV, HD) if layers is None else (layers, B, S, KV, HD)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    cache = place(jnp.zeros(shape), *lead, "data", None, "tensor")
    new, positions = place(jnp.ones((B, KV, HD)), "data", "tensor"), place(jnp.arange(B), "data")
    layer = None if layers is None else 1
    write = jax.jit(lambda c, n, p: write_cache(c, n, p, layer=layer), donate_argnums=0)
    text = write.lower(cache, new, positions).compile().as_text()
    for op in (" all-gather(", " all-reduce(", " all-to-all(", " collective-permute("):
        assert op not in text
    got = np.asarray(write(cache, new, positions))
    got = got if layers is None else got[1]
    np.testing.assert_array_equal(got[:, :, 0, 0], np.eye(B, S))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(layer=0), "not stacked"),
        (dict(num_shards=3), "num_shards=3.*8 rows"),
        (dict(window=0), "window=0"),
        (dict(soft_cap=-1.0), "soft_cap"),
        (dict(prompt_lens=None), "missing prompt_lens"),
        (dict(implementation="cuda"), 'implementation="cuda".*"xla"'),
    ],
)
def test_errors_name_the_argument(options, words):
    *arrays, lengths, prompt = case()
    with pytest.raises(ValueError, match=words):
        decode_attention(*arrays, lengths=lengths, **{**prompt, **options})


def test_errors_of_heads_and_stacked_caches():
    *arrays, lengths, _ = case()
    with pytest.raises(ValueError, match=r"5 heads.*2 heads"):
        decode_attention(arrays[0][:, :5], *arrays[1:], lengths=lengths)
    with pytest.raises(ValueError, match="name a layer="):
        write_cache(jnp.zeros((1, B, S, KV, HD)), jnp.zeros((B, KV, HD)), lengths)
