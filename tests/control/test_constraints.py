"""State constraints: admissible controls at the face, closed forms, and what is refused."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import catalog, control
from kolmo.control.coefficients import Coefficients
from kolmo.errors import InputError
from kolmo.schemes.fitting import fitted_rates


@pytest.mark.parametrize(
    ("name", "rtol"),
    [
        ("kept_above", 1e-3),
        *(pytest.param("saving_without_debt", rtol, marks=pytest.mark.slow) for rtol in (1e-3, 1e-4)),
    ],
)
def test_optima_with_constraints(name, rtol):
    case = catalog.OPTIMA[name]()
    opt = control.solve_hjb(case.problem, at=case.points, rtol=rtol)
    assert opt.status == "converged"
    exact = case.exact(0.0, case.points)
    error = np.abs(opt(case.points) - exact).max()
    assert error <= 3.0 * opt.error_estimate.max()
    assert error <= 1e-6 + rtol * np.abs(exact).max()


def test_the_policy_is_admissible_at_the_face_and_its_closed_loop_agrees():
    case = catalog.OPTIMA["kept_above"](horizon=0.5)
    opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-3)
    x = np.array([0.0, 1e-6, 0.4])
    np.testing.assert_allclose(opt.policy(0.2, x)[:, 0], [0.0, -0.7, -0.7], atol=1e-12)
    loop = opt.closed_loop()
    assert loop.box.faces[0][0].word == "natural"
    sampled = kolmo.monte_carlo(loop, [0.3], paths=2000, steps=40, rng=0)
    slack = 4.0 * sampled.standard_error + 2.0 * abs(sampled.bias_estimate) + opt.error_estimate.max()
    assert abs(sampled.mean - case.exact(0.0, 0.3)) < slack


def test_wealth_with_a_floor_held_as_amounts():
    """Power utility of what is above the floor: invested is a multiple of that, and nothing at the floor."""
    floor, excess, vol, gamma = 1.0, 0.06, 0.25, 0.5
    cp = control.ControlProblem(
        lambda t, x, a: a * excess,
        lambda t, x, a: a * vol,
        controls=control.Interval(0.0, 12.0),
        terminal=lambda x: (x[..., 0] - floor).clamp(min=0.0) ** gamma / gamma,
        horizon=1.0,
        sense="max",
        box=kolmo.Box(floor, np.inf, [("constrained", "open")]),
    )
    x = np.array([1.2, 1.7])
    opt = control.solve_hjb(cp, at=x, rtol=1e-3)
    growth = 0.5 * (excess / vol) ** 2 / (1.0 - gamma)
    exact = (x - floor) ** gamma / gamma * np.exp(gamma * growth)
    error = np.abs(opt(x) - exact).max()
    assert error <= 3.0 * opt.error_estimate.max()
    assert error <= 1e-3 * exact.max()
    np.testing.assert_allclose(opt.policy(0.0, x)[:, 0], (x - floor) * excess / (vol**2 * (1.0 - gamma)), rtol=2e-2)
    assert abs(opt.policy(0.0, [floor])[0]) < 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_best_admissible_controls(seed):
    """Of a quadratic Hamiltonian, against the best of a lattice; with and without curvature in the control."""
    rng = np.random.default_rng(seed)
    m = 1 + seed % 2
    B, c, q, p = (torch.as_tensor(rng.normal(size=shape)) for shape in ((2, m), 2, m, (4, 2)))
    Q = torch.as_tensor(rng.normal(size=(m, m)))
    Q = Q @ Q.T if seed < 4 else 0.0 * Q
    cp = control.ControlProblem(
        lambda t, x, a: 0.3 * c + a @ B.T,
        controls=control.BoxSet([-2.0] * m, [2.0] * m),
        terminal=lambda x: x[..., 0],
        horizon=1.0,
        running_cost=lambda t, x, a: 0.5 * ((a @ Q) * a).sum(-1) + a @ q,
        box=kolmo.Box([0.0, 0.0], [1.0, 1.0], "constrained"),
    )
    x = torch.tensor([[0.0, 0.5], [1.0, 0.3], [0.2, 0.0], [0.7, 1.0]], dtype=torch.float64)
    coefficients, none = Coefficients(cp, x), np.zeros((4, 2, 2))
    a, found = coefficients.choose(0.0, np.zeros(4), p.numpy(), none, torch.zeros(4, m, dtype=torch.float64))
    assert found.all()
    outward = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])
    assert ((coefficients.values(0.0, a).b * outward).sum(-1) < 1e-9).all()
    lattice = torch.cartesian_prod(*[torch.linspace(-2.0, 2.0, 401, dtype=torch.float64)] * m).reshape(-1, m)
    H = coefficients.hamiltonian(0.0, np.zeros(4), p.numpy(), none, a)
    for i in range(4):
        drift = (0.3 * c + lattice @ B.T).numpy()
        worth = drift @ p[i].numpy() + (0.5 * ((lattice @ Q) * lattice).sum(-1) + lattice @ q).numpy()
        inside = drift @ outward[i] <= 0.0
        assert H[i] <= worth[inside].min() + 1e-9
        assert H[i] >= worth[inside].min() - 0.1


def test_lists_keep_to_what_is_admissible():
    cp = problem(controls=control.Finite([-1.0, 0.25, 1.0]))
    x, flat = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64), np.zeros((3, 1, 1))
    for slope, best in ((1.0, [0.25, -1.0, -1.0]), (-1.0, [1.0, 1.0, -1.0])):
        p = np.full((3, 1), slope)
        a, _ = Coefficients(cp, x).choose(0.0, np.zeros(3), p, flat, torch.zeros(3, 1, dtype=torch.float64))
        assert a[:, 0].tolist() == best


def test_rates_keep_the_drift_where_there_is_little_noise():
    """What jumps up less what jumps down is the drift, at any ratio of the two; 700 is where exponentials overflow."""
    A = np.concatenate([-np.geomspace(1e-3, 1e6, 200), np.geomspace(1e-3, 1e6, 200)])
    up, down = fitted_rates(np.ones_like(A), A)
    np.testing.assert_allclose(up - down, A, rtol=1e-9)


def problem(**changes):
    given = {
        "drift": lambda t, x, a: a,
        "diffusion": lambda t, x, a: 0.3 * x * (1.0 - x),
        "controls": control.Interval(-1.0, 1.0),
        "terminal": lambda x: x[..., 0],
        "horizon": 0.5,
        "box": kolmo.Box(0.0, 1.0, "constrained"),
    }
    return control.ControlProblem(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"diffusion": 1.0}, "noise 1 across"),
        ({"drift": lambda t, x, a: a - 2.0}, "no control keeps the state inside"),
        ({"controls": control.Finite([-1.0, -0.5])}, "no control keeps the state inside"),
    ],
)
def test_faces_that_no_control_keeps(changes, said):
    with pytest.raises(InputError, match=said):
        control.solve_hjb(problem(**changes), at=[0.5])


def test_constrained_faces_are_refused_elsewhere():
    box = kolmo.Box(0.0, 1.0, "constrained")
    with pytest.raises(InputError, match="without a control"):
        kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, box)
    with pytest.raises(InputError, match="game"):
        problem(
            controls=control.Game(control.Interval(-1, 1), control.Interval(-1, 1)), drift=lambda t, x, a: a[..., :1]
        )
