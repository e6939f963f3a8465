"""Terminal data whose derivative autograd silently takes as zero are told apart from those it differentiates."""

import warnings

import pytest
import torch

import kolmo
from kolmo import control
from kolmo.errors import KolmoWarning

K = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)

SILENT = {
    "step": lambda x: (x[..., 0] > K).double(),
    "where": lambda x: torch.where(x[..., 0] < K, 0.0 * K, 1.0 + K),
    "heaviside": lambda x: torch.heaviside(x[..., 0] - K, torch.tensor(0.5, dtype=torch.float64)),
    "sign": lambda x: torch.stack([x[..., 0] ** 2, 2.0 + torch.sign(K - x[..., 0])], -1),
    "cash or nothing": lambda x: x[..., 0] * (x[..., 0] >= K),
}
SEEN = {
    "call by mask": lambda x: (x[..., 0] - K) * (x[..., 0] > K),
    "call by clamp": lambda x: torch.clamp(x[..., 0] - K, min=0.0),
    "call by where": lambda x: torch.where(x[..., 0] > K, x[..., 0] - K, 0.0 * K),
    "smooth step": lambda x: torch.sigmoid((x[..., 0] - K) / 0.05),
    "fixed step": lambda x: K * (x[..., 0] > 0.37),
    "relu network": lambda x: torch.relu(K * x[..., 0] + 0.1) + torch.relu(x[..., 0] - K),
    "switch outside": lambda x: x[..., 0] * (x[..., 0] > 100.0 + K),
}


def problem(terminal, dim=1):
    sde = kolmo.SDE(0.0, 0.5, dim=dim, arrays="torch")
    return kolmo.KolmogorovProblem(sde, terminal, 0.5, kolmo.Box([-3.0] * dim, [3.0] * dim))


def differentiated(terminal, dim=1):
    p = problem(terminal, dim)
    recipe = kolmo.solve(p, grid=25, steps=4, stepper="radau5").discretization
    return control.value(p, torch.zeros(1, dim), discretization=recipe)


@pytest.mark.parametrize("name", SILENT)
def test_a_silent_zero_is_told(name):
    with pytest.warns(KolmoWarning, match="terminal jumps"):
        differentiated(SILENT[name])


@pytest.mark.parametrize("name", SEEN)
def test_what_autograd_sees_is_left_in_peace(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiated(SEEN[name])


def test_in_two_dimensions_too_and_where_it_jumps():
    with pytest.warns(KolmoWarning, match="terminal jumps by 1 near"):
        differentiated(lambda x: (x.sum(-1) > K).double(), dim=2)


def test_minimize_still_names_the_parameter_that_does_not_matter():
    p = problem(SILENT["step"])
    with pytest.warns(KolmoWarning, match="terminal jumps"), pytest.raises(kolmo.InputError, match="objective"):
        control.minimize(lambda: control.value(p, [0.0], rtol=1e-2).sum(), K)


def with_(dim=1, horizon=0.5, faces="open", breakpoints=None, **given):
    """A problem on [−1.5, 1.5] with one of its functions given, terminal 1 + x."""
    drift, covariance = given.pop("drift", 0.0), given.pop("covariance", 0.25)
    sde = kolmo.SDE(drift, covariance=covariance, dim=dim, arrays="torch", breakpoints=breakpoints)
    box = kolmo.Box([-1.5] * dim, [1.5] * dim, faces)
    terminal = None if horizon is None else lambda x: 1.0 + x[..., 0]
    return kolmo.KolmogorovProblem(sde, terminal, horizon, box, **given)


def evaluated(p):
    recipe = kolmo.solve(p, grid=17, steps=None if p.horizon is None else 6, scheme="central2").discretization
    return control.value(p, torch.zeros(1, p.dim), discretization=recipe)


step = lambda x: (x[..., 0] > K).double()  # noqa: E731
kink = lambda x: torch.relu(x[..., 0] - K)  # noqa: E731
PARTS = {
    "killing": lambda f: {"killing": lambda t, x: 2.0 * f(x)},
    "source": lambda f: {"source": lambda t, x: 1.0 + f(x)},
    "drift": lambda f: {"drift": lambda t, x: f(x)[..., None].expand(x.shape)},
    "covariance": lambda f: {"covariance": lambda t, x: (0.3 + f(x))[..., None].expand(x.shape)},
}


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("what", PARTS)
def test_jumps_of_coefficients_are_told_by_name(what, dim):
    with pytest.warns(KolmoWarning, match=rf"{what} jumps by [12] near x = \[0.3(7|699)"):
        evaluated(with_(dim, **PARTS[what](step)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluated(with_(dim, **PARTS[what](kink)))


def test_jumps_of_coefficients_that_move_in_time_and_of_stationary_problems():
    with pytest.warns(KolmoWarning, match="killing jumps"):
        evaluated(with_(killing=lambda t, x: (x[..., 0] > K + t).double()))
    with pytest.warns(KolmoWarning, match="source jumps"):
        evaluated(with_(horizon=None, faces="absorbing", source=lambda t, x: 1.0 + step(x)))


@pytest.mark.parametrize("what", PARTS)
def test_jumps_in_time_are_told(what):
    """On from t = K on: the place is a time."""
    on = lambda t, x: torch.where(t > K, 1.0, 0.0) + 0.0 * x[..., 0]  # noqa: E731
    given = {
        "killing": lambda t, x: 2.0 * on(t, x),
        "source": on,
        "drift": lambda t, x: on(t, x)[..., None],
        "covariance": lambda t, x: 0.3 + on(t, x)[..., None],
    }
    with pytest.warns(KolmoWarning, match=rf"{what} jumps by [12] near t = 0.37"):
        evaluated(with_(**{what: given[what]}))


def test_jumps_along_a_face_and_in_its_values_are_told():
    def value(t, x):
        return (x[..., 1] > K).double()

    with pytest.warns(KolmoWarning, match=r"value of boundary\[0\]\[1\] jumps by 1"):
        evaluated(with_(2, faces=[("open", kolmo.Absorbing(value)), "open"]))
    with pytest.warns(KolmoWarning, match=r"kappa of boundary\[0\]\[0\] jumps by 1 near t = 0.37"):
        evaluated(with_(faces=[(kolmo.Robin(lambda t, x: torch.where(t > K, 1.0, 2.0) + 0.0 * x[..., 0]), "open")]))
