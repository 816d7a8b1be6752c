"""The value of a number or formula in LaTeX or plain: +, −, ·, /, powers, fractions, roots, π. Nothing is executed, and
nothing takes long: the tools whose rules need this call ``eval`` on what a model said."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_LONGEST = 100  # characters
_LARGEST = 4096  # bits of a power
_APART = re.compile(r"\d\s+\d")  # two numbers
_SPACES = re.compile(r"\\[,;:! ]|\\(?:left|right)(?![a-z])|[\s$~]")
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?")
_FRACTIONS = (r"\frac", r"\dfrac", r"\tfrac")
_TIMES = (r"\cdot", r"\times", "*", "·", "×")
Value = Fraction | float


class _UnreadableError(ValueError):
    """It is no such formula."""


def value(text: str) -> Value | None:
    """Exact where it is rational, a float where a root or π makes it another; ``None``: it is no such formula."""
    if _APART.search(text):
        return None
    text = _SPACES.sub("", text)
    if not text or len(text) > _LONGEST:
        return None
    try:
        reader = _Reader(text)
        found = reader.sum()
        return None if reader.rest or not math.isfinite(float(found)) else found
    except (_UnreadableError, ArithmeticError, RecursionError):
        return None


class _Reader:
    """Reads a formula from the left."""

    def __init__(self, text: str) -> None:
        self.rest = text

    def sum(self) -> Value:
        found = self.product()
        while self.rest[:1] in ("+", "-"):
            sign, self.rest = self.rest[0], self.rest[1:]
            other = self.product()
            found = found + other if sign == "+" else found - other
        return found

    def product(self) -> Value:
        found = self.signed()
        while True:
            if not self.rest.startswith("**") and self.take(*_TIMES):
                found = found * self.signed()
            elif self.take(r"\div", "/", "÷"):
                found = found / self.signed()
            elif self.rest[:1] in ("(", "\\"):  # 2\sqrt{3}, 2(3 + 1)
                found = found * self.power()
            else:
                return found

    def signed(self) -> Value:
        if self.take("-", "−"):
            return -self.signed()
        return self.signed() if self.take("+") else self.power()

    def power(self) -> Value:
        base = self.atom()
        if not self.take("^", "**"):
            return base
        exponent = self.signed()
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _LARGEST:
                raise _UnreadableError
            return base ** int(exponent)
        return _real(float(base) ** float(exponent))

    def atom(self) -> Value:
        for opened, closed in (("(", ")"), ("{", "}")):
            if self.take(opened):
                found = self.sum()
                if not self.take(closed):
                    raise _UnreadableError
                return found
        if self.take(*_FRACTIONS):
            over = self.group()
            return over / self.group()
        if self.take(r"\sqrt"):
            return self.root()
        if self.take(r"\pi", "π"):
            return math.pi
        match = _NUMBER.match(self.rest)
        if match is None:
            raise _UnreadableError
        self.rest = self.rest[match.end() :]
        return Fraction(match[0])

    def root(self) -> Value:
        degree = Fraction(2)
        if self.take("["):
            found = self.sum()
            if not self.take("]") or not isinstance(found, Fraction) or found.denominator != 1 or not 1 <= found <= 64:
                raise _UnreadableError
            degree = found
        inside = self.group()
        if isinstance(inside, Fraction) and inside >= 0:
            over, under = (_exact_root(part, int(degree)) for part in (inside.numerator, inside.denominator))
            if over is not None and under is not None:
                return Fraction(over, under)
        return _real(float(inside) ** (1 / float(degree)))

    def group(self) -> Value:
        """What follows \\frac and \\sqrt: in braces or in parentheses, or one digit."""
        if self.rest[:1] in ("{", "(", "\\"):
            return self.atom()
        digit, self.rest = self.rest[:1], self.rest[1:]
        if not digit.isdecimal():
            raise _UnreadableError
        return Fraction(digit)

    def take(self, *starts: str) -> bool:
        """Whether one of these comes next; then it is passed over."""
        for start in starts:
            if self.rest.startswith(start):
                self.rest = self.rest[len(start) :]
                return True
        return False


def _exact_root(number: int, degree: int) -> int | None:
    near = round(number ** (1 / degree)) if number < 2**1000 else math.isqrt(number)
    return next((root for root in (near - 1, near, near + 1) if root >= 0 and root**degree == number), None)


def _real(number: complex | float) -> float:
    if isinstance(number, complex):
        raise _UnreadableError
    return number
