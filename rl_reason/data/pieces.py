"""What every tokenizer here has: ids that write bytes, and a fingerprint that says which tokenizer it is."""

import typing
from collections.abc import Iterable, Mapping, Sequence

from rl_reason.data.example import Message

Asked = str | Sequence[Message]  # what a prompt is made of: a text, or a chat that ends with what is to be answered


class Pieces:
    """Immutable, picklable, equal to another of the same fingerprint. Specials write nothing, all else its bytes."""

    fingerprint: str
    piece_bytes: tuple[bytes, ...]  # what each id writes, exactly
    pad_id: int
    bos_id: int | None  # None: nothing precedes a text
    eos_id: int  # ends a demonstration, and a completion
    stop_ids: tuple[int, ...]  # whatever ends a completion: EOS, and what else the checkpoint names
    unk_id: int | None
    special_ids: Mapping[str, int]  # by name

    @property
    def vocab_size(self) -> int:
        """All ids, those of specials and gaps included."""
        return len(self.piece_bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pieces) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def decode(self, ids: Iterable[typing.Any]) -> str:
        """The bytes that the ids write, as UTF-8; what is no UTF-8 becomes U+FFFD.

        Specials write nothing, nor do ids outside the vocabulary, which a model with padded embeddings can emit.
        """
        pieces = self.piece_bytes
        return b"".join(pieces[int(i)] for i in ids if 0 <= i < len(pieces)).decode("utf-8", errors="replace")
