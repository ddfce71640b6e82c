"""General-Reasoner's reward: a verdict, less what the answer is longer or shorter than the reference (arXiv:2505.14652).

The authors' verdict is a generative verifier's; here it is whatever ``config.verify`` asks. Departure: an answer's length is
the number of sampled tokens that write it, where the code tokenises the extracted text anew.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rl_reason.policy import full_marks
from rl_reason.tags import Format, Tokenizer, find_answer
from rl_reason.types import Prompts, Rewards, Rollout


def reward(
    score: Float[Array, " N"],
    valid: Bool[Array, " N"],
    rollout: Rollout,
    prompts: Prompts,
    tokenizer: Tokenizer,
    *,
    answer_open: str,
    answer_close: str,
    no_answer: float,
    length_coef: float,
    max_length_gap_tokens: int,
) -> Rewards:
    """``no_answer`` where there is none to extract, else 0; plus 1 - length_coef min(|gap|, max) where the verdict passes.

    An answer is what the tags frame, if it is not blank; the gap is its tokens minus the reference's. Rows whose verifier
    failed have no verdict to pass.

    Raises:
        ValueError: prompts without references.
    """
    if prompts.reference is None:
        raise ValueError("the prompts carry no reference answers; this reward needs data that has them.")
    form = Format("", "", answer_open, answer_close)
    answer = find_answer(rollout.tokens, rollout.completion_mask, form, tokenizer.piece_bytes)
    extracted = answer.formed & (answer.ink_begin < answer.ink_end)
    begins = answer.token_end - answer.token_len
    overlaps = (answer.token_end > answer.ink_begin[:, None]) & (begins < answer.ink_end[:, None])
    writes = overlaps & (answer.token_len > 0)
    wanted = (prompts.reference != tokenizer.pad_id).sum(1)[rollout.prompt_id]
    gap = jnp.abs(writes.sum(1) - wanted).astype(score.dtype)

    correct = full_marks(score, valid)
    passed = 1.0 - length_coef * jnp.minimum(gap, max_length_gap_tokens)
    total = jnp.where(extracted, jnp.where(correct > 0, passed, 0.0), no_answer)
    as_float = lambda x: x.astype(score.dtype)
    parts = dict(format=as_float(extracted), length_gap=jnp.where(extracted, gap, 0.0))
    return Rewards(total=as_float(total), correct=correct, valid=valid, parts=parts)
