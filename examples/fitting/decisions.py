r"""
How fast is evidence, and how much of it is enough?
===================================================

In the experiment of Roitman and Shadlen (2002, *J. Neurosci.* 22, 9475) monkeys saw dots of which a part, the
coherence, moved one way, and looked to that side as soon as they knew it. The data here have the shape of theirs, six
coherences, choices and response times, and are simulated: evidence drifts at a speed proportional to the coherence
until it reaches one of two bounds.

.. math:: dX = k\,c\,dt + dW, \qquad \text{response time} = d + \inf\{t: |X_t| \ge a\}
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from kolmo import likelihood

rng = np.random.default_rng(2002)
coherence = rng.choice([0.0, 0.032, 0.064, 0.128, 0.256, 0.512], 1200)
x, t, step = np.zeros(1200), np.zeros(1200), 5e-4
while (going := np.abs(x) < 0.75).any():
    x += going * (10.0 * coherence * step + np.sqrt(step) * rng.standard_normal(1200))
    t += step * going
frame = {"rt": t + 0.33, "correct": x > 0, "coherence": coherence}  # a pandas.DataFrame will do as well

# %%
# From the data frame to estimates, their errors, and a check, in fifteen lines:

speed, bound, delay, lapse = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (5.0, 1.0, 0.2, 0.02))
model = likelihood.FirstPassage(
    lambda t, x, c: speed * c["coherence"],
    lower=lambda c: -bound,
    upper=lambda c: bound,
    delay=lambda c: delay,
    lapse=lambda c: lapse,
)
trials = likelihood.Trials.of(frame, "rt", "correct", ["coherence"])
found = model.likelihood(trials, tol=1e-2)
parameters, bounds = [speed, bound, delay, lapse], [(0, 40), (0.2, 3), (0, 1), (0, 0.3)]
fit = likelihood.fit(found, parameters, bounds=bounds)
print(fit, fit.uncertainty(), likelihood.residuals(found, rng=0), sep="\n")

# %%
# The exact gradient serves other optimisers and samplers as well, through NumPy:

value_and_gradient, start = likelihood.as_numpy(lambda: -found(), parameters)
print("−log L and its gradient at the estimates:", *value_and_gradient(start))

# %%
# Observed times are the bars, wrong choices downwards; the lines are the fit. At a coherence of a half it is all but
# over at once.

figure, axes = plt.subplots(2, 3, figsize=(9.5, 5), layout="constrained", sharex=True, sharey=True)
for ax, condition in zip(axes.flat, trials.conditions, strict=True):
    likelihood.plot_choices(found, condition, ax=ax)
    ax.set(title=f"coherence {condition['coherence']:.1%}", xlim=(0.2, 2.5))
    ax.label_outer()
    ax.get_legend().remove()
