r"""What judges and task environments say, read exactly as their users' code reads it, traps included.

CompassVerifier (arXiv:2508.03686) replies A for correct, B for incorrect, C for invalid. Its notebook and xtuner read that
differently. InternBootcamp's base class turns a verifier's return value into a score, and tells False from 0.

These are for comparison with published numbers. The loop's own judges answer in graph (``rl_reason/judges.py``), where what
cannot be read is invalid, never wrong.
"""

import re

BOXED = re.compile(r"\\boxed\{\s*([A-C])\s*\}")
PARENTHESISED = re.compile(r"\(([A-C])\)")
THINK_CLOSE = "</think>"


def compass_letter(reply: str) -> str | None:
    r"""CompassVerifier's notebook: a boxed letter, a bare one, one in parentheses, else the last A, B or C anywhere.

    The last rule is the trap: the C of ``CORRECT`` is a letter too, so that a judge who says the word says "invalid".

    >>> [compass_letter(x) for x in ("A", "(A)", r"\boxed{A}", "CORRECT", "A: CORRECT", "no idea")]
    ['A', 'A', 'A', 'C', 'C', None]
    """
    reply = reply.strip()
    if boxed := BOXED.findall(reply):
        return boxed[-1]
    if reply in ("A", "B", "C"):
        return reply
    if framed := PARENTHESISED.findall(reply):
        return framed[-1]
    letters = re.findall("[A-C]", reply)
    return letters[-1] if letters else None


def compass_score(reply: str) -> float:
    """1 for A; 0 for B, for C and for what is no reply."""
    return float(compass_letter(reply) == "A")


def one_token_reward(reply: str, *, finished: bool) -> float:
    """xtuner's reward from a judge that is given one output token: 1 for exactly A around blanks, else -1.

    An answer that did not finish gets -1 whatever the judge says.

    >>> [one_token_reward(x, finished=True) for x in ("A", " A", "a", "A:", "C")]
    [1.0, 1.0, -1.0, -1.0, -1.0]
    """
    return 1.0 if finished and reply.strip() == "A" else -1.0


def judged_part(response: str, *, max_lines: int, max_chars: int) -> str:
    r"""What xtuner shows a judge: after the thinking, the last ``max_lines`` lines, of those the last ``max_chars``.

    >>> judged_part("<think>1</think>so\nit is\n42", max_lines=2, max_chars=5)
    'is\n42'
    """
    lines = response.rpartition(THINK_CLOSE)[2].strip().splitlines()
    return "\n".join(lines[-max_lines:])[-max_chars:]


def bootcamp_score(response: str, returned: object, *, extracted: bool, format_score: float, min_chars: int) -> float:
    """InternBootcamp's score of a response for which its task's verifier ``returned`` a value.

    0 below ``min_chars`` characters or without the end of the thinking; 0 where no answer could be ``extracted``;
    ``format_score`` from there on: True becomes 1, a number counts as it is. Two traps, as in the code: the number 0 gives
    0, but False, which is no number there, trips an assertion and keeps ``format_score``; so does numpy's bool, a true one
    too.

    >>> thought = "<think>" + "." * 100 + "</think>"
    >>> score = lambda x: bootcamp_score(thought, x, extracted=True, format_score=0.1, min_chars=100)
    >>> [score(x) for x in (True, False, 0, 0.4)]
    [1.0, 0.1, 0.0, 0.4]
    """
    if len(response) < min_chars or THINK_CLOSE not in response or not extracted:
        return 0.0
    if returned is True:
        return 1.0
    return float(returned) if type(returned) in (int, float) else format_score  # type: ignore[arg-type]
