"""The benchmark of kernels: its cases are right where all implementations agree."""

import json

import numpy as np
import pytest

from kernels import bench


@pytest.mark.parametrize("skew", ["uniform", "one", "half-empty", "dirichlet-0.3"])
def test_group_sizes(skew):
    sizes = bench.group_sizes(1000, 16, skew)
    assert sizes.sum() == 1000 and sizes.dtype == np.int32 and (sizes >= 0).all()
    assert (sizes == 0).sum() >= dict(uniform=0, one=15).get(skew, 8 if skew == "half-empty" else 0)
    np.testing.assert_array_equal(sizes, bench.group_sizes(1000, 16, skew))


def test_the_work_of_a_case_by_hand():
    # 4096 rows of 256 by 16 matrices of 256 x 128, fp32: 2 * 4096 * 256 * 128 operations; 4 (1 M + 0.5 M + 0.5 M) bytes.
    forward, backward = (c for c in bench.cases("cpu") if c.name == "small" and c.op.startswith("grouped_matmul"))
    assert forward.flops == 2 * 4096 * 256 * 128 and backward.flops == 2 * forward.flops
    assert forward.bytes == 4 * (4096 * 256 + 16 * 256 * 128 + 4096 * 128)


def test_a_table_and_its_json(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench.main(["--op", "decode", "--repeats", "1", "--out", str(out)]) == 0
    table, record = capsys.readouterr().out, json.loads(out.read_text())
    of = lambda case: {r["implementation"]: r for r in record["records"] if r["case"] == case}
    found = of("small")
    assert of("small, prompts")["default"]["error"] < 1e-5
    assert found["xla"]["times_first"] == 1.0 and found["packed_xla"]["error"] < 1e-5 and "packed_xla" in table
    assert found["cudnn"]["failed"] == "cuDNN needs a CUDA device"
    assert record["matmul_flops_per_s"] > 1e8 and found["xla"]["seconds"] > 0


def test_no_such_case(capsys):
    assert bench.main(["--case", "nothing"]) == 2
    assert "no case has op None and case 'nothing'" in capsys.readouterr().err
