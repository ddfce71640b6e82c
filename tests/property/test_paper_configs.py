"""Laws of the papers' own configs, found in configs/: each builds, and one step of it traces, without an array in memory."""

import dataclasses
import functools
import importlib
import json
import math

import jax
import jax.numpy as jnp
import pytest

from configs.models import MODELS
from rl_reason import build, sharding
from rl_reason.ahead import topology
from rl_reason.ahead.stand_in import stand_in
from rl_reason.batch import BatchPlan
from rl_reason.data.packing import packed_stream
from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.loop import cohort, preference, supervised
from rl_reason.loop.chunk import make_step
from rl_reason.loop.preference import Pairs
from rl_reason.loop.step import sample_phase
from rl_reason.models import transformer
from rl_reason.types import Verdicts
from tests.property.test_laws import keys_of
from tests.support import config_names, load_config, one_device, prompts_like

RL, SUPERVISED = (
    [name for name in config_names(loop) if "paper" in importlib.import_module(f"configs.{name}").ARGS]
    for loop in ("rl", "supervised")
)
PAPERS = RL + SUPERVISED
# Parameters, and those a token uses, as the models' cards give them; DeepSeekMath's by hand, Intern-S1's by its text model.
PUBLISHED = {
    "Qwen2.5-7B": (7.61e9, 7.61e9),
    "Qwen2-7B-Instruct": (7.61e9, 7.61e9),
    "OREAL-7B-SFT": (7.61e9, 7.61e9),
    "Qwen2.5-Math-7B": (7.61e9, 7.61e9),
    "Qwen2.5-Math-7B-16k-think": (7.61e9, 7.61e9),
    "Qwen2.5-Math-1.5B": (1.54e9, 1.54e9),
    "Qwen2.5-32B": (32.5e9, 32.5e9),
    "Llama-3.1-8B": (8.03e9, 8.03e9),
    "internlm3-8b-instruct": (8.8e9, 8.8e9),
    "glm-4-9b-chat-hf": (9.4e9, 9.4e9),
    "deepseek-math-7b-instruct": (6.91e9, 6.91e9),  # 30 (4 x 4096^2 + 3 x 4096 x 11008) + 2 x 102400 x 4096
    "Qwen3-30B-A3B-Base": (30.5e9, 3.3e9),
    "Qwen3-235B-A22B": (235e9, 22e9),
    "Intern-S1": (235e9, 22e9),
    "Intern-S1-mini": (8.2e9, 8.2e9),
    "Qwen2.5-0.5B": (0.494e9, 0.494e9),
    "Qwen2.5-1.5B": (1.54e9, 1.54e9),
    "Qwen3-0.6B": (0.596e9, 0.596e9),
    "gemma-2-9b": (9.24e9, 9.24e9),
    "gemma-3-1b-pt": (1.0e9, 1.0e9),
    "gemma-3-4b-pt": (3.88e9, 3.88e9),  # its language model: 4.30 less the vision tower
    "Mixtral-8x7B-v0.1": (46.7e9, 12.9e9),
}
num_params = functools.cache(transformer.num_params)


def load_on_one_device(name):
    """configs/<name>.py:paper, for a mesh of one device."""
    config = load_config(name, "paper")
    config.mesh.update(data=1, fsdp=1, tensor=1, expert=1)
    return config


@pytest.fixture
def paper(tmp_path):
    """Loads configs/<name>.py:paper, with data and the embedded tokenizer in place of its own."""
    return lambda name: stand_in(load_on_one_device(name), tmp_path)[0]


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def abstract_state(parts):
    return jax.eval_shape(lambda params: build.new_state(parts, params, 0), transformer.param_shapes(parts.model))


def test_every_rl_config_has_its_paper():
    assert config_names("rl") == RL


@pytest.mark.parametrize("name", PAPERS)
def test_only_base_adds_keys(name):
    config = load_config(name, "paper")
    assert keys_of(config) == keys_of(load_config("base", "paper"))
    assert config.loop == load_config(name).loop
    assert config.data.files and not config.data.tasks
    assert all(
        config.model[key] == value for key, value in MODELS[config.tokenizer.removeprefix("checkpoints/")].items()
    )


@pytest.mark.parametrize("name", PAPERS)
def test_says_what_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_on_one_device(name)
    with pytest.raises(
        ValueError, match=r"config\.tokenizer='checkpoints/.*': no file or folder 'checkpoints/.*'; give 'embedded'"
    ):
        build.build(config, one_device())
    config.tokenizer, config.data.chat = "embedded", "plain"
    with pytest.raises(ValueError, match=f"data.files: no file '{config.data.files[0]}'"):
        build.build(config, one_device())


@pytest.mark.parametrize("name", config_names())
def test_names_a_slice_that_it_divides_over(name):
    """Of chips that there are; prompts, rows and slots over row shards. Whether it fits says experiments.compile."""
    if "paper" not in importlib.import_module(f"configs.{name}").ARGS:
        pytest.skip("no paper")
    config = load_config(name, "paper")
    generation, shape = topology.parse(config.topology)
    assert shape in generation.slices
    devices, sizes = math.prod(shape) * generation.devices_per_chip, dict(config.mesh)
    rest = math.prod(size for size in sizes.values() if size != -1)
    assert devices % rest == 0
    sizes = {axis: devices // rest if size == -1 else size for axis, size in sizes.items()}
    row_shards = math.prod(sizes[axis] for axis in sharding.ROWS)
    plan = BatchPlan(**config.batch, row_shards=1 if config.loop == "preference" else row_shards)
    prefill = min(config.rollout.prefill_rows, plan.generated_prompts)
    assert plan.generated_prompts % prefill == prefill % row_shards == 0
    assert config.rollout.num_slots % row_shards == 0
    assert config.model.num_kv_heads % sizes["tensor"] == 0
    assert not sizes["expert"] > 1 or config.model.num_experts % sizes["expert"] == 0
    pairs = config.preference
    assert config.loop != "preference" or pairs.pairs_per_step % (pairs.microbatches * row_shards) == 0


@pytest.mark.parametrize("name", RL)
def test_a_step_traces_and_returns_the_state_it_was_given(name, paper, capfd):
    config = paper(name)
    experiment = build.build(config, one_device())
    parts = experiment.parts
    assert parts.model.vocab_size == config.model.vocab_size

    def verify(rollout, prompts):
        del prompts
        right = rollout.truncated
        answers = jnp.zeros(right.shape, jnp.int32) if parts.wants("answers") else None
        return Verdicts(right.astype(rollout.rollout_logprobs.dtype), ~right, answers)

    def step(state):
        return make_step(parts, verify)(state, prompts_like(parts), experiment.sampling)

    state = abstract_state(parts)
    after, (metrics, sampled) = jax.eval_shape(step, state)
    assert described(after) == described(state)
    assert all(x.shape == () for x in metrics.values())
    assert sampled.tokens.shape[-1] == parts.prompt_widths.prompt + config.rollout.completion_len
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_supervised_step_traces(name, paper):
    config = paper(name)
    experiment = build.build(config, one_device())
    s = config.supervised
    packed_stream(
        experiment.train,
        experiment.tokenizer,
        rows_per_batch=s.rows_per_step,
        row_len=s.row_len_tokens,
        direct_share=s.direct_share,
    )
    of = lambda dtype: jnp.zeros((config.steps_per_call, s.rows_per_step, s.row_len_tokens), dtype)

    def chunk(state):
        batches = supervised.Demonstrations(of(jnp.int32), of(bool), of(jnp.int32))
        return supervised.make_packed_chunk(experiment.parts)(state, batches)

    state = abstract_state(experiment.parts)
    after, _ = jax.eval_shape(chunk, state)
    assert described(after) == described(state)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_published(name):
    config = load_config("base")
    config.model.update(MODELS[name])
    # No parameters: models of one shape are then counted once.
    config.model.update(rope_theta=1.0, norm_eps=1e-6, max_position=0)
    total, active = num_params(build.model_config(config, SentencePieceTokenizer.load()))
    published, published_active = PUBLISHED[name]
    assert total == pytest.approx(published, rel=0.01)
    assert active == pytest.approx(published_active, rel=0.02)  # to two digits


def towers(layers: int, hidden: int, mlp: int, *, rms: bool) -> int:
    """Intern-S1's vision tower and projector, which we leave in the checkpoint: InternViT on 32 x 32 patches of 14 x 14.

    The large one has RMS norms, on queries and keys too, and no biases on q, k, v; the small one LayerNorms and biases.
    """
    embeddings = 3 * 14 * 14 * hidden + hidden + hidden + (32 * 32 + 1) * hidden  # patches, their bias, CLS, positions
    attention = 4 * hidden**2 + hidden + (2 * hidden if rms else 3 * hidden)
    scales = 2 * hidden  # of what attention and feed-forward add
    norms = 2 * hidden if rms else 2 * 2 * hidden
    layer = attention + scales + norms + 2 * hidden * mlp + mlp + hidden
    text = 4096
    projector = (
        2 * 4 * hidden + 4 * hidden * text + text + text**2 + text
    )  # norm, two linear maps; four patches are one
    return embeddings + layers * layer + projector


@pytest.mark.parametrize(
    "name, beside, total, active",
    [
        ("Intern-S1", towers(45, 3200, 12800, rms=True), 240.710e9, 27.807e9),
        ("Intern-S1-mini", towers(24, 1024, 4096, rms=False), 8.539e9, 8.539e9),
    ],
)
def test_intern_s1_to_the_last_digit_published(name, beside, total, active):
    config = load_config("base")
    config.model.update(MODELS[name])
    counts = num_params(build.model_config(config, SentencePieceTokenizer.load()))
    assert [round((count + beside) / 1e6) for count in counts] == [total / 1e6, active / 1e6]


def test_a_vocabulary_is_the_tokenizers_or_more():
    config, tokenizer = load_config("base"), SentencePieceTokenizer.load()
    assert build.model_config(config, tokenizer).vocab_size == tokenizer.vocab_size
    config.model.vocab_size = tokenizer.vocab_size + 9
    assert build.model_config(config, tokenizer).vocab_size == tokenizer.vocab_size + 9
    config.model.vocab_size = tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match=f"config.model.vocab_size={tokenizer.vocab_size - 1} is less than the"):
        build.model_config(config, tokenizer)


def test_air_traces(tmp_path):
    """The only one that learns from pairs: one update of its batch, by shapes."""
    config = load_on_one_device("air")
    with pytest.raises(ValueError, match="no file or folder"):
        build.build(config, one_device())
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(dict(prompt="1+1=", chosen="2", rejected="3")) + "\n")
    config.tokenizer, config.data.chat, config.preference.files = "embedded", "plain", (str(file),)
    experiment = build.build(config, one_device())
    assert experiment.pairs is not None
    rows, width = config.preference.pairs_per_step, 512 + 1536
    tokens, length = jnp.zeros((1, 1, width), jnp.int32), jnp.ones((1, 1), jnp.int32)
    one = Pairs(tokens, tokens, length, tokens > 0, tokens > 0)
    pairs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, rows, *x.shape[2:]), x.dtype), one)
    params = transformer.param_shapes(experiment.parts.model)
    start = lambda params: dataclasses.replace(build.new_state(experiment.parts, params, 0), ref_params=params)
    state = jax.eval_shape(start, params)
    chunk = preference.make_counted_chunk(experiment.parts, experiment.pairs.setting, 14_000)
    after, metrics = jax.eval_shape(chunk, state, pairs)
    assert jax.tree.structure(after) == jax.tree.structure(state) and metrics["rewards/margins"].shape == (1,)


def test_rlccf_traces(paper):
    """Four policies of their own sizes and tokenizers: a draw, the vote and an update of each, by shapes."""
    config = load_on_one_device("rlccf")
    assert len({own.tokenizer for own in config.cohort.values() if "tokenizer" in own} | {config.tokenizer}) == 4
    with pytest.raises(ValueError, match=r"config\.tokenizer='checkpoints/Qwen2\.5-7B': no file or folder"):
        build.build(config, one_device())
    config = paper("rlccf")
    experiment = build.build(config, one_device())
    plan, prompts = experiment.parts.plan, prompts_like(experiment.parts)
    sampling, vote = experiment.sampling, experiment.parts.slots["reward"]
    names = list(experiment.policies)
    assert names == ["glm", "internlm3", "llama", "qwen"] and vote is not None

    def step(states):
        drawn, verdicts = {}, {}
        for name, policy in experiment.policies.items():
            drawn[name] = sample_phase(policy.parts, states[name], prompts, sampling)
            zero = drawn[name][0].truncated
            verdicts[name] = Verdicts(zero.astype(jnp.float32), ~zero, zero.astype(jnp.int32))
        rewards, _ = cohort.vote_phase(names, vote.fn, plan.group_size, verdicts)
        return {
            name: cohort.learn(
                policy.parts, states[name], prompts, *drawn[name], verdicts[name], rewards[name], sampling
            )[0]
            for name, policy in experiment.policies.items()
        }

    states = {name: abstract_state(policy.parts) for name, policy in experiment.policies.items()}
    assert described(jax.eval_shape(step, states)) == described(states)
