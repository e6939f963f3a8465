"""The generator matrix: row sums, signs, and the discrete maximum principle."""

import itertools

import numpy as np
import pytest

from kolmo import SDE, Box, Discretization, KolmogorovProblem, discretize
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.selling import obtuse_superbase, offsets, weights
from kolmo.testing import generator_signs, manufactured, maximum_principle

FACES = ["open", "natural", "reflecting", "entrance", "absorbing", "robin", "periodic"]
OTHERS = [("periodic", "periodic"), ("reflecting", "absorbing")]
NODES = {1: 21, 2: 11, 3: 9}


def case_of(dim, word, autonomous=True):
    return manufactured([(word, word), *OTHERS[: dim - 1]], autonomous=autonomous, mixed=0.6 if dim < 3 else 0.4)


@pytest.mark.parametrize(("dim", "word", "scheme"), [*itertools.product((1, 2, 3), FACES, SCHEMES)])
def test_rows_sum_to_minus_the_killing_rate(dim, word, scheme):
    table = generator_signs(case_of(dim, word).problem, NODES[dim], scheme, t=0.1)
    assert abs(table.rows[0][1]) < 1e-13, table
    assert abs(table.rows[1][1]) < 1e-13, table


@pytest.mark.parametrize(("dim", "word"), [*itertools.product((1, 2, 3), FACES)])
def test_monotone_scheme_never_has_a_negative_neighbour(dim, word):
    problem = case_of(dim, word, autonomous=False).problem
    for t in (0.0, 0.17):
        assert generator_signs(problem, NODES[dim], "monotone", t).rows[2][1] >= -1e-14


@pytest.mark.parametrize("scheme", ["central2", "central4", "central6"])
def test_central_schemes_are_not_monotone(scheme):
    """What the table reports is not always zero."""
    assert generator_signs(case_of(2, "periodic").problem, 11, scheme).rows[2][1] < -1e-3


@pytest.mark.parametrize("correlation", [0.99, -0.999])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_monotone_signs_with_strong_correlation_drift_and_stretched_cells(correlation, scale):
    S = np.array([[1.0, correlation * scale], [correlation * scale, scale**2]])
    sde = SDE(lambda t, x: 50.0 * np.stack([np.sin(3 * x[..., 1]), -x[..., 0]], -1), covariance=S, dim=2)
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, Box([0, 0], [1, 1], ["reflecting", "absorbing"]))
    assert generator_signs(problem, (13, 9), "monotone").rows[2][1] >= -1e-14


def test_generator_on_known_polynomials():
    """Q applied to x₀², x₀x₁ gives 2b₀x₀ + Σ₀₀ and b₀x₁ + b₁x₀ + Σ₀₁ inside, whatever the scheme's order."""
    S, b = np.array([[0.8, 0.3], [0.3, 0.5]]), np.array([0.0, 0.0])
    problem = KolmogorovProblem(SDE(b, covariance=S, dim=2), lambda x: x[..., 0], 1.0, Box([0, 0], [1, 1]))
    for scheme in SCHEMES:
        gen = discretize(problem, 15, scheme)
        x = gen.grid.points
        inner = ((x > 0.3) & (x < 0.7)).all(1)
        Q = gen.matrix(0.0)
        assert np.allclose((Q @ x[:, 0] ** 2)[inner], 0.8), scheme
        assert np.allclose((Q @ (x[:, 0] * x[:, 1]))[inner], 0.3), scheme


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_selling_decomposition(dim, rng):
    """Σ λ_k e_k e_kᵀ gives the matrix back with λ ≥ 0, also for ill-conditioned and degenerate ones."""
    roots = rng.standard_normal((200, dim, dim)) * np.array([1.0, 0.05, 0.3])[:dim]
    roots[:20, :, 0] = 0.0
    S = roots @ np.swapaxes(roots, -1, -2)
    V = obtuse_superbase(S)
    lam, e = weights(S, V), offsets(V)
    again = np.einsum("nk,nki,nkj->nij", lam, e, e)
    size = np.trace(S, axis1=1, axis2=2)
    assert np.allclose(again, S, atol=1e-12 * size.max())
    assert (lam.min(1) >= -2e-6 * size).all()


@pytest.mark.parametrize(("dim", "word"), [*itertools.product((1, 2, 3), FACES)])
def test_maximum_principle_with_any_implicit_step(dim, word):
    problem = case_of(dim, word).problem
    table = maximum_principle(problem, grid=NODES[dim], steps=2, scheme="monotone", stepper="implicit-euler")
    assert table.worst("overshoot") < 1e-12, table


@pytest.mark.parametrize(("dim", "word"), [*itertools.product((1, 2, 3), FACES)])
def test_maximum_principle_with_explicit_steps_within_their_bound(dim, word):
    """rk4 is positive for dt times the largest leaving rate at most one."""
    problem = case_of(dim, word).problem
    assert maximum_principle(problem, explicit(problem, NODES[dim], 1.0), trials=2).worst("overshoot") < 1e-12


def explicit(problem, nodes, bound, scheme="monotone"):
    """Three explicit steps of the given length times the largest leaving rate."""
    generator = discretize(problem, nodes, scheme)
    dt = -bound / generator.matrix(0.0).diagonal().min()
    return Discretization(generator.grid, tuple(dt * np.arange(4)), scheme, "rk4")


def test_maximum_principle_fails_elsewhere():
    """The check can fail: high order in space, or explicit steps beyond the bound."""
    problem = case_of(1, "periodic").problem
    assert maximum_principle(problem, explicit(problem, 21, 0.5, "central6")).worst("overshoot") > 1e-4
    assert maximum_principle(problem, explicit(problem, 21, 2.0)).worst("overshoot") > 1e-4
