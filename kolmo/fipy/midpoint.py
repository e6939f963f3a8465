"""What the systems on FiPy's meshes share: steps in time, and how data at faces are read."""

import itertools
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from kolmo.arrays import as_numpy
from kolmo.problem import KolmogorovProblem
from kolmo.problem.sde import evaluate

# Steps taken first as pairs of implicit Euler steps, so that rough terminal data are damped.
DAMPED = 2


class Meshed(ABC):
    """A problem on a mesh, u_τ = A(t)u + r(t), with what brings it from T to 0.

    Attributes
    ----------
    problem, mesh : KolmogorovProblem, fipy mesh
        As given.
    cells : ndarray, shape (cells, d)
        Their centres.
    interior : ndarray of bool, shape (faces,)
        Mesh faces between two cells.
    factors : dict
        Of steps of a length, for the matrix that ``at`` found last.
    """

    problem: KolmogorovProblem
    mesh: Any
    cells: np.ndarray
    interior: np.ndarray
    factors: dict[float, Any]

    @abstractmethod
    def at(self, t: float) -> tuple[sp.csc_matrix, np.ndarray]:
        """Matrix A and load r, shape (cells, k), at time t; lets go of the factors where A has changed."""

    def counted(self) -> int | None:
        """Number of columns of the answer; None for plain numbers."""
        probe, stationary = self.cells[:2], self.problem.stationary
        value = as_numpy(self.problem.running(0.0, probe) if stationary else self.problem.final(probe))
        return int(value.shape[1]) if value.ndim == 2 else None

    def final(self) -> np.ndarray:
        """Terminal data, shape (cells, k)."""
        return np.asarray(as_numpy(self.problem.final(self.cells)), dtype=float).reshape(len(self.cells), -1)

    def source(self, t: float, columns: int) -> np.ndarray:
        """Source at the centres, shape (cells, k)."""
        g = np.asarray(as_numpy(self.problem.running(t, self.cells)), dtype=float)
        return np.array(np.broadcast_to(g if g.ndim == 2 else g[:, None], (len(g), columns)))

    def solved(self, nodes: np.ndarray) -> np.ndarray:
        """Cell values at t = 0, shape (cells, k): implicit midpoint rule, damped first steps; no times: stationary."""
        if not len(nodes):
            A, load = self.at(0.0)
            return np.asarray(splu(A).solve(-load))
        u = self.final()
        for n, (start, end) in enumerate(reversed(list(itertools.pairwise(nodes)))):
            half = 0.5 * (end - start)
            if n < DAMPED:
                u = self._euler(self._euler(u, end - 0.5 * half, half), start + 0.5 * half, half)
            else:
                # half an implicit Euler step, then as far again in a straight line
                u = 2.0 * self._euler(u, 0.5 * (start + end), half) - u
        return u

    def _euler(self, u: np.ndarray, t: float, dt: float) -> np.ndarray:
        """An implicit Euler step with the coefficients of time t."""
        A, load = self.at(t)
        key = float(f"{dt:.12g}")
        if key not in self.factors:
            self.factors[key] = splu(sp.eye(len(u), format="csc") - key * A)
        return np.asarray(self.factors[key].solve(u + dt * load))

    def between(self) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """From cells to interior faces, the mean of both; and back, the outflow per volume of normal fluxes there."""
        area, volumes = np.asarray(self.mesh._faceAreas), np.asarray(self.mesh.cellVolumes)
        cells = np.concatenate([np.asarray(ids)[self.interior].astype(int) for ids in self.mesh.faceCellIDs])
        faces, inner = np.tile(np.flatnonzero(self.interior), 2), area[self.interior]
        mean = sp.csr_matrix((np.full(len(faces), 0.5), (faces, cells)), shape=(len(area), len(volumes)))
        outflow = np.concatenate([inner, -inner]) / volumes[cells]
        return mean, sp.csr_matrix((outflow, (cells, faces)), shape=(len(volumes), len(area)))


def read(problem: KolmogorovProblem, value: Any, name: str, t: float, x: np.ndarray) -> np.ndarray:
    """Data of a face, a number or a function, at points x of it: shape (points, k)."""
    found = as_numpy(evaluate(value, t, x, name, problem.arrays))
    found = found if found.ndim == 2 else np.reshape(found, (-1, 1))
    return np.array(np.broadcast_to(found, (len(x), found.shape[1])), dtype=float)
