"""Where adapters learn: the parameters that they leave alone, kept once a run, beside its steps.

They are arrays of the run's own, or, where it began with a checkpoint as it came, that checkpoint's folder by name and what
tells its files from others.
"""

import json
import pathlib
from collections.abc import Mapping

import jax
from jaxtyping import PyTree

from rl_reason import processes
from rl_reason.checkpoint import CheckpointError, restore_part, save_tree
from rl_reason.models import hf_files, hf_weights
from rl_reason.models.transformer import ModelConfig
from rl_reason.report.files import to_json, write_atomic

ARRAYS, NOTE = "base", "base.json"


def keep(directory: pathlib.Path, params: PyTree, folders: Mapping[str, str]) -> None:
    """Parameters of a run's policy, or of a cohort by policy. ``folders``: by policy ("" for the only one) the checkpoint
    that its parameters are, unchanged; where one has none ("") all are saved as arrays."""
    if not all(folders.values()):
        save_tree(directory / ARRAYS, params)
    elif processes.is_first():
        noted = {name: dict(weights=folder, digest=hf_files.digest(folder)) for name, folder in folders.items()}
        write_atomic(directory / NOTE, to_json(noted, indent=2) + "\n")


def read(directory: pathlib.Path, policy: str, model: ModelConfig, like: PyTree) -> PyTree:
    """What ``keep`` kept of a policy, in the shapes, dtypes and shardings of ``like``.

    Raises:
        CheckpointError: it is not there, or is of another model.
        WeightsError: the checkpoint that it was cannot be read.
    """
    if (directory / NOTE).is_file():
        folder = _noted(directory / NOTE, policy)
        return hf_weights.read(folder, model, jax.tree.map(lambda x: x.sharding, like)).params
    if not (directory / ARRAYS).is_dir():
        raise CheckpointError(
            f"{directory / ARRAYS} is missing: adapters mean nothing without it. Put it back, or start again."
        )
    return restore_part(directory / ARRAYS, like, (jax.tree_util.DictKey(policy),) if policy else ())


def _noted(file: pathlib.Path, policy: str) -> str:
    """The folder of a policy's checkpoint, if it is still that."""
    own = json.loads(file.read_text(encoding="utf-8"))[policy]
    folder = own["weights"]
    if not pathlib.Path(folder).is_dir():
        raise CheckpointError(
            f"{folder} is gone, and this run's adapters mean nothing without that checkpoint. Put it back, or write into "
            f"{file} where it is now."
        )
    if hf_files.digest(folder) != own["digest"]:
        raise CheckpointError(
            f"{folder} has other tensors than when this run began, and its adapters mean nothing beside those. Put back "
            f"the checkpoint that it was, or write into {file} where that is now."
        )
    return folder
