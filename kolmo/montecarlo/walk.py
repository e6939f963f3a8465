"""Paths that walk: positions, weights that are left, and what has been paid so far."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kolmo.montecarlo.faces import NEGLIGIBLE, Touch, conormal
from kolmo.montecarlo.methods import Increment, Method, applied, squared
from kolmo.montecarlo.model import Model
from kolmo.problem.events import Event
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.problem import Stop


@dataclass(frozen=True)
class Draws:
    """Random numbers of one fine step, for N paths.

    Attributes
    ----------
    dW : ndarray, shape (N, m)
        Brownian increment.
    signs : ndarray, shape (N, m, m)
        Antisymmetric signs.
    exponential, normal, uniform : ndarray, shape (N, d, 2)
        One of each per face, for the extremes of bridges and the instants at which they touch; then those of targets.
    fraction : float
        Instant in the step, as a part of it.
    aside : ndarray, shape (N, m)
        Brownian path there, less the line between the ends of the step.
    arrivals : ndarray, shape (N, J, K)
        Per kind of jumps sums of standard exponential numbers, increasing: there are as many jumps as are below rate
        times step.
    """

    dW: np.ndarray
    signs: np.ndarray
    exponential: np.ndarray
    normal: np.ndarray
    uniform: np.ndarray
    fraction: float
    aside: np.ndarray
    arrivals: np.ndarray


class Walk:
    """Paths that walk: positions, weights that are left, what has been paid so far, and by the source in a step."""

    def __init__(self, model: Model, method: Method, x: np.ndarray) -> None:
        self.model, self.method, self.x = model, method, x.copy()
        self.weight = np.ones(len(x))
        self.paid = np.zeros((len(x), model.columns or 1))
        self.earned = np.zeros_like(self.paid)
        self.stationary = model.problem.stationary

    def keep(self, which: np.ndarray) -> None:
        """Drop all paths but the given ones."""
        self.x, self.weight, self.paid = self.x[which], self.weight[which], self.paid[which]

    def pay(self, amount: np.ndarray, value: np.ndarray, which: Any = slice(None)) -> None:
        """Add amount × value; a path without weight is paid nothing, whatever the value."""
        value = value[:, None] if value.ndim == 1 else value
        self.paid[which] += np.where(amount[:, None] != 0.0, amount[:, None] * value, 0.0)

    def advance(self, t: float, end: float, h: float, draws: list[Draws]) -> None:
        """One step made of one fine one, or of two of which the coefficients are read once."""
        model, dt = self.model, h * len(draws)
        dW = draws[0].dW if len(draws) == 1 else draws[0].dW + draws[1].dW
        killing, source = model.problem.killing is not None, model.problem.source is not None
        x = model.readable(t, self.x, dt)
        c = model.rate(t, x) if killing else np.zeros(len(x))
        g = model.running(t, x) if source else None
        y, sigma = self.method.step(model, x, Increment(t, end, dt, dW, draws[0].signs))
        y = y + (self.x - x)
        moves = self._moves(t, x, h, draws)
        if model.bridged:
            middle = t if self.stationary else t + 0.5 * dt
            self._walk(Bridge(t, middle, end, dt, self._stops(y, sigma, draws), squared(sigma), c, g), draws)
        else:
            self.x = y
        self._jump(end, moves)
        self.x = model.wrap(model.mirror(self.x))
        survived = self.weight
        if killing:
            self.weight = survived * np.exp(-0.5 * (c + model.rate(end, model.fit(self.x))) * dt)
        if g is not None:
            self.pay(0.5 * dt * survived, g)
            self.pay(0.5 * dt * self.weight, model.running(end, model.fit(self.x)))

    def _stops(self, y: np.ndarray, sigma: np.ndarray, draws: list[Draws]) -> list[np.ndarray]:
        """Where the fine steps of a step that leads to y end."""
        return [y] if len(draws) == 1 else [0.5 * (self.x + y + applied(sigma, draws[0].dW - draws[1].dW)), y]

    def _moves(self, t: float, x: np.ndarray, h: float, draws: list[Draws]) -> np.ndarray | None:
        """Displacements by jumps, at the rates of the start; None without jumps."""
        if not self.model.problem.sde.kinds:
            return None
        rates, moves = self.model.jumps(t, x)
        counts = sum((d.arrivals < h * rates[..., None]).sum(-1) for d in draws)
        return np.asarray(np.einsum("nj,nji->ni", counts, moves))

    def _jump(self, t: float, moves: np.ndarray | None) -> None:
        """Let paths jump: onto faces at most, and paid for where the face absorbs."""
        if moves is None:
            return
        jumping = np.flatnonzero((moves != 0.0).any(1) & (self.weight > 0.0))
        aims = self.x[jumping] + moves[jumping]
        ends = self.model.fit(aims)
        self.x[jumping] = ends
        for axis, side, face in self.model.box.each():
            if isinstance(face, Absorbing):
                edge, inward = self.model.wall(axis, side)
                out = jumping[(inward * (aims[:, axis] - edge) <= 0.0) & (self.weight[jumping] > 0.0)]
                if len(out):
                    self.pay(self.weight[out], self.model.face(face.value, t, self.x[out]), out)
                    self.weight[out] = 0.0

    def happen(self, event: Event) -> None:
        """Let an event pay and move the paths: onto faces at most, and paid for where the face absorbs."""
        x = self.model.fit(self.x)
        moved, paid = self.model.happens(event, x)
        if paid is not None:
            self.pay(self.weight, paid)
        self.x = x
        self._jump(event.time, moved - x)
        self.x = self.model.wrap(self.x)

    def _walk(self, bridge: "Bridge", draws: list[Draws]) -> None:
        """Follow a bridge: push at reflecting and elastic faces, pay at absorbing ones."""
        faces = self.model.box.each()
        q = bridge.stops[-1].copy()
        for axis, side, face in faces:
            if face.turns:
                self._push(bridge, q, axis, side, face, [d.exponential[:, axis, side] for d in draws])
        self._inside_walls(q)
        self._absorb(bridge, q, [f for f in faces if isinstance(f[2], Absorbing)], draws[0])
        self.x = q

    def _inside_walls(self, q: np.ndarray) -> None:
        """Project on the walls that push: a second push may have left a corner."""
        for axis, side, face in self.model.box.each():
            if face.turns:
                edge, _ = self.model.wall(axis, side)
                q[:, axis] = np.maximum(q[:, axis], edge) if side == 0 else np.minimum(q[:, axis], edge)

    def _push(
        self, bridge: "Bridge", q: np.ndarray, axis: int, side: int, face: Any, exponentials: list[np.ndarray]
    ) -> None:
        """Skorokhod's reflection of q along Σn, by the depth that the minimum of the bridge reaches beyond the wall."""
        edge, inward = self.model.wall(axis, side)
        heights = [inward * (stop[:, axis] - edge) for stop in [self.x, *bridge.stops[:-1], q]]
        spread = 2.0 * bridge.S[:, axis, axis] * bridge.dt / len(exponentials)
        depth = np.zeros(len(q))
        for start, stop, exponential in zip(heights, heights[1:], exponentials, strict=False):
            lowest = 0.5 * (start + stop - np.sqrt((stop - start) ** 2 + spread * exponential))
            depth = np.maximum(depth, -lowest)
        hit = np.flatnonzero((depth > 0.0) & (self.weight > 0.0))
        if not len(hit):
            return
        wall = self.model.fit(q[hit])
        wall[:, axis] = edge
        S = self.model.covariance(bridge.t, wall)
        normal = S[:, axis, axis]
        q[hit] += inward * depth[hit, None] * conormal(S, axis)
        if isinstance(face, Robin):
            self._kill(bridge, face, hit, wall, 2.0 * depth[hit] / np.maximum(normal, 1e-300))

    def _kill(self, bridge: "Bridge", face: Robin, hit: np.ndarray, wall: np.ndarray, local_time: np.ndarray) -> None:
        """Elastic face: pay v at the rate of the local time, kill at the rate κ of it."""
        t = bridge.middle
        exponent = self.model.face(face.kappa, t, wall) * local_time
        share = np.divide(-np.expm1(-exponent), exponent, out=np.ones_like(exponent), where=exponent != 0.0)
        self.pay(self.weight[hit] * local_time * share, self.model.face(face.value, t, wall), hit)
        self.weight[hit] *= np.exp(-exponent)

    def _absorb(self, bridge: "Bridge", q: np.ndarray, faces: list[tuple[int, int, Any]], draw: Draws) -> None:
        """Pay at absorbing faces with the probability that the bridge touched them."""
        stops = self.model.problem.stops
        if not faces and not stops:
            return
        touches = []
        for axis, side, _ in faces:
            edge, inward = self.model.wall(axis, side)
            start, stop = np.maximum(inward * (self.x[:, axis] - edge), 0.0), inward * (q[:, axis] - edge)
            touches.append(Touch.of(start, stop, bridge.S[:, axis, axis] * bridge.dt))
        for which in stops:
            slopes = which.slopes(self.x)
            across = np.einsum("ni,nij,nj->n", slopes, bridge.S, slopes)
            start, stop = np.maximum(which.levels(self.x), 0.0), which.levels(self.model.fit(q))
            touches.append(Touch.of(start, stop, across * bridge.dt))
        # targets draw their numbers after those of the faces
        faces = [*faces, *((self.x.shape[1] + k, 0, which) for k, which in enumerate(stops))]
        for n, (touch, (axis, side, face)) in enumerate(zip(touches, faces, strict=True)):
            hit = np.flatnonzero((touch.chance > NEGLIGIBLE) & (self.weight > 0.0))
            if not len(hit):
                continue
            fraction = touch.instant(hit, draw.normal[hit, axis, side], draw.uniform[hit, axis, side])
            share = touch.chance[hit]
            for m, other in enumerate(touches):
                if m != n:
                    before = other.chance_before(hit, fraction)
                    # a path that starts in a corner leaves through the first of its faces
                    before = np.where(touch.start[hit] == 0.0, (other.start[hit] == 0.0) & (m < n), before)
                    share = share * (1.0 - before)
            self._exit(bridge, q, (axis, side, face), hit, fraction, self.weight[hit] * share)
        for touch in touches:
            self.weight = self.weight * (1.0 - touch.chance)

    def _exit(
        self,
        bridge: "Bridge",
        q: np.ndarray,
        which: tuple[int, int, Any],
        hit: np.ndarray,
        fraction: np.ndarray,
        amount: np.ndarray,
    ) -> None:
        """Pay the source until the exit and the face's value there."""
        axis, side, face = which
        spent, p = fraction * bridge.dt, self.x[hit]
        if bridge.g is not None:
            self.pay(amount * spent, bridge.g[hit], hit)
        amount = amount * np.exp(-bridge.c[hit] * spent)
        place = p + fraction[:, None] * (q[hit] - p)
        if axis >= self.x.shape[1]:
            self.pay(amount, self._paid_in(bridge, face, self.model.fit(place), fraction), hit)
            return
        gap = self.model.wall(axis, side)[0] - place[:, axis]
        place = self.model.fit(place + gap[:, None] * conormal(bridge.S[hit], axis))
        value = self.model.face(face.value, bridge.t, place)
        if callable(face.value) and not self.stationary:
            # functions take one time for all points: linear between the ends of the step
            along = fraction[:, None] if value.ndim == 2 else fraction
            value = value + along * (self.model.face(face.value, bridge.end, place) - value)
        self.pay(amount, value, hit)

    def _paid_in(self, bridge: "Bridge", stop: Stop, place: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """What a target pays about a place, at the point of its boundary along the slope of its level."""
        slope = stop.slopes(place)
        steep = np.maximum((slope**2).sum(-1), 1e-300)
        place = self.model.fit(place - (stop.levels(place) / steep)[:, None] * slope)
        first = stop.paid(0.0 if self.stationary else bridge.t, place)
        if self.stationary:
            return first
        return np.asarray(first + fraction * (stop.paid(bridge.end, place) - first))


class SampledWalk(Walk):
    r"""Euler's paths whose coefficients are read, and whose source is paid, at instants drawn at random.

    One uniform instant per fine step, the same for all paths; a step twice as long pays at both of its two, and reads
    its coefficients at one of them, drawn too. At that instant the path is where Brownian motion with the step's
    coefficients would be, and the source is paid with the probability that it is still alive there: the sum over
    steps is an unbiased estimate of the integral along Euler's paths in continuous time, however rough the source is
    in time and space.
    """

    def advance(self, t: float, end: float, h: float, draws: list[Draws]) -> None:
        """One step made of one fine one, or of two of which the coefficients are read once."""
        model, dt = self.model, h * len(draws)
        begins = [0.0 if self.stationary else t + n * h for n in range(len(draws))]
        instants = [a if self.stationary else a + d.fraction * h for a, d in zip(begins, draws, strict=True)]
        # the fraction of the last fine step, drawn anew every time, chooses without another number
        now = instants[int(draws[-1].fraction * 2.0**20) % len(draws)]
        x = model.fit(self.x)
        drift, sigma = model.drift(now, x), model.diffusion(now, x)
        S = squared(sigma)
        killing, rate = model.problem.killing is not None, np.zeros(len(x))
        W = np.zeros_like(draws[0].dW)
        paid = self.paid.copy()
        for n, (draw, instant) in enumerate(zip(draws, instants, strict=True)):
            spent = (n + draw.fraction) * h
            free = self.x + drift * spent + applied(sigma, W + draw.fraction * draw.dW + draw.aside)
            place, alive = self._somewhere(free, S, spent)
            amount = h * self.weight * alive
            if killing:
                c = model.rate(instant, place)
                amount *= np.exp(-(rate + c * draw.fraction * h))
                rate = rate + c * h
            self.pay(amount, model.running(instant, place))
            W = W + draw.dW
        self.earned = self.paid - paid
        moves = self._moves(now, x, h, draws)
        y = self.x + drift * dt + applied(sigma, W)
        if model.bridged:
            self._walk(Bridge(t, now, end, dt, self._stops(y, sigma, draws), S, rate / dt, None), draws)
        else:
            self.x = y
        if killing:
            self.weight = self.weight * np.exp(-rate)
        self._jump(end, moves)
        self.x = model.wrap(self.x)

    def _somewhere(self, free: np.ndarray, S: np.ndarray, spent: float) -> tuple[np.ndarray, np.ndarray]:
        """Where a path is inside a step, and the probability that it still is: folded at walls that push."""
        alive = np.ones(len(free))
        if not self.model.bridged:
            return self.model.fit(free), alive
        place = free.copy()
        for axis, side, face in self.model.box.each():
            edge, inward = self.model.wall(axis, side)
            height = inward * (place[:, axis] - edge)
            if face.imposed:
                start = np.maximum(inward * (self.x[:, axis] - edge), 0.0)
                alive = alive * (1.0 - Touch.of(start, height, S[:, axis, axis] * spent).chance)
            elif face.turns and (height < 0.0).any():
                place += 2.0 * inward * np.maximum(-height, 0.0)[:, None] * conormal(S, axis)
        return self.model.fit(place), alive


@dataclass(frozen=True)
class Bridge:
    """One step of a path as a Brownian bridge: from where the walk is over the stops (the last is its end).

    Attributes
    ----------
    t, middle, end, dt : float
        Start, an instant inside at which local time is paid for, end as coefficients see it, length.
    stops : list of ndarray, shape (N, d)
        Free path after equal parts of the step.
    S, c, g : ndarray
        Covariance rate, killing rate and source at the start.
    """

    t: float
    middle: float
    end: float
    dt: float
    stops: list[np.ndarray]
    S: np.ndarray
    c: np.ndarray
    g: np.ndarray | None
