"""Standardised scalar random variables ζ (mean 0, variance 1): the randomness of every noise law is made of these."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, distributed

from kolmo.errors import InputError

# Increment and multipliers of SplitMix64 (Steele, Lea & Flood, 2014).
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


# Whether the processes that train together have seeded torch's global generators apart themselves.
_apart = False


@contextmanager
def seeded_apart() -> Iterator[None]:
    """Leave the global generator's numbers as they are in every process: their seeds differ already.

    Examples
    --------
    >>> with seeded_apart():
    ...     rank()
    0
    """
    global _apart  # of the process, as the generator is
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def rank() -> int:
    """Number of this process among those that train together; 0 where there is one alone, or seeds are apart."""
    if _apart or not (distributed.is_available() and distributed.is_initialized()):
        return 0
    return distributed.get_rank()


def uniform(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform numbers in [0, 1) in single precision or better.

    Half precision has too few numbers near 0: events of probability .001 would come three times as often. From torch's
    global generator the processes of data-parallel training draw different numbers, also when their seeds are alike.
    """
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    if generator is None and rank():
        return _scrambled(shape, device, rank()).to(fine)
    return torch.rand(shape, dtype=fine, device=device, generator=generator)


def _scrambled(shape: Sequence[int], device: torch.device, number: int) -> Tensor:
    """Uniform numbers from the global generator's bits, mixed with the number of the process; multiples of 2⁻²⁴."""
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, tuple(shape), dtype=torch.int64, device=device)
    z = bits + _signed(number * _GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(_MIX1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX2)
    return _shifted(z ^ _shifted(z, 31), 40).double() * 2.0**-24


def _signed(number: int) -> int:
    """The signed 64-bit integer with the same bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift of unsigned numbers to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Variable(ABC):
    r"""A scalar ζ with :math:`E\zeta = 0` and :math:`E\zeta^2 = 1`, with all that laws, recursion and theory ask of it.

    Attributes
    ----------
    name : str
        Word by which laws ask for it.
    skewness, excess_kurtosis : float
        E ζ³ and E ζ⁴ − 3.
    bound : float
        Largest modulus of ζ; infinite for the Gaussian.
    variance_proxy : float
        Smallest v with E exp(λζ) ≤ exp(vλ²/2) for all λ: bounds the tails of sums.

    Examples
    --------
    >>> z, w = VARIABLES["three-point"].nodes(3)
    >>> [round(abs(float(w @ z**k)), 6) for k in (1, 2, 3, 4)]
    [0.0, 1.0, 0.0, 3.0]
    """

    name: str
    skewness: float
    excess_kurtosis: float
    bound: float
    variance_proxy: float = 1.0

    @property
    def is_discrete(self) -> bool:
        """Whether ζ takes finitely many values, so that expectations are finite sums."""
        return False

    @property
    def rarest(self) -> float:
        """Probability of the least probable value, or part of the law; 1 where there is one part."""
        return 1.0

    @abstractmethod
    def nodes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Values z and weights w with Σ w g(z) = E g(ζ) for polynomials of degree 2n − 1 (exact sum if discrete)."""

    @abstractmethod
    def from_uniform(self, u: Tensor) -> Tensor:
        """Values of ζ from uniform numbers in (0, 1): the inverse of the distribution function."""

    def sample(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent draws of ζ."""
        return self.from_uniform(uniform(shape, dtype, device, generator)).to(dtype)

    def mirrored(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Antithetic draws: the second half of the first axis mirrors the first half, F⁻¹(1 − u) for F⁻¹(u)."""
        half = (shape[0] // 2, *shape[1:])
        u = uniform(half, dtype, device, generator)
        return torch.cat([self.from_uniform(u), self.from_uniform(1 - u)]).to(dtype)


@lru_cache(maxsize=64)
def _gauss_hermite(n: int) -> tuple[np.ndarray, np.ndarray]:
    z, w = np.polynomial.hermite_e.hermegauss(n)
    kept = w > 1e-18 * w.sum()
    return z[kept], w[kept] / w[kept].sum()


class Gaussian(Variable):
    """ζ ~ N(0, 1)."""

    def __init__(self) -> None:
        super().__init__("gaussian", 0.0, 0.0, math.inf)

    def nodes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Gauss–Hermite nodes; weights below 1e-18 are dropped."""
        return _gauss_hermite(n)

    def from_uniform(self, u: Tensor) -> Tensor:
        """Inverse normal distribution function."""
        tiny = torch.finfo(u.dtype).eps / 2
        return torch.special.ndtri(u.clamp(tiny, 1 - tiny))  # type: ignore[no-any-return]

    def sample(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Independent standard normal draws."""
        if generator is None and rank():
            return super().sample(shape, dtype, device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def mirrored(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Antithetic draws: the second half of the first axis is minus the first half."""
        z = self.sample((shape[0] // 2, *shape[1:]), dtype, device, generator)
        return torch.cat([z, -z])


class Uniform(Variable):
    """ζ uniform on [−√3, √3]."""

    def __init__(self) -> None:
        super().__init__("uniform", 0.0, -1.2, math.sqrt(3.0))

    def nodes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Gauss–Legendre nodes."""
        z, w = np.polynomial.legendre.leggauss(n)
        return math.sqrt(3.0) * z, w / 2

    def from_uniform(self, u: Tensor) -> Tensor:
        """√3 (2u − 1)."""
        return math.sqrt(3.0) * (2 * u - 1)


class Discrete(Variable):
    """ζ with finitely many values, in increasing order.

    Parameters
    ----------
    name : str
        Its name.
    values, probabilities : sequence of float
        Values with mean 0 and variance 1 (a single value 0: no noise at all).
    variance_proxy : float, optional
        See `Variable`.
    """

    def __init__(
        self, name: str, values: Sequence[float], probabilities: Sequence[float], variance_proxy: float = 1.0
    ) -> None:
        z, w = np.asarray(values, float), np.asarray(probabilities, float)
        super().__init__(
            name,
            math.fsum(w * z**3),
            math.fsum(w * z**4) - 3.0 * math.fsum(w * z**2),
            float(np.max(np.abs(z))),
            variance_proxy,
        )
        object.__setattr__(self, "values", z)
        object.__setattr__(self, "probabilities", w)
        object.__setattr__(self, "steps", tuple(zip(z.tolist(), np.cumsum(w).tolist(), strict=True)))

    values: np.ndarray
    probabilities: np.ndarray
    steps: tuple[tuple[float, float], ...]

    @property
    def is_discrete(self) -> bool:
        """True."""
        return True

    @property
    def rarest(self) -> float:
        """Smallest of the probabilities."""
        return float(self.probabilities.min())

    def nodes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """All values with their probabilities, whatever n."""
        return self.values, self.probabilities

    def from_uniform(self, u: Tensor) -> Tensor:
        """Look up the value whose interval of the distribution function holds u."""
        zeta = u.new_full((), self.steps[-1][0])
        for value, upper in reversed(self.steps[:-1]):  # plain numbers, so that torch.compile sees through
            zeta = torch.where(u < upper, u.new_full((), value), zeta)
        return zeta.expand(u.shape)


def bernoulli(keep: float) -> Discrete:
    """ζ = (b − keep)/√(keep(1 − keep)) for b ~ Bernoulli(keep); ζ = 0 for keep = 1.

    The variance proxy is that of Kearns & Saul (1998): (1 − 2p)/(2 log((1 − p)/p)) for b itself.

    Examples
    --------
    >>> round(bernoulli(0.8).skewness, 6)
    -1.5
    """
    if keep == 1.0:
        return Discrete("bernoulli", [0.0], [1.0])
    sd = math.sqrt(keep * (1 - keep))
    odds = math.log((1 - keep) / keep)
    proxy = 0.25 if abs(odds) < 1e-6 else (1 - 2 * keep) / (2 * odds)
    return Discrete("bernoulli", [-keep / sd, (1 - keep) / sd], [1 - keep, keep], proxy / sd**2)


def log_normal(z: Tensor, sigma: float) -> Tensor:
    """Return the standardised log-normal factor of normal numbers."""
    return ((sigma * z - 0.5 * sigma**2).exp() - 1) / math.sqrt(math.expm1(sigma**2))


def shake_drop_deviation(keep: float) -> float:
    """Standard deviation of the factor of shake-drop."""
    return math.sqrt(keep + (1 - keep) / 3 - keep**2) if keep < 1 else 0.0


def shake_drop(u: Tensor, keep: float) -> Tensor:
    """Return the standardised factor of shake-drop of uniform numbers: uniform on (−1, 1) below 1 − keep, 1 above."""
    drop = 1 - keep
    if not drop:
        return torch.zeros_like(u)
    factor = torch.where(u < drop, 2 * u / drop - 1, torch.ones_like(u))
    return (factor - keep) / shake_drop_deviation(keep)


class LogNormalFactor(Variable):
    """ζ = (exp(σZ − σ²/2) − 1)/√(exp(σ²) − 1) with Z standard normal: a positive factor of mean 1, standardised.

    Parameters
    ----------
    sigma : float
        Standard deviation of the logarithm, positive.
    """

    sigma: float

    def __init__(self, sigma: float) -> None:
        growth = math.exp(sigma**2)
        kurtosis = growth**4 + 2 * growth**3 + 3 * growth**2 - 6
        super().__init__("lognormal", (growth + 2) * math.sqrt(growth - 1), kurtosis, math.inf, math.inf)
        object.__setattr__(self, "sigma", sigma)

    def nodes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Gauss–Hermite nodes of Z; moments of ζ converge fast, but are not exact."""
        z, w = _gauss_hermite(max(n, 24))
        return log_normal(torch.as_tensor(z), self.sigma).numpy(), w

    def from_uniform(self, u: Tensor) -> Tensor:
        """Inverse distribution function."""
        return log_normal(VARIABLES["gaussian"].from_uniform(u), self.sigma)


class ShakeDropFactor(Variable):
    """The factor b + α − bα of shake-drop, standardised: 1 with probability keep, else uniform on (−1, 1).

    Parameters
    ----------
    keep : float
        Probability of an untouched branch, in (0, 1].
    """

    keep: float

    def __init__(self, keep: float) -> None:
        drop = 1 - keep
        variance = keep + drop / 3 - keep**2
        # central moments of the mixture: the untouched part at 1 − keep, the other around −keep
        third = keep * drop**3 - drop * (keep**3 + keep)
        fourth = keep * drop**4 + drop * (keep**4 + 2 * keep**2 + 1 / 5)
        sd = math.sqrt(variance) if drop else 1.0
        skewness, kurtosis = (third / sd**3, fourth / sd**4 - 3) if drop else (0.0, 0.0)
        bound = (1 + keep) / sd if drop else 0.0
        super().__init__("shake-drop", skewness, kurtosis, bound, bound**2)
        object.__setattr__(self, "keep", keep)

    @property
    def rarest(self) -> float:
        """Probability of the untouched branch, or of the other, whichever is less."""
        return min(self.keep, 1 - self.keep) if self.keep < 1 else 1.0

    def nodes(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Gauss–Legendre nodes of the uniform part, and the other value."""
        if self.keep == 1:
            return np.zeros(1), np.ones(1)
        z, w = np.polynomial.legendre.leggauss(n)
        factor, weight = np.append(z, 1.0), np.append(0.5 * (1 - self.keep) * w, self.keep)
        return (factor - self.keep) / shake_drop_deviation(self.keep), weight

    def from_uniform(self, u: Tensor) -> Tensor:
        """Uniform on (−1, 1) below 1 − keep, 1 above."""
        return shake_drop(u, self.keep)


VARIABLES: dict[str, Variable] = {
    "gaussian": Gaussian(),
    "uniform": Uniform(),
    "rademacher": Discrete("rademacher", [-1.0, 1.0], [0.5, 0.5]),
    "three-point": Discrete("three-point", [-math.sqrt(3.0), 0.0, math.sqrt(3.0)], [1 / 6, 2 / 3, 1 / 6]),
}


def variable(name: str) -> Variable:
    """Return the variable of that name; an unknown name is answered with the known ones.

    Parameters
    ----------
    name : {"gaussian", "uniform", "rademacher", "three-point"}
        The word.

    Raises
    ------
    InputError
        For a name that is not known.

    Examples
    --------
    >>> variable("uniform").excess_kurtosis
    -1.2
    """
    if name not in VARIABLES:
        raise InputError("law", repr(name), "one of " + ", ".join(repr(known) for known in VARIABLES))
    return VARIABLES[name]
