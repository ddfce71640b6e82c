"""The experts of a mixture, ``sum_k w_k expert_k(x)``: on one device, or cut over a mesh.

Over a mesh each device multiplies the rows of its own experts, inside ``shard_map``, where kernels may be used. Rows are cut
over data, fsdp and expert; the devices along ``expert`` gather each other's tokens, each takes those that chose its experts,
and the sums go home by a reduce-scatter (docs/adr/0010). Weights are gathered over ``fsdp`` where they are used, unless they
lie so already, and their gradients reduced and scattered; over ``tensor`` the size of an expert is cut, and the parts of the
sum are added. Both passes are written out, so that no collective stands inside the loop over own rows, and so that the
backward pass keeps nothing but the operands: it gathers, sorts and multiplies again, as it would under ``jax.checkpoint``.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.grouped_matmul import arrange, combine, grouped_matmul, grouped_swiglu, permute
from rl_reason.sharding import ROWS, num_row_shards, param_spec

# Of its share of all choices, how many a device works on at a time: one turn of the loop unless its experts are this much
# more popular than others. Memory and copies grow with it. Guess.
SLACK = 1.5
MIN_ROWS = 4096  # or all there can be, if less: so few cost next to nothing beside the weights. Guess.
# Own tokens that a device shares with those along ``expert`` at a time: what a turn holds is ``expert`` times as many, with
# their gradients and their choices, where activations between layers are own tokens alone. Guess.
MAX_TOKENS = 8192


class Experts(typing.NamedTuple):
    """Weights of SwiGLU experts."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


def apply_experts(
    x: Float[Array, "M D"], weights: Float[Array, "M K"], expert_ids: Int[Array, "M K"], experts: Experts
) -> Float[Array, "M D"]:
    """``sum_k weights[m, k] expert_{expert_ids[m, k]}(x[m])``, over the mesh in use (``jax.set_mesh``) if there is one.

    Raises:
        ValueError: experts that the mesh's expert axis does not divide.
    """
    if dispatch.on_one_device():
        return _mixture(x, weights, expert_ids, experts)
    mesh = jax.sharding.get_abstract_mesh()
    num_experts, over = experts.gate.shape[0], mesh.shape["expert"]
    if num_experts % over:
        raise ValueError(
            f"model.num_experts={num_experts} cannot be cut over mesh.expert={over} devices; make it a divisor."
        )
    shards = num_row_shards(mesh)
    pieces = -(-len(x) // (shards * MAX_TOKENS)) if over > 1 else 1
    missing = -len(x) % (shards * pieces)
    padded = lambda a, filler: jnp.pad(a, ((0, missing), (0, 0)), constant_values=filler) if missing else a
    out = _sharded(mesh, pieces, padded(x, 0), padded(weights, 0), padded(expert_ids, -1), experts)
    return typing.cast(Array, out)[: len(x)]


def _mixture(x: Array, weights: Array, ids: Array, experts: Experts) -> Array:
    """Of all choices at once; ids that are no experts' add nothing."""
    rows, group_sizes, undo = permute(x, ids, len(experts.gate))
    hidden = grouped_swiglu(rows, experts.gate, experts.up, group_sizes)
    return combine(grouped_matmul(hidden, experts.down, group_sizes), undo, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(mesh: AbstractMesh, pieces: int, x: Array, weights: Array, ids: Array, experts: Experts) -> Array:
    _, used = _specs(mesh, experts)
    part = _mixture if mesh.shape["expert"] == 1 else _in_turns

    def body(x, weights, ids, experts):
        x, weights, ids, experts = _typed(x, weights, ids, experts)

        def of_piece(own):
            x, weights, ids = own
            return _send_home(part(*_meet(x, weights, ids, experts), experts), used)

        return _joined(jax.lax.map(of_piece, _cut(pieces, x, weights, ids)))

    specs = P(ROWS), P(ROWS), P(ROWS), used
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(ROWS))(x, weights, ids, experts)


def _backward(mesh: AbstractMesh, pieces: int, operands: tuple, g: Array) -> tuple:
    stored, used = _specs(mesh, operands[-1])

    def body(g, x, weights, ids, experts):
        x, weights, ids, experts = _typed(x, weights, ids, experts)

        def of_piece(so_far, own):
            g, x, weights, ids = own
            x, weights, ids = _meet(x, weights, ids, experts)
            d_x, d_weights, d_experts = backward(jax.lax.all_gather(g, "expert", tiled=True), x, weights, ids, experts)
            add = lambda total, more: total + more.astype(total.dtype)
            return jax.tree.map(add, so_far, d_experts), (_send_home(d_x, used), _send_home(d_weights, used))

        nothing = jax.tree.map(lambda w: jnp.zeros_like(w, _wide(w)), experts)
        own = _cut(pieces, dispatch.varying(g, x), x, weights, ids)
        d_experts, (d_x, d_weights) = jax.lax.scan(of_piece, nothing, own)
        d_experts = jax.tree.map(lambda d, w: d.astype(w.dtype), d_experts, experts)
        d_experts = Experts(*(_reduce(d, spec) for d, spec in zip(d_experts, stored, strict=True)))
        return _joined(d_x), _joined(d_weights), d_experts

    def at_once(g, x, weights, ids, experts):
        return jax.vjp(lambda x, w, e: _mixture(x, w, ids, e), x, weights, experts)[1](g)

    backward = at_once if mesh.shape["expert"] == 1 else _in_turns_backward
    rows = P(ROWS)
    given, found = (rows, rows, rows, rows, used), (rows, rows, stored)
    d_x, d_weights, d_experts = jax.shard_map(body, mesh=mesh, in_specs=given, out_specs=found)(g, *operands)
    return d_x, d_weights, None, d_experts


_sharded.defvjp(lambda mesh, pieces, *operands: (_sharded(mesh, pieces, *operands), operands), _backward)


def _specs(mesh: AbstractMesh, experts: Experts) -> tuple[typing.Any, typing.Any]:
    """How the weights of one layer are stored, by the table, and how they lie where they are used: without fsdp; specs."""
    names = (f"layers/moe/{name}" for name in Experts._fields)
    stored = [param_spec(name, (1, *w.shape), mesh)[1:] for name, w in zip(names, experts, strict=True)]
    used = [[None if axis == "fsdp" else axis for axis in spec] for spec in stored]
    return Experts._make(P(*spec) for spec in stored), Experts._make(P(*spec) for spec in used)


def _typed(x: Array, weights: Array, ids: Array, experts: Experts) -> tuple[Array, Array, Array, Experts]:
    """Whatever has a gradient is typed as differing between all devices, so that no gradient is summed before we say so."""
    x, weights, *own = dispatch.alike(x, weights, *experts)
    return x, weights, ids, Experts(*own)


def _cut(pieces: int, *arrays: Array) -> tuple[Array, ...]:
    return tuple(a.reshape(pieces, -1, *a.shape[1:]) for a in arrays)


def _joined(pieces: Array) -> Array:
    return pieces.reshape(-1, *pieces.shape[2:])


def _meet(x: Array, weights: Array, ids: Array, experts: Experts) -> tuple[Array, Array, Array]:
    """The tokens of all devices along ``expert``, and their ids counted from this device's first expert."""
    gather = lambda a: jax.lax.all_gather(a, "expert", tiled=True)
    first = jax.lax.axis_index("expert") * len(experts.gate)
    return gather(x), gather(weights), gather(ids) - first


def _send_home(parts: Array, used: Experts) -> Array:
    """The sum of the parts that the devices along ``expert`` and ``tensor`` have, each device's own tokens of it."""
    own = jax.lax.psum_scatter(parts, "expert", scatter_dimension=0, tiled=True)
    return jax.lax.psum(own, "tensor") if "tensor" in used.gate else own


def _reduce(gradient: Array, stored: P) -> Array:
    """Summed over all rows; over ``fsdp`` each device gets its own piece before the rest is summed."""
    if "fsdp" in stored:
        gradient = jax.lax.psum_scatter(gradient, "fsdp", scatter_dimension=stored.index("fsdp"), tiled=True)
    else:
        gradient = jax.lax.psum(gradient, "fsdp")
    return jax.lax.psum(gradient, "data")


def _in_turns(x: Array, weights: Array, ids: Array, experts: Experts) -> Array:
    """``_mixture`` where most choices are of other devices' experts: a loop over those that are not."""
    turns, turn = _turns(ids, len(experts.gate))

    def add(i, total):
        choices, group_sizes = turn(i)
        tokens = choices // ids.shape[1]
        out = _weighted(x[tokens], weights.reshape(-1)[choices], experts, group_sizes)
        return total.at[tokens].add(out.astype(total.dtype))

    return _repeat(turns, add, jnp.zeros_like(x, _wide(x))).astype(x.dtype)


def _in_turns_backward(
    g: Array, x: Array, weights: Array, ids: Array, experts: Experts
) -> tuple[Array, Array, Experts]:
    turns, turn = _turns(ids, len(experts.gate))

    def add(i, total):
        d_x, d_weights, d_experts = total
        choices, group_sizes = turn(i)
        tokens = choices // ids.shape[1]
        of_turn = x[tokens], weights.reshape(-1)[choices], experts
        pull = jax.vjp(lambda rows, weights, experts: _weighted(rows, weights, experts, group_sizes), *of_turn)[1]
        more_x, more_weights, more_experts = pull(g[tokens])
        return (
            d_x.at[tokens].add(more_x.astype(d_x.dtype)),
            d_weights.at[choices].add(more_weights),
            jax.tree.map(jnp.add, d_experts, more_experts),
        )

    nothing = jnp.zeros_like(x, _wide(x)), jnp.zeros_like(weights).reshape(-1), jax.tree.map(jnp.zeros_like, experts)
    d_x, d_weights, d_experts = _repeat(turns, add, nothing)
    return d_x.astype(x.dtype), d_weights.reshape(weights.shape), d_experts


def _weighted(rows: Array, weights: Array, experts: Experts, group_sizes: Array) -> Array:
    """Weighted before the last product, where rows are narrower, and where no gradient asks for that product again."""
    hidden = grouped_swiglu(rows, experts.gate, experts.up, group_sizes)
    hidden = (hidden.astype(_wide(rows)) * weights[:, None]).astype(rows.dtype)
    return grouped_matmul(hidden, experts.down, group_sizes)


def _repeat(turns: Array | None, add: Callable, total: typing.Any) -> typing.Any:
    return add(jnp.int32(0), total) if turns is None else jax.lax.fori_loop(jnp.int32(0), turns, add, total)


def _turns(ids: Array, num_experts: int) -> tuple[Array | None, Callable[[Array], tuple[Array, Array]]]:
    """How many turns there are, and what a turn takes: so many choices [R], by expert, and how many each expert has of them.
    None: one has room for all there can be, as while decoding, and needs no loop, whose end a GPU asks its host about.

    Choices that an expert of this device is not for come last, in no turn but perhaps at the end of the last one.
    """
    num_choices, share = ids.size, ids.size / jax.lax.axis_size("expert")
    rows = min(num_choices, max(MIN_ROWS, int(SLACK * share)))
    group_sizes, undo = arrange(ids, num_experts)
    order = jnp.pad(undo.order, (0, -num_choices % rows))
    bounds = jnp.append(jnp.int32(0), jnp.cumsum(group_sizes, dtype=jnp.int32))

    def turn(i):
        choices = jax.lax.dynamic_slice_in_dim(order, i * rows, rows)
        return choices, jnp.diff(jnp.clip(bounds - i * rows, 0, rows))

    return None if rows == num_choices else -(-bounds[-1] // rows), turn


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
