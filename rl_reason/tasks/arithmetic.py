"""Integers: sums, differences, chains and powers modulo m, greatest common divisors, numeral systems."""

import math

import numpy as np

from rl_reason.tasks.base import Solution
from rl_reason.tasks.relation import Data, Relation, first_accepted, joined


def _of_digits(rng: np.random.Generator, num_digits: int) -> int:
    """Uniform over the integers of so many digits; one digit includes zero."""
    low = 0 if num_digits == 1 else 10 ** (num_digits - 1)
    return int(rng.integers(low, 10**num_digits))


def digit_pairs(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of both, units first, zero-filled to the same length."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True)]


def _sample_add(rng: np.random.Generator, num_digits: int) -> Data:
    return {"a": _of_digits(rng, num_digits), "b": _of_digits(rng, num_digits)}


def _ask_add(data: Data) -> str:
    return f"{data['a']}+{data['b']}="


def _work_add(data: Data) -> Solution:
    """Units first, ``digit+digit+carry=sum``: 47+85 is 7+5+0=12, then 4+8+1=13."""
    steps, carry = [], 0
    for x, y in digit_pairs(data["a"], data["b"]):
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return Solution(joined(steps, " "), str(data["a"] + data["b"]))


def _sample_sub(rng: np.random.Generator, num_digits: int) -> Data:
    b, a = sorted((_of_digits(rng, num_digits), _of_digits(rng, num_digits)))
    return {"a": a, "b": b}


def _ask_sub(data: Data) -> str:
    return f"{data['a']}-{data['b']}="


def _work_sub(data: Data) -> Solution:
    """Units first, ``digit-digit-borrow=difference``, ten lent where needed: 85-47 is 15-7-0=8, then 8-4-1=3."""
    steps, borrow = [], 0
    for x, y in digit_pairs(data["a"], data["b"]):
        lent = x - y - borrow < 0
        x += 10 * lent
        steps.append(f"{x}-{y}-{borrow}={x - y - borrow}")
        borrow = int(lent)
    return Solution(joined(steps, " "), str(data["a"] - data["b"]))


def _sample_mod(rng: np.random.Generator, num_ops: int, *moduli: int) -> Data:
    modulus = int(rng.choice(moduli))
    ops = []
    for _ in range(num_ops):
        sign = "+-*"[int(rng.integers(3))]
        ops.append(f"{sign}{int(rng.integers(2 if sign == '*' else 1, modulus))}")
    return {"modulus": modulus, "start": int(rng.integers(modulus)), "ops": ops}


def _ask_mod(data: Data) -> str:
    return f"{data['modulus']}:{data['start']},{joined(data['ops'])}="


def _work_mod(data: Data) -> Solution:
    """Left to right, reduced after each operation: modulo 10, ``7+5=2 2*3=6``."""
    value, steps = data["start"], []
    for op in data["ops"]:
        operand = int(op[1:])
        after = {"+": value + operand, "-": value - operand, "*": value * operand}[op[0]] % data["modulus"]
        steps.append(f"{value}{op}={after}")
        value = after
    return Solution(joined(steps, " "), str(value))


def _sample_gcd(rng: np.random.Generator, max_gcd: int, max_cofactor: int) -> Data:
    """The divisor is drawn first: of two random numbers it is 1 too often (0.61) to be worth asking."""
    common = int(rng.integers(1, max_gcd + 1))
    pair = first_accepted(
        lambda: rng.integers(2, max_cofactor + 1, size=2).tolist(), lambda p: p[0] != p[1] and math.gcd(*p) == 1
    )
    low, high = sorted(pair)
    return {"a": common * high, "b": common * low}


def _ask_gcd(data: Data) -> str:
    return f"{data['a']},{data['b']}="


def _work_gcd(data: Data) -> Solution:
    """Euclid: ``48%18=12 18%12=6 12%6=0``."""
    a, b, steps = data["a"], data["b"], []
    while b:
        steps.append(f"{a}%{b}={a % b}")
        a, b = b, a % b
    return Solution(joined(steps, " "), str(a))


PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def _sample_pow(rng: np.random.Generator, low: int, high: int, low_exponent: int, high_exponent: int) -> Data:
    modulus = int(rng.choice([p for p in PRIMES if low <= p <= high]))
    exponent = int(rng.integers(low_exponent, high_exponent + 1))
    return {"base": int(rng.integers(2, modulus)), "exponent": exponent, "modulus": modulus}


def _ask_pow(data: Data) -> str:
    return f"{data['base']}^{data['exponent']}%{data['modulus']}="


def _work_pow(data: Data) -> Solution:
    """Square, and multiply where the exponent's next bit is 1, reduced: 3^6 modulo 7 is ``3*3=2 2*3=6 6*6=1``."""
    base, modulus, value, steps = data["base"], data["modulus"], data["base"], []
    for bit in f"{data['exponent']:b}"[1:]:
        for factor in (value, base) if bit == "1" else (value,):
            after = value * factor % modulus
            steps.append(f"{value}*{factor}={after}")
            value = after
    return Solution(joined(steps, " "), str(value))


def _sample_base(rng: np.random.Generator, low: int, high: int, low_base: int, high_base: int) -> Data:
    return {"number": int(rng.integers(low, high + 1)), "base": int(rng.integers(low_base, high_base + 1))}


def _ask_base(data: Data) -> str:
    return f"{data['base']}:{data['number']}="


def _work_base(data: Data) -> Solution:
    """Quotient and remainder until nothing is left: 11 in base 2 is ``5r1 2r1 1r0 0r1``, read backwards."""
    number, steps, digits = data["number"], [], []
    while number:
        number, digit = divmod(number, data["base"])
        steps.append(f"{number}r{digit}")
        digits.append(digit)
    return Solution(joined(steps, " "), joined(reversed(digits), ""))


TASKS = (
    Relation("add", ((1,), (2,), (3,), (4,), (6,)), _sample_add, _ask_add, _work_add),
    Relation("sub", ((1,), (2,), (3,), (4,), (6,)), _sample_sub, _ask_sub, _work_sub),
    Relation(  # operations, then the moduli to draw from
        "mod",
        ((1, 10), (2, 7, 9, 10), (4, 7, 9, 10), (6, 7, 9, 10), (8, 7, 9, 10)),
        _sample_mod,
        _ask_mod,
        _work_mod,
    ),
    Relation("gcd", ((9, 9), (20, 30), (40, 40), (90, 99)), _sample_gcd, _ask_gcd, _work_gcd),
    Relation(
        "pow",
        ((7, 13, 2, 7), (11, 31, 4, 23), (17, 43, 24, 63), (31, 47, 64, 255)),
        _sample_pow,
        _ask_pow,
        _work_pow,
    ),
    Relation(
        "base",
        ((4, 31, 2, 4), (100, 999, 5, 9), (1000, 4999, 4, 9), (10_000, 49_999, 3, 9)),
        _sample_base,
        _ask_base,
        _work_base,
    ),
)
