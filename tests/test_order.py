"""Order of accuracy: every scheme with every face, every stepper, against closed forms and manufactured answers."""

import itertools

import numpy as np
import pytest

from kolmo import SDE, Box, KolmogorovProblem, catalog, solve
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS
from kolmo.testing import Table, manufactured, order_of_accuracy

FACES = ["open", "natural", "reflecting", "entrance", "absorbing", "robin", "periodic"]


def shows_order(table: Table, order: float, slack: float = 0.45, floor: float = 0.0) -> None:
    """The finest pair shows at least the order, unless it is at the floor already."""
    finest = table.rows[-1]
    assert finest[-1] > order - slack or finest[-2] < floor, f"\n{table}"
    assert finest[-2] < 0.3, f"\n{table}"


@pytest.mark.parametrize(("scheme", "word"), [*itertools.product(SCHEMES, FACES)])
def test_space_in_one_dimension(scheme, word):
    case = manufactured([(word, word)])
    nodes = [20, 40]
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=nodes, steps=16, scheme=scheme, stepper="radau5"
    )
    # next to a natural end the closures show their order late
    shows_order(table, SCHEMES[scheme].order, slack=1.1 if word == "natural" else 0.45, floor=1e-9)


@pytest.mark.parametrize(
    ("scheme", "pair"),
    [*itertools.product(SCHEMES, [("absorbing", "robin"), ("reflecting", "natural"), ("open", "reflecting")])],
)
def test_space_with_two_kinds_of_faces(scheme, pair):
    case = manufactured([pair])
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=[20, 40], steps=16, scheme=scheme, stepper="radau5"
    )
    # next to a natural end the closures show their order late
    shows_order(table, SCHEMES[scheme].order, slack=1.1 if "natural" in pair else 0.45, floor=1e-9)


@pytest.mark.parametrize("word", FACES)
@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=pytest.mark.slow if s == "central4" else ()) for s in SCHEMES]
)
def test_space_in_two_dimensions_with_full_tensor(scheme, word):
    """Also the conormal direction at elastic faces: the tensor there is full."""
    other = ("robin", "absorbing") if word == "periodic" else ("periodic", "periodic")
    case = manufactured([(word, word), other], autonomous=True, horizon=0.05)
    nodes = [16, 24] if SCHEMES[scheme].order > 2 else [12, 24]
    if (scheme, word) == ("monotone", "entrance"):
        nodes = [24, 48]  # next to a drift that grows without bound upwinding shows its order late
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=nodes, steps=2, scheme=scheme, stepper="radau5"
    )
    # the first pairs are not yet asymptotic; the scheme of order 6 shows 5.5
    shows_order(table, SCHEMES[scheme].order, slack=0.7)


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_space_in_two_dimensions_with_coefficients_that_depend_on_time(scheme):
    case = manufactured([("robin", "absorbing"), ("periodic", "periodic")], horizon=0.1)
    nodes, steps = ([16, 24], 100) if SCHEMES[scheme].order > 2 else ([10, 20], 60)
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=nodes, steps=steps, scheme=scheme, stepper="rk4"
    )
    shows_order(table, SCHEMES[scheme].order, slack=0.8)


@pytest.mark.parametrize("word", [pytest.param(w, marks=pytest.mark.slow if w != "robin" else ()) for w in FACES])
@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=pytest.mark.slow if s in ("monotone", "central4") else ()) for s in SCHEMES]
)
def test_space_in_three_dimensions(scheme, word):
    other = ("absorbing", "reflecting") if word == "periodic" else ("periodic", "periodic")
    case = manufactured([(word, word), other, ("robin", "absorbing")], autonomous=True, horizon=0.02)
    # walls on four sides take more nodes until the order shows
    nodes, steps = ([18, 26], 90) if word == "periodic" else ([10, 14], 30)
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=nodes, steps=steps, scheme=scheme, stepper="rk4"
    )
    shows_order(table, SCHEMES[scheme].order, slack=1.0)


@pytest.mark.parametrize("stepper", [*STEPPERS])
@pytest.mark.parametrize("autonomous", [True, False])
def test_time(stepper, autonomous):
    """Loads and, in one case, coefficients depend on time; no absorbing values, whose stages lose order."""
    if stepper == "exponential":
        pytest.skip("needs loads that are constant in time")
    case = manufactured([("periodic", "periodic")], horizon=1.2, autonomous=autonomous)
    order = STEPPERS[stepper].order
    steps = {"rk4": [60, 90], "radau5": [4, 8], "radau3": [8, 16], "mcs3": [16, 32]}.get(stepper, [64, 128])
    nodes = 8 if stepper == "rk4" else 64
    exact, points = case.exact, case.points
    if stepper == "rk4":
        # stable steps are already accurate: compare with many more of them on the same nodes
        from kolmo import solve

        fine = solve(case.problem, grid=nodes, steps=600, scheme="central2", stepper="rk4")
        points = fine.grid.points
        exact = lambda t, x: fine(x)  # noqa: E731
    table = order_of_accuracy(
        case.problem, exact, points, nodes=[nodes], steps=steps, scheme="central2" if stepper == "rk4" else "central6",
        stepper=stepper,
    )  # fmt: skip
    shows_order(table, order, slack=0.35)


@pytest.mark.parametrize("stepper", ["radau5", "implicit-euler", "rk4"])
def test_layers(stepper):
    """Coefficients that jump: no step straddles a breakpoint, whatever the number of steps."""
    from kolmo import Grid

    case = catalog.layered_ornstein_uhlenbeck("gauss")
    grid = Grid.of(Box(-5.0, 5.0), 81)
    steps = {"radau5": (8, 7, 11), "implicit-euler": (512,), "rk4": (400, 399)}[stepper]
    for n in steps:
        sol = solve(case.problem, grid=grid, steps=n, scheme="central4", stepper=stepper)
        limit = 5e-3 if stepper == "implicit-euler" else 2e-3
        assert np.abs(sol(case.points) - case.values).max() < limit


def test_graded_nodes():
    from kolmo import Box, Grid
    from kolmo.grid.grading import Sinh

    case = catalog.harmonic_killing()
    grids = [Grid.of(Box(-6.0, 7.0), n, [Sinh(-6.0, 7.0, 0.2, 1.5)]) for n in (41, 81)]
    for scheme in SCHEMES:
        table = order_of_accuracy(
            case.problem, case.exact, case.points, nodes=grids, steps=32, scheme=scheme, stepper="radau5"
        )
        shows_order(table, SCHEMES[scheme].order)


STATIONARY = ["mean_exit_time", "committor"]


@pytest.mark.parametrize(("scheme", "name"), [*itertools.product(SCHEMES, STATIONARY)])
def test_stationary(scheme, name):
    case = catalog.CASES[name]()
    table = order_of_accuracy(case.problem, case.exact, case.points, nodes=[80, 160], steps=None, scheme=scheme)
    shows_order(table, SCHEMES[scheme].order, slack=0.8)


@pytest.mark.parametrize("stepper", ["rk4", "radau5", "mcs3"])
def test_layers_within_which_coefficients_depend_on_time(stepper):
    """At a breakpoint a step takes the limit of its own layer: dX = b(t) dt + dW, whose mean is exact in space."""
    sde = SDE(lambda t, x: t**2 + 9.0 * (t >= 0.5) + 0.0 * x, 0.3, dim=1, breakpoints=[0.5])
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, Box(-8.0, 12.0))
    sol = solve(problem, grid=21, steps=8 if stepper == "radau5" else 64, stepper=stepper)
    assert sol([0.0]).item() == pytest.approx(4.5 + 1.0 / 3.0, abs=1e-7 if stepper != "mcs3" else 1e-4)
