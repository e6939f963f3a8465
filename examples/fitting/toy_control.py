r"""
A control problem from beginning to end
=======================================

State a problem, find its optimum by dynamic programming, fit policies to the same cost, compare, and check the
gradient that was used.

A particle in a double well is to be carried over the barrier: from the left well, :math:`X_0 = -1`, to the right one,

.. math::
    dX = (X - X^3 + a)\,dt + 0.5\,dW, \qquad
    \min_a\ \mathbb E\Big[\int_0^T \tfrac12 a^2\,dt + 5\,(X_T - 1)^2\Big], \qquad T = 2 .

Step 1: state it
----------------

Drift, noise and cost are functions of time, state and control. ``Unbounded(1)`` says that the control is any
number; the price of effort keeps it finite.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import kolmo
from kolmo import control, testing

SIGMA, HORIZON, START = 0.5, 2.0, [-1.0]


def target(x):
    return 5.0 * (x[..., 0] - 1.0) ** 2


problem = control.ControlProblem(
    lambda t, x, a: x - x**3 + a,
    SIGMA,
    controls=control.Unbounded(1),
    terminal=target,
    horizon=HORIZON,
    box=kolmo.Box(-3.0, 3.0),
    running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
)

# %%
# Step 2: the optimum
# -------------------
#
# The Hamilton–Jacobi–Bellman equation gives the least cost from everywhere and the policy that attains it. It sees
# the state all the time: a feedback.

optimum = control.solve_hjb(problem, at=[START], rtol=1e-4)
best = optimum([START]).item()
print(f"dynamic programming: {best:.4f} ± {optimum.error_estimate.item():.0e}")

# %%
# Step 3: policies with parameters
# --------------------------------
#
# Any policy makes the control problem a plain Kolmogorov problem, ``problem.closed_loop(policy)``, and the expected
# cost is its value at the start. What depends on parameters is fitted through :func:`kolmo.control.value`. Two
# candidates:
#
# - **open loop**: eight numbers, one for each piece of time; it does not look at the state;
# - **affine feedback**: eight pairs, :math:`a = p_k + q_k x`.
#
# Coefficients that jump in time are to be declared, so that no time step straddles a jump.

PIECES = 8
jumps = np.linspace(0.0, HORIZON, PIECES + 1)[1:-1]


def piece(t):
    return min(int(t / HORIZON * PIECES), PIECES - 1)


def costed(policy):
    """The problem of a policy that is constant on pieces of time."""
    sde = kolmo.SDE(
        lambda t, x: x - x**3 + policy(t, x), SIGMA, dim=1, breakpoints=jumps.tolist(), autonomous=True, arrays="torch"
    )
    effort = lambda t, x: 0.5 * policy(t, x)[..., 0] ** 2
    return kolmo.KolmogorovProblem(sde, target, HORIZON, kolmo.Box(-3.0, 3.0), source=effort)


p = torch.full((PIECES,), 0.5, dtype=torch.float64, requires_grad=True)
pq = torch.zeros(PIECES, 2, dtype=torch.float64, requires_grad=True)
candidates = {
    "open loop": (p, lambda t, x: p[piece(t)] + 0 * x),
    "affine feedback": (pq, lambda t, x: pq[piece(t), 0] + pq[piece(t), 1] * x),
}
costs = {}
for name, (parameters, policy) in candidates.items():
    candidate = costed(policy)
    fit = control.minimize(lambda c=candidate: control.value(c, [START], rtol=1e-4).sum(), parameters, maxiter=60)
    costs[name] = fit.fun
    print(f"{name}: {fit.fun:.4f}, {100 * (fit.fun / best - 1):.1f} % above the optimum ({fit.status})")

# %%
# Nothing may lie below the optimum. What the open loop loses is the worth of looking: noise that helps cannot be
# used, and noise that hinders is not answered.
#
# Step 4: roll the policies out
# -----------------------------
#
# The costs above are solutions of equations. Simulated paths share no code with them.

policies = {name: policy for name, (_, policy) in candidates.items()} | {"dynamic programming": optimum.policy}
with torch.no_grad():
    for name, policy in policies.items():
        paths = kolmo.monte_carlo(problem.closed_loop(policy), [START], paths=4000, steps=160, rng=0)
        numbers = paths.mean.item(), paths.standard_error.item(), paths.bias_estimate.item()
        print("{}: {:.3f} ± {:.3f} by paths, time steps off by about {:.3f}".format(name, *numbers))

# %%
# Step 5: check the gradient
# --------------------------
#
# A wrong gradient still descends for a while. The remainder of the Taylor expansion,
# :math:`|J(p + hv) - J(p) - h\,\nabla J\cdot v|`, must fall like h². The discretisation is held fixed, since the
# gradient is that of one discretisation.

candidate = costed(candidates["open loop"][1])
recipe = kolmo.plan(candidate, at=[START], rtol=1e-4)
print(testing.taylor_test(lambda: control.value(candidate, [START], discretization=recipe).sum(), p))

# %%
# What they do
# ------------

x, t = np.linspace(-1.8, 1.8, 121), np.linspace(0.0, HORIZON, 81)[:-1]
grid = torch.as_tensor(x)[:, None]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
for ax, (name, policy) in zip(axes, policies.items(), strict=True):
    field = np.stack([np.asarray(torch.as_tensor(policy(s, grid)).detach())[:, 0] for s in t])
    shown = ax.contourf(t, x, field.T, levels=np.linspace(-2, 4, 25), cmap="cividis", extend="both")
    ax.set(title=name, xlabel="t")
axes[0].set_ylabel("x")
figure.colorbar(shown, ax=axes, label="control a")
