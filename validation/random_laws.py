"""Random laws with closed forms: densities and first-passage times, and how the estimate compares with the error.

``python -m validation.random_laws --count 200`` draws that many and prints the distribution of error over estimate.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import erf, ndtr

import kolmo
from kolmo import Box

Array = Any
KINDS = ("two bounds", "one bound", "OU", "walls", "OU to its mean", "rectangle", "near a bound", "killed", "jump")
# Error over estimate from which on a converged answer is dishonest.
DISHONEST = 10.0
# Images on either side, and terms of the eigenfunction series; the former up to this time in units of length² / noise.
IMAGES, TERMS, SHORT = 12, 60, 0.3


@dataclass(frozen=True)
class Case:
    """A law that is known.

    Attributes
    ----------
    kind : str
        Which.
    problem : KolmogorovProblem
        The process.
    initial : Any
        Start.
    rtol : float
        Tolerance.
    fluxes : dict
        Per way out, its exact flux at times.
    density : callable or None
        Exact density at points and the horizon.
    asked : dict
        Further arguments of ``solve_forward``.
    """

    kind: str
    problem: kolmo.KolmogorovProblem
    initial: Any
    rtol: float
    fluxes: dict[Any, Callable[[Array], Array]] = field(default_factory=dict)
    density: Callable[[Array], Array] | None = None
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Largest error over estimate, and over tolerance, of what was asked for."""

    case: Case
    law: kolmo.Density
    over_estimate: float
    over_tolerance: float


def draw(seed: int) -> Case:
    """A law at random: horizon from 1e-9 to 1e9, unit of length from 1e-3 to 1e3, rates over two decades and more."""
    rng = np.random.default_rng(seed)
    kind, unit, T = KINDS[seed % len(KINDS)], 10 ** rng.uniform(-3, 3), 10 ** rng.uniform(-9, 9)
    sigma, rtol = unit / math.sqrt(T) * 10 ** rng.uniform(-0.5, 0.5), 10 ** rng.uniform(-5, -2)
    make = {
        "two bounds": _two_bounds,
        "near a bound": _two_bounds,
        "one bound": _one_bound,
        "OU": _ornstein_uhlenbeck,
        "walls": _walls,
        "OU to its mean": _to_the_mean,
        "rectangle": _rectangle,
        "killed": _killed,
        "jump": _jump,
    }[kind]
    return make(kind, rng, unit, T, sigma, rtol)


def judge(case: Case, max_seconds: float = 60.0) -> Judged:
    """Solve a law and compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kolmo.errors.ToleranceWarning)
        law = kolmo.solve_forward(case.problem, case.initial, rtol=case.rtol, max_seconds=max_seconds, **case.asked)
    horizon, errors = case.problem.horizon or 0.0, []
    for face, exact in case.fluxes.items():
        t = case.asked.get("flux_times", law.clock[1:])
        error = float(np.abs(law.exit_flux(face, t) - exact(t)).max())
        scale = max(
            float(np.abs(exact(t)).max()), 1e-6 / horizon, 1e-6 * max(np.abs(law.exit_flux(e)).max() for e in law.exits)
        )
        errors.append((error, law.flux_error(face), case.rtol * scale))
    if case.density is not None:
        at = case.asked.get("at")
        low, high = (float(end[0]) for end in law.grid.box)
        x = np.linspace(low, high, 20001) if at is None else at
        error = np.abs(law(x) - case.density(x))
        size = (lambda v: float(np.trapezoid(v, x))) if at is None else (lambda v: float(np.max(v)))
        errors.append((size(error), (law.error_estimate or {})["density"], case.rtol * size(case.density(x))))
    return Judged(case, law, max(e / est for e, est, _ in errors), max(e / tol for e, _, tol in errors))


# ---------------------------------------------------------------------------------------------------- closed forms
def inverse_gaussian(t: Array, level: float, mu: float, sigma: float) -> Array:
    """First passage of μt + σW_t at a level (Schrödinger 1915)."""
    with np.errstate(all="ignore"):
        z = (level - mu * t) ** 2 / (2 * sigma**2 * t)
        return np.nan_to_num(level / np.sqrt(2 * np.pi * t**3) / sigma * np.exp(-z))


def between_bounds(t: Array, z: float, mu: float, sigma: float, length: float) -> tuple[Array, Array]:
    """First passage from z below 0 and above the length: images early, eigenfunctions late (Navarro & Fuss 2009)."""
    t = np.asarray(t, dtype=float)
    tau = t * sigma**2 / length**2

    def standard(w: float) -> Array:
        n, k = np.arange(-IMAGES, IMAGES + 1)[:, None], np.arange(1, TERMS)[:, None]
        with np.errstate(all="ignore"):
            early = ((w + 2 * n) * np.exp(-((w + 2 * n) ** 2) / (2 * tau))).sum(0) / np.sqrt(2 * np.pi * tau**3)
        late = (np.pi * k * np.sin(k * np.pi * w) * np.exp(-(k**2) * np.pi**2 * tau / 2)).sum(0)
        return np.where(tau < SHORT, np.nan_to_num(early), late) * sigma**2 / length**2

    tilt = -(mu**2) * t / (2 * sigma**2)
    low = standard(z / length) * np.exp(tilt - mu * z / sigma**2)
    high = standard(1 - z / length) * np.exp(tilt + mu * (length - z) / sigma**2)
    return low, high


def still_between(t: Array, z: float, mu: float, sigma: float, length: float) -> Array:
    """Probability of not having left (0, length) by t: eigenfunctions."""
    k = np.arange(1, 4 * TERMS)[:, None]
    w, tilt = np.pi * k / length, mu / sigma**2
    overlap = w * (1 - (-1.0) ** k * np.exp(tilt * length)) / (w**2 + tilt**2)
    decay = np.exp(-(w**2 * sigma**2 + mu**2 / sigma**2) * t / 2)
    return np.clip((2 / length * np.sin(w * z) * overlap * decay).sum(0) * np.exp(-tilt * z), 0.0, 1.0)


def gaussian(x: Array, mean: Any, variance: float) -> Array:
    """Normal density."""
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


# ---------------------------------------------------------------------------------------------------- kinds
def _zero(x: Array) -> Array:
    return 0.0 * x[..., 0]


def _brownian(mu: float, sigma: float, T: float, box: Box, **more: Any) -> kolmo.KolmogorovProblem:
    return kolmo.KolmogorovProblem(kolmo.SDE(mu, diffusion=sigma, dim=1), _zero, T, box, **more)


def _two_bounds(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    length = unit * 10 ** rng.uniform(-0.7, 0.5)
    z = length * (rng.uniform(0.1, 0.9) if kind == "two bounds" else 10 ** rng.uniform(-3, -1))
    mu = 10 ** rng.uniform(-1, 2.5) * rng.choice([-1, 1]) * sigma**2 / length
    sides = {(0, s): (lambda t, s=s: between_bounds(t, z, mu, sigma, length)[s]) for s in (0, 1)}
    return Case(kind, _brownian(mu, sigma, T, Box(0.0, length, "absorbing")), [z], rtol, sides)


def _one_bound(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    level, side = unit * 10 ** rng.uniform(-1, 0.5), int(rng.integers(2))
    mu = 10 ** rng.uniform(-1, 2) * rng.choice([-0.05, 1, 1]) * sigma**2 / level
    box = Box(-np.inf, level, [("open", "absorbing")]) if side else Box(-level, np.inf, [("absorbing", "open")])
    problem = _brownian(mu if side else -mu, sigma, T, box)
    return Case(kind, problem, [0.0], rtol, {(0, side): lambda t: inverse_gaussian(t, level, mu, sigma)})


def _ornstein_uhlenbeck(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    rate, start = 10 ** rng.uniform(-1, 3.3) / T, unit * rng.uniform(-2, 2) * 10 ** rng.uniform(-0.5, 0.5)
    variance, mean = sigma**2 * -math.expm1(-2 * rate * T) / (2 * rate), start * math.exp(-rate * T)
    problem = kolmo.KolmogorovProblem(kolmo.SDE(lambda t, x: -rate * x, diffusion=sigma, dim=1), _zero, T)
    asked = {"at": mean + math.sqrt(variance) * np.linspace(-3, 3, 25)} if rng.random() < 0.5 else {}
    return Case(kind, problem, [start], rtol, density=lambda x: gaussian(x, mean, variance), asked=asked)


def _walls(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    length = unit * 10 ** rng.uniform(-0.5, 0.5)
    z = length * rng.uniform(0.02, 0.98)
    centres = np.concatenate([s * z + 2 * length * np.arange(-60, 61) for s in (1, -1)])[:, None]
    asked = {"at": length * np.linspace(0.05, 0.95, 19)} if rng.random() < 0.5 else {}
    problem = _brownian(0.0, sigma, T, Box(0.0, length, "reflecting"))
    return Case(kind, problem, [z], rtol, density=lambda x: gaussian(x, centres, sigma**2 * T).sum(0), asked=asked)


def _to_the_mean(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    """Ornstein–Uhlenbeck from above down to its mean: by reflection."""
    rate = 10 ** rng.uniform(-1, 2.5) / T
    start = math.sqrt(sigma**2 / (2 * rate)) * 10 ** rng.uniform(-1, 0.7)
    sde = kolmo.SDE(lambda t, x: -rate * x, diffusion=sigma, dim=1)
    problem = kolmo.KolmogorovProblem(sde, _zero, T, Box(0.0, np.inf, [("absorbing", "open")]))

    def flux(t: Array) -> Array:
        v, m = sigma**2 * -np.expm1(-2 * rate * t) / (2 * rate), start * np.exp(-rate * t)
        with np.errstate(all="ignore"):
            return np.nan_to_num(m / np.sqrt(2 * np.pi * v) / v * np.exp(-(m**2) / (2 * v)) * sigma**2)

    return Case(kind, problem, [start], rtol, {(0, 0): flux})


def _rectangle(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    """Two independent Brownian motions: through each face goes the flux of one times what is left of the other."""
    length, part = unit * 10 ** rng.uniform(-0.4, 0.3, 2), rng.uniform(0.25, 0.75, 2)
    z, mu = length * part, rng.uniform(-3, 3, 2) * sigma**2 / length

    def flux(i: int, side: int) -> Callable[[Array], Array]:
        j = 1 - i
        return lambda t: (
            between_bounds(t, z[i], mu[i], sigma, length[i])[side] * still_between(t, z[j], mu[j], sigma, length[j])
        )

    sde = kolmo.SDE(mu.tolist(), diffusion=sigma, dim=2)
    problem = kolmo.KolmogorovProblem(sde, _zero, T, Box([0.0, 0.0], length.tolist(), "absorbing"))
    faces = {(i, side): flux(i, side) for i in (0, 1) for side in (0, 1)}
    # the density in the corners would cost most of the time: it is asked for in the middle
    return Case(kind, problem, [z.tolist()], max(rtol, 1e-4), faces, asked={"at": [(0.5 * length).tolist()]})


def _killed(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    rate, level = 10 ** rng.uniform(-1, 1.5) / T, unit * 10 ** rng.uniform(-0.7, 0.3)
    fluxes = {
        (0, 1): lambda t: inverse_gaussian(t, level, 0.0, sigma) * np.exp(-rate * t),
        "killing": lambda t: rate * np.exp(-rate * t) * erf(level / sigma / np.sqrt(2 * t)),
    }
    problem = _brownian(0.0, sigma, T, Box(-np.inf, level, [("open", "absorbing")]), killing=rate)
    return Case(kind, problem, [0.0], rtol, fluxes, asked={"flux_times": np.sort(T * rng.uniform(0.02, 1, 7))})


def _jump(kind: str, rng: Any, unit: float, T: float, sigma: float, rtol: float) -> Case:
    """Uniform on an interval at first."""
    low = unit * rng.uniform(-1, 1)
    width, spread = unit * rng.uniform(0.2, 1.5), sigma * math.sqrt(T)
    high, reach = low + width, 12 * spread + unit

    def initial(x: Array) -> Array:
        return np.where((x[..., 0] >= low) & (x[..., 0] <= high), 1 / width, 0.0)

    problem = _brownian(0.0, sigma, T, Box(low - reach, high + reach))
    return Case(
        kind, problem, initial, rtol, density=lambda x: (ndtr((x - low) / spread) - ndtr((x - high) / spread)) / width
    )


def main() -> None:
    """Draw, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=60.0)
    options = parser.parse_args()
    found = [judge(draw(seed), options.max_seconds) for seed in range(options.first, options.first + options.count)]
    met = [j for j in found if j.law.status == "converged"]
    ratios = np.array([j.over_estimate for j in met])
    quantiles = ", ".join(f"{np.quantile(ratios, q):.2g}" for q in (0.5, 0.95, 1.0))
    lines = [
        f"{len(found)} laws, {len(met)} converged; error over estimate: median, 95 %, largest {quantiles}",
        f"{(ratios > 1).sum()} above the estimate, {(ratios > DISHONEST).sum()} dishonest",
        f"{sum(j.over_tolerance > 1 for j in met)} above the tolerance",
    ]
    for j in found:
        if j.law.status != "converged" or j.over_estimate > 1:
            lines.append(f"  {j.case.kind}: {j.law.status}, {j.over_estimate:.2g} of the estimate; {j.law.message}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
