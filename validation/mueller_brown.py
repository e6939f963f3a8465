"""Müller–Brown potential: committor between two discs and transition rate, by symmetric five-point differences.

``python -m validation.mueller_brown`` prints the numbers that ``tests/control/test_targets.py`` compares with. Edges of
a rectangular grid carry the conductance exp(−V/kT) at their middle, edges that a circle cuts that of their part outside
(Gibou, Fedkiw, Cheng and Kang 2002: symmetric, of second order); the rate is the Dirichlet energy. Potential of Müller
and Brown (1979), kT = 20. Three grids and one extrapolation; nothing here is shared with the package.
"""

import sys

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

KT, RADIUS = 20.0, 0.15
CENTRES = np.array([[-0.558, 1.442], [0.623, 0.028]])
LOW, HIGH = np.array([-1.6, -0.6]), np.array([1.3, 2.1])
POINTS = np.array([[-0.8, 0.6], [-0.3, 0.5], [0.0, 0.3], [-0.6, 0.8]])
A, B, C = (-1.0, -1.0, -6.5, 0.7), (0.0, 0.0, 11.0, 0.6), (-10.0, -10.0, -6.5, 0.7)
D, X, Y = (-200.0, -100.0, -170.0, 15.0), (1.0, 0.0, -0.5, -1.0), (0.0, 0.5, 1.5, 1.0)


def potential(x, y):
    """V of Müller and Brown (1979)."""
    terms = zip(A, B, C, D, X, Y, strict=True)
    return sum(d * np.exp(a * (x - p) ** 2 + b * (x - p) * (y - q) + c * (y - q) ** 2) for a, b, c, d, p, q in terms)


def cut(x, y):
    """Part of the segments from x to y that lies outside the discs, and the disc met (−1: none)."""
    part, disc = np.ones(len(x)), np.full(len(x), -1)
    for k, centre in enumerate(CENTRES):
        p, e = x - centre, y - x
        a, b, c = (e * e).sum(-1), (p * e).sum(-1), (p * p).sum(-1) - RADIUS**2
        meets = (((y - centre) ** 2).sum(-1) <= RADIUS**2) & (c > 0)
        root = (-b - np.sqrt(np.maximum(b * b - a * c, 0.0))) / a
        part, disc = np.where(meets, root, part), np.where(meets, k, disc)
    return part, disc


def solve(n):
    """q at the points and the rate on a grid of about n nodes along the first axis, which has all points as nodes."""
    h = 0.1 / n
    counts = np.round((HIGH - LOW) / h).astype(int) + 1
    axes = [low + h * np.arange(count) for low, count in zip(LOW, counts, strict=True)]
    x = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    inside = (((x[:, None] - CENTRES) ** 2).sum(-1) <= RADIUS**2).any(-1)
    index = np.arange(len(x)).reshape(counts)
    size = len(x)
    diagonal, load, energies = np.zeros(size), np.zeros(size), []
    rows, cols, data = [], [], []
    for axis in (0, 1):
        one, two = np.moveaxis(index, axis, 0)[:-1].ravel(), np.moveaxis(index, axis, 0)[1:].ravel()
        # edges along a wall belong to half a cell
        across = np.round((x[one, 1 - axis] - LOW[1 - axis]) / h).astype(int)
        width = np.where((across == 0) | (across == counts[1 - axis] - 1), 0.5, 1.0)
        for a, b in ((one, two), (two, one)):
            use = ~inside[a] & inside[b]
            i, j, w = a[use], b[use], width[use]
            part, disc = cut(x[i], x[j])
            middle = x[i] + 0.5 * part[:, None] * (x[j] - x[i])
            g = w * np.exp(-potential(*middle.T) / KT) / part
            np.add.at(diagonal, i, g)
            np.add.at(load, i, g * (disc == 1))
            energies.append((i, g, (disc == 1) * 1.0))
        use = ~inside[one] & ~inside[two]
        i, j = one[use], two[use]
        g = width[use] * np.exp(-potential(*(0.5 * (x[i] + x[j])).T) / KT)
        np.add.at(diagonal, i, g)
        np.add.at(diagonal, j, g)
        rows += [i, j]
        cols += [j, i]
        data += [-g, -g]
        energies.append((i, g, j))
    diagonal[inside] = 1.0
    matrix = sp.coo_matrix((np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), shape=(size, size))
    q = splu((matrix + sp.diags(diagonal)).tocsc()).solve(load)
    energy = sum((g * (q[i] - (q[j] if j.dtype.kind == "i" else j)) ** 2).sum() for i, g, j in energies)
    weights = np.multiply.outer(*[np.r_[0.5, np.ones(count - 2), 0.5] for count in counts]).ravel() * h * h
    mass = (weights * np.exp(-potential(*x.T) / KT)).sum()
    nodes = np.round((POINTS - LOW) / h).astype(int)
    return np.append(q[index[nodes[:, 0], nodes[:, 1]]], KT * energy / mass)


if __name__ == "__main__":
    values = [solve(n) for n in (5, 10, 20)]
    for value in values:
        sys.stdout.write(f"{value.round(7).tolist()}\n")
    sys.stdout.write(f"extrapolated {(values[2] + (values[2] - values[1]) / 3.0).round(6).tolist()}\n")
