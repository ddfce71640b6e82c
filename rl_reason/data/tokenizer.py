"""Text to token ids and back: a character-level sentencepiece model that is small enough for tiny models.

One id for a printed character, one for each task's name with its space, one for the answer mark, one for each of the
256 bytes that spell anything else. Since no piece joins what a prompt ends with and what a completion begins with, the
ids of both are the ids of the text; nothing is ever tokenised twice.
"""

import hashlib
import pathlib

import sentencepiece

EMBEDDED = pathlib.Path(__file__).with_name("embedded.model")
SPACE = "\u2581"  # how sentencepiece spells a space inside a piece


class Tokenizer:
    """Immutable; equal to another of the same fingerprint. ``decode(encode(text)) == text`` for any Unicode text."""

    def __init__(self, model: bytes):
        """Raises ValueError for bytes that are no model, or whose specials or byte pieces are missing."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"these {len(model)} bytes are no sentencepiece model") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
            self._model.pad_id(),
            self._model.bos_id(),
            self._model.eos_id(),
            self._model.unk_id(),
        )
        if self.pad_id != 0 or self.eos_id in (-1, self.pad_id):
            raise ValueError(f"pad must be id 0 and eos another id; they are {self.pad_id} and {self.eos_id}")
        self._byte_ids = tuple(self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        if self.unk_id in self._byte_ids:
            raise ValueError("the model lacks byte pieces; train it with byte_fallback")
        # What each id writes: its character, its word, its byte, or nothing for specials.
        self.piece_bytes = tuple(self._bytes_of(i) for i in range(self.vocab_size))

    @classmethod
    def load(cls, path: str | pathlib.Path = EMBEDDED) -> "Tokenizer":
        """Reads a model. Raises FileNotFoundError or ValueError, naming the file and the cure."""
        cure = f"rebuild it with `python -m experiments.build_tokenizer --out {path}`"
        try:
            return cls(pathlib.Path(path).read_bytes())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no tokenizer at {path}; {cure}.") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a usable tokenizer: {error}; {cure}.") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self):
        return Tokenizer, (self._model.serialized_model_proto(),)

    def encode(self, text: str) -> list[int]:
        """Ids without specials. Raises UnicodeEncodeError for lone surrogates, which no bytes spell."""
        text.encode()
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):  # sentencepiece would read its own spelling of a space as one
            if i:
                ids += (self._byte_ids[byte] for byte in SPACE.encode())
            ids += self._model.encode(part)
        return ids

    def decode(self, ids) -> str:
        """The bytes that the ids write, as UTF-8; what is no UTF-8 becomes U+FFFD.

        Specials write nothing, nor do ids outside the vocabulary, which a model with padded embeddings can emit.
        """
        pieces = self.piece_bytes
        return b"".join(pieces[int(i)] for i in ids if 0 <= i < self.vocab_size).decode("utf-8", errors="replace")

    def _bytes_of(self, i: int) -> bytes:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        piece = self._model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace(SPACE, " ").encode()
