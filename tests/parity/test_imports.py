"""``transformers`` uses a package named ``kernels`` where there is one (Hugging Face's); ours must not be taken for it."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.parity
ROOT = pathlib.Path(__file__).parents[2]

# Either order: what already lies in sys.modules must not matter.
IMPORTS = {
    "ours-first": "import kernels.decode_attention, rl_reason.rollout, transformers",
    "theirs-first": "import transformers, kernels.decode_attention, rl_reason.rollout",
}
CHECK = """
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils import import_utils
taken = getattr(import_utils, "is_kernels_available", lambda: False)()
print(taken, kernels.__path__[0])
"""


@pytest.mark.parametrize("order", IMPORTS)
def test_transformers_imports_beside_our_kernels(order):
    # They go by its version, and ours has none; installed, it has rl_reason's, which must stay out of their range.
    code = IMPORTS[order] + CHECK
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    taken, path = done.stdout.strip().splitlines()[-1].split(maxsplit=1)
    assert taken == "False"
    assert pathlib.Path(path).samefile(ROOT / "kernels")
