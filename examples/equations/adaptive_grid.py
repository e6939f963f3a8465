r"""
Where the grid goes
===================

Nobody says where a source jumps or how narrow it is: the solver looks at it before it makes a grid.

Brownian motion with a source: once :math:`1\{x > 0.3\}`, which jumps, once a bump of width 1/1000 at 0.6, a thousandth
of the distance that the process goes.
"""

import matplotlib.pyplot as plt
import numpy as np

import kolmo

brownian = kolmo.SDE(0.0, diffusion=1.0, dim=1)
sources = {
    "a jump at 0.3": lambda t, x: 1.0 * (x[..., 0] > 0.3),
    "a bump of width 0.001 at 0.6": lambda t, x: np.exp(-0.5 * ((x[..., 0] - 0.6) / 0.001) ** 2),
}
solutions = {}
for name, source in sources.items():
    problem = kolmo.KolmogorovProblem(brownian, lambda x: 0 * x[..., 0], 1.0, source=source)
    solutions[name] = kolmo.solve(problem, at=[0.0], rtol=1e-4, atol=1e-9)
    print(f"{name}: {solutions[name](0.0):.9f} ± {solutions[name].error_estimate.item():.1e}")
    print(solutions[name].discretization)

# %%
# Left: a node lies on the jump, and no difference reaches across it. Right: the nodes lie by as much closer as the bump
# is narrower, and their distance grows geometrically from there: a thousandth of the width costs some three times the
# nodes.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
jump, bump = (solution.grid.axes[0] for solution in solutions.values())

node = jump.nodes[list(jump.breaks)]
near = np.setdiff1d(jump.nodes[np.abs(jump.nodes - 0.3) < 0.55], node)
x = np.linspace(-0.2, 0.8, 1001)
left.plot(x, x > 0.3, color="0.6", label="source")
left.plot(near, near > 0.3, "|", color="#0072b2", markersize=14, label="nodes")
left.plot(node, 0 * node + 0.5, "o", color="#d55e00", label="node on the jump")
left.set(xlabel="x", ylabel="source", xlim=(-0.2, 0.8))
left.legend(frameon=False, loc="center right")

middle = 0.5 * (bump.nodes[1:] + bump.nodes[:-1])
right.semilogy(middle, np.diff(bump.nodes), ".-", color="#0072b2", markersize=4)
right.axhline(0.001, color="0.6", linestyle="--", label="width of the bump")
right.set(xlabel="x", ylabel="distance of neighbouring nodes")
right.legend(frameon=False, loc="lower left")
