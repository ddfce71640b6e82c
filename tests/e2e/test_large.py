"""What real sizes need: a 0.6B model with AdamW, and a 1.5B one with adapters, from a checkpoint through a step to a
checkpoint, as a user has it done; and reading beside what is read.

Slow, and their peaks are printed: ``pytest -n 0 -s -m slow tests/e2e/test_large.py``.
"""

import os
import pathlib
import subprocess
import sys
import typing

import numpy as np
import pytest

from rl_reason.models.hf_files import Checkpoint
from tests.e2e.harness import ROOT, environment, metrics

pytestmark = pytest.mark.slow
GIB = 2**30
LIMIT = 20 * GIB
NAME = "Qwen3-0.6B"

MAKE = """
import sys, jax, jax.numpy as jnp, ml_dtypes, numpy as np
from configs.models import MODELS
from rl_reason.data.sentencepiece_tokenizer import EMBEDDED
from rl_reason.models import hf_export, transformer
from rl_reason.models.transformer import ModelConfig
from rl_reason.sharding import path_name
how = dict(dtype="bfloat16", param_dtype="bfloat16", scan_layers=True, scan_decode=True, remat="none")
changes = eval(sys.argv[3])
model = ModelConfig.of(MODELS[sys.argv[2]] | changes | how)
block = (0.02 * np.random.default_rng(0).standard_normal(2**20 + 7)).astype(ml_dtypes.bfloat16)  # again and again
fill = lambda path, x: jnp.ones(x.shape, x.dtype) if "norm" in path_name(path) else jnp.asarray(np.resize(block, x.shape))
params = jax.tree_util.tree_map_with_path(fill, transformer.param_shapes(model))
hf_export.write(
    sys.argv[1], params, model, dtype="bfloat16", files={"tokenizer.model": EMBEDDED}, max_shard_bytes=int(sys.argv[4])
)
"""
# The peak of resident memory is set back once jax is up, so that what is left is reading's own.
READ = """
import pathlib, sys, jax
from rl_reason.models import hf_config, hf_weights, transformer
from rl_reason.models.transformer import ModelConfig
how = dict(dtype="float32", param_dtype="float32", scan_layers=True, scan_decode=True, remat="none")
folder = pathlib.Path(sys.argv[1])
model = ModelConfig.of(hf_config.model_keys(hf_config.read_json(folder / "config.json")) | how)
transformer.param_shapes(model)
memory = lambda key: next(
    int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key)
)
before = memory("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
leaves = jax.tree.leaves(hf_weights.read(folder, model).params)
beside = memory("VmHWM") - before - sum(x.nbytes for x in leaves)
print(beside, max(x.nbytes for x in leaves), max(path.stat().st_size for path in folder.glob("*.safetensors")))
"""


class Done(typing.NamedTuple):
    """What a command said, and its peak of resident memory in bytes."""

    output: str
    peak: int


def measured(*command: str) -> Done:
    """Runs python with these arguments, insists on exit code 0."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    return Done(output, usage.ru_maxrss * 1024)


def make(folder: pathlib.Path, name: str = NAME, max_shard_bytes: int = 5 * 10**9, **changes: int) -> pathlib.Path:
    """A checkpoint of a published model's shape, with random weights in bf16 and the embedded tokenizer."""
    measured("-c", MAKE, str(folder), name, repr(changes), str(max_shard_bytes))
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells and resets the peak")
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 10**8])
def test_reading_needs_little_beside_what_is_read(max_shard_bytes, tmp_path):
    # 480 MB in bf16, which become 0.9 GiB in fp32; at most 1.2 times a file, or a parameter of all layers.
    folder = make(tmp_path / "model", max_shard_bytes=max_shard_bytes, num_layers=12, vocab_size=50_000)
    beside, stacked, file = map(int, measured("-c", READ, str(folder)).output.split())
    print(f"\nreading: {beside / 2**20:.0f} MiB beside the parameters; {stacked=} {file=}")
    assert beside <= 1.2 * max(stacked, file)


def stepped(weights: pathlib.Path, folder: pathlib.Path, *flags: str) -> Checkpoint:
    """What a step makes of a checkpoint; prints what it needs, loading and saving and the export included."""
    run, out = folder / "run", folder / "out"
    peaks = {}
    step = measured(
        *("-m", "experiments.run", "--config=tests/e2e/large.py", f"--config.weights={weights}", f"--run={run}"),
        *flags,
    )
    names = Checkpoint(weights).names
    assert f"[weights] done {len(names)}/{len(names)}" in step.output
    peaks["load, step, save"] = step.peak
    peaks["export"] = measured("-m", "experiments.convert", f"--from={run}", f"--to={out}", "--dtype=bfloat16").peak
    print("\n" + "\n".join(f"{what}: peak {peak / GIB:.2f} GiB" for what, peak in peaks.items()))

    (row,) = metrics(run)
    assert row["actor/grad_norm"] > 0 and row["actor/skipped_updates"] == 0
    assert Checkpoint(out).names == names and (out / "tokenizer.model").exists()
    assert max(peaks.values()) < LIMIT
    return Checkpoint(out)


def change(before: Checkpoint, after: Checkpoint, name: str) -> float:
    """The largest in a tensor."""
    return float(np.abs(after.read(name).astype(np.float32) - before.read(name).astype(np.float32)).max())


def test_a_step_of_0_6b_with_adamw(tmp_path):
    weights = make(tmp_path / "weights")
    after = stepped(weights, tmp_path)
    # AdamW's first step is the learning rate, and bf16 rounds.
    assert 0 < change(Checkpoint(weights), after, "model.layers.3.mlp.down_proj.weight") < 1e-3


def test_a_step_of_1_5b_with_adapters_on_bf16(tmp_path):
    weights = make(tmp_path / "weights", "Qwen2.5-1.5B")
    bf16 = ("--config.model.dtype=bfloat16", "--config.model.param_dtype=bfloat16")
    rate = "--config.optimizer.learning_rate=1e-2"  # of B, whose products with A are then more than bf16's rounding
    after = stepped(weights, tmp_path, *bf16, "--config.lora.rank=16", rate)
    before = Checkpoint(weights)
    for name in ("embed_tokens.weight", "layers.3.input_layernorm.weight", "layers.3.self_attn.q_proj.bias"):
        assert change(before, after, f"model.{name}") == 0
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        assert 0 < change(before, after, f"model.layers.3.{name}.weight") < 0.1
