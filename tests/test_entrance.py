"""Ends that the process leaves at once and never reaches: Bessel processes, radial square roots."""

import numpy as np
import pytest
from scipy import stats

import kolmo
from kolmo import SDE, Box, KolmogorovProblem, discretize, monte_carlo, solve, solve_forward
from kolmo.schemes.base import SCHEMES


class Bessel:
    """dR = ((δ − 1)σ²/(2R) − ½κR) dt + σ dW: R² is a square-root process, and noncentral χ² its law."""

    def __init__(self, rng):
        self.delta = float(rng.choice([2.0, rng.uniform(2.0, 7.0)]))
        self.sigma, self.kappa, self.T, self.s = rng.uniform(0.5, 1.5, 4)
        self.sde = SDE(
            lambda t, x: 0.5 * (self.delta - 1.0) * self.sigma**2 / x - 0.5 * self.kappa * x,
            diffusion=self.sigma,
            dim=1,
        )
        self.scale = self.sigma**2 * (1.0 - np.exp(-self.kappa * self.T)) / self.kappa  # of R² over χ²

    def problem(self, upper):
        box = Box(0.0, upper, [("entrance", "open")])
        return KolmogorovProblem(self.sde, lambda x: np.exp(-self.s * x[..., 0] ** 2), self.T, box)

    def exact(self, x):
        """E exp(−s R_T²), R_T² = scale χ²(δ, x² e^(−κT) / scale)."""
        z = 1.0 + 2.0 * self.s * self.scale
        return z ** (-0.5 * self.delta) * np.exp(-self.s * x**2 * np.exp(-self.kappa * self.T) / z)

    def density(self, r, x):
        law = stats.ncx2(self.delta, x**2 * np.exp(-self.kappa * self.T) / self.scale, scale=self.scale)
        return law.pdf(r**2) * 2.0 * r


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("seed", range(3))
def test_order_for_bessel_processes_of_random_dimension(scheme, seed):
    bessel = Bessel(np.random.default_rng(seed))
    x = np.array([0.0, 0.03, 0.3, 1.0, 2.0])
    nodes = [61, 121]
    errors = [
        np.abs(solve(bessel.problem(6.0), grid=n, steps=24, scheme=scheme)(x) - bessel.exact(x)).max() for n in nodes
    ]
    order = SCHEMES[scheme].order
    assert np.log2(errors[0] / errors[1]) > order - 0.5 or errors[1] < 2e-9, errors
    assert errors[1] < {1: 1e-2, 2: 2e-3, 4: 1e-5, 6: 3e-7}[order]


@pytest.mark.parametrize("seed", range(3))
def test_density_is_noncentral_chi(seed):
    bessel = Bessel(np.random.default_rng(10 + seed))
    law = solve_forward(bessel.problem(7.0), [0.8], grid=241, steps=64)
    r = np.array([0.5, 1.0, 1.7])
    assert np.abs(law(r) - bessel.density(r, 0.8)).max() < 2e-3
    assert abs(law.mass[-1] - 1.0) < 1e-9
    assert law.exits == ()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["euler", "platen"])
def test_paths_near_an_entrance(seed, method):
    bessel = Bessel(np.random.default_rng(20 + seed))
    x = np.array([0.0, 0.1, 0.7, 1.5])
    est = monte_carlo(bessel.problem(np.inf), x, paths=20_000, steps=64, rng=seed, method=method)
    assert (np.abs(est.mean - bessel.exact(x)) < 4.0 * est.standard_error + est.bias_estimate).all()
    assert est.bias_estimate.max() < 0.1


@pytest.mark.parametrize("side", [0, 1])
def test_an_entrance_beside_another_axis_and_at_either_end(side):
    """A Bessel process and an Ornstein–Uhlenbeck one, correlated at no place: a product; mirrored for the high end."""
    rng = np.random.default_rng(3)
    bessel = Bessel(rng)
    sign = 1.0 if side == 0 else -1.0

    def drift(t, x):
        return np.stack([sign * bessel.sde.drift(t, sign * x[..., :1])[..., 0], -x[..., 1]], -1)

    ends = ([0.0, -4.0], [6.0, 4.0]) if side == 0 else ([-6.0, -4.0], [0.0, 4.0])
    pair = ("entrance", "open") if side == 0 else ("open", "entrance")
    problem = KolmogorovProblem(
        SDE(drift, diffusion=[bessel.sigma, 1.0], dim=2),
        lambda x: np.exp(-bessel.s * x[..., 0] ** 2) * x[..., 1],
        bessel.T,
        Box(*ends, [pair, "open"]),
    )
    x = np.array([[0.0, 0.5], [0.3, -0.7], [1.2, 1.0]]) * [sign, 1.0]
    exact = bessel.exact(np.abs(x[:, 0])) * x[:, 1] * np.exp(-bessel.T)
    for scheme, limit in (("central6", 1e-4), ("monotone", 3e-2)):
        assert np.abs(solve(problem, grid=(49, 33), steps=16, scheme=scheme)(x) - exact).max() < limit


@pytest.mark.parametrize(
    ("drift", "diffusion"),
    [
        (lambda t, x: 1.0 + 0.0 * x, 1.0),  # finite
        (lambda t, x: -1.0 / x, 1.0),  # outwards
        (lambda t, x: 0.25 / x, 1.0),  # too weak: dimension 1.5 is reached
        (lambda t, x: x**-0.5, 1.0),
        (lambda t, x: 1.0 / x**2, 1.0),  # too strong for the limit
        (lambda t, x: 1.0 / x, lambda t, x: x),  # no noise there
        (lambda t, x: 0.5 - x, lambda t, x: np.sqrt(x)),  # square root: finite drift, a natural end
    ],
)
def test_what_is_no_entrance_is_refused(drift, diffusion):
    problem = KolmogorovProblem(
        SDE(drift, diffusion=diffusion, dim=1), lambda x: x[..., 0], 1.0, Box(0.0, 1.0, [("entrance", "absorbing")])
    )
    with pytest.raises(kolmo.InputError, match=r"boundary\[0\]\[0\].*entrance"):
        discretize(problem, 21).matrix(0.0)


@pytest.mark.parametrize("word", ["reflecting", "natural", "open"])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_singular_data_at_another_face_name_it(word):
    problem = KolmogorovProblem(
        SDE(lambda t, x: 1.0 / x, diffusion=1.0 if word != "natural" else lambda t, x: x, dim=1),
        lambda x: x[..., 0],
        1.0,
        Box(0.0, 1.0, [(word, "open")]),
    )
    with pytest.raises(kolmo.InputError, match=f"low '{word}' face of axis 0.*entrance.*small positive"):
        solve(problem, grid=21, steps=4, scheme="central2")


@pytest.mark.parametrize("seed", range(4))
def test_coefficients_are_not_read_on_absorbing_faces(seed):
    """Exit of a Bessel process from a shell, with everything infinite at the sphere that absorbs, and of −x^(−p)."""
    rng = np.random.default_rng(40 + seed)
    a, b = rng.uniform(0.3, 1.0), rng.uniform(1.5, 3.0)
    inner = rng.uniform(1.1, 1.4)
    delta = rng.uniform(2.2, 5.0)

    def checked(f):
        def read(t, x):
            assert ((x > a) & (x < b)).all()
            return f(t, x)

        return read

    sde = SDE(checked(lambda t, x: 0.5 * (delta - 1.0) / x), diffusion=checked(lambda t, x: 1.0 + 0.0 * x), dim=1)
    kolmogorov = KolmogorovProblem(
        sde, None, None, Box(a, b, [("absorbing", kolmo.Absorbing(1.0))]),
        killing=checked(lambda t, x: 0.0 * x[..., 0]), source=checked(lambda t, x: 0.0 * x[..., 0]),
    )  # fmt: skip
    scale = lambda x: -(x ** (2.0 - delta))  # noqa: E731
    exact = (scale(inner) - scale(a)) / (scale(b) - scale(a))
    for scheme in SCHEMES:
        assert abs(solve(kolmogorov, grid=81, scheme=scheme)(inner) - exact) < (5e-3 if scheme == "monotone" else 1e-3)


@pytest.mark.parametrize("p", [0.5, 0.9])
@pytest.mark.filterwarnings("error")
def test_mean_exit_time_with_a_drift_that_is_infinite_on_the_wall(p):
    """dX = −X^(−p) dt + dW on (0, 1), absorbed at both ends, against quadrature of scale and speed."""
    from scipy.integrate import quad

    s = lambda x: np.exp(2.0 * x ** (1.0 - p) / (1.0 - p))  # noqa: E731
    S = lambda a, b: quad(s, a, b)[0]  # noqa: E731
    x0, whole = 0.4, S(0.0, 1.0)
    up = quad(lambda y: 2.0 * S(x0, 1.0) * S(0.0, y) / whole / s(y), 0.0, x0)[0]
    exact = up + quad(lambda y: 2.0 * S(0.0, x0) * S(y, 1.0) / whole / s(y), x0, 1.0)[0]
    problem = KolmogorovProblem(
        SDE(lambda t, x: -(x**-p), diffusion=1.0, dim=1), None, None, Box(0.0, 1.0, "absorbing"), source=1.0
    )
    for scheme in SCHEMES:
        assert abs(solve(problem, grid=641, scheme=scheme)(x0) - exact) < 1e-2 * exact


def test_an_absorbing_end_that_is_never_reached_says_so():
    problem = KolmogorovProblem(
        SDE(lambda t, x: 1.0 / x, diffusion=1.0, dim=1), lambda x: x[..., 0], 1.0, Box(0.0, 1.0, "absorbing")
    )
    with pytest.raises(kolmo.InputError, match=r"boundary\[0\]\[0\].*never reached.*entrance"):
        solve(problem, grid=21, steps=4)


@pytest.mark.parametrize("seed", range(3))
def test_entrance_by_tolerance(seed):
    """Box, grid and steps chosen, points on the end itself among those asked for."""
    bessel = Bessel(np.random.default_rng(50 + seed))
    x = np.array([0.0, 0.02, 0.9])
    sol = solve(bessel.problem(np.inf), at=x, rtol=1e-4, atol=1e-7)
    assert sol.status == "converged"
    assert np.abs(sol(x) - bessel.exact(x)).max() < 1e-4 * np.abs(bessel.exact(x)).max()


def test_fipy_refuses_an_entrance():
    fipy = pytest.importorskip("kolmo.fipy")
    problem = Bessel(np.random.default_rng(0)).problem(5.0)
    with pytest.raises(kolmo.InputError, match="entrance"):
        fipy.solve(problem, shape=20, steps=4)
