"""Compiled kernels and linear solvers against dense linear algebra."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from kolmo.errors import NotConvergedError
from kolmo.kernels.bspline import average, interpolation
from kolmo.kernels.linear import BandedLU, LineSolver, SparseLU, factorize
from kolmo.kernels.lines import LineOperator
from kolmo.schemes.differences import CUT, FREE, SLOPE, WRAP, differences, stencil_weights

SHAPES = [((13,), 0), ((9, 11), 0), ((9, 11), 1), ((5, 11, 4), 1), ((5, 4, 12), 2), ((12, 3, 4), 0)]


def dense_along(matrix, u, shape, axis):
    field = u.reshape(*shape, -1)
    return np.moveaxis(np.tensordot(matrix, field, ([1], [axis])), 0, axis).reshape(u.shape)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["random", "central6", "periodic"])
def test_line_operators(shape, axis, k, kind, rng):
    """Also stencils that are the same in the middle, which have a path of their own; also transposed and in torch."""
    n = shape[axis]
    if kind == "random":
        matrix = rng.standard_normal((n, n)) * (rng.random((n, n)) < 0.5)
    elif n < 9:
        matrix = np.diag(rng.standard_normal(n))
    else:
        matrix = differences(n, 6, *((WRAP, WRAP) if kind == "periodic" else (FREE, SLOPE))).second.toarray()
    operator = LineOperator(sp.csr_matrix(matrix))
    u = rng.standard_normal((int(np.prod(shape)), k))
    assert np.allclose(operator.apply(u, shape, axis), dense_along(matrix, u, shape, axis), atol=1e-11)
    assert np.allclose(operator.transposed.apply(u, shape, axis), dense_along(matrix.T, u, shape, axis), atol=1e-11)
    import torch

    assert np.allclose(operator.apply(torch.as_tensor(u), shape, axis).numpy(), operator.apply(u, shape, axis))


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("width", [3, 60])
def test_factorizations(width, complex_, rng):
    """Narrow bands by LAPACK, others by SuperLU; both with their transposes, many right-hand sides."""
    n = 150
    matrix = sp.diags(
        [rng.standard_normal(n - abs(o)) for o in (-width, -1, 0, 1, width)], [-width, -1, 0, 1, width]
    ).tocsr()
    matrix = matrix + 4.0 * sp.identity(n) + (0.5j * sp.identity(n) if complex_ else 0.0 * sp.identity(n))
    factors = factorize(matrix)
    assert isinstance(factors, BandedLU if width == 3 else SparseLU)
    b = rng.standard_normal((n, 4))
    assert np.allclose(matrix @ factors.solve(b.astype(matrix.dtype)), b)
    assert np.allclose(matrix.T @ factors.solve(b.astype(matrix.dtype), transposed=True), b)


def test_singular_systems_are_named():
    for n in (8, 300):
        with pytest.raises(NotConvergedError, match="singular"):
            factorize(sp.csr_matrix((n, n)))


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((50,), 0), ((33, 4), 0), ((3, 64), 1)])
def test_line_solver(shape, axis, array, rng):
    """One band matrix per line, solved along any axis, and transposed; in torch long lines are several blocks."""
    n, below, above = shape[axis], 2, 3
    index = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), axis, 0).reshape(n, -1)
    band = rng.standard_normal((n, below + above + 1, index.shape[1]))
    band[:, below] += 9.0
    matrix = np.zeros((index.size, index.size))
    for i in range(n):
        for m in range(below + above + 1):
            if 0 <= i + m - below < n:
                matrix[index[i], index[i + m - below]] = band[i, m]
            else:
                band[i, m] = 0.0
    solver = LineSolver(array(band.copy()), below, shape, axis)
    b = rng.standard_normal((index.size, 2))
    assert np.allclose(matrix @ np.asarray(solver.solve(array(b.copy()))), b)
    assert np.allclose(matrix.T @ np.asarray(solver.solve(array(b.copy()), transposed=True)), b)


@pytest.mark.parametrize("order", [2, 4, 6])
@pytest.mark.parametrize("low", [CUT, FREE, SLOPE, WRAP])
def test_differences_on_polynomials(order, low):
    """Exact up to the degree that the order promises, in the middle and next to ends that keep it."""
    n = 24
    D = differences(n, order, low, WRAP if low == WRAP else FREE)
    x = np.arange(n, dtype=float) / n
    rows = slice(order, n - order) if low in (CUT, WRAP) else slice(0, n)
    for degree in range(order + 1):
        u = x**degree
        slope = degree * x ** max(degree - 1, 0) / n
        bend = degree * (degree - 1) * x ** max(degree - 2, 0) / n**2
        first = D.first @ u + D.first_slope[:, 0] * slope[0]
        second = D.second @ u + D.second_slope[:, 0] * slope[0]
        assert np.allclose(first[rows], slope[rows], atol=1e-12)
        assert np.allclose(second[rows], bend[rows], atol=1e-12)


@pytest.mark.parametrize(("derivative", "width"), [(1, 5), (2, 5), (1, 7), (2, 7)])
def test_stencil_weights_are_the_textbook_ones(derivative, width):
    central = np.arange(width) - width // 2
    known = {
        (1, 5): [1 / 12, -2 / 3, 0, 2 / 3, -1 / 12],
        (2, 5): [-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12],
        (1, 7): [-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60],
        (2, 7): [1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90],
    }
    assert np.allclose(stencil_weights(central.astype(float), derivative)[0], known[derivative, width])


@pytest.mark.parametrize("degree", [3, 5])
def test_spline_average(degree, rng):
    """Interpolates polynomials of its degree exactly, in three dimensions with several columns."""
    axes = [np.linspace(0.0, 1.0, n) for n in (9, 10, 11)]
    x = np.stack(np.meshgrid(*axes, indexing="ij"), -1)

    def f(x):
        return np.stack([x[..., 0] ** degree * x[..., 1] - x[..., 2] ** 2, x[..., 1] + x[..., 2] ** 3], -1)

    c = f(x)
    for axis in range(3):
        c = np.moveaxis(interpolation(np.moveaxis(c, axis, 0), degree), 0, axis)
    points, weights = rng.random((4, 6, 3)), rng.random(4)
    out = np.empty((6, 2))
    average(np.ascontiguousarray(c), np.zeros(3), np.array([8.0, 9.0, 10.0]), np.full(3, degree), points, weights, out)
    assert np.allclose(out, np.einsum("q,qik->ik", weights, f(points)))


def test_other_users_of_numba_are_let_be():
    """Functions made from a text have no module; the listener to compilations sees them too."""
    import numba

    import kolmo.kernels.first_use  # noqa: F401

    space: dict = {}
    exec("def double(x):\n    return 2 * x", {"__name__": None}, space)
    assert numba.njit(space["double"])(3) == 6


@pytest.mark.parametrize("seed", range(6))
def test_coupled_bands_are_a_kronecker_sum(seed):
    """I − Σ_j Q_j ⊗ C_j against dense matrices, for random bands and numbers of stages."""
    rng = np.random.default_rng(seed)
    n, m, count, below, above = (int(rng.integers(*ends)) for ends in ((12, 40), (1, 4), (1, 4), (0, 4), (0, 4)))
    Q = [np.tril(np.triu(rng.normal(size=(n, n)), -below), above) for _ in range(count)]
    C = [rng.normal(size=(m, m)) for _ in range(count)]
    bands = [np.zeros((2 * below + above + 1, n), order="F") for _ in range(count)]
    for band, q in zip(bands, Q, strict=True):
        i, j = np.nonzero(q)
        band[below + above + i - j, j] = q[i, j]
    factors = BandedLU.coupled(bands, below, above, C)
    M = np.eye(n * m) - sum(np.kron(q, c) for q, c in zip(Q, C, strict=True))
    x = rng.normal(size=(n * m, 2))
    for matrix, transposed in ((M, False), (M.T, True)):
        np.testing.assert_allclose(factors.solve(matrix @ x, transposed), x, atol=1e-12 * np.linalg.cond(M))
