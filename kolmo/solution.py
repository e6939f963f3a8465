"""The answer: values on the grid, interpolated anywhere, with their error estimate."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kolmo import files
from kolmo.arrays import Array, as_like, as_numpy, as_points, is_tensor, namespace
from kolmo.discretization import Discretization
from kolmo.errors import InputError, MissingExtraError
from kolmo.files import schema
from kolmo.grid import Grid
from kolmo.grid.picture import drawn, filmed
from kolmo.grid.times import find
from kolmo.problem.motion import Motion, moved_nodes
from kolmo.refine import stored
from kolmo.shown import Shown


@dataclass(frozen=True, eq=False)
class Solution(Shown):
    r"""Solution u of a backward Kolmogorov equation on a grid.

    Attributes
    ----------
    values : array, shape ``(nt, *grid.shape[, k])``
        Node values :math:`u(t_j, x_i)` at ``times``.
    times : ndarray, shape (nt,)
        Increasing; only t = 0 unless more were saved.
    grid : Grid
        The nodes.
    discretization : Discretization
        The recipe used.
    error_estimate : ndarray or None
        Estimate of the error at t = 0: shape of ``sol(at)``; without ``at`` one number per column; None if the
        discretisation was fixed by the user.
    status : str
        "converged", "fixed", "tolerance_not_met" or "interrupted".
    message : str
        What happened, in a sentence.
    stats : dict
        Cells, steps, levels, seconds, parts of the estimate.
    motion : Motion or None
        Of faces that move: where the nodes are at other times than t = 0, see ``nodes``.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> sol = kolmo.solve(kolmo.KolmogorovProblem(ou, lambda x: x[..., 0] ** 2, 1.0), at=[0.5], rtol=1e-6)
    >>> exact = 0.25 * np.exp(-2) + 0.5 * (1 - np.exp(-2))
    >>> bool(abs(sol(0.5) - exact) < 1e-6), sol.status
    (True, 'converged')
    """

    values: Array
    times: np.ndarray
    grid: Grid
    discretization: Discretization
    error_estimate: np.ndarray | None = None
    status: str = "fixed"
    message: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    motion: Motion | None = None

    @property
    def columns(self) -> int | None:
        """Number of columns k, or None."""
        return int(self.values.shape[-1]) if self.values.ndim == self.grid.dim + 2 else None

    def __call__(self, x: Any, t: float = 0.0) -> Array:
        """Interpolated u(t, x): points (..., d) → (...[, k]); tensors come back as tensors.

        Raises
        ------
        InputError
            For points outside the grid, and a time that was not saved.
        """
        return self._interpolate(x, t, None)

    def gradient(self, x: Any, t: float = 0.0) -> Array:
        """∇u(t, x), shape (..., d[, k]).

        Raises
        ------
        InputError
            For points outside the grid, and a time that was not saved.
        """
        d = self.grid.dim
        return self._stack([self._interpolate(x, t, [int(i == j) for j in range(d)]) for i in range(d)])

    def nodes(self, t: float = 0.0) -> tuple[np.ndarray, ...]:
        """Nodes of each axis at a time: those of the grid, unless faces move."""
        return moved_nodes(self.grid.nodes, self.motion, t)

    def hessian(self, x: Any, t: float = 0.0) -> Array:
        """∇²u(t, x), shape (..., d, d[, k]).

        Raises
        ------
        InputError
            For points outside the grid, and a time that was not saved.
        """
        d = self.grid.dim
        rows = []
        for i in range(d):
            orders = [[int(i == m) + int(j == m) for m in range(d)] for j in range(d)]
            rows.append(self._stack([self._interpolate(x, t, order) for order in orders]))
        return self._stack(rows, depth=2)

    def _stack(self, parts: list[Array], depth: int = 1) -> Array:
        return namespace(*parts).stack(parts, -depth if self.columns is None else -depth - 1)

    def _interpolate(self, x: Any, t: float, derivatives: Sequence[int] | None) -> Array:
        u = self._at_time(t)
        points = as_points(x, self.grid.dim)
        if is_tensor(points) and not is_tensor(u):
            u = as_like(u, points)
        elif is_tensor(u) and not is_tensor(points):
            u = as_numpy(u)
        if self.motion is None:
            return self.grid.interpolate(u, points, self.discretization.width, derivatives)
        still = self.motion.inwards(t, points)
        try:
            values = self.grid.interpolate(u, still, self.discretization.width, derivatives)
        except InputError as error:  # say it in the coordinates of whoever asked
            ends = [f"{nodes[0]:.6g} .. {nodes[-1]:.6g}" for nodes in self.nodes(t)]
            raise InputError(error.argument, "a point outside", f"points in {', '.join(ends)} at t = {t:g}") from None
        for w, order in zip(self.motion.width(t, values), derivatives or (), strict=False):
            values = values / w**order
        return values

    def _at_time(self, t: float) -> Array:
        """Node values at a saved time, shape (size[, k])."""
        scale = self.discretization.times[-1:]  # with t = 0 alone saved, the horizon says what is near
        at = find([*self.times, *scale], t)
        if at is None or at >= len(self.times):
            shown = ", ".join(f"{s:g}" for s in self.times[:8]) + (", ..." if len(self.times) > 8 else "")
            raise InputError("t", t, f"one of the saved times ({shown})", f"solve(..., save=[{t:g}])")
        values = self.values[at]
        return values.reshape(self.grid.size, *values.shape[self.grid.dim :])

    def plot(self, ax: Any = None, t: float = 0.0, column: int = 0, **style: Any) -> Any:
        """Plot u(t, ·): a line in one dimension, filled contours in two, the middle slice in three.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.
        t : float
            A saved time.
        column : int
            Which column, if there are several.
        **style
            Passed to ``Axes.plot`` or ``Axes.contourf``.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        InputError
            For a time that was not saved.
        """
        return drawn(ax, self.nodes(t), self._drawn(t, column), f"$u({t:g}, x)$", style)

    def animate(self, ax: Any = None, column: int = 0, **style: Any) -> Any:
        """u(t, ·) over the saved times, on one scale: a line in one dimension, filled contours beyond.

        In three dimensions the middle slice is shown.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.
        column : int
            Which column, if there are several.
        **style
            Passed to ``Axes.plot`` or ``Axes.contourf``.

        Returns
        -------
        matplotlib.animation.FuncAnimation
            ``.save("u.gif")`` writes it, ``.to_jshtml()`` shows it in a notebook. Keep it: matplotlib forgets a film
            that nobody holds.

        Raises
        ------
        InputError
            Where fewer than two times were saved: ``solve(..., save=times)``.

        Examples
        --------
        >>> import kolmo, numpy as np
        >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
        >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(-1.0, 1.0, "reflecting"))
        >>> film = kolmo.solve(problem, grid=21, steps=20, save=np.linspace(0.0, 1.0, 5)).animate()
        >>> film.save("u.gif")  # doctest: +SKIP
        """
        return filmed(ax, self.times.tolist(), lambda t: (self.nodes(t), self._drawn(t, column)), "$u(t, x)$", style)

    def _drawn(self, t: float, column: int) -> np.ndarray:
        """What is drawn of the values at a saved time: of three dimensions the middle slice."""
        u = as_numpy(self._at_time(t))
        u = (u if u.ndim == 1 else u[:, column]).reshape(self.grid.shape)
        return np.asarray(u[:, :, u.shape[2] // 2] if self.grid.dim == 3 else u)

    def to_xarray(self) -> Any:
        """The values as a labelled array (needs the extra ``xarray``).

        Returns
        -------
        xarray.DataArray
            Named ``u``, with axes ``t``, then ``x`` or ``x1``, ``x2``, ``x3``, and ``column`` if there are several (of
            faces that move: nodes at t = 0, and those of all times beside them as ``x_t`` or ``x1_t``, ..);
            attributes ``status``, ``message`` and ``error_estimate``.

        Raises
        ------
        MissingExtraError
            If xarray is not installed.

        Examples
        --------
        >>> import kolmo
        >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
        >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(-1.0, 1.0, "reflecting"))
        >>> kolmo.solve(problem, grid=21, steps=8).to_xarray().dims
        ('t', 'x')
        """
        try:
            import xarray
        except ImportError:
            raise MissingExtraError("xarray", "xarray") from None
        d = self.grid.dim
        axes = {"x" if d == 1 else f"x{i + 1}": nodes for i, nodes in enumerate(self.grid.nodes)}
        columns = {} if self.columns is None else {"column": np.arange(self.columns)}
        attributes: dict[str, Any] = {"status": self.status, "message": self.message}
        if self.error_estimate is not None:
            attributes["error_estimate"] = np.ravel(self.error_estimate).tolist()
        coordinates: dict[str, Any] = {"t": self.times, **axes, **columns}
        names = list(coordinates)
        if self.motion is not None:
            places = [self.nodes(float(t)) for t in self.times]
            coordinates |= {f"{axis}_t": (("t", axis), np.stack([x[i] for x in places])) for i, axis in enumerate(axes)}
        return xarray.DataArray(as_numpy(self.values), coordinates, names, "u", attributes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the solution and its recipe to one ``.npz`` file (no pickle); read it with ``kolmo.load``."""
        tree = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grid"}
        tree |= {"values": as_numpy(self.values), "discretization": self.discretization.record()}
        tree["motion"] = None if self.motion is None else self.motion.record()
        files.write_tree(Path(path), {"solution": tree})

    def _facts(self) -> dict[str, Any]:
        told = ("status", "message", "error_estimate", "values", "times", "grid", "discretization", "stats")
        return {name: getattr(self, name) for name in told}

    def __repr__(self) -> str:
        estimate = "" if self.error_estimate is None else f", error≈{float(np.max(self.error_estimate)):.1e}"
        return f"Solution({self.status}{estimate}, {self.grid!r}, {len(self.times)} times)"


def load(path: str | os.PathLike[str]) -> Solution:
    """Read a solution written by ``Solution.save``.

    Parameters
    ----------
    path : path
        The file.

    Raises
    ------
    FileError
        If the file is missing or damaged.
    InputError
        If it is not a solution.

    Examples
    --------
    >>> import kolmo, tempfile, os
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(-1.0, 1.0, "reflecting"))
    >>> sol = kolmo.solve(problem, grid=21, steps=8)
    >>> path = os.path.join(tempfile.mkdtemp(), "u.npz")
    >>> sol.save(path)
    >>> bool(kolmo.load(path)(0.3) == sol(0.3))
    True
    """
    return files.read_record(Path(path), "solution", _RECORD, _rebuilt, "a file written by Solution.save")


_STATUSES = ("converged", "fixed", "tolerance_not_met", "interrupted")
_RECORD = schema.of(
    Solution,
    grid=None,
    values=schema.array("f", finite=False),
    times=schema.array("f", None),
    discretization=stored.recipe(Discretization),
    status=schema.text(_STATUSES),
    motion=schema.optional(stored.motion()),
)


def _rebuilt(tree: dict[str, Any]) -> Solution:
    """A solution from its record, whose parts fit together."""
    recipe = Discretization.restored(tree.pop("discretization"))
    moved = tree.pop("motion", None)
    moved = None if moved is None else Motion.from_record(moved)
    found = Solution(grid=recipe.grid, discretization=recipe, motion=moved, **tree)
    if moved is not None and moved.dim != recipe.grid.dim:
        raise schema.refuse("solution.motion", moved.dim, f"{recipe.grid.dim} axes")
    shape = (len(found.times), *recipe.grid.shape)
    schema.same_shape("solution", shape, values=found.values)
    if found.values.ndim > len(shape) + 1:
        raise schema.refuse("solution.values", found.values, f"shape {shape}, or one axis more")
    if found.status in ("converged", "fixed") and not np.isfinite(found.values).all():
        raise schema.refuse("solution.values", found.values, "finite numbers")
    if found.error_estimate is not None and found.error_estimate.size == 0:
        raise schema.refuse("solution.error_estimate", found.error_estimate, "numbers")
    if len(found.times) == 0 or not (np.diff(found.times) > 0).all():
        raise schema.refuse("solution.times", found.times, "increasing times")
    return found
