"""Integral equations for the coefficients of densities in Hermite polynomials: c = e + Ac, and the transposed one."""

from typing import Any

import numpy as np

from kolmo.kernels.cache import compiled

_fast: Any = compiled(fastmath={"reassoc", "contract"})
# So many times more rounds for the transposed equation: it settles as fast, but from farther off, and what has a value
# has to have a gradient.
PATIENCE = 10


@_fast
def _products(r: np.ndarray, values: np.ndarray, slopes: np.ndarray, W: np.ndarray, R: np.ndarray) -> None:
    """R of one member at all times; W (P, n) is room to work."""
    K, P, s = r.shape
    n = values.shape[1]
    for k in range(K):
        for p in range(P):
            for a in range(n):
                W[p, a] = r[k, p, 0] * slopes[p, 0, a]
            for i in range(1, s):
                for a in range(n):
                    W[p, a] += r[k, p, i] * slopes[p, i, a]
        R[k] = np.dot(W.T, values)


@_fast
def _iterated(
    first: np.ndarray, second: np.ndarray, e: np.ndarray, rounds: int, settled: float, moved: np.ndarray, x: np.ndarray
) -> None:
    """x = e + second(first x): matrices (m, q, q) for each row of x (m, q), and (q, m, m) for each column of that."""
    m, q = e.shape
    x[:] = e
    for _ in range(rounds):
        for b in range(m):
            for a in range(q):
                total = 0.0
                for j in range(q):
                    total += first[b, a, j] * x[b, j]
                moved[b, a] = total
        change, size = 0.0, 0.0
        for a in range(q):
            for b in range(m):
                total = e[b, a]
                for j in range(m):
                    total += second[a, b, j] * moved[j, a]
                change, size = max(change, abs(total - x[b, a])), max(size, abs(total))
                x[b, a] = total
        if change <= settled * size:
            return
    x[:] = np.nan


@_fast
def solutions(
    rates: np.ndarray,
    right: np.ndarray,
    back: np.ndarray,
    values: np.ndarray,
    slopes: np.ndarray,
    solve: np.ndarray,
    rounds: int,
    settled: float,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Solve :math:`c_{a\alpha} = e_{a\alpha} + \sum_{b\beta}S_{\alpha ab}R_{b\alpha\beta}c_{b\beta}` by iteration.

    Parameters
    ----------
    rates : ndarray, shape (M, K, P, s)
        Factors of the derivatives at points: :math:`R_{b\alpha\beta} = \sum_{pi}r_{bpi}G_{pi\alpha}V_{p\beta}`.
    right, back : ndarray, shape (M or 0, K, n)
        e, and the right side of the transposed equation; without members: it is not solved.
    values, slopes : ndarray, shape (P, n) and (P, s, n)
        V and G.
    solve : ndarray, shape (n, K, K)
        S.
    rounds, settled : int, float
        Rounds at most (of the transposed equation ten times as many), and the change, as a part of the largest number,
        at which they end.

    Returns
    -------
    c, transposed : ndarray, shape (M or 0, K, n)
        NaN where a solution does not settle.
    """
    M, K, P, _ = rates.shape
    n = values.shape[1]
    c, transposed = np.empty_like(right), np.empty_like(back)
    R, W, moved, turned = np.empty((K, n, n)), np.empty((P, n)), np.empty((K, n)), np.empty((n, K))
    # c = e + S(Rc); the other one, with rows and columns exchanged: c = e + Rᵀ(Sᵀc)
    back, solved = np.ascontiguousarray(back.transpose(0, 2, 1)), np.ascontiguousarray(solve.transpose(0, 2, 1))
    x = np.empty((n, K))
    for m in range(M):
        _products(rates[m], values, slopes, W, R)
        if len(right):
            _iterated(R, solve, right[m], rounds, settled, moved, c[m])
        if len(back):
            across = np.ascontiguousarray(R.transpose(0, 2, 1))
            _iterated(solved, across, back[m], PATIENCE * rounds, settled, turned, x)
            transposed[m] = x.T
    return c, transposed
