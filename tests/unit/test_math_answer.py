r"""Mathematical answers: what is taken for one, which are the same, and that nothing in them is executed.

The faults of math-verify 0.9.0 that are mended or kept here are listed in docs/papers.md, "Comparing answers".
"""

import functools
import itertools
import subprocess
import sys
import time

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_reason.tasks import math_value
from rl_reason.tasks.base import Problem
from rl_reason.tasks.math_answer import answer_classes, compute_score, equivalent, extract, identify
from rl_reason.tasks.math_latex import UnreadableError, to_latex
from rl_reason.tasks.math_text import normalise
from rl_reason.tasks.math_units import split_unit
from rl_reason.verifier_pool import Job, VerifierPool
from rl_reason.verifier_worker import load_verifier

NAME = "rl_reason.tasks.math_answer:compute_score"


# Extraction


@pytest.mark.parametrize(
    ("text", "v1", "v2", "equivalence"),
    [
        (r"so \boxed{12}.", "12", "12", "12"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\fbox{3} and \boxed {4}", "4", "4", "4"),
        (r"\\boxed{5}", "5", "5", "5"),
        (r"\boxed{\boxed{5}}", "5", "5", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", r"\{1,2\}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right.", r"\left\{1\right.", r"\left\{1\right."),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", *[r"\begin{pmatrix}1\\{2}\end{pmatrix}"] * 3),
        (r"x = 7, \boxed{12", "12", None, None),  # truncated: v1 votes with the last number of the text
        (r"\boxed{1} and \boxed{2", "1", "1", "1"),
        (r"it is 3 \boxed{}", "3", None, None),
        (r"\boxed{2} then \boxed{ }", "2", None, None),
        ("The answer is: $5$.\nRight?", "$5$", None, None),
        ("answer is 1. Hence the final answer is 2.", "2", None, None),
        ("we get 1,234 at most", "1234", None, None),
        ("I do not know", "", None, None),
        ("", "", None, None),
        ("1+1=2#### 2 ", "2", None, "2"),
        (r"\boxed{1} #### 2", "1", "1", "2"),
        (r"#### 2 \boxed{1}", "1", "1", "1"),
        (r"\boxed{1} #### ", "1", "1", None),
        (r"#### \boxed{1", "1", None, None),
        ("boxed 3", "3", None, None),
    ],
)
def test_extract(text, v1, v2, equivalence):
    assert (extract(text, "v1"), extract(text, "v2"), extract(text, "equivalence")) == (v1, v2, equivalence)


@given(
    st.lists(
        st.sampled_from(["\\boxed{", "\\fbox {", "{", "}", "\\{", "\\\\", "####", "1", " ", "\n", "İ", "answer is"])
    )
)
def test_extract_never_raises(pieces):
    text = "".join(pieces)
    for rule in ("v1", "v2", "equivalence"):
        answer = extract(text, rule)
        assert answer is not None if rule == "v1" else answer != ""


BALANCED = st.recursive(
    st.text("ab1+ ", min_size=1),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + "}{".join(parts) + "}"),
    max_leaves=5,
)


@settings(max_examples=50)
@given(
    st.text(max_size=20),
    BALANCED.filter(str.strip),
    st.text("ab}{ \\", max_size=20).filter(lambda text: "box" not in text),
)
def test_the_last_complete_box_wins(before, inside, after):
    assert extract(f"{before} \\boxed{{0}}\\boxed{{{inside}}}{after}", "v2") == inside.strip()


@pytest.mark.parametrize("text", ["{", r"\boxed{", r"\boxed  ", "answer is ", "-1.", r"\boxed{}"])
def test_extract_takes_linear_time(text):
    begin = time.monotonic()
    for rule in ("v1", "v2", "equivalence"):
        extract(text * 100_000, rule)
    assert time.monotonic() - begin < 3  # a tenth of a second each where cores are idle


def test_an_unknown_rule_names_those_there_are():
    with pytest.raises(ValueError, match="no rule 'v3' for answers; there are v1, v2, equivalence"):
        extract("1", "v3")
    with pytest.raises(ValueError, match="no rule 'v3'"):
        answer_classes(["1"], "v3")


# Comparison: gold, answer, are they equivalent


def check(gold, answer, expected):
    assert equivalent(gold, answer) is expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("10 m", "10 cm", False),
        (r"10\text{ m}", "10 m", True),
        (r"10\,\mathrm{m}", "10 meters", True),
        (r"5\sqrt{2}\text{ cm}", r"5\sqrt2\mathrm{~m}", False),
        ("1 m", "100 cm", True),
        ("10 kHz", "10000 Hz", True),
        ("5 nm", r"5 \times 10^{-9} \text{ m}", True),
        ("3 m/s", r"3\ \mathrm{m\,s^{-1}}", True),
        ("10 m^2", "10 m", False),
        ("12 square meters", "12 m²", True),
        ("12 apples", r"12\text{ apples}", True),
        ("12 apples", "12 pears", False),
        ("10 cm", "10", True),  # a bare number takes the other's unit
        ("10", r"10\text{ cm}", True),
        (r"90^\circ", "90", True),
        (r"25^\circ\text{C}", r"25^{\circ}\mathrm{F}", False),
        ("2m", "2 m", True),  # the same at a glance
        ("2x", "x*2", True),
        ("10%", "10", False),  # a percentage is a hundredth, always
        (r"10\%", "0.1", True),
        ("50%", "1/2", True),
        ("10 percent", r"10\%", True),
        (r"0.5\%", "50%", False),
    ],
)
def test_units(gold, answer, expected):
    check(gold, answer, expected)


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("6.63e-34", "1.05e-34", False),
        (r"6.63 \times 10^{-34}", r"1.05 \times 10^{-34}", False),
        ("2^{-99}", "2^{-98}", False),
        ("2^-99", "2**-99", True),
        ("1.30e-34", "1.30e-34", True),
        (r"1.30 \times 10^{-34}", "1.3e-34", True),
        ("(6.63e-34, 1)", "(1.05e-34, 1)", False),
        ("x = 6.63e-34", "1.05e-34", False),
        ("6.63e-34 x", "1.05e-34 x", False),
        ("0", "1e-10", False),
        (r"\sqrt{2}\sqrt{3}-\sqrt{6}", "0", True),
        ("1/3", ".333333", True),
        ("1/3", ".333", False),
        ("1/30", ".033333", False),  # math-verify: True; five digits of a small number are five digits
        ("1/6", ".166667", True),
        (r"\pi", "3.141593", True),
        (r"\pi", "3.14", False),
        ("3.0e8", "2.998e8", False),
        ("9.8", "9.81", False),
        ("100", "100.0", True),
        ("2^{2023}", "2^{2023}-1", False),
    ],
)
def test_numbers(gold, answer, expected):
    check(gold, answer, expected)


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("1<x<2", "2>x>1", True),
        ("1<x<2", r"1 \le x<2", False),
        ("x>1", "1<x", True),
        ("1<x<2", "(1,2)", True),
        ("(1,2)", "1<x<2", True),
        (r"x \in [1,2)", "[1,2)", True),
        ("[1,2)", "[1,2]", False),
        ("1,2,3", "3,1,2", True),  # a list is a set
        ("1,2,3", "1,2", False),
        (r"\{1,2\}", "2, 1", True),
        ("(2,3)", "(3,2)", False),
        ("(1,2,3)", "(3,1,2)", False),
        (r"\pm 3", "3,-3", True),
        ("v=sqrt(2gh)", r"\sqrt{2gh}", True),
        ("x=5", "y=5", False),
        ("5", "x=5", True),
        ("2x+2y=4", "x+y=2", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1.0\\2\end{pmatrix}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False),
        ("AC", "CA", True),  # choices
        ("A", r"\text{(A)}", False),
        ("True", "true", True),
        ("True", "Yes", False),
        ("listen", "silent", False),  # words are no products of letters
        (r"\text{listen}", r"\text{silent}", False),
    ],
)
def test_relations_sets_and_words(gold, answer, expected):
    check(gold, answer, expected)


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("sqrt(2)/2", r"\frac{1}{\sqrt2}", True),
        ("3*x^2+1", "1+3x^{2}", True),
        ("(x+1)^2", "x**2 + 2x + 1", True),
        ("(x+1)(x-1)", "x^2-1", True),
        ("|x|", "x", False),
        ("2(3)", "6", True),  # math-verify: 5, a mixed number
        (r"2\frac12", "5/2", True),
        (r"\frac12", "0.5", True),
        (r"\dfrac{1}{2}", r"\tfrac{1}{2}", True),
        ("1,234", "1234", True),
        (r"\$1{,}234.50", "1234.5", True),
        (r"\binom{5}{2}", "5!/12", True),
        (r"\frac{1}{\sqrt{x+1}-\sqrt{x}}", r"\sqrt{x+1}+\sqrt{x}", True),
        (r"e^{2x}", "exp(x)^2", True),
        ("x^2", "x^3", False),
        ("x", "2x/2", True),
        ("", "", False),
        ("$$", "$$", False),
        (None, None, False),
        ("1", None, False),
        (r"\mystery{1}", r"\mystery{1}", True),  # as text
        (r"\mystery{1}", r"\mystery{2}", False),
    ],
)
def test_expressions(gold, answer, expected):
    check(gold, answer, expected)


def test_what_normalising_and_translating_leave():
    assert normalise(r" $\left( 1, \; 2 \right)$. ") == "(1,2)"
    assert normalise("1 2") == "1 2"
    assert to_latex("sin(x)**2") == r"\sin (x) ^{2}"
    assert split_unit("x")[1] is None and split_unit("5 xy")[1] is None
    for text in ("", "{", ")", "1 2", r"\sum_{n=1}^{3} n", "hello", "é", "x" * 1000, "(" * 20 + "1,2" + ")" * 20):
        with pytest.raises(UnreadableError):
            to_latex(text)


# Hostile text

HOSTILE = [
    "__import__('os').system('touch {path}')",
    r"\text{{__import__('os').system('touch {path}')}}",
    r"\variable{{__import__('os').system('touch {path}')}}",
    r"\sum_{{n=0}}^{{\infty}} \frac{{\variable{{__import__('os').system('touch {path}')}}^{{n}}}}{{n!}}",
    r"\operatorname{{exec}}(open('{path}', 'w'))",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: (yield)",
]
HUGE = [
    "9**9**9**9",
    "10^(10^10)",
    "((((9!)!)!)!)!",
    "9!!!!!!",
    "x^{x^{x^{x}}}",
    "1e999999999",
    "1e-999999999",
    r"\binom{10^9}{10^8}",
    r"\lfloor 10^{100000} \pi \rfloor",
    r"e^{e^{e^{e^{e}}}}",
    "9" * 5000,
    "{" * 100_000,
    "{" * 50_000 + "}" * 50_000,
    "(" * 200 + "1" + ")" * 200,
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "-" * 100 + "1",
    "2^" * 100 + "2",
    r"\frac{1}{0}",
    "0^{-1}",
]


_watchers: list[list[str]] = []  # an audit hook stays for good, so there is one, which mostly does nothing


def _audit(event, arguments):
    if _watchers and event == "exec" and arguments[0].co_filename.startswith(("<string>", "<lambdify")):
        _watchers[-1].append(f"{arguments[0].co_filename}: {arguments[0].co_names}")


@functools.cache
def _install_audit():
    for text in ("1", "(1, 2)", "x = 1"):  # imports that sympy puts off
        equivalent("5", text)
        equivalent("x + 5", text)
    sys.addaudithook(_audit)


@pytest.fixture
def executed():
    """What was executed that was text: by eval, exec, sympify and parse_expr, or lambdify."""
    math_value.read.cache_clear()
    _install_audit()
    _watchers.append([])
    yield _watchers[-1]
    _watchers.pop()


def test_executed_sees_what_sympy_executes(executed):
    sympy.Number("1.5")
    assert executed
    n = sympy.Symbol("n", integer=True)
    sympy.Sum(1 / sympy.factorial(n), (n, 0, sympy.oo)).evalf()
    assert any("lambdify" in text for text in executed)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_never_executed(text, tmp_path, executed):
    path = tmp_path / "executed"
    text = text.format(path=path)
    for gold in ("5", "x + 5"):
        assert not equivalent(gold, text)
        assert compute_score("s", rf"\boxed{{{text}}}", gold)["score"] == 0
    assert answer_classes([text, "5"], "v2") == [0, 1]
    assert not executed and not path.exists()


@pytest.mark.parametrize("text", ["1.5", r"\frac{3}{4}", "1,234", "2e-5", r"50\%", "(1, 2.5)", "f(x)=x", "x_1"])
def test_what_is_read_is_not_executed_either(text, executed):
    assert math_value.read(text) is not None
    assert equivalent("1/3 + x", text) is False
    assert not executed


def test_evaluating_a_sum_would_execute_the_names_of_its_symbols(capfd):
    # Why sums are not read, and names are checked: if this ever fails, sympy was mended.
    n = sympy.Symbol("n", integer=True)
    name = sympy.Symbol("__import__('os').system('echo executed')")
    sympy.Sum(name**n / sympy.factorial(n), (n, 0, sympy.oo)).evalf()
    assert "executed" in capfd.readouterr().out


@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:20])
def test_huge_answers_are_wrong_and_soon(text):
    begin = time.monotonic()
    assert not equivalent("5", text) and not equivalent("x+5", text)
    assert time.monotonic() - begin < 5  # most take milliseconds; the slowest are long, not large


def job(answer: str, truth: object) -> Job:
    return Job(NAME, rf"\boxed{{{answer}}}", Problem("source", 0, {"ground_truth": truth, "extra_info": None}))


def test_an_answer_that_keeps_sympy_busy_costs_its_own_verdict_alone():
    slow = job(r"\sin(x)^{50}+\cos(xy)^{51}=\tan(x)^{7}", "x^2+y^2=1")
    with VerifierPool(1, 3.0) as pool:
        right, hostile, busy, after = pool.score([job("0.5", "1/2"), job("9**9**9**9", "5"), slow, job("2", 3)])
    assert right == (1.0, True, "pred=0.5", (("extracted", 1.0),))
    assert hostile[:2] == (0.0, True) and after[:2] == (0.0, True)
    assert not busy.valid and "no verdict within 3 s" in busy.why


# Scores


@pytest.mark.parametrize(
    ("completion", "truth", "score", "extracted"),
    [
        (r"\boxed{0.5}", "1/2", 1, 1),
        ("1/4+1/4#### 1/2", 0.5, 1, 1),
        (r"\boxed{3}", 3, 1, 1),
        (r"\boxed{3}", ["2", 3], 1, 1),
        (r"\boxed{3}", r"$\boxed{3}$", 1, 1),
        (r"\boxed{4}", [2, 3], 0, 1),
        ("3", "3", 0, 0),
        (r"\boxed{", "", 0, 0),
    ],
)
def test_compute_score(completion, truth, score, extracted):
    returned = compute_score("source", completion, truth)
    assert (returned["score"], returned["extracted"]) == (score, extracted)
    verdict = load_verifier(NAME)(completion, Problem("source", 0, {"ground_truth": truth}))
    assert verdict.valid and verdict.score == score and dict(verdict.parts) == {"extracted": extracted}


@pytest.mark.parametrize("truth", [None, [], [None], {"a": 1}, [["1"]]])
def test_no_ground_truth_is_an_error_that_names_the_cure(truth):
    with pytest.raises(TypeError, match=r"ground_truth of 'source' is .* give text, a number, or a list"):
        compute_score("source", r"\boxed{1}", truth)


# Votes


def test_identify_compares_with_the_first_of_each_class():
    near = lambda a, b: abs(float(a) - float(b)) <= 1  # not transitive
    assert identify(["0", "1", "2", None, "3", "1"], near) == [0, 0, 1, -1, 1, 0]
    assert identify(["1", "0", "2"], near) == [0, 0, 0]
    assert identify([], near) == [] and identify([None], near) == [-1]
    asked = []
    identify(["a", "b", "c"], lambda first, text: bool(asked.append((first, text))))
    assert asked == [("a", "b"), ("a", "c"), ("b", "c")]  # the first of the class is gold


@pytest.mark.parametrize(
    ("rule", "classes"),
    [
        ("v1", [0, 0, 1, 2, 3, -1, 4, 5, 0]),
        ("v2", [0, 0, 0, 1, 2, -1, 0, 3, 0]),
        ("equivalence", [0, 0, 0, 1, -1, -1, 0, 2, 0]),
    ],
)
def test_answer_classes(rule, classes):
    texts = [r"\frac{1}{2}", r"$\dfrac{1}{2}$", "50%", "2"]
    texts += ["", None, r"\frac{2}{4}", "x+1", r"\frac{1}{2}."]
    assert answer_classes(texts, rule) == classes


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["1", "2", "1.0", "x", "1 m", None]), max_size=8))
def test_classes_are_numbered_as_they_appear(texts):
    for rule in ("v1", "v2", "equivalence"):
        classes = answer_classes(texts, rule)
        seen = [number for number in dict.fromkeys(classes) if number >= 0]
        assert seen == list(range(len(seen)))
        assert all((number == -1) == (text is None) for number, text in zip(classes, texts, strict=True))
        for (i, a), (j, b) in itertools.combinations(enumerate(texts), 2):
            assert a != b or classes[i] == classes[j]


def test_only_who_compares_mathematics_imports_sympy():
    code = "import sys, rl_reason.verifier_pool, rl_reason.tasks; print({'sympy', 'math_verify'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
