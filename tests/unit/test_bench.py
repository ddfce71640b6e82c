"""What the benchmark counts, that what it compares draws the same tokens, and what it writes. Nothing is timed."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench as cli
from rl_reason.bench import counts, timing
from rl_reason.bench.host_loop import HostLoop
from rl_reason.bench.measure import measure
from rl_reason.bench.profile import Event, summary
from rl_reason.bench.refill import MEAN_FRACTION, NO_EOS, lock_step, lognormal_lengths
from rl_reason.bench.setting import draw_prompts
from rl_reason.build import build
from rl_reason.models import transformer
from rl_reason.models.score import score
from rl_reason.report.console import Display
from rl_reason.report.files import to_json
from rl_reason.rollout import generate
from rl_reason.sampling import make_sampling
from tests.support import MOE, load_config, one_device, tiny_model, tiny_params, tiny_prompts, tiny_rollout


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, MOE], ids=["dense", "untied", "moe"])
def test_matmul_params_are_all_but_norms_and_the_lookup(changes):
    model = tiny_model(**changes)
    weights = counts.matmul_params(model)
    total, active = transformer.num_params(model)
    # A layer has two norms [D] and q and k norms [hd]; the last norm is [D]; an untied embedding is only looked up.
    rest = model.num_layers * (2 * model.hidden_size + 2 * model.head_dim) + model.hidden_size
    rest += 0 if model.tie_embeddings else weights.head
    assert model.num_layers * weights.layer + weights.head == total - rest
    assert model.num_layers * weights.layer_active + weights.head == active - rest


def test_a_profile_by_hand():
    # Thread a: a loop of 100 ns with bodies of 30 and 20 inside it, of which the second calls 5; so 50 are its own. Two
    # kernels overlap it, and each other from 90 to 95: of those nothing is taken off. Nothing runs from 110 to 140.
    events = [
        Event("a", "while.3", 0, 100),
        Event("a", "fusion.1", 10, 30),
        Event("a", "fusion_2", 50, 20),
        Event("a", "dot", 55, 5),
        Event(None, "fusion", 60, 35),
        Event(None, "dot.12.1", 90, 20),
        Event(None, "sort", 140, 10),
    ]
    found = summary(events)
    assert found["seconds"] == pytest.approx(150e-9) and found["busy"] == pytest.approx(120 / 150)
    kernels = {kernel["name"]: (round(1e9 * kernel["seconds"]), kernel["count"]) for kernel in found["kernels"]}
    assert kernels == {"fusion": (80, 3), "while": (50, 1), "dot": (25, 2), "sort": (10, 1)}
    assert [kernel["name"] for kernel in found["kernels"]] == ["fusion", "while", "dot", "sort"]


def test_rollout_work_by_hand():
    # tiny_model: L 2, D 8, H 4, KV 2, hd 4, F 12, V 13. A layer: 2 * 8 * 4 * (4 + 2) + 3 * 8 * 12 = 384 + 288 = 672.
    # One prompt of 3 tokens, two completions of 1 and 2: 3 + 3 tokens pass the layers, 3 pass the head (104).
    # Context: the prompt's 1 + 2 + 3 = 6; the first tokens see 3 positions each and the third sees 4, so 10.
    flops = 2 * 2 * 672 * (3 + 3) + 2 * 104 * 3 + 4 * 2 * 4 * 4 * (6 + 10)
    # fp32. Weights: once for the prefill, without the head, and for two decode steps; a position of keys and values is
    # 2 * 2 * 2 * 4 * 4 = 128 bytes, read 10 times and written 3 + 3 times.
    num_bytes = 4 * 2 * 672 + 2 * 4 * (2 * 672 + 104) + 128 * (10 + 6)
    work = counts.rollout_work(tiny_model(), np.array([3]), np.array([1, 2]), decode_steps=2, rows_per_step=2)
    assert work == counts.Work(flops, num_bytes, 3)
    assert work.seconds(float(flops), 2.0 * num_bytes) == 1.0 == work.seconds(4.0 * flops, float(num_bytes))


def test_update_work_by_hand():
    # Rows of 2 + 1 and 1 + 3 tokens: 7 tokens, 4 scored, context 6 + 10. One epoch in two updates of one microbatch,
    # and one scoring: 3 + 1 forwards; (3 * 2 + 7 * 2 + 1) passes over 2 * 672 + 104 parameters of 4 bytes.
    forward = 2 * 2 * 672 * 7 + 2 * 104 * 4 + 4 * 2 * 4 * 4 * 16
    lens = np.array([2, 1]), np.array([1, 3])
    work = counts.update_work(tiny_model(), *lens, epochs=1, scorings=1, updates=2, passes=2)
    assert work == counts.Work(4 * forward, 21 * 1448 * 4, 7)


def test_moe_bytes_lie_between_one_row_and_all_experts():
    model = tiny_model(**MOE)  # 4 experts, 2 a token
    assert counts.experts_read(model, 1) == pytest.approx(2)
    assert counts.experts_read(model, 2) == pytest.approx(3)  # half of the other two
    assert counts.experts_read(model, 1000) == pytest.approx(4)
    weights = counts.matmul_params(model)
    assert counts.decode_weight_bytes(model, 1) == 4 * (2 * weights.layer_active + weights.head)
    assert counts.decode_weight_bytes(model, 1000) == pytest.approx(4 * (2 * weights.layer + weights.head))


def test_forward_flops_agree_with_the_compiler():
    model = tiny_model(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=128, vocab_size=96)
    rows, prompt, completion = 4, 16, 16
    tokens = jnp.ones((rows, prompt + completion), jnp.int32)
    mask = jnp.arange(prompt + completion) >= jnp.full((rows, 1), prompt)
    lens = jnp.full(rows, prompt)

    def total(params):
        return score(params, tokens, lens, mask, jnp.float32(1), model, completion).logprobs.sum()

    params = transformer.init(jax.random.key(0), model)
    length = prompt + completion
    context = counts.causal_context(np.full(rows, length))
    expected = counts.forward_flops(model, tokens=rows * length, scored=rows * completion, context=context)
    forward = timing.compiled(jax.jit(total), params).xla_flops
    both = timing.compiled(jax.jit(jax.value_and_grad(total)), params).xla_flops
    if forward is None or both is None:
        pytest.skip("the compiler gives no count")
    # The compiler adds elementwise work and the masked half of the attention.
    assert 1.0 <= forward / expected <= 1.4
    assert 1.0 <= both / (3 * expected) <= 1.5


def test_lognormal_lengths_have_their_mean_and_spread():
    # A lognormal's median is its mean * exp(-sigma^2 / 2), the quantile a standard deviation up exp(sigma) above it.
    # Clipping at the limit, 2.1 standard deviations up, moves neither.
    low, middle, high = np.quantile(lognormal_lengths(100_000, 10_000), [0.1587, 0.5, 0.8413])
    assert middle == pytest.approx(MEAN_FRACTION * 10_000 * math.exp(-(0.8**2) / 2), rel=0.02)
    assert math.log(high / middle) == pytest.approx(0.8, rel=0.02) == math.log(middle / low)
    short = lognormal_lengths(1000, 6)
    assert short.min() == 1 and short.max() == 6


def drawn(rollout, model, config, limit=None, temperature=1.0):
    """(generate's, the host loop's) completions of the same prompts, on one device."""
    prompts, params, key = tiny_prompts(4), tiny_params(model), jax.random.key(3)
    sampling = make_sampling(temperature, top_k=config.get("top_k", 0))
    limits = None if limit is None else jnp.asarray(limit)
    fused = jax.jit(lambda *x: generate(*x, model, rollout, limits)[0])(params, prompts, key, sampling)
    on_host = jax.tree.map(np.asarray, prompts)
    host, calls = HostLoop(model, rollout)(params, on_host, key, sampling, limit)
    return fused, host, calls


def assert_same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x is None or y is None:
            assert x is y
        elif jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"stop_ids": (5,), "stop": ("ab",), "piece_bytes": (b"", b"", b"", b"a", b"b", b"", b"aba")}, {}),
        ({}, {"top_k": 3}),
        ({}, {"temperature": 0.0}),
        ({}, {"moe": True}),
        ({}, {"limit": [1, 2, 3, 4, 5, 6, 1, 6]}),
    ],
    ids=["plain", "stops", "top_k", "greedy", "moe", "limits"],
)
def test_host_loop_draws_the_compiled_loops_tokens(changes, settings):
    model = tiny_model(**(MOE if settings.get("moe") else {}))
    limit = None if "limit" not in settings else np.array(settings["limit"], np.int32)
    fused, host, calls = drawn(
        tiny_rollout(**changes), model, settings, limit, temperature=settings.get("temperature", 1.0)
    )
    assert_same(fused, host)
    assert fused.completion_mask.any() and calls <= 2 * fused.tokens.shape[1]


def test_host_loop_refuses_batches_that_do_not_fill():
    rollout = tiny_rollout(num_slots=6)  # 3 prompts at a time
    with pytest.raises(ValueError, match="4 prompts do not fill lock-step batches of 3"):
        drawn(rollout, tiny_model(), {})


def test_both_schedules_draw_the_same_tokens():
    model, rollout = tiny_model(), tiny_rollout(eos_id=NO_EOS)
    prompts, params, sampling = tiny_prompts(8), tiny_params(model), make_sampling(1.0)
    limit = jnp.asarray(lognormal_lengths(16, rollout.completion_len))

    def both(params, prompts, sampling, limit):
        given = params, prompts, jax.random.key(1), sampling, model, rollout, limit
        return generate(*given), lock_step(*given)

    (refilled, steps), (locked, locked_steps) = jax.jit(both)(params, prompts, sampling, limit)
    assert_same(refilled, locked)
    np.testing.assert_array_equal(refilled.completion_mask.sum(1), limit)
    # In lock step a batch of 4 rows takes its longest; slots can only do better.
    assert locked_steps == limit.reshape(-1, rollout.num_slots).max(1).sum()
    assert math.ceil(limit.sum() / rollout.num_slots) <= steps <= locked_steps


KEYS = {
    "rollout": {"tokens_per_s", "seconds", "model_flops", "model_bytes", "roofline_share", "decode_steps"},
    "update": {"tokens_per_s", "seconds", "model_flops", "model_bytes", "roofline_share"},
    "step": {"tokens_per_s", "seconds", "model_flops", "mfu"},
    "host_loop": {"rollout_ratio", "step_ratio", "rollout_seconds", "step_seconds", "calls"},
    "refill": {"ratio", "ratio_of_steps", "ratio_to_host", "refill", "lock_step", "host", "mean_length"},
    "rates": {"matmul_flops_per_s", "copy_bytes_per_s"},
    "memory": {"device_peak_bytes", "process_peak_bytes"},
    "machine": {"cpu", "cores", "versions", "devices", "backend"},
    "compile_seconds": {"rollout", "update", "step", "verify", "refill", "lock_step"},
}


def test_the_whole_benchmark_on_a_tiny_config(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "matmul_rate", lambda dtype, s: {"flops_per_s": 1e11, "dtype": dtype, "seconds": []})
    monkeypatch.setattr(timing, "copy_rate", lambda s, megabytes: {"bytes_per_s": 1e10, "seconds": []})
    config = load_config("clipcov")
    config.model.update(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=16)
    config.rollout.update(completion_len=8, num_slots=16)
    told: list[dict] = []
    tell = lambda record: told.append(dict(record))
    record = measure(config, repeats=1, quick=True, trace=tmp_path, tell=tell, devices=one_device())
    assert told == [{key: value for key, value in record.items() if key != "profile"}]
    record = {"config": "tiny", **record}
    for section, keys in KEYS.items():
        assert keys <= set(record[section]), section
    assert record["host_loop"]["same_tokens_fraction"] == 1.0
    assert record["host_loop"]["tokens"] == record["rollout"]["tokens"]
    refill = record["refill"]
    assert {refill[name]["tokens"] for name in ("refill", "lock_step", "host")} == {refill["refill"]["tokens"]}
    assert all(refill[name]["same_tokens_fraction"] == 1.0 for name in ("refill", "lock_step", "host"))
    assert refill["samples"] == 4 * refill["slots"]
    assert refill["refill"]["decode_steps"] <= refill["lock_step"]["decode_steps"] == refill["host"]["decode_steps"]
    json.loads(to_json(record))

    cli.print_bench(Display(), record)
    for name, profile in record["profile"].items():
        cli.print_profile(Display(), name, profile)
    printed = capsys.readouterr().out
    assert "slot refill" in printed and "compiled loop" in printed
    for name, profile in record["profile"].items():
        assert list((tmp_path / name).rglob("*.xplane.pb")) and f"{name}, {profile['seconds']:.3g} s" in printed
        assert 0 < profile["busy"] <= 1 and profile["kernels"][0]["count"] > 0
    assert max(map(len, printed.splitlines()[2:])) <= 110

    alone = {key: value for key, value in record.items() if key not in ("host_loop", "refill")}
    cli.print_bench(Display(), alone)
    printed = capsys.readouterr().out
    assert "compiled loop" not in printed and "rollout" in printed


def test_full_prompts_repeat_themselves():
    experiment = build(load_config("base"), one_device())
    short, full = (draw_prompts(experiment, 2, full) for full in (False, True))
    width = experiment.config.data.max_prompt_len_tokens
    assert (short.prompt_len < width).all() and (full.prompt_len == width).all()
    for part, row, length in zip(short.tokens, full.tokens, short.prompt_len, strict=True):
        np.testing.assert_array_equal(row, [part[i % length] for i in range(width)])


@pytest.mark.slow
def test_without_what_it_is_compared_with():
    record = measure(load_config("base", "smoke"), repeats=1, quick=True, compare=False, devices=one_device())
    assert "host_loop" not in record and "refill" not in record and record["step"]["tokens_per_s"] > 0


def test_default_config_unless_named():
    assert cli.with_default_config(["bench", "--quick"]) == ["bench", "--config=clipcov.py", "--quick"]
    named = ["bench", "--config=klcov.py", "--config.seed=1"]
    assert cli.with_default_config(named) == named
    assert cli.with_default_config(["bench", "--config.seed=1"])[1] == "--config=clipcov.py"


def test_interleaved_takes_turns():
    calls: list[str] = []
    seconds = timing.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert calls == list("ababab")  # one turn warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
