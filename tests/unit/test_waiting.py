"""Prompts that a filter kept and a step had no room for are drawn anew, first of all, with samples of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason import build
from rl_reason import rollout as rollout_lib
from rl_reason.loop import waiting
from rl_reason.loop.chunk import make_step
from rl_reason.loop.engine import Fused, Split
from rl_reason.loop.waiting import PromptWidths
from rl_reason.slots import Slot
from tests import support
from tests.e2e import loops

WIDTHS = PromptWidths(support.PROMPT_WIDTH, reference=2, demonstration=4)


def numbered(batch, first=0):
    prompts = support.tiny_prompts(batch)
    return dataclasses.replace(prompts, uid=prompts.uid + first)


def queue_of(uids, places):
    """A queue that holds these, each drawn once before."""
    drawn = jax.tree.map(lambda x: x[None], numbered(8))
    nobody = waiting.nobody(places, WIDTHS)
    drawn = dataclasses.replace(drawn, redraws=jnp.zeros((1, 8), jnp.int32))
    kept = jnp.isin(drawn.uid, jnp.array(uids))
    return waiting.those_left(nobody, drawn, kept, wanted=0)


def test_nobody_waits_at_first():
    fresh = numbered(6)
    lined = waiting.line_up(waiting.nobody(2, WIDTHS), fresh, rounds=2)
    assert lined.uid.tolist() == [[0, 2, 4], [1, 3, 5]]  # row i belongs to round i mod 2, as without a queue
    assert not lined.redraws.any()
    assert waiting.line_up(None, fresh, rounds=2).uid.tolist() == lined.uid.tolist()


def test_those_who_wait_come_first():
    # 3 and 5 wait, of three places; rounds of fresh ones would be 10 12 14 and 11 13 15.
    lined = waiting.line_up(queue_of([3, 5], places=3), numbered(6, first=10), rounds=2)
    assert lined.uid.tolist() == [[3, 5, 10], [12, 14, 11]]
    assert lined.redraws.tolist() == [[1, 1, 0], [0, 0, 0]]
    for row, uid in enumerate((3, 5)):
        np.testing.assert_array_equal(lined.tokens[0, row], numbered(8).tokens[uid])


def test_what_finds_no_place_waits_in_its_order():
    # Groups kept: 0 2 | 4 5 of two rounds of three; two are wanted, so 4 and 5 (uids 14 and 15) are left.
    drawn = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), numbered(6, first=10))
    drawn = dataclasses.replace(drawn, redraws=jnp.array([[0, 0, 0], [0, 2, 0]]))
    kept = jnp.array([[True, False, True], [False, True, True]])
    left = waiting.those_left(waiting.nobody(3, WIDTHS), drawn, kept, wanted=2)
    assert left.taken.tolist() == [True, True, False]
    assert left.prompts.uid[:2].tolist() == [14, 15]
    assert left.prompts.redraws[:2].tolist() == [3, 1]
    narrow = waiting.those_left(waiting.nobody(1, WIDTHS), drawn, kept, wanted=2)
    assert narrow.prompts.uid.tolist() == [14] and narrow.taken.tolist() == [True]


def test_a_prompt_drawn_again_has_other_samples():
    model, rollout = support.tiny_model(), support.tiny_rollout()
    params, prompts = support.tiny_params(model), support.tiny_prompts(4)
    draw = jax.jit(lambda p: rollout_lib.generate(params, p, jax.random.key(0), loops.LIVE, model, rollout)[0].tokens)
    again = lambda times: draw(dataclasses.replace(prompts, redraws=jnp.full(4, times, jnp.int32)))
    np.testing.assert_array_equal(draw(prompts), again(0))
    drawn = [np.asarray(again(times)) for times in range(3)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (drawn[a] != drawn[b]).any(1).sum() >= 4  # of eight rows


def keep_first(count):
    """A filter that keeps the first groups of each round."""

    def selection(valid):
        return (jnp.arange(valid.shape[0]) < count)[:, None] & valid, {}

    return Slot(selection, frozenset({"valid"}))


def parts_of(places, count):
    sizes = dict(prompts_per_step=2, generated_prompts=4, max_rounds=2, minibatches=1, waiting_prompts=places)
    parts = support.tiny_parts("base", dict(num_layers=1), **sizes)
    return dataclasses.replace(parts, slots={**parts.slots, "selection": keep_first(count)}, log_groups=-1)


@pytest.mark.parametrize("composition", ["fused", pytest.param("split", marks=pytest.mark.slow)])
def test_the_loop_draws_them_in_the_next_step(composition):
    # A round draws four prompts and keeps the first three; two are trained on, so one waits: the third of the first round.
    # Fresh ones of step k are 8k .. 8k + 7, the first round the even ones; the waiting one comes before them.
    parts = parts_of(places=2, count=3)
    state = loops.start(parts)
    engine = (
        Fused(parts, support.parity_verify)
        if composition == "fused"
        else Split(parts, loops.HostVerdicts(), loops.mesh_of(), overlap=False)
    )
    out = engine.advance(state, loops.stacked(parts, 3), loops.LIVE)
    drawn = [uids[:: parts.plan.group_size].tolist() for uids in out.sampled.uid]
    assert drawn == [[0, 2, 4, 6], [4, 8, 10, 12], [10, 16, 18, 20]]
    assert out.metrics["train/waiting_prompts"].tolist() == [1.0, 1.0, 1.0]
    left = out.state.stats[waiting.NAME]
    assert left.taken.tolist() == [True, False] and int(left.prompts.uid[0]) == 18


def test_without_surplus_a_queue_changes_nothing():
    # A round keeps one of four, so two rounds just fill the batch.
    with_queue, without = parts_of(places=2, count=1), parts_of(places=0, count=1)
    prompts = loops.prompts_of(without, 0)
    a, b = (
        jax.jit(make_step(parts, support.parity_verify))(loops.start(parts), prompts, loops.LIVE)[0]
        for parts in (with_queue, without)
    )
    loops.assert_equal(a.params, b.params)
    assert loops.distance(a.params, loops.start(without).params) > 1e-6


def test_more_places_than_a_step_can_leave_are_refused():
    with pytest.raises(ValueError, match="waiting_prompts=7, but a step can leave no more than 6"):
        parts_of(places=7, count=1)


def test_a_queue_needs_its_prompts_one_round_at_a_time():
    config = support.load_config("rlpr")
    assert config.batch.waiting_prompts > 0
    config.verify, config.batch.max_rounds, config.batch.generated_prompts = "overlapped", 1, 16
    with pytest.raises(ValueError, match="waiting_prompts=0"):
        build.build(config, support.one_device())
