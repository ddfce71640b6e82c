"""Small loops around ``support.tiny_parts``: states, prompts by step, verdicts on the host, and comparisons."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rl_reason import build, sharding
from rl_reason.sampling import make_sampling
from rl_reason.types import Prompts, TrainState
from tests import support

LIVE = make_sampling(1.0)


def start(parts, scale: float = 1.5, seed: int = 0) -> TrainState:
    """A state at step 0, under whose weights completions differ in length and verdict."""
    return build.new_state(parts, support.tiny_params(parts.model, seed, scale), seed)


def prompts_of(parts, step: int) -> Prompts:
    """The prompts of a step; no two steps share a uid."""
    batch = parts.plan.prompts_drawn
    prompts = support.tiny_prompts(batch, seed=step)
    return dataclasses.replace(prompts, uid=prompts.uid + step * batch)


def stacked(parts, steps: int, first: int = 0) -> Prompts:
    """The prompts of several steps, [K B ...]."""
    return jax.tree.map(lambda *x: jnp.stack(x), *(prompts_of(parts, first + k) for k in range(steps)))


def verdicts(tokens: np.ndarray, completion_mask: np.ndarray, uid: np.ndarray):
    """``support.parity_verify`` on the host."""
    total = np.where(completion_mask, tokens, 0).sum(1)
    return (total % 2 == 0).astype(np.float32), np.ones(len(uid), bool), (total % 10).astype(np.int32)


class HostVerdicts:
    """Stands in for ``rewards.HostVerifier``: asked in parts, counts what it was asked."""

    def __init__(self, score_rows=verdicts):
        self.score_rows, self.asked = score_rows, []

    def __call__(self, tokens, completion_mask, uid):
        self.asked.append(np.array(uid))
        return self.score_rows(tokens, completion_mask, uid)

    def submit(self, tokens, completion_mask, uid):
        """As the pool does, answers when waited for."""
        answer = self(tokens, completion_mask, uid)
        return lambda: answer


def mesh_of(devices=None, **sizes):
    """A mesh over some of the devices."""
    return sharding.make_mesh(sizes, support.one_device() if devices is None else devices)


def distance(a, b) -> float:
    """The largest absolute difference of two trees of arrays."""
    gap = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0)), a, b)
    return max(jax.tree.leaves(gap))


def assert_equal(a, b) -> None:
    """Bitwise."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
