"""Coefficients that jump or bend: order of accuracy, duality, gradients, mass and records on grids with breaks."""

from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import ive
from scipy.stats import norm

import kolmo
from kolmo import SDE, Absorbing, Box, Grid, InputError, KolmogorovProblem, control, solve, solve_forward
from kolmo.discretization import Discretization
from kolmo.grid import Axis
from kolmo.grid.grading import Focused, Pieces, Sinh, Uniform
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import discretize
from kolmo.schemes.terminal import plan_averages, plan_terminal
from kolmo.testing import duality_gap, mass_balance, taylor_test

QUAD = {"epsabs": 1e-14, "epsrel": 1e-12, "limit": 400}


def broken(base, places, cells, periodic=False):
    """An axis with a node on every place and so many cells between them."""
    cells = np.asarray(cells, dtype=int)
    knots = np.cumsum(cells) / np.sum(cells)
    nodes = tuple(int(n) for n in np.cumsum(cells)[:-1])
    total = int(np.sum(cells)) + (0 if periodic else 1)
    return Axis(total, Pieces(base, tuple(places), tuple(knots[:-1].tolist())), periodic, nodes)


def cells_between(base, places, count, least=8):
    """About so many cells, shared out as the map has them."""
    ends = [0.0, *(float(base.inverse(np.float64(p))) for p in places), 1.0]
    return np.maximum(2 * np.round(np.diff(ends) * count / 2), least).astype(int)


# ------------------------------------------------------------------------------------ exact answers on the whole line
def through_zero(y, T, rate, from_zero, untouched):
    """Expectation from y of a functional of W: with the first zero at (y / |N(0, 1)|)², or without one until T."""
    if y == 0.0:
        return from_zero(T)
    a = abs(y)
    after = lambda v: 2 * norm.pdf(v) * np.exp(-rate * (a / v) ** 2) * from_zero(T - (a / v) ** 2)  # noqa: E731
    least = a / np.sqrt(T)
    met = quad(after, least, 40.0, points=[least + 0.1, least + 1.0, least + 6.0], **QUAD)[0]
    return met + untouched * np.exp(-rate * T) * (1 - 2 * norm.sf(least))


class Killing:
    """Rate θ above c and φ = 1: Kac's functional, E exp(−θ·time above) from c is exp(−z) I0(z), z = θT/2."""

    def __init__(self, rng):
        self.c, self.T, self.theta = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 1.0), rng.uniform(1, 4)
        self.sde, self.source = SDE(0.0, 1.0, dim=1), None

    def killing(self, t, x):
        return self.theta * (x[..., 0] > self.c)

    def terminal(self, x):
        return 1.0 + 0 * x[..., 0]

    def exact(self, x):
        y = x - self.c
        zero = lambda t: ive(0, 0.5 * self.theta * t)  # noqa: E731
        return through_zero(y, self.T, self.theta if y > 0 else 0.0, zero, 1.0)


class KillingAndData(Killing):
    """φ = 1{x > c} jumps there too: from c, ½ exp(−z) (I0(z) − I1(z)) by the Laplace transform."""

    def terminal(self, x):
        return (x[..., 0] > self.c) * 1.0

    def exact(self, x):
        y = x - self.c
        zero = lambda t: 0.5 * (ive(0, 0.5 * self.theta * t) - ive(1, 0.5 * self.theta * t))  # noqa: E731
        return through_zero(y, self.T, self.theta if y > 0 else 0.0, zero, float(y > 0))


class Source:
    """How long c is exceeded."""

    killing = None

    def __init__(self, rng):
        self.c, self.T, self.m = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 1.0), rng.uniform(-1, 1)
        self.sde = SDE(self.m, 1.0, dim=1)

    def source(self, t, x):
        return (x[..., 0] > self.c) * 1.0

    def terminal(self, x):
        return 0.0 * x[..., 0]

    def _at(self, q, z):
        """What the source gives in the mean of N(z, q²)."""
        return norm.cdf(z / q)

    def exact(self, x):
        f = lambda q: 2 * q * self._at(q, x + self.m * q * q - self.c) if q > 0 else 0.0  # noqa: E731
        return quad(f, 0, np.sqrt(self.T), points=[min(abs(x - self.c), 0.9 * np.sqrt(self.T))], **QUAD)[0]


class BentSource(Source):
    """A source |x − c|."""

    def source(self, t, x):
        return np.abs(x[..., 0] - self.c)

    def _at(self, q, z):
        return z * (1 - 2 * norm.cdf(-z / q)) + 2 * q * norm.pdf(z / q)


class Friction:
    """dX = −m sign(X − c) dt + dW (Karatzas and Shreve 1991, section 6.5)."""

    killing = source = None
    shape = staticmethod(np.cos)

    def __init__(self, rng):
        self.c, self.T, self.m = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 1.0), rng.uniform(0.5, 2)
        self.sde = SDE(lambda t, x: -self.m * np.sign(x - self.c), 1.0, dim=1)

    def terminal(self, x):
        return self.shape(x[..., 0] - self.c)

    def _density(self, x, y):
        m, T, (x, y) = self.m, self.T, (abs(x), y if x >= 0 else -y)
        q = np.sqrt(2 * np.pi * T)
        if y >= 0:
            tail = m * np.exp(-2 * m * y) * norm.sf((x + y - m * T) / np.sqrt(T))
            return np.exp(-((x - y - m * T) ** 2) / (2 * T)) / q + tail
        tail = m * np.exp(2 * m * y) * norm.sf((x - y - m * T) / np.sqrt(T))
        return np.exp(2 * m * x - (x - y + m * T) ** 2 / (2 * T)) / q + tail

    def exact(self, x):
        z, far = x - self.c, 16.0
        f = lambda y: self._density(z, y) * self.shape(y)  # noqa: E731
        return sum(quad(f, a, b, points=[z] if a < z < b else None, **QUAD)[0] for a, b in ((-far, 0), (0, far)))


class FrictionAndData(Friction):
    """φ jumps there too."""

    shape = staticmethod(lambda y: (np.asarray(y) > 0) * 1.0)


class Noise(Friction):
    """σ = a above c and b below (Keilson and Wellner 1978): the kernels are reflected with R = (b − a)/(a + b)."""

    def __init__(self, rng):
        self.c, self.T = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.6)
        self.a, self.b = rng.uniform(0.3, 1.5, 2)
        self.sde = SDE(0.0, lambda t, x: np.where(x[..., 0] > self.c, self.a, self.b), dim=1)

    def _density(self, x, y):
        a, b = (self.a, self.b) if y > 0 else (self.b, self.a)
        x, y, root = (x, y, np.sqrt(self.T)) if y > 0 else (-x, -y, np.sqrt(self.T))
        if x > 0:
            return (norm.pdf((x - y) / (a * root)) + (b - a) / (a + b) * norm.pdf((x + y) / (a * root))) / (a * root)
        return 2 * b / (a + b) * norm.pdf((y / a - x / b) / root) / (a * root)


class NoiseAndData(Noise):
    """φ jumps there too."""

    shape = staticmethod(lambda y: (np.asarray(y) > 0) * 1.0)


CASES = [Killing, KillingAndData, Source, BentSource, Friction, FrictionAndData, Noise, NoiseAndData]
AND_DATA = KillingAndData, FrictionAndData, NoiseAndData
# Exponentially fitted rates have order two where noise dominates.
ORDER = {name: 2 if name == "monotone" else SCHEMES[name].order for name in SCHEMES}
# Numbers of cells by order of the coarser of two grids, and the errors below which the answers' own accuracy shows.
CELLS = {2: 60, 4: 70, 6: 70}
FLOOR = 3e-9


@lru_cache(maxsize=32)
def drawn(kind, seed=0):
    """A random case, a graded map, points on, beside and away from the break, and the answers there."""
    rng = np.random.default_rng([seed, CASES.index(kind)])
    case = kind(rng)
    maps = (
        Sinh(-9.0, 9.0, rng.uniform(-1, 1), rng.uniform(1.0, 2.0)),
        Focused(-9.0, 9.0, (rng.uniform(-1, 1), case.c), (1.5, 0.7), (4.0, 1.0)),
    )
    points = np.array([case.c, *(case.c + rng.uniform(-1, 1, 3)), case.c + 1e-3, case.c - 1e-3])
    return case, maps[int(rng.integers(2))], points[:, None], np.array([case.exact(x) for x in points])


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize(
    ("kind", "seed"),
    [*((k, 0) for k in CASES), *(pytest.param(k, s, marks=pytest.mark.slow) for k in CASES for s in (1, 2, 3))],
)
def test_order_with_a_node_on_the_break(kind, seed, scheme):
    case, base, points, exact = drawn(kind, seed)
    order, errors = ORDER[scheme], []
    problem = KolmogorovProblem(
        case.sde, case.terminal, case.T, Box(-9.0, 9.0), killing=case.killing, source=case.source
    )
    # data that jump show the order later
    cells = cells_between(base, [case.c], CELLS[order] * (1.5 if kind in AND_DATA else 1.0))
    factors = (1, 2) if order < 4 else (1, 2, 4)
    for factor in factors:
        sol = solve(problem, grid=Grid([broken(base, [case.c], factor * cells)]), steps=48, scheme=scheme)
        errors.append(np.abs(sol(points) - exact).max())
    # the finest pair counts: on coarse grids parts of an error may cancel
    assert np.log2(errors[-2] / errors[-1]) > order - 0.6 or errors[-1] < FLOOR, errors
    assert errors[1] < {2: 5e-3, 4: 1e-4, 6: 1e-5}[order], errors


@pytest.mark.parametrize("kind", [Killing, Friction, Noise, BentSource])
def test_without_a_node_there_the_order_is_lost(kind):
    """The comparison that shows what the node is worth: the same grids without it."""
    case, base, points, exact = drawn(kind)
    problem = KolmogorovProblem(
        case.sde, case.terminal, case.T, Box(-9.0, 9.0), killing=case.killing, source=case.source
    )
    count = int(cells_between(base, [case.c], 100).sum())
    with_node = Grid([broken(base, [case.c], cells_between(base, [case.c], 100))])
    without = Grid([Axis(count + 1, base)])
    errors = [np.abs(solve(problem, grid=g, steps=48)(points) - exact).max() for g in (with_node, without)]
    assert errors[0] < 0.1 * errors[1], errors


# ------------------------------------------------------------------------- manufactured answers, one and two dimensions
class Patched:
    """u = e^(−t) Σ X_k(x) Y_k(y) with second derivatives that jump at two places of each axis that has breaks.

    Drift, full covariance, killing and source jump there too; the source is what makes u the solution on every side.
    """

    horizon = 0.1

    def __init__(self, rng, breaking, periodic, full=True):
        self.d, self.breaking, self.periodic = len(breaking), breaking, periodic
        # ends, breaks and wave number of each axis
        self.low, self.length = rng.uniform(-1, 1, self.d), rng.uniform(1.5, 2.5, self.d)
        parts = np.stack([rng.uniform(0.2, 0.4, self.d), rng.uniform(0.6, 0.8, self.d)], 1)
        # on a circle the map may not bend at its seam: cells that are the same on all pieces
        parts = np.where(np.array(periodic)[:, None], np.round(10 * parts) / 10, parts)
        self.places = self.low[:, None] + self.length[:, None] * parts
        self.k = 2 * np.pi / self.length
        self.levels = rng.uniform(-0.8, 0.8, (6, self.d))
        self.phase, self.full = rng.uniform(0, 1, self.d), full and self.d > 1

    def inside(self, x, i):
        p, q = self.places[i]
        return ((x[..., i] > p) & (x[..., i] < q)) * float(self.breaking[i])

    def _wave(self, x, i):
        z = self.k[i] * (x[..., i] - self.low[i]) + self.phase[i]
        return [np.cos(z), -self.k[i] * np.sin(z), -(self.k[i] ** 2) * np.cos(z)]

    def _patch(self, x, i):
        """The square of a positive part: its second derivative jumps at both of its ends."""
        p, q = self.places[i]
        s, size = x[..., i], 16.0 / (q - p) ** 4
        f, slope, on = (s - p) * (q - s), p + q - 2 * s, self.inside(x, i)
        return [size * on * f**2, size * on * 2 * f * slope, size * on * (2 * slope**2 - 4 * f)]

    def jet(self, t, x):
        """u, ∇u and ∇²u; steady where there is no horizon."""
        decay = np.exp(-t) if self.horizon else 1.0
        terms = [[self._wave(x, i) for i in range(self.d)]]
        for j in range(self.d):
            if self.breaking[j]:
                terms.append([self._patch(x, j) if i == j else self._wave(x, i) for i in range(self.d)])
        value = lambda orders: (  # noqa: E731
            decay * sum(np.prod([term[i][o] for i, o in enumerate(orders)], axis=0) for term in terms)
        )
        unit = np.eye(self.d, dtype=int)
        first = np.stack([value(unit[i]) for i in range(self.d)], -1)
        second = np.stack([np.stack([value(unit[i] + unit[j]) for j in range(self.d)], -1) for i in range(self.d)], -2)
        return value(np.zeros(self.d, dtype=int)), first, second

    def _jumping(self, which, x):
        """A smooth function with a jump at every break."""
        waves = [0.2 * self._wave(x, i)[0] + self.levels[which, i] * self.inside(x, i) for i in range(self.d)]
        return sum(waves)

    def drift(self, t, x):
        return np.stack([self._jumping(i, x) for i in range(self.d)], -1)

    def covariance(self, t, x):
        size = 1.0 + 0.5 * self._jumping(2, x) / self.d
        shape = np.eye(self.d) + 0.4 * self.full * (np.ones((self.d, self.d)) - np.eye(self.d))
        return size[..., None, None] * shape

    def killing(self, t, x):
        return 2.0 + self._jumping(3, x)

    def source(self, t, x):
        u, first, second = self.jet(t, x)
        noise = 0.5 * (self.covariance(t, x) * second).sum((-1, -2))
        return (u if self.horizon else 0.0) - (self.drift(t, x) * first).sum(-1) - noise + self.killing(t, x) * u

    def exact(self, x):
        return self.jet(0.0, x)[0]

    def problem(self):
        wall = Absorbing(lambda t, x: self.jet(t, x)[0])
        faces = [("periodic", "periodic") if p else (wall, wall) for p in self.periodic]
        box = Box(self.low, self.low + self.length, faces)
        sde = SDE(self.drift, covariance=self.covariance, dim=self.d)
        terminal = (lambda x: self.jet(self.horizon, x)[0]) if self.horizon else None
        return KolmogorovProblem(sde, terminal, self.horizon, box, killing=self.killing, source=self.source)

    def grid(self, cells, factor=1):
        axes = []
        for i in range(self.d):
            ends = self.low[i], self.low[i] + self.length[i]
            base = Uniform(*ends) if self.periodic[i] else Sinh(*ends, self.low[i] + 0.4 * self.length[i], 1.0)
            if self.breaking[i]:
                count = factor * cells_between(base, self.places[i], cells)
                axes.append(broken(base, self.places[i], count, self.periodic[i]))
            else:
                axes.append(Axis(int(factor * cells) + (not self.periodic[i]), base, self.periodic[i]))
        return Grid(axes)


ONE = [((True,), (False,)), ((True,), (True,))]
TWO = [((True, False), (False, False)), ((True, True), (False, False)), ((True, True), (True, False))]
# Cells along an axis of the coarser of two grids, and the larger error allowed on the finer one.
COARSE = {1: {2: 40, 4: 40, 6: 60}, 2: {2: 40, 4: 40, 6: 40}}
LARGEST = {2: 0.05, 4: 5e-3, 6: 5e-4}


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize(
    ("breaking", "periodic", "seed"),
    [*((*c, 0) for c in (*ONE, *TWO)), *(pytest.param(*c, 1, marks=pytest.mark.slow) for c in (*ONE, *TWO))],
)
def test_order_of_manufactured_answers(breaking, periodic, seed, scheme):
    """Everything jumps at once, one and two dimensions, breaks on one and on both axes, walls and circles."""
    d, order = len(breaking), ORDER[scheme]
    case = Patched(np.random.default_rng([seed, d, sum(breaking), sum(periodic)]), breaking, periodic)
    case.horizon = 0.1 if d == 1 else None
    points = case.low + case.length * np.random.default_rng(1).uniform(0.02, 0.98, (40, d))
    points[:2, 0] = case.places[0]
    errors, crossing = [], sum(breaking) > 1
    for factor in (1, 1.5 if (d, order) == (2, 6) and not crossing else 2):
        grid = case.grid(COARSE[d][order], factor)
        sol = solve(case.problem(), grid=grid, steps=None if d == 2 else 8, scheme=scheme)
        errors.append(np.abs(sol(points) - case.exact(points)).max())
    seen = np.log(errors[0] / errors[1]) / np.log(factor)
    # the nodes where breaks cross are few, and have the mean of their four corners
    assert seen > min(order, 2 if crossing else order) - 0.7 or errors[1] < 1e-9, (seen, errors)
    assert errors[1] < LARGEST[order], errors


# --------------------------------------------------------------------------- identities, whatever the coefficients are
def rough_problem(rng, dim, words, killing=True, arrays="numpy"):
    """Random coefficients that jump at a place of every axis; no answer is known."""
    low, high = -1.0 - rng.random(dim), 1.0 + rng.random(dim)
    c, a = rng.uniform(-0.5, 0.5, dim), rng.uniform(-1, 1, (4, dim))
    above = lambda x: (x > c) * 1.0  # noqa: E731
    size = lambda x: 1.0 + 0.4 * (above(x) * a[0]).sum(-1) + 0.1 * np.cos(x.sum(-1))  # noqa: E731
    shape = np.eye(dim) + 0.3 * (np.ones((dim, dim)) - np.eye(dim))
    sde = SDE(
        lambda t, x: a[1] * np.cos(x) + 2.0 * a[2] * above(x) * (1 + t),
        covariance=lambda t, x: size(x)[..., None, None] * shape,
        dim=dim,
    )
    rate = (lambda t, x: 1.0 + (above(x) * a[3]).sum(-1) + t) if killing else None
    source = (lambda t, x: (above(x) * a[0]).sum(-1) + t) if killing else None
    return KolmogorovProblem(
        sde,
        lambda x: (above(x) * a[1]).sum(-1) + np.sin(x.sum(-1)),
        0.05,
        Box(low, high, words),
        killing=rate,
        source=source,
    ), c


def rough_grid(problem, c, cells):
    """A node on every jump, graded where no circle forbids it."""
    axes = []
    for i, periodic in enumerate(problem.box.periodic):
        ends = problem.box.lower[i], problem.box.upper[i]
        base = Uniform(*ends) if periodic else Sinh(*ends, c[i] + 0.2, 1.0)
        axes.append(broken(base, [c[i]], cells_between(base, [c[i]], cells), periodic))
    return Grid(axes)


WORDS = [
    [("reflecting", "absorbing")], [("periodic", "periodic")], [("open", "robin")],
    [("absorbing", "reflecting"), ("periodic", "periodic")], [("robin", "open"), ("reflecting", "absorbing")],
]  # fmt: skip
ELASTIC = kolmo.Robin(0.7, 0.3)


def named(words):
    return [tuple(ELASTIC if w == "robin" else w for w in pair) for pair in words]


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("words", [w for w in WORDS if not any("robin" in pair for pair in w)])
def test_rows_sum_to_minus_the_killing(words, scheme, rng):
    """On a break c is a mean of what is around."""
    problem, c = rough_problem(rng, len(words), words)
    grid = rough_grid(problem, c, 18)
    generator = discretize(problem, grid, scheme)
    free = ~generator.fixed
    killing = generator.local(0.02).c
    sums = np.asarray(generator.matrix(0.02).sum(1)).ravel() + killing
    assert np.abs(sums[free]).max() < 1e-12 * np.abs(generator.matrix(0.02)).max()
    corners = [1e-9 * np.array(signs) for signs in product((-1, 1), repeat=len(words))]
    around = [problem.rate(0.02, grid.points + corner) for corner in corners]
    assert (killing >= np.min(around, axis=0) - 1e-8).all()
    assert (killing <= np.max(around, axis=0) + 1e-8).all()


@pytest.mark.parametrize("scheme", ["central2", "central6", "monotone"])
@pytest.mark.parametrize("words", WORDS)
def test_forward_and_backward_agree(words, scheme, rng):
    """⟨Qu, p⟩ = ⟨u, Qᵀp⟩ through whole marches, face values and sources included."""
    problem, c = rough_problem(rng, len(words), named(words))
    split = len(words) == 2 and scheme != "monotone"
    for stepper in ("mcs3" if split else "radau3", "implicit-euler"):
        table = duality_gap(problem, grid=rough_grid(problem, c, 16), steps=3, scheme=scheme, stepper=stepper, laws=1)
        assert table.worst("gap") < 1e-10, table


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("word", ["reflecting", "periodic"])
def test_mass_is_conserved(word, dim, scheme, rng):
    problem, c = rough_problem(rng, dim, word, killing=False)
    grid = rough_grid(problem, c, {1: 30, 2: 16}[dim])
    law = solve_forward(problem, np.stack([c, c + 0.1]), grid=grid, steps=4, scheme=scheme)
    assert np.abs(law.mass - 1.0).max() < 1e-11
    assert law.exits == ()


@pytest.mark.parametrize("scheme", ["central6", "monotone"])
def test_what_leaves_is_accounted_for(scheme, rng):
    problem, c = rough_problem(rng, 2, named([("absorbing", "reflecting"), ("robin", "absorbing")]))
    table = mass_balance(problem, grid=rough_grid(problem, c, 16), steps=3, scheme=scheme)
    assert table.rows[-1][1] < 1e-11, table


@pytest.mark.parametrize("scheme", ["central2", "central6", "monotone"])
def test_taylor_remainder_of_everything_that_jumps(scheme, rng):
    """The gradient of ``control.value`` is that of the number returned: remainders of order two."""
    start = torch.tensor([0.5, -0.4, 1.2, 0.7, 2.0, 0.3], dtype=torch.float64, requires_grad=True)
    p, c = [start], float(rng.uniform(-0.4, 0.4))
    above = lambda x: (x[..., 0] > c).to(x.dtype)  # noqa: E731
    sde = SDE(
        lambda t, x: p[0][0] * x + p[0][1] * above(x)[..., None],
        diffusion=lambda t, x: p[0][3] + (p[0][2] - p[0][3]) * above(x),
        dim=1,
        arrays="torch",
    )
    problem = KolmogorovProblem(
        sde,
        lambda x: torch.cos(x[..., 0]) + p[0][5] * above(x),
        0.3,
        Box(-1.5, 2.0, [("reflecting", "absorbing")]),
        killing=lambda t, x: p[0][4] * above(x),
        source=lambda t, x: p[0][5] * torch.abs(x[..., 0] - c),
    )
    base = Sinh(-1.5, 2.0, 0.2, 1.0)
    grid = Grid([broken(base, [c], cells_between(base, [c], 24))])
    recipe = solve(problem, grid=grid, steps=6, scheme=scheme).discretization
    at = torch.tensor([[c], [c + 0.3], [-1.0]], dtype=torch.float64)
    table = taylor_test(lambda: control.value(problem, at, discretization=recipe).sum(), [start], levels=4)
    assert (table.column("order")[1:] > 1.9).all(), table


# --------------------------------------------------------------------------------------------------------- interpolation  # noqa: E501
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [4, 6, 8])
def test_interpolation_is_exact_on_either_side(width, seed):
    """Polynomials of the width's degree on each piece, that meet at the breaks and nothing more."""
    rng = np.random.default_rng([seed, width])
    places = np.sort(rng.uniform(-0.5, 1.5, 2)) + np.array([0.0, 0.2])
    axis = broken(Uniform(-1.0, 2.0), places, rng.integers(width, 14, 3))
    grid = Grid([axis])
    parts = [np.polynomial.Polynomial(rng.normal(size=width)) for _ in range(3)]
    parts[1] = parts[1] + parts[0](places[0]) - parts[1](places[0])
    parts[2] = parts[2] + parts[1](places[1]) - parts[2](places[1])
    x = np.concatenate([rng.uniform(-1, 2, 200), places])
    which = lambda x: np.searchsorted(places, x, side="right")  # noqa: E731
    f = lambda x, m=0: np.array([(parts[i].deriv(m) if m else parts[i])(v) for i, v in zip(which(x), x, strict=True)])  # noqa: E501, E731, RUF100
    for m in (0, 1, 2):
        values = grid.interpolate(f(axis.nodes), x[:, None], width, [m])
        assert np.abs(values - f(x, m)).max() < 1e-9 * 40**m, m


# ------------------------------------------------------------------------------------------------------- records, told
def test_a_recipe_with_breaks_breakpoints_and_averages_gives_the_same_bytes(tmp_path):
    """Saved, loaded and solved again."""
    w = np.array([0.6, 0.8])
    sde = SDE(lambda t, x: -x + 0.5 * (t > 0.2131) * np.sign(x[..., :1] - 0.23), 0.8, dim=2)
    problem = KolmogorovProblem(sde, lambda x: (x[..., 0] > 0.23) * 1.0, 0.5, killing=lambda t, x: 2.0 * (x @ w > 0.1))
    recipe = kolmo.plan(problem, at=[[0.1, 0.2]], rtol=0.1, max_seconds=5.0)
    assert recipe.grid.axes[0].breaks, recipe.grid.axes
    assert not recipe.grid.axes[1].breaks
    assert set(recipe.averages) == {"killing"}
    assert recipe.breakpoints == pytest.approx((0.2131,), abs=1e-9)
    recipe.save(tmp_path / "recipe.npz")
    again = Discretization.load(tmp_path / "recipe.npz")
    assert again.grid.axes[0].nodes.tobytes() == recipe.grid.axes[0].nodes.tobytes()
    assert again.breakpoints == recipe.breakpoints
    values = [np.asarray(solve(problem, discretization=r).values) for r in (recipe, again)]
    assert values[0].tobytes() == values[1].tobytes()
    solve(problem, discretization=again).save(tmp_path / "answer.npz")
    assert np.asarray(kolmo.load(tmp_path / "answer.npz").values).tobytes() == values[0].tobytes()


def gap_to(axis, place):
    return np.abs(axis.nodes - place).min()


@pytest.mark.parametrize("told", ["number", "function"])
def test_breaks_that_are_told_get_a_node(told, rng):
    """Also where the function is smooth on the scale of the scout, or the break too weak to be seen."""
    c = float(rng.uniform(0.2, 0.8))
    given = [c] if told == "number" else [lambda x: x[..., 0] - c]
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, killing=lambda t, x: 1e-9 * (x[..., 0] > c), breaks=given
    )
    axis = kolmo.plan(problem, at=[0.0, 0.5]).grid.axes[0]
    assert len(axis.breaks) == 1
    assert abs(axis.nodes[axis.breaks[0]] - c) < 1e-12


def test_breaks_that_are_told_in_two_dimensions(rng):
    """Along an axis they get nodes; slanted, the functions that may break there are averaged."""
    c, w = float(rng.uniform(0.1, 0.5)), np.array([0.6, 0.8])
    mild = lambda t, x: 1.0 + 0.1 * np.cos(x[..., 0])  # noqa: E731
    for function, straight in ((lambda x: x[..., 1] - c, True), (lambda x: x @ w - c, False)):
        problem = KolmogorovProblem(
            SDE(0.0, 1.0, dim=2), lambda x: np.cos(x[..., 0]), 0.3, killing=mild, breaks=[function]
        )
        recipe = kolmo.plan(problem, at=[[0.0, 0.1]], rtol=1e-2)
        assert [len(axis.breaks) for axis in recipe.grid.axes] == ([0, 1] if straight else [0, 0])
        assert set(recipe.averages) == (set() if straight else {"killing"})
        if straight:
            assert gap_to(recipe.grid.axes[1], c) < 1e-12


@pytest.mark.parametrize("given", [["x"], [True], [np.nan], [np.inf], [None]])
def test_breaks_that_are_no_places_are_refused(given):
    with pytest.raises(InputError, match="breaks"):
        KolmogorovProblem(SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, breaks=given)


def test_numbers_tell_no_place_in_two_dimensions():
    with pytest.raises(InputError, match="breaks"):
        KolmogorovProblem(SDE(0.0, 1.0, dim=2), lambda x: x[..., 0], 1.0, breaks=[0.5])


# ------------------------------------------------------------------------------------------------------- slanted breaks
@pytest.mark.parametrize("scheme", ["central2", "central6"])
@pytest.mark.parametrize("kind", [Killing, Source, Friction])
def test_slanted_breaks_converge_at_order_two(kind, scheme):
    """Away from the line, with averages around the nodes; along w it is the problem of one dimension."""
    case = drawn(kind)[0]
    angle = np.random.default_rng(5).uniform(0.2, 1.3)
    w = np.array([np.cos(angle), np.sin(angle)])
    along = lambda x: (x @ w)[..., None]  # noqa: E731
    sde = SDE(lambda t, x: case.sde.drift(t, along(x)) * w, 1.0, dim=2)
    problem = KolmogorovProblem(
        sde,
        lambda x: case.terminal(along(x)),
        case.T,
        Box([-6.0, -6.0], [6.0, 6.0]),
        killing=case.killing and (lambda t, x: case.killing(t, along(x))),
        source=case.source and (lambda t, x: case.source(t, along(x))),
    )
    name = {Killing: "killing", Source: "source", Friction: "drift"}[kind]
    far = np.array([-0.9, -0.5, 0.45, 0.8])
    points = (case.c + far)[:, None] * w + np.array([0.2, -0.1, 0.15, 0.0])[:, None] * np.array([-w[1], w[0]])
    exact, errors = np.array([case.exact(v) for v in points @ w]), []
    for n in (40, 80):
        grid = Grid.of(problem.box, n + 1, [Sinh(-6.0, 6.0, 0.0, 1.5)] * 2)
        order = SCHEMES[scheme].order
        box = problem.box
        averages = plan_averages(problem, grid, box, order, [name])
        rule = plan_terminal(problem, grid, box, order)
        times = tuple(np.linspace(0.0, case.T, 25 * n // 40).tolist())
        recipe = Discretization(grid, times, scheme, "mcs3", rule, (), averages)
        errors.append(np.abs(solve(problem, discretization=recipe)(points) - exact).max())
    assert np.log2(errors[0] / errors[1]) > 1.6 or errors[1] < 1e-6, errors
    assert errors[1] < 2e-3, errors


@pytest.mark.parametrize("seed", range(4))
def test_a_node_on_a_break_has_its_shares_of_both_sides_whatever_is_rough_beside_it(seed):
    """φ jumps on the node, where the noise does too, and once more some cells away, where it is smoothed."""
    rng = np.random.default_rng(seed)
    c, heights, noise = rng.uniform(-0.5, 0.5), rng.uniform(0.5, 2.0, 3), rng.uniform(0.4, 1.6, 2)
    axis = broken(Uniform(-3.0, 3.0), [c], cells_between(Uniform(-3.0, 3.0), [c], 60))
    other = c + rng.uniform(1.2, 1.8) * 0.1  # between the first and the second node
    problem = KolmogorovProblem(
        SDE(0.0, lambda t, x: np.where(x[..., 0] < c, *noise), dim=1),
        lambda x: heights[0] + heights[1] * (x[..., 0] > c) + heights[2] * (x[..., 0] > other),
        1.0,
        Box(-3.0, 3.0),
    )
    grid = Grid([axis])
    rule = plan_terminal(problem, grid, problem.box, 6)
    assert rule.smoothed
    assert rule.met.tolist() == list(axis.breaks)
    value = float(rule.apply(problem, grid.points)[rule.met[0], 0])
    below, above = rule.shares[0]
    assert below + above == pytest.approx(1.0)
    assert value == pytest.approx(heights[0] + above * heights[1])
