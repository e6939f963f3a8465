"""A problem on FiPy's structured meshes, put together from FiPy's own terms."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, as_numpy
from kolmo.fipy.midpoint import Meshed, read
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Natural, Open, Periodic, Reflecting, Robin

# Samples per axis and cell for the averages of terminal data.
SAMPLES = 4


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


class System(Meshed):
    r"""Space discretised with FiPy: :math:`u_\tau = A(t)u + r(t)`.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation, on a finite box in one or two dimensions.
    counts : tuple of int, shape (d,)
        Cells per axis.

    References
    ----------
    J. E. Guyer, D. Wheeler and J. A. Warren (2009), FiPy: partial differential equations with Python, Computing in
    Science & Engineering 11.

    Examples
    --------
    >>> import kolmo
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(0.0, 1.0, "reflecting"))
    >>> A, r = System(problem, (20,)).at(0.0)
    >>> A.shape, r.shape, bool(abs(A.sum(1)).max() < 1e-9)  # constants stay
    ((20, 20), (20, 1), True)
    """

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
        self.columns = self.counted()
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

    def _residual(self, u: np.ndarray) -> np.ndarray:
        """FiPy's residual per volume: diffusion normal to the faces, and convection, of cell values u."""
        self.u.setValue(u)
        return np.asarray(self.equation.justResidualVector(var=self.u) / self.mesh.cellVolumes)

    def _slopes(self) -> list[sp.csr_matrix]:
        """Slope along each axis at the interior faces, from cell values: mean of two central differences."""
        mean, slopes = self.between()[0], []
        for i, (n, h, wraps) in enumerate(zip(self.counts, self.spacing, self.problem.box.periodic, strict=True)):
            D = sp.diags_array([-np.ones(n - 1), np.ones(n - 1)], offsets=[-1, 1], shape=(n, n)).tolil()
            if wraps:
                D[0, -1], D[-1, 0] = -1.0, 1.0
            else:
                D[0, :3], D[-1, -3:] = [-3.0, 4.0, -1.0], [1.0, -4.0, 3.0]
            inner, outer = math.prod(self.counts[:i]), math.prod(self.counts[i + 1 :])
            slopes.append(mean @ sp.kron(sp.eye_array(outer), sp.kron(D / (2.0 * h), sp.eye_array(inner))).tocsr())
        return slopes

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
        k = self.columns or 1
        load = self.source(t, k)
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
            matrix = matrix + self.between()[1] @ fluxes
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
        if not isinstance(wall.face, Absorbing | Robin):
            return np.zeros(len(wall.x)), np.zeros((len(wall.x), 1))
        kappa = (
            read(self.problem, wall.face.kappa, "kappa", t, wall.x)[:, 0]
            if isinstance(wall.face, Robin)
            else np.zeros(len(wall.x))
        )
        return kappa, read(self.problem, wall.face.value, "face value", t, wall.x)

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

    def final(self) -> np.ndarray:
        """Cell averages of the terminal data, shape (cells, k)."""
        offsets = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
        shifts = np.stack(np.meshgrid(*[offsets] * self.problem.dim), -1).reshape(-1, self.problem.dim) * self.spacing
        values: list[Array] = [as_numpy(self.problem.final(self.cells + shift)) for shift in shifts]
        mean = np.mean(values, axis=0)
        return np.asarray(mean if mean.ndim == 2 else mean[:, None], dtype=float)


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


def _elastic(wall: Wall, S: np.ndarray, out: np.ndarray, kappa: np.ndarray) -> np.ndarray:
    """Factor of v − κ·(cell value) at an elastic face: the flux is v − κu there, with u = cell value + flux·h/Σ."""
    normal = S[wall.axis]
    reach = np.divide(wall.h, normal, out=np.zeros_like(normal), where=normal > 0.0)
    return np.asarray((1.0 + out * reach) / (1.0 + kappa * reach) / wall.h)
