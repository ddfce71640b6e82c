"""What a user's row means: verl's columns, or TRL's ``prompt`` and free columns."""

import contextlib
import dataclasses
import json
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence

from rl_reason.data.example import Message
from rl_reason.data.rows import BadRowError, Row
from rl_reason.tasks.base import Problem

AUTO = "auto"
VERL_ANSWER = "reward_model.ground_truth"
ANSWER_COLUMNS = ("answer", "ground_truth", "solution", "label", "target")
SPLIT_WORDS = {"train": "train", "training": "train"} | dict.fromkeys(
    ("heldout", "test", "val", "valid", "validation", "dev", "eval"), "heldout"
)
TEMPLATE = "template"  # the chat that the tokenizer renders
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Keys:
    """Where a row keeps things; dots reach into mappings. None: not wanted."""

    prompt: str = "prompt"  # text, or a list of {role, content}
    answer: str | None = AUTO  # auto: verl's reward_model.ground_truth, else the one column of ANSWER_COLUMNS
    data_source: str = "data_source"  # default: the file's name
    extra_info: str = "extra_info"  # default: the columns that nothing else uses
    split: str | None = "extra_info.split"
    demonstration: str | None = None


class Prompt(typing.NamedTuple):
    """What a row asks: as text, and as the chat that it was given as, if it was one."""

    text: str
    messages: tuple[Message, ...] | None


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A row understood."""

    prompt: Prompt
    data_source: str
    split: str | None  # 'train', 'heldout', or not said
    demonstration: str | None
    reference: str | None
    problem: Problem
    verifier: str


def parse(
    row: Row, keys: Keys, *, name: str, verifier: str | Mapping[str, str], render: Callable[[Sequence[Message]], str]
) -> Parsed:
    """One row; ``name`` is the data source of a row that names none, ``render`` makes text of a chat.

    Raises:
        BadRowError: with the reason.
    """
    data_source = look_up(row, keys.data_source, name)
    if not isinstance(data_source, str) or not data_source:
        raise BadRowError(f"{keys.data_source} is {data_source!r}, not a name")
    answer_key = _answer_key(row, keys)
    answer = None if answer_key is None else look_up(row, answer_key, None)
    if answer_key is not None and answer is None:
        raise BadRowError(f"no {answer_key}; it has {', '.join(row)}")
    judge = _verifier(verifier, data_source)
    return Parsed(
        prompt=prompt_of(row, keys, render),
        data_source=data_source,
        split=_split(row, keys),
        demonstration=_demonstration(row, keys),
        reference=answer if answer is None or isinstance(answer, str) else json.dumps(answer),
        problem=_problem(judge, data_source, answer, _extra_info(row, keys, answer_key)),
        verifier=judge,
    )


def look_up(row: Row, key: str, default: typing.Any = _ABSENT) -> typing.Any:
    """The value at a dotted key; a column whose name has the dots itself wins; null counts as absent.

    >>> look_up({"a": {"b": 1}}, "a.b")
    1
    """
    value: typing.Any = row
    for part in [key] if key in row else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is not None:
        return value
    if default is _ABSENT:
        raise BadRowError(f"no {key}; it has {', '.join(row)}")
    return default


def _answer_key(row: Row, keys: Keys) -> str | None:
    if keys.answer != AUTO:
        return keys.answer
    if look_up(row, VERL_ANSWER, None) is not None:
        return VERL_ANSWER
    found = [column for column in ANSWER_COLUMNS if row.get(column) is not None]
    if len(found) == 1:
        return found[0]
    cure = "set data.answer_key to the column, or to None when the verifier needs no answer"
    if found:
        raise BadRowError(f"{' and '.join(found)} could each be the answer; {cure}")
    raise BadRowError(f"no answer among {', '.join(row)}; {cure}")


def prompt_of(row: Row, keys: Keys, render: Callable[[Sequence[Message]], str]) -> Prompt:
    """The prompt. Raises BadRowError when it is neither text nor a chat that ``render`` takes, or is empty."""
    prompt = messages = look_up(row, keys.prompt)
    if look_up(row, "images", None):
        raise BadRowError("it has images; prompts here are text")
    if isinstance(prompt, list):
        for message in prompt:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise BadRowError(f"{keys.prompt} has a message without text for role and content: {message!r:.80}")
        prompt = render(prompt)
    if not isinstance(prompt, str):
        raise BadRowError(f"{keys.prompt} is {type(prompt).__name__}, not text or a list of messages")
    if not prompt.strip():
        raise BadRowError(f"{keys.prompt} is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no tokenizer takes
        raise BadRowError(f"{keys.prompt} is not Unicode text: {error}") from error
    return Prompt(prompt, tuple(messages) if isinstance(messages, list) else None)


def _split(row: Row, keys: Keys) -> str | None:
    said = None if keys.split is None else look_up(row, keys.split, None)
    if said is None:
        return None
    if not isinstance(said, str) or said.lower() not in SPLIT_WORDS:
        raise BadRowError(
            f"{keys.split} is {said!r}; use {', '.join(SPLIT_WORDS)}, or data.split_key=None to split by content"
        )
    return SPLIT_WORDS[said.lower()]


def _demonstration(row: Row, keys: Keys) -> str | None:
    demonstration = None if keys.demonstration is None else look_up(row, keys.demonstration)
    if demonstration is None or isinstance(demonstration, str):
        return demonstration
    raise BadRowError(f"{keys.demonstration} is {type(demonstration).__name__}, not text")


def _extra_info(row: Row, keys: Keys, answer_key: str | None) -> typing.Any:
    extra_info = look_up(row, keys.extra_info, None)
    if extra_info is not None:
        return extra_info
    used = {key.split(".")[0] for key in (keys.prompt, keys.data_source, keys.demonstration, answer_key) if key}
    return {key: value for key, value in row.items() if key not in used}


def _verifier(verifier: str | Mapping[str, str], data_source: str) -> str:
    if isinstance(verifier, str):
        return verifier
    if data_source not in verifier:
        raise BadRowError(f"data.verifier has none for data_source {data_source!r}; it has {', '.join(verifier)}")
    return verifier[data_source]


def _problem(verifier: str, data_source: str, answer: typing.Any, extra_info: typing.Any) -> Problem:
    """What the verifier gets: ``compute_score``'s arguments, or for a registered task that task's own data."""
    if ":" in verifier:
        return Problem(data_source, 0, {"ground_truth": answer, "extra_info": extra_info})
    if isinstance(answer, str):
        with contextlib.suppress(json.JSONDecodeError):
            answer = json.loads(answer)
    if not isinstance(answer, dict):
        raise BadRowError(f"the verifier {verifier} is a task, so the answer must be the problem's data, an object")
    return Problem(verifier, 0, answer)


def plain_chat(messages: Sequence[Message]) -> str:
    """The messages' contents with a blank line between: for models without a chat template.

    Raises:
        BadRowError: when the last word is the assistant's, which leaves nothing to answer.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRowError("the chat does not end with a message to answer")
    return "\n\n".join(message["content"] for message in messages)


def chat_renderer(name: str) -> Callable[[Sequence[Message]], str]:
    """'plain', or the import path of a function from messages to text; 'template' shows as plain what a tokenizer renders.

    Raises:
        ValueError: when there is none.
    """
    if name in ("plain", TEMPLATE):
        return plain_chat
    try:
        render = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"data.chat={name!r}: {error}. Use 'plain', 'template' or 'module:function'.") from error
    if not callable(render):
        raise ValueError(f"data.chat={name!r} is not a function from messages to text.")
    return typing.cast(Callable[[Sequence[Message]], str], render)
