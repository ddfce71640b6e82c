"""The integers of a batch, and the reshapes that follow from them."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason.batch import BatchPlan, merge_strided, split_strided

GOOD = dict(
    prompts_per_step=8,
    group_size=4,
    train_group_size=2,
    generated_prompts=12,
    max_rounds=2,
    minibatches=2,
    epochs=3,
    microbatch_rows=4,
)


def test_derived():
    plan = BatchPlan(**GOOD)
    assert plan.rows == 16  # 8 prompts x 2 trained rows
    assert plan.minibatch_rows == 8 and plan.microbatches == 2
    assert plan.updates_per_step == 6  # 2 minibatches x 3 epochs
    assert plan.prompts_drawn == 24  # 12 a round, 2 rounds
    assert BatchPlan(**GOOD | dict(microbatch_rows=0)).microbatches == 1
    assert BatchPlan(**GOOD | dict(demonstrations=1)).num_samples == 3
    # Microbatches have 4 rows: 48 rows go in 12 pieces, 6 in two, 7 one by one.
    assert [plan.pieces_of(rows) for rows in (48, 6, 7, 4, 3)] == [12, 2, 7, 1, 1]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(minibatches=3), "prompts_per_step=8 / minibatches=3 = 2.66667 prompts"),
        (dict(minibatches=8, row_shards=2), "1 prompts a minibatch over 2 row shards (mesh data x fsdp x expert)"),
        (dict(demonstrations=4), "demonstrations=4 leave no sample in a group_size of 4"),
        (dict(microbatch_rows=3), "8 rows a minibatch / microbatch_rows=3 = 2.66667 microbatches"),
        (dict(microbatch_rows=2, row_shards=4), "microbatch_rows=2 over 4 row shards"),
        (dict(train_group_size=5), "train_group_size=5 is more than group_size=4"),
        (dict(row_shards=8), "generated_prompts=12 over 8 row shards"),
        (
            dict(generated_prompts=3),
            "generated_prompts=3 x max_rounds=2 = 6 prompts can never fill prompts_per_step=8",
        ),
        (dict(group_size=0), "group_size=0 is too small"),
        (dict(epochs=0, max_rounds=-1), "max_rounds=-1 is too small; epochs=0 is too small"),
        (dict(microbatch_rows=-1), "microbatch_rows=-1 is too small"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_derived_values(changes, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        BatchPlan(**GOOD | changes)
    assert "config.batch" in str(error.value) and "Derived: " in str(error.value)
    assert "rows trained on" in str(error.value) and "updates" in str(error.value)


def test_describes_itself():
    assert BatchPlan(**GOOD).describe() == (
        "12 prompts x 4 samples a round (at most 2), 8 x 2 = 16 rows trained on, 2 minibatches of 8 rows x 3 epochs = "
        "6 updates, microbatches of 4 rows, 1 row shards"
    )


SIZES = st.integers(1, 4)


@settings(max_examples=5, deadline=None)
@given(pieces=SIZES, block=SIZES, blocks=SIZES)
def test_split_is_strided_and_merge_undoes_it(pieces, block, blocks):
    rows = np.arange(pieces * block * blocks)
    tree = {"a": jnp.array(rows), "b": jnp.array(np.stack([rows, -rows], axis=1)), "none": None}
    cut = split_strided(tree, pieces, block)
    by_block = rows.reshape(-1, block)
    for i in range(pieces):
        np.testing.assert_array_equal(cut["a"][i], by_block[i::pieces].reshape(-1))
    assert cut["b"].shape == (pieces, block * blocks, 2)
    back = merge_strided(cut, block)
    np.testing.assert_array_equal(back["a"], rows)
    np.testing.assert_array_equal(back["b"], tree["b"])


def test_each_piece_takes_an_equal_share_of_every_shard():
    # 8 rows over 2 shards (0-3, 4-7), cut in two: each piece has two rows of each.
    assert split_strided(jnp.arange(8), 2).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
