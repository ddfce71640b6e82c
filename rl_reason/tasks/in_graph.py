"""Verifiers on token ids, in graph: what ``verify`` says of the decoded completion, in ``jax.numpy``.

Exactly that: integers only, static shapes, no host. A completion is read as the bytes its tokens write; the answer is
what follows the last mark, without spaces around it. Tasks with one right answer compare it with the oracle's
(``reference``); tasks with several read the prompt and check the witness, never the oracle.
"""

import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from rl_reason.tasks import TASKS
from rl_reason.tasks.base import ANSWER_MARK
from rl_reason.types import struct

MARK, HASH, SPACE = len(ANSWER_MARK), ord(ANSWER_MARK[0]), ord(" ")
MAX_ANSWER_BYTES = 40  # longer answers are wrong in every task here
MAX_PROMPT_BYTES = 64  # of the tasks whose prompt is read


@typing.runtime_checkable
class HasPieceBytes(typing.Protocol):
    """What of a tokenizer is needed: the bytes that each id writes, none for specials."""

    @property
    def piece_bytes(self) -> Sequence[bytes]: ...


@struct
class TokenBytes:
    """Per token of the vocabulary: its bytes, and what they mean for marks and spaces. Offsets count within it.

    What is said of a token's bytes lies one token after the other, ``begin[v] + offset``, offsets up to and with its length:
    in a table of rows every token would be as wide as the longest, which in large vocabularies has more than 100 bytes.
    """

    byte: UInt8[Array, " offsets"]  # 0 at the length
    next_ink: Int[Array, " offsets"]  # from there on, the first byte that is no space; the length where none is
    begin: Int[Array, " V"]
    length: Int[Array, " V"]
    leading_hashes: Int[Array, " V"]
    last_other: Int[Array, " V"]  # offset of its last byte that is no '#'; -1 without
    mark_end: Int[Array, " V"]  # offset just after the last mark that lies inside it; 0 without
    last_ink: Int[Array, " V"]  # offset of its last byte that is no space; -1 without


@struct
class Text:
    """Rows of tokens as rows of bytes, not yet spelled out: token ``c`` writes bytes ``start[c]:end[c]``."""

    tokens: Int[Array, "N C"]
    start: Int[Array, "N C"]
    end: Int[Array, "N C"]


def token_bytes(piece_bytes: Sequence[bytes]) -> TokenBytes:
    """The tables of a vocabulary, built once on the host."""
    byte = np.frombuffer(b"".join(piece + b"\0" for piece in piece_bytes), np.uint8)
    length = np.array([len(piece) for piece in piece_bytes], np.int32)
    begin = np.cumsum(length + 1, dtype=np.int32) - (length + 1)
    place = np.arange(len(byte), dtype=np.int32)
    stops = byte != SPACE  # a token's end is one too
    next_stop = np.minimum.accumulate(np.where(stops, place, len(byte))[::-1])[::-1]
    mark = ANSWER_MARK.encode()
    ints = lambda of: jnp.array([of(piece) for piece in piece_bytes], jnp.int32)
    return TokenBytes(
        byte=jnp.array(byte),
        next_ink=jnp.array(next_stop - np.repeat(begin, length + 1), jnp.int32),
        begin=jnp.array(begin),
        length=jnp.array(length),
        leading_hashes=ints(lambda piece: len(piece) - len(piece.lstrip(b"#"))),
        last_other=ints(lambda piece: len(piece.rstrip(b"#")) - 1),
        mark_end=ints(lambda piece: piece.rfind(mark) + MARK if mark in piece else 0),
        last_ink=ints(lambda piece: len(piece.rstrip(b" ")) - 1),
    )


def read(tokens: Int[Array, "N C"], mask: Bool[Array, "N C"], vocabulary: TokenBytes) -> Text:
    """The text of the masked tokens. Ids outside the vocabulary write nothing, as specials do."""
    known = mask & (tokens >= 0) & (tokens < vocabulary.length.shape[0])
    tokens = jnp.where(known, tokens, 0)
    length = jnp.where(known, vocabulary.length[tokens], 0)
    end = jnp.cumsum(length, axis=1)
    return Text(tokens=tokens, start=end - length, end=end)


def spelled(text: Text, first: Int[Array, " N"], last: Int[Array, " N"], width: int, vocabulary: TokenBytes):
    """Bytes ``first..last`` inclusive from column 0, at most ``width`` of them, zeros after: Int[N width]."""
    at = first[:, None] + jnp.arange(width)[None, :]
    owner = jnp.sum(text.end[:, None, :] <= at[:, :, None], axis=2, dtype=jnp.int32)
    owner = jnp.minimum(owner, text.end.shape[1] - 1)
    token = jnp.take_along_axis(text.tokens, owner, axis=1)
    offset = jnp.clip(at - jnp.take_along_axis(text.start, owner, axis=1), 0, vocabulary.length[token])
    byte = vocabulary.byte[vocabulary.begin[token] + offset].astype(jnp.int32)
    return jnp.where(at <= last[:, None], byte, 0)


def answer_span(text: Text, vocabulary: TokenBytes) -> tuple[Int[Array, " N"], Int[Array, " N"], Bool[Array, " N"]]:
    """First and last byte after the last mark, spaces stripped (last < first when empty); whether there is a mark."""
    length = text.end - text.start
    # A mark may be spelled across tokens: count the '#' since the last byte that is none.
    other = vocabulary.last_other[text.tokens]
    last_other = jnp.where((length > 0) & (other >= 0), text.start + other, -1)
    last_other = jax.lax.cummax(last_other, axis=1)
    before = jnp.pad(last_other, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    leading = jnp.where(length > 0, vocabulary.leading_hashes[text.tokens], 0)
    run = text.start + leading - 1 - before  # '#' in a row at the end of the token's leading ones
    across = jnp.where((leading > 0) & (run >= MARK), text.start + leading, 0)
    inside = jnp.where(length > 0, vocabulary.mark_end[text.tokens], 0)
    mark_end = jnp.max(jnp.maximum(across, jnp.where(inside > 0, text.start + inside, 0)), axis=1)  # 0: no mark

    after = jnp.clip(mark_end[:, None] - text.start, 0, vocabulary.length[text.tokens])
    ink = vocabulary.next_ink[vocabulary.begin[text.tokens] + after]
    never = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(ink < length, text.start + ink, never), axis=1)
    last_ink = vocabulary.last_ink[text.tokens]
    last = jnp.max(jnp.where((length > 0) & (last_ink >= 0), text.start + last_ink, -1), axis=1)
    empty = first == never
    return jnp.where(empty, 0, first), jnp.where(empty, -1, last), mark_end > 0


# Witness checks, one row each: the prompt after the task's name and the answer, zero-filled, and the answer's length.


def _digits(answer: Int[Array, " A"], length: Int[Array, ""], low, high) -> Bool[Array, ""]:
    """Whether every character is a digit in low..high."""
    inside = jnp.arange(answer.shape[0]) < length
    return jnp.all(~inside | ((answer >= ord("0") + low) & (answer <= ord("0") + high)))


def _edges(body: Int[Array, " Q"], offset: int):
    """Ends of the edges ``01,23,...`` from an offset on, and whether there is one: three Int/Bool [E]."""
    count = (body.shape[0] - offset) // 3
    triples = body[offset : offset + 3 * count].reshape(count, 3)
    present = (triples[:, 0] >= ord("0")) & (triples[:, 0] <= ord("9"))
    return triples[:, 0] - ord("0"), triples[:, 1] - ord("0"), present


def _color(body: Int[Array, " Q"], answer: Int[Array, " A"], length: Int[Array, ""]) -> Bool[Array, ""]:
    """``5,3:01,...?``: as many digits as nodes, each a colour, and no edge within one."""
    a, b, present = _edges(body, 4)
    clash = present & (answer[jnp.where(present, a, 0)] == answer[jnp.where(present, b, 0)])
    right = (length == body[0] - ord("0")) & _digits(answer, length, 0, body[2] - ord("1"))
    return right & ~jnp.any(clash)


def _topo(body: Int[Array, " Q"], answer: Int[Array, " A"], length: Int[Array, ""]) -> Bool[Array, ""]:
    """``5:01,...?``: each node once, and every edge's first end before its second."""
    num_nodes = body[0] - ord("0")
    here = answer[None, :] == ord("0") + jnp.arange(10)[:, None]
    all_once = jnp.all(jnp.any(here, axis=1) | (jnp.arange(10) >= num_nodes))
    position = jnp.argmax(here, axis=1)
    a, b, present = _edges(body, 2)
    late = present & (position[jnp.where(present, a, 0)] > position[jnp.where(present, b, 0)])
    return (length == num_nodes) & all_once & ~jnp.any(late)


def _board_size(body: Int[Array, " Q"]) -> Int[Array, ""]:
    """Rows of a board ``abc/def/ghi?``."""
    return jnp.sum(body == ord("/"), dtype=jnp.int32) + 1


def _path(body: Int[Array, " Q"], answer: Int[Array, " A"], length: Int[Array, ""]) -> Bool[Array, ""]:
    """Every move of U, D, L, R stays on the board and off walls; the last ends on G."""
    size = _board_size(body)
    move = lambda plus, minus: (answer == ord(plus)).astype(jnp.int32) - (answer == ord(minus)).astype(jnp.int32)
    down, right = move("D", "U"), move("R", "L")
    start, goal = jnp.argmax(body == ord("S")), jnp.argmax(body == ord("G"))
    row = start // (size + 1) + jnp.cumsum(down)
    column = start % (size + 1) + jnp.cumsum(right)
    cell = row * (size + 1) + column
    on_board = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    wall = body[jnp.where(on_board, cell, 0)] == ord("x")
    legal = on_board & ~wall & ((down != 0) | (right != 0))
    past = jnp.arange(answer.shape[0]) >= length
    return (length <= size * size) & jnp.all(legal | past) & (cell[-1] == goal)


def _filled(body: Int[Array, " Q"], answer: Int[Array, " A"], length: Int[Array, ""], high) -> tuple:
    """The prompt's characters with the answer's digits in its blanks, and whether they are just enough, 1..high."""
    blank = body == ord(".")
    filled = jnp.where(blank, answer[jnp.clip(jnp.cumsum(blank) - 1, 0, answer.shape[0] - 1)], body) - ord("0")
    return filled, (length == jnp.sum(blank)) & _digits(answer, length, 1, high)


def _latin(body: Int[Array, " Q"], answer: Int[Array, " A"], length: Int[Array, ""]) -> Bool[Array, ""]:
    """No digit twice in a row or a column."""
    size, most = _board_size(body), _most("latin")
    filled, right = _filled(body, answer, length, size)
    r, c = jnp.arange(most)[:, None], jnp.arange(most)[None, :]
    here = (r < size) & (c < size)
    board = jnp.where(here, filled[jnp.where(here, r * (size + 1) + c, 0)], 0)
    digit = board[:, :, None] == jnp.arange(1, most + 1)[None, None, :]
    return right & jnp.all(jnp.sum(digit, axis=0) <= 1) & jnp.all(jnp.sum(digit, axis=1) <= 1)


def _queen(body: Int[Array, " Q"], answer: Int[Array, " A"], length: Int[Array, ""]) -> Bool[Array, ""]:
    """No two queens in a column or on a diagonal."""
    size, most = jnp.argmax(body == ord("?")), _most("queen")
    filled, right = _filled(body, answer, length, size)
    column, row = filled[:most], jnp.arange(most)
    apart = jnp.abs(column[:, None] - column[None, :])
    below = row[None, :] - row[:, None]
    attack = (below > 0) & (row[None, :] < size) & ((apart == 0) | (apart == below))
    return right & ~jnp.any(attack)


def _most(name: str) -> int:
    """The largest board of a task."""
    return max(size[0] for size in TASKS[name].sizes)


WITNESS: dict[str, Callable] = {"color": _color, "topo": _topo, "path": _path, "latin": _latin, "queen": _queen}
IN_GRAPH: frozenset[str] = frozenset(WITNESS) | {name for name, task in TASKS.items() if task.unique}


def make_verifier(task_names: Sequence[str], tokenizer: HasPieceBytes) -> Callable[..., Bool[Array, " N"]]:
    """``fn(prompt_tokens, prompt_len, reference, completion_tokens, completion_mask, route) -> right``, to be jitted.

    ``route`` indexes ``task_names``; only those tasks are computed. ``reference`` is the oracle's answer, padded with
    ids that write nothing; None will do where every task checks a witness. Raises ValueError for other tasks.
    """
    unknown = sorted(set(task_names) - IN_GRAPH)
    if unknown:
        raise ValueError(
            f"no in-graph verifier for {', '.join(unknown)}; there is one for {', '.join(sorted(IN_GRAPH))}. "
            "Use the host verifier instead."
        )
    vocabulary = token_bytes(tokenizer.piece_bytes)
    witness = {i: name for i, name in enumerate(task_names) if name in WITNESS}
    compared = tuple(i for i in range(len(task_names)) if i not in witness)

    def verify(
        prompt_tokens: Int[Array, "N P"],
        prompt_len: Int[Array, " N"],
        reference: Int[Array, "N R"] | None,
        completion_tokens: Int[Array, "N C"],
        completion_mask: Bool[Array, "N C"],
        route: Int[Array, " N"],
    ) -> Bool[Array, " N"]:
        completion = read(completion_tokens, completion_mask, vocabulary)
        first, last, marked = answer_span(completion, vocabulary)
        answer = spelled(completion, first, last, MAX_ANSWER_BYTES, vocabulary)
        length = last - first + 1
        right = jnp.zeros(route.shape, bool)
        if compared:
            if reference is None:
                raise ValueError(
                    f"{', '.join(task_names[i] for i in compared)} need the oracle's answers as reference."
                )
            of_kind = jnp.any(route[:, None] == jnp.array(compared)[None, :], axis=1)
            right |= of_kind & _same(answer, length, reference, vocabulary)
        if witness:
            prompt = read(prompt_tokens, jnp.arange(prompt_tokens.shape[1])[None, :] < prompt_len[:, None], vocabulary)
            total = prompt.end[:, -1]
            spelled_prompt = spelled(prompt, jnp.zeros_like(total), total - 1, MAX_PROMPT_BYTES, vocabulary)
            for i, name in witness.items():
                body = spelled_prompt[:, len(name) + 1 :]
                right |= (route == i) & jax.vmap(WITNESS[name])(body, answer, length)
        return right & marked

    return verify


def _same(
    answer: Int[Array, "N A"], length: Int[Array, " N"], reference: Int[Array, "N R"], vocabulary: TokenBytes
) -> Bool[Array, " N"]:
    """Whether the answer is the reference, byte for byte; an empty reference is nobody's answer."""
    text = read(reference, jnp.ones(reference.shape, bool), vocabulary)
    total = text.end[:, -1]
    wanted = spelled(text, jnp.zeros_like(total), total - 1, MAX_ANSWER_BYTES, vocabulary)
    fits = (length == total) & (total > 0) & (total <= MAX_ANSWER_BYTES)
    return fits & jnp.all(answer == wanted, axis=1)
