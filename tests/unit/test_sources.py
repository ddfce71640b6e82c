"""Sources: examples are a pure function of their number, and users' rows are read, split and refused as documented."""

import collections
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rl_reason.data.example import permuted
from rl_reason.data.rows import open_rows
from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.data.sources import make_source
from rl_reason.tasks.base import split_of

FIXTURES = pathlib.Path(__file__).parents[1] / "data"
SCORE = "fake_verifiers:exact"


def verl_row(i: int, **changes) -> dict:
    return {
        "data_source": "sums" if i % 2 else "gaps",
        "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{i}+1="}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"index": i},
    } | changes


def write_jsonl(path: pathlib.Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_parquet(path: pathlib.Path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def all_of(source):
    return [source.example(uid) for uid in range(source.num_examples)]


def prompts_of(source) -> list[str]:
    return [example.prompt for example in all_of(source)]


def one(tmp_path, row, **options):
    """The single example of a file with this row, whatever its split."""
    source = make_source(
        files=[write_jsonl(tmp_path / "one.jsonl", [row])], seed=0, **{"verifier": SCORE} | options,
        split="heldout", heldout_files=[write_jsonl(tmp_path / "two.jsonl", [row])],
    )  # fmt: skip
    return source.example(0)


# Tasks


def test_a_task_source_is_a_pure_function_of_the_draw():
    make = lambda **changes: make_source(**dict(tasks=["sort", "add"], seed=3) | changes)
    source, again = make(), make()
    assert [source.example(uid) for uid in (0, 5, 10**9)] == [again.example(uid) for uid in (0, 5, 10**9)]
    assert source.num_examples is None and source.names == ("sort", "add") == source.verifiers
    assert source.fingerprint == again.fingerprint
    for changes in ({"seed": 4}, {"split": "heldout"}, {"weights": [1, 2]}, {"levels": [[1], [2]]}):
        other = make(**changes)
        assert other.fingerprint != source.fingerprint
        assert [other.example(uid).prompt for uid in range(8)] != [source.example(uid).prompt for uid in range(8)]


def test_task_examples_solve_themselves():
    source = make_source(tasks=["sort", "add"], seed=0)
    for example in (source.example(uid) for uid in range(20)):
        assert example.demonstration.endswith(example.reference)
        assert example.source == example.verifier == source.names[example.route] == example.problem.task
        assert 0 <= example.example_id < 2**31


def test_tasks_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text("from rl_reason.tasks import get\nmine = get('add')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = make_source(tasks=["my_tasks:mine", "sort"], seed=0)
    assert source.names == ("add", "sort") and source.verifiers == ("my_tasks:mine", "sort")


def test_weights_and_levels_are_honoured():
    source = make_source(tasks=["sort", "add"], seed=0, weights=[3, 1], levels=[[2, 3], [1]])
    drawn = collections.Counter((e.source, e.problem.level) for e in (source.example(uid) for uid in range(1000)))
    assert set(drawn) == {("sort", 2), ("sort", 3), ("add", 1)}
    assert abs(drawn["add", 1] - 250) < 60 and abs(drawn["sort", 2] - 375) < 70
    never = make_source(tasks=["sort", "add"], seed=0, weights=[0, 1])
    assert {never.example(uid).source for uid in range(50)} == {"add"}


def test_train_and_heldout_tasks_share_no_problem():
    drawn = {
        split: {
            e.problem.content_hash() for e in map(make_source(tasks=["add"], seed=0, split=split).example, range(300))
        }
        for split in ("train", "heldout")
    }
    assert drawn["train"] and drawn["heldout"] and not drawn["train"] & drawn["heldout"]
    assert split_of(make_source(tasks=["add"], seed=9, split="heldout").example(4).problem) == "heldout"


def test_no_levels_are_all_levels():
    every, none = (make_source(seed=0, tasks=["add"], levels=levels) for levels in (None, ()))
    assert every.fingerprint == none.fingerprint
    assert {none.example(uid).problem.level for uid in range(100)} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither data.tasks nor data.files is set"),
        ({"tasks": ["add"], "files": ["x.jsonl"]}, "both set"),
        ({"tasks": ["ad"]}, "data.tasks: no task 'ad'; did you mean"),
        ({"tasks": ["nowhere:task"]}, "No module named 'nowhere'"),
        ({"tasks": ["json:dumps"]}, "lacks name, levels"),
        ({"tasks": ["add", "add"]}, "names a task twice"),
        ({"tasks": ["add"], "levels": [[99]]}, r"data.levels for add: \[99\]; it has \["),
        ({"tasks": ["add"], "levels": [[1], [1]]}, "2 entries for 1 tasks.*or \\(\\) for all levels"),
        ({"tasks": ["add"], "weights": [-1]}, "finite weights"),
        ({"tasks": ["add"], "split": "test"}, "use one of train, heldout"),
        ({"tasks": ["add"], "verifier": SCORE}, "data.verifier goes with data.files"),
        ({"files": ["x.jsonl"]}, "data.files needs data.verifier"),
        ({"files": "x.jsonl", "verifier": SCORE}, "make it a list of paths"),
        ({"files": ["x.jsonl"], "verifier": SCORE}, "no file 'x.jsonl'"),
        ({"files": ["x.csv"], "verifier": SCORE}, "no file 'x.csv'"),
        ({"files": [__file__], "verifier": SCORE}, "use .jsonl"),
        ({"files": ["tfds:gsm8k"], "verifier": SCORE}, "tfds:<name or directory>:<split>"),
        ({"files": [__file__], "verifier": SCORE, "levels": [[1]]}, "go with data.tasks"),
        ({"files": [__file__], "verifier": SCORE, "on_bad_row": "ignore"}, "refuse, skip"),
        ({"files": [__file__], "verifier": SCORE, "chat": "fancy"}, "data.chat='fancy'"),
    ],
)
def test_make_source_names_the_cure(options, message):
    with pytest.raises(ValueError, match=message):
        make_source(seed=0, **options)


# Rows


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_verl_rows(tmp_path, write):
    suffix = "jsonl" if write is write_jsonl else "parquet"
    path = write(tmp_path / f"rows.{suffix}", [verl_row(i) for i in range(50)])
    source, heldout = (
        make_source(files=[path], seed=1, split=split, verifier=SCORE) for split in ("train", "heldout")
    )
    assert source.names == heldout.names == ("gaps", "sums")
    examples = sorted(all_of(source) + all_of(heldout), key=lambda e: e.example_id)
    assert [e.example_id for e in examples] == list(range(50))
    example = examples[7]
    assert (example.prompt, example.reference, example.verifier) == ("Add.\n\n7+1=", "8", SCORE)
    assert (example.source, example.route, example.demonstration) == ("sums", 1, None)
    assert example.problem.data == {"ground_truth": "8", "extra_info": {"index": 7}}


def test_jsonl_and_parquet_say_the_same(tmp_path):
    rows = [verl_row(i) for i in range(40)]
    sources = [
        make_source(files=[path], seed=1, verifier=SCORE)
        for path in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows))
    ]
    assert all_of(sources[0]) == all_of(sources[1])
    assert sources[0].fingerprint == sources[1].fingerprint


def test_each_epoch_is_its_own_shuffle(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [verl_row(i) for i in range(64)])
    source = make_source(files=[path], seed=1, verifier=SCORE)
    n = source.num_examples
    epochs = [[source.example(epoch * n + i).example_id for i in range(n)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1 and len(set(epochs[0])) == n
    other_seed = make_source(files=[path], seed=2, verifier=SCORE)
    assert [e.example_id for e in all_of(other_seed)] != epochs[0]
    in_order = make_source(files=[path], seed=1, verifier=SCORE, shuffle=False)
    assert [in_order.example(i).example_id for i in range(2 * n)] == sorted(epochs[0]) * 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_permuted_is_a_permutation(size):
    assert sorted(permuted(i, size, 11) for i in range(size)) == list(range(size))


def test_permuted_mixes():
    places = np.array([[permuted(i, 6, key) for i in range(6)] for key in range(1200)])
    counts = np.array([np.bincount(places[:, i], minlength=6) for i in range(6)])
    assert np.abs(counts - 200).max() < 70  # 5 standard deviations of a fair shuffle


def test_splits_by_content_are_disjoint_whatever_is_repeated(tmp_path):
    rows = [verl_row(i % 60, extra_info={"index": i}) for i in range(180)]
    rows += [verl_row(i, prompt=f" Add.\n{i}+1= ") for i in range(60)]  # the same but for spaces
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, heldout = (
        {" ".join(p.split()) for p in prompts_of(make_source(files=[path], seed=0, split=split, verifier=SCORE))}
        for split in ("train", "heldout")
    )
    assert len(train) + len(heldout) == 60 and not train & heldout and 1 <= len(heldout) <= 20


def test_rows_may_name_their_split_and_heldout_wins(tmp_path):
    rows = [verl_row(i, extra_info={"split": "train" if i < 30 else "test"}) for i in range(40)]
    rows.append(verl_row(35, extra_info={"split": "train"}))
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train = make_source(files=[path], seed=0, verifier=SCORE)
    heldout = make_source(files=[path], seed=0, verifier=SCORE, split="heldout")
    assert sorted(e.example_id for e in all_of(train)) == list(range(30))
    assert sorted(e.example_id for e in all_of(heldout)) == list(range(30, 40))
    assert (train.report.also_heldout, train.report.other_split) == (1, 10)
    assert (heldout.report.also_heldout, heldout.report.other_split) == (0, 31)
    by_content = make_source(files=[path], seed=0, verifier=SCORE, split_key=None)
    assert sorted(e.example_id for e in all_of(by_content)) != list(range(30))


def test_heldout_files_are_kept_out_of_train(tmp_path):
    files = [write_jsonl(tmp_path / "a.jsonl", [verl_row(i) for i in range(20)])]
    heldout_files = [write_jsonl(tmp_path / "b.jsonl", [verl_row(i) for i in range(15, 25)])]
    make = lambda split: make_source(files=files, heldout_files=heldout_files, seed=0, verifier=SCORE, split=split)
    assert sorted(e.example_id for e in all_of(make("train"))) == list(range(15))
    assert sorted(e.example_id for e in all_of(make("heldout"))) == list(range(20, 30))
    assert make("train").report.also_heldout == 5


def test_no_rows_left_says_why(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [verl_row(i, extra_info={"split": "train"}) for i in range(5)])
    with pytest.raises(
        ValueError, match=r"no heldout rows: 0 of 5 rows kept; 5 are of the other split.*split_key=None"
    ):
        make_source(files=[path], seed=0, verifier=SCORE, split="heldout")


def test_trl_rows_and_key_mapping(tmp_path):
    example = one(tmp_path, {"prompt": "2+2=", "solution": "4", "difficulty": 3})
    assert (example.prompt, example.reference, example.source) == ("2+2=", "4", "two")
    assert example.problem.data == {"ground_truth": "4", "extra_info": {"difficulty": 3}}
    row = {"question": "2+2=", "meta": {"target": 4}, "answer": "x", "rationale": "2+2=4", "kind": "sums"}
    keys = dict(prompt_key="question", answer_key="meta.target", demonstration_key="rationale", data_source_key="kind")
    example = one(tmp_path, row, **keys)
    assert (example.reference, example.demonstration, example.source) == ("4", "2+2=4", "sums")
    assert example.problem.data == {"ground_truth": 4, "extra_info": {"answer": "x"}}
    assert one(tmp_path, {"prompt": "2+2="}, answer_key=None).reference is None


def test_verifiers_by_data_source_and_tasks_as_verifiers(tmp_path):
    task = make_source(tasks=["add"], seed=0).example(0)
    row = {"prompt": task.prompt, "answer": task.problem.data, "data_source": "mine"}
    example = one(tmp_path, row, verifier={"mine": "add", "other": SCORE})
    assert example.verifier == "add" and example.problem.data == task.problem.data
    row["answer"] = json.dumps(row["answer"])  # parquet cannot mix structures, so text will do
    assert one(tmp_path, row, verifier="add").problem == example.problem


def test_chats_may_be_rendered_by_a_function(tmp_path):
    assert one(tmp_path, verl_row(1), chat="json:dumps").prompt.startswith('[{"role": "system"')


BAD = {
    '{"prompt": "1+1="': "not JSON",
    "[1]": "a JSON list, not an object",
    '{"answer": "2"}': "no prompt; it has answer",
    '{"prompt": "  ", "answer": "2"}': "prompt is empty",
    '{"prompt": 3, "answer": "2"}': "prompt is int",
    '{"prompt": ["hi"], "answer": "2"}': "without text for role and content",
    '{"prompt": [{"role": "user"}], "answer": "2"}': "without text for role and content",
    '{"prompt": [{"role": "assistant", "content": "2"}], "answer": "2"}': "does not end with a message to answer",
    '{"prompt": "\\ud800", "answer": "2"}': "not Unicode text",
    '{"prompt": "1+1="}': "no answer among prompt; set data.answer_key",
    '{"prompt": "1+1=", "answer": "2", "label": "2"}': "answer and label could each be the answer",
    '{"prompt": "1+1=", "answer": "2", "images": ["a"]}': "prompts here are text",
    '{"prompt": "1+1=", "answer": "2", "data_source": 3}': "data_source is 3, not a name",
    '{"prompt": "1+1=", "answer": "2", "extra_info": {"split": "foo"}}': "extra_info.split is 'foo'; use train",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path, line):
    path = write_jsonl(tmp_path / "a.jsonl", [verl_row(0), "", line, verl_row(2)])
    with pytest.raises(ValueError) as error:
        make_source(files=[path], seed=0, verifier=SCORE)
    assert str(error.value).startswith(f"{path}:3: ") and BAD[line] in str(error.value)
    assert "data.on_bad_row='skip'" in str(error.value)


def test_bad_rows_may_be_skipped_and_are_counted(tmp_path, caplog):
    good = [verl_row(i) for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", [*good, *BAD, verl_row(20)])
    source = make_source(files=[path], seed=0, verifier=SCORE, on_bad_row="skip")
    assert (source.report.rows, source.report.bad) == (21 + len(BAD), len(BAD))
    assert source.report.first_bad[0].startswith(f"{path}:21: not JSON") and len(source.report.first_bad) == 5
    assert f"{len(BAD)} malformed" in caplog.text and f"{path}:21: not JSON" in caplog.text
    assert source.report.kept == source.num_examples == len(all_of(source))


def test_verifier_settings_that_do_not_fit_the_row(tmp_path):
    with pytest.raises(ValueError, match=r"one.jsonl:1: data.verifier has none for data_source 'sums'; it has x"):
        one(tmp_path, verl_row(1), verifier={"x": SCORE})
    with pytest.raises(ValueError, match="the verifier add is a task, so the answer must be the problem's data"):
        one(tmp_path, verl_row(1), verifier="add")


def test_bad_parquet(tmp_path):
    rows = [verl_row(i) for i in range(5)]
    rows[3]["reward_model"]["ground_truth"] = None
    with pytest.raises(ValueError, match=r"rows.parquet:4: no answer among data_source"):
        make_source(files=[write_parquet(tmp_path / "rows.parquet", rows)], seed=0, verifier=SCORE)
    (tmp_path / "no.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"no\.parquet is not a readable parquet file"):
        make_source(files=[str(tmp_path / "no.parquet")], seed=0, verifier=SCORE)


def test_long_prompts_are_dropped_or_refused(tmp_path):
    rows = [{"prompt": "1" * (i + 1), "answer": "2"} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    options = dict(
        files=[path], seed=0, verifier=SCORE, max_prompt_len_tokens=11, prompt_ids=SentencePieceTokenizer.load().prompt
    )
    with pytest.raises(
        ValueError, match=r"a.jsonl:1\d: the prompt has 1\d tokens, BOS included.*on_long_prompt='drop'"
    ):
        make_source(**options)
    source = make_source(**options, on_long_prompt="drop")
    assert max(map(len, prompts_of(source))) == 10  # and BOS
    report = source.report
    assert report.too_long > 10 and report.kept + report.too_long + report.other_split == 30


def test_a_fingerprint_tells_changed_data(tmp_path):
    def fingerprint(rows, **options):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        return make_source(**dict(files=[path], seed=0, verifier=SCORE) | options).fingerprint

    rows = [verl_row(i) for i in range(30)]
    base = fingerprint(rows)
    assert base == fingerprint(rows)
    changed = [*rows[:29], verl_row(29, reward_model={"ground_truth": "5"})]
    others = [
        fingerprint(changed),
        fingerprint(rows[::-1]),
        fingerprint(rows, seed=1),
        fingerprint(rows, shuffle=False),
    ]
    assert len({base, *others}) == 5


def test_rows_that_change_under_a_run_are_noticed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [verl_row(i) for i in range(30)])
    source = make_source(files=[path], seed=0, verifier=SCORE)
    pathlib.Path(path).write_text("x" * pathlib.Path(path).stat().st_size)
    with pytest.raises(ValueError, match="changed while in use"):
        source.example(0)


def test_odd_jsonl_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "\ufeff" + json.dumps({"prompt": "é+1=", "answer": "2"}, ensure_ascii=False) + "\r\n\r\n"
    path.write_bytes(text.encode() + b'{"prompt": "b", "answer": "\xff"}')
    rows = open_rows(str(path))
    assert len(rows) == 2 and rows.row(0)["prompt"] == "é+1=" and rows.where(1).endswith("a.jsonl:3")
    with pytest.raises(ValueError, match="not JSON: 'utf-8' codec"):
        rows.row(1)


def test_tensorflow_datasets_without_tensorflow(tmp_path):
    import sys

    import etils.epath
    import tensorflow_datasets as tfds

    class Sums(tfds.core.GeneratorBasedBuilder):
        """Sums."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = etils.epath.Path(tmp_path)

        def _info(self):
            features = {"question": tfds.features.Text(), "answer": tfds.features.Text(), "n": np.int32}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(30):
                yield i, {"question": f"{i}+1=", "answer": str(i + 1), "n": i}

    builder = Sums(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    directory = str(tmp_path / "sums" / "1.0.0")
    options = dict(seed=0, prompt_key="question", answer_key="answer", verifier=SCORE)
    source = make_source(files=[f"tfds:{directory}:train"], **options)
    example = source.example(3)
    assert source.names == ("sums",) and 20 < source.num_examples < 30
    assert int(example.prompt.removesuffix("+1=")) + 1 == int(example.reference)
    assert example.problem.data["extra_info"] == {"n": int(example.reference) - 1}
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"tfds:.*:nope: .*Only array_record can be read without TensorFlow"):
        make_source(files=[f"tfds:{directory}:nope"], **options)
