"""python -m kernels.aot [--op OP] [--case CASE] [--generation GEN]: the real TPU compiler over every kernel, on any machine.

Needs libtpu (``pip install "jax[tpu]"``) and no chip. Prints a line for each op, case and generation with its tiles,
fast and temporary memory and compile time; exits with 1 when one does not compile.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels.decode_attention import pallas_tpu as decode
from kernels.entropy_covariance import pallas_tpu as statistics
from kernels.entropy_covariance.logits import Head
from kernels.grouped_matmul import pallas_tpu as grouped

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Experts of published models: rows (tokens times top-k), experts, hidden size, size of an expert.
EXPERTS = {
    "Qwen3-30B-A3B": (65536, 128, 2048, 768),
    "Intern-S1": (65536, 128, 4096, 1536),
    "Mixtral-8x7B": (65536, 8, 4096, 14336),
    "Qwen3-30B-A3B-decode": (2048, 128, 2048, 768),
}
# Vocabulary heads: tokens, hidden size, vocabulary.
HEADS = {"Qwen3-30B-A3B": (16384, 2048, 151936), "Intern-S1": (16384, 4096, 153216), "tiny": (256, 96, 512)}
# Attention of one token: layers, rows, positions, query heads, key heads, size of a head; prompts and their positions.
CACHES = {
    "Qwen3-30B-A3B": (48, 32, 2048, 32, 4, 128, 8, 1024),
    "Qwen3-0.6B": (28, 64, 1280, 16, 8, 128, 16, 512),
    "tiny": (2, 8, 32, 4, 2, 16, 4, 16),
}
BF16 = jnp.dtype("bfloat16")
USED_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


class Compilation(NamedTuple):
    """Something to compile: a function, the shapes of its arguments, and what it was cut into."""

    op: str
    case: str
    function: Callable
    arguments: tuple[tuple[tuple[int, ...], jnp.dtype], ...]
    tiles: tuple[int, ...]


def compilations(generation: str) -> Iterator[Compilation]:
    """Everything, for a generation's tiles."""
    for model, (rows, experts, hidden, mlp) in EXPERTS.items():
        for side, depth, width in (("up", hidden, mlp), ("down", mlp, hidden)):
            yield from _grouped_matmul(f"{model}-{side}", generation, rows, experts, depth, width)
    for model, (rows, hidden, vocab) in HEADS.items():
        tiles = statistics.choose_tiles(rows, hidden, vocab, BF16)
        head = ((rows, hidden), BF16), ((hidden, vocab), BF16), ((rows,), jnp.dtype("int32"))
        run = lambda h, w, y: statistics.token_statistics(h, w, y, Head(jnp.float32(1.0), None, w.shape[1]), 1, 1)
        yield Compilation("token_statistics", model, run, head, tiles)
    for model, shape in CACHES.items():
        yield from _decode_attention(model, shape)


def _grouped_matmul(
    case: str, generation: str, rows: int, experts: int, depth: int, width: int
) -> Iterator[Compilation]:
    sizes, weights = ((experts,), jnp.dtype("int32")), ((experts, depth, width), BF16)
    x, y = ((rows, depth), BF16), ((rows, width), BF16)

    def product(transpose: bool, tiles: grouped.Tiles) -> Callable:
        return lambda a, w, n: grouped.product(a, w, n, transpose_rhs=transpose, dtype=BF16, tiles=tiles)

    tiles = grouped.choose_tiles(rows, depth, width, BF16, generation)
    yield Compilation("grouped_matmul", case, product(False, tiles), (x, weights, sizes), tiles)
    back = grouped.choose_tiles(rows, width, depth, BF16, generation)
    yield Compilation("grouped_matmul_dlhs", case, product(True, back), (y, weights, sizes), back)
    of = grouped.choose_tiles(rows, depth, width, BF16, generation, gradient=True)
    gradient = lambda a, g, n: grouped.weight_gradient(a, g, n, dtype=BF16, tiles=of)
    yield Compilation("grouped_matmul_drhs", case, gradient, (x, y, sizes), of)


def _decode_attention(model: str, shape: tuple[int, ...]) -> Iterator[Compilation]:
    layers, rows, size, heads, kv, head_dim, prompts, prompt = shape
    block_of = lambda queries: decode.choose_block(queries, kv, head_dim, BF16)
    blocks = block_of(heads), block_of(decode.rows_together(heads) * heads)
    counts = lambda n: ((n,), jnp.dtype("int32"))

    def run(q, k, v, lengths, *prompt):
        layer = lengths[0] if k.ndim == 5 else None
        return decode.decode_attention(q, k, v, lengths, prompt or None, layer, 1, 50.0, lengths[1], 0.1)

    for stack in (), (layers,):
        own = ((*stack, rows, size, kv, head_dim), BF16)
        shared = ((*stack, prompts, prompt, kv, head_dim), BF16)
        arguments = ((rows, heads, head_dim), BF16), own, own, counts(rows)
        case = f"{model}{'-stacked' * len(stack)}"
        yield Compilation("decode_attention", case, run, arguments, blocks[:1])
        arguments += shared, shared, counts(prompts), counts(rows)
        yield Compilation("decode_attention", f"{case}-prompts", run, arguments, blocks)


class Memory(NamedTuple):
    """Bytes: of the fast memory that the largest kernel uses, and of what else a program needs beside its operands."""

    vmem: int
    temporary: int


def compiled(what: Compilation, generation: str) -> Memory:
    """What the compiler says of the program. Raises what the compiler raises."""
    topology = topologies.get_topology_desc(TOPOLOGIES[generation], platform="tpu")
    place = SingleDeviceSharding(topology.devices[0])
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in what.arguments]
    program = jax.jit(what.function).lower(*arguments).compile()
    memory, text = program.memory_analysis(), program.as_text() or ""
    used = [int(size) for line in text.splitlines() if "tpu_custom_call" in line for size in USED_VMEM.findall(line)]
    return Memory(max(used, default=0), memory.temp_size_in_bytes if memory is not None else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", help="only ops with this in their name")
    parser.add_argument("--case", help="only cases with this in their name")
    parser.add_argument("--generation", choices=TOPOLOGIES, action="append", help="repeatable; all by default")
    args = parser.parse_args(argv)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no chip to share with other processes
    failed = 0
    heads = f"{'VMEM':>8}  {'temporary':>10}  {'compiled in':>11}"
    print(f"{'generation':10}  {'op':20}  {'case':29}  {'tiles':>16}  {heads}")
    for generation in args.generation or TOPOLOGIES:
        for what in compilations(generation):
            if (args.op or "") not in what.op or (args.case or "") not in what.case:
                continue
            began, tiles = time.perf_counter(), "x".join(map(str, what.tiles))
            try:
                vmem, temporary = (f"{size / 2**20:.1f} MiB" for size in compiled(what, generation))
                said = f"{vmem:>8}  {temporary:>10}"
            except Exception as error:  # whatever the compiler says, the others are still to be tried
                said, failed = f"FAILED: {str(error).splitlines()[0][:200]}", failed + 1
            print(
                f"{generation:10}  {what.op:20}  {what.case:29}  {tiles:>16}  {said:>20}  "
                f"{time.perf_counter() - began:9.1f} s",
                flush=True,
            )
    if failed:
        print(f"error: {failed} did not compile", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
