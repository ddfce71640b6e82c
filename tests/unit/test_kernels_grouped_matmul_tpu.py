"""The TPU kernels of grouped_matmul in TPU interpret mode: races are looked for, and memory nobody wrote holds NaN."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import aot
from kernels.grouped_matmul import grouped_matmul, pallas_tpu
from kernels.grouped_matmul.pallas_tpu import Tiles, by_group, by_tile, choose_tiles
from tests import support
from tests.interpreted import INTERPRET, no_races  # noqa: F401  watches every test here

M, K, N, E = 80, 40, 24, 5
GROUPS = {
    "uneven": [10, 0, 33, 16, 21],
    "below M": [5, 0, 0, 30, 1],
    "one": [0, 0, 80, 0, 0],
    "none": [0] * 5,
    "at tile bounds": [16, 32, 0, 16, 16],
}


def operands(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((M, K), (E, K, N), (M, N)))


def groups_of(sizes):
    ends = np.cumsum(sizes)
    return list(zip(ends - sizes, ends, strict=True))


@pytest.mark.parametrize(
    "tiles, transpose",
    [
        (Tiles(16, 16, 8), False),
        (Tiles(32, 128, 128), True),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in [(Tiles(16, 16, 8), True), (Tiles(32, 128, 128), False)]
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", GROUPS)
def test_product(groups, tiles, transpose):
    lhs, rhs, _ = operands(jnp.float32)
    sizes = GROUPS[groups]
    lhs = lhs.at[sum(sizes) :].set(jnp.nan)
    want = np.zeros((M, N))
    for e, (a, b) in enumerate(groups_of(sizes)):
        want[a:b] = np.asarray(lhs[a:b], np.float64) @ np.asarray(rhs[e], np.float64)
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose else rhs
    got = pallas_tpu.product(
        lhs,
        rhs,
        jnp.array(sizes),
        transpose_rhs=transpose,
        dtype=jnp.dtype("float32"),
        tiles=tiles,
        interpret=INTERPRET,
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert not np.asarray(got[sum(sizes) :]).any()


@pytest.mark.parametrize("tiles", [Tiles(32, 16, 8)], ids=str)
@pytest.mark.parametrize("groups", GROUPS)
def test_weight_gradient(groups, tiles):
    lhs, _, g = operands(jnp.float32)
    sizes = GROUPS[groups]
    lhs, g = (x.at[sum(sizes) :].set(jnp.nan) for x in (lhs, g))
    want = [np.asarray(lhs[a:b], np.float64).T @ np.asarray(g[a:b], np.float64) for a, b in groups_of(sizes)]
    got = pallas_tpu.weight_gradient(
        lhs, g, jnp.array(sizes), dtype=jnp.dtype("float32"), tiles=tiles, interpret=INTERPRET
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


def test_bfloat16_accumulates_in_fp32():
    lhs, rhs, _ = operands(jnp.bfloat16)
    sizes = jnp.array(GROUPS["uneven"])
    run = functools.partial(pallas_tpu.product, lhs, rhs, sizes, transpose_rhs=False, interpret=INTERPRET)
    wide, narrow = (run(dtype=jnp.dtype(dtype), tiles=Tiles(16, 8, 24)) for dtype in ("float32", "bfloat16"))
    want = np.concatenate(
        [
            np.asarray(lhs[a:b], np.float64) @ np.asarray(rhs[e], np.float64)
            for e, (a, b) in enumerate(groups_of(sizes))
        ]
    )
    np.testing.assert_allclose(wide, want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_visits_by_hand():
    # Tiles of 4 rows; groups of 3, 0, 6 and 1 of 12 rows: rows 0-2, none, 3-8, 9, and 10-11 beyond all of them.
    # Tile 0: groups 0 and 2; tile 1: group 2; tile 2: groups 2, 3 and what is beyond, 4. Six visits of at most 3 + 4.
    visits = by_tile(jnp.array([3, 0, 6, 1]), 12, 4)
    assert visits.tile.tolist() == [0, 0, 1, 2, 2, 2, 2] and visits.group.tolist() == [0, 2, 2, 2, 3, 4, 4]
    assert visits.active.tolist() == [1] * 6 + [0] and visits.first.tolist() == [1, 0, 1, 1, 0, 0, 0]
    # For gradients group 1 is visited too, and what is beyond is not: 0 in tile 0; 1; 2 in tiles 0, 1, 2; 3 in tile 2.
    visits = by_group(jnp.array([3, 0, 6, 1]), 12, 4)
    assert visits.group.tolist() == [0, 1, 2, 2, 2, 3, 3] and visits.tile.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert visits.first.tolist() == [1, 1, 1, 0, 0, 1, 0] and visits.last.tolist() == [1, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    "shape", [(65536, 2048, 768), (65536, 768, 2048), (2048, 4096, 14336), (512, 4096, 1536), (7, 5, 3)]
)
def test_tiles_fit_and_cover(shape):
    for generation in (None, *pallas_tpu.ROWS):
        m, k, n = choose_tiles(*shape, jnp.dtype("bfloat16"), generation)
        assert 2 * 2 * (m * k + k * n + m * n) + 4 * m * n <= pallas_tpu.VMEM_BYTES
        own = choose_tiles(*shape, jnp.dtype("bfloat16"), generation, gradient=True)
        assert 2 * 2 * own.k * own.n + 8 * own.k * own.n <= pallas_tpu.VMEM_BYTES
        assert (k == shape[1] or k % 128 == 0) and (n == shape[2] or n % 128 == 0) and m % 16 == 0


def test_what_a_tpu_program_calls():
    """Lowered for a TPU on a machine without one, forward and backward: the default is the kernels, and no dense product."""
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 256), (4, 256, 128)))

    def loss(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.float32).sum()

    run = jax.jit(jax.grad(loss, (0, 1)))
    text = str(jax.export.export(run, platforms=["tpu"])(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32)).mlir_module())
    # The gradients; the product itself is not needed for them.
    assert support.kernel_calls(text, "tpu_custom_call") == 2
    assert "ragged_dot" not in text and "dot_general" not in text


def test_over_several_devices_the_compiler_must_be_able_to_cut_it():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, weights, sizes = jnp.zeros((256, 128)), jnp.zeros((4, 128, 128)), jnp.full(4, 64)
    called = lambda run: jax.jit(run).trace(rows, weights, sizes).lower(lowering_platforms=("tpu",)).as_text()
    own = jax.shard_map(grouped_matmul, in_specs=(P("data"), P(), P()), out_specs=P("data"), check_vma=False)
    with jax.set_mesh(mesh):
        assert "tpu_custom_call" not in called(lambda *x: grouped_matmul(*x))
        assert "tpu_custom_call" in called(own)
    assert "tpu_custom_call" in called(lambda *x: grouped_matmul(*x))


@pytest.mark.tpu
@pytest.mark.parametrize("generation", aot.TOPOLOGIES)
def test_the_tpu_compiler_takes_them(generation, capsys):
    status, table = aot.main([f"--generation={generation}"]), capsys.readouterr().out
    assert status == 0, table
    lines = [line for line in table.splitlines() if line.startswith(generation)]
    assert len(lines) == len(list(aot.compilations(generation)))
    assert all(re.search(r" [1-9]\d*\.\d MiB .* s$", line) for line in lines if "tiny" not in line), table
