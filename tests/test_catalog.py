"""The catalogue's exact answers: they satisfy the equation, its terminal data and faces, and known numbers."""

import itertools
import math

import numpy as np
import pytest

from kolmo import catalog
from kolmo.errors import InputError
from kolmo.problem.faces import Absorbing, Reflecting, Robin

VARIANTS = {
    **{name: (name, {}) for name in catalog.CASES},
    **{f"ou_{t}": ("ornstein_uhlenbeck", {"terminal": t}) for t in catalog.GAUSSIAN},
    "put": ("geometric_brownian_motion", {"payoff": "put"}),
    "digital": ("geometric_brownian_motion", {"payoff": "digital", "dividend": 0.02}),
    "linear_1d": ("linear_sde", {"dim": 1}),
    "linear_quadratic": ("linear_sde", {"dim": 2, "terminal": "quadratic"}),
    "reflected_cos": ("reflected_brownian_motion", {"kind": "cos", "upper": 2.0}),
    "double_well_square": ("double_well", {"terminal": "square", "sigma": 0.7, "horizon": 2.0}),
    "manufactured_1d": ("manufactured", {"dim": 1}),
    "manufactured_3d": ("manufactured", {"dim": 3}),
    "wright_fisher_traps": ("wright_fisher", {"mutation": 0.0}),
}

# Fourth-order central differences of the first and second derivative.
OFFSETS = np.arange(-2, 3)
FIRST = np.array([1.0, -8.0, 0.0, 8.0, -1.0]) / 12.0
SECOND = np.array([-1.0, 16.0, -30.0, 16.0, -1.0]) / 12.0


def make(key):
    name, options = VARIANTS[key]
    return catalog.CASES[name](**options)


def inner_points(case):
    """The case's points, away from the faces."""
    low, high = np.array(case.problem.box.lower), np.array(case.problem.box.upper)
    margin = 0.02 * np.where(np.isfinite(high - low), high - low, 1.0)
    inside = ((case.points > low + 1e-2 * margin) & (case.points < high - 1e-2 * margin)).all(-1)
    return np.clip(case.points[inside], low + margin, high - margin) if not inside.all() else case.points


def residual(case, t, x):
    """∂_t u + b·∇u + ½Σ:∇²u − cu + g by differences of the exact answer, and the size of its terms."""
    problem, d = case.problem, case.problem.dim
    h = 2e-3 * np.maximum(0.3, np.abs(x)) * (0.05 if case.name in ("vasicek_bond", "cir_bond") else 1.0)

    def u(s, y):
        value = case.exact(s, y)
        return value if value.ndim == 2 else value[:, None]

    def moved(axes_offsets):
        y = x.copy()
        for i, o in axes_offsets:
            y[:, i] += o * h[:, i]
        return u(t, y)

    terms = []
    if not problem.stationary:
        dt = 1e-3 * problem.horizon
        terms.append(sum(w * u(t + o * dt, x) for o, w in zip(OFFSETS, FIRST, strict=True)) / dt)
    b, S = problem.sde.drift(t, x), problem.sde.covariance(t, x)
    for i in range(d):
        slope = sum(w * moved([(i, o)]) for o, w in zip(OFFSETS, FIRST, strict=True)) / h[:, i : i + 1]
        bend = sum(w * moved([(i, o)]) for o, w in zip(OFFSETS, SECOND, strict=True)) / h[:, i : i + 1] ** 2
        terms += [b[:, i : i + 1] * slope, 0.5 * S[:, i, i, None] * bend]
    for i, j in itertools.combinations(range(d), 2):
        mixed = sum(
            v * w * moved([(i, o), (j, p)])
            for o, v in zip(OFFSETS, FIRST, strict=True)
            for p, w in zip(OFFSETS, FIRST, strict=True)
        )
        terms.append(S[:, i, j, None] * mixed / (h[:, i] * h[:, j])[:, None])
    terms.append(-problem.rate(t, x)[:, None] * u(t, x))
    g = problem.running(t, x)
    terms.append(g if g.ndim == 2 else g[:, None])
    return np.abs(sum(terms)), sum(np.abs(term) for term in terms) + np.abs(u(t, x))


@pytest.mark.parametrize("key", VARIANTS)
def test_exact_answers_satisfy_the_equation(key):
    case = make(key)
    x = inner_points(case)
    horizon = case.problem.horizon or 1.0
    for t in (0.11 * horizon, 0.6 * horizon):
        gap, size = residual(case, t, x)
        assert (gap <= 1e-6 * size.max()).all(), (t, gap / size.max())


@pytest.mark.parametrize("key", [k for k in VARIANTS if not k.startswith("double_well")])
def test_exact_answers_reach_the_terminal_data(key):
    case = make(key)
    if case.problem.stationary:
        return
    x = inner_points(case) + 1e-3  # not on a jump
    end = case.problem.horizon * (1.0 - 1e-13)
    wanted = case.problem.final(x)
    assert np.allclose(case.exact(end, x), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max() + 1e-9)


@pytest.mark.parametrize("key", VARIANTS)
def test_exact_answers_meet_their_faces(key):
    case = make(key)
    problem, t = case.problem, 0.3 * (case.problem.horizon or 1.0)
    for axis, side in itertools.product(range(problem.dim), (0, 1)):
        face = problem.box.faces[axis][side]
        if not isinstance(face, Absorbing | Reflecting | Robin):
            continue
        wall = case.points.copy()
        wall[:, axis] = (problem.box.lower, problem.box.upper)[side][axis]
        value = case.exact(t, wall)
        inward, h = (1.0 if side == 0 else -1.0), 1e-3
        steps = [case.exact(t, wall + inward * k * h * np.eye(problem.dim)[axis]) for k in range(1, 5)]
        slope = (-25 * value + 48 * steps[0] - 36 * steps[1] + 16 * steps[2] - 3 * steps[3]) / (12 * h)
        if isinstance(face, Absorbing):
            assert np.allclose(value, face.value, atol=1e-9)
        elif isinstance(face, Reflecting):
            assert np.allclose(slope, 0.0, atol=1e-7)
        else:
            normal = -0.5 * problem.sde.covariance(t, wall)[:, axis, axis] * slope
            assert np.allclose(normal + face.kappa * value, face.value, atol=1e-7)


# Values from independent references (two methods each, agreeing to the digits given).
KNOWN = [
    (
        catalog.ornstein_uhlenbeck("cubic"),
        [-1.3, -0.4, 0.0, 0.55, 1.7],
        [0.22547524050312834, -0.11275901166292199, -0.2575710165682389, -0.42473488951273614, -0.5425269778422194],
    ),
    (
        catalog.ornstein_uhlenbeck("indicator", kappa=1.0, mu=0.0, sigma=1.0),
        [-1.3, 0.0, 1.7],
        [0.13402575130486155, 0.35189229824783963, 0.7159750300639042],
    ),
    (catalog.harmonic_killing(), [-1.2, 0.0, 2.0], [0.24529831437148705, 0.6519938917982901, 0.04314603103027901]),
    (catalog.vasicek_bond(), [-0.02, 0.05, 0.12], [0.9719349017778856, 0.906376492230607, 0.8452400918677985]),
    (catalog.cir_bond(), [0.0, 0.04, 0.3], [0.9715294741011021, 0.9252582085579525, 0.6737646566721549]),
    (
        catalog.geometric_brownian_motion(),
        [60.0, 100.0, 150.0],
        [0.05443673007042016, 10.450583572185565, 54.970140137999195],
    ),
    (
        catalog.geometric_brownian_motion("digital", strike=1.0, rate=0.04, sigma=0.25, dividend=0.01),
        [0.6, 1.0, 1.2],
        [0.01947057509223107, 0.4784782299123333, 0.7355371443385207],
    ),
    (
        catalog.down_and_out_call(),
        [86.0, 92.0, 100.0, 120.0],
        [0.500518104016443, 3.4855604307035257, 8.01293259969572, 23.589653997212594],
    ),
    (
        catalog.margrabe(),
        [[100.0, 100.0], [110.0, 90.0], [80.0, 95.0]],
        [10.524315781125253, 23.385529467433713, 3.569191999987577],
    ),
    (
        catalog.heat(),
        [[0.0, 0.0], [0.6, 0.3], [-0.5, 0.4]],
        [0.6630846334424039, 0.5419040461871085, 0.4618613887450758],
    ),
    (
        catalog.linear_sde(),
        [[0.0, 0.0, 0.0], [0.5, -0.5, 0.3], [-0.6, 0.2, 0.7]],
        [0.7568695807218719, 0.7030720998247827, 0.6538159854484757],
    ),
    (catalog.langevin(), [[0.0, 0.0], [0.3, 1.0]], [0.7665823356813319, 0.5664318122968522]),
    (catalog.rotation(), [[0.5, 0.0], [-0.2, -0.6]], [0.016296611288316866, 0.7009438677299161]),
    (
        catalog.reflected_brownian_motion(),
        [0.0, 0.2, 0.5, 0.9, 1.0],
        [0.4077824917704615, 0.4253945509724926, 0.5, 0.5877040353743566, 0.5922175082295386],
    ),
    (
        catalog.reflected_ornstein_uhlenbeck(),
        [-1.0, -0.4, 0.3, 1.0],
        [-0.14858467306223816, -0.391037124131465, -0.6633232909274862, -0.7770002566696238],
    ),
    (
        catalog.survival(),
        [0.1, 0.4, 0.75, 1.2],
        [0.14315850293348648, 0.4438842772789409, 0.5103024933850618, 0.24491797893674216],
    ),
    (
        catalog.exit_right(),
        [0.1, 0.35, 0.6, 0.95],
        [0.1385576517678109, 0.43691086098119014, 0.6852881709932407, 0.9661949517528738],
    ),
    (
        catalog.mean_exit_time(),
        [-0.5, 0.0, 0.7, 1.2],
        [4.2719658869502135, 5.523442453346298, 5.816906046268103, 4.35509199767867],
    ),
    (
        catalog.committor(),
        [-0.6, -0.1, 0.2, 0.8],
        [0.07742512006416763, 0.39970940348745426, 0.6930283384139218, 0.9697691402209301],
    ),
    (
        catalog.mean_exit_time_rectangle(),
        [[0.5, 0.5], [0.2, 0.7], [0.9, 0.1]],
        [0.14734270656302763, 0.08668237460831855, 0.026142906873481593],
    ),
    (
        catalog.double_well("square", sigma=0.7, horizon=2.0),
        [-1.5, -0.2, 0.6],
        [0.8690568519984498, 0.778497495806482, 0.8169531085711832],
    ),
    (
        catalog.double_well(),
        [-1.2, -0.5, 0.3, 1.0],
        [-0.7350159783712039, -0.5859870724708913, 0.4185692419323087, 0.7221558723906517],
    ),
]


@pytest.mark.parametrize(("case", "x", "values"), KNOWN, ids=lambda v: v.name if isinstance(v, catalog.Case) else "")
def test_known_values(case, x, values):
    assert np.allclose(case.exact(0.0, x), values, rtol=2e-9, atol=1e-10)


def test_known_third_moment_of_wright_fisher():
    case = catalog.wright_fisher(mutation=0.0)
    wanted = [0.03736941540526707, 0.14871879929233123, 0.31378051107822147, 0.7495634425391036]
    assert np.allclose(case.exact(0.0, [0.1, 0.3, 0.5, 0.85])[:, 2], wanted, rtol=1e-12)


def test_survival_of_elastic_brownian_motion_at_the_wall():
    """At x = 0: exp(h²s²/2)·erfc(hs/√2), from the Laplace transform of the law of the local time |N(0, s²)|."""
    kappa, sigma, horizon = 0.9, 1.3, 0.8
    case = catalog.elastic_brownian_motion(kappa, sigma, horizon)
    h, s = 2.0 * kappa / sigma**2, sigma * math.sqrt(horizon)
    assert math.isclose(case.exact(0.0, 0.0), math.exp(0.5 * (h * s) ** 2) * math.erfc(h * s / math.sqrt(2.0)))


def test_layers_of_equal_coefficients_are_one_process():
    plain = catalog.ornstein_uhlenbeck("cubic", 1.2, 0.3, 0.8, 1.0)
    layered = catalog.layered_ornstein_uhlenbeck("cubic", [1.2] * 3, [0.3] * 3, [0.8] * 3, 1.0)
    assert np.allclose(plain.exact(0.4, plain.points), layered.exact(0.4, plain.points), rtol=1e-13)
    assert layered.problem.sde.breakpoints == pytest.approx((1 / 3, 2 / 3))


def test_small_and_large_times_of_reflected_brownian_motion_agree():
    """The two representations meet: images below, Fourier series above the switch."""
    x = np.linspace(0.0, 1.0, 11)
    below, above = (catalog.reflected_brownian_motion(horizon=s).exact(0.0, x) for s in (0.25 - 1e-12, 0.25))
    assert np.allclose(below, above, atol=1e-11)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: catalog.ornstein_uhlenbeck("gaus"), "terminal"),
        (lambda: catalog.geometric_brownian_motion("straddle"), "payoff"),
        (lambda: catalog.down_and_out_call(barrier=120.0), "barrier"),
        (lambda: catalog.manufactured(dim=4), "dim"),
        (lambda: catalog.linear_sde(dim=0), "dim"),
        (lambda: catalog.exit_right(mu=0.0), "mu"),
        (lambda: catalog.CASES["heath"], "case"),
    ],
)
def test_bad_options_are_named(call, argument):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.argument == argument


def test_problems_take_tensors_too():
    torch = pytest.importorskip("torch")
    for name in catalog.CASES:
        problem, x = catalog.CASES[name]().problem, catalog.CASES[name]().points
        y = torch.as_tensor(x)
        assert np.allclose(problem.sde.drift(0.1, y).numpy(), problem.sde.drift(0.1, x))
        assert np.allclose(problem.sde.covariance(0.1, y).numpy(), problem.sde.covariance(0.1, x))
        assert np.allclose(problem.running(0.1, y).numpy(), problem.running(0.1, x))
        if problem.terminal is not None:
            assert np.allclose(problem.final(y).numpy(), problem.final(x))
