"""Adapters without their base, as PEFT and vLLM read them: adapter_config.json and adapter_model.safetensors."""

import pathlib

import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file

from rl_reason import processes
from rl_reason.models.hf_files import whole_or_absent
from rl_reason.models.hf_names import LAYER
from rl_reason.models.lora import LEAVES
from rl_reason.report.files import to_json
from rl_reason.sharding import by_path

PREFIX = "base_model.model.model.layers"


def write(folder: str | pathlib.Path, params: PyTree, base: str) -> None:
    """Writes the adapters of ``params``; ``base`` names the checkpoint that they adapt. All processes call it together.

    Raises:
        ValueError: parameters without adapters.
        WeightsError: something is in the way.
    """
    flat = by_path(params["layers"])
    adapted = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not adapted:
        raise ValueError("There are no adapters among these parameters: export them as a checkpoint.")
    tensors, modules, rank, alpha = {}, set(), 0, 0.0
    for path in adapted:
        name = LAYER[f"{path}/kernel"].name.removesuffix(".weight")
        modules.add(name.rpartition(".")[2])
        a, b, scale = (np.asarray(processes.to_host(flat[f"{path}/{leaf}"])) for leaf in LEAVES)
        rank, alpha = a.shape[-1], float(scale[0] * a.shape[-1])
        for i in range(len(a)):  # torch keeps linear maps as [out, in]
            tensors[f"{PREFIX}.{i}.{name}.lora_A.weight"] = np.ascontiguousarray(a[i].reshape(-1, rank).T)
            tensors[f"{PREFIX}.{i}.{name}.lora_B.weight"] = np.ascontiguousarray(b[i].reshape(rank, -1).T)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=rank, lora_alpha=alpha)
    config |= dict(target_modules=sorted(modules), lora_dropout=0.0, bias="none", inference_mode=True)
    if not processes.is_first():
        return
    with whole_or_absent(pathlib.Path(folder)) as unfinished:
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        (unfinished / "adapter_config.json").write_text(to_json(config, indent=2) + "\n")
