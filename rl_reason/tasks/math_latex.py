r"""LaTeX that may be parsed, from the text of an answer.

This is a list of what may be parsed, not of what may not: symbolic parsers and evaluators execute text where one does not
look for it (``sympy.sympify`` of a string; the names of the symbols in a sum, once it is evaluated). A command that is not
listed makes an answer text, and text is compared as text.
"""

import itertools
import re

from rl_reason.tasks.math_text import THOUSANDS, visible

MAX_LEN = 512  # characters; a longer answer is compared as text
MAX_DEPTH = 16  # brackets in brackets: the parser's time grows with the square of it, to about a second
MAX_EXPONENT = 4000  # of ten, in 1e4000


class UnreadableError(ValueError):
    """Text that is not among what may be parsed."""


_TOKENS = re.compile(
    r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+(?![\w.]))?)|(?P<command>\\(?:[A-Za-z]+|.))|(?P<word>[A-Za-z]+)"
    r"|(?P<operator>\*\*|<=|>=|!=|==|[-+*/^_=<>(){}\[\]|!,;:&%])|(?P<space>\s+)",
    re.ASCII,
)
_UNICODE = {
    "√": r"\sqrt ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "−": "-", "–": "-",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "²": "^2", "³": "^3", "∪": r"\cup ", "∩": r"\cap ",
    "±": r"\pm ", "∈": r"\in ", "θ": r"\theta ", "∅": r"\emptyset ",
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)
_GREEK = {
    "alpha", "beta", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Delta", "Theta", "Lambda",
    "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega",
}  # fmt: skip
# Nothing that computes while it is parsed, and no sums: evaluating one compiles the names of its symbols.
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln",
}  # fmt: skip
_KEPT = {
    *_GREEK, *_FUNCTIONS, "cdot", "times", "div", "pm", "le", "leq", "ge", "geq", "ne", "neq", "in", "cup", "cap",
    "setminus", "infty", "emptyset", "lfloor", "rfloor", "lceil", "rceil",
}  # fmt: skip
_RENAMED = {
    "lt": "<", "gt": ">", "lvert": "|", "rvert": "|", "vert": "|", "varnothing": r"\emptyset", "lbrace": r"\{",
    "rbrace": r"\}", "gamma": r"\text{gammaletter}", "Gamma": r"\text{Gammaletter}",  # else Euler's constant
}  # fmt: skip
_SPELLED = {"pi": r"\pi", "inf": r"\infty", "infinity": r"\infty", "oo": r"\infty", "theta": r"\theta"}
_SYMBOL_OF = {"*": r"\cdot", "<=": r"\le", ">=": r"\ge", "!=": r"\ne", "==": "="}
_CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), r"\{": (r"\}",)}
_UPRIGHT = {"text", "textrm", "textbf", "textit", "textnormal", "mathrm", "mathbf", "mathit", "mbox", "operatorname"}
_ACCENTS = {"vec", "hat", "bar", "overline", "tilde", "mathbb", "mathcal"}
_MATRICES = {"matrix", "pmatrix", "bmatrix", "vmatrix"}


def to_latex(text: str) -> str:
    r"""LaTeX of listed commands only, from LaTeX or from ``sqrt(2)/2 + 3*x**2``.

    Raises:
        UnreadableError: for anything else: unlisted commands, words, unbalanced or deep brackets, long text.

    >>> to_latex("sqrt(2)/2 + x**-1")
    '\\sqrt{2} / 2 + x ^{- 1}'
    """
    text = visible(text)
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if not text or len(text) > MAX_LEN:
        raise UnreadableError(f"{len(text)} characters; an answer has 1 to {MAX_LEN}.")
    return _Translator(text.translate(_UNICODE_TABLE)).translate()


class _Translator:
    """One pass over the tokens; every method consumes what it returns the LaTeX of."""

    def __init__(self, text: str):
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            match = _TOKENS.match(text, at)
            if match is None:
                raise UnreadableError(f"character {text[at]!r}.")
            if match.lastgroup != "space":
                self._tokens.append((str(match.lastgroup), match[0]))
            at = match.end()
        self._at, self._depth = 0, 0

    def translate(self) -> str:
        return self._until(())[0]

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _next(self) -> tuple[str, str]:
        if self._at == len(self._tokens):
            raise UnreadableError("it ends in the middle.")
        self._at += 1
        return self._tokens[self._at - 1]

    def _until(self, closers: tuple[str, ...]) -> tuple[str, str]:
        """Everything before one of ``closers``, or the end if there are none; and the closer."""
        parts = []
        while self._at < len(self._tokens):
            kind, token = self._next()
            if token in closers:
                return " ".join(filter(None, parts)), token
            if token in (")", "]", "}", r"\}"):
                break
            parts.append(self._item(kind, token))
        else:
            if not closers:
                return " ".join(filter(None, parts)), ""
        raise UnreadableError("its brackets do not balance.")

    def _bracket(self, opener: str) -> tuple[str, str]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise UnreadableError(f"brackets in brackets, more than {MAX_DEPTH} of them.")
        inside = self._until(_CLOSERS[opener])
        self._depth -= 1
        return inside

    def _item(self, kind: str, token: str) -> str:
        if kind == "number":
            return self._number(token)
        if kind == "word":
            return self._word(token)
        if kind == "command":
            return self._command(token[1:])
        return self._operator(token)

    def _number(self, token: str) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at][0] == "number":
            raise UnreadableError("two numbers without an operator.")
        if self._peek() in ("%", r"\%"):
            self._next()
            return rf"({_scientific(token)} \cdot \frac{{1}}{{100}})"
        return _scientific(token)

    def _word(self, word: str) -> str:
        if word == "sqrt":
            return rf"\sqrt{{{self._argument()}}}"
        if word == "exp":
            return f"e^{{{self._argument()}}}"
        if word == "abs":
            return f"|{self._argument()}|"
        if word in ("and", "or"):
            return ","
        if word in _FUNCTIONS:
            return rf"\{word}"
        if word in _SPELLED:
            return _SPELLED[word]
        if len(word) > 3:
            raise UnreadableError(f"the word {word!r}.")
        return " ".join(word)

    def _operator(self, token: str) -> str:
        if token in ("^", "**"):
            return f"^{{{self._argument()}}}"
        if token == "_":
            subscript = self._argument().replace(" ", "")
            if not re.fullmatch(r"[A-Za-z0-9]{1,8}", subscript, re.ASCII):
                raise UnreadableError(f"the subscript {subscript!r}.")
            return f"_{{{subscript}}}"
        if token in _CLOSERS:
            return self._group(token)
        if token == "%":
            raise UnreadableError("a percent sign without a number.")
        return _SYMBOL_OF.get(token, token)

    def _group(self, opener: str) -> str:
        before = self._tokens[self._at - 2] if self._at > 1 else ("", "")
        inside, closer = self._bracket(opener)
        if opener == "{":
            if "," in inside:
                return rf"\{{{inside}\}}"
            opener, closer = "(", ")"
        if (before[0] == "number" or before[1] == ")") and re.fullmatch(r"[-\d. ]+", inside):
            return rf"\cdot ({inside})"  # 2(3) is 6; to the grammar it is a mixed number, 2 and 3/1
        return inside if opener + closer == "()" and _is_group(inside) else f"{opener}{inside}{closer}"

    def _command(self, name: str) -> str:
        if name in ("frac", "binom", "dbinom", "tbinom"):
            over, under = self._argument(one_digit=True), self._argument(one_digit=True)
            return rf"\{'frac' if name == 'frac' else 'binom'}{{{over}}}{{{under}}}"
        if name == "sqrt":
            root = ""
            if self._peek() == "[":
                self._next()
                root = f"[{self._bracket('[')[0]}]"
            return rf"\sqrt{root}{{{self._argument(one_digit=True)}}}"
        if name == "{":
            return rf"\{{{self._bracket(chr(92) + '{')[0]}\}}"
        if name in ("begin", "end"):
            environment = self._name()
            if environment not in _MATRICES:
                raise UnreadableError(f"the environment {environment!r}.")
            return rf"\{name}{{{environment}}}"
        if name in _UPRIGHT:
            return self._upright(self._name())
        if name in _ACCENTS:
            return rf"\{name}{{{self._name()}}}"
        if name == "\\":
            return "\\\\"
        if name in _RENAMED:
            return _RENAMED[name]
        if name not in _KEPT:
            raise UnreadableError(f"the command {name!r}.")
        return rf"\{name}"

    def _upright(self, name: str) -> str:
        if name in ("and", "or"):
            return ","
        if name in _FUNCTIONS:
            return rf"\{name}"
        return name if len(name) == 1 else rf"\text{{{name}}}"

    def _name(self) -> str:
        """Letters and digits in braces, or one of them without."""
        kind, token = self._next()
        if token != "{":
            parts = [(kind, token)]
        else:
            parts = []
            while self._peek() != "}":
                parts.append(self._next())
            self._next()
        name = "".join(part for _, part in parts)
        if not re.fullmatch(r"[A-Za-z0-9]{1,16}", name, re.ASCII):
            raise UnreadableError(f"the name {name!r}.")
        return name

    def _argument(self, one_digit: bool = False) -> str:
        r"""What ``^``, ``\sqrt`` and the like apply to: a group, or one item, with its sign."""
        kind, token = self._next()
        if token in ("{", "("):
            return self._bracket(token)[0]
        if token in ("-", "+"):
            return f"{token} {self._argument()}"
        if kind == "number" and one_digit and len(token) > 1:  # \frac12 is a half
            if not token.isdigit():
                raise UnreadableError(f"{token!r} where one digit is expected.")
            self._at -= 1
            self._tokens[self._at] = (kind, token[1:])
            return token[0]
        if kind == "number":
            return _scientific(token)
        if kind == "word" and len(token) > 1 and token not in _SPELLED and token != "sqrt":
            self._at -= 1  # x^ab is x^a b
            self._tokens[self._at] = (kind, token[1:])
            return token[0]
        if kind == "operator":
            raise UnreadableError(f"{token!r} where an argument is expected.")
        return self._item(kind, token)


def _is_group(latex: str) -> bool:
    """Whether it is one pair of parentheses and what they hold, without a comma."""
    if not latex.startswith("(") or "," in latex:
        return False
    depths = list(itertools.accumulate({"(": 1, ")": -1}.get(character, 0) for character in latex))
    return depths.index(0) == len(latex) - 1 if 0 in depths else False


def _scientific(token: str) -> str:
    digits, _, exponent = token.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_EXPONENT:
        raise UnreadableError(f"an exponent of more than {MAX_EXPONENT}.")
    return rf"({digits} \cdot 10^{{{int(exponent)}}})" if exponent else digits
