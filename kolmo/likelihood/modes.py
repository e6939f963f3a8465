r"""Processes in one dimension whose coefficients do not depend on time: their eigenfunctions, and all times at once.

With :math:`\beta = b/\Sigma` and :math:`g(x) = \exp\int^x\beta`, the generator is self-adjoint in the weight
:math:`g^2/\Sigma`. In :math:`\psi = g\,u` its form needs no derivative of a coefficient,

.. math::
    \tfrac12\int(\psi' - \beta\psi)(\varphi' - \beta\varphi)\,dx + \int\frac{c}{\Sigma}\,\psi\varphi\,dx
        = \lambda\int\frac{1}{\Sigma}\,\psi\varphi\,dx,

with ψ = 0 at absorbing ends, and nothing imposed at reflecting ones and at cuts. Then

.. math::
    p(t, x, y) = \frac{g(y)}{g(x)\,\Sigma(y)}\sum_k e^{-\lambda_k t}\,\psi_k(x)\,\psi_k(y),

and what leaves through an absorbing end B is :math:`\mp\tfrac12\,g(B)/g(x)\sum_k e^{-\lambda_k t}\psi_k(x)\psi_k'(B)`.
The slope at an end is read off the two forms, tested with a function that is one there (the consistent flux), which is
twice as accurate as differentiating. Trial functions are polynomials (Legendre; Shen 1994), so that errors fall faster
than any power of their number where the coefficients are smooth. No time step enters. Sturm–Liouville theory of
diffusions: Karlin and Taylor 1981, §15.13.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from numpy.polynomial import legendre

from kolmo.errors import NotConvergedError

# Points of the quadrature for n trial functions: this part of them more, and so many.
MORE, EXTRA = 0.25, 8


@dataclass(frozen=True)
class Rule:
    """Gauss–Legendre points on [−1, 1] for n trial functions, and what is linear in values there.

    Attributes
    ----------
    points, weights : tensor, shape (Q,)
        The quadrature.
    values, slopes : tensor, shape (Q, n)
        Trial functions there: the two hats, then the bubbles, and their derivatives.
    expand : tensor, shape (Q, Q)
        From values at the points to coefficients of Legendre polynomials.
    """

    points: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor
    slopes: torch.Tensor
    expand: torch.Tensor


@lru_cache(maxsize=32)
def rule(n: int) -> Rule:
    """The rule for n trial functions.

    Examples
    --------
    >>> found = rule(6)
    >>> bool((found.weights @ found.points**2 - 2 / 3).abs() < 1e-14)
    True
    """
    count = n + int(MORE * n) + EXTRA
    points, weights = (torch.as_tensor(v) for v in legendre.leggauss(count))
    degrees = torch.arange(count, dtype=torch.float64)
    expand = (degrees + 0.5)[:, None] * polynomials(points, count).T * weights
    return Rule(points, weights, trial(points, n), trial_slopes(points, n), expand)


def polynomials(z: torch.Tensor, count: int) -> torch.Tensor:
    """Legendre polynomials P_0 … at points (...), shape (..., count)."""
    found = [torch.ones_like(z), z]
    for k in range(1, count - 1):
        found.append(((2 * k + 1) * z * found[k] - k * found[k - 1]) / (k + 1))
    return torch.stack(found[:count], -1)


def trial(z: torch.Tensor, n: int) -> torch.Tensor:
    """Trial functions at points (...) of [−1, 1], shape (..., n): (1 ∓ z)/2, then (P_k − P_{k+2}) / √(4k + 6)."""
    P = polynomials(z, n)
    k = torch.arange(n - 2, dtype=torch.float64)
    bubbles = (P[..., :-2] - P[..., 2:]) / torch.sqrt(4 * k + 6)
    return torch.cat([0.5 * (1 - z)[..., None], 0.5 * (1 + z)[..., None], bubbles], -1)


def trial_slopes(z: torch.Tensor, n: int) -> torch.Tensor:
    """Their derivatives."""
    P = polynomials(z, n)
    k = torch.arange(n - 2, dtype=torch.float64)
    bubbles = -(2 * k + 3) * P[..., 1:-1] / torch.sqrt(4 * k + 6)
    half = torch.full_like(z, 0.5)[..., None]
    return torch.cat([-half, half, bubbles], -1)


def integrals(z: torch.Tensor, count: int) -> torch.Tensor:
    """Integrals of Legendre polynomials from −1 to points (...), shape (..., count)."""
    P = polynomials(z, count + 1)
    k = torch.arange(1, count, dtype=torch.float64)
    return torch.cat([(1 + z)[..., None], (P[..., 2:] - P[..., :-2]) / (2 * k + 1)], -1)


@dataclass(frozen=True)
class Modes:
    r"""Eigenvalues and eigenfunctions of some processes at once, on intervals of their own.

    Attributes
    ----------
    rates : tensor, shape (C, m)
        λ_k, increasing.
    shapes : tensor, shape (C, n, m)
        Coefficients of ψ_k in the trial functions.
    slope : tensor, shape (C, Q)
        Coefficients of β dx/dz in Legendre polynomials.
    mass : tensor, shape (C, m)
        ∫ g ψ_k / Σ dx.
    edges : tensor, shape (C, 2, m)
        Of each mode, −½ψ' along the outward normal at the two ends.
    form : tensor, shape (C, n, n)
        The left side, for all trial functions.
    free : tuple of int
        Trial functions that vanish at absorbing ends.
    """

    rates: torch.Tensor
    shapes: torch.Tensor
    slope: torch.Tensor
    mass: torch.Tensor
    edges: torch.Tensor
    form: torch.Tensor
    free: tuple[int, ...]

    @classmethod
    def of(
        cls,
        n: int,
        beta: torch.Tensor,
        inverse: torch.Tensor,
        killing: torch.Tensor | None,
        stretch: torch.Tensor,
        absorbing: tuple[bool, bool],
    ) -> "Modes":
        """Solve the eigenproblems.

        Parameters
        ----------
        n : int
            Trial functions, hats included.
        beta, inverse : tensor, shape (C, Q)
            b/Σ and 1/Σ at the points of ``rule(n)``.
        killing : tensor or None, shape (C, Q)
            Killing rate c.
        stretch : tensor, shape (C, Q)
            dx/dz.
        absorbing : (bool, bool)
            Which ends absorb.

        Raises
        ------
        NotConvergedError
            Where rounding makes the left side lose its sign.
        """
        found = rule(n)
        first, last = (0 if not absorbing[0] else 1), (1 if absorbing[1] else 2)
        free = [*range(first, last), *range(2, n)]
        B, w = found.values, found.weights * stretch
        D = found.slopes / stretch[..., None] - beta[..., None] * B
        K = 0.5 * D.mT @ (w[..., None] * D)
        if killing is not None:
            K = K + B.T @ ((w * killing * inverse)[..., None] * B)
        M = B.T @ ((w * inverse)[..., None] * B)
        inner, mass = K[:, free][:, :, free], M[:, free][:, :, free]
        # a shift of the size of the least rates: what is small is found to full accuracy from the inverse
        shift = (w * torch.sqrt(inverse)).detach().sum(-1) ** -2.0
        L, info = torch.linalg.cholesky_ex(inner + shift[:, None, None] * mass)
        if bool((info != 0).any()):
            raise NotConvergedError(f"{n} trial functions are too many for the coefficients: rounding takes over")
        half = torch.linalg.solve_triangular(L, mass, upper=False)
        S = torch.linalg.solve_triangular(L, half.mT, upper=False)
        values, Y = torch.linalg.eigh(0.5 * (S + S.mT))
        values, Y = values.flip(-1), Y.flip(-1)
        psi = torch.linalg.solve_triangular(L.mT, Y, upper=True) / torch.sqrt(values)[:, None, :]
        rates = 1.0 / values - shift[:, None]
        shapes = psi.new_zeros(psi.shape[0], n, len(free)).index_copy(1, torch.tensor(free), psi)
        edges = rates[:, None, :] * (M[:, :2] @ shapes) - K[:, :2] @ shapes
        slope = (beta * stretch) @ found.expand.T
        g = torch.exp(slope @ integrals(found.points, slope.shape[-1]).T)
        whole = ((w * inverse * g)[:, None, :] @ (B @ shapes))[:, 0]
        return cls(rates, shapes, slope, whole, edges, K, tuple(free))

    def log_weight(self, z: torch.Tensor) -> torch.Tensor:
        """Log g at points (C, s) of [−1, 1], zero at −1."""
        return (integrals(z, self.slope.shape[-1]) * self.slope[:, None, :]).sum(-1)

    def at(self, z: torch.Tensor) -> torch.Tensor:
        """ψ_k at points (C, s), shape (C, s, m)."""
        return trial(z, self.shapes.shape[1]) @ self.shapes

    def start(self, z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Σ_j w_j ψ_k(z_j) / g(z_j) of starting points (C, s), shape (C, m)."""
        return ((weights * torch.exp(-self.log_weight(z)))[:, None, :] @ self.at(z))[:, 0]

    def outflow(self, side: int) -> torch.Tensor:
        """What leaves per time through an absorbing end, per unit of each mode, shape (C, m)."""
        return torch.exp(self.log_weight(self._end(side))) * self.edges[:, side]

    def chosen(self, side: int, z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Probability of ever leaving through an absorbing end, of starting points (C, s): shape (C,).

        It is harmonic, and one at that end; the sum over all modes would be slow to converge.
        """
        free = list(self.free)
        inner = torch.linalg.solve(self.form[:, free][:, :, free], -self.form[:, free][:, :, side])
        shape = self.form.new_zeros(len(self.form), self.form.shape[1])
        shape[:, side] = 1.0
        shape = shape.index_copy(1, torch.tensor(free), inner)
        gauge = torch.exp(self.log_weight(self._end(side)) - self.log_weight(z))
        return (weights * gauge * (trial(z, shape.shape[1]) @ shape[:, :, None])[..., 0]).sum(1)

    def _end(self, side: int) -> torch.Tensor:
        return torch.full((len(self.rates), 1), 2.0 * side - 1.0, dtype=torch.float64)
