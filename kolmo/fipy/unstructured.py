"""A problem on meshes of any shape in the plane: triangles from Gmsh, boundary conditions by physical group."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from kolmo.arrays import as_numpy, as_points
from kolmo.errors import InputError, MissingExtraError
from kolmo.fipy.midpoint import Meshed, read
from kolmo.problem import KolmogorovProblem
from kolmo.problem.faces import WORDS, Absorbing, Constrained, Face, Natural, Reflecting, Robin

KINDS = (Absorbing, Reflecting, Robin, Natural)


@dataclass(frozen=True, eq=False)
class MeshSolution:
    """Cell values :math:`u(0, x_i)` of a solution on a mesh.

    Attributes
    ----------
    problem : KolmogorovProblem
        What was solved.
    values : ndarray, shape (cells,) or (cells, k)
        Values at the cell centres.
    points : ndarray, shape (cells, 2)
        Cell centres.
    gradients : ndarray, shape (cells, 2) or (cells, 2, k)
        Slopes there, by least squares over the neighbours.
    reach : ndarray, shape (cells,)
        Distance from each centre to the farthest corner of its cell.
    steps : int
        Time steps taken; 0 if stationary.

    References
    ----------
    J. E. Guyer, D. Wheeler and J. A. Warren (2009), FiPy: partial differential equations with Python, Computing in
    Science & Engineering 11.
    """

    problem: KolmogorovProblem
    values: np.ndarray
    points: np.ndarray
    gradients: np.ndarray
    reach: np.ndarray
    steps: int

    def __call__(self, x: Any) -> np.ndarray:
        """Value u(0, x) at points (..., 2): linear from the nearest cell centre; shape ``(...)`` or ``(..., k)``.

        Raises
        ------
        InputError
            If a point lies outside the mesh.
        """
        x = np.asarray(as_numpy(as_points(x, 2)))
        distance, cell = cKDTree(self.points).query(x)
        if (distance > self.reach[cell]).any():
            raise InputError("x", "a point outside", "points inside the mesh")
        offset = x - self.points[cell]
        gradients = self.gradients.reshape(len(self.points), 2, -1)[cell]
        rise = np.einsum("...i,...ik->...k", offset, gradients)
        return np.asarray(self.values[cell] + (rise if self.values.ndim == 2 else rise[..., 0]))


def read_mesh(path: str | os.PathLike[str]) -> Any:
    """FiPy's mesh of the triangles in a Gmsh file, with the lines of its physical groups as ``physicalFaces``.

    Parameters
    ----------
    path : path
        A file that Gmsh opens and that holds a mesh of triangles (``.msh``, any version).

    Returns
    -------
    fipy.meshes.mesh2D.Mesh2D

    Raises
    ------
    MissingExtraError
        Without the package gmsh.
    InputError
        For a file that cannot be read or holds no triangles.

    References
    ----------
    C. Geuzaine and J.-F. Remacle (2009), Gmsh, International Journal for Numerical Methods in Engineering 79.
    """
    try:
        import gmsh
    except (ImportError, OSError):  # OSError: the package is there, a system library that it needs is not
        raise MissingExtraError("gmsh (and the system library libGLU)", "gmsh") from None
    if not Path(path).is_file():
        raise InputError("mesh", path, "a mesh file of Gmsh")
    gmsh.initialize(interruptible=False)
    try:
        gmsh.option.setNumber("General.Terminal", 0)
        gmsh.open(os.fspath(path))
        tags, places, _ = gmsh.model.mesh.getNodes()
        triangles = np.reshape(gmsh.model.mesh.getElementsByType(2)[1], (-1, 3)).astype(int)
        groups = {}
        for dimension, tag in gmsh.model.getPhysicalGroups(1):
            name = gmsh.model.getPhysicalName(dimension, tag) or str(tag)
            curves = gmsh.model.getEntitiesForPhysicalGroup(dimension, tag)
            lines = [gmsh.model.mesh.getElementsByType(1, int(curve))[1] for curve in curves]
            groups[name] = np.reshape(np.concatenate(lines), (-1, 2)).astype(int)
    except Exception as error:  # what gmsh raises is a plain Exception
        raise InputError("mesh", f"{path} ({error})", "a mesh file of Gmsh") from None
    finally:
        gmsh.finalize()
    if not len(triangles):
        raise InputError("mesh", f"{path} without triangles", "a mesh of triangles", "gmsh.model.mesh.generate(2)")
    index = np.zeros(int(max(tags)) + 1, dtype=int)
    index[np.asarray(tags, dtype=int)] = np.arange(len(tags))
    vertices = np.reshape(places, (-1, 3))[:, :2]
    return _fipy_mesh(vertices, index[triangles], {name: index[lines] for name, lines in groups.items()})


def _fipy_mesh(vertices: np.ndarray, triangles: np.ndarray, groups: Mapping[str, np.ndarray]) -> Any:
    """FiPy's mesh of triangles (cells, 3), with masks of the faces that lie in each group of lines (n, 2)."""
    import fipy
    from fipy.meshes.mesh2D import Mesh2D

    used, triangles = np.unique(triangles, return_inverse=True)
    triangles = triangles.reshape(-1, 3)
    place = {int(vertex): i for i, vertex in enumerate(used)}
    corners = vertices[used][triangles]
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    clockwise = first[:, 0] * second[:, 1] < first[:, 1] * second[:, 0]
    triangles[clockwise] = triangles[clockwise][:, ::-1]
    edges = np.stack([triangles, np.roll(triangles, -1, axis=1)], -1).reshape(-1, 2)
    faces, which = np.unique(np.sort(edges, axis=1), axis=0, return_inverse=True)
    mesh = Mesh2D(vertices[used].T, faces.T, which.reshape(-1, 3).T)
    number = {tuple(face): i for i, face in enumerate(faces.tolist())}
    mesh.physicalFaces = {}
    for name, lines in groups.items():
        mask = np.zeros(len(faces), dtype=bool)
        ends = [sorted(place.get(int(v), -1) for v in line) for line in lines]
        mask[[number[pair[0], pair[1]] for pair in ends if (pair[0], pair[1]) in number]] = True
        mesh.physicalFaces[name] = fipy.FaceVariable(mesh=mesh, value=mask)
    return mesh


@dataclass(frozen=True)
class Rim:
    """Outer faces with one condition, and the cells behind them."""

    face: Face
    faces: np.ndarray
    cells: np.ndarray


class MeshSystem(Meshed):
    """Space discretised on a mesh in the plane: u_τ = A(t)u + r(t).

    FiPy's diffusion term takes the part of ½Σn along the line between two cell centres; the rest of the flux, and the
    drift b − ½ div Σ, go by least-squares slopes over all cells that share a corner, which are exact for linear u.
    """

    def __init__(self, problem: KolmogorovProblem, mesh: Any, faces: Mapping[str | int, Any]) -> None:
        import fipy

        self.problem, self.fipy, self.mesh = problem, fipy, mesh
        self.cells = np.array(mesh.cellCenters.value.T)
        self.places = np.array(mesh.faceCenters.value.T)
        self.size, self.normals = len(self.cells), np.array(mesh.faceNormals.T)
        self.volumes = np.asarray(mesh.cellVolumes)
        self.areas = np.asarray(mesh._faceAreas)
        self.exterior = np.asarray(mesh.exteriorFaces.value)
        self.first, self.second = (np.asarray(ids.filled(-1)).astype(int) for ids in mesh.faceCellIDs)
        self.rims = self._rims(faces)
        self.interior, self.factors = ~self.exterior, {}
        across = np.where(self.interior[:, None], self.cells[self.second] - self.cells[self.first], 0.0)
        across[self.exterior] = (self.places - self.cells[self.first])[self.exterior]
        self.distance = np.linalg.norm(across, axis=1)
        self.along = across / self.distance[:, None]
        self.slopes = self._slopes()
        self.mean, self.divergence = self.between()
        self.u = fipy.CellVariable(mesh=mesh)
        self.half = fipy.FaceVariable(mesh=mesh)
        self.equation = fipy.DiffusionTerm(coeff=self.half) == 0
        self.equation.cacheMatrix()
        self.columns = self.counted()

    def _rims(self, faces: Mapping[str | int, Any]) -> list[Rim]:
        groups, left = self.mesh.physicalFaces, self.exterior.copy()
        rims = []
        for name, kind in faces.items():
            if name not in groups:
                raise InputError("faces", repr(name), f"a physical group of lines: {', '.join(map(str, groups))}")
            face = WORDS[kind]() if isinstance(kind, str) and kind in WORDS else kind
            if not isinstance(face, KINDS) or isinstance(face, Constrained):
                known = "'absorbing', 'reflecting', 'natural', Absorbing(value) or Robin(kappa, value)"
                raise InputError(f"faces[{name!r}]", repr(kind), known)
            which = np.flatnonzero(np.asarray(groups[name].value) & left)
            left[which] = False
            rims.append(Rim(face, which, self.first[which]))
        if left.any():
            where = self.places[np.flatnonzero(left)[0]].round(4).tolist()
            raise InputError("faces", f"no condition at {where} and {left.sum() - 1} more lines", "one for every group")
        return rims

    def _slopes(self) -> list[sp.csr_matrix]:
        """∂_1 and ∂_2 at the cell centres, by least squares over the cells that share a corner."""
        corners = np.asarray(self.mesh._cellVertexIDs)
        cells = np.broadcast_to(np.arange(self.size), corners.shape)
        touch = sp.csr_matrix((np.ones(corners.size), (cells.ravel(), corners.ravel())))
        near = (touch @ touch.T).tocoo()
        pairs = near.row != near.col
        i, j = near.row[pairs], near.col[pairs]
        d = self.cells[j] - self.cells[i]
        weight = 1.0 / (d**2).sum(1)
        moments = np.zeros((self.size, 2, 2))
        np.add.at(moments, i, weight[:, None, None] * d[:, :, None] * d[:, None, :])
        entries = weight[:, None] * np.linalg.solve(moments[i], d[..., None])[..., 0]
        parts = [sp.csr_matrix((entry, (i, j)), shape=(self.size,) * 2) for entry in entries.T]
        return [part - sp.diags_array(np.asarray(part.sum(1)).ravel()) for part in parts]

    def at(self, t: float) -> tuple[sp.csc_matrix, np.ndarray]:
        """Matrix A and load r, shape (cells, k), at time t."""
        sde, problem = self.problem.sde, self.problem
        S = np.asarray(as_numpy(sde.covariance(t, self.places)), dtype=float)
        flux = 0.5 * np.einsum("fij,fj->fi", S, self.normals)  # conormal ½Σn
        lean = (self.along * self.normals).sum(1)
        straight = (flux * self.normals).sum(1) / lean
        rest = flux - straight[:, None] * self.along
        matrix = self._diffusion(straight) + self._remainder(rest)
        # drift of the flux form, at the centres: b − ½ div Σ, the divergence by Gauss's theorem
        bend = np.zeros((self.size, 2))
        outward = flux * self.areas[:, None]
        np.add.at(bend, self.first, outward)
        np.add.at(bend, self.second[self.interior], -outward[self.interior])
        b = np.asarray(as_numpy(sde.drift(t, self.cells)), dtype=float) - bend / self.volumes[:, None]
        matrix = matrix + sum(sp.diags_array(b[:, i]) @ slope for i, slope in enumerate(self.slopes))
        matrix = matrix - sp.diags_array(np.asarray(as_numpy(problem.rate(t, self.cells)), dtype=float))
        load, self.factors = self.source(t, self.columns or 1), {}
        for rim in self.rims:
            if isinstance(rim.face, Absorbing | Robin):
                part, data = self._through(rim, straight, rest, t)
                matrix = matrix + part
                np.add.at(load, rim.cells, data)
        return sp.csc_matrix(matrix), load

    def _diffusion(self, straight: np.ndarray) -> sp.csr_matrix:
        """FiPy's diffusion term between cells; it closes the outer faces."""
        self.half.setValue(np.where(self.exterior, 0.0, straight))
        self.equation.justResidualVector(var=self.u)
        return sp.diags_array(1.0 / self.volumes) @ self.equation.matrix.matrix

    def _remainder(self, rest: np.ndarray) -> sp.csr_matrix:
        """What flows across interior faces beside the line between the centres: slopes are averaged to the face."""
        fluxes = sum(sp.diags_array(rest[:, i]) @ self.mean @ slope for i, slope in enumerate(self.slopes))
        return self.divergence @ fluxes

    def _through(self, rim: Rim, straight: np.ndarray, rest: np.ndarray, t: float) -> tuple[sp.csr_matrix, np.ndarray]:
        """Flux through absorbing or elastic faces, per volume: the part with u, and the data, shape (faces, k).

        On the face u_f = u + slope·distance along the line from the centre; absorbing: u_f = v; elastic: the flux
        is v − κu_f.
        """
        scale = self.areas[rim.faces] / self.volumes[rim.cells]
        conductance = straight[rim.faces] / self.distance[rim.faces]
        places = self.places[rim.faces]
        v = read(self.problem, rim.face.value, "face value", t, places)  # type: ignore[attr-defined]
        pick = sp.csr_matrix((np.ones(len(rim.faces)), (rim.cells, np.arange(len(rim.faces)))), (self.size, len(v)))
        here = pick.T
        beside = sum(sp.diags_array(rest[rim.faces, i]) @ (here @ slope) for i, slope in enumerate(self.slopes))
        if isinstance(rim.face, Absorbing):
            flux, data = beside - sp.diags_array(conductance) @ here, conductance[:, None] * v
        else:
            kappa = read(self.problem, rim.face.kappa, "kappa", t, places)[:, 0]  # type: ignore[attr-defined]
            # v − κu_f = conductance (u_f − u) + beside, solved for u_f
            share = kappa / np.maximum(kappa + conductance, 1e-300)
            flux = sp.diags_array(share) @ (beside - sp.diags_array(conductance) @ here)
            data = (1.0 - share)[:, None] * v
        return pick @ sp.diags_array(scale) @ flux, scale[:, None] * data

    def solution(self, u: np.ndarray, steps: int) -> MeshSolution:
        """What to hand out: values, slopes and the reach of every cell."""
        gradients = np.stack([slope @ u for slope in self.slopes], 1)
        corners = np.asarray(self.mesh.vertexCoords).T[np.asarray(self.mesh._cellVertexIDs)]
        reach = np.linalg.norm(corners - self.cells, axis=-1).max(0)
        single = self.columns is None
        return MeshSolution(
            self.problem, u[:, 0] if single else u, self.cells, gradients[..., 0] if single else gradients, reach, steps
        )
