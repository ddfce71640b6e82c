import json

import pytest

from rl_reason.report.rollouts import RolloutWriter, read_rollouts, rollout_steps


def record(i, **extra):
    return {
        "input": f"{i}+1=",
        "output": f"{i + 1} \u2028 \x85 \x1b[0m\n",
        "gts": i + 1,
        "score": 0.5,
        "group_id": i // 2,
        "sample_id": i % 2,
        "finish_reason": "stop",
        **extra,
    }


def test_records_come_back_as_they_were(tmp_path):
    writer = RolloutWriter(tmp_path / "rollouts")
    records = [record(i, parts={"format": 0.25}, token_ids=[3, 4], logprobs=[-0.5, -0.25]) for i in range(4)]
    path = writer.write(7, records)
    assert path.name == "7.jsonl"
    assert read_rollouts(tmp_path / "rollouts", 7) == [{**r, "step": 7} for r in records]


def test_a_failed_verifier_has_a_null_score(tmp_path):
    path = RolloutWriter(tmp_path).write(1, [record(0, score=float("nan"))])
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["score"] is None


def test_bad_records_are_refused_and_write_nothing(tmp_path):
    writer = RolloutWriter(tmp_path)
    with pytest.raises(ValueError, match=r"Rollout 1 of step 3 lacks \['gts', 'score'\]"):
        writer.write(3, [record(0), {k: v for k, v in record(1).items() if k not in ("gts", "score")}])
    with pytest.raises(ValueError, match="2 tokens, 1 logprobs"):
        writer.write(3, [record(0, token_ids=[1, 2], logprobs=[-1.0])])
    assert rollout_steps(tmp_path) == []


def test_resume_removes_later_steps_and_half_written_files(tmp_path):
    writer = RolloutWriter(tmp_path)
    for step in (2, 10, 9, 30):
        writer.write(step, [record(step)])
    (tmp_path / ".31.jsonl.77.tmp").write_text('{"inp')
    assert rollout_steps(tmp_path) == [2, 9, 10, 30]
    assert writer.truncate(9) == [10, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.jsonl", "9.jsonl"]
    with pytest.raises(FileNotFoundError, match="there are steps 2, 9"):
        read_rollouts(tmp_path, 10)
