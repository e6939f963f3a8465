"""The domain: a box with one condition per face."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.arrays import as_numpy, as_points, is_tensor
from kolmo.errors import InputError, did_you_mean
from kolmo.problem.faces import WORDS, Face, Natural
from kolmo.problem.motion import Place, place

if TYPE_CHECKING:
    from kolmo.problem.sde import SDE


class Box:
    r"""A box :math:`\prod_i [l_i, u_i]` in :math:`R^d` with a condition on each face.

    Parameters
    ----------
    lower, upper : float, callable or tensor, or sequence of them, shape (d,)
        Corners; ±inf where the state space does not end (open faces only). A function ``lower(t)`` -> number (t a
        float) is a face that moves: a barrier. It may jump and bend, and give a tensor with gradients; so may a
        tensor, for a face that stands still at a place that is a parameter. Where two of them meet, everything has
        left. Neither open nor periodic faces move.
    boundary : str, Face, or list, default "open"
        One word for all faces, or a list with, per axis, a word or a ``(low, high)`` tuple. Words: "open" (cut of an
        unbounded problem), "natural" (degenerate end), "reflecting", "entrance" (never reached),
        "absorbing" (u = 0, or ``Absorbing(value)``), "constrained" (a control has to keep the state inside),
        "periodic"; also ``Robin(kappa, value)``.

    Raises
    ------
    InputError
        If lower >= upper, a word is unknown, the list does not fit the dimension, only one end of an axis is
        periodic, a face that is not open lies at infinity, or one that is open or periodic moves.

    References
    ----------
    W. Feller (1952), The parabolic differential equations and the associated semi-groups of transformations, Annals of
    Mathematics 55: natural, entrance and regular ends.

    Examples
    --------
    >>> Box(0.0, np.inf, boundary=[("natural", "open")])
    Box(0..inf natural|open)
    >>> Box(lambda t: t - 1.0, 1.0, "absorbing").at(0.25)
    Box(-0.75..1 absorbing)
    """

    def __init__(
        self,
        lower: float | Place | Sequence[float | Place] | np.ndarray,
        upper: float | Place | Sequence[float | Place] | np.ndarray,
        boundary: str | Face | Sequence[Any] = "open",
    ) -> None:
        bottom, top = _places(lower), _places(upper)
        low, high = (np.array([np.nan if _moves(end) else end for end in ends], float) for ends in (bottom, top))
        if low.shape != high.shape:
            raise InputError(
                "lower, upper", f"shapes {low.shape} and {high.shape}", "two numbers or two (d,) sequences"
            )
        self.moving: tuple[tuple[Place | None, Place | None], ...] = tuple(
            (a if _moves(a) else None, b if _moves(b) else None) for a, b in zip(bottom, top, strict=True)
        )
        told = [[place is None for place in pair] for pair in self.moving]
        still = np.array(told)
        if (np.isnan(low) & still[:, 0]).any() or (np.isnan(high) & still[:, 1]).any() or (low >= high).any():
            raise InputError(
                "lower, upper", f"{low.tolist()} and {high.tolist()}", "lower < upper on every axis", "swap them"
            )
        self._lower, self._upper = tuple(low.tolist()), tuple(high.tolist())
        self.faces = _faces(boundary, len(low))
        for axis, side, face in self.each():
            end = (low, high)[side][axis]
            if self.moving[axis][side] is not None and not face.closed:
                raise InputError(
                    f"boundary[{axis}][{side}]",
                    f"{face.word} at a place that moves",
                    "an absorbing, reflecting, elastic, natural or entrance face there",
                    "boundary='absorbing'" if face.cut else "",
                )
            if np.isinf(end) and not face.cut:
                raise InputError(
                    f"boundary[{axis}][{side}]", f"{face.word} at {end}", "an open face at infinity, or a finite end"
                )

    def each(self) -> list[tuple[int, int, Face]]:
        """All faces with their axis and side (0 below, 1 above)."""
        return [(axis, side, face) for axis, pair in enumerate(self.faces) for side, face in enumerate(pair)]

    def where(self, quality: str) -> np.ndarray:
        """Which faces have a quality (an attribute of :class:`Face`, such as "cut"), shape (d, 2)."""
        return np.array([[bool(getattr(face, quality)) for face in pair] for pair in self.faces])

    def has(self, quality: str) -> bool:
        """Whether any face has a quality, see ``where``."""
        return any(getattr(face, quality) for pair in self.faces for face in pair)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.faces)

    @property
    def moves(self) -> bool:
        """Whether a face is a function of time, or a tensor."""
        return any(end is not None for pair in self.moving for end in pair)

    @property
    def lower(self) -> tuple[float, ...]:
        """Lower corner; of faces that move see ``at``."""
        return self._at_rest(self._lower)

    @property
    def upper(self) -> tuple[float, ...]:
        """Upper corner; of faces that move see ``at``."""
        return self._at_rest(self._upper)

    def _at_rest(self, ends: tuple[float, ...]) -> tuple[float, ...]:
        # nothing may take a face that moves for one at rest: whoever asks for numbers does not know that there are such
        if self.moves:
            raise InputError(
                "box", "faces that move", "faces at rest, for this method", "box.at(t) is the box at a time"
            )
        return ends

    def onto(self, axis: int, side: int, x: np.ndarray) -> np.ndarray:
        """Points (..., d) moved along an axis onto one of its faces."""
        return np.where(np.arange(self.dim) == axis, (self.lower, self.upper)[side][axis], x)

    def ends(self, axis: int) -> tuple[float | Place, float | Place]:
        """Both ends of an axis as they were given: numbers, functions of time or tensors."""
        (low, high), still = self.moving[axis], (self._lower[axis], self._upper[axis])
        return still[0] if low is None else low, still[1] if high is None else high

    def at(self, t: float) -> "Box":
        """The box at a time: the same faces at rest, where they are then."""
        places = [[float(place(end, t)) for end in self.ends(axis)] for axis in range(self.dim)]
        low, high = np.array(places).T
        return Box(low, high, boundary=self.faces)

    @property
    def periodic(self) -> tuple[bool, ...]:
        """Per axis, whether it is periodic."""
        return tuple(pair[0].periodic for pair in self.faces)

    @classmethod
    def unbounded(cls, dim: int) -> "Box":
        """All of R^d."""
        return cls([-np.inf] * dim, [np.inf] * dim)

    @classmethod
    def covering(
        cls, sde: "SDE", points: Any, horizon: float, *, within: "Box | None" = None, tail: float = 1e-8
    ) -> "Box":
        """Box that the process started at the points leaves with about probability ``tail`` before the horizon.

        Estimated from an ensemble of simulated paths (fixed seed), so it costs little and proves nothing: the solver
        measures the effect of a cut by moving it.

        Parameters
        ----------
        sde : SDE
            The process.
        points : array_like, shape (..., d)
            Starting points.
        horizon : float
            Time T.
        within : Box, optional
            Its finite faces are real and stay where they are, with their conditions.
        tail : float, default 1e-8
            Probability of leaving, read off a Gaussian with the ensemble's spread.

        Examples
        --------
        >>> from kolmo import SDE
        >>> box = Box.covering(SDE(0.0, diffusion=1.0, dim=1), [0.0], 1.0, tail=1e-8)
        >>> 4.0 < box.upper[0] < 12.0
        True
        """
        from kolmo.problem.reach import reach

        cloud = reach(sde, points, horizon, within=within)
        low, high = cloud.interval(tail)
        if within is None:
            return cls(low, high)
        low = np.maximum(low, within.lower)
        high = np.minimum(high, within.upper)
        cut = within.where("cut")
        low, high = np.where(cut[:, 0], low, within.lower), np.where(cut[:, 1], high, within.upper)
        return cls(low, high, boundary=within.faces)

    def contains(self, x: Any) -> np.ndarray:
        """Whether points of shape ``(..., d)`` lie in the closed box; periodic axes contain everything."""
        x = as_numpy(as_points(x, self.dim))
        low, high = np.asarray(self.lower), np.asarray(self.upper)
        # rounding of coordinates as large as the ends of the box, or as the points where it has none
        slack = 1e-12 * np.maximum(
            np.abs(x), np.max([np.where(np.isfinite(v), np.abs(v), 0.0) for v in (low, high)], 0)
        )
        inside = (x >= low - slack) & (x <= high + slack)
        return np.asarray((inside | np.asarray(self.periodic)).all(-1))

    def unconstrained(self) -> "Box":
        """The same box as it is under a policy that keeps the state inside: constrained faces are natural ends."""
        pairs = [tuple(Natural() if face.constrains else face for face in pair) for pair in self.faces]
        lower, upper = zip(*(self.ends(axis) for axis in range(self.dim)), strict=True)
        return Box(lower, upper, boundary=pairs)

    def replace(self, lower: Any, upper: Any) -> "Box":
        """The same faces, at rest, at other ends."""
        self._at_rest(())
        return Box(lower, upper, boundary=self.faces)

    def __repr__(self) -> str:
        axes = []
        for axis, (low, high) in enumerate(self.faces):
            a, b = ("moving" if _moves(end) else f"{end:.6g}" for end in self.ends(axis))
            axes.append(f"{a}..{b} {low.word}" + ("" if low.word == high.word else f"|{high.word}"))
        return "Box(" + ", ".join(axes) + ")"


def _moves(end: Any) -> bool:
    """Whether the place of a face is no number: a function of time, or a tensor that asks for a gradient."""
    return callable(end) or (is_tensor(end) and end.requires_grad)


def _places(given: Any) -> list[Any]:
    """One place for each axis: a float, a function of time, or a tensor that asks for a gradient."""
    if callable(given):
        return [given]
    if is_tensor(given) and given.requires_grad:
        given = [given] if given.ndim == 0 else list(given)
    several = isinstance(given, list | tuple) and any(_moves(end) for end in given)
    values = np.atleast_1d(np.empty(0) if several else np.asarray(as_numpy(given), float))
    if values.ndim != 1:
        raise InputError("lower, upper", f"shape {values.shape}", "two numbers or two (d,) sequences")
    return list(given) if several else values.tolist()


# What textbooks on partial differential equations call a face.
OTHER_WORDS = {
    "dirichlet": "absorbing",
    "killed": "absorbing",
    "neumann": "reflecting",
    "no-flux": "reflecting",
    "robin": "Robin(kappa, value)",
    "free": "open",
}


def _face(spec: Any, axis: int, side: int) -> Face:
    if isinstance(spec, Face):
        return spec
    if isinstance(spec, str) and spec in WORDS:
        return WORDS[spec]()
    needed = f"one of {', '.join(WORDS)}, Absorbing(value) or Robin(kappa, value)"
    word = OTHER_WORDS.get(str(spec).lower())
    fix = f"what others call {spec} is {word!r} here" if word else did_you_mean(spec, WORDS)
    raise InputError(f"boundary[{axis}][{side}]", repr(spec), needed, fix)


def _faces(boundary: Any, dim: int) -> tuple[tuple[Face, Face], ...]:
    per_axis = [boundary] * dim if isinstance(boundary, (str, Face)) else list(boundary)
    if len(per_axis) != dim:
        raise InputError("boundary", f"{len(per_axis)} entries", f"one word, or one entry for each of the {dim} axes")
    faces = []
    for axis, spec in enumerate(per_axis):
        pair = (spec, spec) if isinstance(spec, (str, Face)) else tuple(spec)
        if len(pair) != 2:
            raise InputError(f"boundary[{axis}]", repr(spec), "a word or a (low, high) pair")
        low, high = _face(pair[0], axis, 0), _face(pair[1], axis, 1)
        if low.periodic != high.periodic:
            raise InputError(f"boundary[{axis}]", repr(spec), "both ends periodic, or none")
        faces.append((low, high))
    return tuple(faces)
