r"""Mathematical answers: taken from completions, compared, and counted.

``config.data.verifier = "rl_reason.tasks.math_answer:compute_score"`` scores a source's rows against ``ground_truth``. The
vote over a group's answers is ``answer_classes``: under TTRL's two rules (arXiv:2504.16084; "v1" is the code of May 2025,
"v2" that of August), or by ``equivalent``. See docs/papers.md, "Comparing answers".

Answers are hostile text. Nothing in them is executed, and nearly everything returns at once; a formula that keeps sympy
busy is for the deadline of ``verifier_pool``, whose process can be killed. Do not call ``equivalent`` in a process that
cannot.
"""

import json
import typing
from collections.abc import Callable, Sequence

from rl_reason.tasks import math_value
from rl_reason.tasks.math_latex import MAX_LEN
from rl_reason.tasks.math_text import box_or_mark, box_or_words_or_number, last_box, normalise
from rl_reason.tasks.math_units import split_unit

_EXTRACT: dict[str, Callable[[str], str | None]] = {
    "v1": box_or_words_or_number,
    "v2": last_box,
    "equivalence": box_or_mark,
}


def extract(text: str, rule: str) -> str | None:
    r"""The answer that a completion gives; None when it gives none.

    "v1": the last box, else what follows "answer is", else the last number, else "", which votes like any other answer.
    "v2": the last box. "equivalence": the last box or what follows the last ``####``, whichever is later. A box whose
    braces do not balance was truncated and is no box; an empty one is no answer.

    Raises:
        ValueError: when there is no such rule.

    >>> extract(r"so \boxed{12}", "v2"), extract("so 12", "v2"), extract("so 12", "v1"), extract("1+1#### 2", "equivalence")
    ('12', None, '12', '2')
    """
    return _named(_EXTRACT, rule)(text)


def equivalent(gold: str | None, answer: str | None) -> bool:
    r"""Whether two answers mean the same. Gold comes first; it says how equations and sets are to be read.

    Units are compared where both name one, and scaled; a percentage is a hundredth. None and empty answers are equivalent
    to nothing, themselves included.

    >>> equivalent(r"\frac{1}{2}", "0.5"), equivalent("10 m", "10 cm"), equivalent("50%", "1/2"), equivalent("", "")
    (True, False, True, False)
    """
    if not gold or not answer or not normalise(gold) or not normalise(answer):
        return False
    if normalise(gold) == normalise(answer):
        return True
    if max(len(gold), len(answer)) > MAX_LEN:
        return False
    (gold_text, gold_unit), (text, unit) = split_unit(gold), split_unit(answer)
    scale = 1
    if gold_unit and unit and gold_unit[1] and unit[1]:
        if gold_unit[1] != unit[1]:
            return False
        scale = unit[0] / gold_unit[0]
    else:  # a bare number takes the other's unit, but a percentage is a number
        scale = (unit[0] if unit and not unit[1] else 1) / (gold_unit[0] if gold_unit and not gold_unit[1] else 1)
    gold_value, value = math_value.read(gold_text), math_value.read(text)
    if gold_value is None or value is None:
        return gold_value is value and normalise(gold).casefold() == normalise(answer).casefold()
    return math_value.same(gold_value, value, scale)


def compute_score(
    data_source: str, solution_str: str, ground_truth: typing.Any, extra_info: typing.Any = None
) -> dict[str, typing.Any]:
    """1 when the answer that a completion ends with is equivalent to ``ground_truth``, or to one of a list of them.

    Raises:
        TypeError: when there is no ground truth to compare with.
    """
    golds = list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not golds or any(gold is None or isinstance(gold, list | tuple | dict) for gold in golds):
        raise TypeError(
            f"ground_truth of {data_source!r} is {ground_truth!r}; give text, a number, or a list of them, of which any one "
            "is right."
        )
    answer = extract(solution_str, "equivalence")
    right = any(equivalent(last_box(str(gold)) or str(gold), answer) for gold in golds)
    return {"score": float(right), "extracted": float(answer is not None), "pred": answer or ""}


def identify(texts: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    """The class of each text, numbered as they first appear; -1 for None.

    A text belongs to the first class whose first member it is the same as. Sameness is not transitive (10 m, 10, 10 cm), so
    classes depend on the order of the texts, and members of one need not all be the same.

    >>> identify(["1", None, "2", "1.0"], lambda a, b: float(a) == float(b))
    [0, -1, 1, 0]
    """
    firsts: list[str] = []
    classes = []
    for text in texts:
        if text is None:
            classes.append(-1)
            continue
        number = next((i for i, first in enumerate(firsts) if same(first, text)), len(firsts))
        if number == len(firsts):
            firsts.append(text)
        classes.append(number)
    return classes


def answer_classes(texts: Sequence[str | None], rule: str) -> list[int]:
    """Classes of extracted answers, for a vote: -1 for None, the rest numbered as they first appear.

    "v1": by normalised text; "" is a class. "v2": by the text of the simplified formula. "equivalence": by ``equivalent``.

    Raises:
        ValueError: when there is no such rule.
    """
    key = _named({"v1": normalise, "v2": _simplified, "equivalence": normalise}, rule)
    keys = [None if text is None else key(text) for text in texts]
    texts_of = dict(zip(reversed(keys), reversed(texts), strict=True))  # the first text of each key
    distinct = [text for text in dict.fromkeys(keys) if text is not None]
    if rule == "equivalence":
        distinct = [text for text in distinct if text]  # nothing is equivalent to an empty answer: it has no vote
        numbers = identify([texts_of[text] for text in distinct], equivalent)
    else:
        numbers = range(len(distinct))
    class_of = dict(zip(distinct, numbers, strict=True))
    return [-1 if text is None else class_of.get(text, -1) for text in keys]


def group_classes(data_source: str, solution_str: str, ground_truth: str, extra_info: typing.Any = None) -> dict:
    """``answer_classes`` of a group's completions, for a pool that knows verdicts: a JSON list of texts in, the class of
    each as the verdict's parts. ``ground_truth`` is the rule."""
    del data_source, extra_info
    texts = [extract(text, ground_truth) for text in json.loads(solution_str)]
    classes = answer_classes(texts, ground_truth)
    return {"score": 1.0} | {str(place): number for place, number in enumerate(classes)}


def _simplified(text: str) -> str:
    value = math_value.read(text)
    return normalise(text) if value is None else math_value.simplified(value) or normalise(text)


def _named(table: dict[str, typing.Any], rule: str) -> typing.Any:
    if rule not in table:
        raise ValueError(f"no rule {rule!r} for answers; there are {', '.join(table)}.")
    return table[rule]
