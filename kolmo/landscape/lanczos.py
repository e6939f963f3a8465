"""Lanczos' iteration on weights: leading eigenvalues with residuals, and quadratures of the spectrum."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kolmo.landscape.operators import Hessian

WHOLE = 48  # up to this many parameters the Krylov space is the whole space

_BREAKDOWN = 100.0  # rounding units of the largest coefficient: the Krylov space is invariant


class Pairs(NamedTuple):
    """Eigenvalues, unit eigenvectors in rows, residual norms."""

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray


def leading(hessian: Hessian, top: int, rtol: float, most: int, generator: torch.Generator) -> Pairs:
    """Largest eigenpairs by Lanczos with full re-orthogonalisation, as soon as their residuals allow."""
    if top == 0:
        return Pairs(np.zeros(0), hessian.normal(generator)[None][:0], np.zeros(0))
    process = Lanczos(hessian, hessian.normal(generator), generator)
    least = hessian.size if hessian.size <= WHOLE else top
    while True:
        process.step()
        values, vectors, residuals = process.ritz(top)
        enough = len(values) == top and len(process.alphas) >= least
        scale = max(abs(float(values[0])), process.scale * process.small)
        if (enough and residuals.max() <= rtol * scale) or len(process.alphas) >= min(most, hessian.size):
            break
    return Pairs(values, vectors @ process.basis(), residuals)


class Lanczos:
    """Lanczos process with full re-orthogonalisation; a new start where the Krylov space is invariant.

    Parameters
    ----------
    hessian : callable
        ``hessian(v)`` -> (Hv, ...).
    start : Tensor
        First vector.
    generator : torch.Generator
        Of new starts.
    deflated : Tensor, optional
        Orthonormal rows that are projected out.
    """

    def __init__(
        self, hessian: Hessian, start: Tensor, generator: torch.Generator, deflated: Tensor | None = None
    ) -> None:
        self._hessian, self._generator, self._deflated = hessian, generator, deflated
        self._rows: list[Tensor] = []
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.small = _BREAKDOWN * torch.finfo(start.dtype).eps
        self._next: Tensor | None = self._unit(start)

    @property
    def scale(self) -> float:
        """Largest coefficient so far."""
        return max(map(abs, [*self.alphas, *self.betas]), default=1.0)

    def basis(self) -> Tensor:
        """Orthonormal rows."""
        return torch.stack(self._rows)

    def _unit(self, v: Tensor) -> Tensor | None:
        """Normalised part of v that is orthogonal to everything so far; None where nothing is left of it."""
        size = float(v.norm())
        for _ in range(2):
            if self._deflated is not None and len(self._deflated):
                v = v - self._deflated.T @ (self._deflated @ v)
            for row in self._rows:
                v = v - row * (row @ v)
        left = float(v.norm())
        return None if left <= 1e-5 * size else v / left

    def step(self) -> None:
        """One product: the next coefficients."""
        assert self._next is not None
        self._rows.append(self._next)
        w = self._hessian(self._next)[0]
        self.alphas.append(float(w.double() @ self._next.double()))
        before = self.scale
        for _ in range(2):
            if self._deflated is not None and len(self._deflated):
                w = w - self._deflated.T @ (self._deflated @ w)
            rows = self.basis()
            w = w - rows.T @ (rows @ w)
        beta = float(w.norm())
        if beta > self.small * max(before, beta):
            self.betas.append(beta)
            self._next = w / beta
            return
        self.betas.append(0.0)
        self._next = self._unit(self._hessian.normal(self._generator))

    def tridiagonal(self) -> np.ndarray:
        """The projected matrix T."""
        off = self.betas[:-1]
        return np.diag(self.alphas) + np.diag(off, 1) + np.diag(off, -1)

    def ritz(self, top: int) -> tuple[np.ndarray, Tensor, np.ndarray]:
        """Largest Ritz values, their coordinates in the basis (rows) and their residual norms."""
        values, vectors = np.linalg.eigh(self.tridiagonal())
        chosen = np.argsort(values)[::-1][:top]
        coordinates = torch.from_numpy(vectors[:, chosen].T.copy()).to(self._rows[0])
        return values[chosen], coordinates, self.betas[-1] * np.abs(vectors[-1, chosen])


def spectral_quadrature(
    hessian: Hessian, pairs: Pairs, probes: int, steps: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the spectral measures of random vectors in the complement of the found eigenvectors."""
    steps = min(steps, hessian.size - len(pairs.values))
    if probes == 0 or steps == 0:
        return np.zeros((0, 0)), np.zeros((0, 0))
    nodes, weights = [], []
    for _ in range(probes):
        process = Lanczos(hessian, hessian.normal(generator), generator, pairs.vectors)
        for _ in range(steps):
            process.step()
        values, vectors = np.linalg.eigh(process.tridiagonal())
        nodes.append(values)
        weights.append(vectors[0] ** 2)
    return np.array(nodes), np.array(weights)
