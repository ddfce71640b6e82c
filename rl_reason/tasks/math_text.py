"""The text of mathematical answers: where a completion gives one, and one spelling for what is the same at a glance."""

import functools
import re

from rl_reason.tasks.base import ANSWER_MARK, extract_answer

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed|fbox)|\\[{}]|(?P<open>\{)|(?P<close>\})")


def last_box(text: str) -> str | None:
    r"""What is in the last ``\boxed`` or ``\fbox`` whose braces balance, stripped; None without one, or when it is empty.

    >>> last_box(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3")
    '\\frac{1}{2}'
    """
    return _last_box(text)[1] or None


def box_or_mark(text: str) -> str | None:
    """The last box, or what follows the last answer mark, whichever comes later; None when that is empty or truncated."""
    at, boxed = _last_box(text)
    if at >= text.rfind(ANSWER_MARK):
        return boxed or None
    answer = (extract_answer(text) or "").strip()
    return None if _BOX.search(answer) else answer or None


def _last_box(text: str) -> tuple[int, str]:
    """Where it starts and what is in it, stripped; (-1, '') without one. One pass; of nested boxes the inner one counts."""
    opened: list[tuple[int, int, bool]] = []  # start, where its contents start, is it a box
    best = (-1, 0, 0)
    for token in _BRACES.finditer(text):
        if token["box"] or token["open"]:
            opened.append((token.start(), token.end(), bool(token["box"])))
        elif token["close"] and opened:
            start, begin, box = opened.pop()
            if box:
                best = max(best, (start, begin, token.start()))
    return best[0], text[best[1] : best[2]].strip()


_NUMBER_IN_TEXT = re.compile(r"-?\d*\.?\d+", re.ASCII)


def box_or_words_or_number(text: str) -> str:
    """TTRL's first extraction: the last box, else the line after the last "answer is", else the last number, else ''."""
    if (boxed := last_box(text)) is not None:
        return boxed
    if said := list(re.finditer("answer is", text, re.IGNORECASE)):
        line = text[said[-1].end() :].strip().split("\n", 1)[0]
        return line.lstrip(": ").rstrip("./ ")
    numbers = _NUMBER_IN_TEXT.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", re.ASCII)
_INVISIBLE = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|q?quad)(?![A-Za-z])|\\[,;:! ]|(?<!\\)\\\$|\$|~"
)
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it|normal)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""One spelling for what is the same at a glance: no spaces, ``\left``, dollar signs, ``\text`` or trailing period.

    >>> normalise(r"$\dfrac{1}{2} \text{ cm}$."), normalise("1,234"), normalise("1, 2")
    ('\\frac{1}{2}cm', '1234', '1,2')
    """
    text = _TEXT.sub(r"\1", visible(text))
    text = re.sub(r"\s+", "", _BETWEEN_DIGITS.sub("\0", text)).replace("\0", " ")  # 1 2 is not 12
    return text.replace(",", "") if THOUSANDS.fullmatch(text) else text


def visible(text: str) -> str:
    """Without what only sets type: spaces of LaTeX's, sizes of brackets, dollar signs, a trailing period."""
    text = _INVISIBLE.sub(" ", text.replace("{,}", ","))
    return _FRACTION.sub(r"\\frac", text).strip().rstrip(".").strip()
