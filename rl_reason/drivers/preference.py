"""Driving the preference loop: batches of pairs, a reference live or precomputed, accuracy on held-out pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rl_reason import build, processes
from rl_reason.data.pairs import PairBatch, PairData, pairs_stream
from rl_reason.drivers.base import Driver, run_chunk
from rl_reason.loop import preference
from rl_reason.loop.engine import Advanced
from rl_reason.loop.preference import Pairs
from rl_reason.types import TrainState


class Preference(Driver):
    """Chunks of updates on pairs.

    ``pending`` holds the initial policy's log-probabilities of held-out pairs, and of all pairs where they are
    precomputed: on resume there is no initial policy to make them of.
    """

    phase: str = "preference"
    programs: tuple[str, ...] = ("preference_chunk",)

    def __init__(self, experiment: build.Experiment, data: PairData, heldout: PairData | None):
        assert experiment.pairs is not None
        self._experiment, self._data, self._heldout = experiment, data, heldout
        self._settings = experiment.config.preference
        self._batch_rows = build.rows_sharding(experiment.mesh)
        self._own_rows = processes.local_rows(self._batch_rows, self._settings.pairs_per_step)
        setting = experiment.pairs.setting
        self._scorer = preference.make_scorer(experiment.parts, setting)
        chunk = preference.make_counted_chunk(experiment.parts, setting, len(data.pairs))
        self._chunk = jax.jit(chunk, donate_argnums=0)
        self._reference: dict[str, preference.SumsOfSides] = {}
        self._stream = self._new_stream()

    @property
    def pending(self) -> PyTree:
        return processes.global_put(self._reference, self._experiment.mesh, P())

    @pending.setter
    def pending(self, value: PyTree) -> None:
        self._set_reference(processes.to_host(value))

    def _set_reference(self, value: dict[str, preference.SumsOfSides]) -> None:
        """What the stream hands out changes with it, and not where the stream is."""
        self._reference = value
        position = self._stream.get_state()
        self._stream = self._new_stream()
        self._stream.set_state(position)

    def initial_state(self, params: PyTree) -> TrainState:
        sets = {"heldout": self._heldout} if self._heldout is not None else {}
        if self._settings.precompute_reference:
            sets["train"] = self._data
        self._set_reference({name: self._scores(params, data) for name, data in sets.items()})
        state = build.init_state(self._experiment, self._experiment.parts, params)
        if self._settings.precompute_reference or self._experiment.parts.lora is not None:
            return state
        placed = jax.tree.map(lambda x: x.sharding, state.params)
        copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=placed)
        return dataclasses.replace(state, ref_params=copy(params))

    def advance(self, state: TrainState) -> Advanced:
        steps = self._experiment.config.steps_per_call
        out = run_chunk(self._chunk, state, Pairs(*self._drawn(steps)), steps)
        every = self._settings.heldout_every
        if self._heldout is None or not every or int(out.state.step) % every:
            return out
        accuracies = self._accuracies(out.state)
        return out._replace(
            metrics=out.metrics | {name: np.array([np.nan] * (steps - 1) + [x]) for name, x in accuracies.items()}
        )

    def _new_stream(self):
        return pairs_stream(
            dataclasses.replace(self._data, reference=self._reference.get("train")),
            batch_size=self._settings.pairs_per_step,
            seed=self._experiment.config.seed,
            rows=self._own_rows,
        )

    def _scores(self, params: PyTree, data: PairData) -> preference.SumsOfSides:
        """Log-probabilities of a data set's chosen and rejected completions, nats."""
        in_order = data.in_order(self._settings.pairs_per_step, self._own_rows)
        batches = (self._on_devices(batch) for batch in in_order)
        return self._scorer(params, batches, len(data.pairs))

    def _on_devices(self, batch: PairBatch) -> Pairs:
        return Pairs(*processes.to_global(tuple(batch), self._batch_rows))

    def _accuracies(self, state: TrainState) -> dict[str, float]:
        """How often the better completion has the higher implicit reward; and the higher likelihood, now and at first."""
        assert self._heldout is not None
        chosen, rejected = self._scores(state.params, self._heldout)
        ref_chosen, ref_rejected = self._reference["heldout"]
        return {
            "heldout_pairs/accuracy": float(np.mean(chosen - ref_chosen > rejected - ref_rejected)),
            "heldout_pairs/likelihood_accuracy": float(np.mean(chosen > rejected)),
            "heldout_pairs/likelihood_accuracy_before": float(np.mean(ref_chosen > ref_rejected)),
        }
