r"""Functions that prove to be smooth: called once with bounds in place of numbers, they need not be sampled.

A number is replaced by an interval that contains it and by bounds on the derivatives of what it is a function of,

.. math:: |\partial_j^k f| \le S r_j^k, \qquad k = 1, \dots, 6,

over time (in units of the horizon) and along every axis (in units of the spread of the process). Constants have S = 0,
and sums, products and functions of such f have such bounds again:

- f + g: the sum of both S, the larger of both r;
- f g: :math:`\max(S_f, \sup|f|) \max(S_g, \sup|g|)`, :math:`r_f + r_g` (Leibniz);
- h(f) with :math:`|h^{(k)}| \le H \kappa^k` there: H and :math:`r_f (\kappa S_f + 3)`, since the Touchard polynomials
  of Faà di Bruno's formula are at most :math:`(\kappa S + 3)^k` up to k = 6; and :math:`\kappa |a_j|` for an affine f
  with slopes :math:`a_j`;
- exp(f) of a quadratic f that bends down by :math:`a_j^2` along every axis it depends on, and has a largest value:
  Gaussian bumps, with :math:`1.09\,e^{\max f}` and :math:`720^{1/12} a_j` (Cramér's bound of Hermite functions).

Comparisons are answered where intervals decide them (``np.maximum(v, 0)`` where v is not negative). Whatever else is
done with such a number, as a conversion or a comparison that is not decided, raises an error: then nothing is known of
the function, and it is sampled.
"""

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Derivatives of h up to the sixth on an interval: |h^(k)| ≤ H κ^k. Sine and cosine: 1, 1; tanh: its sixth derivative is
# at most 52 < 2⁶; arctan: 120 < (π/2) 2.22⁶; 1/u: k!/uᵏ⁺¹, 6! < 3⁶; √u: 945/64 < 1.6⁶; log u: 5! < 2.3⁶.
TANH, ARCTAN, INVERSE, ROOT, LOG = 2.0, 2.22, 3.0, 1.6, 2.3
# Cramér's bound of Hermite functions (Abramowitz & Stegun 1964, 22.14.17): |dᵏ exp(−½x²)| ≤ 1.09 √k!; √6! < 1.74⁶.
CRAMER, HERMITE = 1.09, 1.74
# Added to κS in the rate of a function of something that is not affine.
TOUCHARD = 3.0


class UndecidedError(TypeError):
    """What was asked for needs a number, and there are bounds only."""


class Bounds:
    """Interval [low, high] of a function of time and place, and bounds on its derivatives.

    Parameters
    ----------
    low, high : float
        Interval that contains all values.
    size : float
        S.
    rates : ndarray, shape (1 + d,)
        r: of time, and of each axis.
    slopes : ndarray or None
        Derivatives of an affine function.
    bends : ndarray or None
        Second derivatives of a quadratic function along the axes.
    least, most_anywhere : float
        Bounds of a quadratic function wherever it is taken, not in the box alone.
    """

    __slots__ = ("bends", "high", "least", "low", "most_anywhere", "rates", "size", "slopes")

    def __init__(
        self,
        low: float,
        high: float,
        size: float,
        rates: np.ndarray,
        slopes: np.ndarray | None,
        bends: np.ndarray | None = None,
        anywhere: tuple[float, float] = (-math.inf, math.inf),
    ) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(size)):
            raise UndecidedError("bounds that are not finite")
        self.low, self.high, self.size, self.rates, self.slopes = low, high, size, rates, slopes
        self.bends = np.zeros_like(rates) if bends is None and slopes is not None else bends
        self.least, self.most_anywhere = (low, high) if self.constant else anywhere

    @classmethod
    def affine(cls, low: float, high: float, slopes: np.ndarray) -> "Bounds":
        """Of a function with these slopes: the larger its size is taken, the smaller are its rates."""
        size = max(abs(low), abs(high), float(np.abs(slopes).max()))
        return cls(low, high, size, np.abs(slopes) / (size or 1.0), slopes)

    @property
    def most(self) -> float:
        """Largest modulus of the values and S."""
        return max(abs(self.low), abs(self.high), self.size)

    def _like(self, value: Any) -> "Bounds | None":
        """A number as bounds; None for what is no number."""
        if isinstance(value, Bounds):
            return value
        return self._number(float(value)) if isinstance(value, numbers.Real) else None

    def _number(self, value: float) -> "Bounds":
        """A number, among such as this."""
        zero = np.zeros_like(self.rates)
        return Bounds(value, value, 0.0, zero, zero)

    @property
    def constant(self) -> bool:
        """Whether it is a number."""
        return self.low == self.high and self.slopes is not None and not self.slopes.any()

    def __neg__(self) -> "Bounds":
        slopes, bends = (None if v is None else -v for v in (self.slopes, self.bends))
        anywhere = -self.most_anywhere, -self.least
        return Bounds(-self.high, -self.low, self.size, self.rates, slopes, bends, anywhere)

    def __pos__(self) -> "Bounds":
        return self

    def __add__(self, value: Any) -> Any:
        other = self._like(value)
        if other is None:
            return NotImplemented
        low, high = self.low + other.low, self.high + other.high
        if self.slopes is not None and other.slopes is not None:
            return Bounds.affine(low, high, self.slopes + other.slopes)
        bends = None if self.bends is None or other.bends is None else self.bends + other.bends
        anywhere = self.least + other.least, self.most_anywhere + other.most_anywhere
        return Bounds(low, high, self.size + other.size, np.maximum(self.rates, other.rates), None, bends, anywhere)

    __radd__ = __add__

    def __sub__(self, value: Any) -> Any:
        other = self._like(value)
        return NotImplemented if other is None else self + (-other)

    def __rsub__(self, value: Any) -> Any:
        return (-self) + value

    def __mul__(self, value: Any) -> Any:
        other = self._like(value)
        if other is None:
            return NotImplemented
        if other is self or _equal(self, other):
            return self**2
        if self.constant:
            self, other = other, self
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        if other.constant:
            c = other.low
            slopes, bends = (None if v is None else c * v for v in (self.slopes, self.bends))
            anywhere = (
                (c * self.least, c * self.most_anywhere) if c >= 0.0 else (c * self.most_anywhere, c * self.least)
            )
            rates = self.rates * (c != 0.0)
            return Bounds(min(ends), max(ends), abs(c) * self.size, rates, slopes, bends, anywhere if c else (0.0, 0.0))
        bends = None if self.slopes is None or other.slopes is None else 2.0 * self.slopes * other.slopes
        return Bounds(min(ends), max(ends), self.most * other.most, self.rates + other.rates, None, bends)

    __rmul__ = __mul__

    def __truediv__(self, value: Any) -> Any:
        other = self._like(value)
        return NotImplemented if other is None else self * other.reciprocal()

    def __rtruediv__(self, value: Any) -> Any:
        return self.reciprocal() * value

    def __pow__(self, exponent: Any) -> Any:
        if isinstance(exponent, Bounds) and exponent.constant:
            exponent = exponent.low
        if not isinstance(exponent, numbers.Real):
            return NotImplemented
        power = float(exponent)
        if not power.is_integer():
            return (self.log() * power).exp() if power != 0.5 else self.sqrt()
        n = int(power)
        if n < 0:
            return (self**-n).reciprocal()
        if n == 0 or n == 1 or self.constant:
            return self if n == 1 else self._number(1.0 if n == 0 else self.low**n)
        ends = self.low**n, self.high**n
        low = 0.0 if n % 2 == 0 and self.low < 0.0 < self.high else min(ends)
        bends = 2.0 * self.slopes**2 if n == 2 and self.slopes is not None else None
        anywhere = (-math.inf if n % 2 else 0.0, math.inf)
        return Bounds(low, max(ends), self.most**n, n * self.rates, None, bends, anywhere)

    def __rpow__(self, base: Any) -> Any:
        if not isinstance(base, numbers.Real) or base <= 0:
            return NotImplemented
        return (self * math.log(base)).exp()

    def _composed(self, low: float, high: float, size: float, kappa: float) -> "Bounds":
        """h of it, with values in [low, high] and |h^(k)| ≤ size κᵏ."""
        if self.constant:
            return self._number(low)
        if self.slopes is not None:
            return Bounds(low, high, size, kappa * np.abs(self.slopes), None)
        return Bounds(low, high, size, self.rates * (kappa * self.size + TOUCHARD), None)

    def sin(self) -> "Bounds":
        """sin u."""
        return self._composed(*self._around(math.sin), 1.0, 1.0)

    def cos(self) -> "Bounds":
        """cos u."""
        return self._composed(*self._around(math.cos), 1.0, 1.0)

    def _around(self, f: Callable[[float], float]) -> tuple[float, float]:
        """Values of sine or cosine: all of them but at a number."""
        return (f(self.low), f(self.low)) if self.constant else (-1.0, 1.0)

    def exp(self) -> "Bounds":
        """exp u."""
        if self.high > 700.0:
            raise UndecidedError("values that are not finite")
        low, high = math.exp(self.low), math.exp(self.high)
        if self.slopes is None and self.bends is not None and self.most_anywhere < 700.0:
            down = self.bends < 0.0
            if (down | (self.rates == 0.0)).all():
                size = CRAMER * math.exp(self.most_anywhere)
                return Bounds(low, high, size, HERMITE * np.sqrt(np.where(down, -self.bends, 0.0)), None)
        return self._composed(low, high, high, 1.0)

    def expm1(self) -> "Bounds":
        """exp u − 1."""
        return self._composed(math.expm1(self.low), math.expm1(self.high), math.exp(self.high), 1.0)

    def sinh(self) -> "Bounds":
        """(exp u − exp −u) / 2."""
        return 0.5 * (self.exp() - (-self).exp())  # type: ignore[no-any-return]

    def cosh(self) -> "Bounds":
        """(exp u + exp −u) / 2."""
        return 0.5 * (self.exp() + (-self).exp())  # type: ignore[no-any-return]

    def tanh(self) -> "Bounds":
        """tanh u."""
        return self._composed(math.tanh(self.low), math.tanh(self.high), 1.0, TANH)

    def arctan(self) -> "Bounds":
        """arctan u."""
        return self._composed(math.atan(self.low), math.atan(self.high), 0.5 * math.pi, ARCTAN)

    def log(self) -> "Bounds":
        """log u."""
        self._positive()
        return self._composed(math.log(self.low), math.log(self.high), 1.0, LOG / self.low)

    def log1p(self) -> "Bounds":
        """log (1 + u)."""
        return (self + 1.0).log()  # type: ignore[no-any-return]

    def sqrt(self) -> "Bounds":
        """√u."""
        self._positive()
        return self._composed(math.sqrt(self.low), math.sqrt(self.high), math.sqrt(self.high), ROOT / self.low)

    def reciprocal(self) -> "Bounds":
        """1 / u."""
        if self.high < 0.0:
            return -(-self).reciprocal()
        self._positive()
        return self._composed(1.0 / self.high, 1.0 / self.low, 1.0 / self.low, INVERSE / self.low)

    def _positive(self) -> None:
        if self.low <= 0.0:
            raise UndecidedError("a value that may not be positive")

    def conjugate(self) -> "Bounds":
        """u itself."""
        return self

    def __abs__(self) -> "Bounds":
        return self if self >= 0.0 else -self

    def _compared(self, value: Any, always: Callable[["Bounds", "Bounds"], bool], never: Any) -> bool:
        other = self._like(value)
        if other is not None and always(self, other):
            return True
        if other is not None and never(self, other):
            return False
        raise UndecidedError("a comparison")

    def __lt__(self, value: Any) -> bool:
        return self._compared(value, lambda a, b: a.high < b.low, lambda a, b: a.low >= b.high)

    def __le__(self, value: Any) -> bool:
        return self._compared(value, lambda a, b: a.high <= b.low, lambda a, b: a.low > b.high)

    def __gt__(self, value: Any) -> bool:
        return self._compared(value, lambda a, b: a.low > b.high, lambda a, b: a.high <= b.low)

    def __ge__(self, value: Any) -> bool:
        return self._compared(value, lambda a, b: a.low >= b.high, lambda a, b: a.high < b.low)

    def __eq__(self, value: object) -> bool:
        return self._compared(value, lambda a, b: a.constant and b.constant and a.low == b.low, _apart)

    def __ne__(self, value: object) -> bool:
        return not self == value

    def __hash__(self) -> int:
        raise UndecidedError("a hash")

    def __bool__(self) -> bool:
        raise UndecidedError("a truth value")

    def __float__(self) -> float:
        raise UndecidedError("a number")

    def __int__(self) -> int:
        raise UndecidedError("a whole number")


class _Points(np.ndarray):
    """Arrays of bounds, which linear systems with numbers for a matrix can be solved for."""

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is np.linalg.solve and not isinstance(args[0], _Points):
            return np.linalg.inv(args[0]) @ args[1]
        result = super().__array_function__(func, types, args, kwargs)
        return result.view(_Points) if isinstance(result, np.ndarray) and result.dtype == object else result


def _equal(a: Bounds, b: Bounds) -> bool:
    """Whether two functions are the same affine one."""
    if a.slopes is None or b.slopes is None:
        return False
    return (a.low, a.high) == (b.low, b.high) and np.array_equal(a.slopes, b.slopes)


def _apart(a: Bounds, b: Bounds) -> bool:
    """Whether two intervals have nothing in common."""
    return a.high < b.low or a.low > b.high


@dataclass(frozen=True)
class Proof:
    """What is known of all components of a function.

    Attributes
    ----------
    low, high : ndarray, shape (m,)
        Bounds of its values.
    in_time : float
        Largest rate over time, in units of the horizon; 0 where it does not depend on it.
    in_space : float
        Largest rate along an axis, in units of the spread there.
    """

    low: np.ndarray
    high: np.ndarray
    in_time: float
    in_space: float


def variables(low: np.ndarray, high: np.ndarray, spread: np.ndarray, horizon: float | None) -> tuple[Any, np.ndarray]:
    """Time and one point (1, d) as bounds; arguments as for :func:`proof`."""
    units = np.eye(1 + len(low))
    x = np.empty((1, len(low)), dtype=object).view(_Points)
    for i, (a, b, length) in enumerate(zip(low.tolist(), high.tolist(), spread.tolist(), strict=True)):
        x[0, i] = Bounds.affine(a, b, length * units[1 + i])
    return 0.0 if horizon is None else Bounds.affine(0.0, horizon, horizon * units[0]), x


def proof(
    f: Callable[[Any, Any], Any], low: np.ndarray, high: np.ndarray, spread: np.ndarray, horizon: float | None
) -> Proof | None:
    """What a function of (t, x) proves of itself in a box [low, high] up to the horizon (None: at t = 0).

    Parameters
    ----------
    f : callable
        Function of t and of points (..., d).
    low, high, spread : ndarray, shape (d,)
        The box, and the unit of each axis.
    horizon : float or None
        T.

    Returns
    -------
    Proof or None
        None where it does something that bounds cannot follow.

    Examples
    --------
    >>> one = np.ones(1)
    >>> proof(lambda t, x: np.sin(2.0 * x[..., 0]) * np.exp(-t), -4 * one, 4 * one, one, 1.0)
    Proof(low=array([-1.]), high=array([1.]), in_time=1.0, in_space=2.0)
    >>> proof(lambda t, x: np.where(x[..., 0] > 0.3, 1.0, 0.0), -4 * one, 4 * one, one, 1.0) is None
    True
    """
    t, x = variables(low, high, spread, horizon)
    try:
        with warnings.catch_warnings():  # what is said of bounds is not about the function
            warnings.simplefilter("ignore")
            values = np.asarray(f(t, x), dtype=object).reshape(-1)
        found = [x[0, 0]._like(value) for value in values]
    except Exception:
        return None
    if not found or any(b is None for b in found):
        return None
    lows, highs = (np.array([getattr(b, end) for b in found]) for end in ("low", "high"))
    rates = np.max([b.rates for b in found], axis=0)
    return Proof(lows, highs, float(rates[0]), float(rates[1:].max()))
