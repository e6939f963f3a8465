"""The problems that kolmo is timed on, with their exact values; all in the convention of kolmo.

B1, B1s, B2, B4, B5: linear drift A x, constant covariance Σ, φ a Gaussian bump or a step, so that X_T given X_0 is
Gaussian and u(0, x) is known. B3: Heston's model, by the integral of its characteristic function.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import expm
from scipy.special import ndtr

import kolmo
from kolmo.grid.grading import Sinh


@dataclass(frozen=True, eq=False)
class Linear:
    """b = A x with constant Σ, no killing, on the box [−half, half]^d; errors count where every |x_i| ≤ centre."""

    name: str
    A: np.ndarray
    Sigma: np.ndarray
    half: float
    centre: float
    kind: str  # "gauss": exp(−precision |x − mean|²/2); "step": 1 where x > mean
    mean: np.ndarray
    precision: float = 4.0
    T: float = 1.0

    @property
    def dim(self) -> int:
        return len(self.A)

    def varied(self, rng: np.random.Generator) -> "Linear":
        """The same kind of problem with other parameters."""
        factor = np.exp(rng.uniform(-0.35, 0.35, 4))
        return replace(
            self,
            A=factor[0] * self.A,
            Sigma=factor[1] * self.Sigma,
            mean=self.mean + rng.uniform(-0.2, 0.2, self.dim) / np.sqrt(self.precision / 4.0),
            precision=factor[2] * self.precision,
            T=float(factor[3]) * self.T,
        )

    def phi(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "step":
            return (x[..., 0] > self.mean[0]).astype(float)
        return np.exp(-0.5 * self.precision * ((x - self.mean) ** 2).sum(-1))

    def problem(self, *, boxed: bool = True) -> kolmo.KolmogorovProblem:
        """For kolmo; not boxed: on all of R^d, so that the box is chosen too."""
        sde = kolmo.SDE(lambda t, x: x @ self.A.T, covariance=self.Sigma, dim=self.dim)
        box = kolmo.Box([-self.half] * self.dim, [self.half] * self.dim) if boxed else None
        return kolmo.KolmogorovProblem(sde, self.phi, self.T, box)

    def grid(self, n: int, width: float | None = None) -> kolmo.Grid:
        """Grid of the box, n nodes along each axis; given a width, closer within it around the origin."""
        grading = None if width is None else [Sinh(-self.half, self.half, centre=0.0, width=width)] * self.dim
        return kolmo.Grid.of(self.problem().box, (n,) * self.dim, grading)

    def points(self) -> np.ndarray:
        """Where an answer by tolerance is asked for."""
        axis = np.linspace(-self.centre, self.centre, {1: 21, 2: 9, 3: 5}[self.dim])
        return np.stack(np.meshgrid(*[axis] * self.dim, indexing="ij"), -1).reshape(-1, self.dim)

    def exact(self, x: np.ndarray) -> np.ndarray:
        """u(0, x) at points (..., d), the moments of X_T by Van Loan's block exponential."""
        d = self.dim
        block = np.block([[-self.A, self.Sigma], [np.zeros((d, d)), self.A.T]])
        e = expm(block * self.T)
        E = e[d:, d:].T
        S = E @ e[:d, d:]
        r = x @ E.T - self.mean
        if self.kind == "step":
            return ndtr(r[..., 0] / np.sqrt(S[0, 0]))
        P = np.linalg.inv(np.eye(d) / self.precision + S)
        return np.exp(-0.5 * np.einsum("...i,ij,...j", r, P, r)) / np.sqrt(
            np.linalg.det(np.eye(d) + self.precision * S)
        )

    def error(self, nodes: tuple[np.ndarray, ...], u: np.ndarray) -> float:
        """Largest error over the nodes in the central part."""
        keep = [np.flatnonzero(np.abs(x) <= self.centre + 1e-12) for x in nodes]
        inside = np.stack(np.meshgrid(*[x[k] for x, k in zip(nodes, keep, strict=True)], indexing="ij"), -1)
        return float(np.abs(u[np.ix_(*keep)] - self.exact(inside)).max())


@dataclass(frozen=True)
class Heston:
    """A European call, dS = rS dt + √v S dW, dv = κ(θ − v) dt + σ√v dZ; errors relative, over five strikes."""

    name: str = "B3"
    S0: float = 100.0
    T: float = 1.0
    r: float = 0.02
    v0: float = 0.04
    kappa: float = 1.5
    theta: float = 0.04
    sigma: float = 0.5
    rho: float = -0.7
    strikes: tuple[float, ...] = (80.0, 90.0, 100.0, 110.0, 120.0)

    def varied(self, rng: np.random.Generator) -> "Heston":
        """The same model with other parameters, its strikes and the spot as they are."""
        factor = np.exp(rng.uniform(-0.3, 0.3, 4))
        return replace(
            self,
            v0=float(factor[0]) * self.v0,
            kappa=float(factor[1]) * self.kappa,
            theta=float(factor[2]) * self.theta,
            sigma=float(factor[3]) * self.sigma,
            rho=float(rng.uniform(-0.85, -0.3)),
            r=float(rng.uniform(0.0, 0.05)),
        )

    def problem(self, strike: float) -> kolmo.KolmogorovProblem:
        """In log-price and variance, with killing r."""

        def drift(t: float, x: np.ndarray) -> np.ndarray:
            v = x[..., 1]
            return np.stack([self.r - 0.5 * v, self.kappa * (self.theta - v)], -1)

        def covariance(t: float, x: np.ndarray) -> np.ndarray:
            c = np.array([[1.0, self.rho * self.sigma], [self.rho * self.sigma, self.sigma**2]])
            return np.maximum(x[..., 1], 0.0)[..., None, None] * c

        sde = kolmo.SDE(drift, covariance=covariance, dim=2, autonomous=True)
        box = kolmo.Box([-np.inf, 0.0], [np.inf, np.inf], boundary=["open", ("natural", "open")])
        payoff = lambda x: np.maximum(np.exp(x[..., 0]) - strike, 0.0)  # noqa: E731
        return kolmo.KolmogorovProblem(sde, payoff, self.T, box, killing=self.r)

    def grid(self, strike: float, n: tuple[int, int]) -> kolmo.Grid:
        """Grid graded around the strike, which is on a node, and around v = 0."""
        lower, upper = [3.4, 0.0], [5.4, 0.5]
        kink = Sinh(lower[0], upper[0], np.log(strike), 0.2).aligned(np.log(strike), n[0])
        box = self.problem(strike).box.replace(lower, upper)
        return kolmo.Grid.of(box, n, [kink, Sinh(lower[1], upper[1], 0.0, self.v0)])

    def points(self) -> np.ndarray:
        return np.array([[np.log(self.S0), self.v0]])

    def exact(self, strike: float) -> float:
        """S0 P1 − K exp(−rT) P2 with P by Gil-Pelaez inversion; characteristic function of Albrecher et al. (2007)."""

        def characteristic(u: np.ndarray) -> np.ndarray:
            iu = 1j * u
            d = np.sqrt((self.rho * self.sigma * iu - self.kappa) ** 2 + self.sigma**2 * (iu + u**2))
            b = self.kappa - self.rho * self.sigma * iu
            g = (b - d) / (b + d)
            e = np.exp(-d * self.T)
            C = self.kappa * self.theta / self.sigma**2 * ((b - d) * self.T - 2 * np.log((1 - g * e) / (1 - g)))
            D = (b - d) / self.sigma**2 * (1 - e) / (1 - g * e)
            return np.exp(C + D * self.v0 + iu * (np.log(self.S0) + self.r * self.T))

        nodes, weights = np.polynomial.legendre.leggauss(400)
        u, w = 150.0 * (nodes + 1.0), 150.0 * weights
        k = np.log(strike)
        forward = characteristic(np.array([-1j]))[0].real
        upper = 0.5 + (w * np.real(np.exp(-1j * u * k) * characteristic(u - 1j) / (1j * u * forward))).sum() / np.pi
        lower = 0.5 + (w * np.real(np.exp(-1j * u * k) * characteristic(u) / (1j * u))).sum() / np.pi
        return float(np.exp(-self.r * self.T) * (forward * upper - strike * lower))


_a = np.array
PROBLEMS: dict[str, Linear | Heston] = {
    p.name: p
    for p in (
        Linear("B1", _a([[-1.0]]), _a([[0.5]]), 5.0, 2.5, "gauss", _a([0.5])),
        Linear("B1s", _a([[-1.0]]), _a([[0.5]]), 5.0, 2.5, "step", _a([0.3])),
        Linear(
            "B2", _a([[-0.5, 2.0], [-2.0, -0.5]]), _a([[0.4, 0.15], [0.15, 0.3]]), 4.0, 2.0, "gauss", _a([0.5, 0.0])
        ),
        Heston(),
        Linear(
            "B4",
            _a([[-1.0, 0.8, 0.0], [-0.8, -1.0, 0.5], [0.0, -0.5, -1.0]]),
            np.diag([0.3, 0.4, 0.5]),
            4.0,
            2.0,
            "gauss",
            _a([0.3, 0.0, 0.0]),
        ),
        Linear(
            "B5",
            2 * np.pi * _a([[0.0, -1.0], [1.0, 0.0]]),
            1e-3 * np.eye(2),
            1.5,
            1.0,
            "gauss",
            _a([0.5, 0.0]),
            0.15**-2,
        ),
    )
}


def variant(seed: int | None) -> dict[str, Linear | Heston]:
    """The problems as they are documented (None), or with parameters that nobody has seen."""
    if seed is None:
        return PROBLEMS
    return {name: p.varied(np.random.default_rng([seed, i])) for i, (name, p) in enumerate(PROBLEMS.items())}


LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)
