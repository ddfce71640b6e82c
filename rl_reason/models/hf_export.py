"""Parameters as a folder that transformers, vLLM and we can read: safetensors, index, config.json, and what goes along."""

import dataclasses
import itertools
import math
import pathlib
import shutil
import typing
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import PyTree

from rl_reason import checkpoint, processes
from rl_reason.models import hf_names, lora
from rl_reason.models.hf_config import CONFIG, config_json
from rl_reason.models.hf_files import (
    MAX_SHARD_BYTES,
    PARAMS,
    Checkpoint,
    numpy_dtype,
    split,
    whole_or_absent,
    write_tensors,
)
from rl_reason.models.hf_names import PREFIXES, Plan
from rl_reason.models.hf_weights import OnTensor, check, keys_of
from rl_reason.models.transformer import ModelConfig, param_shapes
from rl_reason.report.files import to_json
from rl_reason.sharding import by_path

# What goes along with weights: tokenizers, chat templates, processors, and code that config.json's auto_map names.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.py"),
    *("chat_template*", "generation_config.json", "*processor*.json"),
)


class Export(typing.NamedTuple):
    """All that will be written, known before any of it is."""

    plan: Plan
    config: dict[str, typing.Any]
    sizes: dict[str, int]  # bytes of each tensor, in the order of writing
    source: Checkpoint | None
    towers: list[str]  # of the source, copied as they are


def write(
    folder: str | pathlib.Path,
    params: PyTree,
    model: ModelConfig,
    *,
    dtype: str,
    like: str | pathlib.Path | None = None,
    extra: Mapping[str, typing.Any] | None = None,
    files: Mapping[str, pathlib.Path | str] | None = None,
    orbax: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: OnTensor = lambda done, total: None,
) -> Export:
    """Writes a checkpoint, whole or not at all; adapters are merged. All processes call it together, and the first writes.

    Args:
        dtype: of the tensors.
        like: the checkpoint that these weights began as; its config.json, tokenizer and towers go along.
        extra: without ``like``, what config.json says that no shape tells, such as eos_token_id.
        files: further files by name: paths to copy, or text.
        orbax: parameters as an Orbax checkpoint in place of safetensors, without towers: of these ``hf_weights.read`` has
            each host read its own share. By one process only.
        on_tensor: hears how many tensors of how many are done.

    Raises:
        WeightsError: something is in the way, ``like`` is of another model, or transformers has none like this one.
    """
    params, model = as_theirs(lora.merged(params), model)
    export = prepare(model, dtype, like, extra or {})
    tensors = _tensors(params, export, dtype, on_tensor)
    if not processes.is_first():
        for _ in tensors:
            pass  # each is gathered by all
        return export
    with whole_or_absent(pathlib.Path(folder)) as unfinished:
        if orbax:
            checkpoint.save_tree(unfinished / PARAMS, jax.tree.map(lambda x: x.astype(dtype), params))
        else:
            write_tensors(unfinished, tensors, split(export.sizes, max_shard_bytes), sum(export.sizes.values()))
        beside = {} if like is None else companions(pathlib.Path(like))
        for name, content in (beside | dict(files or {})).items():
            if isinstance(content, str):
                (unfinished / name).write_text(content)
            else:
                shutil.copyfile(content, unfinished / name)
        # The last of all, because what has none is no checkpoint.
        (unfinished / CONFIG).write_text(to_json(export.config, indent=2) + "\n")
    return export


def companions(folder: pathlib.Path) -> dict[str, pathlib.Path | str]:
    """The files of a checkpoint that go along with its weights, by name."""
    return {path.name: path for pattern in COMPANIONS for path in sorted(folder.glob(pattern))}


def as_theirs(params: PyTree, model: ModelConfig) -> tuple[PyTree, ModelConfig]:
    """The same function in words that transformers has: it scales embeddings in Gemma alone, so elsewhere sqrt(D) goes into
    the table, and a head that was tied to it gets its own."""
    if not model.scale_embeddings or (model.post_norms and not model.rotary_dim):
        return params, model
    head = params["embed"].T if model.tie_embeddings else params["unembed"]
    scaled = params["embed"] * np.asarray(model.hidden_size**0.5, params["embed"].dtype)
    plain = dataclasses.replace(model, scale_embeddings=False, tie_embeddings=False)
    return params | dict(embed=scaled, unembed=head), plain


def prepare(
    model: ModelConfig,
    dtype: str,
    like: str | pathlib.Path | None = None,
    extra: Mapping[str, typing.Any] | None = None,
) -> Export:
    """Everything checked and counted, nothing written."""
    if like is None:
        source, towers, prefix = None, [], PREFIXES[-1]
        config = config_json(keys_of(model), **(extra or {}))
    else:
        source = Checkpoint(like)
        layout = check(source, model)
        towers, prefix, config = layout.towers, layout.prefix, layout.config
    plan = hf_names.plan(param_shapes(model), model, prefix)
    width = numpy_dtype(dtype).itemsize
    sizes = {piece.name: math.prod(piece.shape) * width for _, piece in hf_names.in_order(plan)}
    if source is not None:
        sizes |= {name: source.num_bytes(name) for name in towers}
    return Export(plan, _with_dtype(config, dtype), sizes, source, towers)


def _with_dtype(config: Mapping[str, typing.Any], dtype: str) -> dict[str, typing.Any]:
    """4.5x says torch_dtype, 5.x dtype and reads both; beside towers the language model has its own."""
    said = {"dtype" if "dtype" in config else "torch_dtype": dtype}
    inner = {"text_config": _with_dtype(config["text_config"], dtype)} if "text_config" in config else {}
    return dict(config) | said | inner


def _tensors(params: PyTree, export: Export, dtype: str, on_tensor: OnTensor) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by name in the order of ``export.sizes``; a layer of a parameter is on the host at a time."""
    leaves, count = by_path(params), itertools.count(1)
    parts: list[np.ndarray] = []  # of a tensor that holds several parameters, which follow each other
    of_layer = lambda pair: (pair[0], pair[1].place[:1])
    for (path, layer), pairs in itertools.groupby(hf_names.in_order(export.plan), of_layer):
        whole = processes.to_host(leaves[path][layer] if layer else leaves[path])
        for _, piece in pairs:
            part = piece.tensor.to_theirs(whole[piece.place[1:]]).astype(numpy_dtype(dtype), copy=False)
            which, number = piece.tensor.rows
            assert which == len(parts), "parts out of order"
            parts = [*parts, part]
            if len(parts) == number:
                on_tensor(next(count), len(export.sizes))
                yield piece.name, np.concatenate(parts) if number > 1 else part
                parts = []
    for name in export.towers:
        assert export.source is not None
        on_tensor(next(count), len(export.sizes))
        yield name, export.source.read(name)
