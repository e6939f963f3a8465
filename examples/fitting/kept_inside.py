r"""
Living without debt, and above a floor
======================================

A state constraint is a face at which only controls that keep the state inside are admissible: ``"constrained"``. There
is no other condition. Both problems have a closed form, drawn as dots.
"""

import matplotlib.pyplot as plt
import numpy as np

import kolmo
from kolmo import catalog, control

# %%
# **How fast to spend what one has saved?** With an income of 1, no debt and impatience, consumption falls as wealth
# does, with an infinite slope at 0, and is the income from there on (``catalog.OPTIMA["saving_without_debt"]``).

case = catalog.OPTIMA["saving_without_debt"]()
opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-3)
wealth = np.linspace(0.0, 1.2, 121)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
axes[0].plot(wealth, opt.policy(0.0, wealth)[:, 0], color="#0072b2")
times = np.linspace(0.0, 1.8, 10)
axes[0].plot((np.expm1(0.5 * times) / 0.5 - times), np.exp(0.5 * times), "o", color="#0072b2", markersize=3)
axes[0].set(xlabel="wealth", ylabel="consumption", title="How fast to spend?", xlim=(0, 1.2))

# %%
# **How much to risk above a floor?** Power utility of what is above it: the amount is proportional to that, and nothing
# at the floor, where noise would lead out.

floor, excess, vol = 1.0, 0.06, 0.25
x = np.linspace(floor, 2.2, 61)
for gamma, colour in ((0.5, "#d55e00"), (0.3, "#009e73")):
    problem = control.ControlProblem(
        lambda t, x, a: a * excess,
        lambda t, x, a: a * vol,
        controls=control.Interval(0.0, 12.0),
        terminal=lambda x, gamma=gamma: (x[..., 0] - floor).clamp(min=0.0) ** gamma / gamma,
        horizon=1.0,
        sense="max",
        box=kolmo.Box(floor, np.inf, [("constrained", "open")]),
    )
    best = control.solve_hjb(problem, at=[1.2, 1.7], rtol=1e-3)
    axes[1].plot(x, best.policy(0.0, x)[:, 0], color=colour, label=f"γ = {gamma:g}")
    axes[1].plot(x[::6], (x[::6] - floor) * excess / (vol**2 * (1.0 - gamma)), "o", color=colour, markersize=3)
axes[1].set(xlabel="wealth", ylabel="amount at risk", title="How much to risk?")
axes[1].legend(frameon=False)
