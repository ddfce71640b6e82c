"""Judges made here: cases from the tasks, supervised training of each model, and how well it judges held-out cases.

The generative verifier learns A, B or C from right, wrong and unfinished answers; the preference model learns pairs of
answers to one problem by Bradley-Terry. Labels come from the tasks' own verifiers, so a judge can be audited against them.
Both are prerequisites of a run as the warm-up is, and are cached by the hash of what made them.
"""

import dataclasses
import time
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from rl_reason import build, cache, processes
from rl_reason.data.example import Example, mix
from rl_reason.data.sources import Source, load_task, make_source
from rl_reason.data.stream import pad
from rl_reason.judging import Cases, Judge, Preference, Verifier
from rl_reason.loop.optimizer import init_optimizer, plain_step
from rl_reason.models.reward_head import preference_losses
from rl_reason.tasks.base import ANSWER_MARK, extract_answer
from rl_reason.types import TrainState, on_host

MADE_BY = ("models", "judging.py", "judges.py", "cache.py", "data", "tasks", "build.py", "loop/optimizer.py")
NUM_HELDOUT = 512  # cases or pairs that a judge is measured on
RIGHT, WRONG, UNUSABLE = range(3)
DRAW = 0x5A  # keeps corruptions apart from the source's own randomness


class Candidate(typing.NamedTuple):
    """A completion, and whether it ended by itself."""

    text: str
    finished: bool


class Trained(typing.NamedTuple):
    """A judge's parameters, the share of held-out cases it judged as the tasks do, and what it cost."""

    params: PyTree
    accuracy: float
    unreadable: float  # share of held-out cases for which the verifier's reply was no letter
    seconds: float
    cached: bool


def put(state: TrainState, trained: dict[str, Trained]) -> TrainState:
    """The state with the trained judges in place of random ones, where those were."""
    models = dict(state.models)
    for name, judge in trained.items():
        places = jax.tree.map(lambda x: x.sharding, models[name]["params"])
        models[name] = {"params": jax.jit(lambda x: x, out_shardings=places)(judge.params)}
    return dataclasses.replace(state, models=models)


def make(experiment: build.Experiment, name: str, on_step: Callable[[int, float], None]) -> Trained:
    """One model from the cache or from its cases, measured on held-out ones either way.

    Raises:
        ValueError: prompts of files, which have no cases to learn from.
    """
    began = time.perf_counter()
    config, judge = experiment.config, experiment.parts.judges[name]
    if config.data.files:
        raise ValueError(
            f"config.models.{name} would be trained on answers to config.data.tasks, and config.data.files has none; "
            "checkpoints of judges cannot be read yet. Set config.reward.kinds to 'rule' for all sources, and config.models "
            "to None."
        )
    own = dict(config.models[name])
    own["model"] = dict(own["model"])
    key = jax.random.fold_in(jax.random.key(config.seed), build.JUDGES_KEY)
    params = jax.jit(judge.init, out_shardings=NamedSharding(experiment.mesh, P()))(key)
    values = dict(name=name, own=own, model=config.model.to_dict(), data=config.data.to_dict(), seed=config.seed)
    values |= dict(tokenizer=experiment.tokenizer.fingerprint)
    place = cache.cache_root() / "judges" / cache.fingerprint(values, MADE_BY)
    kept = cache.read_or_make(place, params, lambda: train(experiment, name, params, on_step))
    accuracy, unreadable = measure(experiment, name, judge, kept.tree)
    return Trained(kept.tree, accuracy, unreadable, time.perf_counter() - began, kept.cached)


def train(experiment: build.Experiment, name: str, params: PyTree, on_step: Callable[[int, float], None]) -> PyTree:
    """Adam on fresh cases at every step; its rate falls to a tenth along a cosine."""
    own, judge = dict(experiment.config.models[name]), experiment.parts.judges[name]
    rate = optax.cosine_decay_schedule(own["learning_rate"], own["num_steps"], alpha=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    source = source_of(experiment, name, "train")

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_of(judge, p, batch, own.get("focal_gamma", 0.0)))(params)
        return plain_step(optimizer, params, opt_state, grads), loss

    chunk = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    carry = (params, init_optimizer(optimizer, params))
    for done in range(0, own["num_steps"], own["steps_per_call"]):
        drawn = [
            batch_of(experiment, judge, source, (done + k) * own["batch_size"], own["batch_size"])
            for k in range(own["steps_per_call"])
        ]
        stacked = jax.tree.map(lambda *x: np.stack(x), *drawn)
        carry, losses = chunk(carry, processes.global_put(stacked, experiment.mesh, P()))
        on_step(done + own["steps_per_call"], float(processes.to_host(losses)[-1]))
    return carry[0]


def loss_of(judge: Judge, params: PyTree, batch: tuple, focal_gamma: float) -> Float[Array, ""]:
    """-log p of the letter, as one token of the whole vocabulary; or Bradley-Terry of better against worse."""
    if isinstance(judge, Verifier):
        cases, label = batch
        wanted = jnp.array(judge.label_ids)[label]
        return optax.softmax_cross_entropy_with_integer_labels(judge.logits(params, cases), wanted).mean()
    better, worse = batch
    return preference_losses(judge(params, better), judge(params, worse), focal_gamma).mean()


def measure(experiment: build.Experiment, name: str, judge: Judge, params: PyTree) -> tuple[float, float]:
    """(share judged as the tasks judge, share of replies that are no letter) of NUM_HELDOUT held-out cases or pairs."""
    source = source_of(experiment, name, "heldout")
    batch = processes.global_put(batch_of(experiment, judge, source, 0, NUM_HELDOUT), experiment.mesh, P())
    if isinstance(judge, Verifier):
        said = np.asarray(processes.to_host(jax.jit(judge)(params, batch[0])))
        return float((said == processes.to_host(batch[1])).mean()), float((said < 0).mean())
    better, worse = (np.asarray(processes.to_host(jax.jit(judge)(params, cases))) for cases in batch)
    return float((better > worse).mean()), 0.0


def source_of(experiment: build.Experiment, name: str, split: str) -> Source:
    """The problems of the tasks that this model judges, at the run's levels."""
    data, wanted = experiment.config.data, experiment.config.models[name]["tasks"]
    levels = [data.levels[data.tasks.index(task)] for task in wanted] if data.levels else None
    return make_source(seed=experiment.config.seed, split=split, tasks=tuple(wanted), levels=levels)


def batch_of(experiment: build.Experiment, judge: Judge, source: Source, first: int, count: int) -> tuple:
    """(cases, labels) for a verifier, (better, worse) for a preference model, of the draws from ``first`` on."""
    examples = [source.example(uid) for uid in range(first, first + count)]
    draws = [np.random.default_rng(mix(DRAW, experiment.config.seed, first + i)) for i in range(count)]
    limit = experiment.parts.rollout.completion_len
    if isinstance(judge, Preference):
        pairs = [pair(rng, example, limit) for rng, example in zip(draws, examples, strict=True)]
        better, worse = zip(*pairs, strict=True)
        return arrays(experiment, examples, better), arrays(experiment, examples, worse)
    judged = [case(rng, example, limit) for rng, example in zip(draws, examples, strict=True)]
    candidates, labels = zip(*judged, strict=True)
    return arrays(experiment, examples, candidates), np.array(labels, np.int32)


def case(rng: np.random.Generator, example: Example, limit: int) -> tuple[Candidate, int]:
    """A candidate and its label: right, wrong and unusable are about equally frequent."""
    wanted = int(rng.integers(3))
    for _ in range(20):
        drawn = candidate(rng, example, wanted, limit)
        if label(drawn, example) == wanted:
            return drawn, wanted
    drawn = candidate(rng, example, RIGHT, limit)
    return drawn, label(drawn, example)


def label(drawn: Candidate, example: Example) -> int:
    """As the task's verifier has it; what did not finish or gives no answer is unusable."""
    if not drawn.finished or not extract_answer(drawn.text):
        return UNUSABLE
    verdict = load_task(example.verifier).verify(drawn.text, example.problem)
    return RIGHT if verdict.score >= 1 else WRONG


def candidate(rng: np.random.Generator, example: Example, wanted: int, limit: int) -> Candidate:
    """What a policy may write: worked or bare, with slips in the steps, in the answer, or stopped on the way.

    Steps that would not fit into ``limit`` tokens, of which none writes less than a character, are left out.
    """
    assert example.demonstration is not None and example.reference is not None
    steps = example.demonstration.rpartition(ANSWER_MARK)[0] if rng.random() < 0.5 else ""
    if steps and rng.random() < 0.3:
        steps = slip(rng, steps, example)  # a slip in the steps does not make an answer wrong
    answer = slip(rng, example.reference, example) if wanted == WRONG else example.reference
    text = f"{steps}{ANSWER_MARK}{answer}"
    if len(text) + 1 > limit + len(ANSWER_MARK) - 1:  # EOS, and a mark that is one token
        steps, text = "", f"{ANSWER_MARK}{answer}"
    if wanted != UNUSABLE:
        return Candidate(text, True)
    how = rng.integers(4)
    if how == 0:
        return Candidate(steps + answer, True)  # no mark
    if how == 1:
        return Candidate(f"{steps}{ANSWER_MARK}", True)  # no answer
    return Candidate(text * 2 if how == 2 else text[: int(rng.integers(len(text)))], False)


def slip(rng: np.random.Generator, text: str, example: Example) -> str:
    """One to two characters replaced, dropped or doubled; characters are those of the problem and of its solution."""
    alphabet = sorted(set(f"{example.prompt}{example.demonstration}") - {"#", " "}) + list("0123456789")
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.integers(len(text))) if text else 0
        other = alphabet[int(rng.integers(len(alphabet)))]
        how = rng.random()
        if how < 0.7 and text:
            text = text[:at] + other + text[at + 1 :]
        elif how < 0.85 and len(text) > 1:
            text = text[:at] + text[at + 1 :]
        else:
            text = text[:at] + other + text[at:]
    return text


def pair(rng: np.random.Generator, example: Example, limit: int) -> tuple[Candidate, Candidate]:
    """(better, worse): right before wrong, of wrong ones the longer right beginning of the answer first."""
    for _ in range(20):
        kinds = rng.choice((RIGHT, WRONG, WRONG, UNUSABLE), 2)
        both = [candidate(rng, example, int(kind), limit) for kind in kinds]
        worse, better = sorted(both, key=lambda drawn: quality(drawn, example))
        if quality(better, example) > quality(worse, example):
            return better, worse
    return candidate(rng, example, RIGHT, limit), Candidate("", False)


def quality(drawn: Candidate, example: Example) -> float:
    """The share of the reference that the answer begins with, 2 for a right one, -1 for one that cannot be used."""
    found = label(drawn, example)
    if found != WRONG:
        return 2.0 if found == RIGHT else -1.0
    answer, reference = extract_answer(drawn.text) or "", example.reference or ""
    same = next((i for i, (a, b) in enumerate(zip(answer, reference, strict=False)) if a != b), None)
    return (min(len(answer), len(reference)) if same is None else same) / max(len(reference), 1)


def arrays(experiment: build.Experiment, examples: list[Example], candidates: Sequence[Candidate]) -> Cases:
    """Numpy arrays in the widths that the run's rollouts have; a candidate that is too long did not finish."""
    tokenizer, data = experiment.tokenizer, experiment.config.data
    width = experiment.parts.rollout.completion_len
    prompts = [tokenizer.prompt(example.asked) for example in examples]
    references = [tokenizer.encode(example.reference or "") for example in examples]
    written = [tokenizer.encode(x.text) + [tokenizer.eos_id] * x.finished for x in candidates]
    written = [ids[:width] for ids in written]
    filled = lambda rows, width: (pad(rows, width, tokenizer.pad_id), np.array([len(row) for row in rows], np.int32))
    prompt, prompt_len = filled(prompts, data.max_prompt_len_tokens)
    reference, reference_len = filled(references, data.max_reference_len_tokens)
    candidate, candidate_len = filled(written, width)
    fields = dict(prompt=prompt, prompt_len=prompt_len, reference=reference, reference_len=reference_len)
    return on_host(Cases, **fields, candidate=candidate, candidate_len=candidate_len)
