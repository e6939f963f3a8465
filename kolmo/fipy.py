"""Cross-check on FiPy: the same equation, put together from FiPy's own terms on its structured meshes."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.interpolate import RegularGridInterpolator
from scipy.sparse.linalg import splu, spsolve

from kolmo.arrays import Array, as_numpy, as_points
from kolmo.box import Absorbing, Box, Entrance, Natural, Open, Periodic, Reflecting, Robin
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.faces import Swept
from kolmo.schemes.generator import discretize
from kolmo.sde import evaluate, refuse_jumps
from kolmo.unstructured import MeshSolution, MeshSystem, read_mesh

# Steps taken first as pairs of implicit Euler steps, so that rough terminal data are damped.
DAMPED = 2
# Samples per axis and cell for the averages of terminal data.
SAMPLES = 4
# Nodes an axis of the grid on which it is seen where paths leave.
COARSE = 9


@dataclass(frozen=True, eq=False)
class FipySolution:
    """Cell values of u at t = 0.

    Attributes
    ----------
    problem : KolmogorovProblem
        What was solved.
    values : ndarray, the mesh's shape, or that and k columns
        Values at the cell centres, ``indexing="ij"``.
    centres : tuple of ndarray
        Cell centres per axis.
    steps : int
        Time steps taken; 0 if stationary.
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
        return np.asarray(spline(x)).reshape(*x.shape[:-1], *values.shape[box.dim :])


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
    if mesh is not None:
        return _on_mesh(problem, mesh, steps, shape, faces)
    if faces is not None:
        raise InputError("faces", faces, "None without a mesh", "the faces of a box belong to it: Box(..., boundary=)")
    counts = _shape(problem, shape)
    _check(problem, steps)
    system = System(problem, counts)
    if problem.horizon is None:
        fields, taken = system.stationary(), 0
    else:
        nodes = _nodes(problem, int(steps or 0))
        fields, taken = system.march(nodes), len(nodes) - 1
    values = fields.T.reshape(*counts, -1)
    return FipySolution(problem, values if system.columns is not None else values[..., 0], system.centres, taken)


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
    if problem.stationary:
        return system.solution(system.stationary(), 0)
    nodes = _nodes(problem, int(steps or 0))
    return system.solution(system.march(nodes), len(nodes) - 1)


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


def _nodes(problem: KolmogorovProblem, steps: int) -> np.ndarray:
    """Times from 0 to T, about ``steps`` equal steps, none across a breakpoint."""
    horizon = float(problem.horizon or 0.0)
    edges = [0.0, *problem.sde.breakpoints, horizon]
    pieces = [
        np.linspace(a, b, max(1, math.ceil(steps * (b - a) / horizon - 1e-9)) + 1)[1:]
        for a, b in itertools.pairwise(edges)
    ]
    return np.concatenate([[0.0], *pieces])


def _mesh(box: Box, counts: tuple[int, ...]) -> Any:
    """FiPy's mesh of the box, with its lower corner at the origin."""
    import fipy

    spacing = [(b - a) / n for a, b, n in zip(box.lower, box.upper, counts, strict=True)]
    if box.dim == 1:
        return (fipy.PeriodicGrid1D if box.periodic[0] else fipy.Grid1D)(nx=counts[0], dx=spacing[0])
    kinds = {
        (False, False): fipy.Grid2D,
        (True, False): fipy.PeriodicGrid2DLeftRight,
        (False, True): fipy.PeriodicGrid2DTopBottom,
        (True, True): fipy.PeriodicGrid2D,
    }
    return kinds[box.periodic[0], box.periodic[1]](nx=counts[0], ny=counts[1], dx=spacing[0], dy=spacing[1])


@dataclass(frozen=True)
class Wall:
    """One face of the box on the mesh: its condition, its mesh faces and the cells behind them.

    Attributes
    ----------
    face : Face
        Condition.
    axis : int
        Axis across it.
    sign : float
        Outward direction, −1 or 1.
    h : float
        Width of the cells across it.
    faces, cells : ndarray of int
        Mesh faces; cells that touch them.
    behind : pair of ndarray of int
        The next cells inwards, and the next but one.
    x : ndarray, shape (faces, d)
        Centres of the mesh faces.
    """

    face: Any
    axis: int
    sign: float
    h: float
    faces: np.ndarray
    cells: np.ndarray
    behind: tuple[np.ndarray, np.ndarray]
    x: np.ndarray


class System:
    """Space discretised with FiPy: u_τ = A(t)u + r(t)."""

    def __init__(self, problem: KolmogorovProblem, counts: tuple[int, ...]) -> None:
        import fipy

        self.problem, self.fipy, self.counts = problem, fipy, counts
        box, d = problem.box, problem.dim
        self.mesh = _mesh(box, counts)
        self.size = int(np.prod(counts))
        self.spacing = (np.array(box.upper) - box.lower) / counts
        self.centres = tuple(
            a + (np.arange(n) + 0.5) * h for a, n, h in zip(box.lower, counts, self.spacing, strict=True)
        )
        # FiPy numbers cells with the first axis running fastest; results are in C order.
        self.order = np.arange(self.size).reshape(counts[::-1]).T.reshape(-1)
        low, high = np.array(box.lower), np.array(box.upper)
        self.cells = self.mesh.cellCenters.value.T + low
        self.faces = np.clip(self.mesh.faceCenters.value.T + low, low, high)
        self.walls = [self._wall(i, s) for i in range(d) for s in (0, 1) if not isinstance(box.faces[i][s], Periodic)]
        self.interior = np.ones(len(self.faces), dtype=bool)
        for wall in self.walls:
            self.interior[wall.faces] = False
        self._equation()
        self.columns = self._columns()
        self.seen: list[np.ndarray] = []
        self.factors: dict[float, Any] = {}
        self.loads: dict[bytes, np.ndarray] = {}

    def _equation(self) -> None:
        """FiPy's variables and the equation between them."""
        fipy, mesh, d = self.fipy, self.mesh, self.problem.dim
        self.half_variance = fipy.FaceVariable(mesh=mesh)  # ½n·Σn
        self.mixed = np.zeros((d, len(self.faces)))  # ½Σn without its normal part
        self.speed = fipy.FaceVariable(mesh=mesh, rank=1)
        self.boundary = fipy.FaceVariable(mesh=mesh)
        self.u = fipy.CellVariable(mesh=mesh)
        for wall in self.walls:
            if isinstance(wall.face, Absorbing):
                mask = np.zeros(len(self.faces), dtype=bool)
                mask[wall.faces] = True
                self.u.constrain(self.boundary, where=mask)
        space = fipy.DiffusionTerm(coeff=self.half_variance) + fipy.CentralDifferenceConvectionTerm(coeff=self.speed)
        self.equation = space == 0
        self.equation.cacheMatrix()

    def _wall(self, axis: int, side: int) -> Wall:
        box = self.problem.box
        edge, sign, h = (box.lower, box.upper)[side][axis], 1.0 if side else -1.0, float(self.spacing[axis])
        faces = np.flatnonzero(self.mesh.exteriorFaces.value & (np.abs(self.faces[:, axis] - edge) < 1e-3 * h))
        cells = np.asarray(self.mesh.faceCellIDs[0])[faces].astype(int)
        inwards = -int(sign) * (1 if axis == 0 else self.counts[0])
        behind = (cells + inwards, cells + 2 * inwards)
        return Wall(box.faces[axis][side], axis, sign, h, faces, cells, behind, self.faces[faces])

    def _columns(self) -> int | None:
        probe = self.cells[:2]
        value = self.problem.running(0.0, probe) if self.problem.stationary else self.problem.final(probe)
        return int(value.shape[1]) if as_numpy(value).ndim == 2 else None

    def _residual(self, u: np.ndarray) -> np.ndarray:
        """FiPy's residual per volume: diffusion normal to the faces, and convection, of cell values u."""
        self.u.setValue(u)
        return np.asarray(self.equation.justResidualVector(var=self.u) / self.mesh.cellVolumes)

    def _slopes(self) -> list[sp.csr_matrix]:
        """Slope along each axis at the interior faces, from cell values: mean of two central differences."""
        first, second = (np.asarray(cells)[self.interior].astype(int) for cells in self.mesh.faceCellIDs)
        rows = np.flatnonzero(self.interior)
        shape = (len(self.faces), self.size)
        mean = sp.csr_matrix((np.full(len(rows), 0.5), (rows, first)), shape)
        mean += sp.csr_matrix((np.full(len(rows), 0.5), (rows, second)), shape)
        slopes = []
        for i, (n, h, wraps) in enumerate(zip(self.counts, self.spacing, self.problem.box.periodic, strict=True)):
            D = sp.diags_array([-np.ones(n - 1), np.ones(n - 1)], offsets=[-1, 1], shape=(n, n)).tolil()
            if wraps:
                D[0, -1], D[-1, 0] = -1.0, 1.0
            else:
                D[0, :3], D[-1, -3:] = [-3.0, 4.0, -1.0], [1.0, -4.0, 3.0]
            inner, outer = math.prod(self.counts[:i]), math.prod(self.counts[i + 1 :])
            slopes.append(mean @ sp.kron(sp.eye_array(outer), sp.kron(D / (2.0 * h), sp.eye_array(inner))).tocsr())
        return slopes

    def _divergence(self) -> sp.csr_matrix:
        """Outflow per volume from fluxes along the normals of the interior faces."""
        cells = [np.asarray(ids)[self.interior].astype(int) for ids in self.mesh.faceCellIDs]
        rows, columns = np.concatenate(cells), np.tile(np.flatnonzero(self.interior), 2)
        area = np.asarray(self.mesh._faceAreas)[self.interior]
        entries = np.concatenate([area, -area]) / np.asarray(self.mesh.cellVolumes)[rows]
        return sp.csr_matrix((entries, (rows, columns)), shape=(self.size, len(self.faces)))

    def at(self, t: float) -> tuple[sp.csc_matrix, np.ndarray]:
        """Matrix A and load r, shape (cells, k), at time t."""
        sde = self.problem.sde
        S = np.moveaxis(np.asarray(as_numpy(sde.covariance(t, self.faces)), dtype=float), 0, -1)
        b = np.asarray(as_numpy(sde.drift(t, self.faces)), dtype=float).T
        c = np.asarray(as_numpy(self.problem.rate(t, self.cells)), dtype=float)
        data = [self._wall_data(w, t) for w in self.walls]
        inputs = [S, b, c, *(kappa for kappa, _ in data)]
        if len(self.seen) != len(inputs) or not all(map(np.array_equal, self.seen, inputs)):
            self.seen, self.factors, self.loads = inputs, {}, {}
            self._write(S, b, c)
            self.across = [(S[:, w.axis, w.faces], w.sign * self.flow[w.axis, w.faces]) for w in self.walls]
            self.matrix = self._inner() + self._through([kappa for kappa, _ in data])
        g = np.asarray(as_numpy(self.problem.running(t, self.cells)), dtype=float)
        k = self.columns or 1
        load = np.array(np.broadcast_to(g if g.ndim == 2 else g[:, None], (len(c), k)))
        for column in range(k):
            walls = [(kappa, v[:, min(column, v.shape[1] - 1)]) for kappa, v in data]
            key = b"".join(v.tobytes() for _, v in walls)
            if key not in self.loads:
                self.loads = (
                    {**self.loads, key: self._load(walls)} if len(self.loads) < 2 * k else {key: self._load(walls)}
                )
            load[:, column] += self.loads[key]
        return self.matrix, load

    def _write(self, S: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        """Write the coefficients into FiPy's variables."""
        d = self.problem.dim
        normals = np.asarray(self.mesh.faceNormals)
        half = 0.5 * np.einsum("ijf,jf->if", S, normals)
        normal = (half * normals).sum(0)
        self.half_variance.setValue(normal)
        self.mixed = (half - normal * normals) * self.interior
        # div Σ in a cell from its faces, so that Σ is read nowhere else
        rows = [self.fipy.FaceVariable(mesh=self.mesh, rank=1, value=S[i]).divergence.value for i in range(d)]
        bend = self.fipy.CellVariable(mesh=self.mesh, rank=1, value=np.stack(rows))
        bend = bend.arithmeticFaceValue.value.copy()
        for wall in self.walls:
            inner = np.stack(rows)
            bend[:, wall.faces] = 1.5 * inner[:, wall.cells] - 0.5 * inner[:, wall.behind[0]]
        self.flow = b - 0.5 * bend
        # FiPy carries nothing through exterior faces; what crosses them is added wall by wall
        self.speed.setValue(self.flow * self.interior)
        self.decay = c + self.speed.divergence.value

    def _inner(self) -> sp.csc_matrix:
        """Matrix of what happens inside: FiPy's, decay, and the mixed fluxes."""
        self.boundary.setValue(0.0)
        self._residual(np.zeros(self.size))
        matrix = sp.diags_array(1.0 / np.asarray(self.mesh.cellVolumes)) @ self.equation.matrix.matrix
        matrix = matrix - sp.diags_array(self.decay)
        if self.mixed.any():
            fluxes = sum(sp.diags_array(part) @ slope for part, slope in zip(self.mixed, self._slopes(), strict=True))
            matrix = matrix + self._divergence() @ fluxes
        return sp.csc_matrix(matrix)

    def _through(self, kappas: list[np.ndarray]) -> sp.csc_matrix:
        """What passes through the walls, as far as it depends on u."""
        rows, columns, values = [], [], []

        def add(row: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
            rows.append(row)
            columns.append(column)
            values.append(np.broadcast_to(value, row.shape))

        for wall, (S, out), kappa in zip(self.walls, self.across, kappas, strict=True):
            if isinstance(wall.face, Absorbing):
                add(wall.cells, wall.cells, -out / wall.h)
            elif isinstance(wall.face, Robin):
                add(wall.cells, wall.cells, -kappa * _elastic(wall, S, out, kappa))
            elif isinstance(wall.face, Natural):
                # mean of the cell and of one beyond the wall that a parabola continues
                for cells, weight in zip((wall.cells, *wall.behind), (2.0, -3.0, 1.0), strict=True):
                    add(wall.cells, cells, 0.5 * weight * out / wall.h)
            elif isinstance(wall.face, Open):
                slope = (0.5 * S[wall.axis] + 0.5 * wall.h * out) / wall.h**2
                add(wall.cells, wall.cells, slope)
                add(wall.cells, wall.behind[0], -slope)
            if isinstance(wall.face, Open | Reflecting):
                for i in set(range(self.problem.dim)) - {wall.axis}:
                    # mixed flux at an open face; at a reflecting one the drift along the slope that it gives rise to
                    factor = wall.sign * 0.5 * S[i] / wall.h
                    if isinstance(wall.face, Reflecting):
                        normal = S[wall.axis]
                        ratio = np.divide(out, normal, out=np.zeros_like(normal), where=normal > 0.0)
                        factor = -wall.h * ratio * factor
                    after, before = self._beside(wall.cells, i)
                    along = factor / np.maximum(self._gap(after, before, i), 1e-300)
                    add(wall.cells, after, along)
                    add(wall.cells, before, -along)
        if not rows:
            return sp.csc_matrix((self.size, self.size))
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return sp.csc_matrix(entries, shape=(self.size, self.size))

    def _beside(self, cells: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Next and previous cells along an axis; a cell itself at the end of the axis."""
        places = list(np.unravel_index(cells, self.counts[::-1]))
        n, at = self.counts[axis], places[-1 - axis]
        neighbours = []
        for step in (1, -1):
            moved = np.mod(at + step, n) if self.problem.box.periodic[axis] else np.clip(at + step, 0, n - 1)
            neighbours.append(
                np.ravel_multi_index([*places[: -1 - axis], moved, *places[len(places) - axis :]], self.counts[::-1])
            )
        return neighbours[0], neighbours[1]

    def _gap(self, after: np.ndarray, before: np.ndarray, axis: int) -> np.ndarray:
        """Distance between neighbouring cells along an axis."""
        if self.problem.box.periodic[axis]:
            return np.full(len(after), 2.0 * self.spacing[axis])
        return np.asarray(self.cells[after, axis] - self.cells[before, axis])

    def _wall_data(self, wall: Wall, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Face's κ (elastic faces only), shape (faces,), and its value, shape (faces, k)."""

        def read(value: Any) -> np.ndarray:
            result = as_numpy(evaluate(value, t, wall.x, "face value", self.problem.arrays))
            result = result if result.ndim == 2 else np.reshape(result, (-1, 1))
            return np.array(np.broadcast_to(result, (len(wall.x), result.shape[1])), dtype=float)

        if not isinstance(wall.face, Absorbing | Robin):
            return np.zeros(len(wall.x)), np.zeros((len(wall.x), 1))
        kappa = read(wall.face.kappa)[:, 0] if isinstance(wall.face, Robin) else np.zeros(len(wall.x))
        return kappa, read(wall.face.value)

    def _load(self, data: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """What the data at the walls bring in."""
        boundary, load = np.zeros(len(self.faces)), np.zeros(self.size)
        for wall, (S, out), (kappa, v) in zip(self.walls, self.across, data, strict=True):
            if isinstance(wall.face, Absorbing):
                boundary[wall.faces] = v
                np.add.at(load, wall.cells, out * v / wall.h)
                for i in set(range(self.problem.dim)) - {wall.axis}:
                    np.add.at(load, wall.cells, wall.sign * 0.5 * S[i] * np.gradient(v, self.spacing[i]) / wall.h)
            elif isinstance(wall.face, Robin):
                np.add.at(load, wall.cells, v * _elastic(wall, S, out, kappa))
        if boundary.any():
            self.boundary.setValue(boundary)
            load += self._residual(np.zeros(self.size))
        return load

    def stationary(self) -> np.ndarray:
        """Cell values in C order, shape (k, cells)."""
        A, load = self.at(0.0)
        return np.stack([splu(A).solve(-r)[self.order] for r in load.T])

    def march(self, nodes: np.ndarray) -> np.ndarray:
        """Cell values at t = 0 in C order, shape (k, cells): implicit midpoint rule from T down."""
        u = self._terminal()
        for n, (start, end) in enumerate(reversed(list(itertools.pairwise(nodes)))):
            half = 0.5 * (end - start)
            if n < DAMPED:
                for t in (end - 0.5 * half, start + 0.5 * half):
                    u = self._euler(u, t, half)
            else:
                # half an implicit Euler step, then as far again in a straight line
                u = 2.0 * self._euler(u, 0.5 * (start + end), half) - u
        return u[self.order].T

    def _euler(self, u: np.ndarray, t: float, dt: float) -> np.ndarray:
        A, load = self.at(t)
        key = float(f"{dt:.12g}")
        if key not in self.factors:
            self.factors[key] = splu(sp.eye(self.size, format="csc") - key * A)
        return np.asarray(self.factors[key].solve(u + dt * load))

    def _terminal(self) -> np.ndarray:
        """Cell averages of the terminal data, shape (cells, k)."""
        offsets = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
        shifts = np.stack(np.meshgrid(*[offsets] * self.problem.dim), -1).reshape(-1, self.problem.dim) * self.spacing
        values: list[Array] = [as_numpy(self.problem.final(self.cells + shift)) for shift in shifts]
        mean = np.mean(values, axis=0)
        return np.asarray(mean if mean.ndim == 2 else mean[:, None], dtype=float)


def _elastic(wall: Wall, S: np.ndarray, out: np.ndarray, kappa: np.ndarray) -> np.ndarray:
    """Factor of v − κ·(cell value) at an elastic face: the flux is v − κu there, with u = cell value + flux·h/Σ."""
    normal = S[wall.axis]
    reach = np.divide(wall.h, normal, out=np.zeros_like(normal), where=normal > 0.0)
    return np.asarray((1.0 + out * reach) / (1.0 + kappa * reach) / wall.h)
