"""Faces: what happens at the ends of the axes of a box. Each kind says here what the other rooms ask of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kolmo.arrays import Array

FaceValue = float | Callable[[float, Array], Array] | Any
Closure = Literal["cut", "free", "slope", "wrap"]


@dataclass(frozen=True)
class Face:
    """Condition on one face of the box; ``Face()`` itself is never used, only its kinds below.

    Attributes
    ----------
    cut : bool
        Nothing ends here: the box does, and it may be widened; the only kind at infinity.
    periodic : bool
        The other end of the axis is the same face.
    imposed : bool
        u = ``value`` is prescribed; paths end here.
    elastic : bool
        The flux is tied to u by ``kappa`` and ``value``; paths end here at a rate.
    turns : bool
        Paths are turned back.
    degenerate : bool
        No noise crosses it.
    constrains : bool
        Controls are inadmissible that lead out.
    reached : bool
        Paths get here.
    closure : str
        How differences close: "cut" (narrowing, without the normal second derivative), "free" (one-sided), "slope"
        (the slope is known), "wrap".
    parity : int
        How a field goes on beyond: 1 evenly, -1 oddly, 0 not said.
    weak_order : float
        Of the treatment of simulated paths; infinite where nothing is to be treated.
    data : tuple of str
        Names of its numbers or functions.
    """

    cut: ClassVar[bool] = False
    periodic: ClassVar[bool] = False
    imposed: ClassVar[bool] = False
    elastic: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    degenerate: ClassVar[bool] = False
    constrains: ClassVar[bool] = False
    reached: ClassVar[bool] = True
    closure: ClassVar[Closure] = "free"
    parity: ClassVar[int] = 0
    weak_order: ClassVar[float] = float("inf")
    data: ClassVar[tuple[str, ...]] = ()

    @property
    def word(self) -> str:
        """The word that names this kind of face."""
        return type(self).__name__.lower()

    @property
    def exits(self) -> bool:
        """Whether paths end here."""
        return self.imposed or self.elastic

    @property
    def closed(self) -> bool:
        """Whether nothing lies beyond."""
        return not (self.cut or self.periodic)

    @property
    def unread(self) -> bool:
        """Whether coefficients are not read on it, where they may be infinite."""
        return self.imposed or not self.reached


@dataclass(frozen=True)
class Open(Face):
    """Cut of an unbounded problem: nothing is imposed, and the effect of the cut counts in the error estimate."""

    cut: ClassVar[bool] = True
    closure: ClassVar[Closure] = "cut"


@dataclass(frozen=True)
class Natural(Face):
    """Degenerate end of the state space: no noise across it, drift not pointing out; the equation itself holds."""

    degenerate: ClassVar[bool] = True
    weak_order: ClassVar[float] = 0.5


@dataclass(frozen=True)
class Constrained(Natural):
    """End that a controlled state may not pass: only controls that do not lead out are admissible there (Soner 1986).

    For ``control.ControlProblem`` alone: without a control such an end is natural, or something happens there.
    """

    constrains: ClassVar[bool] = True


@dataclass(frozen=True)
class Reflecting(Face):
    r"""Reflecting wall: :math:`n\cdot\Sigma\nabla u = 0`."""

    turns: ClassVar[bool] = True
    closure: ClassVar[Closure] = "slope"
    parity: ClassVar[int] = 1
    weak_order: ClassVar[float] = 1.0


@dataclass(frozen=True)
class Entrance(Face):
    r"""End that the process leaves at once and never reaches: drift to infinity, inwards.

    With drift a/δ + … at the distance δ, a ≥ ½Σ (a Bessel process of dimension 1 + 2a/Σ ≥ 2 at 0): no condition is
    needed, and solutions are even in the distance. Coefficients may be infinite there; they are read beside it.
    """

    reached: ClassVar[bool] = False
    closure: ClassVar[Closure] = "slope"
    parity: ClassVar[int] = 1
    weak_order: ClassVar[float] = 0.5


@dataclass(frozen=True)
class Periodic(Face):
    """The two ends of the axis are the same point."""

    periodic: ClassVar[bool] = True
    closure: ClassVar[Closure] = "wrap"


@dataclass(frozen=True, eq=False)
class Absorbing(Face):
    r"""Absorbing face: :math:`u = v(t, x)`.

    Parameters
    ----------
    value : float or callable, default 0
        Number, tensor, or ``value(t, x)`` -> ``(...)`` (``(..., k)`` for k columns).

    Examples
    --------
    >>> Absorbing(1.0)
    Absorbing(value=1.0)
    """

    imposed: ClassVar[bool] = True
    parity: ClassVar[int] = -1
    weak_order: ClassVar[float] = 1.0
    data: ClassVar[tuple[str, ...]] = ("value",)

    value: FaceValue = 0.0


@dataclass(frozen=True, eq=False)
class Robin(Face):
    r"""Elastic face: :math:`\tfrac12 n\cdot\Sigma\nabla u + \kappa u = v`, n the outward normal.

    Parameters
    ----------
    kappa : float or callable
        Rate κ, number or ``kappa(t, x)`` -> ``(...)``.
    value : float or callable, default 0
        Right-hand side v, number or ``value(t, x)`` -> ``(...)`` (``(..., k)`` for k columns).

    References
    ----------
    K. Itô and H. P. McKean (1965), Diffusion Processes and their Sample Paths: elastic Brownian motion.

    Examples
    --------
    >>> Robin(2.0)
    Robin(kappa=2.0, value=0.0)
    """

    elastic: ClassVar[bool] = True
    turns: ClassVar[bool] = True
    closure: ClassVar[Closure] = "slope"
    parity: ClassVar[int] = 1
    weak_order: ClassVar[float] = 1.0
    data: ClassVar[tuple[str, ...]] = ("kappa", "value")

    kappa: FaceValue
    value: FaceValue = 0.0


WORDS: dict[str, Callable[[], Face]] = {
    "open": Open,
    "natural": Natural,
    "constrained": Constrained,
    "reflecting": Reflecting,
    "entrance": Entrance,
    "absorbing": Absorbing,
    "periodic": Periodic,
}
