"""Control sets: the pointwise minimum against brute force."""

import numpy as np
import pytest
import torch

from kolmo import control
from kolmo.errors import InputError


def brute(H, lo, hi, count=81):
    """Least value over a fine lattice of the box."""
    axes = [np.linspace(a, b, count) for a, b in zip(lo, hi, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(lo))
    return np.min([H(p) for p in points], axis=0)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_quadratic_is_minimised_over_a_box_whatever_its_curvature(m, seed):
    rng = np.random.default_rng(seed)
    n = 40
    lo, hi = -rng.uniform(0.2, 1.5, m), rng.uniform(0.2, 1.5, m)
    box = control.BoxSet(lo, hi)
    h = rng.normal(size=(n, m))
    H = rng.normal(size=(n, m, m))
    H = H + np.swapaxes(H, 1, 2)
    # m = 1 copes with every sign of curvature; in more dimensions definite and concave ones are exact
    if m > 1:
        sign = rng.choice([-1.0, 1.0], n)
        H = sign[:, None, None] * (H @ np.swapaxes(H, 1, 2))
    s, found = box.minimize_quadratic(h, H, np.zeros((n, m)), np.zeros(m), np.ones(m))
    value = (h * s).sum(-1) + 0.5 * np.einsum("ni,nij,nj->n", s, H, s)
    least = brute(lambda p: h @ p + 0.5 * np.einsum("i,nij,j->n", p, H, p), lo, hi)
    assert found.all()
    assert ((s >= lo - 1e-12) & (s <= hi + 1e-12)).all()
    assert (value <= least + 1e-9).all()


def test_newton_finds_the_minimum_of_a_smooth_function_in_an_interval():
    c = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    interval = control.Interval(-1.0, 1.5)

    def H(a):
        return 0.25 * a[:, 0] ** 4 + 0.5 * a[:, 0] ** 2 - c * a[:, 0]

    choice = interval.minimize(H, torch.zeros(9, 1, dtype=torch.float64))
    exact = []
    for value in c.tolist():
        roots = np.roots([1.0, 0.0, 1.0, -value])
        exact.append(np.clip(roots[np.abs(roots.imag) < 1e-9].real[0], -1.0, 1.5))
    np.testing.assert_allclose(choice.a[:, 0], exact, atol=1e-8)


def test_unbounded_says_where_there_is_no_minimum():
    curvature = np.array([1.0, -1.0, 0.0])[:, None, None]
    s, found = control.Unbounded(1).minimize_quadratic(
        np.ones((3, 1)), curvature, np.zeros((3, 1)), np.zeros(1), np.ones(1)
    )
    assert found.tolist() == [True, False, False]
    assert s[0, 0] == -1.0
    bend = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    choice = control.Unbounded(1).minimize(
        lambda a: a[:, 0] + 0.5 * bend * a[:, 0] ** 2, torch.zeros(3, 1, dtype=torch.float64)
    )
    assert choice.found.tolist() == [True, False, False]


def test_finite_takes_the_best_and_projects_to_the_nearest():
    finite = control.Finite([[-1.0, 0.0], [2.0, 1.0], [0.5, 0.5]])
    target = torch.tensor([[2.1, 0.9], [-3.0, 0.0]], dtype=torch.float64)
    choice = finite.minimize(lambda a: ((a - target) ** 2).sum(-1), torch.zeros(2, 2, dtype=torch.float64))
    assert choice.a.tolist() == [[2.0, 1.0], [-1.0, 0.0]]
    assert finite.project(np.array([0.4, 0.4])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: control.Finite([]), "values"),
        (lambda: control.Interval(1.0, 0.0), "lo, hi"),
        (lambda: control.Interval(0.0, np.inf), "lo, hi"),
        (lambda: control.BoxSet([0.0, 0.0], [1.0]), "lo, hi"),
        (lambda: control.Unbounded(0), "m"),
    ],
)
def test_bad_sets_are_refused(make, argument):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.argument == argument
