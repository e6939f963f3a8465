"""What is seen before anything is solved: breaks, narrow features, windows and pulses in time, units, explosions."""

import bisect
import contextlib
import functools
import math

import numpy as np
import pytest
import torch

import kolmo
from kolmo import SDE, Absorbing, Box, KolmogorovProblem, solve
from kolmo.problem.instants import constant, depends_on_time, reads_time
from kolmo.refine.layout import first_layout
from kolmo.refine.samples import FEW_SAMPLES, SAMPLES
from kolmo.refine.scout import LOOKS

# Part of an axis to which a break is located, and of the horizon to which a window is.
CLOSE = 1e-9
# The documented guarantee: features of this part of the spread are seen, by dimension.
NARROWEST = {1: 1e-3, 2: 1 / 200, 3: 1 / 50}


def looked(problem, at=None, rtol=1e-3):
    """The layout before its resolution, and what was seen."""
    points = np.zeros((1, problem.dim)) if at is None else np.asarray(at, float).reshape(-1, problem.dim)
    return first_layout(problem, points, 1e-5, rtol)


def brownian(dim=1, **given):
    terminal = given.pop("terminal", lambda x: 1.0 + 0 * x[..., 0])
    return KolmogorovProblem(SDE(given.pop("drift", 0.0), 1.0, dim=dim), terminal, 1.0, **given)


def placed(places, seen):
    """Whether every place is among those seen, and no other one is."""
    return len(places) == len(seen) and np.abs(np.sort(places) - np.sort(seen)).max(initial=0.0) < CLOSE * 16.0


def apart(rng, count, low=-2.0, high=2.0, gap=0.1):
    """Random places that keep some distance."""
    while True:
        places = np.sort(rng.uniform(low, high, count))
        if (np.diff(places) > gap).all():
            return places


# ------------------------------------------------------------------------------------------------------ breaks in space
JUMPS = [
    lambda x, c: (x > c) * 1.0,
    lambda x, c: np.sign(x - c) * np.cos(x),
    lambda x, c: np.where(x > c, 2.0, np.sin(3 * x)),
    lambda x, c: np.floor((x - c) / 50.0) + 0.2 * x,
]
KINKS = [
    lambda x, c: np.abs(x - c),
    lambda x, c: np.maximum(x - c, 0.0),
    lambda x, c: np.exp(-np.abs(x - c)),
    lambda x, c: np.abs(np.tanh(x - c)) + 0.3 * x,
    lambda x, c: np.minimum(np.exp(0.3 * x), np.exp(0.3 * c)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [*JUMPS, *KINKS])
def test_a_break_is_located_anywhere(shape, seed):
    """In every function that may have one; a break of φ is a mark."""
    rng = np.random.default_rng([seed, (JUMPS + KINKS).index(shape)])
    where = ["killing", "source", "drift", "covariance", "terminal"][int(rng.integers(5))]
    c = float(rng.uniform(-2.5, 2.5))
    if where == "covariance":
        sde = SDE(0.0, covariance=lambda t, x: (1.5 + np.tanh(shape(x, c)))[..., None], dim=1)
        problem = KolmogorovProblem(sde, lambda x: np.cos(x[..., 0]), 1.0)
    elif where == "drift":
        problem = brownian(drift=lambda t, x: 0.3 * shape(x, c))
    elif where == "terminal":
        problem = brownian(terminal=lambda x: shape(x[..., 0], c))
    else:
        problem = brownian(**{where: lambda t, x: shape(x[..., 0], c)})
    layout, sight = looked(problem)
    seen = sight.axes[0].marks if where == "terminal" else sight.axes[0].breaks
    assert placed([c], seen), (where, c, seen)
    assert not sight.slanted
    assert not sight.crowded
    if where != "terminal":
        axis = layout.grid(41.0, 9).axes[0]
        assert [axis.nodes[b] for b in axis.breaks] == pytest.approx([c], abs=CLOSE * 16.0)


@pytest.mark.parametrize("seed", range(4))
def test_several_breaks_at_once(seed):
    """Jumps and kinks of several functions, some of them at the same place."""
    rng = np.random.default_rng(seed)
    places = apart(rng, int(rng.integers(2, 7)))
    kinds, owner = rng.integers(2, size=len(places)), rng.integers(3, size=len(places))

    def made(who):
        mine = [((JUMPS, KINKS)[k][0], c) for k, c, o in zip(kinds, places, owner, strict=True) if o == who]
        return lambda t, x: 0.1 * x[..., 0] + sum((f(x[..., 0], c) for f, c in mine), 0.0 * x[..., 0])

    problem = brownian(
        killing=made(0), source=made(1), drift=lambda t, x: made(2)(t, x)[..., None],
        terminal=lambda x: (x[..., 0] > places[0]) * 1.0,
    )  # fmt: skip
    sight = looked(problem)[1]
    assert placed(places, sight.axes[0].breaks)
    assert sight.axes[0].marks[0] in sight.axes[0].breaks  # one node for both


@pytest.mark.parametrize("dim", [2, 3])
def test_breaks_along_an_axis_and_slanted_ones_in_more_dimensions(dim, rng):
    axis, c = int(rng.integers(dim)), float(rng.uniform(-1, 1))
    straight = looked(brownian(dim, killing=lambda t, x: (x[..., axis] > c) * 1.0))[1]
    assert [len(a.breaks) for a in straight.axes] == [int(i == axis) for i in range(dim)]
    assert placed([c], straight.axes[axis].breaks)
    assert not straight.unresolved
    w = rng.normal(size=dim)
    slanted = looked(brownian(dim, killing=lambda t, x: (x @ w > 0.1) * 1.0, source=lambda t, x: np.cos(x[..., 0])))[1]
    assert slanted.unresolved == ("killing",)
    assert all(not a.breaks for a in slanted.axes)
    round_ = looked(brownian(dim, source=lambda t, x: ((x**2).sum(-1) < 1.0) * 1.0))[1]
    assert round_.unresolved == ("source",)


def network(rng, dim, dtype=torch.float32):
    """A random smooth network in single precision."""
    torch.manual_seed(int(rng.integers(10**6)))
    layers = [
        torch.nn.Linear(dim, 32),
        torch.nn.Tanh(),
        torch.nn.Linear(32, 32),
        torch.nn.SiLU(),
        torch.nn.Linear(32, 1),
    ]
    return torch.nn.Sequential(*layers).to(dtype)


def steep_front(rng):
    c, w = rng.normal(), 10 ** rng.uniform(-3, -1)
    return lambda x: np.tanh((x - c) / w)


def waves(rng):
    a = rng.normal(size=(3, 6))
    return lambda x: sum(p * np.sin(8 * k * x + q) for p, k, q in a.T)


def bumps(rng):
    c, w = rng.normal(size=3), 10 ** rng.uniform(-3, 0, 3)
    return lambda x: sum(np.exp(-(((x - p) / v) ** 2)) for p, v in zip(c, w, strict=True))


def rational(rng):
    c, w = rng.normal(), 10 ** rng.uniform(-2, 0)
    return lambda x: 1 / (1 + ((x - c) / w) ** 2)


def growing(rng):
    k = rng.uniform(0.1, 0.8)
    return lambda x: np.exp(k * x) + x**3


SMOOTH = {f.__name__: f for f in (steep_front, waves, bumps, rational, growing)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SMOOTH)
def test_smooth_functions_have_no_breaks(kind, seed):
    f = SMOOTH[kind](np.random.default_rng([seed, list(SMOOTH).index(kind)]))
    g = SMOOTH[kind](np.random.default_rng([seed + 100, list(SMOOTH).index(kind)]))
    sight = looked(brownian(killing=lambda t, x: f(x[..., 0]), terminal=lambda x: g(x[..., 0])))[1]
    assert (sight.axes[0].breaks, sight.axes[0].marks) == ((), ())
    assert not sight.crowded
    if kind in ("waves", "growing"):  # what is narrower than the samples there may be taken for a break
        seen = looked(brownian(2, source=lambda t, x: f(0.25 * (x[..., 0] * 0.6 + 0.8 * x[..., 1]))))[1]
        assert not seen.unresolved, seen
        assert all(not a.breaks for a in seen.axes)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_networks_in_single_precision_have_no_breaks(seed, dim):
    """Their rounding is no break."""
    net = network(np.random.default_rng([seed, dim]), dim)

    def f(t, x):
        with torch.no_grad():
            return net(torch.as_tensor(np.asarray(x), dtype=torch.float32))[..., 0].numpy().astype(float)

    sight = looked(brownian(dim, source=f, terminal=lambda x: f(0.0, x)))[1]
    assert all((a.breaks, a.marks) == ((), ()) for a in sight.axes)
    assert not sight.unresolved


# ------------------------------------------------------------------------------------------------------ narrow features
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["terminal", "source", "killing"])
@pytest.mark.parametrize("dim", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_narrow_features_get_nodes(dim, name, seed):
    """One to three bumps of mass one at the width of the guarantee: cells are about as narrow."""
    rng = np.random.default_rng([seed, dim])
    w, count = NARROWEST[dim] * 10 ** rng.uniform(0, 0.5), int(rng.integers(1, 4)) if dim == 1 else 1
    centres = apart(rng, count, -1.5, 1.5)[:, None] if dim == 1 else rng.uniform(-1, 1, (1, dim))

    def bumps(x):
        return sum(np.exp(-((x - c) ** 2).sum(-1) / (2 * w * w)) for c in centres) / w**dim

    given = {"terminal": bumps} if name == "terminal" else {name: lambda t, x: bumps(x)}
    layout, _ = looked(brownian(dim, **given))
    for i, axis in enumerate(layout.grid(41.0 if dim == 1 else 21.0, 9).axes):
        for c in centres:
            cell = np.diff(axis.nodes)[np.searchsorted(axis.nodes, c[i]) - 1]
            # spacings are halved until what is left of a bump weighs little
            assert cell < (3.0 if dim == 1 else 12.0) * w, (i, c, w, cell)


@pytest.mark.parametrize("seed", range(4))
def test_narrow_windows_get_nodes(seed):
    """Jumps of φ that lie close together."""
    rng = np.random.default_rng(seed)
    w, a = 10 ** rng.uniform(-3, -1), float(rng.uniform(-1.5, 1.5))
    layout, sight = looked(brownian(terminal=lambda x: ((x[..., 0] > a) & (x[..., 0] < a + w)) * 1.0))
    assert placed([a, a + w], sight.axes[0].marks)
    nodes = layout.grid(41.0, 9).axes[0].nodes
    assert ((nodes > a) & (nodes < a + w)).sum() >= 2


@pytest.mark.parametrize("far", [0.0, 40.0])
def test_what_cannot_be_felt_costs_nothing(far):
    """A bump of the same kind where no path comes changes no grid."""
    problem = brownian(terminal=lambda x: 1.0 + np.exp(-(((x[..., 0] - far) / 1e-3) ** 2)) * 1e3)
    sight = looked(problem)[1]
    assert bool(sight.axes[0].features) == (far == 0.0)


def test_data_that_are_zero_are_silent():
    zero = looked(brownian(terminal=lambda x: 0.0 * x[..., 0]))[1]
    assert zero.silent
    assert zero.size == 0.0
    spoken = [
        brownian(terminal=lambda x: np.exp(-(((x[..., 0] - 1.0) / 1e-3) ** 2))),
        brownian(terminal=lambda x: 0.0 * x[..., 0], source=lambda t, x: (np.abs(x[..., 0]) < 1e-3) * 1.0),
        brownian(terminal=lambda x: 0.0 * x[..., 0], box=Box(-1.0, 1.0, [(Absorbing(1.0), "open")])),
    ]
    assert [looked(p)[1].silent for p in spoken] == [False] * 3


def test_nothing_but_zero_is_answered_by_zero():
    sol = solve(brownian(terminal=lambda x: 0.0 * x[..., 0]), at=[0.0, 1.0])
    assert np.abs(np.asarray(sol([0.0, 1.0]))).max() == 0.0
    assert sol.status == "converged"


# ------------------------------------------------------------------------------------------------------------- in time
def buffered(f):
    """A function that hands back the same array every time."""
    kept = {}

    def g(t, x):
        value = f(t, x)
        array = kept.setdefault(value.shape, np.empty(value.shape))
        array[...] = value
        return array

    return g


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("name", ["killing", "source", "drift", "covariance", "face"])
@pytest.mark.parametrize("seed", range(2))
def test_windows_in_time_are_seen(name, buffer, seed):
    """Down to 1/200 of the horizon, anywhere; the ends are found to rounding and become breakpoints."""
    rng = np.random.default_rng([seed, len(name)])
    T = 10 ** rng.uniform(-6, 6)
    start = rng.uniform(0.02, 0.9)
    t0, t1 = T * start, T * (start + 10 ** rng.uniform(-2.3, -1.1))
    on = lambda t, x: (1.0 + 2.0 * (t0 <= t < t1)) * (1.0 + 0 * x[..., 0])  # noqa: E731
    f = buffered(on) if buffer else on
    drift, cov, box, given = 0.0, 1.0 / T, None, {}
    if name == "drift":
        drift = lambda t, x: f(t, x)[..., None] / T  # noqa: E731
    elif name == "covariance":
        cov = lambda t, x: f(t, x)[..., None, None] / T  # noqa: E731
    elif name == "face":
        box = Box(0.0, 2.0, [(Absorbing(f), "reflecting")])
    else:
        given = {name: lambda t, x: f(t, x) / T}
    problem = KolmogorovProblem(SDE(drift, covariance=cov, dim=1), lambda x: np.cos(x[..., 0]), T, box, **given)
    sight = looked(problem, at=[[1.0]])[1]
    assert np.array(sight.breakpoints) / T == pytest.approx([t0 / T, t1 / T], abs=CLOSE)
    # the later value holds from the breakpoint on
    assert [float(on(t, np.zeros(1))) for t in sight.breakpoints] == [3.0, 1.0]


@pytest.mark.parametrize("seed", range(6))
def test_windows_in_time_are_seen_where_the_process_seldom_goes(seed):
    """A source that is on for a while, beyond one to three spreads only: everywhere nearer it is zero at all times."""
    rng = np.random.default_rng(seed)
    start, length = rng.uniform(0.1, 0.6), 10.0 ** rng.uniform(-1.5, -0.5)
    side, beyond = rng.choice([-1.0, 1.0]), rng.uniform(1.1, 3.0)
    problem = brownian(
        terminal=lambda x: 0.0 * x[..., 0],
        source=lambda t, x: (side * x[..., 0] > beyond) * (start <= t < start + length),
    )
    sight = looked(problem)[1]
    assert not sight.silent
    assert sight.breakpoints == pytest.approx((start, start + length), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_pulses_in_time_get_short_steps(seed):
    rng = np.random.default_rng(seed)
    tau, t0 = 10 ** rng.uniform(-2.5, -1.5), float(rng.uniform(0.1, 0.9))
    problem = brownian(source=lambda t, x: np.exp(-(((t - t0) / tau) ** 2) / 2) / tau * (1.0 + 0 * x[..., 0]))
    sight = looked(problem)[1]
    assert sight.breakpoints == ()
    around = [p for p in sight.pulses if p.start <= t0 <= p.end]
    assert around
    assert min(p.step for p in around) < 3.0 * tau
    answer = solve(problem, at=[0.0], rtol=1e-4)
    assert float(answer([0.0])) == pytest.approx(1.0 + np.sqrt(2 * np.pi), rel=2e-4)


def test_what_does_not_depend_on_time_has_no_breakpoints():
    for f in (
        lambda t, x: np.cos(x[..., 0]),
        lambda t, x: np.cos(x[..., 0]) * np.sin(3 * t),
        buffered(lambda t, x: t * x[..., 0]),
    ):
        sight = looked(brownian(source=f))[1]
        assert (sight.breakpoints, sight.pulses) == ((), ())


@pytest.mark.parametrize(
    "f", [lambda t, x: -x * (1 + t), lambda t, x: x * (t > 0.37), lambda t, x: x * (0.51 < t < 0.53)]
)
def test_a_buffer_is_not_compared_with_itself(f):
    assert not constant(buffered(f), 0.0, 1.0, np.ones(3))
    assert constant(buffered(lambda t, x: -x), 0.0, 1.0, np.ones(3))


class Clock:
    """Functions of time that do not look like it."""

    def __init__(self):
        self.now = 0.0

    def method(self, t, x):
        return t * x

    def steady(self, t, x):
        return -x

    def __call__(self, t, x):
        return t * x

    @classmethod
    def of_class(cls, t, x):
        return t * x

    @staticmethod
    def static(t, x):
        return t * x


def nested(t, x):
    def inner():
        return t * x

    return inner()


def by_names(t, x):
    return locals()["t"] * x


def by_eval(t, x):
    return eval("t * x")


def by_rest(*args):
    return args[0] * args[1]


def by_words(t, x, **kw):
    t, s = x, t
    return s * t


def in_a_list(t, x):
    return sum([t * v for v in [x]])


def deleted(t, x):
    s = t
    del t
    return s * x


def conditional(t, x):
    return x if t < 0.5 else -x


def default(t, x, s=1.0):
    return s * t * x


def through_partial(scale, t, x):
    return scale * t * x


def wrapped(f):
    @functools.wraps(f)
    def g(*args, **kw):
        return f(*args, **kw)

    return g


def generator_inside(t, x):
    return next(v * t for v in (x,))


def augmented(t, x):
    t += 0.0
    return x * t


def by_frame(t, x):
    import sys

    return sys._getframe().f_locals["t"] * x


TIMED = [
    Clock().method, Clock(), Clock.of_class, Clock().of_class, Clock.static, nested, by_names, by_eval, by_rest,
    by_words, in_a_list, deleted, conditional, default, functools.partial(through_partial, 2.0),
    functools.partial(default, s=3.0), wrapped(conditional), functools.lru_cache(default), generator_inside, augmented,
    lambda t, x: (lambda: t)() * x, lambda t, x: [t][0] * x, lambda *a: a[0] * a[1], lambda t, x: f"{t}" and t * x,
    lambda t, x: vars()["t"] * x, lambda t, x, *rest: x * t, lambda t=0.0, x=1.0: t * x, by_frame,
    torch.jit.script(torch.nn.Identity()), np.multiply,
]  # fmt: skip


@pytest.mark.parametrize("f", TIMED, ids=range(len(TIMED)))
def test_reads_time_never_denies_a_function_of_time(f):
    assert reads_time(f)


@pytest.mark.parametrize("f", TIMED, ids=range(len(TIMED)))
def test_a_call_never_denies_a_function_of_time(f):
    assert depends_on_time(lambda t, x: f(t, x), f, np.ones((3, 1)))


USES = """math.sin(t) * x | np.cos(t) + x | x - t | np.full(x.shape, t) | np.where(t > 0.5, x, 0) | x if t else -x
    {0.5: 2}.get(t, 1) * x | x * (t in [0.5]) | x if isinstance(t, float) else -x | x * len(f"{t}") | x * (0.5 == t)
    np.searchsorted([0.1, 0.5], t) * x | x * max(t, 1) | x * hasattr(t, "shape") | x * bisect.bisect([0.1, 0.2], t)
    x * [1, 2][int(t)] | np.interp(t, [0, 1], [0, 1]) * x | x @ np.diag([t]) | x * pow(t, 2) | x * abs(t) | x * bool(t)
    torch.as_tensor(x) + torch.full((3, 1), t) | torch.cat([torch.as_tensor(x), torch.as_tensor([[t]])])"""


@pytest.mark.parametrize("use", [use.strip() for line in USES.splitlines() for use in line.split("|")])
def test_a_time_that_is_handed_on_is_followed(use):
    """The code of the function tells nothing, what is done with its argument does."""

    def uses(t, x):
        return eval(use, {"t": t, "x": x, "np": np, "math": math, "bisect": bisect, "torch": torch})

    def swallows(t, x):
        with contextlib.suppress(Exception):
            return uses(t, x)
        return x

    for f in (uses, swallows) if "torch" not in use else (uses,):
        assert depends_on_time(lambda t, x, f=f: f(t, x), f, np.ones((3, 1)))


def test_a_time_that_is_only_handed_on_is_no_dependence():
    net = torch.nn.Sequential(torch.nn.Linear(1, 4, dtype=float), torch.nn.Tanh())

    class Flow(torch.nn.Module):
        def forward(self, t, x):
            return net(x)

    for f in (
        lambda t, x: decay(x, when=t),
        lambda t, x: {"when": t, "x": x}["x"],
        functools.partial(decay_at, 2.0),
    ):
        assert reads_time(f)
        assert not depends_on_time(f, f, np.ones((3, 1)))
    flow = Flow()
    assert not depends_on_time(flow, flow, torch.ones(3, 1, dtype=float))


def decay(x, when=0.0):
    return -x


def decay_at(rate, t, x):
    return decay(rate * x, when=t)


def test_a_steady_function_behind_another_is_called_a_few_times():
    """Not at each of the instants at which functions of time are followed."""
    count = [0]

    def drift(t, x):
        count[0] += 1
        return decay(x, when=t)

    sde = SDE(drift, covariance=1.0, dim=1)
    kolmo.solve(KolmogorovProblem(sde, lambda x: np.cos(x[..., 0]), 1.0), at=[0.0], rtol=1e-3)
    assert count[0] < 120


def test_reads_time_spares_what_ignores_it():
    for f in (lambda t, x: -x, Clock().steady, lambda t, x: (lambda y: y)(x), 1.0, None, np.zeros(3)):
        assert not reads_time(f)


# ------------------------------------------------------------------------------------------------------ units, horizons
def in_units(X, T, U):
    """A problem with a jump, a bump, a kink, a wall and time in it."""
    sde = SDE(
        lambda t, x: (0.4 - x / X + 0.5 * (x / X > 0.3)) * X / T * (1 + 0.3 * np.sin(3 * t / T)),
        covariance=lambda t, x: (0.5 + 0.1 * np.cos(x / X))[..., None] * X**2 / T,
        dim=1,
    )
    return KolmogorovProblem(
        sde,
        lambda x: U * (np.abs(x[..., 0] / X - 0.1) + np.exp(-(((x[..., 0] / X - 0.5) / 0.02) ** 2))),
        0.8 * T,
        Box(-1.0 * X, np.inf, [("reflecting", "open")]),
        killing=lambda t, x: (x[..., 0] / X > 0.3) / T,
        source=lambda t, x: U / T * (0.31 < t / T < 0.42) * np.cos(x[..., 0] / X),
    )


@pytest.mark.parametrize("seed", range(3))
def test_units_change_no_digit(seed):
    rng = np.random.default_rng(seed)
    at = np.array([[0.1], [0.6]])
    answers, grids, steps = [], [], []
    for X, T, U in ((1.0, 1.0, 1.0), tuple(10.0 ** rng.uniform(-9, 9, 3))):
        sol = solve(in_units(X, T, U), at=at * X, rtol=1e-3, atol=1e-9 * U)
        answers.append(np.asarray(sol(at * X)) / U)
        grids.append(sol.discretization.grid.axes[0].nodes / X)
        steps.append(np.array(sol.discretization.times) / T)
    assert grids[0].shape == grids[1].shape
    assert np.abs(grids[0] - grids[1]).max() < 1e-8
    assert steps[0] == pytest.approx(steps[1], abs=1e-9)
    assert answers[1] == pytest.approx(answers[0], rel=1e-9)


@pytest.mark.parametrize(
    ("drift", "at"), [(lambda t, x: x**3, 1.5), (lambda t, x: x**2, 1.0), (lambda t, x: np.exp(x), 0.5)]
)
def test_paths_that_explode_are_told(drift, at):
    problem = KolmogorovProblem(SDE(drift, 0.5, dim=1), lambda x: np.cos(x[..., 0]), 3.0)
    assert looked(problem, at=[[at]])[1].exploded > 0.1
    with pytest.warns(kolmo.errors.ToleranceWarning, match="run away"):
        sol = solve(problem, at=[at], rtol=1e-2, atol=1e-9)
    assert sol.status == "tolerance_not_met"
    assert not np.isfinite(sol.error_estimate).any()


@pytest.mark.parametrize(
    "drift", [lambda t, x: -(x**3), lambda t, x: -1e3 * x, lambda t, x: x - x**3, lambda t, x: 0.5 * x]
)
def test_paths_that_do_not_explode_are_not_said_to(drift):
    for horizon in (1e-9, 1.0, 10.0):
        problem = KolmogorovProblem(SDE(drift, 0.5, dim=1), lambda x: np.cos(x[..., 0]), horizon)
        assert looked(problem, at=[[1.0]])[1].exploded == 0.0


@pytest.mark.parametrize("rate", [1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("horizon", [1e-9, 1.0, 1e6])
def test_stiff_and_long_problems(rate, horizon):
    """Ornstein–Uhlenbeck: the box is that of the process, whatever rate times horizon is."""
    problem = KolmogorovProblem(SDE(lambda t, x: -rate * x, 1.0, dim=1), lambda x: np.cos(x[..., 0]), horizon)
    spread = np.sqrt(-np.expm1(-2 * rate * horizon) / (2 * rate))
    layout, _ = looked(problem)
    assert 3.0 * spread < layout.box.upper[0] < 30.0 * spread
    if spread < 3.0 and rate * horizon < 1e10:  # beyond, rounding of the rates alone moves the answer
        sol = solve(problem, at=[[spread]], rtol=1e-4)
        exact = np.exp(-(spread**2) / 2) * np.cos(spread * np.exp(-rate * horizon))
        assert float(np.asarray(sol([[spread]])).item()) == pytest.approx(exact, rel=2e-4)


# ---------------------------------------------------------------------------------------------------------------- price
# Points beyond the samples, an axis: what breaks are located with, and 1,280 instants at 256 points.
MORE = {False: 60_000, True: 500_000}


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_what_the_scout_costs(dim):
    """Points at which a function is evaluated: its samples at every look, and little more, whatever it is like."""
    w = np.array([0.6, 0.8, 0.3])[:dim]
    shapes = [lambda x: np.cos(x[..., 0]), lambda x: (x[..., 0] > 0.3) * 1.0, lambda x: (x @ w > 0.2) * 1.0]
    shapes.append(lambda x: np.sin(40.0 * x).prod(-1))
    for timed in (False, True):
        for shape in shapes:
            count = [0]

            def steady(t, x, shape=shape, count=count):
                count[0] += np.asarray(x)[..., 0].size
                return shape(x)

            def switched(t, x, steady=steady):
                return steady(0.0, x) * (t > 0.4)

            looked(brownian(dim, source=switched if timed else steady))
            if shape is shapes[0] and not timed:  # it proves to be smooth
                assert count[0] <= 3 * FEW_SAMPLES[dim] ** dim
                continue
            samples = SAMPLES[dim] ** dim * (LOOKS if timed else 1)
            assert samples <= count[0] <= samples + MORE[timed] * dim, (count, samples)


@pytest.mark.parametrize("strike", [-0.7, 0.0, 1.3])
@pytest.mark.parametrize("payoff", [np.maximum, np.greater])
def test_a_process_that_stays_where_it_is(strike, payoff):
    """Its spread is zero: nothing is graded by that."""
    problem = KolmogorovProblem(SDE(0.0, lambda t, x: 0.0 * x, dim=1), lambda x: 1.0 * payoff(x[..., 0], strike), 1.0)
    at = [[strike - 0.5], [strike + 0.25]]
    assert solve(problem, at=at)(at).reshape(-1) == pytest.approx(1.0 * payoff(np.reshape(at, -1), strike), abs=1e-3)
    layout, _ = first_layout(problem, np.array([[strike]]), 1e-6, 1e-3)
    assert np.isfinite(layout.grid(41.0, 9).axes[0].nodes).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_bump_that_weighs_less_than_is_looked_for_is_no_small_error_bar(seed):
    """Four to five spreads away, narrow and high: it may lie beyond the box; the estimate owns up to it."""
    rng = np.random.default_rng([seed, 45])
    c, w, a = rng.choice([-1.0, 1.0]) * rng.uniform(4.1, 4.8), 10 ** rng.uniform(-3, -2), rng.uniform(0.5, 2.0)

    def phi(x):
        y = x[..., 0]
        return np.cos(y) + a / w / math.sqrt(2 * math.pi) * np.exp(-0.5 * ((y - c) / w) ** 2)

    sol = solve(brownian(terminal=phi), at=[0.0], rtol=1e-3)
    wide = math.hypot(1.0, w)
    exact = math.exp(-0.5) + a * math.exp(-0.5 * (c / wide) ** 2) / (wide * math.sqrt(2 * math.pi))
    assert abs(float(np.ravel(sol([0.0]))[0]) - exact) < 10.0 * sol.error_estimate.max()


@pytest.mark.parametrize("seed", range(6))
def test_an_absolute_tolerance_alone_looks_at_time_as_closely_as_it_asks(seed):
    """Drift cos(ωt), or with a short pulse: W is shifted by its integral."""
    rng = np.random.default_rng([11, seed])
    size, rate, T, noise = rng.uniform([1.0, 2.0, 0.5, 0.3], [3.0, 6.0, 1.5, 1.0])
    middle, width = rng.uniform(0.2, 0.8) * T, 0.01 * T
    pulsed = seed % 2 == 1

    def drift(t, x):
        pulse = 0.5 / (width * np.sqrt(2 * np.pi)) * np.exp(-0.5 * ((t - middle) / width) ** 2) if pulsed else 0.0
        return size * np.cos(rate * t) + pulse + 0.0 * x

    problem = KolmogorovProblem(SDE(drift, noise, dim=1), lambda x: np.exp(-2.0 * x[..., 0] ** 2), T)
    solution = solve(problem, at=[0.0, 0.5], rtol=0.0, atol=1e-4)
    mean = np.array([0.0, 0.5]) + size / rate * np.sin(rate * T) + (0.5 if pulsed else 0.0)
    spread = 1.0 + 4.0 * noise**2 * T
    exact = np.exp(-2.0 * mean**2 / spread) / np.sqrt(spread)
    assert np.abs(solution([0.0, 0.5]) - exact).max() <= 1e-4
    assert solution.discretization.steps < (1000 if pulsed else 60)
