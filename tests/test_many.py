"""Many problems at once: as good as one by one, each certified, and the odd one out noticed."""

import numpy as np
import pytest

import kolmo
from kolmo.many.ensemble import Ensemble
from kolmo.refine.plan import search

TOL = 1e-4
AT = np.linspace(-1.0, 1.0, 5)


def bump(kappa, sigma, mean, precision, T, extra=None, box=None):
    """OU with a Gaussian bump, u known."""
    sde = kolmo.SDE(lambda t, x: -kappa * x, diffusion=sigma, dim=1)

    def data(x):
        return np.exp(-0.5 * precision * (x[..., 0] - mean) ** 2) + (0.0 if extra is None else extra(x[..., 0]))

    return kolmo.KolmogorovProblem(sde, data, T, box)


def exact(kappa, sigma, mean, precision, T, at=AT):
    S = sigma**2 * -np.expm1(-2 * kappa * T) / (2 * kappa)
    r = at * np.exp(-kappa * T) - mean
    return np.exp(-0.5 * precision * r**2 / (1 + precision * S)) / np.sqrt(1 + precision * S)


def drawn(rng, count):
    low, high = [0.4, 0.5, -0.4, 0.5, 0.4], [2.0, 1.3, 0.4, 8.0, 2.5]
    return [
        tuple(
            np.exp(rng.uniform(np.log(a), np.log(b))) if a > 0 else rng.uniform(a, b)
            for a, b in zip(low, high, strict=True)
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_errors_are_within_estimates(seed):
    rng = np.random.default_rng(seed)
    parameters = drawn(rng, 60)
    found = kolmo.solve_many([bump(*p) for p in parameters], at=AT, rtol=0.0, atol=TOL)
    errors = np.abs(found.values - [exact(*p) for p in parameters])
    assert set(found.statuses) == {"converged"}
    assert (errors <= found.error_estimate).all()
    assert (found.error_estimate <= TOL).all()
    assert found.stats["together"] > 50


def test_it_is_what_solve_gives_with_the_same_recipe():
    rng = np.random.default_rng(4)
    problems = [bump(*p) for p in drawn(rng, 20)]
    found = kolmo.solve_many(problems, at=AT, rtol=0.0, atol=TOL)
    together = [i for i in range(20) if i not in found.alone]
    assert len(together) > 10
    for i in together[::4]:
        alone = kolmo.solve(problems[i], discretization=found[i].discretization)
        assert np.abs(alone.values - found[i].values).max() < 1e-11
        assert np.abs(alone(AT) - found.values[i]).max() < 1e-11


def test_neighbours_in_a_block_do_not_matter():
    rng = np.random.default_rng(5)
    problems = [bump(*p) for p in drawn(rng, 40)]
    first = kolmo.solve_many(problems, at=AT, rtol=0.0, atol=TOL)
    again = kolmo.solve_many(problems[3:31:2], at=AT, rtol=0.0, atol=TOL, plan=first)
    assert np.array_equal(again.values, first.values[3:31:2])


def wall(rng):
    kappa, s, c, g = rng.uniform(0.3, 2.0), rng.uniform(0.4, 1.0), rng.uniform(0.0, 1.0), rng.uniform(-1.0, 1.0)
    sde = kolmo.SDE(lambda t, x: -kappa * x + 0.2 * np.sin(x), diffusion=lambda t, x: s * (1.0 + 0.2 * np.cos(x)))
    return kolmo.KolmogorovProblem(
        sde,
        lambda x: np.cos(2.0 * x[..., 0] + g),
        rng.uniform(0.3, 1.0),
        kolmo.Box(-1.5, 1.5, "reflecting"),
        killing=lambda t, x: c * x[..., 0] ** 2,
        source=g,
    )


def barriers(rng):
    v, s, paid = rng.uniform(-1.0, 1.0), rng.uniform(0.5, 1.2), rng.uniform(0.0, 1.0)
    box = kolmo.Box(-1.5, 1.5, [(kolmo.Absorbing(paid), "absorbing")])

    def data(x):
        return paid * (1.5 - x[..., 0]) / 3.0 + np.cos(np.pi * x[..., 0] / 3.0) ** 2

    return kolmo.KolmogorovProblem(kolmo.SDE(v, diffusion=s, dim=1), data, rng.uniform(0.3, 1.0), box)


def well(rng):
    a, s = rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.0)
    sde = kolmo.SDE(lambda t, x: a * (x - x**3), diffusion=s, dim=1)
    return kolmo.KolmogorovProblem(sde, lambda x: np.tanh(x[..., 0]), rng.uniform(0.3, 1.5))


def square_root(rng):
    kappa, theta, s = rng.uniform(0.5, 2.0), rng.uniform(0.5, 1.5), rng.uniform(0.2, 0.6)
    sde = kolmo.SDE(lambda t, x: kappa * (theta - x), covariance=lambda t, x: s**2 * np.maximum(x[..., 0], 0.0))
    box = kolmo.Box(0.0, np.inf, [("natural", "open")])
    return kolmo.KolmogorovProblem(sde, lambda x: np.exp(-x[..., 0]), rng.uniform(0.3, 1.5), box)


@pytest.mark.parametrize(("make", "least"), [(wall, 12), (barriers, 0), (well, 12), (square_root, 12)])
def test_kinds_of_problems(make, least):
    rng = np.random.default_rng(6)
    problems = [make(rng) for _ in range(16)]
    at = [0.2, 0.7, 1.1]
    found = kolmo.solve_many(problems, at=at, rtol=0.0, atol=TOL)
    assert found.stats["together"] >= least, found
    for i in range(0, 16, 3):
        tight = kolmo.solve(problems[i], at=at, rtol=0.0, atol=1e-7)
        assert (np.abs(found.values[i] - tight(at)) <= found.error_estimate[i] + 1e-7).all()


def narrow(rng, p):
    place, width = rng.uniform(-1.0, 1.0), 10.0 ** rng.uniform(-2.7, -1.5)
    odd = bump(*p, extra=lambda x: 0.5 / width * 0.04 * np.exp(-0.5 * ((x - place) / width) ** 2))
    # a Gaussian of the same area, 1e-1 or so of the answer
    height, precision = 0.5 / width * 0.04, width**-2.0
    return odd, exact(*p) + height * exact(p[0], p[1], place, precision, p[4])


def far(rng, p):
    p = (p[0], 8.0, *p[2:])
    return bump(*p), exact(*p)


def away(rng, p):
    _, sigma, mean, precision, T = p
    goal = rng.choice([-1.0, 1.0]) * 60.0
    sde = kolmo.SDE(lambda t, x: goal + 0.0 * x, diffusion=sigma, dim=1)

    def data(x):
        return np.exp(-0.5 * precision * (x[..., 0] - mean - goal * T) ** 2)

    S = sigma**2 * T
    u = np.exp(-0.5 * precision * (AT - mean) ** 2 / (1 + precision * S)) / np.sqrt(1 + precision * S)
    return kolmo.KolmogorovProblem(sde, data, T), u


def jump(rng, p):
    kappa, sigma, mean, precision, T = p
    place, size = rng.uniform(-1.0, 1.0), rng.uniform(0.3, 1.5)
    sde = kolmo.SDE(lambda t, x: -kappa * x + size * (x > place), diffusion=sigma, dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: np.exp(-0.5 * precision * (x[..., 0] - mean) ** 2), T)
    return problem, None


def step(rng, p):
    place = rng.uniform(-1.0, 1.0)
    sde = kolmo.SDE(lambda t, x: -p[0] * x, diffusion=p[1], dim=1)
    from scipy.special import ndtr

    S = p[1] ** 2 * -np.expm1(-2 * p[0] * p[4]) / (2 * p[0])
    return kolmo.KolmogorovProblem(sde, lambda x: 1.0 * (x[..., 0] > place), p[4]), ndtr(
        (AT * np.exp(-p[0] * p[4]) - place) / np.sqrt(S)
    )


def timed(rng, p):
    rate = rng.uniform(1.0, 3.0)
    sde = kolmo.SDE(lambda t, x: rate * t + 0.0 * x, diffusion=p[1], dim=1)
    shift, S = 0.5 * rate * p[4] ** 2, p[1] ** 2 * p[4]
    u = np.exp(-0.5 * p[3] * (AT + shift - p[2]) ** 2 / (1 + p[3] * S)) / np.sqrt(1 + p[3] * S)
    return kolmo.KolmogorovProblem(sde, lambda x: np.exp(-0.5 * p[3] * (x[..., 0] - p[2]) ** 2), p[4]), u


@pytest.mark.parametrize("odd", [narrow, far, away, jump, step, timed])
def test_the_odd_one_out_is_noticed(odd):
    rng = np.random.default_rng(7)
    parameters = drawn(rng, 24)
    problems, answers = [bump(*p) for p in parameters], [exact(*p) for p in parameters]
    for place in (5, 17):
        problems[place], answers[place] = odd(rng, parameters[place])
        if answers[place] is None:
            answers[place] = kolmo.solve(problems[place], at=AT, rtol=0.0, atol=1e-7)(AT)
    found = kolmo.solve_many(problems, at=AT, rtol=0.0, atol=TOL)
    errors = np.abs(found.values - answers)
    assert (errors <= found.error_estimate).all(), errors.max(1)
    assert (found.error_estimate <= TOL).all()


def test_what_lies_between_the_nodes_is_seen_where_all_levels_agree():
    """A plan for a smooth problem says of one with a bump between its nodes that it does not serve it."""
    p = (1.0, 0.8, 0.1, 4.0, 1.0)
    ensemble = Ensemble(bump(*p), search(bump(*p), at=AT, rtol=0.0, atol=TOL).family, AT[:, None])
    nodes = ensemble.levels[-1].places[:, 0]
    place = 0.5 * (nodes[45] + nodes[46])
    hidden = bump(*p, extra=lambda x: np.exp(-0.5 * ((x - place) / 0.002) ** 2))
    judged = ensemble.judge([bump(*p), hidden], 0.0, TOL)
    assert judged.good.tolist() == [True, False]
    assert np.allclose(judged.values[0], judged.values[1], atol=1e-8)  # no level has met it


def test_where_the_process_goes_is_seen_where_all_levels_agree():
    """Carried out of the box to data of which no level knows: all of them say next to nothing, and agree."""
    p = (1.0, 0.8, 0.1, 4.0, 1.0)
    ensemble = Ensemble(bump(*p), search(bump(*p), at=AT, rtol=0.0, atol=TOL).family, AT[:, None])
    sde = kolmo.SDE(lambda t, x: 60.0 + 0.0 * x, diffusion=0.8, dim=1)
    data = kolmo.KolmogorovProblem(
        sde, lambda x: np.exp(-2.0 * (x[..., 0] - 60.0) ** 2) + 1e-3 * np.exp(-2.0 * x[..., 0] ** 2), 1.0
    )
    judged = ensemble.judge([data], 0.0, TOL)
    assert judged.estimate[0] < TOL
    assert not judged.good[0]
    assert kolmo.solve(data, at=AT, rtol=0.0, atol=TOL)(0.0) > 0.4


def test_other_dimensions_columns_and_stationary_problems_are_solved_alone():
    plane = kolmo.KolmogorovProblem(kolmo.SDE(lambda t, x: -x, 1.0, dim=2), lambda x: np.cos(x[..., 0]), 0.5)
    found = kolmo.solve_many([plane, plane], at=[[0.1, 0.2]], rtol=1e-3)
    assert found.values.shape == (2, 1)
    assert found.stats["alone"] == 2
    two = kolmo.KolmogorovProblem(
        kolmo.SDE(lambda t, x: -x, 1.0, dim=1), lambda x: np.stack([x[..., 0], x[..., 0] ** 2], -1), 0.5
    )
    assert kolmo.solve_many([two] * 5, at=[0.1, 0.2], rtol=1e-3).values.shape == (5, 2, 2)
    with pytest.raises(kolmo.InputError, match="columns"):
        kolmo.solve_many([two, bump(1.0, 0.8, 0.1, 4.0, 1.0)], at=[0.1])
    with pytest.raises(kolmo.InputError, match="problems"):
        kolmo.solve_many([], at=[0.1])


def test_a_plan_serves_again_and_only_its_kind():
    rng = np.random.default_rng(8)
    first = kolmo.solve_many([bump(*p) for p in drawn(rng, 20)], at=AT, rtol=0.0, atol=TOL)
    more = drawn(rng, 20)
    again = kolmo.solve_many([bump(*p) for p in more], at=AT, rtol=0.0, atol=TOL, plan=first)
    assert (np.abs(again.values - [exact(*p) for p in more]) <= again.error_estimate).all()
    assert again.members[0].ensemble is first.members[0].ensemble
    walls = kolmo.solve_many([wall(rng) for _ in range(6)], at=AT, rtol=0.0, atol=TOL, plan=first)
    assert all(m.ensemble is not first.members[0].ensemble for m in walls.members)
