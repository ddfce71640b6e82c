"""``transformers`` looks for a package named ``kernels`` (Hugging Face's); ours has that name and must not be taken for it."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.parity
ROOT = pathlib.Path(__file__).parents[2]

# Ours first, and then theirs first: what is in sys.modules must not matter either.
IMPORTS = {
    "ours-first": "import kernels.decode_attention, rl_reason.rollout, transformers",
    "theirs-first": "import transformers, kernels.decode_attention, rl_reason.rollout",
}
CHECK = """
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
config = transformers.Qwen3Config(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=1, head_dim=4, intermediate_size=8)
assert modeling_qwen3.Qwen3ForCausalLM(config) is not None
print(kernels.__path__[0])
"""


@pytest.mark.parametrize("order", IMPORTS)
def test_transformers_imports_beside_our_kernels(order):
    code = IMPORTS[order] + CHECK
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip().splitlines()[-1]).samefile(ROOT / "kernels")
