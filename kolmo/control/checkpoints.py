"""Which states a gradient keeps and which it computes again: the binomial schedule (Griewank & Walther 2000)."""

import math
from dataclasses import dataclass
from functools import lru_cache

from kolmo.errors import InputError
from kolmo.shown import Shown
from kolmo.steppers.base import Stepper

# Bytes that the states of stages may take: kept with every state, they save the gradient a third of its time.
MOST_STAGES = 2**27
# No step is taken again more often: each time is one level of nested checkpoints.
MOST_REPEATS = 20


def reach(checkpoints: int, repeats: int) -> int:
    """Most steps that so many kept states reverse when no step is taken more than ``repeats`` times again.

    Examples
    --------
    >>> reach(4, 0), reach(4, 1), reach(4, 2)
    (4, 10, 20)
    """
    return math.comb(checkpoints + repeats, repeats + 1)


def split(steps: int, checkpoints: int) -> int:
    """Where the schedule sets its next checkpoint: after so many of the steps.

    The steps before it are forgotten, to be taken again from their start once those after it are reversed with one
    state less.

    Examples
    --------
    >>> split(10, 4)
    4
    """
    repeats = 0
    while reach(checkpoints, repeats) < steps:
        repeats += 1
    return min(reach(checkpoints, repeats - 1), steps - reach(checkpoints - 1, repeats - 1))


@lru_cache(maxsize=4096)
def repeated(steps: int, checkpoints: int) -> int:
    """Steps taken again by the schedule: at most 4 % more than the fewest possible (compared to 150 steps).

    Examples
    --------
    >>> repeated(10, 10), repeated(10, 4), repeated(10, 2)
    (0, 9, 44)
    """
    total = 0
    while steps > checkpoints:
        left = split(steps, checkpoints)
        total += left + repeated(left, checkpoints)
        steps, checkpoints = steps - left, checkpoints - 1
    return total


def keeps_stages(steps: int, checkpoints: int | None, stepper: Stepper, state_bytes: int) -> bool:
    """Whether the states of stages are kept too: where every state is, and memory for it is no question."""
    return checkpoints is None and stepper.kept > 1 and steps * stepper.kept * state_bytes <= MOST_STAGES


@dataclass(frozen=True, repr=False)
class GradientMemory(Shown):
    """What a gradient keeps at once, and what it costs: stated before anything runs.

    Attributes
    ----------
    steps : int
        Time steps.
    checkpoints : int
        States kept at most at once.
    repeated : int
        Steps taken again, besides those of the value and of its transpose.
    states : int
        States kept for each step: its first, or those of all its stages where they take less than 134 MB together.
    state_bytes, coefficient_bytes : int
        Bytes of one state; and of the coefficients of one step with all that torch keeps to differentiate them (all
        steps together, where the coefficients do not depend on time).
    bytes : int
        Peak of what is kept. Working space of a single step and factors of its matrices come on top.

    Notes
    -----
    The binomial schedule of Griewank and Walther (2000), ACM Transactions on Mathematical Software 26.

    Examples
    --------
    >>> import kolmo
    >>> from kolmo import control
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1, arrays="torch")
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0, kolmo.Box(-6.0, 6.0))
    >>> recipe = kolmo.solve(problem, grid=61, steps=300, stepper="rk4").discretization
    >>> few = control.gradient_memory(problem, recipe, checkpoints=9)
    >>> few.checkpoints, few.repeated > 300, few.bytes < control.gradient_memory(problem, recipe).bytes
    (9, True, True)
    """

    steps: int
    checkpoints: int
    repeated: int
    states: int
    state_bytes: int
    coefficient_bytes: int
    bytes: int

    @classmethod
    def of(
        cls,
        steps: int,
        checkpoints: int | None,
        stepper: Stepper,
        state_bytes: int,
        coefficient_bytes: int,
        constant: bool,
    ) -> "GradientMemory":
        """Cost of a schedule; None keeps every state.

        Raises
        ------
        InputError
            For checkpoints that are too few for the steps.
        """
        c = steps if checkpoints is None else min(check(checkpoints, steps), steps)
        states = stepper.kept if keeps_stages(steps, checkpoints, stepper, state_bytes) else 1
        held = _held(steps, c, states * state_bytes, 0 if constant else coefficient_bytes)
        total = held + (coefficient_bytes if constant else 0)
        return cls(steps, c, repeated(steps, c), states, state_bytes, coefficient_bytes, total)

    @classmethod
    def within(
        cls, budget: float, steps: int, stepper: Stepper, state_bytes: int, coefficient_bytes: int, constant: bool
    ) -> "GradientMemory":
        """The schedule with the fewest repeated steps whose peak is within a budget in bytes.

        Raises
        ------
        InputError
            For a budget that no schedule meets.
        """

        def cost(c: int) -> GradientMemory:
            return cls.of(steps, c, stepper, state_bytes, coefficient_bytes, constant)

        low, high = fewest(steps), steps
        if cost(low).bytes > budget:
            raise InputError("memory", f"{budget:g} bytes", f"at least {cost(low).bytes} bytes for this discretization")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle).bytes <= budget else (low, middle - 1)
        return cost(low)

    def __str__(self) -> str:
        return (
            f"{self.bytes / 1e6:.3g} MB: {self.checkpoints} of {self.steps} states kept, "
            f"{self.repeated} steps taken again"
        )


def fewest(steps: int) -> int:
    """Fewest checkpoints that do.

    Examples
    --------
    >>> [fewest(n) for n in (1, 20, 200, 2000)]
    [1, 2, 3, 4]
    """
    checkpoints = 1
    while reach(checkpoints, MOST_REPEATS) < steps:
        checkpoints += 1
    return checkpoints


def check(checkpoints: int, steps: int) -> int:
    """The number of checkpoints, if it will do."""
    needed = fewest(steps)
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < needed:
        raise InputError(
            "checkpoints", checkpoints, f"a whole number of states to keep, at least {needed} for {steps} steps"
        )
    return checkpoints


def _held(steps: int, checkpoints: int, state: int, coefficients: int) -> int:
    """Peak in bytes: ``checkpoints`` states, or fewer and the coefficients of the steps that are open."""
    if steps <= checkpoints:
        return steps * (state + coefficients)
    left = split(steps, checkpoints)
    after = state + _held(steps - left, checkpoints - 1, state, coefficients)
    return max(_held(left, checkpoints, state, coefficients), after)
