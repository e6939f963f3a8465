"""A controlled diffusion with its cost: what dynamic programming solves, and any policy of it as a plain problem."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kolmo.arrays import is_tensor
from kolmo.control.game import Game
from kolmo.control.sets import BoxSet, Finite, Unbounded
from kolmo.control.targets import Target
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE

Policy = Callable[[float, torch.Tensor], torch.Tensor]


class ControlProblem:
    r"""A stochastic control problem and its Hamilton–Jacobi–Bellman equation.

    .. math::
        \partial_t V + \min_{a \in A}\Big[b(t,x,a)\cdot\nabla V + \tfrac12\Sigma(t,x,a):\nabla^2 V - c(t,x,a)V
        + \ell(t,x,a)\Big] = 0, \qquad V(T, \cdot) = \varphi

    so that :math:`V(t, x) = \min E[e^{-\int c}\varphi(X_T) + \int e^{-\int c}\ell\,ds \mid X_t = x]` over feedback
    policies a(t, x).

    Parameters
    ----------
    drift : callable or array_like
        ``drift(t, x, a)`` -> ``(..., d)``, with a of shape ``(..., m)``. All functions get torch tensors (float64).
    diffusion, covariance : callable or array_like, shape (d, m) and (d, d)
        σ or Σ = σσᵀ as in ``SDE``, functions of (t, x, a). With neither there is no noise.
    controls : Interval, BoxSet, Finite, Unbounded or Game
        The set A; a game has two players, of whom the first minimises and the second maximises.
    terminal : callable or None
        φ: ``terminal(x)`` -> ``(...)``. None if stationary.
    horizon : float or None
        T; None: stationary (exit times, discounted costs).
    box : Box, optional
        Domain and faces; None is all of R^d where the shape of a constant coefficient tells d.
    running_cost, killing : callable or float, optional
        ℓ and c, functions of (t, x, a).
    obstacle : callable, optional
        ``obstacle(t, x)`` -> ``(...)``: what is paid (sense "min") or got ("max") on stopping; V never passes it.
    ergodic : bool
        True: the long-run average of the running cost is optimised, ``horizon=None`` and nothing ends the process; V is
        the relative value and ``opt.average`` the cost per unit of time λ:
        :math:`\min_a [b\cdot\nabla V + \tfrac12\Sigma:\nabla^2 V + \ell] = \lambda`.
    targets : sequence of Target
        Sets in which the process stops, with what is paid on arrival; they may lie inside the box.
    sense : {"min", "max"}
        Whether the expected value is minimised or maximised.
    dim : int, optional
        d, where neither a box nor the shape of a constant coefficient tells it.

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    References
    ----------
    W. H. Fleming and H. M. Soner (2006), Controlled Markov Processes and Viscosity Solutions, second edition.

    Examples
    --------
    >>> import kolmo
    >>> from kolmo import control
    >>> cp = control.ControlProblem(lambda t, x, a: a, covariance=1.0, controls=control.Interval(-1.0, 1.0),
    ...     terminal=lambda x: x[..., 0] ** 2, horizon=1.0, box=kolmo.Box(-8.0, 8.0))
    >>> cp.closed_loop(lambda t, x: -x.sign())
    KolmogorovProblem(dim=1, horizon=1.0, Box(-8..8 open))
    """

    def __init__(
        self,
        drift: Any,
        diffusion: Any = None,
        *,
        covariance: Any = None,
        controls: BoxSet | Finite | Unbounded | Game,
        terminal: Callable[..., Any] | None,
        horizon: float | None,
        box: Box | None = None,
        running_cost: Any = None,
        killing: Any = None,
        obstacle: Callable[..., Any] | None = None,
        sense: str = "min",
        dim: int | None = None,
        targets: Sequence[Target] = (),
        ergodic: bool = False,
    ) -> None:
        if not isinstance(controls, (BoxSet, Finite, Unbounded, Game)):
            raise InputError("controls", repr(controls), "control.Interval, BoxSet, Finite, Unbounded or Game")
        if sense not in ("min", "max"):
            raise InputError("sense", repr(sense), "'min' or 'max'")
        if sense == "max" and isinstance(controls, Game):
            raise InputError("sense", "'max'", "'min': the first player of a game minimises", "exchange the players")
        if obstacle is not None and not callable(obstacle):
            raise InputError("obstacle", repr(obstacle), "a function obstacle(t, x)")
        targets = (targets,) if isinstance(targets, Target) else tuple(targets)
        if not all(isinstance(target, Target) for target in targets):
            raise InputError("targets", repr(targets), "control.Target objects", "Target(level, value)")
        if ergodic and (horizon is not None or killing is not None or targets or obstacle is not None):
            raise InputError(
                "ergodic",
                "a horizon, killing, targets or an obstacle",
                "nothing that ends the process",
                "leave them out",
            )
        self.targets, self.ergodic = targets, ergodic
        self.controls, self.sense, self.obstacle = controls, sense, obstacle
        self._drift, self._diffusion, self._covariance = drift, diffusion, covariance
        self._running_cost, self._killing = running_cost, killing
        self.terminal, self.horizon, self.box = terminal, horizon, box
        self._dim = dim if box is None else box.dim
        if dim is not None and box is not None and dim != box.dim:
            raise InputError("dim", dim, f"{box.dim}, as the box has", "leave dim out")
        still = self.closed_loop(self.constant(controls.samples[0]))
        self.dim, self.box = still.dim, still.box if box is None else box
        if isinstance(controls, Game) and self.constrained:
            raise InputError("boundary", "'constrained' in a game", "faces that no player has to keep to")

    @property
    def constrained(self) -> bool:
        """Whether some face keeps the state inside by what controls are admissible there."""
        return self.box is not None and self.box.has("constrains")

    @property
    def sign(self) -> float:
        """1 when minimising, −1 when maximising."""
        return 1.0 if self.sense == "min" else -1.0

    @staticmethod
    def constant(a: Any) -> Policy:
        """The policy that always takes the control a."""
        value = np.atleast_1d(np.asarray(a, dtype=float))
        return lambda t, x: torch.as_tensor(value).expand(*x.shape[:-1], len(value))

    def closed_loop(self, policy: Policy) -> KolmogorovProblem:
        """The problem of one policy, a(t, x) -> ``(..., m)``: what ``solve`` and ``monte_carlo`` evaluate.

        Paths of ``monte_carlo`` are stopped in targets; ``solve`` and its like refuse these: see ``under``.

        Parameters
        ----------
        policy : callable
            ``policy(t, x)``, torch tensors in and out; in one dimension of control ``(...)`` is accepted too.

        Returns
        -------
        KolmogorovProblem
            Its functions work on torch tensors.
        """
        act = self._acting(policy)

        def close(f: Any) -> Any:
            return (lambda t, x: f(t, x, act(t, x))) if callable(f) else f

        box = None if self.box is None else self.box.unconstrained()
        sde = SDE(
            close(self._drift),
            close(self._diffusion),
            covariance=close(self._covariance),
            dim=self._dim,
            arrays="torch",
        )
        problem = KolmogorovProblem(
            sde, self.terminal, self.horizon, box, killing=close(self._killing), source=close(self._running_cost)
        )
        return problem.handing("torch").stopped_in(self.targets)

    def _acting(self, policy: Policy) -> Policy:
        """The policy with its result checked."""
        m = self.controls.m

        def act(t: float, x: torch.Tensor) -> torch.Tensor:
            a = torch.as_tensor(policy(t, x), dtype=torch.float64)
            if tuple(a.shape) == tuple(x.shape[:-1]) and m == 1:
                a = a[..., None]
            if tuple(a.shape) != (*x.shape[:-1], m):
                raise InputError("policy", f"a result of shape {tuple(a.shape)}", f"shape {(*x.shape[:-1], m)}")
            return a

        return act

    def under(self, policy: Policy) -> "ControlProblem":
        """The same problem, targets included, with a policy put in and nothing left to choose.

        ``solve_hjb`` of it is what the policy costs, ``arrival`` the law of when and where its paths are stopped.

        Parameters
        ----------
        policy : callable
            ``policy(t, x)``, torch tensors in and out.

        Raises
        ------
        InputError
            Where there is an obstacle: when to stop is no part of a policy.
        """
        if self.obstacle is not None:
            raise InputError("obstacle", "a problem of stopping", "one without", "follow opt.policy yourself")
        act = self._acting(policy)

        def close(f: Any) -> Any:
            return (lambda t, x, a: f(t, x, act(t, x))) if callable(f) else f

        names = ("drift", "diffusion", "covariance", "running_cost", "killing")
        functions = {name: close(getattr(self, f"_{name}")) for name in names}
        return ControlProblem(**functions, **self._rest() | {"controls": Finite([[0.0]]), "targets": self.targets})

    def reaching(self, which: int = 0) -> "ControlProblem":
        """The problem whose value is the probability of being stopped in one target, before any other one.

        Nothing is paid but 1 in that target, and nothing is discounted; with controls left to choose it is the largest
        (sense "max") or least probability.

        Parameters
        ----------
        which : int
            Number of the target.

        Raises
        ------
        InputError
            If there is no such target.
        """
        if not 0 <= which < len(self.targets):
            raise InputError("which", which, f"one of {len(self.targets)} targets, from 0")
        targets = [Target(target.level, float(k == which)) for k, target in enumerate(self.targets)]
        final = None if self.horizon is None else (lambda x: 0.0 * x[..., 0])
        rest = self._rest() | {"terminal": final, "controls": self.controls, "targets": targets}
        return ControlProblem(self._drift, self._diffusion, covariance=self._covariance, **rest)

    def _rest(self) -> dict[str, Any]:
        """Arguments that are no coefficients."""
        names = ("terminal", "horizon", "sense", "dim", "ergodic")
        box: Any = self.box
        return {name: getattr(self, name) for name in names} | {"box": box}

    def hamiltonian(
        self, t: float, x: torch.Tensor, V: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """H(a) = b·∇V + ½ Σ:∇²V − cV + ℓ at points x (n, d), as a function of controls (n, m), times ``sign``."""

        def H(a: torch.Tensor) -> torch.Tensor:
            problem = self.closed_loop(lambda _t, _x: a)
            total: torch.Tensor = (problem.sde.drift(t, x) * gradient).sum(-1)
            if not problem.sde.noiseless:
                total = total + 0.5 * (problem.sde.covariance(t, x) * hessian).sum((-1, -2))
            if self._killing is not None:
                total = total - problem.rate(t, x) * V
            if self._running_cost is not None:
                total = total + problem.running(t, x)
            return self.sign * total

        return H

    def stopping(self, t: float, x: torch.Tensor) -> torch.Tensor:
        """The obstacle at points x, shape (...)."""
        if self.obstacle is None:
            raise InputError("obstacle", None, "an obstacle", "ControlProblem(..., obstacle=...)")
        value = self.obstacle(t, x)
        value = value if is_tensor(value) else torch.as_tensor(value, dtype=torch.float64)
        stopped: torch.Tensor = value.double() + 0.0 * x[..., 0]
        return stopped

    def __repr__(self) -> str:
        stop = ", obstacle" if self.obstacle is not None else ""
        return f"ControlProblem(dim={self.dim}, {self.controls!r}, horizon={self.horizon}, {self.box!r}{stop})"
