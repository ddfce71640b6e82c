"""Ahead of time: collectives counted by hand, slices by name, what stands in for what is missing, and what would help."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rl_reason import build, sharding
from rl_reason.ahead import check, collectives, memory, programs, topology
from rl_reason.ahead.levers import levers
from rl_reason.ahead.memory import ROWS, Need
from rl_reason.ahead.stand_in import stand_in
from rl_reason.report import fitting
from tests.support import load_config, one_device

WIDTH = 64


@functools.cache
def mesh():
    return sharding.make_mesh(dict(fsdp=2, tensor=2), jax.devices()[:4])


def text_of(function, *shapes_and_specs):
    """A function compiled for four CPU devices."""
    of = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), spec))
    arguments = [of(*x) for x in shapes_and_specs]
    with jax.set_mesh(mesh()):
        return jax.jit(function).lower(*arguments).compile().as_text()


def manual(function, out_specs):
    """The function on each device's own piece of rows over fsdp."""
    return jax.shard_map(function, mesh=mesh(), in_specs=P("fsdp"), out_specs=out_specs, check_vma=False)


SQUARE = 4 * WIDTH * WIDTH  # bytes
BY_HAND = {  # of an array [WIDTH WIDTH] of which each device has half the rows
    "all-gather": (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P(), SQUARE),  # what it gives
    "all-reduce": (lambda x: jax.lax.psum(x, "fsdp"), P(), SQUARE / 2),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P("fsdp"), SQUARE / 2),  # what it reads
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P(None, "fsdp"), SQUARE / 2),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), P("fsdp"), SQUARE / 2),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_each_kind_counts_its_larger_side(kind):
    function, out, size = BY_HAND[kind]
    found = collectives.traffic(text_of(manual(function, out), ((WIDTH, WIDTH), P("fsdp"))))
    assert found.of(0) == {other: size if other == kind else 0.0 for other in collectives.KINDS}
    assert found.depth == 0


def test_loops_multiply_and_an_open_one_counts_a_pass():
    """3 x 5 sums within scans, and 5 in each pass of a loop whose end depends on data; its condition sums one number."""
    total = lambda x: jax.lax.psum(x, "fsdp")

    def fives(x):
        return jax.lax.scan(lambda x, _: (total(jnp.sin(x)), None), x, length=5)[0]

    def run(x):
        x = jax.lax.scan(lambda x, _: (fives(x), None), x, length=3)[0]
        return jax.lax.while_loop(lambda x: total(x[0, 0]) < 1e3, fives, x)

    found = collectives.traffic(text_of(manual(run, P("fsdp")), ((WIDTH, WIDTH), P("fsdp"))))
    assert found.of(0)["all-reduce"] == 15 * SQUARE / 2
    assert found.of(1)["all-reduce"] == 5 * SQUARE / 2 + 4
    assert found.depth == 1


def test_counters_need_not_begin_by_one():
    """A loop unrolled by two steps its counter by two: half as many turns."""
    text = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[] constant(16)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0:T(8,128)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %start = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %done = f32[8]{0} collective-permute-done(%start)
  ROOT %t = (s32[], /*index=1*/f32[8]{0}) tuple(%next, %done)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""
    # 8 turns of 8 numbers of 4 bytes; what a start gives lists its operand and two flags besides.
    assert collectives.traffic(text).of(0)["collective-permute"] == 8 * 32


def test_text_of_something_else():
    with pytest.raises(ValueError, match="it has no ENTRY"):
        collectives.traffic("module {}")


def test_slices_by_name():
    generation, shape = topology.parse("v5p:4x4x4")
    assert generation.name == "v5p" and shape == (4, 4, 4)
    assert topology.slices("v5e") == [f"v5e:{n}" for n in ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")]
    for generation in topology.GENERATIONS.values():
        chips = [functools.reduce(int.__mul__, shape) for shape in generation.slices]
        assert chips == sorted(chips) and all(n % 4 == 0 for n in chips)


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "v9:2x2",
            "no generation 'v9'. Did you mean v6e? There are v5e, v5p, v6e, tpu7x; a slice is written as in v5e:4x4",
        ),
        ("", "no generation ''. There are v5e"),
        ("v5p:2x2", "want chips along 3 axes, as in v5p:2x2x4. There are v5p:2x2x1, 2x2x2"),
        ("v5e:2x2x1", "want chips along 2 axes, as in v5e:4x4. There are v5e:2x2, 2x4"),
        ("v6e:0x4", "want chips along 2 axes"),
        ("v6e", "want chips along 2 axes"),
    ],
)
def test_slices_that_are_not(name, says):
    with pytest.raises(topology.TopologyError, match=re.escape(says)):
        topology.parse(name)


def test_a_machine_without_libtpu_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(topology.TopologyError, match=re.escape('pip install "jax[tpu]"')):
        topology.find("v5e:2x2")


def test_what_is_missing_is_replaced_and_said(tmp_path):
    config = load_config("rlccf", "paper")
    changed, said = stand_in(config, tmp_path)
    assert config.tokenizer == "checkpoints/Qwen2.5-7B" and config.data.files == ("data/math700.parquet",)
    assert changed.tokenizer == "embedded" and all(
        own.tokenizer == "embedded" for own in changed.cohort.values() if "tokenizer" in own
    )
    assert len(said) == 9 and said[0] == "config.weights='checkpoints/Qwen2.5-7B': the shapes of config.model"
    assert said[1] == "config.tokenizer='checkpoints/Qwen2.5-7B': the embedded tokenizer, without chat templates"
    assert said[-1] == "config.data.files='data/math700.parquet': three rows of sums"
    assert stand_in(changed, tmp_path)[1] == []  # all of it is here now
    assert stand_in(load_config("base"), tmp_path)[1] == []


def smoke(name="base", **sections):
    config = load_config(name)
    for section, changes in sections.items():
        config[section].update(changes)
    return build.build(config, one_device())


@functools.cache
def programs_of_a_cohort():
    return list(programs.programs(smoke("rlccf")))


def test_programs_are_the_ones_that_a_step_runs():
    names = lambda experiment: [program.name for program in programs.programs(experiment)]
    assert names(smoke("base")) == ["chunk"]
    config = load_config("base")
    config.verify = "split"
    assert names(build.build(config, one_device())) == ["draw", "learn"]
    assert names(smoke("sft")) == ["chunk"] == names(smoke("air"))


@pytest.mark.slow
def test_each_policy_of_a_cohort_draws_and_learns():
    cohort = programs_of_a_cohort()
    names = [program.name for program in cohort]
    assert names == [f"{word} {name}" for word in ("draw", "learn") for name in ("automata", "differences", "sums")]
    learn = next(program for program in cohort if program.name == "learn sums")
    learn.function.trace(*learn.arguments)


@pytest.mark.slow
def test_each_policy_of_a_cohort_learns_from_verdicts_of_the_host():
    config = load_config("rlccf")
    config.update(verify="split", answer_rule="equivalence")
    learn = next(x for x in programs.programs(build.build(config, one_device())) if x.name == "learn sums")
    learn.function.trace(*learn.arguments)


def test_a_state_is_counted_by_its_pieces():
    """AdamW on a float32 model: two moments for each parameter, and every device has a half where fsdp is 2."""
    config = load_config("base")
    config.mesh.update(data=1, fsdp=2)
    config.regularisers.kl = dict(estimator="k3", coef=0.1, how="token_mean", divisor=1.0)
    (program,) = programs.programs(build.build(config, jax.devices()[:2]))
    size = programs.device_bytes
    params = jax.tree.leaves(program.state.params)
    whole = sum(4 * x.size for x in params)
    norms = sum(4 * x.size for x in params if x.sharding.is_fully_replicated)
    assert size(program.state.params) == (whole - norms) / 2 + norms
    assert size(program.state.ref_params) == size(program.state.params)
    # Its count and the schedule's are two numbers of 4 bytes.
    assert size(program.state.opt_state) == 2 * size(program.state.params) + 8


@pytest.mark.slow
def test_what_lives_beside_a_program_counts():
    draw = next(program for program in programs_of_a_cohort() if program.name == "draw sums")
    parts = memory._parts(draw, programs.device_bytes(draw.arguments), 0, 0, 0)
    others = [state for name, state in draw.state.items() if name != "sums"]
    assert parts["other policies"] == sum(map(programs.device_bytes, others))
    assert sum(parts.values()) == programs.device_bytes((draw.arguments, others, draw.beside))


def test_refusals():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.50G) exceeds"
    )
    assert memory.refused_bytes(said) == 22.5 * 2**30
    assert memory.refused_bytes("RESOURCE_EXHAUSTED: ... Used 17.50G of 15.75G hbm. Exceeded") == 17.5 * 2**30
    assert memory.refused_bytes("INVALID_ARGUMENT: no such thing") is None


def need(name, **parts):
    return Need(name, dict.fromkeys(ROWS, 0) | parts, 1.0, False, None, ())


def saved(experiment, *needs, hbm=0):
    return {lever.change: lever.saves for lever in levers(experiment, needs, hbm)}


def test_levers_answer_what_memory_is_full_of():
    experiment = smoke(rollout=dict(num_slots=16, completion_len=24), batch=dict(microbatch_rows=16))
    # 8 prompts of 18 tokens and 16 slots of 24: 144 of 528 positions are the prompts'.
    draw = need("draw", **{"KV cache": 528, "parameters": 100, "optimizer": 200, "reference": 100, "temporaries": 50})
    assert saved(experiment, draw)["rollout.num_slots=8"] == (528 - 144) / 2
    assert saved(experiment, draw)["model.param_dtype='bfloat16'"] == 50  # of the reference
    assert saved(experiment, draw)["optimizer.mu_dtype='bfloat16'"] == 50  # of the first of two moments
    assert saved(experiment, draw)["a slice of twice the chips, on mesh.fsdp,"] == 200
    assert "batch.microbatch_rows=8" not in saved(experiment, draw)
    learn = need("learn", temporaries=900, parameters=100)
    found = levers(experiment, [draw, learn], 600)
    assert found[0].saves == max(lever.saves for lever in found)
    assert {"batch.microbatch_rows=8", "rollout.num_slots=8", "model.remat='full'"} <= {x.change for x in found}
    assert saved(experiment, draw, hbm=1000) == {}  # it fits


def test_a_record_reads_well(capsys):
    """Printed, and as a row of a table; what is 0 everywhere has no line."""
    experiment = smoke()
    gib = 2**30
    sent = collectives.Traffic({("all-gather", 0): 2.0 * gib, ("all-gather", 1): 8.0 * gib})
    parts = dict.fromkeys(ROWS, 0) | {"parameters": 4 * gib, "KV cache": 2 * gib, "temporaries": gib}
    needs = (Need("draw", parts, 61.0, False, sent, ("check",)), Need("learn", parts, 5.0, True, None, ()))
    where = topology.Slice("v5e:2x4", topology.GENERATIONS["v5e"], 8, 2, (), "0.0.42")
    found = check.record(
        check.Checked(where, experiment, "checkpoints/Some-7B", ("config.tokenizer: another",), needs)
    )
    found = json.loads(json.dumps({"config": "base-paper"} | found))
    lines = [" ".join(row) for row in fitting.rows_of(found) if row is not None]
    assert "parameters 4.00 4.00" in lines and "total 7.00 >7.00" in lines and "compiled in 1:01 0:05" in lines
    assert not any(line.startswith("optimizer") for line in lines)
    assert lines[lines.index("sent, a check  ") + 1] == "  all-gather 8.00 0"
    head, _, row = fitting.markdown([found])
    assert dict(zip(head.split(" | "), row.split(" | "), strict=True))["a decode step"] == "2.00"  # check_every is 4
    fitting.print_record(fitting.Display(), found)
    said = capsys.readouterr().out
    assert "does not fit: draw needs 7.00 of 15.75 GiB" in said and "stands in for config.tokenizer: another" in said
