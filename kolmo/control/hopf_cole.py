"""Linearly solvable control: the logarithmic transform turns the Hamilton–Jacobi–Bellman equation into a linear one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home, namespace
from kolmo.control.coefficients import Quadratic
from kolmo.control.problem import ControlProblem
from kolmo.control.sets import Unbounded
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Open, Periodic, Reflecting
from kolmo.refine.plan import interesting_points
from kolmo.shown import Shown
from kolmo.solution import Solution
from kolmo.solve import solve

# Relative accuracy to which the structure must hold.
EXACT = 1e-8
# Times at which ψ is kept, for the policy.
SAVED = 33


@dataclass(frozen=True, eq=False, repr=False)
class HopfColeSolution(Shown):
    r"""Value :math:`V = -\lambda\log\psi` and policy of a linearly solvable control problem.

    Attributes
    ----------
    problem : ControlProblem
        What was solved.
    psi : Solution
        ψ, at several times.
    strength : float
        λ.
    shift : float
        Constant taken off the terminal cost before the exponential.
    gain : ndarray, shape (m, d)
        Feedback ``a = -gain @ ∇V`` (constant effort and input matrices).
    error_estimate : ndarray, shape (...)
        Estimate of the error of V at t = 0 and the points asked for.
    status : str
        As of ``psi``.

    References
    ----------
    Fleming 1978 (logarithmic transformations); Kappen 2005 (linear theory of control).

    Examples
    --------
    >>> import kolmo
    >>> from kolmo import control
    >>> problem = control.ControlProblem(lambda t, x, a: a, 1.0, controls=control.Unbounded(1), horizon=1.0,
    ...     terminal=lambda x: x[..., 0] ** 2, running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
    ...     box=kolmo.Box(-6.0, 6.0))
    >>> best = control.hopf_cole(problem, at=[0.5], rtol=1e-5)
    >>> best.policy(0.0, [0.5]).round(3)  # −2x/3
    array([-0.333])
    """

    problem: ControlProblem
    psi: Solution
    strength: float
    shift: float
    gain: np.ndarray
    error_estimate: np.ndarray
    status: str

    def __call__(self, x: Any, t: float = 0.0) -> Array:
        """V(t, x), shape (...), at a saved time."""
        psi = self.psi(x, t)
        return self.problem.sign * (self.shift - self.strength * namespace(psi).log(psi))

    def gradient(self, x: Any, t: float = 0.0) -> Array:
        """∇V(t, x), shape (..., d), at a saved time."""
        return -self.problem.sign * self.strength * self.psi.gradient(x, t) / self.psi(x, t)[..., None]

    def policy(self, t: float, x: Any) -> Array:
        """Optimal control a(t, x), shape (..., m); linear in time between saved times, and constant beyond the grid."""
        points, times = self.psi.grid.clamped(as_points(x, self.psi.grid.dim)), self.psi.times
        k = int(np.clip(np.searchsorted(times, t, side="right") - 1, 0, max(len(times) - 2, 0)))
        late = min(k + 1, len(times) - 1)
        s = 0.0 if late == k else float(np.clip((t - times[k]) / (times[late] - times[k]), 0.0, 1.0))
        p = (1.0 - s) * self.gradient(points, times[k]) + s * self.gradient(points, times[late])
        return -self.problem.sign * p @ as_like(self.gain.T, points)


@at_home
def hopf_cole(problem: ControlProblem, *, at: Any, rtol: float = 1e-3, atol: float = 1e-6) -> HopfColeSolution:
    r"""Solve a linearly solvable control problem by one linear equation.

    .. math::
        V = -\lambda\log\psi, \qquad
        \partial_t\psi + b_0\cdot\nabla\psi + \tfrac12\Sigma:\nabla^2\psi - \tfrac{\ell_0}{\lambda}\psi = 0,
        \qquad \psi(T, \cdot) = e^{-\varphi/\lambda}

    for drift :math:`b_0 + Ba`, cost :math:`\ell_0 + \tfrac12 a^TRa` and noise :math:`\Sigma = \lambda BR^{-1}B^T`, with
    constant B and R. The optimal control is :math:`-R^{-1}B^T\nabla V`.

    Parameters
    ----------
    problem : ControlProblem
        Unbounded controls, without killing or obstacle.
    at : array_like, shape (..., d)
        Points where the answer matters.
    rtol, atol : float
        Tolerance on V, as for ``solve_hjb``.

    Returns
    -------
    HopfColeSolution

    Raises
    ------
    InputError
        If the problem does not have this structure; the message says what is in the way.

    Notes
    -----
    Fleming 1978 (logarithmic transformations); Kappen 2005 (linear theory of control).

    Examples
    --------
    >>> import numpy as np, torch, kolmo
    >>> from kolmo import control
    >>> cp = control.ControlProblem(lambda t, x, a: a, covariance=1.0, controls=control.Unbounded(1),
    ...     terminal=lambda x: 0.5 * x[..., 0] ** 2, horizon=1.0, box=kolmo.Box(-6.0, 6.0),
    ...     running_cost=lambda t, x, a: 0.5 * (a**2).sum(-1))
    >>> V = control.hopf_cole(cp, at=[1.0], rtol=1e-5)
    >>> bool(abs(V(1.0) - (0.25 + 0.5 * np.log(2.0))) < 1e-5)
    True
    """
    still = problem.closed_loop(problem.constant(np.zeros(problem.controls.m)))
    points = interesting_points(still, at)
    strength, gain = _structure(problem, points)
    with torch.no_grad():
        final = torch.zeros(1) if problem.terminal is None else still.final(torch.as_tensor(points))
    shift = float((problem.sign * final).min())
    linear = _linear(problem, still, strength, shift)
    save = None if problem.horizon is None else np.linspace(0.0, problem.horizon, SAVED).tolist()
    needed, psi = 1e-3, None
    for _ in range(4):
        psi = solve(linear, at=at, rtol=needed, atol=1e-300, save=save)
        value = as_numpy(psi(at))
        V = np.abs(shift - strength * np.log(np.maximum(value, 1e-300))).max()
        ask = 0.8 * (atol + rtol * V) / strength * max(float(value.min()), 1e-300) / float(value.max())
        if needed <= ask:
            break
        needed = max(0.9 * ask, 1e-12)
    assert psi is not None
    value = as_numpy(psi(at))
    if not (value > 0).all():
        raise InputError("at", f"ψ = {value.min():.2e}", "a positive ψ at the points", "use solve_hjb")
    estimate = strength * np.asarray(psi.error_estimate) / value
    return HopfColeSolution(problem, psi, strength, shift, gain, estimate, psi.status)


def _linear(problem: ControlProblem, still: KolmogorovProblem, strength: float, shift: float) -> KolmogorovProblem:
    """The linear equation of ψ."""
    sign = problem.sign

    def terminal(x: torch.Tensor) -> torch.Tensor:
        return torch.exp((shift - sign * still.final(x)) / strength)

    def killing(t: float, x: torch.Tensor) -> torch.Tensor:
        cost: torch.Tensor = sign * still.running(t, x) / strength
        return cost

    box = still.box
    faces: list[Any] = []
    for pair in box.faces:
        row: list[Any] = []
        for face in pair:
            if isinstance(face, Absorbing):
                row.append(Absorbing(_exponential(still, face, sign, strength, shift)))
            elif isinstance(face, (Open, Periodic, Reflecting)):
                row.append(face)
            else:
                raise InputError("box", box, "open, periodic, reflecting or absorbing faces")
        faces.append(tuple(row))
    final = None if problem.horizon is None else terminal
    domain = Box(box.lower, box.upper, boundary=faces)
    return KolmogorovProblem(still.sde, final, problem.horizon, domain, killing=killing).handing("torch")


def _exponential(still: KolmogorovProblem, face: Absorbing, sign: float, strength: float, shift: float) -> Any:
    """ψ on an absorbing face."""
    return lambda t, x: torch.exp((shift - sign * torch.as_tensor(still.on_face(face.value, t, x))) / strength)


def _structure(problem: ControlProblem, points: np.ndarray) -> tuple[float, np.ndarray]:
    """λ and the feedback gain R⁻¹Bᵀ; InputError where the structure is missing."""
    if not isinstance(problem.controls, Unbounded):
        raise InputError("controls", problem.controls, "Unbounded(m)", "use solve_hjb")
    if problem.obstacle is not None:
        raise InputError("obstacle", "an obstacle", "none", "use solve_hjb")
    m, found = problem.controls.m, None
    spread = np.maximum(points.std(0), 0.1)
    x = torch.as_tensor(np.concatenate([points, points + 0.1 * spread, points - 0.2 * spread]))
    low, high = (torch.as_tensor(end) for end in (problem.box.lower, problem.box.upper))  # type: ignore[union-attr]
    x = torch.minimum(torch.maximum(x, low), high)
    for t in (0.0, 0.5 * (problem.horizon or 0.0)):
        model = Quadratic(problem, t, x, np.zeros(m), np.ones(m))
        wide = Quadratic(problem, t, x, np.zeros(m), np.full(m, 3.0))
        if problem.sense == "max":
            raise InputError("sense", "'max'", "'min'", "minimise the negative")
        if np.any(model.zero[2]) or any(np.any(p[2]) for p in model.linear):
            raise InputError("killing", "a killing rate", "none", "use solve_hjb")
        if any(np.any(p[1]) for p in [*model.linear, *model.square.values()]):
            raise InputError("covariance", "a covariance that depends on the control", "one that does not")
        B = np.stack([p[0] for p in model.linear], -1)
        R = np.zeros((len(x), m, m))
        for (j, k), parts in model.square.items():
            R[:, j, k] = R[:, k, j] = parts[3]
        cubic = max(
            float(np.abs(9.0 * a[i] - b[i]).max(initial=0.0) / (1.0 + np.abs(b[i]).max(initial=0.0)))
            for a, b in zip(model.square.values(), wide.square.values(), strict=True)
            for i in (0, 3)
        )
        linear_cost = max(float(np.abs(p[3]).max()) for p in model.linear)
        curved = max(float(np.abs(p[0]).max()) for p in model.square.values())
        if max(cubic, linear_cost, curved) > EXACT:
            raise InputError(
                "drift, running_cost", "another dependence on the control", "drift b₀ + Ba, cost ℓ₀ + ½aᵀRa"
            )
        for values, name in ((B, "drift"), (R, "running_cost")):
            if np.abs(values - values[:1]).max() > EXACT * (1.0 + np.abs(values).max()):
                raise InputError(name, "a control term that depends on x", "a constant one", "use solve_hjb")
        if np.linalg.eigvalsh(R[0]).min() <= 0:
            raise InputError("running_cost", f"effort matrix {R[0].tolist()}", "a positive definite one")
        gain = np.linalg.solve(R[0], B[0].T)
        S, base = model.zero[1], B[0] @ gain
        strength = float(np.trace(S[0]) / max(np.trace(base), 1e-300))
        if strength <= 0 or np.abs(S - strength * base).max() > EXACT * np.abs(S).max():
            raise InputError("covariance", f"Σ = {S[0].tolist()}", f"a multiple of BR⁻¹Bᵀ = {base.tolist()}")
        if found is not None and (abs(found[0] - strength) > EXACT * strength or not np.allclose(found[1], gain)):
            raise InputError("drift, running_cost", "control terms that depend on time", "constant ones")
        found = strength, gain
    assert found is not None
    return found
