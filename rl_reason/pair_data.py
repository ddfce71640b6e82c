"""The pairs of a preference run: read from files, or made of the responses of the policy and of other small models.

Making them takes longest where models answer and the oracle judges. What comes of that does not depend on the rules that
select, so it is cached, by the hash of everything that made it, and the arms of a comparison share it.
"""

import dataclasses
import io
import pathlib
import time
import typing
import zipfile
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from rl_reason import build, cache, processes, warmup
from rl_reason.data.example import Source, digest, mix, permuted
from rl_reason.data.pairs import LoadedPairs, PairData, Preference
from rl_reason.data.preferences import PairSet, Response, annotate, make_pairs
from rl_reason.data.stream import prompt_stream, prompt_tokens
from rl_reason.evaluate import calls_of
from rl_reason.loop.pair_parts import POLICY, PairParts, response_columns
from rl_reason.methods import air
from rl_reason.report.console import Display
from rl_reason.report.files import to_json, write_atomic
from rl_reason.rollout import generate

RESPONSES, JUDGE, SELECT = 0x1A, 0x2A, 0x3A  # what the root key is folded with, by purpose
SPLITS = ("train", "heldout")
MADE_BY = ("rollout.py", "sampling.py", "pair_data.py")  # beside what makes warm-ups
# Any two held-out responses that the oracle does not rank equal: the same measure for every rule that selects.
HELD_OUT: dict[str, typing.Any] = dict(min_margin=1.0, max_margin=9.0, min_chosen_score=1.0, mix_policies=False)

# Compiled once for models of one shape.
_generate = jax.jit(generate, static_argnums=(4, 5))

Warm = Callable[[build.Experiment, str], PyTree]  # the warmed-up parameters of a model, by its name


class PairError(ValueError):
    """No pairs, or not those that the run began with; the message says what to change."""


class Judged(typing.NamedTuple):
    """Responses to B prompts, R each; NaN where there is no score or no quality."""

    tokens: Int[np.ndarray, "B R C"]  # from column 0
    length: Int[np.ndarray, "B R"]  # tokens
    quality: Float[np.ndarray, "B R"]
    score: Float[np.ndarray, "B R"]


@dataclasses.dataclass(frozen=True)
class RunPairs:
    """What a run learns from and is measured on, and how it came about."""

    train: PairData
    heldout: PairData | None
    statistics: dict[str, float]
    records: list[dict[str, typing.Any]]  # the training pairs for people to read
    fingerprint: str  # of the token ids


def make(
    experiment: build.Experiment, display: Display, warm: Warm, check: Callable[[str], None] = lambda where: None
) -> RunPairs:
    """The pairs that ``config.preference`` describes; ``check`` hears where it is, and may raise.

    Raises:
        PairError: no pairs, or fewer than ``config.preference.num_pairs``.
    """
    assert experiment.pairs is not None
    try:
        if experiment.pairs.train_files is not None:
            return _from_files(experiment, experiment.pairs, experiment.pairs.train_files)
        return _from_responses(experiment, experiment.pairs, _Judging(experiment, display, warm, check))
    except PairError:
        raise
    except ValueError as error:
        raise PairError(
            f"no pairs to train on: {error} The rules are config.preference.instructions and pairs, the supply is "
            "num_prompts, num_samples and models."
        ) from error


def write(path: pathlib.Path, made: RunPairs) -> None:
    """pairs.json, and pairs.jsonl with the texts of each pair, into a run's directory.

    Raises:
        PairError: when the directory is of a run that had other pairs.
    """
    file = path / "pairs.json"
    if file.exists() and f'"{made.fingerprint}"' not in file.read_text(encoding="utf-8"):
        raise PairError(
            f"{file} has another fingerprint than {made.fingerprint}: the files of pairs or the code that makes them have "
            "changed since the run began. Restore them, or start another run."
        )
    write_atomic(path / "pairs.jsonl", "".join(to_json(record) + "\n" for record in made.records))
    write_atomic(file, to_json({"fingerprint": made.fingerprint, **made.statistics}, indent=2) + "\n")


def fingerprint(experiment: build.Experiment, split: str) -> str:
    """A name for the judged responses of a split: everybody's weights, prompts, sampling, judge and code."""
    config = experiment.config
    p = config.preference.to_dict()
    keys = ("num_samples", "num_other_samples", "prompts_per_call", "judge", f"num_{_PREFIX[split]}prompts")
    parts: dict[str, typing.Any] = {key: p[key] for key in keys}
    parts |= dict(rollout=config.rollout.to_dict(), seed=config.seed, split=split)
    parts |= {f"model {name}": warmup.fingerprint(author) for name, author in _authors(experiment).items()}
    return cache.fingerprint(parts | {"source": _source(experiment, split).fingerprint}, MADE_BY)


_PREFIX = {"train": "", "heldout": "heldout_"}


def _authors(experiment: build.Experiment) -> dict[str, build.Experiment]:
    return {POLICY: experiment, **experiment.others}


def _source(experiment: build.Experiment, split: str) -> Source:
    """An endless supply of the split's prompts, whatever RL may be bounded to."""
    return build.make_source_of(experiment.config, experiment.tokenizer, split)


class _Judging:
    """Judged responses of a split, from the cache or made."""

    def __init__(self, experiment: build.Experiment, display: Display, warm: Warm, check: Callable[[str], None]):
        self._experiment, self._display, self._check, self._warm = experiment, display, check, warm
        self._params: dict[str, PyTree] = {}

    def __call__(self, split: str) -> Judged:
        place = cache.cache_root() / "responses" / f"{fingerprint(self._experiment, split)}.npz"
        found = _read(place)
        if not processes.any_process(found is None):
            assert found is not None
            self._display.info(f"judged responses to {split} prompts read from the cache")
            return found
        for name, author in _authors(self._experiment).items():
            if name not in self._params:
                self._params[name] = self._warm(author, name)
        made = self._made(split)
        if processes.is_first():
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **made._asdict())
            write_atomic(place, buffer.getvalue())
        return made

    def _made(self, split: str) -> Judged:
        experiment, p = self._experiment, self._experiment.config.preference
        source, count = _source(experiment, split), p[f"num_{_PREFIX[split]}prompts"]
        authors = _authors(experiment)
        root = jax.random.fold_in(jax.random.key(experiment.config.seed), SPLITS.index(split))
        with self._display.phase(f"answer {split} prompts", count * len(authors), unit="prompt") as phase:

            def on_prompts(done: int) -> None:
                phase.update(phase.done + done)
                self._check(f"while models answered {split} prompts")

            columns = []
            for number, (name, author) in enumerate(authors.items()):
                key = jax.random.fold_in(jax.random.fold_in(root, RESPONSES), number)
                samples = p.num_samples if name == POLICY else p.num_other_samples
                columns.append(
                    _answers(experiment, author, self._params[name], source, count, samples, key, on_prompts)
                )
        tokens, length = (np.concatenate(x, axis=1) for x in zip(*columns, strict=True))
        blank = np.full(length.shape, np.nan, np.float32)
        responses = _responses(experiment, Judged(tokens, length, blank, blank))
        examples = [source.example(uid) for uid in range(count)]
        with self._display.phase(f"judge {split} responses"):
            judged = annotate(responses, examples, jax.random.fold_in(root, JUDGE), **p.judge)
        number = lambda x: np.nan if x is None else x
        table = lambda field: np.array([[number(getattr(r, field)) for r in row] for row in judged], np.float32)
        return Judged(tokens, length, table("quality"), table("score"))


def _read(place: pathlib.Path) -> Judged | None:
    """A cache entry; None where there is none, or a damaged one, which is made again."""
    try:
        with np.load(io.BytesIO(place.read_bytes())) as file:
            return Judged(**{name: file[name] for name in Judged._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _answers(
    experiment: build.Experiment,
    author: build.Experiment,
    params: PyTree,
    source: Source,
    num_prompts: int,
    num_samples: int,
    key: jax.Array,
    on_prompts: Callable[[int], None],
) -> tuple[Int[np.ndarray, "B S C"], Int[np.ndarray, "B S"]]:
    """One model's responses to the first prompts of a source: (tokens, lengths), sampled as in a rollout."""
    config, mesh, tokenizer = experiment.config, experiment.mesh, experiment.tokenizer
    per_call = config.preference.prompts_per_call
    calls, batch, slots = calls_of(num_prompts, per_call, num_samples, config.rollout.num_slots, mesh)
    rollout = build.rollout_config(config, tokenizer, mesh, num_samples, slots)
    rows = build.rows_sharding(mesh)
    stream = prompt_stream(
        source,
        tokenizer,
        batch_size=batch,
        prompt_len=config.data.max_prompt_len_tokens,
        rows=processes.local_rows(rows, batch),
    )
    tokens = np.full((calls * batch * num_samples, rollout.completion_len), tokenizer.pad_id, np.int32)
    length = np.zeros(len(tokens), np.int32)
    for call in range(calls):
        prompts = processes.to_global(next(stream), rows)
        out, _ = _generate(params, prompts, key, experiment.sampling, author.parts.model, rollout)
        drawn, mask = processes.to_host((out.tokens, out.completion_mask))
        for row, (ids, own) in enumerate(zip(drawn, mask, strict=True), start=call * batch * num_samples):
            length[row] = own.sum()
            tokens[row, : length[row]] = ids[own]
        on_prompts(min(batch, num_prompts - call * batch))
    keep = slice(num_prompts)
    by_prompt = lambda x: x.reshape(calls * batch, num_samples, *x.shape[1:])[keep]
    return by_prompt(tokens), by_prompt(length)


def _responses(experiment: build.Experiment, judged: Judged) -> list[list[Response]]:
    columns = response_columns(experiment.config, list(experiment.others))
    known = lambda x: None if np.isnan(x) else x

    def response(prompt: int, column: int) -> Response:
        ids = judged.tokens[prompt, column, : judged.length[prompt, column]].tolist()
        score, quality = known(judged.score[prompt, column]), known(judged.quality[prompt, column])
        return Response(
            text=experiment.tokenizer.decode(ids),
            tokens=tuple(ids),
            model=columns[column],
            on_policy=columns[column] == POLICY,
            score=None if score is None else float(score),
            quality=None if quality is None else int(quality),
        )

    return [[response(prompt, column) for column in range(len(columns))] for prompt in range(len(judged.tokens))]


def _from_responses(experiment: build.Experiment, parts: PairParts, judging: _Judging) -> RunPairs:
    began = time.perf_counter()
    p = experiment.config.preference
    key = jax.random.fold_in(jax.random.key(experiment.config.seed), SELECT)
    source = _source(experiment, "train")
    responses = _responses(experiment, judging("train"))
    chosen = make_pairs(
        _prompts(experiment, source, len(responses)),
        responses,
        key,
        keep_instructions=parts.keep_instructions,
        pick_pairs=parts.pick_pairs,
        num_pairs=p.num_pairs or None,
    )
    heldout = None
    if p.num_heldout_prompts:
        judged = judging("heldout")
        held = _responses(experiment, judged._replace(score=judged.quality))
        prompts = _prompts(experiment, _source(experiment, "heldout"), len(held))
        pick = lambda *offered: air.pick(*offered, **HELD_OUT)
        heldout = make_pairs(prompts, held, key, keep_instructions=None, pick_pairs=pick, num_pairs=None).pairs
    statistics = chosen.statistics | _by_author(responses)
    statistics |= {"pairs/heldout": float(len(heldout or ())), "pairs/seconds": time.perf_counter() - began}
    return _run_pairs(experiment, chosen.pairs, heldout, statistics, _records(experiment, source, responses, chosen))


def _prompts(experiment: build.Experiment, source: Source, count: int) -> list[Int[np.ndarray, " _"]]:
    width = experiment.config.data.max_prompt_len_tokens
    return [
        np.array(prompt_tokens(experiment.tokenizer, source.example(uid), width), np.int32) for uid in range(count)
    ]


def _by_author(responses: Sequence[Sequence[Response]]) -> dict[str, float]:
    """The mean of the oracle's qualities, by model."""
    known: dict[str, list[int]] = {}
    for response in (r for row in responses for r in row):
        known.setdefault(response.model, []).extend([] if response.quality is None else [response.quality])
    return {f"pairs/quality/{name}": float(np.mean(values)) if values else 0.0 for name, values in known.items()}


def _records(
    experiment: build.Experiment, source: Source, responses: Sequence[Sequence[Response]], chosen: PairSet
) -> list[dict[str, typing.Any]]:
    records = []
    for prompt, better, worse in zip(chosen.prompt, chosen.chosen, chosen.rejected, strict=True):
        record: dict[str, typing.Any] = {"prompt": source.example(int(prompt)).prompt}
        for side, column in (("chosen", better), ("rejected", worse)):
            r = responses[prompt][column]
            record |= {side: r.text, f"{side}_score": r.score, f"{side}_quality": r.quality, f"{side}_model": r.model}
        records.append(record)
    return records


def _from_files(experiment: build.Experiment, parts: PairParts, loaded: LoadedPairs) -> RunPairs:
    """All pairs of the files, or as many as asked for."""
    pairs, wanted = loaded.pairs, experiment.config.preference.num_pairs
    if wanted:
        key = mix(experiment.config.seed, SELECT)
        pairs = [pairs[permuted(i, len(pairs), key)] for i in range(wanted)]
    heldout = None if parts.heldout_files is None else parts.heldout_files.pairs
    counts = dataclasses.asdict(loaded.report)
    counts.pop("first_bad")
    statistics = {f"pairs/files/{name}": float(count) for name, count in counts.items()} | {
        "pairs/num": float(len(pairs)),
        "pairs/heldout": float(len(heldout or ())),
        "pairs/chosen_len_tokens": float(np.mean([len(x.chosen) for x in pairs])),
        "pairs/rejected_len_tokens": float(np.mean([len(x.rejected) for x in pairs])),
    }
    decode = experiment.tokenizer.decode
    records = [{name: decode(ids.tolist()) for name, ids in pair._asdict().items()} for pair in pairs]
    return _run_pairs(experiment, pairs, heldout, statistics, records)


def _run_pairs(
    experiment: build.Experiment,
    pairs: list[Preference],
    heldout: list[Preference] | None,
    statistics: dict[str, float],
    records: list[dict[str, typing.Any]],
) -> RunPairs:
    config = experiment.config
    widths = dict(prompt_len=config.data.max_prompt_len_tokens, completion_len=config.rollout.completion_len)
    data = lambda pairs: PairData(pairs, pad_id=experiment.tokenizer.pad_id, **widths)
    ids = [[x.tolist() for x in pair] for pair in (*pairs, *(heldout or ()))]
    return RunPairs(data(pairs), data(heldout) if heldout else None, statistics, records, digest("pairs", ids))
