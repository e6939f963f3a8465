"""Values on absorbing faces that jump in time, told as breakpoints, and along the face."""

import numpy as np
import pytest
from scipy.special import erfc

from kolmo import SDE, Absorbing, Box, KolmogorovProblem, discretize, monte_carlo, solve
from kolmo.march import March, time_nodes
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS


class Switched:
    """Paid on reaching 0: the first amount until t₁, the second until t₂, the third until T; BM with noise σ."""

    def __init__(self, rng):
        self.T = rng.uniform(0.8, 1.2)
        self.breaks = np.sort(rng.uniform(0.15, 0.85, 2)) * self.T
        self.amounts = rng.uniform(-2.0, 2.0, 3)
        self.sigma = rng.uniform(0.7, 1.2)

    def paid(self, t):
        return self.amounts[int((t >= self.breaks).sum())]

    def problem(self, ramp=0.0):
        sde = SDE(0.0, diffusion=self.sigma, dim=1, breakpoints=self.breaks.tolist())
        box = Box(0.0, 8.0, [(Absorbing(lambda t, x: self.paid(t) * (1.0 + ramp * t) + 0.0 * x[..., 0]), "open")])
        return KolmogorovProblem(sde, lambda x: 0.0 * x[..., 0], self.T, box)

    def exact(self, t, x):
        """By the law of the first time at 0."""
        ends = [*self.breaks, self.T]
        reached = [0.0 if e <= t else erfc(x / (self.sigma * np.sqrt(2.0 * (e - t)))) for e in ends]
        return sum(a * (r - q) for a, r, q in zip(self.amounts, reached, [0.0, *reached[:-1]], strict=True))


@pytest.mark.parametrize("stepper", ["radau5", "radau3", "implicit-euler", "rk4"])
@pytest.mark.parametrize("seed", range(3))
def test_values_that_jump_in_time(seed, stepper):
    switched = Switched(np.random.default_rng(seed))
    x = np.array([0.3, 0.8, 1.5, 3.0])
    first, second = switched.breaks
    save = [first, 0.5 * (first + second), second]
    errors = []
    for n, steps in ((61, 24), (121, 48)):
        steps = max(steps, 2 * n**2 // 50) if stepper == "rk4" else steps
        sol = solve(switched.problem(), grid=n, steps=steps, scheme="central4", stepper=stepper, save=save)
        errors.append(max(np.abs(sol(x, t) - switched.exact(t, x)).max() for t in (0.0, *save)))
        # at a breakpoint, and just before it: [t_k, t_{k+1})
        assert np.allclose([sol(0.0, t) for t in (0.0, *save)], [switched.paid(t) for t in (0.0, *save)], atol=1e-12)
    assert errors[1] < (6e-2 if stepper == "implicit-euler" else 2e-2)
    assert np.log2(errors[0] / errors[1]) > 0.8 or errors[1] < 1e-3, errors


def test_stages_read_the_value_of_their_own_interval():
    """With values that also grow, so that every stage reads its own; also stages that end a step on a breakpoint."""
    rng = np.random.default_rng(5)
    for _ in range(100):
        switched = Switched(rng)
        generator = discretize(switched.problem(ramp=0.1), 9, "central2")
        times = time_nodes(generator.intervals(), int(rng.choice([1, 2, 60])))
        for stepper in ("radau5", "rk4", "mcs3"):
            for plan in March(generator, STEPPERS[stepper], times).plans:
                due = switched.paid(0.5 * (plan.start + plan.end))
                assert all(switched.paid(t) == due for t in plan.instants)


@pytest.mark.parametrize("seed", range(2))
def test_paths_are_paid_what_is_due_when_they_leave(seed):
    switched = Switched(np.random.default_rng(20 + seed))
    x = np.array([0.2, 1.0])
    est = monte_carlo(switched.problem(), x, paths=20_000, steps=16, rng=seed)
    assert (np.abs(est.mean - switched.exact(0.0, x)) < 4.0 * est.standard_error + est.bias_estimate).all()


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("on_node", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_values_that_jump_along_a_face(seed, on_node, scheme):
    """Where Brownian motion leaves a half-plane: the angle under which the paying part of the edge is seen."""
    rng = np.random.default_rng(seed)
    jump = float(rng.integers(8, 12)) / 20.0 + (0.0 if on_node else rng.uniform(0.01, 0.04))
    below = bool(rng.integers(2))

    def exact(x):
        with np.errstate(divide="ignore", invalid="ignore"):
            return 0.5 + np.arctan((x[..., 0] - jump) / x[..., 1]) / np.pi

    def value(t, x):
        at = x[..., 0] >= jump if below else x[..., 0] > jump
        return np.where(x[..., 1] > 0.0, exact(x), 1.0 * at)

    box = Box([0.0, 0.0], [1.0, 1.0], Absorbing(value))
    problem = KolmogorovProblem(SDE([0.0, 0.0], diffusion=1.0, dim=2), None, None, box, source=0.0)
    x = np.array([[0.5, 0.4], [0.3, 0.25], [0.8, 0.5], [jump, 0.3]])
    errors = [np.abs(solve(problem, grid=n, scheme=scheme)(x) - exact(x)).max() for n in (21, 41)]
    if on_node:  # the mean there: order two, whatever the comparison says of the node itself
        assert np.log2(errors[0] / errors[1]) > 1.6, errors
        node = np.flatnonzero(np.isclose(discretize(problem, 21).grid.points, [jump, 0.0], atol=1e-9).all(1))[0]
        assert discretize(problem, 21).boundary(0.0, discretize(problem, 21).grid.points)[node] == 0.5
    assert errors[1] < (2e-3 if on_node else 2e-2)
