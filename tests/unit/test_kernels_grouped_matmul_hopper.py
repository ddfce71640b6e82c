"""The Hopper kernels of grouped_matmul: their tiles, interpreted where jax can, lowered anywhere, and on the chip itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from kernels.grouped_matmul import grouped_matmul, grouped_swiglu, pallas_hopper
from kernels.grouped_matmul.hopper_tiles import BAND, by_size, num_doubles, place, row_tiles
from tests import support

M, K, N, E = 320, 128, 64, 4
GROUPS = {"uneven": [10, 0, 190, 70], "at slabs": [64, 128, 127, 1], "one": [0, 320, 0, 0]}
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
interpretable = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the GPU interpreter lacks layout_cast")


def operands(shape=(M, K, N, E), dtype=BF16, used=None, seed=0):
    """lhs, rhs and g; rows from ``used`` on are NaN."""
    m, k, n, e = shape
    rng = np.random.default_rng(seed)
    lhs, rhs, g = (jnp.asarray(rng.normal(size=size), dtype) for size in ((m, k), (e, k, n), (m, n)))
    return (
        lhs.at[used:].set(jnp.nan) if used is not None else lhs,
        rhs,
        g.at[used:].set(jnp.nan) if used is not None else g,
    )


def slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def product_of(lhs, rhs, sizes):
    out = np.zeros((lhs.shape[0], rhs.shape[2]), np.float32)
    for rows, weights in zip(slices(sizes), rhs, strict=True):
        out[rows] = np.asarray(lhs[rows], np.float32) @ np.asarray(weights, np.float32)
    return out


def gradient_of(lhs, g, sizes):
    return np.stack([np.asarray(lhs[r], np.float32).T @ np.asarray(g[r], np.float32) for r in slices(sizes)])


def listed(tiles, num_rows, num_groups):
    """(group, first, second, end) of tiles of two slabs, and of those of one."""
    places, counts = num_doubles(num_rows, num_groups), tiles.counts.tolist()
    assert counts[0] <= places and counts[1] <= num_groups + 1 and len(tiles.group) == places + num_groups + 1
    every = list(zip(*(x.tolist() for x in tiles[:4]), strict=True))
    return every[: counts[0]], every[places : places + counts[1]]


def test_row_tiles_by_hand():
    # Groups of 10, 0, 190 and 70 rows of 320, 50 beyond. 10: one slab, rows 0-9 of 0-63. 190 from row 10 to 200: slabs at 10
    # and 74; 138 would end at 202 and moves to 136, alone. 70 from 200 to 270: at 200 and 206. 50 from 270: alone.
    doubles, singles = listed(row_tiles(jnp.array([10, 0, 190, 70]), 320), 320, 4)
    assert doubles == [(2, 10, 74, 200), (3, 200, 206, 270)]
    assert singles == [(0, 0, 10, 10), (2, 136, 200, 200), (4, 270, 320, 320)]


def test_row_tiles_cover_every_row_with_its_own_group():
    num_rows, rng = 700, np.random.default_rng(0)
    tiles_of = jax.jit(functools.partial(row_tiles, num_rows=num_rows))
    for _ in range(30):
        cuts = np.sort(rng.integers(0, num_rows + 1, size=5))
        sizes = np.diff(cuts, prepend=0)
        owner = np.repeat(np.arange(6), [*sizes, num_rows - cuts[-1]])
        written = np.full(num_rows, -1)
        for tiles in listed(tiles_of(jnp.asarray(sizes, jnp.int32)), num_rows, 5):
            assert [group for group, *_ in tiles] == sorted(group for group, *_ in tiles)
            for group, first, second, end in tiles:
                assert second + 64 <= end or second == end  # only a first slab is stored row by row
                for row in (first, second):
                    own = slice(row, min(row + 64, end))
                    assert (owner[own] == min(group, 5)).all()
                    written[own] = owner[own]
        assert (written == owner).all()


def test_groups_by_size():
    groups = by_size(jnp.array([3, 0, 7, 3]), 20)
    assert [x.tolist() for x in groups] == [[2, 0, 3, 1], [3, 0, 10, 3], [10, 3, 13, 3], [13]]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (BAND, 3), (3 * BAND - 5, 4)])
def test_every_tile_has_a_place(rows, columns):
    row, column = jax.vmap(lambda i: place(i, rows, columns))(jnp.arange(rows * columns, dtype=jnp.int32))
    found = list(zip(row.tolist(), column.tolist(), strict=True))
    assert sorted(found) == [(r, c) for r in range(rows) for c in range(columns)]
    assert found[: min(rows, BAND)] == [(r, 0) for r in range(min(rows, BAND))]


def interpret(races):
    return plgpu.InterpretGPUParams(  # pyright: ignore[reportAttributeAccessIssue]  by another name in jax 0.10
        detect_races=races, uninitialized_memory="nan"
    )


@interpretable
@pytest.mark.parametrize("groups", GROUPS)
def test_interpreted(groups):
    """Memory nobody wrote holds NaN. Races are looked for, but where a slab repeats rows, which are then stored twice."""
    sizes = GROUPS[groups]
    lhs, rhs, g = operands(used=sum(sizes))
    transpose, group_sizes = groups == "at slabs", jnp.array(sizes)
    got = pallas_hopper.product(
        lhs,
        jnp.swapaxes(rhs, 1, 2) if transpose else rhs,
        group_sizes,
        transpose_rhs=transpose,
        dtype=F32,
        blocks=2,
        interpret=interpret(races=groups == "one"),
    )
    np.testing.assert_allclose(got, product_of(lhs, rhs, sizes), rtol=0, atol=1e-4)
    got = pallas_hopper.weight_gradient(lhs, g, group_sizes, dtype=F32, blocks=2, interpret=interpret(races=True))
    np.testing.assert_allclose(got, gradient_of(lhs, g, sizes), rtol=0, atol=1e-4)


def swiglu_of(lhs, gate, up, sizes):
    a, b = product_of(lhs, gate, sizes), product_of(lhs, up, sizes)
    return a / (1 + np.exp(-a)) * b


@interpretable
@pytest.mark.parametrize("sizes", [GROUPS["uneven"], [0, 128, 64, 0]], ids=str)
def test_swiglu(sizes):
    """192 columns are a tile of 128 and half of one."""
    lhs, gate, _ = operands((M, K, 192, E), used=sum(sizes))
    up = operands((M, K, 192, E), seed=1)[1]
    how = interpret(races=not any(size % 64 for size in sizes))
    got = pallas_hopper.swiglu(lhs, gate, up, jnp.array(sizes), dtype=F32, blocks=2, interpret=how)
    np.testing.assert_allclose(got, swiglu_of(lhs, gate, up, sizes), rtol=1e-5, atol=1e-4)


def called(run, *shapes):
    """How many Mosaic GPU kernels a program calls when it is lowered for CUDA, here."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return support.kernel_calls(text, "mosaic_gpu_v2")


SHAPES = ((M, K), BF16), ((E, K, N), BF16), ((E,), jnp.int32)


def gradients(lhs, rhs, sizes, name=None):
    run = lambda a, b: grouped_matmul(a, b, sizes, preferred_element_type=F32, implementation=name).sum()
    return jax.grad(run, (0, 1))(lhs, rhs)


def hopper(kind="NVIDIA H200", size=1):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((size,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(("dtype", "transpose"), [("float32", False), ("bfloat16", True)])
def test_lowered(dtype, transpose):
    """Named, on a machine that has no such device: layouts, shared memory and all but the device's own assembler."""
    rhs = ((E, N, K) if transpose else (E, K, N), BF16)
    run = functools.partial(
        grouped_matmul, transpose_rhs=transpose, preferred_element_type=dtype, implementation="pallas_hopper"
    )
    assert called(run, ((M - 3, K), BF16), rhs, SHAPES[2]) == 1
    assert called(functools.partial(gradients, name="pallas_hopper"), *SHAPES) == 2


def test_lowered_with_64_bit_numbers(x64):
    assert called(functools.partial(gradients, name="pallas_hopper"), *SHAPES[:2], ((E,), jnp.int64)) == 2


def test_what_a_cuda_program_calls_for_swiglu():
    """One kernel, but where a backward pass asks for both products: then two, and one for the gradient of gate."""
    shapes = *SHAPES[:2], *SHAPES[1:]

    def gradient(remat, *arrays):
        run = remat(lambda lhs, gate, *others: jnp.sin(grouped_swiglu(lhs, gate, *others)).astype(F32).sum())
        return jax.value_and_grad(run, 1)(*arrays)

    assert called(grouped_swiglu, *shapes) == 0  # nothing says that it is for Hopper
    with hopper():
        half = lambda *shape: (shape, jnp.float16)
        assert called(grouped_swiglu, half(M - 3, K), half(E, K, N), half(E, K, N), SHAPES[2]) == 1
        assert called(functools.partial(gradient, lambda run: run), *shapes) == 2 + 1
        assert called(functools.partial(gradient, jax.checkpoint), *shapes) == 1 + 2 + 1
    with hopper(size=2):
        assert called(grouped_swiglu, *shapes) == 0


def test_swiglu_under_remat_and_shard_map():
    """What stands in for a forward rule is traced when that is dropped, and its result typed as inside shard_map still."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    named = functools.partial(grouped_swiglu, implementation="pallas_hopper")
    sharded = jax.shard_map(named, mesh=mesh, in_specs=(P("x"), P(), P(), P("x")), out_specs=P("x"))
    run = lambda *arrays: jax.checkpoint(sharded)(*arrays).astype(F32).sum()
    shapes = *SHAPES[:2], *SHAPES[1:]
    program = jax.make_jaxpr(jax.value_and_grad(run))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert str(program).count("name=grouped_swiglu") == 1


def test_what_a_cuda_program_calls():
    assert called(gradients, *SHAPES) == 0  # nothing says that it is for Hopper
    with hopper("NVIDIA A100-SXM4-80GB"):
        assert called(gradients, *SHAPES) == 0
    with hopper():
        assert called(gradients, *SHAPES) == 2
        assert called(gradients, ((M + 1, K), BF16), *SHAPES[1:]) == 1  # rows contracted come in eights
        assert called(gradients, ((M, K), F32), *SHAPES[1:]) == 0
        assert called(gradients, ((M, K + 8), BF16), ((E, K + 8, N), BF16), SHAPES[2]) == 0
    with hopper(size=2):  # no compiler cuts a kernel
        assert called(gradients, *SHAPES) == 0


def test_what_it_cannot_serve():
    run = functools.partial(grouped_matmul, implementation="pallas_hopper")
    lhs, rhs, _ = operands()
    sizes = jnp.array(GROUPS["one"])
    for arguments, message in (
        ((lhs.astype(F32), rhs), r"operands are float32 and bfloat16.*both bfloat16.*implementation=None"),
        ((lhs[:, :120], rhs[:, :120]), r"K and N of \(320, 120\) and \(4, 120, 64\).*multiples of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments, sizes)
    with pytest.raises(ValueError, match="M=317 has to be a multiple of 8"):
        jax.eval_shape(jax.grad(lambda b: run(lhs[:317], b, sizes).sum().astype(F32)), rhs)
    with hopper("NVIDIA B200"), pytest.raises(ValueError, match=r"the device is NVIDIA B200.*9\.x"):
        jax.eval_shape(run, lhs, rhs, sizes)
    with pytest.raises(ValueError, match=r"grouped_swiglu: .*operands are bfloat16 and float32.*implementation=None"):
        grouped_swiglu(lhs, rhs, rhs.astype(F32), sizes, implementation="pallas_hopper")


# On a Hopper GPU: JAX_PLATFORMS=cuda python -m pytest -n 0 -m gpu tests/unit/test_kernels_grouped_matmul_hopper.py
CHIP = 1024, 320, 448, 6
ON_CHIP = {
    "uneven": [10, 0, 190, 70, 300, 5],
    "tiny": [1, 2, 3, 4, 5, 6],
    "one": [0, 1024, 0, 0, 0, 0],
    "none": [0] * 6,
    "all rows": [64, 128, 127, 1, 500, 204],
}


@functools.cache
def compiled(method, **options):
    return jax.jit(functools.partial(getattr(pallas_hopper, method), **options))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", ON_CHIP)
def test_on_the_chip(groups):
    """Products of bf16 are exact in fp32, so that only the order of summation differs."""
    sizes = ON_CHIP[groups]
    lhs, rhs, g = operands(CHIP, used=sum(sizes))
    group_sizes, close = jnp.array(sizes), functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-3)
    want = product_of(lhs, rhs, sizes)
    close(compiled("product", transpose_rhs=False, dtype=F32)(lhs, rhs, group_sizes), want)
    close(compiled("product", transpose_rhs=True, dtype=F32)(lhs, jnp.swapaxes(rhs, 1, 2), group_sizes), want)
    wide = compiled("weight_gradient", dtype=F32)(lhs, g, group_sizes)
    close(wide, gradient_of(lhs, g, sizes))
    narrow = compiled("product", transpose_rhs=False, dtype=BF16)(lhs, rhs, group_sizes)
    np.testing.assert_allclose(narrow.astype(F32), want, rtol=2**-8, atol=1e-3)
    narrow = compiled("weight_gradient", dtype=BF16)(lhs, g, group_sizes)
    np.testing.assert_array_equal(narrow, wide.astype(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", ON_CHIP)
def test_swiglu_on_the_chip(groups):
    sizes = ON_CHIP[groups]
    lhs, gate, _ = operands(CHIP, used=sum(sizes))
    up, group_sizes = operands(CHIP, seed=1)[1], jnp.array(sizes)
    lhs = lhs / 8  # products of some 2, where silu bends
    wide = compiled("swiglu", dtype=F32)(lhs, gate, up, group_sizes)
    np.testing.assert_allclose(wide, swiglu_of(lhs, gate, up, sizes), rtol=1e-4, atol=1e-4)
    narrow = compiled("swiglu", dtype=BF16)(lhs, gate, up, group_sizes)
    np.testing.assert_array_equal(narrow, wide.astype(BF16))


@pytest.mark.gpu
def test_swiglu_by_default_on_the_chip():
    """A pass that keeps nothing, and its gradients."""
    sizes = jnp.array(ON_CHIP["uneven"])
    lhs, gate, g = operands(CHIP)
    up = operands(CHIP, seed=1)[1]
    product = functools.partial(grouped_matmul, group_sizes=sizes)
    unfused = lambda lhs, gate, up: jax.nn.silu(product(lhs, gate)) * product(lhs, up)
    fused = jax.checkpoint(lambda *arrays: grouped_swiglu(*arrays, sizes))

    def run(f, *arrays):
        out, pull = jax.vjp(f, *arrays)
        return out, *pull(g)

    program = jax.jit(functools.partial(run, fused)).lower(lhs, gate, up)
    assert support.kernel_calls(program.as_text(), "mosaic_gpu_v2") == 1 + 2 + 2 + 2
    wanted = jax.jit(functools.partial(run, unfused))(lhs, gate, up)
    for a, b in zip(program.compile()(lhs, gate, up), wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-5, atol=2**-6 * np.abs(b).max())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 56, 65])
def test_few_rows_on_the_chip(rows):
    lhs, rhs, _ = operands((rows, 64, 64, 2))
    sizes = [rows // 2, rows - rows // 2]
    got = compiled("product", transpose_rhs=False, dtype=F32)(lhs, rhs, jnp.array(sizes))
    np.testing.assert_allclose(got, product_of(lhs, rhs, sizes), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_the_default_on_the_chip():
    """float16, under shard_map over an expert axis of one device, with gradients: the kernels, by default."""
    sizes = ON_CHIP["uneven"]
    lhs, rhs, g = operands(CHIP, jnp.float16)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("expert"), P("expert"), P()), out_specs=P(), check_vma=False
    )
    def run(lhs, rhs, sizes, g):
        out, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes), lhs, rhs)
        return out, *pull(g)

    arguments = lhs, rhs, jnp.array(sizes), g
    program = jax.jit(run).lower(*arguments)
    assert support.kernel_calls(program.as_text(), "mosaic_gpu_v2") == 3
    out, d_lhs, d_rhs = program.compile()(*arguments)
    used = sum(sizes)
    np.testing.assert_allclose(out.astype(F32), product_of(lhs, rhs, sizes), rtol=2**-10, atol=2e-2)
    np.testing.assert_allclose(
        d_lhs[:used].astype(F32), product_of(g, jnp.swapaxes(rhs, 1, 2), sizes)[:used], rtol=2**-10, atol=2e-2
    )
    assert not d_lhs[used:].any()
    np.testing.assert_allclose(d_rhs.astype(F32), gradient_of(lhs, g, sizes), rtol=2**-10, atol=2e-2)
