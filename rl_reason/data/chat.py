"""Chat templates of checkpoints: jinja2 in a sandbox with what ``transformers`` gives templates, and frames for users' text.

A template is code that came with somebody's weights. It cannot reach Python's internals or change what it is given, and
its loops are counted; what it may still do is use memory.

What a template writes may hold special tokens, what a user wrote must not become one. Whether a character of the rendered
text was a user's cannot be seen in it, so every special's spelling inside the messages is framed before rendering by two
noncharacters of Unicode, which templates copy along. Afterwards the text is cut at specials without a frame, and all
between them is encoded as text, which is what ``transformers`` does of chats that spell no special. Of a frame that a
template cut through, the other half is left out.
"""

import dataclasses
import datetime
import functools
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from rl_reason.data.example import Message

OPEN, CLOSE = "\ufdd0", "\ufdd1"
MAX_ITERATIONS = 1_000_000  # of all loops of one rendering
BUDGET = " iterations left"  # a variable that no template can name
PROBE: Sequence[Message] = ({"role": "user", "content": "1+1="},)
# What Python raises where a template does with its values what they cannot do.
_MISUSE = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_CURE = "Mend the template, or set config.data.chat='plain' to go without."


class ChatError(ValueError):
    """A chat that the template does not take."""


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What a run adds to its chats."""

    system_prompt: str = ""  # of chats that do not begin with one; "": none
    variables: Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)  # as enable_thinking=False


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Renders chats into the text that a model reads, up to where its answer begins.

    Raises:
        ValueError: a template that does not compile, that does what the sandbox forbids, or writes nothing.
    """

    source: str
    where: str  # what errors name
    names: tuple[tuple[str, str], ...]  # bos_token and so on
    settings: ChatSettings

    def __post_init__(self):
        try:
            _compiled(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.where}, line {error.lineno}: no template: {error.message}. {_CURE}") from error
        if not self(PROBE).strip():
            raise ValueError(f"{self.where} renders a chat as nothing. {_CURE}")

    def __call__(self, messages: Sequence[Message]) -> str:
        """The chat as text, after the run's system prompt where it has none of its own.

        Raises:
            ChatError: messages that the template refuses, or none to answer.
            ValueError: code that the sandbox forbids.
        """
        if not messages or messages[-1]["role"] == "assistant":
            raise ChatError("the chat does not end with a message to answer")
        for message in messages:
            if not str(message["role"]).isidentifier():  # some templates make tokens of roles: '<|' + role + '|>'
                raise ChatError(f"the role {message['role']!r} is no name")
        if self.settings.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.settings.system_prompt}, *messages]
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        values = dict(self.names) | dict(tools=None, documents=None) | dict(self.settings.variables)
        values |= dict(messages=given, add_generation_prompt=True) | {BUDGET: [MAX_ITERATIONS]}
        try:
            return _compiled(self.source).render(values)
        except (SecurityError, OverflowError) as error:  # the latter of a range that is too long
            raise ValueError(f"{self.where} does what no chat template may: {error}. {_CURE}") from error
        except _MISUSE as error:
            raise ChatError(f"the template {self.where} refuses the chat: {error}") from error


class Frames:
    """Keeps apart the specials that a template writes from what users wrote the same."""

    def __init__(self, specials: Iterable[str]):
        any_of = lambda tokens: "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        framed, written = any_of({*specials, OPEN, CLOSE}), any_of(specials)
        self._to_frame = re.compile(framed)
        self._found = re.compile(f"{OPEN}({framed}){CLOSE}|({written})|[{OPEN}{CLOSE}]")

    def put(self, value: typing.Any) -> typing.Any:
        """The same value with every special framed in all its texts, and half frames that a user wrote framed too.

        >>> Frames(["<s>"]).put([{"content": "a<s>b"}]) == [{"content": f"a{OPEN}<s>{CLOSE}b"}]
        True
        """
        if isinstance(value, str):
            return self._to_frame.sub(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, Mapping):
            return {key: self.put(item) for key, item in value.items()}
        return [self.put(item) for item in value] if isinstance(value, list | tuple) else value

    def split(self, rendered: str) -> list[tuple[str, str]]:
        """A rendered chat as (text without frames, the template's special that follows it); the last has none, "".

        >>> frames = Frames(["<s>"])
        >>> frames.split("<s>" + frames.put("a<s>b"))
        [('', '<s>'), ('a<s>b', '')]
        """
        pieces, text, begin = [], "", 0
        for found in self._found.finditer(rendered):
            text, begin = text + rendered[begin : found.start()] + (found[1] or ""), found.end()
            if found[2]:
                pieces.append((text, found[2]))
                text = ""
        return [*pieces, (text + rendered[begin:], "")]


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what a model wrote: nothing in a prompt."""

    tags: typing.ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose loops are counted: one in another in another would otherwise never end."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = jinja2.nodes.Filter(
                loop.iter, "counted", [], [], None, None, lineno=loop.lineno, environment=self
            )
        return tree


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[typing.Any]) -> list[typing.Any]:
    listed, budget = list(items), context[BUDGET]
    budget[0] -= len(listed)
    if budget[0] < 0:
        raise SecurityError(f"its loops run more than {MAX_ITERATIONS:,} times")
    return listed


def _tojson(
    value: typing.Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> typing.NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


_ENVIRONMENT = _Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], autoescape=False
)
_ENVIRONMENT.filters |= dict(counted=_counted, tojson=_tojson)
_ENVIRONMENT.globals |= dict(raise_exception=_raise_exception, strftime_now=_strftime_now)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)
