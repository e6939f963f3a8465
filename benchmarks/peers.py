"""Other packages on the benchmark problems: each function yields records over its grids, the cheap ones first.

SciPy: central differences of order 4 with DOP853 (and Crank–Nicolson with a tridiagonal LU in one dimension), and the
exponentially fitted generator of Scharfetter & Gummel (1969), a Markov chain, with the same steps. QuantLib:
its finite-difference engines; beyond one dimension an operator composed of its C++ pieces. py-pde: compiled explicit
Runge–Kutta steps. FiPy: implicit diffusion, midpoint steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from benchmarks.problems import Heston, Linear
from benchmarks.timing import Record, measure

Problem = Linear | Heston


Solver = Callable[[Linear, int, int], Any]
"""Problem, nodes along each axis, steps → nodes of an axis, values."""

# How a peer finds out its error: two coarser grids, each with so many times fewer nodes and steps, and the middle one
# again on a box that is so much wider.
COARSER, WIDER = 1.5, 1.25


def _run(name: str, p: Linear, setting: str, solve: Solver, n: int, m: int, limit: float) -> Record:
    (nodes, u), whole, first = measure(lambda: solve(p, n, m), repeats=3, slow=limit / 4)
    record = Record(p.name, name, setting, p.error((nodes,) * p.dim, u), whole, first)
    record.finding_out = lambda: _finding_out(p, solve, n, m)
    return record


def _finding_out(p: Linear, solve: Solver, n: int, m: int) -> float:
    """Seconds of the runs beside the one with n nodes and m steps that its error is known by."""
    coarser = [(round(n / COARSER**k), max(round(m / COARSER**k), 1)) for k in (1, 2)]
    wide, (middle, steps) = replace(p, half=WIDER * p.half), coarser[0]
    works = [lambda n=n, m=m: solve(p, n, m) for n, m in coarser]
    works.append(lambda: solve(wide, round(WIDER * middle), steps))
    return sum(measure(work, repeats=2)[1] for work in works)


def _mesh(p: Linear, n: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(-p.half, p.half, n)
    return x, np.stack(np.meshgrid(*[x] * p.dim, indexing="ij"), -1)


def _phi(p: Linear, X: np.ndarray, h: float) -> np.ndarray:
    """Terminal values; a step averaged over the cell."""
    return np.clip((X[..., 0] - p.mean[0]) / h + 0.5, 0.0, 1.0) if p.kind == "step" else p.phi(X)


# --- SciPy ------------------------------------------------------------------------------------------------------------

STENCILS = {
    2: ([-1 / 2, 0, 1 / 2], [1, -2, 1]),
    4: ([1 / 12, -8 / 12, 0, 8 / 12, -1 / 12], [-1 / 12, 16 / 12, -30 / 12, 16 / 12, -1 / 12]),
}


def _generator(p: Linear, n: int, order: int) -> tuple[np.ndarray, Any, np.ndarray]:
    """Nodes, sparse generator with mirrored ghosts, terminal values."""
    import scipy.sparse as sp

    x, X = _mesh(p, n)
    h, reach = x[1] - x[0], order // 2
    matrices = []
    for weights, scale in zip(STENCILS[order], (h, h * h), strict=True):
        rows = np.repeat(np.arange(n), len(weights))
        columns = np.abs(rows + np.tile(np.arange(-reach, reach + 1), n))
        columns = np.where(columns > n - 1, 2 * (n - 1) - columns, columns)
        matrices.append(sp.csr_matrix((np.tile(weights, n) / scale, (rows, columns)), shape=(n, n)))

    def on(axis: int, D: Any) -> Any:
        out = sp.identity(1, format="csr")
        for k in range(p.dim):
            out = sp.kron(out, D if k == axis else sp.identity(n), format="csr")
        return out

    first = [on(i, matrices[0]) for i in range(p.dim)]
    L = sum(0.5 * p.Sigma[i, i] * on(i, matrices[1]) for i in range(p.dim))
    drift = X.reshape(-1, p.dim) @ p.A.T
    for i in range(p.dim):
        L = L + sp.diags(drift[:, i]) @ first[i]
        for j in range(i):
            if p.Sigma[i, j]:
                L = L + p.Sigma[i, j] * (first[i] @ first[j])
    return x, sp.csr_matrix(L), _phi(p, X, h).ravel()


def scipy(p: Problem, limit: float) -> Iterator[Record]:
    from scipy.integrate import solve_ivp

    if isinstance(p, Heston):
        return

    digits = 4 if p.dim > 1 else 5

    def adaptive(p: Linear, n: int, _: int) -> Any:
        x, L, u = _generator(p, n, 4)
        rtol, atol = 10.0**-digits, 10.0 ** -(digits + 1)
        done = solve_ivp(lambda _, v: L @ v, (0, p.T), u, method="DOP853", rtol=rtol, atol=atol, t_eval=[p.T])
        return x, done.y[:, -1].reshape((n,) * p.dim)

    def crank_nicolson(p: Linear, n: int, m: int) -> Any:
        x, X = _mesh(p, n)
        h = x[1] - x[0]
        b, a = (X @ p.A.T)[:, 0], 0.5 * p.Sigma[0, 0] / h**2
        up, low = a + b / (2 * h), a - b / (2 * h)
        up[0] = low[-1] = 2 * a
        low[0] = up[-1] = 0.0
        return x, _crank_nicolson(_phi(p, X, h), low, up, p.T / m, m)

    grids = {1: (65, 129, 257), 2: (31, 41, 61, 81, 101, 121, 161), 3: (21, 25, 31, 41, 51)}[p.dim]
    if p.dim == 1:
        for n, m in product((65, 129, 257, 513, 1025, 2049), (16, 32, 64, 128, 256)):
            yield _run("SciPy", p, f"Crank–Nicolson {n}, {m}", crank_nicolson, n, m, limit)
    for n in grids:
        found = _run("SciPy", p, f"DOP853 {n}, 1e-{digits}", adaptive, n, 1, limit)
        yield found
        if found.whole > limit:
            return


def _crank_nicolson(u: np.ndarray, low: np.ndarray, up: np.ndarray, dt: float, m: int) -> np.ndarray:
    """m steps of a chain with rates to the left and to the right, after four half steps of implicit Euler."""
    from scipy.linalg.lapack import dgttrf, dgttrs

    low, up = 0.5 * dt * low, 0.5 * dt * up
    middle = -(low + up)
    factors = dgttrf(-low[1:], 1 - middle, -up[:-1])[:5]
    for k in range(m + 2):
        r = u
        if k >= 4:
            r = (1 + middle) * u
            r[1:] += low[1:] * u[:-1]
            r[:-1] += up[:-1] * u[1:]
        u = dgttrs(*factors, r)[0]
    return u


def scharfetter_gummel(p: Problem, limit: float) -> Iterator[Record]:
    """Rates (D/h²) B(∓bh/D) between neighbours, with the drift in the middle and B(z) = z/(eᶻ − 1); Σ diagonal."""
    import scipy.sparse as sp
    from scipy.integrate import solve_ivp
    from scipy.special import exprel

    if isinstance(p, Heston) or np.any(p.Sigma != np.diag(np.diag(p.Sigma))):
        return

    def rates(p: Linear, x: np.ndarray, X: np.ndarray, axis: int) -> list[np.ndarray]:
        """Rates along an axis, to the left and to the right, zero at the ends."""
        h, D = x[1] - x[0], 0.5 * p.Sigma[axis, axis]
        found = []
        for side in (-1.0, 1.0):
            middle = X.copy()
            middle[..., axis] += 0.5 * side * h
            peclet = side * (middle @ p.A.T)[..., axis] * h / D
            rate = D / h**2 / exprel(-peclet)
            np.moveaxis(rate, axis, 0)[0 if side < 0 else -1] = 0.0
            found.append(rate)
        return found

    def chain(p: Linear, n: int, m: int) -> Any:
        x, X = _mesh(p, n)
        return x, _crank_nicolson(_phi(p, X, x[1] - x[0]), *rates(p, x, X, 0), p.T / m, m)

    def adaptive(p: Linear, n: int, _: int) -> Any:
        x, X = _mesh(p, n)
        L = sp.csr_matrix((n**p.dim, n**p.dim))
        for axis in range(p.dim):
            stride = n ** (p.dim - 1 - axis)
            low, up = (rate.ravel() for rate in rates(p, x, X, axis))
            L = L + sp.diags([low[stride:], -(low + up), up[:-stride]], [-stride, 0, stride])
        L, u = sp.csr_matrix(L), _phi(p, X, x[1] - x[0]).ravel()
        done = solve_ivp(lambda _, v: L @ v, (0, p.T), u, method="DOP853", rtol=1e-4, atol=1e-5, t_eval=[p.T])
        return x, done.y[:, -1].reshape((n,) * p.dim)

    name = "Scharfetter–Gummel"
    if p.dim == 1:
        for n, m in product((65, 129, 257, 513, 1025, 2049), (16, 32, 64, 128, 256)):
            yield _run(name, p, f"Crank–Nicolson {n}, {m}", chain, n, m, limit)
        return
    for n in {2: (41, 61, 81, 121, 161), 3: (21, 31, 41, 51)}[p.dim]:
        found = _run(name, p, f"DOP853 {n}", adaptive, n, 1, limit)
        yield found
        if found.whole > limit:
            return


# --- QuantLib ---------------------------------------------------------------------------------------------------------


def quantlib(p: Problem, limit: float) -> Iterator[Record]:
    import QuantLib as ql  # noqa: N813

    schemes = {
        "Crank–Nicolson": ql.FdmSchemeDesc.CrankNicolson,
        "Hundsdorfer–Verwer": ql.FdmSchemeDesc.Hundsdorfer,
        "modified Craig–Sneyd": ql.FdmSchemeDesc.ModifiedCraigSneyd,
    }
    if isinstance(p, Heston):
        yield from _quantlib_heston(ql, p, schemes, limit)
        return
    names = ["Crank–Nicolson"] if p.dim == 1 else ["Hundsdorfer–Verwer"]
    grids = {
        1: product((65, 129, 257, 513, 1025, 2049), (16, 32, 64, 128, 256)),
        2: [(121, 100), (241, 200), (451, 200)] if p.name == "B5" else product((41, 81, 161, 241, 321), (10, 20, 40)),
        3: product((21, 31, 41, 61), (10, 20)),
    }[p.dim]
    for (n, m), name in product(list(grids), names):
        work = lambda p, n, m, name=name: _rollback(ql, p, n, m, schemes[name]())  # noqa: E731
        found = _run("QuantLib", p, f"{name} {n}, {m}", work, n, m, limit)
        yield found
        if found.whole > limit:
            return


def _rollback(ql: Any, p: Linear, n: int, m: int, scheme: Any) -> Any:
    x, X = _mesh(p, n)
    mesher = ql.FdmMesherComposite(*[ql.Uniform1dMesher(-p.half, p.half, n) for _ in range(p.dim)])
    keep: Any = None
    if p.dim == 1:
        today = ql.Settings.instance().evaluationDate
        process = ql.OrnsteinUhlenbeckProcess(-p.A[0, 0], np.sqrt(p.Sigma[0, 0]), 0.0, 0.0)
        operator = ql.FdmOrnsteinUhlenbeckOp(mesher, process, ql.FlatForward(today, 0.0, ql.Actual365Fixed()))
    else:
        drift = X @ p.A.T
        keep = _Composed(ql, p, mesher, [drift[..., i].ravel(order="F") for i in range(p.dim)])
        operator = ql.FdmLinearOpCompositeProxy(keep)
    u = ql.Array(_phi(p, X, x[1] - x[0]).ravel(order="F").tolist())
    nothing = ql.FdmStepConditionComposite(ql.DoubleVector(), ql.FdmStepConditionVector())
    ql.FdmBackwardSolver(operator, ql.FdmBoundaryConditionSet(), nothing, scheme).rollback(u, p.T, 0.0, m, 0)
    return x, np.array(list(u)).reshape((n,) * p.dim, order="F")


class _Composed:
    """The interface that QuantLib's proxy operator calls: all array work is done by its own operators."""

    def __init__(self, ql: Any, p: Linear, mesher: Any, drift: list[np.ndarray]) -> None:
        self.parts, size = [], len(drift[0])
        for i in range(p.dim):
            second = ql.SecondDerivativeOp(i, mesher).mult(ql.Array(size, 0.5 * p.Sigma[i, i]))
            self.parts.append(ql.FirstDerivativeOp(i, mesher).mult(ql.Array(drift[i].tolist())).add(second))
        pairs = [(i, j) for i in range(p.dim) for j in range(i) if p.Sigma[i, j]]
        self.mixed = [(p.Sigma[i, j], ql.SecondOrderMixedDerivativeOp(i, j, mesher)) for i, j in pairs]
        self.zero = ql.Array(size, 0.0)

    def size(self) -> int:
        return len(self.parts)

    def setTime(self, t1: float, t2: float) -> None:  # noqa: N802
        pass

    def apply(self, r: Any) -> Any:
        return sum((part.apply(r) for part in self.parts), self.apply_mixed(r))

    def apply_mixed(self, r: Any) -> Any:
        return sum((op.apply(r) * weight for weight, op in self.mixed), self.zero)

    def apply_direction(self, direction: int, r: Any) -> Any:
        return self.parts[direction].apply(r)

    def solve_splitting(self, direction: int, r: Any, s: float) -> Any:
        return self.parts[direction].solve_splitting(r, s, 1.0)

    def preconditioner(self, r: Any, s: float) -> Any:
        return self.solve_splitting(0, r, s)


def _quantlib_heston(ql: Any, p: Heston, schemes: dict[str, Any], limit: float) -> Iterator[Record]:
    today, days = ql.Date(1, 1, 2025), ql.Actual365Fixed()
    ql.Settings.instance().evaluationDate = today
    rate, none = (ql.YieldTermStructureHandle(ql.FlatForward(today, r, days)) for r in (p.r, 0.0))
    spot = ql.QuoteHandle(ql.SimpleQuote(p.S0))
    model = ql.HestonModel(ql.HestonProcess(rate, none, spot, p.v0, p.kappa, p.theta, p.sigma, p.rho))
    exact = {k: p.exact(k) for k in p.strikes}

    def price(strike: float, n: int, m: int, name: str) -> float:
        exercise = ql.EuropeanExercise(today + round(365 * p.T))
        option = ql.VanillaOption(ql.PlainVanillaPayoff(ql.Option.Call, strike), exercise)
        option.setPricingEngine(ql.FdHestonVanillaEngine(model, m, n, n // 2, 0, schemes[name]()))
        return float(option.NPV())

    name = "modified Craig–Sneyd"
    for n, m in product((30, 40, 60, 80, 120, 160, 240, 320), (10, 20, 40)):
        _, whole, first = measure(lambda n=n, m=m: price(p.strikes[2], n, m, name), repeats=3)
        error = max(abs(price(k, n, m, name) / v - 1) for k, v in exact.items())
        record = Record(p.name, "QuantLib", f"{name} {n}x{n // 2}, {m}", error, whole, first)
        # its box is its own: two coarser grids are all that can be asked for
        record.finding_out = lambda n=n, m=m: sum(
            measure(
                lambda k=k: price(p.strikes[2], round(n / COARSER**k), max(round(m / COARSER**k), 1), name), repeats=2
            )[1]
            for k in (1, 2)
        )
        yield record
        if whole > limit:
            return


# --- py-pde and FiPy --------------------------------------------------------------------------------------------------


def pypde(p: Problem, limit: float) -> Iterator[Record]:
    """Its compilation, once per grid, is in the first call only; in three dimensions it takes minutes."""
    import pde

    if isinstance(p, Heston) or p.dim > 1:
        return
    for n in (65, 129, 257):
        grid = pde.CartesianGrid([(-p.half, p.half)], [n])
        x = grid.axes_coords[0]
        b = pde.ScalarField(grid, p.A[0, 0] * x)
        equation = pde.PDE(
            {"u": f"b * d_dx(u) + {0.5 * p.Sigma[0, 0]} * laplace(u)"}, consts={"b": b}, bc={"derivative": 0.0}
        )
        dt = 0.4 * (x[1] - x[0]) ** 2 / p.Sigma[0, 0]
        solver = pde.ExplicitSolver(equation, scheme="runge-kutta", adaptive=False)
        start = pde.ScalarField(grid, _phi(p, x[:, None], x[1] - x[0]))
        advance = solver.make_stepper(start, dt=dt)

        def work(start: Any = start, advance: Any = advance) -> Any:
            state = start.copy()
            advance(state, 0.0, p.T)
            return state.data

        # another grid is another compilation of seconds: what finding out costs is not asked
        u, whole, first = measure(work, repeats=3, slow=limit / 4)
        yield Record(p.name, "py-pde", f"RK4 {n}", p.error((x,), u), whole, first)


def fipy(p: Problem, limit: float) -> Iterator[Record]:
    """Midpoint steps in divergence form; div b is constant here."""
    from fipy import CellVariable, DiffusionTerm, FaceVariable, Grid1D, Grid2D, TransientTerm
    from fipy import CentralDifferenceConvectionTerm as Convection
    from fipy.solvers.scipy import LinearLUSolver

    if isinstance(p, Heston) or p.dim > 2:
        return

    def work(p: Linear, n: int, m: int) -> Any:
        h = 2 * p.half / n
        mesh = Grid1D(nx=n, dx=h) if p.dim == 1 else Grid2D(nx=n, ny=n, dx=h, dy=h)
        x = -p.half + h * (np.arange(n) + 0.5)
        faces = np.asarray(mesh.faceCenters) - p.half
        X = np.stack(np.meshgrid(*[x] * p.dim, indexing="ij"), -1)
        u = CellVariable(mesh=mesh, value=_phi(p, X, h).T.ravel(), hasOld=True)
        velocity = FaceVariable(mesh=mesh, rank=1, value=p.A @ faces)
        sigma = 0.5 * p.Sigma
        diffusion = DiffusionTerm(coeff=float(sigma[0, 0]) if p.dim == 1 else [sigma.tolist()])
        right = diffusion + Convection(coeff=velocity)
        solver = LinearLUSolver()
        for _ in range(m):
            # implicit midpoint: half a step implicitly, then reflected about it
            u.updateOld()
            before = u.value.copy()
            (TransientTerm() == right).solve(var=u, dt=0.5 * p.T / m, solver=solver)
            u.setValue(2 * u.value - before)
        # u = e^{−T div b} w where w solves the equation without the source −u div b
        return x, np.exp(-p.T * np.trace(p.A)) * np.asarray(u.value).reshape((n,) * p.dim).T

    grids = [(64, 16), (128, 32), (256, 64)] if p.dim == 1 else [(40, 10), (60, 20)]
    for n, m in grids:
        found = _run("FiPy", p, f"midpoint {n}, {m}", work, n, m, limit)
        yield found
        if found.whole > limit:
            return


PEERS: dict[str, Callable[[Problem, float], Iterator[Record]]] = {
    "SciPy": scipy,
    "Scharfetter–Gummel": scharfetter_gummel,
    "QuantLib": quantlib,
    "py-pde": pypde,
    "FiPy": fipy,
}
