"""What several end-to-end tests train on."""

import pytest

from tests.e2e import harness


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """The flag for 16 rows whose verdicts hang on the completion alone."""
    return harness.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ["1"] * 16)
