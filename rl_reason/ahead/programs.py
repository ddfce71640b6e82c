"""The device programs of a step, with the shapes and shardings of what they are given: nothing is allocated.

They are the very functions that a run compiles (``loop.engine``, ``loop.cohort`` and the drivers' own). Arrays between
programs are cut over rows, as ``constrain_rows`` leaves them.
"""

import math
import typing
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rl_reason import build, sharding
from rl_reason.drivers.cohort import in_graph
from rl_reason.drivers.reinforcement import make_engine
from rl_reason.loop import cohort, preference, supervised
from rl_reason.loop.chunk import nothing_yet
from rl_reason.loop.engine import Fused, Split
from rl_reason.loop.preference import Pairs
from rl_reason.models import transformer
from rl_reason.types import Prompts, Rewards, TrainState, Verdicts, on_host


class Program(typing.NamedTuple):
    """Something that a step compiles and runs."""

    name: str
    function: Callable  # of jax.jit
    arguments: tuple[PyTree, ...]
    state: PyTree  # TrainState, of a cohort one a policy: all of it is in memory, argument or not
    beside: PyTree = None  # what else is in memory meanwhile
    loops: tuple[str, ...] = ()  # what a pass of a loop without a known end is, outermost first
    draws: build.Experiment | None = None  # whose completions it draws: it holds their keys and values


def programs(experiment: build.Experiment) -> Iterator[Program]:
    """All that a step of this experiment runs and that holds more than a few numbers, in order."""
    return {"rl": _reinforcement, "cohort": _cohort, "supervised": _supervised, "preference": _preference}[
        experiment.config.loop
    ](experiment)


def device_bytes(tree: PyTree) -> int:
    """Bytes on one device of arrays that are described with their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_of(experiment: build.Experiment) -> TrainState:
    """A state of the experiment, described."""
    params = transformer.param_shapes(experiment.parts.model)
    shapes = jax.eval_shape(lambda params: build.new_state(experiment.parts, params, 0), params)
    shardings = build.state_shardings(experiment.parts, experiment.mesh)
    return jax.tree.map(lambda x, where: _described(x, where), shapes, shardings)


def prompts_of(experiment: build.Experiment, leading: tuple[int, ...] = ()) -> Prompts:
    """What the stream of a run gives, described."""
    parts = experiment.parts
    shape, widths = (*leading, parts.plan.prompts_drawn), parts.prompt_widths
    where = build.rows_sharding(experiment.mesh, len(leading))
    of = lambda *own: jax.ShapeDtypeStruct((*shape, *own), jnp.int32, sharding=where)
    optional = lambda width: None if width is None else of(width)
    return on_host(
        Prompts,
        tokens=of(widths.prompt),
        prompt_len=of(),
        example_id=of(),
        uid=of(),
        route=of(),
        reference=optional(widths.reference),
        demonstration=optional(widths.demonstration),
    )


def _described(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


class _Placing:
    """Descriptions of what programs give each other, on a mesh."""

    def __init__(self, experiment: build.Experiment):
        self.mesh = experiment.mesh
        self._rows, self._everywhere = build.rows_sharding(self.mesh), NamedSharding(self.mesh, P())

    def rows(self, tree: PyTree) -> PyTree:
        """Arrays cut over rows, where they divide; numbers everywhere."""
        shards = sharding.num_row_shards(self.mesh)
        cut = lambda x: self._rows if x.ndim and x.shape[0] % shards == 0 else self._everywhere
        return jax.tree.map(lambda x: _described(x, cut(x)), tree)

    def everywhere(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: _described(x, self._everywhere), tree)

    def result(self, function: Callable, *arguments: PyTree) -> PyTree:
        """What a program gives, cut over rows."""
        with jax.set_mesh(self.mesh):
            return self.rows(jax.eval_shape(function, *arguments))


def _reinforcement(experiment: build.Experiment) -> Iterator[Program]:
    engine = make_engine(experiment, _asks_nobody)
    place, state = _Placing(experiment), state_of(experiment)
    sampling = place.everywhere(jax.eval_shape(lambda: experiment.sampling))
    plan = experiment.parts.plan
    if isinstance(engine, Fused):
        prompts = prompts_of(experiment, (experiment.config.steps_per_call,))
        loops = ("round", "check") if plan.in_rounds else ("check",)
        yield Program("chunk", engine.chunk, (state, prompts, sampling), state, loops=loops, draws=experiment)
        return
    assert isinstance(engine, Split)
    run, prompts = engine.run, prompts_of(experiment)
    drawn = prompts
    if plan.in_rounds:
        rounds = jax.eval_shape(run.line_up, state.stats, prompts)
        drawn = place.rows(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rounds))
    rollout, decode_steps = place.result(run.draw, state, drawn, sampling)
    verdicts = _verdicts(experiment, rollout)
    ahead = (drawn, rollout) if engine.draws_ahead else None  # the next batch's, while this one is learned from
    given = (state, drawn, rollout, verdicts, decode_steps, sampling)
    if not plan.in_rounds:
        yield Program("draw", run.draw, (state, prompts, sampling), state, ahead, ("check",), experiment)
        yield Program("learn", run.learn, given, state, ahead)
        return
    new = place.result(run.judge, *given)
    empty = place.result(lambda new: nothing_yet(experiment.parts, new), new)
    gathered = place.result(run.merge, empty, new)
    selected, _ = place.result(run.close, gathered, place.rows(rounds))
    yield Program("draw", run.draw, (state, drawn, sampling), state, (gathered, prompts), ("check",), experiment)
    yield Program("judge", run.judge, given, state, (gathered, prompts))
    yield Program("merge", run.merge, (gathered, new), state, prompts)
    yield Program("train", run.train, (state, selected, sampling), state, gathered)


def _asks_nobody(*_: typing.Any) -> typing.NoReturn:
    raise AssertionError("programs that are compiled ahead of time are never run")


def _verdicts(experiment: build.Experiment, rollout: PyTree) -> Verdicts:
    like = rollout.rollout_logprobs
    rows = lambda dtype: jax.ShapeDtypeStruct(like.shape[:1], dtype, sharding=build.rows_sharding(experiment.mesh))
    answers = None if experiment.answer_rule is None else rows(jnp.int32)
    return on_host(Verdicts, score=rows(like.dtype), valid=rows(bool), answers=answers)


def _cohort(experiment: build.Experiment) -> Iterator[Program]:
    """Each policy draws and learns with all others' states in memory; the vote is a few numbers a row."""
    policies, vote = experiment.policies, experiment.parts.slots["reward"]
    assert vote is not None
    read = in_graph(experiment) if experiment.config.verify == "graph" else _asks_nobody
    engine = cohort.Cohort({name: own.parts for name, own in policies.items()}, read, vote.fn, experiment.mesh)
    place = _Placing(experiment)
    states = {name: state_of(policy) for name, policy in policies.items()}
    sampling, prompts = place.everywhere(jax.eval_shape(lambda: experiment.sampling)), prompts_of(experiment)
    drawn = {name: place.result(engine.draw[name], states[name], prompts, sampling) for name in policies}
    for name, policy in policies.items():
        given = (states[name], prompts, sampling)
        yield Program(f"draw {name}", engine.draw[name], given, states, drawn, ("check",), policy)
    verdicts = {name: _verdicts(experiment, drawn[name][0]) for name in policies}
    for name in policies:
        rollout, decode_steps, _ = drawn[name]
        of = verdicts[name]
        rewards = on_host(Rewards, total=of.score, correct=of.score, valid=of.valid, parts={})
        given = (states[name], prompts, rollout, decode_steps, verdicts[name], rewards, sampling)
        yield Program(f"learn {name}", engine.learn[name], given, states, drawn)


def _supervised(experiment: build.Experiment) -> Iterator[Program]:
    s, state = experiment.config.supervised, state_of(experiment)
    shape = (experiment.config.steps_per_call, s.rows_per_step, s.row_len_tokens)
    where = build.rows_sharding(experiment.mesh, 1)
    of = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    batches = on_host(supervised.Demonstrations, tokens=of(jnp.int32), loss_mask=of(bool), segments=of(jnp.int32))
    chunk = jax.jit(supervised.make_packed_chunk(experiment.parts), donate_argnums=0)
    yield Program("chunk", chunk, (state, batches), state)


def _preference(experiment: build.Experiment) -> Iterator[Program]:
    config, state = experiment.config, state_of(experiment)
    assert experiment.pairs is not None
    rows, precomputed = config.preference.pairs_per_step, config.preference.precompute_reference
    shape = (config.steps_per_call, rows, config.data.max_prompt_len_tokens + config.rollout.completion_len)
    where = build.rows_sharding(experiment.mesh, 1)
    of = lambda dtype, shape=shape: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    sums = of(jnp.float32, shape[:2]) if precomputed else None
    tokens, mask = of(jnp.int32), of(bool)
    pairs = on_host(
        Pairs,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        prompt_len=of(jnp.int32, shape[:2]),
        chosen_mask=mask,
        rejected_mask=mask,
        ref_chosen_logprobs=sums,
        ref_rejected_logprobs=sums,
    )
    if not precomputed:
        state = on_host(TrainState, **vars(state) | dict(ref_params=state.params))
    chunk = preference.make_counted_chunk(experiment.parts, experiment.pairs.setting, rows)
    yield Program("chunk", jax.jit(chunk, donate_argnums=0), (state, pairs), state)
