"""Checks of what a discretisation must satisfy, as functions that return small tables.

Every check is seeded, works on any problem, and returns a :class:`Table` that prints itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.forward import solve_forward
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem
from kolmo.problem.faces import Robin
from kolmo.schemes.generator import discretize
from kolmo.schemes.local import on_face
from kolmo.solve import solve

Nodes = Grid | int | Sequence[int]


@dataclass(frozen=True)
class Table:
    """A small table of results.

    Attributes
    ----------
    title : str
        What was checked.
    columns : tuple of str
        Names of the columns.
    rows : tuple of tuple
        Numbers and words, one tuple a row.

    Examples
    --------
    >>> print(Table("squares", ("n", "square"), ((1, 1.0), (2, 4.0))))
    squares
    n  square
    1       1
    2       4
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def column(self, name: str) -> np.ndarray:
        """All values of a column.

        Raises
        ------
        InputError
            For a column that there is not.
        """
        if name not in self.columns:
            raise InputError("name", repr(name), "one of " + ", ".join(self.columns))
        return np.array([row[self.columns.index(name)] for row in self.rows])

    def worst(self, name: str) -> float:
        """Largest absolute value of a column; NaN if there is one.

        Raises
        ------
        InputError
            For a column that there is not.
        """
        return float(np.abs(self.column(name)).max())

    def __str__(self) -> str:
        cells = [self.columns, *[tuple(_shown(v) for v in row) for row in self.rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, *lines])


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def order_of_accuracy(
    problem: KolmogorovProblem,
    exact: Callable[[float, np.ndarray], Any],
    at: Any,
    *,
    nodes: Iterable[Nodes],
    steps: Iterable[int] | int | None,
    scheme: str = "auto",
    stepper: str = "auto",
) -> Table:
    r"""Errors at t = 0 on finer and finer discretisations, and the order that consecutive ones show.

    .. math:: \text{order} = \log(e_{j-1}/e_j) / \log(h_{j-1}/h_j)

    with h the spacing where the nodes are refined, and the time step where only the steps are.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation, on a finite box (or nodes given as grids).
    exact : callable
        Exact answer ``exact(t, x)``, as ``Case.exact`` of ``kolmo.catalog``.
    at : array_like, shape (..., d)
        Points where the error is measured; the largest counts.
    nodes : iterable of int, tuple or Grid
        One per level; a single entry is used on every level.
    steps : iterable of int, int or None
        Time steps per level; a number is used on every level; None for stationary problems.
    scheme, stepper : str
        Methods.

    Returns
    -------
    Table
        Columns level, nodes, steps, error, order; the first order is NaN.

    Raises
    ------
    InputError
        For different numbers of nodes and steps, and as ``solve``.

    References
    ----------
    P. J. Roache (1998), Verification and Validation in Computational Science and Engineering.

    Examples
    --------
    >>> from kolmo import catalog
    >>> case = catalog.circle()
    >>> table = order_of_accuracy(case.problem, case.exact, case.points, nodes=[16, 32], steps=16, scheme="central4")
    >>> bool(3.5 < table.rows[-1][-1] < 4.5)
    True
    """
    grids: list[Nodes] = list(nodes)
    counts: list[int | None] = [steps] if steps is None or isinstance(steps, int) else list(steps)
    levels = max(len(grids), len(counts))
    grids, counts = grids * (levels if len(grids) == 1 else 1), counts * (levels if len(counts) == 1 else 1)
    if len(grids) != len(counts):
        raise InputError("nodes, steps", f"{len(grids)} and {len(counts)} levels", "as many of one as of the other")
    reference = np.asarray(exact(0.0, as_numpy(at)))
    rows: list[tuple[Any, ...]] = []
    before = (1.0, 1.0)
    for level, (n, m) in enumerate(zip(grids, counts, strict=True)):
        sol = solve(problem, grid=n, steps=m, scheme=scheme, stepper=stepper)
        error = float(np.abs(np.asarray(sol(at)) - reference).max())
        size = float(sol.grid.axes[0].h), 1.0 / (m or 1)
        order = math.nan
        if rows:
            ratio = before[0] / size[0] if before[0] != size[0] else before[1] / size[1]
            order = math.log(max(rows[-1][3], 1e-300) / max(error, 1e-300)) / math.log(ratio)
        before = size
        rows.append((level, "×".join(map(str, sol.grid.shape)), sol.discretization.steps, error, order))
    first = sol.discretization
    title = f"order of accuracy: {first.scheme}, {first.stepper}"
    return Table(title, ("level", "nodes", "steps", "error", "order"), tuple(rows))


def _recipe(problem: KolmogorovProblem, discretization: Discretization | None, fixed: dict[str, Any]) -> Discretization:
    """The recipe given, or the one that ``solve`` makes of grid, steps, scheme and stepper."""
    return solve(problem, **fixed).discretization if discretization is None else discretization


def duality_gap(
    problem: KolmogorovProblem,
    discretization: Discretization | None = None,
    *,
    laws: int = 3,
    points: int = 5,
    seed: int = 0,
    **fixed: Any,
) -> Table:
    r"""Solve backwards and forwards, separately, and compare the two sides of the duality.

    .. math::
        \int u(0, x)\,d\mu(x) = \int \varphi\,d\mu_T + \text{(what source and faces pay on the way)}

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation; terminal data, source and face values all enter.
    discretization : Discretization, optional
        A recipe; else give ``grid=``, ``steps=``, ``scheme=``, ``stepper=`` as to ``solve``.
    laws, points, seed : int
        How many random laws μ, of how many random points each.
    **fixed
        Passed to ``solve``.

    Returns
    -------
    Table
        Columns law, backward, forward, gap; the gap is relative to the largest value of u(0, ·).

    Raises
    ------
    InputError
        As ``solve`` and ``solve_forward``.

    Examples
    --------
    >>> from kolmo import catalog
    >>> duality_gap(catalog.circle().problem, grid=16, steps=4).worst("gap") < 1e-12
    True
    """
    recipe = _recipe(problem, discretization, fixed)
    sol = solve(problem, discretization=recipe)
    low, high = recipe.grid.box
    rng = np.random.default_rng(seed)
    rows = []
    for law in range(laws):
        x = low + (high - low) * rng.random((points, problem.dim))
        backward = np.atleast_1d(np.asarray(sol(x)).mean(0))
        forward = np.atleast_1d(solve_forward(problem, x, discretization=recipe).value)
        j = int(np.abs(backward - forward).argmax())
        gap = float(np.abs(backward - forward)[j] / (np.abs(as_numpy(sol.values)).max() + 1e-300))
        rows.append((law, float(backward[j]), float(forward[j]), gap))
    return Table(f"duality: {recipe.scheme}, {recipe.stepper}", ("law", "backward", "forward", "gap"), tuple(rows))


def maximum_principle(
    problem: KolmogorovProblem,
    discretization: Discretization | None = None,
    *,
    trials: int = 4,
    seed: int = 0,
    **fixed: Any,
) -> Table:
    r"""March rough random data, with nothing paid on the way, and see how far the answer leaves their range.

    Without source and face values, and with killing c ≥ 0, every solution stays within
    :math:`[\min(\varphi, 0), \max(\varphi, 0)]`.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process, faces and killing; its own data are left aside.
    discretization : Discretization, optional
        A recipe; else give ``grid=``, ``steps=``, ``scheme=``, ``stepper=`` as to ``solve``.
    trials, seed : int
        How many random data of −1 and 1 (odd trials: of 0 and 1, few ones).
    **fixed
        Passed to ``solve``.

    Returns
    -------
    Table
        Columns trial, lowest, highest, overshoot: by how much the answer leaves the range, at worst over time.

    Raises
    ------
    InputError
        As ``solve``.

    References
    ----------
    A. Friedman (1964), Partial Differential Equations of Parabolic Type, chapter 2.

    Examples
    --------
    >>> from kolmo import catalog
    >>> methods = {"scheme": "monotone", "stepper": "implicit-euler"}
    >>> table = maximum_principle(catalog.circle().problem, grid=16, steps=2, **methods)
    >>> table.worst("overshoot") < 1e-13
    True
    """
    recipe = _recipe(problem, discretization, fixed)
    march = recipe.march(problem)
    free = np.flatnonzero(~march.generator.fixed)
    rng = np.random.default_rng(seed)
    rows = []
    for trial in range(trials):
        u = rng.integers(0, 2, (recipe.grid.size, 1)) * 2.0 - 1.0
        if trial % 2:
            u = (rng.random((recipe.grid.size, 1)) < 0.1) * 1.0
            u[rng.choice(free)] = 1.0
        u = march.without_boundary(u)
        bounds = min(float(u.min()), 0.0), max(float(u.max()), 0.0)
        lowest, highest = float(u.min()), float(u.max())
        for plan in march.plans:
            step, loads = march.prepared(plan)
            u = step.apply(u, [0.0 * r[:, :1] for r in loads])
            lowest, highest = min(lowest, float(u.min())), max(highest, float(u.max()))
        rows.append((trial, lowest, highest, float(max(bounds[0] - lowest, highest - bounds[1], 0.0))))
    title = f"maximum principle: {recipe.scheme}, {recipe.stepper}"
    return Table(title, ("trial", "lowest", "highest", "overshoot"), tuple(rows))


def mass_balance(
    problem: KolmogorovProblem,
    discretization: Discretization | None = None,
    *,
    points: int = 5,
    seed: int = 0,
    **fixed: Any,
) -> Table:
    r"""March random points forward and balance the probability.

    .. math:: \sum_i p_i(t) + \sum_{\text{faces}} \int_0^t f\,ds + \text{killed}(t) = 1

    Parameters
    ----------
    problem : KolmogorovProblem
        The process.
    discretization : Discretization, optional
        A recipe; else give ``grid=``, ``steps=``, ``scheme=``, ``stepper=`` as to ``solve``.
    points, seed : int
        How many random points make the initial law.
    **fixed
        Passed to ``solve``.

    Returns
    -------
    Table
        One row per way out, with what went there until the horizon; then "inside", and "imbalance": the largest
        deviation of the sum from one over all time nodes.

    Raises
    ------
    InputError
        As ``solve_forward``.

    Examples
    --------
    >>> from kolmo import catalog
    >>> print(mass_balance(catalog.exit_right().problem, grid=31, steps=16).rows[-1][0])
    imbalance
    """
    recipe = _recipe(problem, discretization, fixed)
    low, high = recipe.grid.box
    x = low + (high - low) * np.random.default_rng(seed).random((points, problem.dim))
    density = solve_forward(problem, x, discretization=recipe)
    total = density.mass + sum(density.exited(e) for e in density.exits)
    rows: list[tuple[Any, ...]] = [(str(e), float(density.exited(e)[-1])) for e in density.exits]
    rows += [("inside", float(density.mass[-1])), ("imbalance", float(np.abs(total - 1.0).max()))]
    return Table(f"mass balance: {recipe.scheme}, {recipe.stepper}", ("where", "probability"), tuple(rows))


def generator_signs(problem: KolmogorovProblem, grid: Nodes, scheme: str = "auto", t: float = 0.0) -> Table:
    r"""Row sums and signs of the generator matrix, in units of its largest entry.

    .. math:: \sum_jQ_{ij} = -c_i, \qquad Q_{ij} \ge 0 \text{ for } j \ne i

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    grid : Grid, int or tuple
        Nodes.
    scheme : str
        Name of the scheme.
    t : float
        Time.

    Returns
    -------
    Table
        Rows "largest row sum" and "smallest row sum", killing added, at nodes that are neither absorbing nor elastic
        (zero where probability is conserved), and "lowest off-diagonal" (not negative for a monotone scheme).

    Raises
    ------
    InputError
        As ``discretize``.

    References
    ----------
    H. J. Kushner and P. Dupuis (2001), Numerical Methods for Stochastic Control Problems in Continuous Time.

    Examples
    --------
    >>> from kolmo import catalog
    >>> generator_signs(catalog.circle().problem, 16, "monotone").rows[-1][1] >= 0.0
    True
    """
    generator = discretize(problem, grid, scheme)
    Q = generator.matrix(t).tocoo()
    scale = float(np.abs(Q.data).max())
    sums = np.asarray(Q.sum(1)).ravel() + as_numpy(generator.local(t).c)
    inner = ~generator.fixed
    for i, side, face in generator.box.each():
        if isinstance(face, Robin):
            # the stencils of an elastic face reach into the grid
            reach = min(generator.scheme.order + 1, generator.grid.shape[i] - 1)
            index = np.unravel_index(np.arange(generator.grid.size), generator.grid.shape)[i]
            inner &= (index > reach) if side == 0 else (index < generator.grid.shape[i] - 1 - reach)
            inner &= ~on_face(generator.grid, i, side)
    sums = sums[inner] / scale
    off = Q.data[Q.row != Q.col] / scale
    rows = (
        ("largest row sum", float(sums.max(initial=0.0))),
        ("smallest row sum", float(sums.min(initial=0.0))),
        ("lowest off-diagonal", float(off.min(initial=0.0))),
    )
    return Table(f"generator: {generator.scheme.name}", ("what", "value"), rows)


def taylor_test(
    objective: Callable[[], Any],
    parameters: Any,
    *,
    step: float = 1e-2,
    levels: int = 5,
    seed: int = 0,
) -> Table:
    r"""Remainder of the first-order Taylor expansion along a random direction: order 2 where the gradient is right.

    .. math:: R(h) = |J(p + hv) - J(p) - h\,\nabla J(p)\cdot v|

    Parameters
    ----------
    objective : callable
        ``objective()`` -> scalar tensor J at the present values of the parameters.
    parameters : tensor, iterable of tensors, or torch.nn.Module
        Leaves that require gradients; restored afterwards.
    step : float
        Largest h; halved from level to level. The direction has unit length.
    levels, seed : int
        How many steps, and the seed of the direction.

    Returns
    -------
    Table
        Columns h, remainder, order; order is infinite where the remainder is rounding.

    Raises
    ------
    RuntimeError
        Where torch finds no gradient of the objective.

    References
    ----------
    P. E. Farrell, D. A. Ham, S. W. Funke and M. E. Rognes (2013), SIAM Journal on Scientific Computing 35.

    Examples
    --------
    >>> import torch
    >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> table = taylor_test(lambda: (p**3).sum(), p)
    >>> bool(abs(table.column("order")[1:] - 2.0).max() < 0.1)
    True
    """
    import torch

    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.parameters()
    leaves = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    value = objective()
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    rng = torch.Generator().manual_seed(seed)
    direction = [torch.randn(p.shape, generator=rng, device="cpu", dtype=torch.float64).to(p) for p in leaves]
    length = math.sqrt(sum(float((v**2).sum()) for v in direction))
    direction = [v / length for v in direction]
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, direction, strict=True) if g is not None)
    start, base = [p.detach().clone() for p in leaves], float(value.detach())
    rows: list[tuple[float, float, float]] = []
    try:
        for level in range(levels):
            h = step * 0.5**level
            with torch.no_grad():
                for p, p0, v in zip(leaves, start, direction, strict=True):
                    p.copy_(p0 + h * v)
                moved = float(objective())
            remainder = abs(moved - base - h * slope)
            rounding = 1e-14 * max(abs(base), abs(moved), abs(h * slope))
            order = math.nan if not rows else math.inf
            if rows and remainder > rounding:
                order = math.log2(max(rows[-1][1], 1e-300) / remainder)
            rows.append((h, remainder, order))
    finally:
        with torch.no_grad():
            for p, p0 in zip(leaves, start, strict=True):
                p.copy_(p0)
    return Table("Taylor remainder", ("h", "remainder", "order"), tuple(rows))
