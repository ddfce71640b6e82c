"""TPU interpret mode for tests of kernels: memory nobody wrote holds NaN, and a race fails the test."""

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture(autouse=True)
def no_races():
    """Imported by a test file, it watches every test there."""
    yield
    races = interpreter.races
    found = races is not None and races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    assert not found
