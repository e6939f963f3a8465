"""Faces that move: against Lévy's formula, integral equations of first passage, products, and identities."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from scipy.stats import norm

import kolmo
from kolmo import control
from kolmo.problem.motion import traced
from kolmo.problem.rest import at_rest
from kolmo.refine.residual import weighted_residual

BM = kolmo.SDE(0.0, 1.0, dim=1)


def one(x):
    return 1.0 + 0.0 * x[..., 0]


def crossed(a, b, T):
    """P(a Brownian motion reaches a + b t before T), a > 0 (Bachelier 1900, Lévy)."""
    return norm.sf((a + b * T) / np.sqrt(T)) + np.exp(-2 * a * b) * norm.cdf((b * T - a) / np.sqrt(T))


def passages(low, high, slopes, x0, T, n, sigma=1.0):
    """Densities of first passage of σW through either bound at n instants: the integral equations of Buonocore,
    Giorno, Nobile and Ricciardi (1990), by the trapezoidal rule. The bounds are smooth."""
    t = np.linspace(0.0, T, n + 1)[1:]
    h, bounds = t[0], np.array([low(t), high(t)])
    rates = np.array([slopes[0](t), slopes[1](t)])

    def psi(side, k, y, s):
        gap, distance = t[k] - s, bounds[side, k] - y
        f = np.exp(-(distance**2) / (2 * sigma**2 * gap)) / np.sqrt(2 * np.pi * sigma**2 * gap)
        return 0.5 * f * (rates[side, k] - distance / gap)

    g = np.zeros((2, n))
    for k in range(n):
        for side, sign in ((0, -1.0), (1, 1.0)):
            total = -2 * psi(side, k, x0, 0.0)
            for other in (0, 1):
                total += 2 * h * (g[other, :k] @ psi(side, k, bounds[other, :k], t[:k]))
            g[side, k] = sign * total
    return t, g


def absorbed(low, high, slopes, x0, T, n=250):
    """P(through low), P(through high) before T, extrapolated in the step."""
    found = []
    for m in (n, 2 * n):
        t, g = passages(low, high, slopes, x0, T, m)
        found.append((g.sum(1) - 0.5 * g[:, -1]) * t[0])
    return found[1] + (found[1] - found[0]) / 3.0


def test_linear_barriers_against_levys_formula():
    rng = np.random.default_rng(25)
    for _ in range(4):
        a, b, T = rng.uniform(0.4, 1.5), rng.uniform(-1.2, 1.0), rng.uniform(0.5, 2.0)
        side = rng.integers(2)
        if side:
            box = kolmo.Box(-np.inf, lambda t: a + b * t, [("open", "absorbing")])  # noqa: B023
        else:
            box = kolmo.Box(lambda t: -a - b * t, np.inf, [("absorbing", "open")])  # noqa: B023
        problem = kolmo.KolmogorovProblem(BM, one, T, box)
        points, sign = np.array([0.0, 0.3 * a]), 1.0 if side else -1.0
        sol = kolmo.solve(problem, at=sign * points, rtol=1e-5, atol=1e-7, save=[0.5 * T])
        error = np.abs(sol(sign * points) - (1 - crossed(a - points, b, T))).max()
        assert sol.status == "converged"
        assert error <= float(np.max(sol.error_estimate)) + 1e-9
        # at a later time, where the nodes are elsewhere
        x = a + 0.5 * b * T - np.array([0.6, 0.05])
        later = 1 - crossed(a + 0.5 * b * T - x, b, 0.5 * T)
        assert np.abs(sol(sign * x, t=0.5 * T) - later).max() < 1e-4
        h = 1e-4
        slope = (crossed(a + 0.5 * b * T - x - h, b, 0.5 * T) - crossed(a + 0.5 * b * T - x + h, b, 0.5 * T)) / (2 * h)
        assert np.abs(sol.gradient(sign * x, t=0.5 * T)[:, 0] + sign * slope).max() < 1e-3
        assert sol.nodes(0.5 * T)[0][-1 if side else 0] == pytest.approx(sign * (a + 0.5 * b * T), abs=1e-12)


def test_first_passage_through_a_line():
    a, b, t = 0.9, -0.6, np.array([0.1, 0.4, 0.8])
    problem = kolmo.KolmogorovProblem(BM, one, 1.0, kolmo.Box(-np.inf, lambda s: a + b * s, [("open", "absorbing")]))
    law = kolmo.solve_forward(problem, [0.0], flux_times=t, rtol=1e-4)
    exact = a / np.sqrt(2 * np.pi * t**3) * np.exp(-((a + b * t) ** 2) / (2 * t))
    assert np.abs(law.first_passage(t, "high") - exact).max() <= law.flux_error("high")
    assert abs(law.mass[-1] + law.exited("high")[-1] - 1.0) < 1e-11
    x = np.array([-1.0, -0.2, 0.1])
    law = kolmo.solve_forward(problem, [0.0], at=x, rtol=1e-4)
    image = norm.pdf(x) - np.exp(-2 * a * b) * norm.pdf(x - 2 * a)
    assert np.abs(law(x) - image).max() <= law.error_estimate["density"]


def test_two_bounds_against_integral_equations():
    """Random bounds that breathe, and square roots of time: who leaves where, and when."""
    rng = np.random.default_rng(7)
    for kind in ("waves", "roots"):
        a, b, c, w = rng.uniform(0.7, 1.3), rng.uniform(0.7, 1.3), rng.uniform(-0.4, 0.4), rng.uniform(1.0, 4.0)
        if kind == "waves":
            low, high = (lambda t: -a + c * np.sin(w * t)), (lambda t: b + c * np.sin(w * t + 1.0))  # noqa: B023
            slopes = (lambda t: c * w * np.cos(w * t)), (lambda t: c * w * np.cos(w * t + 1.0))  # noqa: B023
        else:
            low, high = (lambda t: -a * np.sqrt(0.3 + t)), (lambda t: b * np.sqrt(0.4 + t))  # noqa: B023
            slopes = (lambda t: -0.5 * a / np.sqrt(0.3 + t)), (lambda t: 0.5 * b / np.sqrt(0.4 + t))  # noqa: B023
        box = kolmo.Box(low, high, [("absorbing", kolmo.Absorbing(1.0))])
        problem = kolmo.KolmogorovProblem(BM, lambda x: 0.0 * x[..., 0], 1.5, box)
        exact = absorbed(low, high, slopes, 0.1, 1.5)
        sol = kolmo.solve(problem, at=[0.1], rtol=1e-5, atol=1e-7)
        assert abs(float(sol(0.1)) - exact[1]) <= max(float(np.max(sol.error_estimate)), 2e-5)
        law = kolmo.solve_forward(problem, [0.1], rtol=1e-3, flux_times=[0.4, 1.0])
        t, g = passages(low, high, slopes, 0.1, 1.5, 700)
        for side, name in enumerate(("low", "high")):
            assert law.exited(name)[-1] == pytest.approx(exact[side], abs=1e-4)
            reference = np.interp([0.4, 1.0], t, g[side])
            assert np.abs(law.exit_flux(name, [0.4, 1.0]) - reference).max() < 2e-3 * g[side].max()


@pytest.mark.parametrize("kind", ["linear", "one side", pytest.param("bent", marks=pytest.mark.slow)])
def test_bounds_that_meet_end_the_problem(kind):
    """Collapsing bounds: everything has left when they meet, and the choice agrees with the integral equation."""
    ends = 0.8
    if kind == "linear":
        low, high = (lambda t: -0.9 * (1 - t / ends)), (lambda t: 0.7 * (1 - t / ends))
        slopes = (lambda t: 0.9 / ends + 0 * t), (lambda t: -0.7 / ends + 0 * t)
    elif kind == "bent":
        low, high = (lambda t: -1.0 + 1.25 * t * t / (t * t + 0.16)), (lambda t: 1.0 - 1.25 * t)
        slopes = (lambda t: 1.25 * 0.32 * t / (t * t + 0.16) ** 2), (lambda t: -1.25 + 0 * t)
        ends = None
    else:
        low, high = (lambda t: -0.5 + 0 * t), (lambda t: 1.0 - 1.5 * t / ends)
        slopes = (lambda t: 0 * t), (lambda t: -1.5 / ends + 0 * t)
    held = kolmo.Box(lambda t: float(low(t)), lambda t: max(float(high(t)), float(low(t))),
                     [("absorbing", kolmo.Absorbing(1.0))])  # fmt: skip
    problem = kolmo.KolmogorovProblem(BM, lambda x: 0.0 * x[..., 0], 2.0, held)
    meeting = at_rest(problem).horizon
    if ends is not None:
        assert meeting == pytest.approx(ends, rel=1e-3)
    sol = kolmo.solve(problem, at=[0.05], rtol=1e-4, atol=1e-6)
    assert sol.status == "converged"
    exact = absorbed(low, high, slopes, 0.05, 0.9 * meeting, 200)
    left = 1.0 - exact.sum()
    assert exact[1] - 2e-5 <= float(sol(0.05)) <= exact[1] + left + 2e-5
    law = kolmo.solve_forward(problem, [0.05], grid=61, steps=200)
    assert law.mass[-1] < 1e-8
    assert law.exited("high")[-1] == pytest.approx(float(sol(0.05)), abs=1e-4)


def test_a_wall_that_moves_keeps_everything():
    """Reflecting walls: mass is conserved, and a density that only the walls change is what it must be."""
    rng = np.random.default_rng(3)
    for dim in (1, 2):
        phase = rng.uniform(0.0, 6.0, (dim, 2))
        lower = [lambda t, p=p: -1.0 + 0.3 * np.sin(3.0 * t + p) for p, _ in phase]
        upper = [lambda t, q=q: 1.2 + 0.3 * np.sin(2.0 * t + q) for _, q in phase]
        sde = kolmo.SDE(lambda t, x: -x + 0.3, 0.7, dim=dim)
        problem = kolmo.KolmogorovProblem(sde, lambda x: x.sum(-1), 1.0, kolmo.Box(lower, upper, "reflecting"))
        n, steps = (41, 20) if dim == 1 else (15, 6)
        recipe = kolmo.solve(problem, grid=n, steps=steps).discretization
        law = kolmo.solve_forward(problem, [0.1] * dim, discretization=recipe)
        assert np.abs(law.mass - 1.0).max() < 1e-11
        backward = float(kolmo.solve(problem, discretization=recipe)([0.1] * dim))
        assert law.value == pytest.approx(backward, abs=1e-11)
        assert law.expectation(lambda x: x.sum(-1)) == pytest.approx(backward, abs=1e-11)
        inside = at_rest(problem).box.at(0.0)
        assert np.all(np.array(law.nodes()[0][[0, -1]]) != [inside.lower[0], inside.upper[0]])
    # the mean of a Brownian motion between two walls that move together, in the frame of the walls, has a drift
    shaken = kolmo.Box(lambda t: t, lambda t: 1.0 + t, "reflecting")
    problem = kolmo.KolmogorovProblem(BM, lambda x: x[..., 0], 30.0, shaken)
    law = kolmo.solve_forward(problem, [0.5], grid=81, steps=60)
    x = np.linspace(30.0, 31.0, 9)
    stationary = 2.0 * np.exp(-2.0 * (x - 30.0)) / (1.0 - np.exp(-2.0))  # drift −1 in their frame
    assert np.abs(law(x) - stationary)[2:7].max() < 1e-9
    assert np.abs(law(x) - stationary).max() < 1e-3  # beside walls densities are read off moments


@pytest.mark.parametrize("scheme", ["central2", "central6", "monotone"])
def test_forwards_and_backwards_agree(scheme):
    box = kolmo.Box(lambda t: -1.0 - 0.3 * t, lambda t: np.exp(-0.5 * t), [("absorbing", kolmo.Robin(0.4, 0.2))])
    sde = kolmo.SDE(lambda t, x: np.sin(x + t), lambda t, x: 0.6 + 0.1 * np.cos(x), dim=1)
    problem = kolmo.KolmogorovProblem(
        sde, lambda x: 1.0 + x[..., 0] ** 2, 1.0, box, killing=lambda t, x: 0.1 * x[..., 0] ** 2,
        source=lambda t, x: np.cos(t * x[..., 0]),
    )  # fmt: skip
    sol = kolmo.solve(problem, grid=41, steps=30, scheme=scheme)
    law = kolmo.solve_forward(problem, [0.2], discretization=sol.discretization)
    width = sol.discretization.width
    assert law.value == pytest.approx(
        float(sol.grid.interpolate(sol.values[0], np.array([[0.2]]), width)[0]), abs=1e-11
    )
    assert abs(law.mass[-1] + sum(law.exited(e)[-1] for e in law.exits) - 1.0) < 1e-10


def test_an_elastic_wall_that_moves():
    """A manufactured solution: u = exp(−t) cos(x) with the face value that it has on the moving face."""

    def wall(t):
        return 1.0 + 0.4 * np.sin(2.0 * t)

    face = kolmo.Robin(0.7, lambda t, x: np.exp(-t) * (-0.5 * 0.36 * np.sin(x[..., 0]) + 0.7 * np.cos(x[..., 0])))
    exact = kolmo.Absorbing(lambda t, x: np.exp(-t) * np.cos(x[..., 0]))
    problem = kolmo.KolmogorovProblem(
        kolmo.SDE(0.0, 0.6, dim=1), lambda x: np.exp(-1.0) * np.cos(x[..., 0]), 1.0,
        kolmo.Box(lambda t: -1.0 + 0.2 * t, wall, [(exact, face)]),
        source=lambda t, x: np.exp(-t) * np.cos(x[..., 0]) * (1.0 + 0.18),
    )  # fmt: skip
    x = np.array([-0.5, 0.3, 0.9])
    sol = kolmo.solve(problem, at=x, rtol=1e-6)
    assert np.abs(sol(x) - np.cos(x)).max() < 2e-6


def fitted(theta, faces):
    """A process between bounds with parameters."""
    lower = lambda t: -theta[0] - theta[1] * np.sin(3.0 * t)  # noqa: E731
    box = kolmo.Box(lower, lambda t: theta[0] * torch.exp(-theta[2] * t), faces)
    return kolmo.KolmogorovProblem(kolmo.SDE(lambda t, x: -x, 0.8, dim=1), lambda x: 1 + x[..., 0] ** 2, 1.0, box)


@pytest.mark.parametrize("faces", ["absorbing", "reflecting"])
def test_gradients_with_respect_to_the_bounds(faces):
    """Taylor's remainder is of second order: of a value, of densities and of first-passage rates."""
    theta = torch.tensor([1.0, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    way = torch.tensor([0.3, -0.7, 0.5], dtype=torch.float64)
    recipe = kolmo.plan(fitted(theta, faces), at=[0.0, 0.3], rtol=1e-3)
    y = torch.tensor([0.1, 0.3], dtype=torch.float64)

    def value(p):
        return control.value(fitted(p, faces), [0.3], discretization=recipe).sum()

    def likelihood(p):
        law = control.law(fitted(p, faces), [0.3], discretization=recipe)
        flux = law.exit_flux("high", [0.3, 0.5]).log().sum() if faces == "absorbing" else 0.0
        return law(y).log().sum() + law.expectation(lambda x: x[..., 0]) + flux

    def transition(p):
        return control.transition_density(fitted(p, faces), [0.3, 0.1], [0.2, -0.4], discretization=recipe).log().sum()

    for function in (value, likelihood, transition):
        there = function(theta)
        (gradient,) = torch.autograd.grad(there, theta)
        left = [abs(float((function(theta + h * way) - there - h * (gradient @ way)).detach())) for h in (2e-2, 1e-2)]
        assert left[0] / left[1] == pytest.approx(4.0, abs=0.3), function.__name__


def test_a_gradient_against_a_closed_form():
    """d/dq of the survival of a Brownian motion between −q and q, a place that is a parameter and does not move."""
    q = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    problem = kolmo.KolmogorovProblem(BM, one, 1.0, kolmo.Box(-q, q, "absorbing"))
    (found,) = torch.autograd.grad(control.value(problem, [0.0], rtol=1e-7).sum(), q)
    k = 2.0 * np.arange(40) + 1.0
    terms = 4.0 / np.pi * (-1.0) ** np.arange(40) / k * np.exp(-(k**2) * np.pi**2 / 8.0)
    assert float(found) == pytest.approx(float((terms * k**2 * np.pi**2 / 4.0).sum()), abs=1e-5)


def test_paths_and_certificates_agree():
    box = kolmo.Box(
        lambda t: -1.0 - 0.3 * np.sin(3 * t), lambda t: 0.8 + 0.5 * t, [("absorbing", kolmo.Absorbing(2.0))]
    )
    problem = kolmo.KolmogorovProblem(kolmo.SDE(lambda t, x: -x, 0.9, dim=1), one, 1.0, box)
    x = np.array([0.0, 0.4])
    sol = kolmo.solve(problem, at=x, rtol=1e-6)
    estimate = kolmo.monte_carlo(problem, x, paths=8000, steps=64, rng=4)
    assert (np.abs(estimate.mean - sol(x)) < 4 * estimate.standard_error + estimate.bias_estimate).all()
    assert (estimate.bias_estimate < 0.05).all()
    coarse = kolmo.solve(problem, grid=13, steps=6)
    found = kolmo.certify(problem, coarse, x, paths=2000, steps=64, rng=5)
    assert (np.abs(found.corrected - sol(x)) < 4 * found.uncertainty).all()
    told = weighted_residual(problem, coarse.discretization, x)
    assert np.sign(told.error.ravel() * (sol(x) - coarse(x))).min() >= 0


def test_a_product_of_moving_boxes():
    """Independent coordinates: survival is the product of those of each."""
    rng = np.random.default_rng(11)
    a, b = rng.uniform(0.8, 1.2, 2), rng.uniform(-0.4, 0.4, 2)
    sides = [kolmo.Box(-1.5, lambda t, i=i: a[i] + b[i] * t, [("reflecting", "absorbing")]) for i in (0, 1)]
    single = [kolmo.solve(kolmo.KolmogorovProblem(BM, one, 0.5, side), at=[0.1], rtol=1e-6)(0.1) for side in sides]
    upper = [lambda t, i=i: a[i] + b[i] * t for i in (0, 1)]
    box = kolmo.Box([-1.5, -1.5], upper, [("reflecting", "absorbing")] * 2)
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=2), one, 0.5, box)
    sol = kolmo.solve(problem, grid=41, steps=40, stepper="mcs3")
    assert float(sol([0.1, 0.1])) == pytest.approx(float(single[0] * single[1]), rel=1e-3)


def test_jumps_of_the_process_end_on_a_moving_face():
    jumping = kolmo.SDE(0.0, 0.5, jumps=[(1.0, 0.7)], dim=1)
    box = kolmo.Box(-3.0, lambda t: 1.0 - 0.3 * t, [("reflecting", kolmo.Absorbing(1.0))])
    problem = kolmo.KolmogorovProblem(jumping, lambda x: 0.0 * x[..., 0], 1.0, box)
    sol = kolmo.solve(problem, at=[0.0], rtol=1e-4)
    estimate = kolmo.monte_carlo(problem, 0.0, paths=8000, steps=64, rng=2)
    assert abs(float(estimate.mean - sol(0.0))) < 4 * float(estimate.standard_error + estimate.bias_estimate)


def test_kinks_are_found():
    bent = traced(lambda t: 1.0 - min(t, 0.37) + 0.1 * np.sin(5 * t), 1.0)
    assert bent.breaks == pytest.approx((0.37,), abs=1e-10)
    t = np.array([0.1, 0.3699, 0.3701, 0.9])
    exact = 1.0 - np.minimum(t, 0.37) + 0.1 * np.sin(5 * t)
    assert [bent(s) for s in t] == pytest.approx(exact.tolist(), abs=1e-12)
    speeds = -1.0 * (t < 0.37) + 0.5 * np.cos(5 * t)
    assert [bent.speed(s) for s in t] == pytest.approx(speeds.tolist(), abs=1e-9)
    table = traced(lambda t: float(np.interp(t, [0.0, 0.2, 0.5, 0.7, 1.0], [1.0, 0.8, 0.9, 0.4, 0.3])), 1.0)
    assert table.breaks == pytest.approx((0.2, 0.5, 0.7), abs=1e-10)
    root = traced(lambda t: np.sqrt(t), 1.0)
    assert root.breaks == ()
    assert root(1e-6) == pytest.approx(1e-3, rel=1e-9)


def test_a_kink_costs_no_accuracy():
    """A barrier that stops: Lévy's formula before, and the free integral over where it stops."""
    box = kolmo.Box(-np.inf, lambda t: 1.0 - min(t, 0.5), [("open", "absorbing")])
    problem = kolmo.KolmogorovProblem(BM, one, 1.0, box)
    y = np.linspace(-7.0, 0.5, 40001)
    before = norm.pdf(y, scale=np.sqrt(0.5)) - np.exp(2.0) * norm.pdf(y - 2.0, scale=np.sqrt(0.5))
    exact = np.trapezoid(before * (1 - crossed(0.5 - y + 1e-300, 0.0, 0.5)), y)
    sol = kolmo.solve(problem, at=[0.0], rtol=1e-6)
    assert abs(float(sol(0.0)) - exact) < 1e-6


def test_a_solution_is_kept_with_its_motion(tmp_path):
    box = kolmo.Box(lambda t: -1.0 + 0.1 * np.sin(t), 1.0, [("absorbing", "reflecting")])
    sol = kolmo.solve(kolmo.KolmogorovProblem(BM, one, 1.0, box), grid=31, steps=10, save=[0.5])
    sol.save(tmp_path / "u.npz")
    again = kolmo.load(tmp_path / "u.npz")
    assert again(0.3, t=0.5) == sol(0.3, t=0.5)
    assert again.motion.outwards(0.5, np.array([-1.0]))[0] == pytest.approx(-1.0 + 0.1 * np.sin(0.5), abs=1e-12)
    assert sol.plot(t=0.5).lines[0].get_xdata()[0] == pytest.approx(-1.0 + 0.1 * np.sin(0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: kolmo.Box(lambda t: t, 1.0), "boundary"),
        (lambda: kolmo.Box(lambda t: t, 1.0, "periodic"), "boundary"),
        (lambda: kolmo.KolmogorovProblem(BM, None, None, kolmo.Box(lambda t: t, 1.0, "absorbing")), "box"),
        (lambda: solved(kolmo.Box(lambda t: 2.0 + t, 1.0, "absorbing")), "lower, upper"),
        (lambda: solved(kolmo.Box(lambda t: np.nan, 1.0, "absorbing")), "lower, upper"),
        (lambda: solved(kolmo.Box(lambda t: [t, t], 1.0, "absorbing")), "lower, upper"),
        (lambda: solved(kolmo.Box(lambda t: random.random(), 2.0, "absorbing")), "lower, upper"),
        (lambda: solved(kolmo.Box(lambda t: 2.0 * t, 1.0, "reflecting")), "boundary"),
        (lambda: kolmo.Box(lambda t: t, 1.0, "absorbing").lower, "box"),
        (lambda: kolmo.spectrum(moving(), 2), ""),
        (lambda: control.solve_hjb(control.ControlProblem(
            lambda t, x, a: a, 1.0, controls=control.Interval(-1, 1), terminal=one, horizon=1.0,
            box=kolmo.Box(lambda t: t - 2.0, 1.0, "absorbing")), at=[0.0]), "box"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, argument):
    with pytest.raises(kolmo.InputError) as caught:
        make()
    assert argument in caught.value.argument


def moving():
    return kolmo.KolmogorovProblem(BM, one, 1.0, kolmo.Box(lambda t: -1.0 - t, 1.0, "absorbing"))


def solved(box):
    return kolmo.solve(kolmo.KolmogorovProblem(BM, one, 1.0, box), at=[0.0])


def test_nothing_is_changed_behind_ones_back():
    problem = moving()
    still = at_rest(problem)
    assert problem.motion is None
    assert problem.box.moves
    assert not still.box.moves
    assert at_rest(still) is still
    assert dataclasses.is_dataclass(still.motion)
