r"""
When to open a plant, what to fear, what it costs for ever
==========================================================

Three kinds of control besides steering to a goal: switching between regimes, playing against somebody, and running
for ever. Each has a closed form in ``kolmo.catalog.OPTIMA``, drawn as dots.
"""

import matplotlib.pyplot as plt
import numpy as np

import kolmo
from kolmo import catalog, control

# %%
# **When to open and close a plant** whose product's price wanders (Brekke and Øksendal 1994). Opening costs 2, closing
# 0.5, running 1 per unit of time. Between two prices one leaves it as it is: that is hysteresis.

case = catalog.OPTIMA["plant"]()
best = control.solve_switching(case.problem, [[0.0, 2.0], [0.5, 0.0]], at=case.points, rtol=1e-3)
x = np.linspace(-1.5, 1.2, 271)
opens, closes = x[best.switch(0.0, x, 0) == 1].min(), x[best.switch(0.0, x, 1) == 0].max()
print(f"opened above a price of {np.exp(opens):.2f}, closed below {np.exp(closes):.2f}")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
dots = np.linspace(-1.5, 1.2, 10)[:, None]
for i, (name, colour) in enumerate((("closed", "#0072b2"), ("open", "#d55e00"))):
    axes[0].plot(np.exp(x), best(x, i), color=colour, label=name)
    axes[0].plot(np.exp(dots), case.solution(0.0, dots)[:, i], "o", color=colour, markersize=3)
axes[0].axvspan(np.exp(closes), np.exp(opens), color="0.9")
axes[0].set(xlabel="price", ylabel="value", title="When to open, when to close?")
axes[0].legend(frameon=False)

# %%
# **What if the drift is not what it seems?** A second player moves the state as badly as a price on his effort lets
# him: robust control, a linear-quadratic game. The dearer his effort, the less there is to fear.

y = np.linspace(-2.0, 2.0, 81)
for price, colour in ((1.2, "#d55e00"), (3.0, "#009e73"), (100.0, "#0072b2")):
    game = catalog.OPTIMA["linear_quadratic_game"](prices=(0.8, price))
    opt = control.solve_hjb(game.problem, at=game.points, rtol=1e-4)
    axes[1].plot(y, opt(y), color=colour, label=f"γ = {price:g}")
    axes[1].plot(y[::10], game.exact(0.0, y[::10]), "o", color=colour, markersize=3)
axes[1].set(xlabel="x", ylabel="value", title="What does an opponent cost?")
axes[1].legend(frameon=False)

# %%
# **What does it cost for ever?** Least long-run average of x² with drift at most μ between reflecting walls, whose law
# is known: exp(−2μ|x|/σ²).

sigma, drifts, averages = 0.9, np.linspace(0.1, 3.0, 8), []
for mu in drifts:
    cp = control.ControlProblem(
        lambda t, x, a, mu=mu: mu * a,
        sigma,
        controls=control.Interval(-1.0, 1.0),
        terminal=None,
        horizon=None,
        running_cost=lambda t, x, a: x[..., 0] ** 2,
        ergodic=True,
        box=kolmo.Box(-1.0, 1.0, "reflecting"),
    )
    averages.append(control.solve_hjb(cp, at=[0.0], rtol=1e-4).average)
z = np.linspace(0.0, 1.0, 2001)
law = np.exp(-2.0 * drifts[:, None] * z / sigma**2)
axes[2].plot(drifts, averages, color="#0072b2")
axes[2].plot(drifts, (law * z**2).sum(1) / law.sum(1), "o", color="#0072b2", markersize=3)
axes[2].set(xlabel="largest drift", ylabel="average of x²", title="What is left in the long run?")
