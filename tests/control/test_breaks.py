"""Breaks of terminal data and of policies: found, resolved, and counted in the differences that reach across them."""

import numpy as np
import pytest

import kolmo
from kolmo import control
from kolmo.control.bellman import Act
from kolmo.control.breaks import Breaks, terminal_breaks, together
from kolmo.control.frame import frame
from kolmo.control.policy_steps import iterate
from kolmo.grid import Grid


def steering(mu, sigma, terminal, box=None):
    return control.ControlProblem(
        lambda t, x, a: mu * a,
        sigma,
        controls=control.Interval(-1.0, 1.0),
        terminal=terminal,
        horizon=1.0,
        box=box or kolmo.Box.unbounded(1),
    )


def test_a_switch_in_a_boundary_layer_gets_a_fine_grid():
    """Benes 1974: the drift is three times what the noise makes up for; symmetric about c, so V'(c) = 0."""
    c = 0.37
    opt = control.solve_hjb(steering(3.0, 0.6, lambda x: (x[..., 0] - c) ** 2), at=[c - 0.2, c + 0.2], rtol=1e-5)
    assert opt.status == "converged"
    assert opt.stats["cells"] < 600
    left, right = opt([c - 0.2, c + 0.2])
    assert abs(left - right) <= 2.0 * opt.error_estimate.max()
    assert opt.policy(0.3, [c - 0.01, c + 0.01]).reshape(-1).tolist() == pytest.approx([1.0, -1.0])


def test_the_kink_of_the_second_derivative_costs_no_order():
    """Fastest exit on even grids whose nodes lie anywhere beside the switch: errors fall with the third power."""
    sigma, x = 0.7, np.array([[-0.5], [0.2]])
    exact = (1 - np.abs(x)) - 0.5 * sigma**2 * (np.exp(-2 * np.abs(x) / sigma**2) - np.exp(-2 / sigma**2))
    problem = control.ControlProblem(
        lambda t, x, a: a,
        sigma,
        controls=control.Interval(-1.0, 1.0),
        terminal=None,
        horizon=None,
        box=kolmo.Box(-1.0, 1.0, "absorbing"),
        running_cost=1.0,
    )
    errors = []
    for n in (40, 60, 90, 135):
        recipe = kolmo.discretization.Discretization(Grid.of(problem.box, n), (), "central4", "radau5")
        opt = control.solve_hjb(problem, discretization=recipe)
        errors.append(np.abs(opt(x) - exact[:, 0]).max())
    assert errors[-1] < 2e-6
    assert errors[0] / errors[-1] > 0.6 * (135 / 40) ** 3


def test_breaks_of_terminal_data():
    points = np.array([[0.0]])

    def found(terminal):
        problem = steering(1.0, 1.0, terminal)
        still = problem.closed_loop(problem.constant(0.0))
        return terminal_breaks(still, frame([still], points, 1e-6, (None,)))

    assert found(lambda x: x[..., 0] ** 2).places == []
    bend = found(lambda x: (x[..., 0] - 0.4).abs())
    assert bend.node == pytest.approx(0.4, abs=1e-8)
    assert not bend.jump
    jump = found(lambda x: (x[..., 0] > 0.4).double())
    assert jump.jump
    assert jump.node == pytest.approx(0.4, abs=1e-8)
    several = found(lambda x: (x[..., 0] - 0.4).abs() + (x[..., 0] + 1.0).abs())
    assert several.node is None
    np.testing.assert_allclose([place for place, _ in several.places], [-1.0, 0.4], atol=5e-3)


def test_a_break_seen_twice_is_one():
    bend, jump = Breaks([(0.4, 0.1)], 0.4), Breaks([(0.4, 0.1)], jump=True)
    assert together(bend, [(0.41, 0.05), (2.0, 0.3)], 0.02) == [(0.4, 0.1), (2.0, 0.3)]
    assert together(bend, [(0.41, 0.02)], 0.02) == [(0.4, 0.02)]
    assert together(bend, [(0.41, 0.5)], 0.02) == [(0.4, 0.5)]
    assert together(jump, [(0.41, 0.5)], 0.02) == [(0.4, 0.1)]


def test_policies_that_go_back_and_forth_end():
    """A policy that is always better than the other one, either way: the present one stays, and the change is told."""
    import torch

    def act(value):
        return Act(torch.full((4, 1), value, dtype=torch.float64))

    settled = iterate(
        lambda acts: [np.full((4, 1), 1.0 + float(acts[0].a[0, 0]))],
        lambda states, acts, count: [act(0.5 - float(acts[0].a[0, 0]))],
        [act(0.0)],
    )
    assert settled.change == pytest.approx(0.5)
    assert settled.count < 50


def test_policy_iteration_ends_where_its_convergence_says_that_the_next_change_is_small():
    """Changes 1, 1e-4, 1e-8, …: the third is expected from the first two, and of a step alike from its own."""
    import torch

    def act(value):
        return Act(torch.full((4, 1), value, dtype=torch.float64))

    def settled(like=()):
        return iterate(
            lambda acts: [np.full((4, 1), 1.0 + float(acts[0].a[0, 0]))],
            lambda states, acts, count: [act(1e-4 * float(acts[0].a[0, 0]))],
            [act(1.0)],
            1e-7,
            like,
        )

    assert settled(None).count == 4  # nothing is expected of policies that jump
    plain = settled()
    assert plain.count == 3  # differences 1 and 1e-4: the next one is 1e-8
    assert settled(plain.changes).count == 3  # 1 · 1e-4 is not below 1e-7
    assert settled((1.0, 1e-8)).count == 2  # what the step before showed
    assert settled((1e-3, 1e-11)).count == 3  # but not where this one begins further off


def test_what_policy_iteration_leaves_counts_in_the_estimate(monkeypatch):
    import sys

    hjb = sys.modules["kolmo.control.policy_search"]
    solve_on = hjb.Search._solve_on

    def unsettled(self, grid, steps, scheme):
        level = solve_on(self, grid, steps, scheme)
        level.unsettled = 0.25
        return level

    monkeypatch.setattr(hjb.Search, "_solve_on", unsettled)
    with pytest.warns(kolmo.errors.ToleranceWarning):
        opt = control.solve_hjb(steering(1.0, 1.0, lambda x: x[..., 0] ** 2), at=[0.5], rtol=1e-2, max_cells=120)
    assert opt.error_estimate.max() >= 0.25


def test_the_load_of_kinks_is_that_of_their_place():
    """The second difference of order 4 of a function with a kink in its second derivative, at nodes about it."""
    from kolmo.control.bellman import _seen

    where = 0.31
    nodes = np.arange(-6, 7)
    cubic = np.abs(nodes - where) ** 3 / 6.0  # second derivative |x − where|
    weights = np.array([-1.0, 16.0, -30.0, 16.0, -1.0]) / 12.0
    seen = np.convolve(cubic, weights, "valid") - np.abs(nodes - where)[2:-2]
    np.testing.assert_allclose(seen, _seen(nodes[2:-2] - where), atol=1e-12)


@pytest.mark.parametrize("kind", ["step", "stationary", "ergodic"])
def test_a_load_of_kinks_that_moves_with_every_policy_is_held(kind, monkeypatch):
    """A small correction that never comes to rest keeps no policy from it: what is left is told to be nothing."""
    from dataclasses import replace

    from kolmo.control import policy_steps
    from kolmo.control.bellman import Bellman

    forever = {} if kind == "step" else {"terminal": None, "horizon": None}
    problem = control.ControlProblem(
        lambda t, x, a: a - 0.5 * x,
        0.7,
        controls=control.Interval(-1.0, 1.0),
        running_cost=lambda t, x, a: x[..., 0] ** 2,
        box=kolmo.Box(-1.0, 1.0, "reflecting" if kind == "ergodic" else "absorbing"),
        **({"terminal": lambda x: x[..., 0] ** 2, "horizon": 1.0} | forever),
        **({"ergodic": True} if kind == "ergodic" else {}),
    )
    bellman = Bellman(problem, Grid.of(problem.box, 41), "central4")
    improve, rng = Bellman.improve, np.random.default_rng(0)

    def restless(self, t, V, act):
        return replace(improve(self, t, V, act), bent=1e-6 * rng.normal(size=(self.grid.size, 1)))

    monkeypatch.setattr(Bellman, "improve", restless)
    if kind == "step":
        step = policy_steps.ImplicitPolicyStep(bellman, "implicit-euler")
        V, _ = step(1.0, 0.1, bellman.free(problem_values(bellman)), [bellman.start()])
        count, left = step.iterations, step.unsettled
    else:
        V, settled = policy_steps.solve_stationary(bellman)
        count, left = settled.count, settled.change
    assert np.isfinite(V).all()
    assert count < policy_steps.POLICY_ITERATIONS
    assert left == 0.0


def problem_values(bellman):
    """Terminal values at the nodes."""
    return np.asarray(bellman.grid.points) ** 2
