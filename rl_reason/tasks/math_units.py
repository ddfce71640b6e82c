"""Units at the end of an answer: whether two answers may be compared, and by which factor."""

import re
from fractions import Fraction

from rl_reason.tasks.math_text import visible

Unit = tuple[Fraction, tuple[tuple[str, int], ...]]  # a factor, and base units with their powers

_PREFIXES = dict(zip("fpnumckMGT", (-15, -12, -9, -6, -3, -2, 3, 6, 9, 12), strict=True)) | {"µ": -6, "μ": -6}
_SCALABLE = ("m", "g", "s", "Hz", "N", "J", "W", "V", "A", "Pa", "eV", "L", "C", "F", "T", "mol", "K", "Ω")
_LITERAL = {
    **{base: (Fraction(1), base) for base in _SCALABLE},
    **{p + base: (Fraction(10) ** e, base) for base in _SCALABLE for p, e in _PREFIXES.items()},
    **{name: (Fraction(seconds), "s") for name, seconds in (("min", 60), ("h", 3600), ("hr", 3600), ("sec", 1))},
    **{name: (Fraction(1), name) for name in ("in", "ft", "mi", "yd", "lb", "oz", "mph", "rad", "°", "$", "¢")},
    **{name: (Fraction(1, 100), "") for name in ("%", "pct")},
    "l": (Fraction(1), "L"),
    "cl": (Fraction(1, 100), "L"),
    "ml": (Fraction(1, 1000), "L"),
    "ohm": (Fraction(1), "Ω"),
    "deg": (Fraction(1), "°"),
    "day": (Fraction(86400), "s"),
}
_WORDS = {
    "meter": "m", "metre": "m", "gram": "g", "second": "s", "hertz": "Hz", "newton": "N", "joule": "J", "watt": "W",
    "volt": "V", "ampere": "A", "pascal": "Pa", "liter": "L", "litre": "L", "coulomb": "C", "farad": "F", "tesla": "T",
    "kelvin": "K", "minute": "min", "hour": "h", "degree": "°", "percent": "%", "percentage": "%", "dollar": "$",
    "cent": "¢", "inch": "in", "inche": "in", "feet": "ft", "foot": "ft", "mile": "mi", "yard": "yd", "pound": "lb",
    "ounce": "oz", "radian": "rad", "mole": "mol",
}  # fmt: skip
_WORD_PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "micro": "u", "nano": "n", "mega": "M", "giga": "G"}
_POWERS = str.maketrans({"²": "^2", "³": "^3"})
_UNIT = re.compile(r"(/|per(?![A-Za-z]))?([A-Za-zµμΩ°%$¢]+)(?:\^\{?(-?\d{1,2})\}?)?", re.ASCII)
_QUANTITY = re.compile(
    r"(?P<number>[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+(?![\w.])|\s*(?:\\times|\\cdot|[×*])\s*10\^\{?-?\d+\}?)?)"
    r"\s*(?P<unit>[A-Za-zµμΩ°%/][A-Za-zµμΩ°%/*^·{}²³\s\d.-]*)"
)
_UNIT_TEXT = re.compile(r"\\(?:text(?:rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])")
_DEGREES_OF = re.compile(r"°\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])\}?\s*$")
_SYMBOLS = {"", "e", "i", "d", "x", "y", "z", "and", "or", "pi"}  # in upright letters, but no units


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""A quantity's number or expression, and its unit if it names one: ``\text{...}`` after it, or a word after a number.

    >>> split_unit(r"5\sqrt{2} \text{ cm}")
    ('5\\sqrt{2}', (Fraction(1, 100), (('m', 1),)))
    >>> split_unit("2x")
    ('2x', None)
    """
    text = _DEGREES_OF.sub(r" deg\1", _DEGREES.sub("°", visible(text).replace("\\%", "%")))
    if (upright := _UNIT_TEXT.search(text)) and upright.start():
        head, tail = text[: upright.start()].strip(), text[upright.start() :]
        flat = re.sub(r"\\[A-Za-z]+", " ", tail).replace("{", "").replace("}", "")
        unit = _unit(flat, known_only=False)
        if unit and head[-1:] not in "=({[^_+-*/,<>" and flat.strip() not in _SYMBOLS:
            return head, unit
    if (plain := _QUANTITY.fullmatch(text)) and (unit := _unit(plain["unit"], known_only=True)):
        single = re.fullmatch(r"[A-Za-z]", plain["unit"])
        if not (single and text[plain.start("unit") - 1] != " "):  # 10 m has a unit; 10m may be ten times m
            return plain["number"], unit
    if text.endswith(("%", "°")):
        return text[:-1], _unit(text[-1], known_only=True)
    return text, None


def _unit(text: str, known_only: bool) -> Unit | None:
    """The factor and bases of ``kg m/s^2``; None when it is no unit. Unknown words are bases, of four letters if plain."""
    text = re.sub(r"(square|sq|cubic|cu)\.?\s+([A-Za-z]+)", _power_word, text.translate(_POWERS))
    factor, powers, end = Fraction(1), {}, 0
    for part in _UNIT.finditer(text):
        if text[end : part.start()].strip(" *·.") or (not part[0].strip()):
            return None
        end = part.end()
        known = _known(part[2])
        if known is None and known_only and len(part[2]) < 4:
            return None
        scale, base = known or (Fraction(1), part[2].lower().removesuffix("s"))
        power = int(part[3] or 1) * (-1 if part[1] else 1)
        factor *= scale**power
        if base:
            powers[base] = powers.get(base, 0) + power
    if not end or text[end:].strip(" *·."):
        return None
    return factor, tuple(sorted(powers.items()))


def _power_word(match: re.Match[str]) -> str:
    return f"{match[2]}^{2 if match[1].startswith('sq') else 3}"


def _known(name: str) -> tuple[Fraction, str] | None:
    if name in _LITERAL:
        return _LITERAL[name]
    word = name.lower().removesuffix("s")
    for prefix, letter in _WORD_PREFIXES.items():
        if word.startswith(prefix) and (base := _WORDS.get(word.removeprefix(prefix))) in _SCALABLE:
            return _LITERAL[letter + base]
    return _LITERAL.get(_WORDS.get(word, word)) or (_LITERAL.get(name.lower()) if len(name) > 1 else None)
