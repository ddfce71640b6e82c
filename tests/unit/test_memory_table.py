"""docs/memory.md has the numbers that shapes give; python tests/unit/test_memory_table.py prints its table."""

import dataclasses
import math
import pathlib

import jax
import numpy as np

from configs.models import MODELS
from rl_reason import build, learning
from rl_reason.loop.partition import split
from rl_reason.loop.parts import Parts
from rl_reason.models import lora, transformer
from rl_reason.models.lora import Lora
from tests.support import load_config, tiny_parts

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "memory.md"
NAME = "Qwen2.5-7B"
GIB = 2**30
RANK_16 = Lora(rank=16, alpha=32.0, targets=("attention", "mlp"), merge_to_sample=True)
# What is stored in which type, of first moments, and adapters.
WAYS = {
    "fp32": ("float32", None, None),
    "bf16, fp32 masters": ("bfloat16", None, None),
    "bf16, fp32 masters, `mu_dtype` bf16": ("bfloat16", "bfloat16", None),
    "bf16 base, adapters of rank 16": ("bfloat16", None, RANK_16),
}
PROMPTS, PROMPT_LEN, SLOTS, COMPLETION_LEN = 64, 1024, 128, 1024


def gib(tree) -> float:
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)) / GIB


def parts_of(way: str, tiny: Parts) -> Parts:
    param_dtype, mu_dtype, adapters = WAYS[way]
    keys = dict(MODELS[NAME]) | dict(dtype="bfloat16", param_dtype=param_dtype)
    o = load_config("base").optimizer.to_dict() | dict(mu_dtype=mu_dtype)
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, **keys),
        optimizer=learning.adamw(o, lambda _: 1e-6),
        lora=adapters,
        frozen=() if adapters is None else lora.FROZEN,
    )


def measured(parts: Parts) -> dict[str, float]:
    """GiB of each part. The decoder's weights are unstacked layers, and what else is cast (``scan_decode`` False)."""
    params = transformer.param_shapes(parts.model)
    state = jax.eval_shape(lambda params: build.new_state(parts, params, 0), params)
    copied = params if parts.model.param_dtype == "float32" else params["layers"]
    learned = split(state.params, parts.frozen)[0]
    m = parts.model
    a_token = 2 * m.num_layers * m.num_kv_heads * m.head_dim * 2  # keys and values in bf16
    return dict(
        parameters=gib(state.params),
        optimizer=gib(state.opt_state),
        reference=0.0 if parts.lora else gib(params),
        gradients=gib(learned),
        decoder=gib(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), copied)),
        cache=(PROMPTS * PROMPT_LEN + SLOTS * COMPLETION_LEN) * a_token / GIB,
    )


def table() -> str:
    lines = [
        "| | parameters | optimizer | gradients | decoder's weights | caches | rollout | update | reference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tiny = tiny_parts("base")
    for way in WAYS:
        m = measured(parts_of(way, tiny))
        stays = m["parameters"] + m["optimizer"]
        rollout, update = stays + m["decoder"] + m["cache"], stays + m["gradients"]
        numbers = (m["parameters"], m["optimizer"], m["gradients"], m["decoder"], m["cache"], rollout, update)
        cells = [f"{x:.1f}" for x in (*numbers, m["reference"])]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_has_what_shapes_give():
    assert table() in PAGE.read_text(), f"docs/memory.md: make its table\n{table()}"


if __name__ == "__main__":
    print(table())
