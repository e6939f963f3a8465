"""The one time loop: backwards from T to 0, and its transpose forwards from 0 to T."""

import copy
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.arrays import Array, fresh, is_tensor
from kolmo.errors import InputError
from kolmo.grid.times import ROUNDING, find, longest_step, merged, stepped
from kolmo.schemes.crossing import Crossing
from kolmo.schemes.generator import Generator, Semi
from kolmo.steppers.base import Operator, Step, Stepper, mask_of

if TYPE_CHECKING:
    from kolmo.problem.events import Event

Callback = Callable[[float, Any], Any]

# A stage that falls on a breakpoint from below is moved into its interval by this fraction of the step.
INSIDE = 1e-10
# Numbers computed (state times steps) between two places where Ctrl-C is seen: some tenths of a second.
UNINTERRUPTED = 10_000_000
# Coefficients kept at hand; enough for all stages of a step and its neighbours.
KEPT = 8


@dataclass(frozen=True)
class StepPlan:
    """One step from the time node ``start`` down to the node ``end``, and the instants at which it needs coefficients.

    ``dt`` is their distance to 12 digits: equal steps share one number.
    """

    start: float
    end: float
    dt: float
    instants: tuple[float, ...]


def stretches(
    plans: Sequence[StepPlan], stops: Container[float] = (), longest: int | None = None
) -> Iterator[Sequence[StepPlan]]:
    """Consecutive steps that are equal, cut after ``stops`` (time nodes) and ``longest`` steps."""
    begin = 0
    for end in range(1, len(plans) + 1):
        last = plans[end - 1]
        if (
            end == len(plans)
            or end - begin == longest
            or (plans[end].dt, plans[end].instants) != (last.dt, last.instants)
            or last.end in stops
        ):
            yield plans[begin:end]
            begin = end


@dataclass
class Run:
    """What a march left behind.

    Attributes
    ----------
    state : array, shape (size, k)
        State at the last time reached.
    time : float
        That time.
    saved : list of (time, state)
        States at the save times, in the order reached.
    interrupted : bool
        Whether Ctrl-C or the callback stopped it.
    late : bool
        Whether it was stopped because its time is over.
    """

    state: Array
    time: float
    saved: list[tuple[float, Array]] = field(default_factory=list)
    interrupted: bool = False
    late: bool = False


def time_nodes(
    intervals: Sequence[tuple[float, float]],
    steps: int,
    save: Sequence[float] = (),
    short: Sequence[tuple[float, float, float]] = (),
    growth: float | None = None,
) -> np.ndarray:
    """Time nodes, increasing: about ``steps`` equal steps in all, so that no step straddles a breakpoint or save time.

    ``short``: stretches (start, end, length) with steps of that length at most. ``growth``: of levels that are
    compared, so many times the steps of the first one; each piece between breakpoints has some on that, and its number
    grows too.

    Examples
    --------
    >>> time_nodes([(0.0, 1.0)], 4, save=[0.3]).round(3).tolist()
    [0.0, 0.15, 0.3, 0.533, 0.767, 1.0]
    >>> time_nodes([(0.0, 1.0)], 2, short=[(0.5, 0.6, 0.05)]).round(3).tolist()
    [0.0, 0.5, 0.55, 0.6, 1.0]
    >>> time_nodes([(0.0, 0.2), (0.2, 1.0)], 6, growth=1.5).round(3).tolist()
    [0.0, 0.033, 0.067, 0.1, 0.133, 0.167, 0.2, 0.333, 0.467, 0.6, 0.733, 0.867, 1.0]
    """
    start, end = intervals[0][0], intervals[-1][1]
    fixed = merged([start, end, *[a for a, _ in intervals], *[t for a, b, _ in short for t in (a, b)]], save)
    nodes = [np.array([start])]
    for a, b in pairwise(fixed):
        lengths = [(end - start) / steps, *[c for p, q, c in short if p <= a and b <= q]]
        if growth is not None and len(intervals) > 1:
            lengths += [longest_step(p, q, growth) for p, q in intervals if p <= a and b <= q]
        nodes.append(stepped(a, b, min(lengths), growth or 1.0))
    return np.concatenate(nodes)


class March:
    """A generator, a stepper and time nodes: the linear map from terminal data to the state at time 0.

    Parameters
    ----------
    generator : Generator
        The semi-discrete equation.
    stepper : Stepper
        The one-step method.
    times : ndarray
        Time nodes from 0 to T, increasing.
    like : tensor, optional
        March in torch, on its device.
    """

    def __init__(self, generator: Generator, stepper: Stepper, times: np.ndarray, like: Array | None = None) -> None:
        self.generator, self.stepper, self.times = generator, stepper, np.asarray(times, dtype=float)
        self.like = like if like is not None else np.zeros(())
        self.fixed = generator.fixed if generator.fixed.any() else None
        self.mask = mask_of(self.fixed)
        self._semis: OrderedDict[float, tuple[Semi, Operator, Array]] = OrderedDict()
        self._steps: OrderedDict[Any, Step] = OrderedDict()
        self._doubled = False
        self.events = self._placed()

    def _placed(self) -> "dict[float, Event]":
        """Events by the time node at which they come."""
        placed: dict[float, Event] = {}
        for event in self.generator.problem.events if len(self.times) else ():
            node = find(self.times, event.time)
            if node is None:
                needed = "time nodes of the discretization at all of them"
                raise InputError("events", f"one at t = {event.time:g}", needed, "plan or solve this problem itself")
            placed[float(self.times[node])] = event
        return placed

    @cached_property
    def plans(self) -> list[StepPlan]:
        """Steps from T down to 0."""
        breaks = np.array(sorted(self.generator.problem.sde.breakpoints))
        plans = []
        ends = self.times[::-1]
        interval_of: dict[int, float] = {}
        layers = np.searchsorted(breaks, 0.5 * (ends[1:] + ends[:-1])).tolist()
        for layer, (start, end) in zip(layers, pairwise(ends.tolist()), strict=True):
            if self.generator.autonomous:
                if layer not in interval_of:
                    edges = np.concatenate([[0.0], breaks, [self.times[-1]]])
                    interval_of[layer] = float(0.5 * (edges[layer] + edges[layer + 1]))
                instants = (interval_of[layer],) * len(self.stepper.nodes)
            else:
                at_break = len(breaks) > 0 and float(np.abs(breaks - start).min()) <= ROUNDING * self.times[-1]
                top = start - INSIDE * (start - end) if at_break else start
                instants = tuple(float(min(max(start - c * (start - end), end), top)) for c in self.stepper.nodes)
            # equal steps share one number, so that a prepared step is found again
            plans.append(StepPlan(start, end, float(f"{start - end:.12g}"), instants))
        return plans

    def ingredients(self, instant: float) -> tuple[Semi, Operator, Array]:
        """Semi-discrete equation, operator and total load (absorbing values included) at an instant."""
        if instant not in self._semis:
            semi = self.generator.at(instant, self.like if is_tensor(self.like) else None)
            operator = self._known(semi) or Operator(semi.stencil, semi.a, self.fixed, mask=self.mask)
            self._semis[instant] = (semi, operator, self._loaded(semi))
            # operators with jumps are large: those of many layers are not kept either
            while len(self._semis) > KEPT and not (self.generator.autonomous and not self.generator.problem.sde.kinds):
                self._semis.popitem(last=False)
        return self._semis[instant]

    def _known(self, semi: Semi) -> Operator | None:
        """The operator of the latest instant, where only loads and boundary values have changed since."""
        if not self._semis or is_tensor(semi.a):
            return None
        _, last, _ = next(reversed(self._semis.values()))
        same = last.stencil is semi.stencil and np.array_equal(last.a, semi.a)
        return last if same else None

    def holding(self, semis: Mapping[float, tuple[Semi, Operator]], *, doubled: bool = False) -> "March":
        """The same steps, with semi-discrete equations that were assembled elsewhere.

        ``doubled``: on fields stacked with their tangents, in NumPy, by dual operators.
        """
        twin = copy.copy(self)
        if doubled:
            twin.fixed = None if self.fixed is None else np.concatenate([self.fixed, self.fixed])
            twin.mask, twin.like, twin._doubled = mask_of(twin.fixed), np.zeros(()), True
        twin._semis, twin._steps = OrderedDict(), OrderedDict()
        for instant, (semi, operator) in semis.items():
            twin._semis[instant] = (semi, operator, twin._loaded(semi))
        return twin

    def _loaded(self, semi: Semi) -> Array:
        """Total load: with what absorbing values put in."""
        return semi.load if self.fixed is None else semi.load + semi.stencil.apply(semi.a, semi.boundary)

    def prepared(self, plan: StepPlan) -> tuple[Step, list[Array]]:
        """The prepared step and its loads, one per node."""
        parts = [self.ingredients(t) for t in plan.instants]
        # of the operators, not of the instants: where these are the same at other times, so is the step
        key = (plan.dt, tuple(id(p[1]) for p in parts))
        if key not in self._steps:
            self._steps[key] = self.stepper.prepare([p[1] for p in parts], plan.dt)
            while len(self._steps) > (4 if self.stepper.implicit else 1):
                self._steps.popitem(last=False)
        return self._steps[key], [p[2] for p in parts]

    def boundary(self, t: float) -> Array:
        """Values at absorbing nodes at a time; no part of a flow between free states, whose tangents they are not."""
        if self._doubled:
            return np.zeros((2 * self.generator.grid.size, 1))
        return self.generator.boundary(t, self.generator.nodes(self.like))

    def crossing(self, t: float, like: Array | None = None) -> Crossing | None:
        """What happens at a time node, or nothing; ``like``: in whose library, with gradients in torch."""
        if t not in self.events:
            return None
        return Crossing(self.generator, self.events[t], self.like if like is None else like)

    def crossed(self, u: Array, t: float) -> Array:
        """The free part of the state before what happens at a time node, from that after it."""
        crossing = self.crossing(t)
        return u if crossing is None else self.without_boundary(crossing.apply(self.with_boundary(u, t)))

    def without_boundary(self, u: Array) -> Array:
        """The state with zeros at absorbing nodes."""
        return u if self.mask is None else u * self.mask.like(u)

    def with_boundary(self, u: Array, t: float) -> Array:
        """The state with the absorbing values put in."""
        return u if self.fixed is None else self.without_boundary(u) + self.boundary(t)

    def backward(
        self,
        terminal: Array,
        *,
        save: Sequence[float] = (),
        callback: Callback | None = None,
        progress: bool = False,
        stop: Callable[[], bool] | None = None,
    ) -> Run:
        """March terminal data of shape (size, k) from T to 0.

        ``stop()`` is asked every some tenths of a second; where it is true the march ends, and the run is late.
        """
        wanted = {float(self.times[i]) for t in save if (i := find(self.times, t)) is not None}
        u = self.without_boundary(terminal)
        run = Run(u, float(self.times[-1]))
        if run.time in wanted:
            run.saved.append((run.time, terminal))
        try:
            longest = 1 if callback is not None or progress else _longest(u)
            for stretch in _progress(list(stretches(self.plans, wanted | self.events.keys(), longest)), progress):
                step, loads = self.prepared(stretch[0])
                u = step.apply_many(u, loads, len(stretch))
                plan = stretch[-1]
                t = plan.end
                run.state, run.time = u, t
                if t in wanted:
                    run.saved.append((t, self.with_boundary(u, t)))
                if stop is not None and plan is not self.plans[-1] and stop():
                    run.late = True
                    break
                if callback is not None and callback(t, self.generator.shaped(self.with_boundary(u, t))):
                    run.interrupted = plan is not self.plans[-1]
                    break
                u = self.crossed(u, t)
        except KeyboardInterrupt:
            run.interrupted = True
        run.state = self.with_boundary(run.state, run.time)
        return run

    def descend(self, u: Array, plans: Sequence[StepPlan], stages: bool = False) -> tuple[Array, list[Array]]:
        """Take some consecutive steps from the free part u; the last state, and what ``gradient`` needs of the steps.

        That is the state before each step, or, with ``stages``, the states of its stages where the stepper has them.
        """
        kept: list[Array] = []
        for stretch in stretches(plans, longest=_longest(u)):
            step, loads = self.prepared(stretch[0])
            u = step.apply_many(u, loads, len(stretch), kept, stages)
        return u, kept

    def forward(
        self,
        p: Array,
        *,
        observe: Callable[[float, Array, list[Array]], None] | None = None,
        arrive: Callable[[float, Array, Array, Crossing], None] | None = None,
    ) -> Array:
        """The transposed march: weights p of shape (size, k) on the state at time 0, pushed to time T.

        ``observe(t, p, loads)`` sees, after each step, the time reached, the weights there, and the derivatives with
        respect to the loads at the nodes of the step (multiplied by the loads and summed they give its contribution).
        ``arrive(t, before, after, crossing)`` sees, before that, the weights before an event and, nodes on absorbing
        faces included, after it.
        """
        p = self.without_boundary(p)
        for plan in reversed(self.plans):
            step, _ = self.prepared(plan)
            p, loads = step.apply_transposed(p)
            crossing = self.crossing(plan.start)
            if crossing is not None:
                before, after = p, crossing.apply_transposed(p)
                p = self.without_boundary(after)
                if arrive is not None:
                    arrive(plan.start, before, after, crossing)
            if observe is not None:
                observe(plan.start, p, loads)
        return p

    def gradient(
        self, kept: list[Array], p: Array, plans: Sequence[StepPlan] | None = None
    ) -> tuple[Array, dict[float, Array], dict[float, Array], dict[float, Array]]:
        """Derivatives of ⟨p, u(0)⟩: with respect to the terminal data, and per instant to numbers, load and boundary.

        Parameters
        ----------
        kept : list of array
            As collected by ``descend``; consumed.
        p : array, shape (size, k)
            Weights on the free part of the state at time 0 (at the end of the last of the ``plans``).
        plans : sequence of StepPlan, optional
            The steps taken; None: all.
        """
        p = self.without_boundary(p)
        numbers: dict[float, Array] = {}
        loads: dict[float, Array] = {}
        values: dict[float, Array] = {}
        for stretch in reversed(list(stretches(self.plans if plans is None else plans, longest=_longest(p)))):
            plan = stretch[0]
            step, node_loads = self.prepared(plan)
            p, load_adjoints, number_adjoints = step.pullback_many(kept.pop(), node_loads, p)
            for instant, q, derivative in zip(plan.instants, load_adjoints, number_adjoints, strict=True):
                semi, _, _ = self.ingredients(instant)
                q = self.without_boundary(q)
                _accumulate(numbers, instant, derivative)
                _accumulate(loads, instant, q)
                if self.mask is not None:
                    # the load holds Q times the absorbing values
                    _accumulate(numbers, instant, semi.stencil.pullback(q, semi.boundary))
                    back = semi.stencil.apply_transposed(semi.a, q)
                    _accumulate(values, instant, back - back * self.mask.like(back))
        return p, numbers, loads, values


def _longest(u: Array) -> int:
    """Steps of a state to take at once."""
    return max(1, UNINTERRUPTED // max(int(math.prod(u.shape)), 1))


def _accumulate(total: dict[float, Array], key: float, value: Array) -> None:
    """Add in place, to an array of its own: fresh ones of this size would cost more than the sum."""
    if key not in total:
        total[key] = fresh(value)
    else:
        total[key] += value


def _progress(plans: list[Sequence[StepPlan]], progress: bool) -> Iterator[Sequence[StepPlan]]:
    """The steps, with a progress bar on stderr if asked for."""
    if not progress:
        return iter(plans)
    from tqdm.auto import tqdm

    return iter(tqdm(plans, desc="march", unit="step", file=sys.stderr, leave=False))
