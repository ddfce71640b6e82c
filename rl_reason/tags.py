"""Finds tags in completions, in graph and on bytes: how often each occurs, where, and whether they frame one answer.

A tag may begin inside one token and end inside another, and several may lie in one token; how a text is cut into tokens
depends on what stands around it, so token ids are never compared. Each tag is a Knuth-Morris-Pratt automaton over
bytes; on the host its run over every token from every state becomes a table, and a row is then one lookup a token.
"""

import functools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rl_reason.types import struct

WHITESPACE = bytes(b for b in range(128) if chr(b).isspace())  # ASCII's: str.split knows some more of Unicode


@typing.runtime_checkable
class Tokenizer(typing.Protocol):
    """What of a tokenizer is needed: the bytes that each id writes (none for specials), and ids for a text."""

    @property
    def piece_bytes(self) -> Sequence[bytes]: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...


class Format(typing.NamedTuple):
    """The tags that frame reasoning and answer; an empty string: there is no such tag.

    Without ``answer_close`` the answer ends where the text does.
    """

    think_open: str
    think_close: str
    answer_open: str
    answer_close: str


class Vocabulary(typing.NamedTuple):
    """What each token writes, on the host; the last row is for ids that write nothing. Cut c of v is ``cut[v] + c``."""

    length: Int[np.ndarray, " V"]  # bytes
    cut: Int[np.ndarray, " V"]  # where a token's cuts 0..length begin in the arrays below
    blank_after: Int[np.ndarray, " cuts"]  # whitespace bytes from a cut on, within the token
    blank_before: Int[np.ndarray, " cuts"]  # and just before it


class Automata(typing.NamedTuple):
    """K tags over a vocabulary: what a token does in a state. Tokens that do the same share a kind."""

    tag_len: tuple[int, ...]  # bytes
    kind: Int[np.ndarray, " V"]
    table: Int[np.ndarray, "kinds K S 4"]  # next state, ends within the token, bytes up to its first and its last


@struct
class Found:
    """Occurrences of K tags in the bytes of each row, overlapping ones too; -1 for a tag that does not occur."""

    count: Int[Array, "N K"]
    first_end: Int[Array, "N K"]  # bytes written up to the end of the first
    last_end: Int[Array, "N K"]


@struct
class Answer:
    """Where each row's answer lies, in bytes of its completion; 0 and empty where ``formed`` is False."""

    formed: Bool[Array, " N"]
    begin: Int[Array, " N"]  # just after the opening tag
    end: Int[Array, " N"]  # where the closing tag begins, or the text ends
    ink_begin: Int[Array, " N"]  # the same without whitespace around; ``end`` both where all is blank
    ink_end: Int[Array, " N"]
    token_len: Int[Array, "N T"]  # bytes that a token writes, 0 off the completion
    token_end: Int[Array, "N T"]  # bytes written up to and with it


@functools.lru_cache(maxsize=8)
def vocabulary(piece_bytes: tuple[bytes, ...]) -> Vocabulary:
    """The tables of what tokens write."""
    pieces = (*piece_bytes, b"")
    length = np.array([len(piece) for piece in pieces], np.int32)
    cut = np.cumsum(length + 1, dtype=np.int32) - (length + 1)
    blank_after, blank_before = np.zeros((2, int((length + 1).sum())), np.int32)
    for start, piece in zip(cut, pieces, strict=True):
        for c, byte in enumerate(piece):
            blank_before[start + c + 1] = blank_before[start + c] + 1 if byte in WHITESPACE else 0
        for c, byte in reversed(list(enumerate(piece))):
            blank_after[start + c] = blank_after[start + c + 1] + 1 if byte in WHITESPACE else 0
    return Vocabulary(length, cut, blank_after, blank_before)


def _transitions(tag: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Next state [S 256] and whether the tag ends there; state s has read the tag's first s bytes and no more of it."""
    size = len(tag)
    border = [0] * (size + 1)  # longest proper prefix of tag[:s] that is its suffix
    follow = np.zeros((size + 1, 256), np.int32)
    follow[0, tag[0]] = 1
    for s in range(1, size + 1):
        border[s] = follow[border[s - 1], tag[s - 1]] if s > 1 else 0
        follow[s] = follow[border[s]]
        if s < size:
            follow[s, tag[s]] = s + 1
    ends = follow[:size] == size
    return np.where(ends, border[size], follow[:size]), ends


def _runs(tag: bytes, columns: list[tuple[np.ndarray, np.ndarray]], vocabulary_size: int) -> np.ndarray:
    """``Automata.table`` of one tag for every token, [V S 4]; ``columns`` are the tokens that have a w-th byte, and it."""
    follow, ends = _transitions(tag)
    state = np.tile(np.arange(len(tag), dtype=np.int32), (vocabulary_size, 1))
    count, first, last = (np.zeros_like(state) for _ in range(3))
    for w, (longer, byte) in enumerate(columns):
        now = state[longer]
        hit = ends[now, byte[:, None]]
        if hit.any():
            count[longer] += hit
            first[longer] = np.where(hit & (first[longer] == 0), w + 1, first[longer])
            last[longer] = np.where(hit, w + 1, last[longer])
        state[longer] = follow[now, byte[:, None]]
    return np.stack([state, count, first, last], axis=-1)


@functools.lru_cache(maxsize=8)
def automata(tags: tuple[str, ...], piece_bytes: tuple[bytes, ...]) -> Automata:
    """Compiles tags for a vocabulary. Raises ValueError for an empty tag, which would occur everywhere."""
    if not all(tags):
        raise ValueError(f"tags {tags}: an empty one occurs everywhere; leave it out.")
    spelled = [tag.encode() for tag in tags]
    length = vocabulary(piece_bytes).length
    columns = []
    for w in range(int(length.max())):
        longer = np.flatnonzero(length > w)
        columns.append((longer, np.array([piece_bytes[v][w] for v in longer], np.int32)))
    states = max(map(len, spelled))
    runs = [_runs(tag, columns, len(length)) for tag in spelled]
    table = np.stack([np.pad(run, ((0, 0), (0, states - run.shape[1]), (0, 0))) for run in runs], axis=1)
    kinds: dict[bytes, int] = {}
    kind = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in table], np.int32)
    _, example = np.unique(kind, return_index=True)
    return Automata(tuple(map(len, spelled)), kind, table[example])


def written(tokens: Int[Array, "N T"], mask: Bool[Array, "N T"], vocabulary_size: int) -> Int[Array, "N T"]:
    """Rows of the tables above; ids outside the vocabulary, and what is off the mask, write nothing."""
    return jnp.where(mask & (tokens >= 0) & (tokens < vocabulary_size), tokens, vocabulary_size)


def advance(compiled: Automata, kind: Int[Array, " N"], state: Int[Array, "N K"]) -> Int[Array, "N K 4"]:
    """What a token of each row does to the automata, as ``Automata.table`` has it; ``kind`` is that of the tokens."""
    return jnp.asarray(compiled.table)[kind[:, None], jnp.arange(state.shape[1]), state]


def find(tokens: Int[Array, "N T"], mask: Bool[Array, "N T"], compiled: Automata, piece_len: np.ndarray) -> Found:
    """Runs the automata over the masked tokens of each row, by a scan; ``piece_len`` is ``Vocabulary.length``."""
    owners = written(tokens, mask, len(piece_len) - 1)
    kinds, lengths = jnp.asarray(compiled.kind)[owners], jnp.asarray(piece_len)[owners]

    def step(carry, column):
        state, found, begin = carry
        kind, length = column
        follow, count, first, last = jnp.moveaxis(advance(compiled, kind, state), -1, 0)
        hit, at = count > 0, begin[:, None]
        found = Found(
            count=found.count + count,
            first_end=jnp.where(hit & (found.count == 0), at + first, found.first_end),
            last_end=jnp.where(hit, at + last, found.last_end),
        )
        return (follow, found, begin + length), None

    zero = jnp.zeros((tokens.shape[0], len(compiled.tag_len)), jnp.int32)
    start = (zero, Found(zero, zero - 1, zero - 1), zero[:, 0])
    return jax.lax.scan(step, start, (kinds.T, lengths.T))[0][1]


def find_answer(
    tokens: Int[Array, "N T"], mask: Bool[Array, "N T"], form: Format, piece_bytes: Sequence[bytes]
) -> Answer:
    """The answer of each row, if it has one well-formed answer.

    With a closing tag every tag that there is occurs exactly once, and in order; that is the format reward's rule of
    RLPR's code (R1, and R1_nothink without thinking tags). Without one, the last opening tag counts.

    Raises:
        ValueError: a format without an opening answer tag.
    """
    if not form.answer_open:
        raise ValueError("answer_open is empty: without a tag or mark that opens it there is no answer to find.")
    words = vocabulary(tuple(piece_bytes))
    compiled = automata(tuple(tag for tag in form if tag), tuple(piece_bytes))
    found = find(tokens, mask, compiled, words.length)
    size = jnp.array(compiled.tag_len)
    opening = len(compiled.tag_len) - (2 if form.answer_close else 1)
    once = found.count == 1
    if not form.answer_close:
        once = once.at[:, opening].set(found.count[:, opening] > 0)
    in_order = found.last_end[:, :-1] <= found.last_end[:, 1:] - size[None, 1:]
    formed = once.all(1) & in_order.all(1)

    owners = written(tokens, mask, len(piece_bytes))
    token_len = jnp.asarray(words.length)[owners]
    token_end = jnp.cumsum(token_len, axis=1, dtype=jnp.int32)
    end = found.last_end[:, -1] - size[-1] if form.answer_close else token_end[:, -1]
    begin = jnp.where(formed, found.last_end[:, opening], 0)
    end = jnp.where(formed, end, 0)

    # A token's part of the answer is its bytes a..b; ink is what lies between the blanks at both ends of that part.
    token_begin = token_end - token_len
    a = jnp.clip(begin[:, None] - token_begin, 0, token_len)
    b = jnp.clip(end[:, None] - token_begin, 0, token_len)
    cut = jnp.asarray(words.cut)[owners]
    first = a + jnp.asarray(words.blank_after)[cut + a]
    last = b - jnp.asarray(words.blank_before)[cut + b]
    inked = first < b
    ink_begin = jnp.min(jnp.where(inked, token_begin + first, end[:, None]), axis=1)
    ink_end = jnp.max(jnp.where(inked, token_begin + last, ink_begin[:, None]), axis=1)
    return Answer(formed, begin, end, ink_begin, ink_end, token_len, token_end)
