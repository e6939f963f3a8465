"""Selling's decomposition: S = Σ_k λ_k e_k e_kᵀ with integer vectors e_k and λ_k ≥ 0, for d = 1, 2, 3."""

from itertools import combinations

import numpy as np

from kolmo.arrays import Array, as_like, namespace

MAX_ITERATIONS = 400
# Part of the diagonal that is added, so that degenerate matrices have a decomposition with finitely long vectors.
NUDGE = 1e-7


def obtuse_superbase(S: np.ndarray) -> np.ndarray:
    r"""Superbases :math:`(v_0, …, v_d)`, integer, summing to zero, with :math:`v_i^T S v_j \le 0` for i ≠ j.

    Selling's algorithm (Selling 1874; Conway & Sloane 1992): while a pair is acute, replace it. S is
    nudged by a small part of its diagonal, so that the algorithm ends for degenerate S too.

    Parameters
    ----------
    S : ndarray, shape (N, d, d)
        Symmetric positive semidefinite matrices.

    Returns
    -------
    ndarray of int, shape (N, d + 1, d)
        One superbase per matrix.

    Examples
    --------
    >>> obtuse_superbase(np.array([[[1.0, 0.9], [0.9, 1.0]]]))[0].sum(0).tolist()
    [0, 0]
    """
    N, d = S.shape[0], S.shape[1]
    base = np.concatenate([np.eye(d, dtype=int), -np.ones((1, d), dtype=int)])
    V = np.broadcast_to(base, (N, d + 1, d)).copy()
    trace = np.trace(S, axis1=1, axis2=2)
    diagonal = np.maximum(np.einsum("nii->ni", S), 1e-9 * trace[:, None] + 1e-300)
    M = S + NUDGE * diagonal[:, :, None] * np.eye(d)
    for _ in range(MAX_ITERATIONS if d > 1 else 0):
        changed = False
        for i, j in combinations(range(d + 1), 2):
            product = np.einsum("na,nab,nb->n", V[:, i], M, V[:, j])
            acute = product > 1e-12 * trace
            if not acute.any():
                continue
            changed = True
            vi, vj = V[acute, i], V[acute, j]
            others = [k for k in range(d + 1) if k not in (i, j)]
            if d == 2:
                V[acute, others[0]] = vi - vj
            else:
                V[acute, others[0]] += vi
                V[acute, others[1]] += vi
            V[acute, i], V[acute, j] = -vi, vj
        if not changed:
            break
    return V


def offsets(V: np.ndarray) -> np.ndarray:
    """Integer vectors e_k that go with a superbase, shape (N, K, d), K = 1, 3, 6 for d = 1, 2, 3."""
    d = V.shape[2]
    if d == 1:
        return np.ones((V.shape[0], 1, 1), dtype=int)
    vectors = []
    for i, j in combinations(range(d + 1), 2):
        rest = [k for k in range(d + 1) if k not in (i, j)]
        if d == 2:
            v = V[:, rest[0]]
            vectors.append(np.stack([-v[:, 1], v[:, 0]], -1))
        else:
            vectors.append(np.cross(V[:, rest[0]], V[:, rest[1]]))
    return np.stack(vectors, 1)


def weights(S: Array, V: np.ndarray) -> Array:
    """Weights λ_k = −v_iᵀ M v_j, shape (N, K), of M = S + NUDGE diag(S): linear in S for a given superbase."""
    d = V.shape[2]
    if d == 1:
        return S[:, :, 0]
    W = as_like(V.astype(float), S)
    xp = namespace(S)
    M = S * as_like(np.ones((d, d)) + NUDGE * np.eye(d), S)
    return xp.stack([-xp.einsum("na,nab,nb->n", W[:, i], M, W[:, j]) for i, j in combinations(range(d + 1), 2)], -1)
