"""The front door: what can be solved on FiPy's meshes, and the solution on a structured one."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse.linalg import spsolve

from kolmo.arrays import as_numpy, as_points
from kolmo.errors import InputError
from kolmo.fipy.structured import System
from kolmo.fipy.unstructured import MeshSolution, MeshSystem, read_mesh
from kolmo.problem.faces import Absorbing, Entrance, Robin
from kolmo.problem.problem import KolmogorovProblem, refuse_moves
from kolmo.problem.sde import refuse_jumps
from kolmo.schemes.faces import Swept
from kolmo.schemes.generator import discretize

# Nodes an axis of the grid on which it is seen where paths leave.
COARSE = 9


@dataclass(frozen=True, eq=False)
class FipySolution:
    """Cell values :math:`u(0, x_i)` of FiPy's solution.

    Attributes
    ----------
    problem : KolmogorovProblem
        What was solved.
    values : ndarray, the mesh's shape, or that and k columns
        Values at the cell centres, ``indexing="ij"``.
    centres : tuple of ndarray, shape (n_i,)
        Cell centres per axis.
    steps : int
        Time steps taken; 0 if stationary.

    References
    ----------
    J. E. Guyer, D. Wheeler and J. A. Warren (2009), FiPy: partial differential equations with Python, Computing in
    Science & Engineering 11.

    Examples
    --------
    >>> import kolmo.fipy
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(0.0, 1.0, "reflecting"))
    >>> found = kolmo.fipy.solve(problem, shape=20, steps=10)
    >>> found.values.shape, found.points.shape, round(float(found([0.5])), 6)
    ((20,), (20, 1), 0.5)
    """

    problem: KolmogorovProblem
    values: np.ndarray
    centres: tuple[np.ndarray, ...]
    steps: int

    @property
    def points(self) -> np.ndarray:
        """All cell centres in C order, shape (cells, d)."""
        return np.stack(np.meshgrid(*self.centres, indexing="ij"), -1).reshape(-1, len(self.centres))

    def __call__(self, x: Any) -> np.ndarray:
        """Interpolate u(0, x) at points ``(..., d)``: cubic, wrapped around periods; shape ``(...)`` or ``(..., k)``.

        Raises
        ------
        InputError
            If a point lies outside the box.
        """
        box = self.problem.box
        x = np.asarray(as_numpy(as_points(x, box.dim)))
        if not box.contains(x).all():
            raise InputError("x", "a point outside", f"points inside {box}")
        axes, values = [], self.values
        for i, (centres, periodic) in enumerate(zip(self.centres, box.periodic, strict=True)):
            if periodic:
                length, pad = box.upper[i] - box.lower[i], min(4, len(centres))
                head, tail = np.take(values, range(pad), i), np.take(values, range(-pad, 0), i)
                values = np.concatenate([tail, values, head], i)
                centres = np.concatenate([centres[-pad:] - length, centres, centres[:pad] + length])
                x = np.where(np.arange(box.dim) == i, box.lower[i] + np.mod(x - box.lower[i], length), x)
            axes.append(centres)
        spline = RegularGridInterpolator(
            axes,
            values,
            "cubic",
            bounds_error=False,
            fill_value=None,
            solver=spsolve,  # the default is iterative
        )
        return np.asarray(spline(x)).reshape((*x.shape[:-1], *values.shape[box.dim :]))


def solve(
    problem: KolmogorovProblem,
    mesh: Any = None,
    *,
    steps: int | None = None,
    shape: int | Sequence[int] | None = None,
    faces: Mapping[str | int, Any] | None = None,
) -> FipySolution | MeshSolution:
    r"""Solve a backward Kolmogorov equation with FiPy, as an independent check.

    .. math:: u_\tau = \nabla\cdot(\tfrac12\Sigma\nabla u) + \nabla\cdot(au) - (c + \nabla\cdot a)u + g,
        \qquad a = b - \tfrac12\nabla\cdot\Sigma,\quad \tau = T - t

    Parameters
    ----------
    problem : KolmogorovProblem
        In one or two dimensions, on a finite box. With ``mesh`` its box does not count.
    mesh : path or fipy mesh, optional
        A plane domain of any shape instead of the box: a mesh file of Gmsh (needs the extra ``gmsh``), or a mesh of
        FiPy with ``physicalFaces``.
    steps : int, optional
        Time steps over the horizon, rounded up so that none straddles a breakpoint; needed unless stationary.
    shape : int or sequence of int, optional
        Cells per axis, at least 4; default 200 in one dimension, 60 × 60 in two.
    faces : mapping, optional
        With ``mesh``: the condition of each physical group of outer lines, as ``{"rim": "absorbing"}``: "absorbing",
        "reflecting", "natural", ``Absorbing(value)`` or ``Robin(kappa, value)``.

    Returns
    -------
    FipySolution or, with ``mesh``, MeshSolution
        Callable at points.

    Raises
    ------
    InputError
        For three dimensions, an infinite box, missing steps, or a stationary problem that has no unique answer.

    Notes
    -----
    FiPy discretises space: its diffusion term on the normal part of Σ at each face, its central convection term, and
    the divergence of the mixed fluxes from central differences (its own term for tensors takes harmonic means of
    slopes, and so does not converge to mixed derivatives). FiPy's matrix is taken as it is; time goes by the
    implicit midpoint rule after damped first steps; terminal data are cell averages. The error is O(Δt² + h²) for
    smooth coefficients.

    Reflecting walls have no conormal flux; absorbing faces are FiPy's constraints; elastic faces bring the flux v − κu
    into their cells (to first order where mixed derivatives cross them). Values are continued from inside along a line
    at open faces (zero second derivative), along a parabola at natural ones.

    On a mesh of triangles FiPy's diffusion term takes the part of the flux along the line between two cell centres;
    the rest of it, and the drift, go by least-squares slopes. The error is O(Δt² + h²) there too.

    References
    ----------
    J. E. Guyer, D. Wheeler and J. A. Warren (2009), FiPy: Partial differential equations with Python, Computing in
    Science & Engineering 11.

    Examples
    --------
    >>> from kolmo import catalog
    >>> import kolmo.fipy
    >>> case = catalog.survival()
    >>> solution = kolmo.fipy.solve(case.problem, steps=40, shape=80)
    >>> bool(abs(solution(case.points) - case.values).max() < 1e-3)
    True
    """
    refuse_jumps(problem.sde, "FiPy", "kolmo.solve")
    refuse_moves(problem, "FiPy", "kolmo.solve")
    if mesh is not None:
        return _on_mesh(problem, mesh, steps, shape, faces)
    if faces is not None:
        raise InputError("faces", faces, "None without a mesh", "the faces of a box belong to it: Box(..., boundary=)")
    counts = _shape(problem, shape)
    _check(problem, steps)
    system = System(problem, counts)
    nodes = _nodes(problem, steps)
    values = system.solved(nodes)[system.order].reshape(*counts, -1)
    values = values if system.columns is not None else values[..., 0]
    return FipySolution(problem, values, system.centres, max(len(nodes) - 1, 0))


def _on_mesh(
    problem: KolmogorovProblem,
    mesh: Any,
    steps: int | None,
    shape: int | Sequence[int] | None,
    faces: Mapping[str | int, Any] | None,
) -> MeshSolution:
    if problem.dim != 2:
        raise InputError("problem", f"dimension {problem.dim}", "two dimensions on a mesh")
    if shape is not None:
        raise InputError("shape", shape, "None: the mesh has its cells")
    if faces is None:
        raise InputError("faces", None, "a condition for each physical group of lines, as {'rim': 'absorbing'}")
    mesh = read_mesh(mesh) if isinstance(mesh, str | os.PathLike) else mesh
    if not hasattr(mesh, "physicalFaces") or mesh.dim != 2:
        raise InputError("mesh", repr(mesh), "a path, or a plane mesh of FiPy with physicalFaces")
    system = MeshSystem(problem, mesh, faces)
    _check_time(problem, steps, any(isinstance(rim.face, Absorbing | Robin) for rim in system.rims))
    nodes = _nodes(problem, steps)
    return system.solution(system.solved(nodes), max(len(nodes) - 1, 0))


def _shape(problem: KolmogorovProblem, shape: int | Sequence[int] | None) -> tuple[int, ...]:
    if problem.dim > 2:
        raise InputError("problem", f"dimension {problem.dim}", "one or two dimensions", "use kolmo.solve")
    if shape is None:
        return (200,) if problem.dim == 1 else (60, 60)
    counts = (int(shape),) * problem.dim if isinstance(shape, int | np.integer) else tuple(int(n) for n in shape)
    if len(counts) != problem.dim or min(counts) < 4:
        raise InputError("shape", shape, f"{problem.dim} numbers of cells, each at least 4")
    return counts


def _check(problem: KolmogorovProblem, steps: int | None) -> None:
    box = problem.box
    if not (np.isfinite(box.lower).all() and np.isfinite(box.upper).all()):
        raise InputError("box", box, "finite ends", "use Box.covering(sde, points, horizon, within=box)")
    if any(isinstance(f, Entrance) for pair in box.faces for f in pair):
        raise InputError(
            "box", box, "no entrance: FiPy reads coefficients on the faces", "compare with monte_carlo instead"
        )
    faces = [f for pair in discretize(problem, COARSE, "monotone").box.faces for f in pair]
    if any(isinstance(f, Swept) and not f.leaves.all() for f in faces):
        raise InputError(
            "box",
            box,
            "noise across every absorbing face, or a drift that points out of it: FiPy imposes the value on all of it",
            "compare with monte_carlo instead",
        )
    _check_time(problem, steps, any(isinstance(f, Absorbing | Robin) for f in faces))


def _check_time(problem: KolmogorovProblem, steps: int | None, ends: bool) -> None:
    """Refuse steps without time, time without steps, and a stationary problem in which nothing ``ends`` a path."""
    if problem.stationary:
        if steps is not None:
            raise InputError("steps", steps, "None for a stationary problem")
        if not ends and problem.killing is None:
            raise InputError(
                "problem", "a stationary problem without absorbing or elastic faces or killing", "one of them"
            )
    elif steps is None or int(steps) != steps or steps < 1:
        raise InputError("steps", steps, "a positive integer")


def _nodes(problem: KolmogorovProblem, steps: int | None) -> np.ndarray:
    """Times from 0 to T, about ``steps`` equal steps, none across a breakpoint; none if stationary."""
    if problem.horizon is None or steps is None:
        return np.zeros(0)
    horizon = float(problem.horizon)
    edges = [0.0, *problem.sde.breakpoints, horizon]
    pieces = [
        np.linspace(a, b, max(1, math.ceil(steps * (b - a) / horizon - 1e-9)) + 1)[1:]
        for a, b in itertools.pairwise(edges)
    ]
    return np.concatenate([[0.0], *pieces])
