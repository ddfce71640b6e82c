"""The in-graph verifiers say what the text verifiers say, on tens of thousands of mutated token rows per task."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reason.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rl_reason.tasks import TASKS, in_graph
from rl_reason.tasks.base import draw
from rl_reason.tasks.in_graph import IN_GRAPH, MAX_ANSWER_BYTES, MAX_PROMPT_BYTES, WITNESS, make_verifier

TOKENIZER = SentencePieceTokenizer.load()
NAMES = sorted(IN_GRAPH)
ROWS, PROBLEMS, PROMPT, COMPLETION, REFERENCE = 10_000, 100, 64, 48, 16
MARK = TOKENIZER.encode("####")
SPACE = TOKENIZER.encode(" ")
NUL = TOKENIZER.encode("\x00")[0]  # a byte like any other, though zeros also fill what is unused
# Characters that answers are made of, per task, so that random answers are at times right.
ALPHABET = {
    "color": "012",
    "topo": "01234567",
    "path": "UDLR",
    "latin": "12345",
    "queen": "123456789",
    "close": ")]}>",
}


def rows_of(lists, width):
    """Rows padded with pad, and how long each is."""
    out = np.full((len(lists), width), TOKENIZER.pad_id, np.int32)
    for row, ids in zip(out, lists, strict=True):
        row[: len(ids)] = ids
    return out, np.array([len(ids) for ids in lists], np.int32)


def as_bytes(rng, ids):
    """The same text with some tokens spelled as byte pieces."""
    spelled = []
    for i in ids:
        spell = 0 <= i < TOKENIZER.vocab_size and rng.random() < 0.5
        spelled += [TOKENIZER._byte_ids[b] for b in TOKENIZER.piece_bytes[i]] if spell else [i]
    return spelled


def edited(rng, ids, alphabet):
    """One character swapped, dropped, appended, inserted or replaced; digits often by a neighbour."""
    ids, at = list(ids), int(rng.integers(len(ids)))
    new = TOKENIZER.encode(alphabet[int(rng.integers(len(alphabet)))])
    kind = int(rng.integers(6))
    if kind == 0 and at:
        ids[at - 1], ids[at] = ids[at], ids[at - 1]
    elif kind == 1:
        del ids[at]
    elif kind == 2:
        ids += new
    elif kind == 3:
        ids[at:at] = new
    elif kind == 4 and (digit := TOKENIZER.decode([ids[at]])).isdigit():
        ids[at : at + 1] = TOKENIZER.encode(str(int(digit) + int(rng.choice([-1, 1]))))
    else:
        ids[at : at + 1] = new
    return ids


def mutant(rng, name, answer, other, prompt):
    """A completion: a right, near-right, other, random or broken answer behind a right, broken or missing mark."""
    alphabet = ALPHABET.get(name, "0123456789-abc")
    body = list(answer)
    kind = int(rng.integers(10))
    if kind == 0:
        body = list(other)
    elif kind <= 3:
        for _ in range(int(rng.integers(1, 3))):
            body = edited(rng, body or SPACE, alphabet)
    elif kind == 4:
        count = max(0, len(answer) + int(rng.integers(-1, 2)) * int(rng.random() < 0.3))
        body = TOKENIZER.encode("".join(rng.choice(list(alphabet), size=count)))
    elif kind == 5:
        body = rng.integers(TOKENIZER.vocab_size, size=rng.integers(8)).tolist()
    elif kind == 6:
        body = prompt if rng.random() < 0.3 else TOKENIZER.encode("é\u2581\U0001f642٣１")[int(rng.integers(9)) :]
    mark = [
        MARK,
        MARK,
        MARK,
        MARK,
        [],
        MARK * 2,
        MARK + SPACE + MARK,
        TOKENIZER.encode("#####"),
        [*MARK, *other, *MARK],
    ]
    row = list(mark[int(rng.integers(len(mark)))]) + body
    row = rng.integers(TOKENIZER.vocab_size, size=rng.integers(4)).tolist() * int(rng.random() < 0.3) + row
    for _ in range(int(rng.integers(4)) * int(rng.random() < 0.5)):  # spaces, NULs and what writes nothing, anywhere
        filler = (SPACE[0], 0, 1, 3, TOKENIZER.vocab_size, -1, NUL)[int(rng.integers(7))]
        end = len(row) if rng.random() < 0.5 else int(rng.integers(len(row) + 1))
        row[end:end] = [filler]
    if rng.random() < 0.2:
        row += MARK if rng.random() < 0.3 else SPACE
    return as_bytes(rng, row) if rng.random() < 0.3 else row


def cases(name, seed, rows=ROWS):
    """Arguments of a verifier, and what the text verifier says of each row."""
    rng, task = np.random.default_rng([seed, *name.encode()]), TASKS[name]
    drawn = [draw(task, task.levels[i % len(task.levels)], seed=seed, split="train", index=i) for i in range(PROBLEMS)]
    solved = [TOKENIZER.encode(task.solve(problem).answer) for problem in drawn]
    prompts = [TOKENIZER.encode(task.prompt(problem)) for problem in drawn]
    which = np.arange(rows) % PROBLEMS
    completions = []
    for i in which:
        other = solved[int(rng.integers(PROBLEMS))]
        completions.append(mutant(rng, name, solved[i], other, prompts[i])[:COMPLETION])
    text = [
        bool(task.verify(TOKENIZER.decode(ids), drawn[i]).score) for ids, i in zip(completions, which, strict=True)
    ]
    prompt_rows, prompt_len = rows_of([prompts[i] for i in which], PROMPT)
    references, _ = rows_of([solved[i] for i in which], REFERENCE)
    tokens, lengths = rows_of([[*ids, TOKENIZER.eos_id] for ids in completions], COMPLETION + 1)
    mask = np.arange(COMPLETION + 1)[None, :] <= lengths[:, None]
    tokens = np.where(
        mask, tokens, rng.integers(TOKENIZER.vocab_size, size=tokens.shape)
    )  # what is masked is not read
    mask &= np.arange(COMPLETION + 1)[None, :] < lengths[:, None]
    return (prompt_rows, prompt_len, references, tokens.astype(np.int32), mask), np.array(text)


@pytest.fixture(scope="module")
def verifier():
    with jax.numpy_rank_promotion("raise"):
        yield jax.jit(make_verifier(NAMES, TOKENIZER))


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_text_verifier(name, verifier):
    arguments, text = cases(name, seed=0)
    graph = np.asarray(verifier(*arguments, np.full(ROWS, NAMES.index(name), np.int32)))
    differ = np.flatnonzero(graph != text)
    assert not differ.size, [
        (TOKENIZER.decode(arguments[0][i]), TOKENIZER.decode(arguments[3][i][arguments[4][i]]), text[i])
        for i in differ[:3]
    ]
    assert 0.1 < text.mean() < 0.7  # both verdicts are tried


def test_routes_mix_in_one_batch_under_jit_vmap_and_map():
    names = ("color", "add", "path")
    verify = jax.jit(make_verifier(names, TOKENIZER))
    parts = [cases(name, seed=1, rows=60) for name in names]
    arguments = [np.concatenate(arrays) for arrays in zip(*(arguments for arguments, _ in parts), strict=True)]
    arguments.append(np.repeat(np.arange(3, dtype=np.int32), 60))
    text = np.concatenate([text for _, text in parts])
    assert np.array_equal(verify(*map(jnp.asarray, arguments)), text)
    stacked = [jnp.asarray(array).reshape(3, 60, *array.shape[1:]) for array in arguments]
    scanned = jax.jit(lambda batches: jax.lax.map(lambda batch: jax.vmap(verify)(*batch), batches))
    assert np.array_equal(scanned([array[None] for array in stacked])[0], text.reshape(3, 60))
    assert not verify(*map(jnp.asarray, arguments[:5]), jnp.full(180, 3, jnp.int32)).any()  # no such route


def test_marks_and_spaces_inside_and_across_long_tokens():
    """Vocabularies of larger models have pieces such as ' ####' or '## 1'; they are cut from these by chance."""
    rng, task = np.random.default_rng(0), TASKS["add"]
    pieces = [b"", *(bytes([b]) for b in b"#_ 1234567890\xe2"), b"##", b"###", b"####", b" ####", b"#### ", b"####12"]
    pieces += [b"#####", b"12##", b"## 1", b" 12 ", b"  ", b" 2", b"12", b"# #", b"####1####"]
    pieces += [b"1 #### 2", b"\x96\x81"]  # the latter ends what b"\xe2" begins
    verify = jax.jit(make_verifier(["add"], types.SimpleNamespace(piece_bytes=pieces)))
    problem = draw(task, 2, seed=0, split="train", index=0)
    problem.data.update(a=10, b=2)  # the answer is 12
    tokens = rng.integers(len(pieces), size=(40_000, 7)).astype(np.int32)
    mask = np.arange(7)[None, :] < rng.integers(8, size=(40_000, 1))
    reference = np.tile(np.array([[pieces.index(b"1"), pieces.index(b"2"), 0]], np.int32), (40_000, 1))
    zeros = np.zeros(40_000, np.int32)
    graph = np.asarray(verify(np.zeros((40_000, 1), np.int32), zeros + 1, reference, tokens, mask, zeros))
    for row, kept, right in zip(tokens, mask, graph, strict=True):
        written = b"".join(pieces[i] for i in row[kept]).decode("utf-8", errors="replace")
        assert right == bool(task.verify(written, problem).score), written
    assert graph.sum() > 200


def test_wandering_paths_are_as_long_as_the_text_verifier_lets_them():
    """Random mutants are never long and legal at once, so that nothing else tries the limit of size**2 moves."""
    task, level = TASKS["path"], TASKS["path"].levels[0]
    problem = dataclasses.replace(
        draw(task, level, seed=0, split="train", index=0), data={"rows": ["S.G", "...", "x.."]}
    )
    completions = [TOKENIZER.encode("####" + "RL" * k + end) for k in range(20) for end in ("RR", "R", "DUDURR")]
    tokens, lengths = rows_of(completions, 64)
    prompts, prompt_len = rows_of([TOKENIZER.encode(task.prompt(problem))] * len(completions), 16)
    mask, route = np.arange(64)[None, :] < lengths[:, None], np.zeros(len(completions), np.int32)
    graph = jax.jit(make_verifier(["path"], TOKENIZER))(prompts, prompt_len, None, tokens, mask, route)
    text = [bool(task.verify(TOKENIZER.decode(ids), problem).score) for ids in completions]
    assert graph.tolist() == text and sum(text) == 6  # "RR" after 0 to 3 detours, "DUDURR" after 0 or 1


def test_every_prompt_and_answer_fits():
    for name in NAMES:
        for level in TASKS[name].levels:
            for index in range(30):
                problem = draw(TASKS[name], level, seed=2, split="train", index=index)
                assert name not in WITNESS or len(TASKS[name].prompt(problem)) <= MAX_PROMPT_BYTES
                assert 0 < len(TASKS[name].solve(problem).answer) <= MAX_ANSWER_BYTES
    assert max(size[0] for size in TASKS["path"].sizes) ** 2 <= MAX_ANSWER_BYTES  # the most moves that are accepted


def test_an_empty_or_overlong_reference_is_nobodys_answer():
    verify = jax.jit(make_verifier(["add"], TOKENIZER))
    completion = jnp.array([MARK])
    long = jnp.array(TOKENIZER.encode("####" + "1" * 60))[None, :]
    one = jnp.ones(1, jnp.int32)
    prompt, mask = jnp.ones((1, 4), jnp.int32), lambda row: jnp.ones(row.shape, bool)
    assert not verify(prompt, one, jnp.zeros((1, 4), jnp.int32), completion, mask(completion), one * 0).any()
    assert not verify(prompt, one, long[:, 1:], long, mask(long), one * 0).any()


def test_unsupported_tasks_are_named():
    assert {"add", "sort", "mod", "dfa", *WITNESS} <= IN_GRAPH and "make" not in IN_GRAPH
    with pytest.raises(ValueError, match=r"no in-graph verifier for make, nonsense; .*add, .*sub.*host verifier"):
        make_verifier(["add", "make", "nonsense"], TOKENIZER)
    with pytest.raises(ValueError, match=r"add need"):
        zeros = jnp.zeros((1, 4), jnp.int32)
        make_verifier(["color", "add"], TOKENIZER)(zeros, zeros[0, :1], None, zeros, zeros > 0, zeros[0, :1])


def test_witnesses_need_no_reference():
    (prompts, prompt_len, _, tokens, mask), text = cases("queen", seed=3, rows=200)
    verify = jax.jit(make_verifier(["queen"], TOKENIZER))
    rows = map(jnp.asarray, (tokens, mask, np.zeros(200, np.int32)))
    assert np.array_equal(verify(jnp.asarray(prompts), jnp.asarray(prompt_len), None, *rows), text)


def test_traces_once_and_makes_no_callbacks():
    text = str(jax.make_jaxpr(make_verifier(NAMES, TOKENIZER))(*map(jnp.asarray, example())))
    assert "callback" not in text and "f32" not in text and "f64" not in text  # integers only
    assert in_graph.WITNESS.keys() <= IN_GRAPH


def example():
    arguments, _ = cases("add", seed=4, rows=100)
    return *arguments, np.zeros(100, np.int32)


def test_tables_of_a_large_vocabulary_are_as_large_as_its_bytes():
    """A few pieces of 128 bytes, which Qwen's and Llama's vocabularies have, must not widen the rest."""
    rng = np.random.default_rng(0)
    pieces = [rng.bytes(n) for n in rng.integers(1, 12, 50_000)] + [b" " * 128, b"", b" ####" + b"#" * 123]
    tables = in_graph.token_bytes(pieces)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tables))
    assert size < 10 * sum(map(len, pieces)) < 10e6
    begin, length, byte, next_ink = map(np.asarray, (tables.begin, tables.length, tables.byte, tables.next_ink))
    for i in (*rng.integers(len(pieces), size=200), *range(50_000, 50_003)):
        piece, here = pieces[i], slice(begin[i], begin[i] + length[i] + 1)
        assert byte[here].tobytes() == piece + b"\0"
        stops = [w for w, one in enumerate(piece) if one != ord(" ")] + [len(piece)]
        assert next_ink[here].tolist() == [next(w for w in stops if w >= c) for c in range(len(piece) + 1)]
