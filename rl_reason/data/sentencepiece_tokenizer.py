"""Sentencepiece models; the embedded one is a character-level model that is small enough for tiny models.

It has one id for a printed character, one for each task's name with its space, one for the answer mark, one for each of
the 256 bytes that spell anything else. Since no piece of it joins what a prompt ends with and what a completion begins
with, the ids of both are the ids of the text.
"""

import hashlib
import pathlib

import sentencepiece

from rl_reason.data.pieces import Asked, Pieces

EMBEDDED = pathlib.Path(__file__).with_name("embedded.model")
SPACE = "\u2581"  # how sentencepiece spells a space inside a piece
PROBE = " a  b "  # survives only where nothing is normalised, stripped or put in front


class SentencePieceTokenizer(Pieces):
    """A model with byte pieces. ``decode(encode(text)) == text`` for any Unicode text."""

    def __init__(self, model: bytes):
        """Raises ValueError for bytes that are no model, that rewrite texts, or that lack specials or byte pieces."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"these {len(model)} bytes are no sentencepiece model") from error
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.pad_id, self.eos_id, self.unk_id = self._model.pad_id(), self._model.eos_id(), self._model.unk_id()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.stop_ids = (self.eos_id,)
        if self.pad_id != 0 or self.eos_id in (-1, self.pad_id):
            raise ValueError(f"pad must be id 0 and eos another id; they are {self.pad_id} and {self.eos_id}")
        self._byte_ids = tuple(self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        if self.unk_id in self._byte_ids:
            raise ValueError("the model lacks byte pieces; train it with byte_fallback")
        ids = range(self._model.vocab_size())
        self.special_ids = {self._model.id_to_piece(i): i for i in ids if self._is_special(i)}
        self.piece_bytes = tuple(self._bytes_of(i) for i in ids)
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ValueError(
                "the model rewrites texts; train it with the normalization rule 'identity', without add_dummy_prefix and "
                "remove_extra_whitespaces"
            )

    @classmethod
    def load(cls, path: str | pathlib.Path = EMBEDDED) -> "SentencePieceTokenizer":
        """Reads a model. Raises FileNotFoundError or ValueError, naming the file and the cure."""
        cure = f"rebuild it with `python -m experiments.build_tokenizer --out {path}`"
        try:
            return cls(pathlib.Path(path).read_bytes())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no tokenizer at {path}; {cure}.") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a usable tokenizer: {error}; {cure}.") from error

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model.serialized_model_proto(),)

    def prompt(self, asked: Asked) -> list[int]:
        """BOS and the text's ids. Raises ValueError for a chat: a sentencepiece model has no template to render it."""
        if not isinstance(asked, str):
            raise ValueError("a sentencepiece model has no chat template; render chats with data.chat='plain'.")
        return [*(() if self.bos_id is None else (self.bos_id,)), *self.encode(asked)]

    def encode(self, text: str) -> list[int]:
        """Ids without specials. Raises UnicodeEncodeError for lone surrogates, which no bytes spell."""
        text.encode()
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):  # sentencepiece would read its own spelling of a space as one
            if i:
                ids += (self._byte_ids[byte] for byte in SPACE.encode())
            ids += self._model.encode(part)
        return ids

    def _is_special(self, i: int) -> bool:
        return self._model.is_control(i) or self._model.is_unknown(i)

    def _bytes_of(self, i: int) -> bytes:
        if self._is_special(i):
            return b""
        piece = self._model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace(SPACE, " ").encode()
