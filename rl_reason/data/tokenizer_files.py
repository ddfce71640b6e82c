"""What a checkpoint's folder says about its tokens: tokenizer.json, which specials do what, and the chat template.

    tokenizer.json            vocabulary, merges, how text is split
    tokenizer_config.json     names of specials, chat_template, add_bos_token
    generation_config.json    eos_token_id: one id, or all that end a completion
    chat_template.jinja       instead of a template in tokenizer_config.json

EOS is what tokenizer_config.json calls so, where generation_config.json does not disagree; else the first id there. A row is
padded with an id that no text has and that is not EOS: a padding token of the checkpoint's own, or another special.

Some vocabularies put a space in front of a text (Llama 2). That is taken out of tokenizer.json, and noted, because only what
begins a row has it.
"""

import dataclasses
import json
import logging
import pathlib
import typing
from collections.abc import Iterator, Mapping

Json = dict[str, typing.Any]
logger = logging.getLogger(__name__)
CONFIG, GENERATION, MODEL, TEMPLATE = (
    "tokenizer_config.json",
    "generation_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Specials:
    """Special tokens by what they are for."""

    eos_id: int
    stop_ids: tuple[int, ...]  # EOS first
    pad_id: int
    unk_id: int | None
    add_bos: bool | None  # None: as tokenizer.json's own post-processor does
    bos_id: int | None  # of the token called so, whether or not texts begin with it
    names: tuple[tuple[str, str], ...]  # bos_token and so on, for templates


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template and the file it stands in."""

    source: str
    where: str


@dataclasses.dataclass(frozen=True)
class Folder:
    """What was read of a folder."""

    model: str  # tokenizer.json for texts without anything around them
    byte_level: bool  # pieces are spelled in GPT-2's alphabet; otherwise they fall back to byte pieces
    space: (
        str  # where one is put before a text: 'never', 'first' in a row, 'each' piece between specials; and 'always',
    )
    # where the others leave out a piece that begins with a space
    specials: Specials
    template: Template | None


def read(folder: pathlib.Path) -> Folder:
    """Reads a folder that has a tokenizer.json.

    Raises:
        ValueError: naming the file, what is wrong with it, and the cure.
    """
    text = _text(folder / MODEL)
    model, config = _json(folder / MODEL, text), _json_if_there(folder / CONFIG)
    try:
        byte_level = _is_byte_level(model)
        specials = _specials(folder, model, config)
        added = _with_specials(model, specials)
        normalizer, before = _spaceless(model.get("normalizer"))
        splitter, after = _spaceless(model.get("pre_tokenizer"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / MODEL} is not laid out as one: {type(error).__name__}: {error}; copy it from the checkpoint again."
        ) from error
    own = dict(normalizer=normalizer, pre_tokenizer=splitter, added_tokens=added, truncation=None, padding=None)
    if model | own != model:
        text = json.dumps(model | own)
    return Folder(text, byte_level, before if after == "never" else after, specials, _template(folder, config))


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy it from the checkpoint again.") from error


def _json(path: pathlib.Path, text: str) -> Json:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is truncated or no JSON: {error}; copy it from the checkpoint again (a few lines that begin with "
            "'version https://git-lfs' are a pointer to the file: fetch it with git lfs pull)."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__}, not an object; copy it from the checkpoint again."
        )
    return found


def _json_if_there(path: pathlib.Path) -> Json:
    return _json(path, _text(path)) if path.is_file() else {}


def _specials(folder: pathlib.Path, model: Json, config: Json) -> Specials:
    added = model.get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added}
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    named = {key: _content(value) for key, value in config.items() if key.endswith("_token") and _content(value)}
    of = lambda name: ids.get(named.get(name, ""))

    stops = _generation_stops(folder)
    eos_id = of("eos_token")
    if stops and eos_id not in stops:
        eos_id = stops[0]
    if eos_id is None:
        raise ValueError(
            f"{folder} names no token that ends a text: put eos_token into {CONFIG}, or eos_token_id into {GENERATION}."
        )
    stop_ids = (eos_id, *(stop for stop in stops if stop != eos_id))
    pad_id = of("pad_token")
    if pad_id is None or pad_id == eos_id:
        taken = {*stop_ids, of("bos_token")}
        pad_id = _spare(folder, {name: i for name, i in special.items() if i not in taken})
    add_bos = config.get("add_bos_token")
    return Specials(eos_id, stop_ids, pad_id, of("unk_token"), add_bos, of("bos_token"), tuple(named.items()))


def _with_specials(model: Json, specials: Specials) -> list[Json]:
    """The added tokens, those that end and pad texts as special ones whatever it says of them.

    Raises:
        ValueError: ids that are no added tokens.
    """
    wanted, added = {*specials.stop_ids, specials.pad_id}, model.get("added_tokens") or []
    if missing := sorted(wanted - {token["id"] for token in added}):
        raise ValueError(
            f"{MODEL}: ids {missing}, which end or pad texts by {GENERATION} or {CONFIG}, are not among its added_tokens; "
            "is it another checkpoint's?"
        )
    return [token | dict(special=True) if token["id"] in wanted else token for token in added]


def _steps(part: Json | None) -> Iterator[Json]:
    """The steps of a normaliser, pre-tokenizer or decoder, those of sequences one by one."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for steps in (value for value in part.values() if isinstance(value, list) and part["type"] == "Sequence"):
        for step in steps:
            yield from _steps(step)


def _is_byte_level(model: Json) -> bool:
    """Raises ValueError for what is neither byte-level nor falls back to bytes."""
    encoding = model.get("model") or {}
    kind = encoding.get("type") or ("BPE" if "merges" in encoding else "missing")
    if kind != "BPE" or encoding.get("continuing_subword_prefix") or encoding.get("end_of_word_suffix"):
        raise ValueError(
            f"{MODEL}: its model is {kind}; byte-pair encodings without marks inside words are read, and no others."
        )
    decoders = [step["type"] for step in _steps(model.get("decoder"))]
    if "ByteLevel" not in decoders and not encoding.get("byte_fallback"):
        raise ValueError(
            f"{MODEL}: its decoder is {', '.join(decoders) or 'missing'} without byte_fallback, so that some texts have no "
            "ids; byte-level encodings and those with byte_fallback are read."
        )
    return "ByteLevel" in decoders


def _spaceless(part: Json | None) -> tuple[Json | None, str]:
    """A normaliser or pre-tokenizer without the space that it puts in front of a text, and where it did."""
    kind = None if part is None else part["type"]
    if part is None:
        return None, "never"
    if kind == "Sequence":
        key = next(key for key, steps in part.items() if isinstance(steps, list))
        steps, spaces = zip(*map(_spaceless, part[key]), strict=True)
        return part | {key: list(steps)}, next((space for space in spaces if space != "never"), "never")
    if kind == "Prepend":
        return part | dict(prepend=""), "always"
    if kind == "Metaspace" and (scheme := part.get("prepend_scheme", "always")) != "never":
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return kept | dict(prepend_scheme="never"), "first" if scheme == "first" else "each"
    if kind == "ByteLevel" and part.get("add_prefix_space"):
        return part | dict(add_prefix_space=False), "each"
    return part, "never"


def _content(token: typing.Any) -> str:
    """A token's text, from itself or from a description of it; "" for what is neither."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _generation_stops(folder: pathlib.Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json; () where neither has one."""
    for name in (GENERATION, "config.json"):
        given = _json_if_there(folder / name).get("eos_token_id")
        stops = () if given is None else tuple(given) if isinstance(given, list) else (given,)
        if not all(isinstance(stop, int) for stop in stops):
            raise ValueError(f"{folder / name}: eos_token_id={given!r} is neither an id nor a list of ids; mend it.")
        if stops:
            return stops
    return ()


def _spare(folder: pathlib.Path, free: Mapping[str, int]) -> int:
    """A special to pad with: one that is called so, else the last."""
    if not free:
        raise ValueError(
            f"{folder} has no token to pad with: its pad_token is missing or is its eos_token, and no special is left over. "
            f"Add one to {MODEL} and name it as pad_token in {CONFIG}."
        )
    called_so = [name for name in free if "pad" in name.lower()]
    name = (called_so or sorted(free, key=lambda name: free[name]))[-1]
    logger.warning(
        "%s: pad_token is missing or is eos_token; rows are padded with %s, id %d", folder, name, free[name]
    )
    return free[name]


def _template(folder: pathlib.Path, config: Json) -> Template | None:
    """chat_template.jinja, which wins as in transformers; else the one of tokenizer_config.json, of several the default."""
    if (folder / TEMPLATE).is_file():
        return Template(_text(folder / TEMPLATE), str(folder / TEMPLATE))
    given = config.get("chat_template")
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, dict):
        if "default" not in given:
            raise ValueError(
                f"{folder / CONFIG}: chat_template has {', '.join(map(str, given))} and no 'default'; name one so."
            )
        given = given["default"]
    if given is None:
        return None
    if not isinstance(given, str):
        raise ValueError(f"{folder / CONFIG}: chat_template is a {type(given).__name__}, not a text; mend it.")
    return Template(given, f"{folder / CONFIG} (chat_template)")
