"""python -m kernels.bench [--op OP] [--case CASE] [--implementation NAME] [--out FILE.json]: how fast the kernels are here.

Every implementation of every operation at the shapes of published models (small ones on a CPU), and what else is
installed beside them: torch, cuDNN, tokamax. "default" is what ``implementation=None`` chooses. The floor of a case is
what its operations and bytes take at the matmul and copy rates measured in the same run; "error" is the largest
difference from the first implementation, in units of its root mean square. An implementation that can't serve a case says
why. Beside torch on one GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels import peers
from kernels.decode_attention import decode_attention
from kernels.decode_attention.public import IMPLEMENTATIONS as ATTENTION
from kernels.entropy_covariance import token_statistics
from kernels.entropy_covariance.public import IMPLEMENTATIONS as STATISTICS
from kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels.grouped_matmul.public import IMPLEMENTATIONS as PRODUCTS

AT_LEAST_S = 0.03  # of one clocked batch of calls
DEFAULT = "default"
# Rows (tokens times top-k), experts, hidden size, size of an expert.
EXPERTS = {
    "Qwen3-30B-A3B-up": (65536, 128, 2048, 768),
    "Qwen3-30B-A3B-down": (65536, 128, 768, 2048),
    "Qwen3-30B-A3B-decode": (2048, 128, 2048, 768),
    "Mixtral-8x7B-up": (65536, 8, 4096, 14336),
}
SKEWS = ("uniform", "dirichlet-0.3", "half-empty", "one")  # of the first; all others are dirichlet-2
HEADS = {"Qwen3-30B-A3B": (16384, 2048, 151936)}  # tokens, hidden size, vocabulary
CACHES = {  # layers, rows, positions, query heads, key heads, size of a head; prompts that rows share, and their positions
    "Qwen3-0.6B": (28, 128, 1280, 16, 8, 128, 0, 0),
    "Qwen2.5-0.5B": (24, 128, 1280, 14, 2, 64, 0, 0),
    "Qwen3-0.6B, prompts": (28, 256, 512, 16, 8, 128, 16, 256),
    "Qwen3-0.6B, long prompts": (28, 128, 512, 16, 8, 128, 8, 2048),
    "Qwen3-30B-A3B, prompts": (48, 128, 512, 32, 4, 128, 8, 1024),
    "Qwen3-0.6B, prompts of one row": (28, 128, 1024, 16, 8, 128, 128, 256),
}
SMALL = (
    {"small": (4096, 16, 256, 128)},
    {"small": (2048, 128, 16384)},
    {"small": (2, 64, 128, 4, 2, 32, 0, 0), "small, prompts": (2, 64, 64, 4, 2, 32, 8, 64)},
)


class Case(typing.NamedTuple):
    """One thing to do: ``run(implementation)`` is a function of ``arguments()``; ``others`` do the same elsewhere."""

    op: str
    name: str
    flops: float
    bytes: float  # that have to be read and written once
    arguments: Callable[[], tuple]
    run: Callable[[str | None], Callable]
    implementations: tuple[str, ...]  # the first is what ratios and errors are to
    others: dict[str, Callable[..., peers.Peer]]


def cases(platform: str) -> Iterator[Case]:
    """Everything for a platform: the shapes of published models, or on a CPU small ones in fp32."""
    small = platform == "cpu"
    dtype = jnp.dtype("float32" if small else "bfloat16")
    experts, heads, caches = SMALL if small else (EXPERTS, HEADS, CACHES)
    for name, shape in experts.items():
        yield from _products(name, "dirichlet-2", dtype, *shape)
        if not name.endswith("-down"):
            yield from _swiglu(name, "dirichlet-2", dtype, *shape)
    name, shape = next(iter(experts.items()))
    for skew in SKEWS:
        yield from _products(f"{name}, {skew}", skew, dtype, *shape)
    for name, shape in heads.items():
        yield from _statistics(name, dtype, *shape)
    for name, shape in caches.items():
        yield from _attention(name, dtype, *shape)


def group_sizes(rows: int, groups: int, skew: str) -> np.ndarray:
    """Int32 [groups] that sum to rows: "uniform", "one" (all in one), "half-empty", or "dirichlet-A", multinomial."""
    rng = np.random.default_rng(0)
    if skew == "uniform":
        share = np.full(groups, 1 / groups)
    elif skew == "one":
        share = np.eye(groups)[groups // 3]
    elif skew == "half-empty":
        share = np.zeros(groups)
        share[::2] = rng.dirichlet(np.full(len(share[::2]), 2.0))
    else:
        share = rng.dirichlet(np.full(groups, float(skew.removeprefix("dirichlet-"))))
    return rng.multinomial(rows, share).astype(np.int32)


def _products(name: str, skew: str, dtype, rows: int, groups: int, depth: int, width: int) -> Iterator[Case]:
    def arguments():
        keys = jax.random.split(jax.random.key(0), 3)
        draw = lambda key, *shape: jax.random.normal(key, shape, dtype)
        weights = draw(keys[1], groups, depth, width) / math.sqrt(depth)
        return (
            draw(keys[0], rows, depth),
            weights,
            jnp.asarray(group_sizes(rows, groups, skew)),
            draw(keys[2], rows, width),
        )

    def forward(implementation):
        return lambda x, w, sizes, g: grouped_matmul(x, w, sizes, implementation=implementation)

    def backward(implementation):
        def run(x, w, sizes, g):
            product = lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation)
            return jax.vjp(product, x, w)[1](g)

        return run

    flops, weights, x, y = 2.0 * rows * depth * width, groups * depth * width, rows * depth, rows * width
    names = tuple(PRODUCTS)
    size = dtype.itemsize
    others = dict(torch=peers.torch_grouped, tokamax=peers.tokamax_grouped)
    yield Case("grouped_matmul", name, flops, size * (x + weights + y), arguments, forward, names, others)
    others = dict(torch=peers.torch_grouped_gradients)
    moved = size * 2 * (x + weights + y)
    yield Case("grouped_matmul, gradients", name, 2 * flops, moved, arguments, backward, names, others)


def _swiglu(name: str, skew: str, dtype, rows: int, groups: int, depth: int, width: int) -> Iterator[Case]:
    def arguments():
        keys = jax.random.split(jax.random.key(0), 3)
        draw = lambda key, *shape: jax.random.normal(key, shape, dtype)
        gate, up = (draw(key, groups, depth, width) / math.sqrt(depth) for key in keys[:2])
        return draw(keys[2], rows, depth), gate, up, jnp.asarray(group_sizes(rows, groups, skew))

    def run(implementation):
        return lambda *arrays: grouped_swiglu(*arrays, implementation=implementation)

    def two_products(x, gate, up, sizes):
        return jax.nn.silu(grouped_matmul(x, gate, sizes)) * grouped_matmul(x, up, sizes)

    flops = 4.0 * rows * depth * width
    moved = dtype.itemsize * (2 * groups * depth * width + rows * depth + rows * width)
    names = tuple(PRODUCTS)
    others = {"two products": functools.partial(peers.compiled, two_products)}
    yield Case("grouped_swiglu", name, flops, moved, arguments, run, names, others)


def _statistics(name: str, dtype, rows: int, hidden: int, vocab: int) -> Iterator[Case]:
    def arguments():
        keys = jax.random.split(jax.random.key(0), 3)
        weights = jax.random.normal(keys[1], (hidden, vocab), dtype) / math.sqrt(hidden)
        return (
            jax.random.normal(keys[0], (rows, hidden), dtype),
            weights,
            jax.random.randint(keys[2], (rows,), 0, vocab),
        )

    def forward(implementation):
        return lambda h, w, y: tuple(token_statistics(h, w, y, temperature=1.0, implementation=implementation))

    def backward(implementation):
        def loss(h, w, y):
            out = token_statistics(h, w, y, temperature=1.0, implementation=implementation)
            return out.logprob.mean() + 0.1 * out.entropy.mean()

        return jax.value_and_grad(loss, argnums=(0, 1))

    flops, moved = 2.0 * rows * hidden * vocab, dtype.itemsize * (rows + vocab) * hidden
    names = tuple(STATISTICS)
    plain = dict(plain=peers.plain_statistics)
    yield Case("token_statistics", name, flops, moved, arguments, forward, names, plain)
    plain = dict(plain=peers.plain_statistics_gradients)
    yield Case("token_statistics, with gradients", name, 3 * flops, 2 * moved, arguments, backward, names, plain)


def _attention(
    name: str, dtype, layers: int, rows: int, size: int, heads: int, kv: int, head_dim: int, prompts: int, width: int
) -> Iterator[Case]:
    """Rows, and prompts, of a fifth to all of their positions; a prompt's rows are scattered among the others."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(size // 5, size + 1, rows).astype(np.int32)
    lens = rng.integers(width // 5, width + 1, prompts).astype(np.int32)
    index = rng.permutation(np.arange(rows) % prompts if prompts else 0).astype(np.int32)

    def arguments():
        keys = iter(jax.random.split(jax.random.key(0), 5))
        cache = lambda *shape: jax.random.normal(next(keys), (layers, *shape, kv, head_dim), dtype)
        queries = jax.random.normal(next(keys), (rows, heads, head_dim), dtype)
        own = queries, cache(rows, size), cache(rows, size), jnp.asarray(lengths)
        if not prompts:
            return own
        return *own, cache(prompts, width), cache(prompts, width), jnp.asarray(lens), jnp.asarray(index)

    def run(implementation):
        def every_layer(q, keys, values, lengths, *shared):  # each layer attends with what the one before it gave
            names = "prompt_keys", "prompt_values", "prompt_lens", "prompt_index"
            how = dict(zip(names, shared, strict=False), lengths=lengths, implementation=implementation)

            def attend(layer, q):
                return decode_attention(q, keys, values, layer=layer, **how).astype(q.dtype)

            return jax.lax.fori_loop(0, layers, attend, q)

        return every_layer

    seen = int(lengths.sum() + lens[index].sum())
    flops = 4.0 * layers * seen * heads * head_dim
    moved = 2.0 * dtype.itemsize * layers * int(lengths.sum() + lens.sum()) * kv * head_dim
    names = tuple(ATTENTION)
    others = {} if prompts else dict(cudnn=peers.cudnn_attention)
    yield Case("decode_attention, all layers", name, flops, moved, arguments, run, names, others)


def seconds_of(call: Callable[[], typing.Any], wait: Callable[[typing.Any], typing.Any], repeats: int) -> float:
    """Seconds of one call: the median of ``repeats`` batches, each long enough to hide what a call costs the host."""
    wait(call())
    began = time.perf_counter()
    wait(call())
    calls = max(1, math.ceil(AT_LEAST_S / max(time.perf_counter() - began, 1e-6)))
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        found.append((time.perf_counter() - began) / calls)
    return statistics.median(found)


def rates(platform: str, repeats: int) -> tuple[float, float]:
    """(FLOP/s of a square matrix product, bytes/s of a copy, read and written), in the dtype of the cases."""
    small = platform == "cpu"
    size, dtype = (1024, jnp.float32) if small else (8192, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    matmul = 2.0 * size**3 / seconds_of(lambda: product(x), jax.block_until_ready, repeats)
    long = jnp.ones((2**25 if small else 2**29,), jnp.int32)
    copy = jax.jit(lambda x: x + 1)
    return matmul, 2.0 * long.nbytes / seconds_of(lambda: copy(long), jax.block_until_ready, repeats)


def difference(found: typing.Any, wanted: typing.Any) -> float:
    """The largest difference of any array, in units of the wanted array's root mean square."""
    flat = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    of = jax.jit(
        lambda a, b: jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.sqrt(jnp.mean(b.astype(jnp.float32) ** 2))
    )
    return max(float(of(a, b)) for a, b in flat)


def measured(case: Case, wanted: Sequence[str], floor: float, repeats: int) -> Iterator[dict[str, typing.Any]]:
    """A record for each implementation of a case, in turn."""
    arguments = case.arguments()
    first: tuple[float, typing.Any] | None = None  # seconds and output that others are compared with
    for name in (*case.implementations, DEFAULT, *case.others):
        if wanted and name not in wanted and name != case.implementations[0]:
            continue
        record: dict[str, typing.Any] = dict(op=case.op, case=case.name, implementation=name)
        try:
            if name in case.others:
                peer = case.others[name](*arguments)
            else:
                peer = peers.compiled(case.run(None if name == DEFAULT else name), *arguments)
            record["temporary_bytes"], out = peer.temporary_bytes, peer.output()
            if first is not None:
                record["error"] = difference(out, first[1])
            seconds = seconds_of(peer.call, peer.wait, repeats)
        except Exception as error:  # whatever it says, the others are still to be tried
            lines = str(error).strip().splitlines() or [type(error).__name__]
            yield record | dict(failed=lines[0][:300])
            continue
        first = first or (seconds, out)
        yield record | dict(
            seconds=seconds,
            flops_per_s=case.flops / seconds,
            bytes_per_s=case.bytes / seconds,
            share_of_floor=floor / seconds,
            times_first=first[0] / seconds,
        )


HEADER = (
    f"{'':20}{'ms':>9}  {'TFLOP/s':>8}  {'GB/s':>7}  {'floor':>6}  {'temporary':>13}  {'x first':>7}  {'error':>8}"
)


def line_of(record: dict[str, typing.Any]) -> str:
    """One row of the table."""
    head = f"  {record['implementation']:18}"
    if "failed" in record:
        return f"{head}{record['failed'][:100]}"
    memory, error = record.get("temporary_bytes"), record.get("error")
    temporary = "" if memory is None else f"{memory / 2**20:,.1f} MiB"
    cells = (
        f"{1e3 * record['seconds']:9.3f}",
        f"{record['flops_per_s'] / 1e12:8.3g}",
        f"{record['bytes_per_s'] / 1e9:7.3g}",
        f"{record['share_of_floor']:6.0%}",
        f"{temporary:>13}",
        f"{record['times_first']:7.2f}",
        "" if error is None else f"{error:8.1e}",
    )
    return head + "  ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", help="only operations with this in their name")
    parser.add_argument("--case", help="only cases with this in their name")
    parser.add_argument(
        "--implementation", action="append", help="only these (repeatable) beside the first of each op"
    )
    parser.add_argument("--repeats", type=int, default=7, help="clocked batches of each (default 7)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("bench-kernels.json"), help="where the JSON goes"
    )
    args = parser.parse_args(argv)
    platform, device = jax.default_backend(), jax.devices()[0]
    chosen = [c for c in cases(platform) if (args.op or "") in c.op and (args.case or "") in c.name]
    if not chosen:
        print(f"error: no case has op {args.op!r} and case {args.case!r} in its names", file=sys.stderr)
        return 2
    matmul, copy = rates(platform, args.repeats)
    said = dict(device=device.device_kind, jax=jax.__version__, matmul_flops_per_s=matmul, copy_bytes_per_s=copy)
    print(
        f"{device.device_kind}, jax {jax.__version__}: matmul {matmul / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.3g} GB/s"
    )
    print(HEADER)
    records = []
    for case in chosen:
        floor = max(case.flops / matmul, case.bytes / copy)
        print(f"{case.op}: {case.name}, floor {1e3 * floor:.3f} ms", flush=True)
        for record in measured(case, args.implementation or (), floor, args.repeats):
            records.append(record | dict(floor_seconds=floor))
            print(line_of(record), flush=True)
    args.out.write_text(json.dumps(said | dict(records=records), indent=1) + "\n")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
