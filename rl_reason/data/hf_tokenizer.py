"""Tokenizers of Hugging Face checkpoints: tokenizer.json through the ``tokenizers`` library, and their chat templates.

Byte-pair encodings of two kinds are read: byte-level ones (Qwen, Llama 3), whose pieces are spelled in GPT-2's alphabet of
256 printable characters, and those that fall back to byte pieces (Llama 2, Mixtral, Gemma), whose space is U+2581. Both
can write any text. With a normaliser (Qwen's is NFC) ``decode(encode(text))`` is the normalised text.

Some vocabularies put a space in front of a text (Llama 2). It belongs to what begins a row: ``prompt`` has it, ``encode``
never, so that the ids of a completion, a reference or a stop sequence write exactly that.
"""

import hashlib
import pathlib
import re

import tokenizers

from rl_reason.data import tokenizer_files
from rl_reason.data.chat import ChatSettings, ChatTemplate, Frames
from rl_reason.data.pieces import Asked, Pieces
from rl_reason.data.sentencepiece_tokenizer import SPACE
from rl_reason.data.tokenizer_files import CONFIG, MODEL, TEMPLATE, Folder, Specials

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that are their own letter
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTED)
ALPHABET = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}  # GPT-2's


class HFTokenizer(Pieces):
    """A checkpoint's tokenizer; with a template its prompts are chats.

    Special tokens write nothing and no text becomes one. Added tokens that are not special, as ``<think>``, are pieces like
    any other.
    """

    def __init__(self, folder: Folder, template: ChatTemplate | None = None):
        """Raises ValueError for a tokenizer.json that cannot be read, or that cannot write some text."""
        self._folder, self._template, specials = folder, template, folder.specials
        self._backend = _backend(folder.model)
        self._backend.encode_special_tokens = True  # as text
        added = self._backend.get_added_tokens_decoder()
        self._specials = {token.content: (i, token) for i, token in added.items() if token.special}
        self.special_ids = {name: i for name, (i, _) in self._specials.items()}
        self.piece_bytes = _piece_bytes(self._backend, folder.byte_level)
        self._spelled_space = _spelled(SPACE.encode(), self.piece_bytes)
        if not set(self.special_ids.values()).isdisjoint(self.encode("".join(self.special_ids))):
            raise ValueError("its merges make special tokens of plain text; no text may become one.")
        self._begin = _begin(self._backend, specials)
        self.bos_id = self._begin[0] if self._begin else None
        self.eos_id, self.stop_ids = specials.eos_id, specials.stop_ids
        self.pad_id, self.unk_id = specials.pad_id, specials.unk_id
        self._frames = Frames(self._specials)
        # Without names of files: a copy of a checkpoint is the same tokenizer.
        parts = (folder.model, folder.space, specials, template and (template.source, template.settings))
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def load(cls, folder: pathlib.Path, chat: ChatSettings | None = None) -> "HFTokenizer":
        """Reads a folder with a tokenizer.json; with ``chat``, its template too. Raises ValueError, naming file and cure."""
        read, template = tokenizer_files.read(folder), None
        if chat is not None:
            if read.template is None:
                raise ValueError(
                    f"{folder} has no chat template: no chat_template in {CONFIG} and no {TEMPLATE}. Put one there, "
                    "or set config.data.chat='plain'."
                )
            template = ChatTemplate(read.template.source, read.template.where, read.specials.names, chat)
        try:
            return cls(read, template)
        except ValueError as error:
            raise ValueError(f"{folder / MODEL}: {error}") from error

    def __reduce__(self):
        return HFTokenizer, (self._folder, self._template)

    def encode(self, text: str) -> list[int]:
        """Ids that write the text, no specials. Raises UnicodeEncodeError for lone surrogates, which no bytes spell."""
        text.encode()
        if self._folder.byte_level:
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):  # which it would take for a space
            ids += (self._spelled_space if i else []) + self._backend.encode(part, add_special_tokens=False).ids
        return ids

    def prompt(self, asked: Asked) -> list[int]:
        """What begins a row: of a text BOS, where the checkpoint has one, and its ids; of a chat what its template writes.

        With a template a text is a chat of one message. Nothing is put before what a template wrote, which has its own BOS.

        Raises:
            ValueError: a chat without a template; a ChatError for one that the template refuses.
        """
        if self._template is None:
            if not isinstance(asked, str):
                raise ValueError("a chat needs a template: set config.data.chat='template'.")
            return [*self._begin, *self.encode(self._spaced(asked, first=True))]
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        ids: list[int] = []
        strip = False  # some specials swallow the blanks around them
        for text, name in self._frames.split(self._template(self._frames.put(messages))):
            special, token = self._specials.get(name, (None, None))
            text = text.lstrip() if strip else text
            text = text.rstrip() if token is not None and token.lstrip else text
            ids += self.encode(self._spaced(text, first=not ids))
            ids += [] if special is None else [special]
            strip = token is not None and token.rstrip
        return ids

    def _spaced(self, text: str, *, first: bool) -> str:
        """The text with the space that the vocabulary puts before it, where it does."""
        space = self._folder.space
        wanted = space in ("each", "always") or (space == "first" and first)
        return f" {text}" if text and wanted and (space == "always" or text[0] != " ") else text


def _backend(model: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(model)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(
            f"tokenizers {tokenizers.__version__} cannot read it: {error}. Copy it from the checkpoint again, or install a "
            "newer version of the library."
        ) from error


def _piece_bytes(backend: tokenizers.Tokenizer, byte_level: bool) -> tuple[bytes, ...]:
    """What each id writes: nothing for specials and for numbers that are no id, an added token its content."""
    vocabulary, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    spell = _letters if byte_level else _spaced
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        if i not in added:
            pieces[i] = spell(piece)
        elif not added[i].special:
            pieces[i] = (piece if byte_level else piece.replace(SPACE, " ")).encode()
    return tuple(pieces)


def _letters(piece: str) -> bytes:
    try:
        return bytes(ALPHABET[letter] for letter in piece)
    except KeyError as error:
        raise ValueError(f"its piece {piece!r} has {error}, no letter of a byte-level encoding.") from error


def _spaced(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _spelled(text: bytes, pieces: tuple[bytes, ...]) -> list[int]:
    """The ids that write the text byte by byte. Raises ValueError for a vocabulary that cannot write any byte so."""
    single = {piece: i for i, piece in enumerate(pieces) if len(piece) == 1}
    missing = [byte for byte in range(256) if bytes([byte]) not in single]
    if missing:
        raise ValueError(f"no piece writes the byte 0x{missing[0]:02X} alone, so that some texts have no ids.")
    return [single[bytes([byte])] for byte in text]


def _begin(backend: tokenizers.Tokenizer, specials: Specials) -> tuple[int, ...]:
    """The ids that come before every text."""
    if specials.add_bos is not None:
        return (specials.bos_id,) if specials.add_bos and specials.bos_id is not None else ()
    bare, framed = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    return tuple(framed[: next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)])
