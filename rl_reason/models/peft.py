"""Adapters without their base, as PEFT and vLLM read them: adapter_config.json and adapter_model.safetensors.

Where a checkpoint has several of our kernels in one tensor, one above the other, their adapters become one of the summed
rank: A's are stacked, and B's stand on a diagonal.
"""

import pathlib
import typing
from collections.abc import Sequence

import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file

from rl_reason import processes
from rl_reason.models import hf_names
from rl_reason.models.hf_files import whole_or_absent
from rl_reason.models.lora import LEAVES
from rl_reason.models.transformer import ModelConfig
from rl_reason.report.files import to_json
from rl_reason.sharding import by_path

PREFIX = "base_model.model.model.layers"


class Adapter(typing.NamedTuple):
    """Of one kernel in all layers, as torch has linear maps: [L r in], [L out r]; and its place among its tensor's."""

    a: np.ndarray
    b: np.ndarray
    rows: tuple[int, int]


def write(folder: str | pathlib.Path, params: PyTree, model: ModelConfig, base: str) -> None:
    """Writes the adapters of ``params``; ``base`` names the checkpoint that they adapt. All processes call it together.

    Raises:
        ValueError: parameters without adapters.
        WeightsError: something is in the way.
    """
    flat = by_path(params["layers"])
    adapted = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not adapted:
        raise ValueError("There are no adapters among these parameters: export them as a checkpoint.")
    of_layer, of_module, rank, alpha = hf_names.of_layer(model), {}, 0, 0.0
    for path in adapted:
        tensor = of_layer[f"{path}/kernel"]
        a, b, scale = (np.asarray(processes.to_host(flat[f"{path}/{leaf}"])) for leaf in LEAVES)
        rank, alpha = a.shape[-1], float(scale[0] * a.shape[-1])
        a = a.reshape(len(a), -1, rank).swapaxes(1, 2)
        b = tensor.channels_to_theirs(b).reshape(len(b), rank, -1).swapaxes(1, 2)
        of_module.setdefault(tensor.name.removesuffix(".weight"), []).append(Adapter(a, b, tensor.rows))
    tensors, times = {}, {}
    for name, adapters in of_module.items():
        a, b = _joined(adapters)
        times[name.rpartition(".")[2]] = len(adapters)
        for i in range(len(a)):
            tensors[f"{PREFIX}.{i}.{name}.lora_A.weight"] = np.ascontiguousarray(a[i])
            tensors[f"{PREFIX}.{i}.{name}.lora_B.weight"] = np.ascontiguousarray(b[i])
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=rank, lora_alpha=alpha)
    config |= dict(target_modules=sorted(times), lora_dropout=0.0, bias="none", inference_mode=True)
    if several := {module: count for module, count in times.items() if count > 1}:  # alpha / r is the same everywhere
        config |= dict(rank_pattern={module: count * rank for module, count in several.items()})
        config |= dict(alpha_pattern={module: count * alpha for module, count in several.items()})
    if not processes.is_first():
        return
    with whole_or_absent(pathlib.Path(folder)) as unfinished:
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_text(to_json(config, indent=2) + "\n")


def _joined(adapters: Sequence[Adapter]) -> tuple[np.ndarray, np.ndarray]:
    """A [L R in] and B [L out R] of a whole tensor; rows of kernels without adapters get 0."""
    a = np.concatenate([adapter.a for adapter in adapters], axis=1)
    blocks = []
    for adapter in adapters:
        layers, rows, rank = adapter.b.shape
        which, count = adapter.rows
        block = np.zeros((layers, count * rows, rank), adapter.b.dtype)
        block[:, which * rows : (which + 1) * rows] = adapter.b
        blocks.append(block)
    return a, np.concatenate(blocks, axis=2)
