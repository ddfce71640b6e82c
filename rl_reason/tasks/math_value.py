"""The value of an answer, and when two are the same: latex2sympy reads, numbers are ours, math-verify does the rest.

Departures from ``math_verify.parse`` and ``verify`` 0.9 are in docs/papers.md, "Comparing answers". Nothing here calls
``eval``, ``parse_expr`` or ``sympify`` on text: digits become rational numbers by ``int``, which also keeps decimals exact.

math_verify, sympy and antlr take a second to import. They are imported with this module, so that no verdict's deadline
pays for it, and only those who compare mathematics import this module.
"""

import functools
import itertools
import math
import re
import typing
from collections.abc import Sequence

import math_verify.grader as grader
import sympy

# Private; but math-verify pins its version, and requirements.txt pins math-verify's.
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from sympy.core.function import AppliedUndef

from rl_reason.tasks.math_latex import UnreadableError, to_latex

MAX_DIGITS = 20_000  # of a number; 2023! has 5,811
MAX_SYMBOLIC_POWER = 10_000
HALF_UNIT = 5e-7  # of the sixth digit, after the decimal point or after the first significant digit
POINTS = 5  # where expressions with symbols are compared
_SAFE_NAME = re.compile(r"(?:math|vec|bar|hat|tilde)?\{?[A-Za-z0-9]{1,16}\}?(?:_\{?[A-Za-z0-9]{1,8}\}?)?", re.ASCII)

grader.TIMEOUT_WARNING_SHOWN = True  # it would log that timeouts are off: we are stopped from outside instead


class Value(typing.NamedTuple):
    """A sympy object, and whether a decimal was written in it: then it is known to six digits, else exactly."""

    expr: typing.Any
    decimal: bool


class _Reader(_Latex2Sympy):
    """Without ``sympy.Number(text)``, which evaluates the text, and without computing binomials as they are read."""

    def parse_number(self, text):
        whole, _, part = text.replace(",", "").partition(".")
        return sympy.Rational(int(whole + part or "0"), 10 ** len(part))

    def convert_binom(self, binom):
        return sympy.binomial(self.convert_expr(binom.upper), self.convert_expr(binom.lower), evaluate=False)


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Value | None:
    """The value of an answer; None when it is not one that may be read, or too large to compute with."""
    try:
        latex = to_latex(text)
    except (UnreadableError, RecursionError):
        return None
    try:
        expr = _Reader(is_real=True).parse(latex)
    except Exception:  # antlr's and sympy's errors are of many kinds, and each means that this is no formula
        return None
    if not isinstance(expr, sympy.Basic | sympy.MatrixBase) or not _harmless(expr):
        return None
    return Value(expr, bool(re.search(r"\d\.|\.\d", latex)))


def _harmless(expr: typing.Any) -> bool:
    """Of plain names, and of numbers that can be written down."""
    names = [symbol.name for symbol in expr.atoms(sympy.Symbol)]
    names += [str(f.func) for f in expr.atoms(AppliedUndef)]
    if not all(_SAFE_NAME.fullmatch(name) for name in names) or expr.has(sympy.nan, sympy.zoo):
        return False
    parts = expr.flat() if isinstance(expr, sympy.MatrixBase) else [expr]
    try:
        return all(_digits(part) <= MAX_DIGITS for part in parts)
    except OverflowError:
        return False


def _digits(expr: typing.Any) -> float:
    """At most so many digits has any number on the way to the value of ``expr``; a symbol has two, as at our points.

    Raises:
        OverflowError: when it is out of all bounds.
    """
    if isinstance(expr, sympy.Rational):
        return max(abs(expr.p).bit_length(), expr.q.bit_length()) * math.log10(2)
    if isinstance(expr, sympy.Symbol):
        return 2.0
    sizes = [_digits(argument) for argument in expr.args]
    largest = max(sizes, default=1.0)
    if largest > MAX_DIGITS:
        raise OverflowError
    if isinstance(expr, sympy.Mul):
        return sum(sizes)
    if isinstance(expr, sympy.Add):
        return largest + math.log10(len(sizes) + 1)
    if isinstance(expr, sympy.Pow | sympy.exp):
        base, power = (sizes[0], sizes[1]) if isinstance(expr, sympy.Pow) else (1.0, sizes[0])
        if expr.args[0].free_symbols and power > math.log10(MAX_SYMBOLIC_POWER):
            raise OverflowError
        return max(base, 0.31) * 10 ** min(power, 6.0)
    if isinstance(expr, sympy.factorial | sympy.binomial | sympy.gamma | sympy.Derivative):
        return max(1.0, largest) * 10 ** min(largest, 6.0)
    return largest


def same(gold: Value, answer: Value, scale: typing.Any = 1) -> bool:
    """Whether ``answer * scale`` is ``gold``, which comes first: equations and sets are read as it writes them."""
    expr = answer.expr
    if scale != 1:
        if not isinstance(expr, sympy.Expr):
            return False
        expr = sympy.Mul(expr, sympy.Rational(scale.numerator, scale.denominator), evaluate=False)
    try:
        return _same(gold.expr, expr, gold.decimal or answer.decimal)
    except Exception:  # sympy raises what it likes; what it cannot compare is not shown to be the same
        return False


def _same(gold: typing.Any, answer: typing.Any, decimal: bool) -> bool:
    """By parts where there are parts, each of them by ``_same_expression``, and by math-verify where that cannot tell."""
    gold, answer = _unwrapped(gold, answer)
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq) and gold.lhs == answer.lhs:
        return _same(gold.rhs, answer.rhs, decimal)
    chains = _chain(gold), _chain(answer)
    if all(chains) and len(chains[0]) == len(chains[1]):
        pairs = zip(*map(_forwards, chains), strict=True)
        if all(a[2] == b[2] and _same(a[0], b[0], decimal) and _same(a[1], b[1], decimal) for a, b in pairs):
            return True
    matrices = [(expr.shape, expr.flat()) for expr in (gold, answer) if isinstance(expr, sympy.MatrixBase)]
    if matrices:
        (shape, cells), (answer_shape, answer_cells) = matrices[0], matrices[-1]
        return len(matrices) == 2 and shape == answer_shape and _each(cells, answer_cells, decimal)
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        ends = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return ends and _each(gold.args[:2], answer.args[:2], decimal)
    several = _several(gold, answer)
    if several is not None:
        return several[0](*several[1:], decimal)
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        decided = _same_expression(gold, answer, decimal)
        if decided is not None:
            return decided
    return grader.verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)


def _unwrapped(gold: typing.Any, answer: typing.Any) -> tuple[typing.Any, typing.Any]:
    """Without ``x =`` where only one has it, as in math-verify: a gold equation is kept unless it names a value."""
    if grader.is_equation(answer) and not grader.is_equation(gold):
        answer = grader.take_last_relation(answer).rhs
    elif grader.is_assignment_relation(gold) and not grader.is_equation(answer):
        gold = grader.take_last_relation(gold).rhs
    return gold, answer


def _chain(expr: typing.Any) -> list[tuple[typing.Any, typing.Any, bool]]:
    """Inequalities as (smaller, larger, strict), whichever way they were written; empty for anything else."""
    links = getattr(expr, "_unsorted_args", ()) if isinstance(expr, grader.And) else (expr,)
    chain = []
    for link in links:
        if isinstance(link, sympy.StrictLessThan | sympy.LessThan):
            chain.append((link.lhs, link.rhs, isinstance(link, sympy.StrictLessThan)))
        elif isinstance(link, sympy.StrictGreaterThan | sympy.GreaterThan):
            chain.append((link.rhs, link.lhs, isinstance(link, sympy.StrictGreaterThan)))
        else:
            return []
    return chain


def _forwards(chain: list[tuple[typing.Any, typing.Any, bool]]) -> list[tuple[typing.Any, typing.Any, bool]]:
    """1 < x < 2 for 2 > x > 1 too: each link begins where the one before it ended."""
    backwards = len(chain) > 1 and all(a[0] == b[1] for a, b in itertools.pairwise(chain))
    return chain[::-1] if backwards else chain


def _several(gold: typing.Any, answer: typing.Any) -> tuple[typing.Any, ...] | None:
    """How to compare, and what: sets in any order, tuples in theirs; None when neither is one."""
    many = (sympy.FiniteSet, sympy.Tuple)
    if not isinstance(gold, many) and not isinstance(answer, many):
        return None
    lists = []
    for expr in (gold, answer):
        if isinstance(expr, sympy.Interval) and expr.is_open:  # (1, 2), which the grammar takes for an interval
            expr = sympy.Tuple(expr.start, expr.end)
        if isinstance(expr, sympy.Set) and not isinstance(expr, sympy.FiniteSet):
            return None
        lists.append(getattr(expr, "_unsorted_args", expr.args) if isinstance(expr, many) else (expr,))
    unordered = not any(isinstance(expr, sympy.Tuple | sympy.Interval) for expr in (gold, answer))
    return (_matched if unordered else _each), *lists


def _each(gold: Sequence, answer: Sequence, decimal: bool) -> bool:
    return len(gold) == len(answer) and all(_same(g, a, decimal) for g, a in zip(gold, answer, strict=True))


def _matched(gold: Sequence, answer: Sequence, decimal: bool) -> bool:
    """Each of one is another of the other: taken greedily, which is right where sameness is transitive."""
    left = list(answer)
    for item in gold:
        partner = next((i for i, other in enumerate(left) if _same(item, other, decimal)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


def _same_expression(gold: typing.Any, answer: typing.Any, decimal: bool) -> bool | None:
    """By value, at points if there are symbols; None when no value was to be had."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        return _same_number(gold, answer, decimal)
    if sympy.Symbol in (type(gold), type(answer)) and grader.sympy_compare_symbols(gold, answer):
        return True  # \text{AB} and AB
    for point in range(POINTS):
        at = {symbol: _coordinate(point, number) for number, symbol in enumerate(symbols, start=1)}
        g, a = gold.subs(at), answer.subs(at)
        g_number, a_number = sympy.N(g, 15), sympy.N(a, 15)
        if not (g_number.is_number and g_number.is_finite and a_number.is_number and a_number.is_finite):
            return None
        if not _same_number(g, a, decimal=False):
            return False
    return True


def _coordinate(point: int, number: int) -> typing.Any:
    """Of both signs, so that |x| is not x; fractions between 1 and 7, so that powers of powers stay small."""
    return sympy.Rational((-1) ** (point * number) * (4 + 3 * number + 11 * point), 3 + 2 * number + point)


def _same_number(gold: typing.Any, answer: typing.Any, decimal: bool) -> bool:
    """Equal, or as a written decimal can be: within half a unit of the sixth digit, counted from the first that is not 0.

    math-verify counts six digits from the decimal point alone, so that all small numbers are one.
    """
    gold, answer = gold.doit(), answer.doit()
    if gold == answer:
        return True
    if gold.is_infinite or answer.is_infinite:
        return False
    if gold.is_Rational and answer.is_Rational and not decimal:
        return False
    difference, size = (sympy.Abs(sympy.N(e, 30, maxn=2000)) for e in (gold - answer, gold))
    if not (difference.is_Float or difference.is_zero) or not (size.is_Float or size.is_zero):
        return False
    if difference <= 1e-25 * size or getattr(difference, "_prec", 1) == 1:  # no digit of it is known: it is 0
        return True
    if not decimal or size.is_zero:
        return False
    return bool(difference <= HALF_UNIT * min(1.0, 10.0 ** (math.floor(sympy.log(size, 10).evalf()) + 1)))


def simplified(value: Value) -> str:
    """The text of the simplified formula, as a key; '' when it has none."""
    try:
        return str(sympy.simplify(value.expr))
    except Exception:
        return ""
