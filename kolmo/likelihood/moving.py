"""First passages where bounds move or coefficients depend on time: one march, compared at its nodes, for all times."""

from collections.abc import Sequence

import numpy as np
import torch

from kolmo.errors import InputError
from kolmo.likelihood.base import log_of
from kolmo.likelihood.clock import FEWEST, Clock
from kolmo.likelihood.course import EARLY, NOISY, NUDGE, WIDTH, Process
from kolmo.likelihood.strip import Start, Stretch, in_time, log_first, march

# Times before a passage can be are taken to be this part of d².
SOONEST = 1e-6
# What may be left of trials whose time is missing, as a factor of e, and the longest time in units of that in the data.
LONGEST = 64.0


class Timed:
    """Passages of all conditions at one resolution; the same methods as those of passages at rest.

    Parameters
    ----------
    model : Model
        The model.
    conditions : sequence
        Its conditions.
    clocks : sequence of Clock
        Of each, with the same number of stretches.
    laws : pair of (points, weights)
        Of starts and delays, shapes (C, S) and (C, J).
    n : int
        Sines.
    reach : float or None
        Distance of the cut where there is one bound.
    horizon : float
        The last time.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        clocks: Sequence[Clock],
        laws: tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        n: int,
    ) -> None:
        count = 10 + n // 4
        (starts, weights), (self.delays, self.shares) = laws
        self.clocks = clocks
        steps = np.maximum(np.ceil(np.max([clock.counts(n) for clock in clocks], 0)).astype(int), FEWEST)
        times = [[clock.nodes(n, k, m) for k, m in enumerate(steps)] for clock in clocks]
        stacked = [torch.as_tensor(np.stack([row[k] for row in times])) for k in range(len(steps))]
        looks = [torch.as_tensor(np.concatenate([_inside(t) for t in row])) for row in times]
        courses = [p.course(t, count) for p, t in zip(processes, looks, strict=True)]
        if any(not bool((course.width > 0).all()) for course in courses):
            raise CrossedError
        cuts = np.cumsum([0, *(2 * steps + 1)])
        stretches = []
        for k, t in enumerate(stacked):
            mine = slice(cuts[k], cuts[k + 1])
            x, width, drift, noise = (
                torch.stack([getattr(course, name)[mine] for course in courses])
                for name in ("x", "width", "drift", "noise")
            )
            killing = None
            if courses[0].killing is not None:
                killing = torch.stack([course.killing[mine] for course in courses])  # type: ignore[index]
            stretches.append(Stretch.of(t, x, width, drift, noise, killing))
        z = torch.stack([p.inner(x, count) for p, x in zip(processes, starts, strict=True)])
        if not bool(((z > 0) & (z < 1)).all()):
            k = int(((z <= 0) | (z >= 1)).any(1).nonzero()[0])
            raise InputError("start", starts[k].tolist()[:3], "a start between the bounds")
        self.start = Start(z, weights, stretches[0])
        self.record = march(stretches, self.start, n)
        self.sides = processes[0].model.sides
        self._at_nodes = {s: self.start.log_first(s, self.record.tau[:, 1:]) for s in self.sides}
        self.width = torch.stack([course.width[-1] for course in courses])
        self._believe(n)

    def _believe(self, n: int) -> None:
        """Replace what early nodes say by a polynomial of the own time through zero and the first that are believed."""
        record = self.record
        tau, excess = record.tau.detach(), record.excess
        soon = torch.as_tensor([clock.soon(n) for clock in self.clocks])
        good = (tau[:, None] >= soon[:, None, None] * (1.0 - 1e-9)) & (record.noise < NOISY)
        first = good.int().argmax(-1).clamp(max=tau.shape[1] - EARLY)
        index = first[..., None] + torch.arange(EARLY)
        known = record.tau[:, None].expand(excess.shape).gather(2, index)
        values = excess.gather(2, index)
        self._first = first
        rates, self._rates = values / known, []
        for count in (EARLY - 1, EARLY):
            self._rates.append((known[..., :count], rates[..., :count]))
        early = torch.arange(tau.shape[1]) < first[..., None]
        own, (nodes, slopes) = record.tau[:, None].expand(excess.shape), self._rates[1]
        poly = own * through(nodes[..., None, :], slopes[..., None, :], own)
        self.excess = torch.where(early, poly, excess)

    def log_density(self, side: int, t: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logarithm of the density of the response time at times (N,), and what is known of its error in all."""
        s, over, _ = self._times(t, group)
        excess, scale, tau = self._between(s, group, self.excess[:, side], self.record.scale[:, side], self.record.tau)
        logs = excess + scale + self._free(side, tau, group)
        logs = logs - over * (0.5 * np.pi**2 / self.width[group] ** 2)[:, None]
        total = torch.logsumexp(logs + log_of(self.shares[group]), 1)
        parts = torch.exp((logs + log_of(self.shares[group]) - total[:, None]).detach())
        return total, float((parts * self._off(side, s, tau, group)).sum())

    def _times(self, t: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Times since the start (N, J) that are marched over, by how much they are later, and the soonest."""
        s = t[:, None] - self.delays[group]
        nearest = torch.as_tensor([clock.nearest for clock in self.clocks])
        first = self.record.t[:, 1] / self.record.tau[:, 1].detach()
        soonest = (SOONEST * nearest**2 * first)[group][:, None]
        last = self.record.t[:, -1][group][:, None]
        return torch.minimum(torch.maximum(s, soonest), last), (s - last).clamp(min=0.0), soonest

    def _free(self, side: int, tau: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        start = self.start
        d = start.z if side == 0 else 1.0 - start.z
        return torch.logsumexp(start.logs[group][:, None, :] + log_first(tau[..., None], d[group][:, None, :]), -1)

    def _off(self, side: int, s: torch.Tensor, tau: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """What is known of the errors of logarithms at times (N, J): rounding, and the polynomial of early times."""
        record = self.record
        with torch.no_grad():
            tau = tau.detach()
            first = self._first[:, side][group]
            begun = record.tau[group, first][:, None]
            near = torch.searchsorted(record.t[group], s.detach()).clamp(max=record.t.shape[1] - 1)
            noise = record.noise[:, side][group].gather(1, torch.maximum(near, first[:, None])).clamp(max=1.0)
            fine, coarse = (
                through(known[:, side][group][:, None, :], rates[:, side][group][:, None, :], tau)
                for known, rates in self._rates[::-1]
            )
            return noise + torch.where(tau < begun, tau * (fine - coarse).abs(), torch.zeros_like(tau))

    def survival(self, t: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Probability of no response up to times (N,)."""
        s, over, soonest = self._times(t, group)
        (mass,) = self._between(s, group, self.record.mass)
        mass = torch.where(s <= soonest, torch.zeros_like(mass), mass)
        left = torch.exp(mass - over * (0.5 * np.pi**2 / self.width[group] ** 2)[:, None]).clamp(max=1.0)
        return (self.shares[group] * left).sum(1)

    def chosen(self, side: int) -> torch.Tensor:
        """Probability of leaving through a bound, shape (C,)."""
        record, model_sides = self.record, self.sides
        flows = {s: torch.exp(self.excess[:, s, 1:] + record.scale[:, s, 1:] + self._at_nodes[s]) for s in model_sides}
        whole = torch.zeros(len(record.t), dtype=torch.float64)
        for first in np.unique(record.first):
            last = int(record.last[first])
            slopes, pieces = in_time(last - first + 1)
            t = record.t[:, first : last + 1]
            flow = torch.cat([torch.zeros_like(whole)[:, None], flows[side]], 1)[:, first : last + 1]
            whole = whole + ((flow * (t @ slopes.T)) @ pieces.T).sum(1)
        out = sum(flow[:, -1] for flow in flows.values())
        return whole + self.undecided * (flows[side][:, -1] / out).detach()

    @property
    def undecided(self) -> torch.Tensor:
        """What is left at the end, shape (C,)."""
        return torch.exp(self.record.mass[:, -1].detach())

    def _between(self, s: torch.Tensor, group: torch.Tensor, *tables: torch.Tensor) -> list[torch.Tensor]:
        """Values of tables (C, M) at times (N, J), by polynomials through nodes on one side of every break."""
        record = self.record
        t = record.t[group]
        at = (torch.searchsorted(t, s.detach(), right=True) - 1).clamp(0, t.shape[1] - 1)
        first, last = torch.as_tensor(record.first)[at], torch.as_tensor(record.last)[at]
        begin = torch.minimum(torch.maximum(at - WIDTH // 2, first), last - WIDTH + 1)
        index = begin[..., None] + torch.arange(WIDTH)
        rows = group[:, None, None]
        known = record.t[rows, index]
        apart = known[..., :, None] - known[..., None, :] + torch.eye(WIDTH, dtype=torch.float64)
        away = s[..., None] - known
        each = away[..., None, :].expand(apart.shape)
        each = torch.where(torch.eye(WIDTH, dtype=torch.bool), torch.ones_like(each), each)
        weights = each.prod(-1) / apart.prod(-1)
        return [(weights * table[rows, index]).sum(-1) for table in tables]


def _inside(t: np.ndarray) -> np.ndarray:
    """Nodes of a stretch, the first and the last moved inwards a little, in front of what jumps there."""
    away = NUDGE * (t[-1] - t[0])
    return np.concatenate([[t[0] + away * (t[0] > 0.0)], t[1:-1], [t[-1] - away]])


class CrossedError(Exception):
    """Bounds have met before the clock says so."""


def through(known: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The polynomial through values at points (..., m), at x (...)."""
    m = known.shape[-1]
    total = torch.zeros_like(x)
    for i in range(m):
        term = values[..., i]
        for j in range(m):
            if j != i:
                term = term * (x - known[..., j]) / (known[..., i] - known[..., j])
        total = total + term
    return total
