"""Loss surfaces over planes in weight space: noise-free and noise-averaged, with standard errors, by tolerance."""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from kolmo import files
from kolmo.errors import InputError
from kolmo.files import schema
from kolmo.landscape.draws import Draws, standard_error
from kolmo.landscape.moving import Mover, plane_axes
from kolmo.landscape.placement import place
from kolmo.landscape.planes import Plane
from kolmo.landscape.state import Evaluation, Loss, kept
from kolmo.shown import Shown

_SAVE_EVERY = 20.0  # seconds between two writings of what is there so far


@dataclass(frozen=True, eq=False)
class Surface(Shown):
    r"""Losses :math:`\ell_j(\theta(\alpha))` over a plane, draw by draw j.

    Attributes
    ----------
    axes : tuple of ndarray, shape (n_i,)
        Coordinates along each direction; fields have ``indexing="ij"``.
    values : dict of str to ndarray, shape ``(*shape, draws)``
        Every quantity that the loss returned, for every draw; the first is the one that `mean` shows.
    evaluated : ndarray of bool, shape ``shape``
        Where the loss was evaluated; elsewhere it was interpolated.
    plane : dict
        How the plane was made, with Gram matrix, seed and fingerprint.
    settings : dict
        Draws, seed, mode, treatment of batch normalisation, tolerance, and the losses of the first draw at the origin.
    interpolation_error : dict of str to float
        For each quantity, 2.5 times the largest error at cells that were evaluated only to check the interpolation; 0
        on a full grid.
    random : bool
        Whether different seeds gave different losses, at the origin or anywhere.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein (2018), Visualizing the loss landscape of neural nets.

    Examples
    --------
    >>> from kolmo import landscape
    >>> model = nn.Linear(2, 1, bias=False)
    >>> plane = landscape.random_plane(model, directions=1)
    >>> cut = landscape.surface(lambda f: f.weight.square().sum(), model, plane, points=5)
    >>> cut.mean.shape, cut.standard_error.max()
    ((5,), np.float64(0.0))
    """

    axes: tuple[np.ndarray, ...]
    values: dict[str, np.ndarray]
    evaluated: np.ndarray
    plane: dict[str, Any]
    settings: dict[str, Any]
    interpolation_error: dict[str, float] = field(default_factory=dict)
    random: bool = False

    @property
    def name(self) -> str:
        """Name of the quantity that `mean` shows."""
        return next(iter(self.values))

    @property
    def draws(self) -> int:
        """Number of noise draws."""
        return int(self.values[self.name].shape[-1])

    @property
    def mean(self) -> np.ndarray:
        """Mean over the draws, of shape ``shape``."""
        return self.values[self.name].mean(-1)  # type: ignore[no-any-return]

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean, of shape ``shape``; without randomness 0, and NaN for a single random draw."""
        found = self.values[self.name]
        if not self.random:
            return np.zeros(found.shape[:-1])
        return np.asarray(standard_error(found, -1))

    @property
    def centre(self) -> tuple[int, ...]:
        """Index of the point nearest to the origin of the plane."""
        return tuple(int(np.argmin(np.abs(axis))) for axis in self.axes)

    def label(self, k: int) -> str:
        """Return what direction k is, for an axis: with its share of the variance, or its eigenvalue, if it has one.

        Parameters
        ----------
        k : int
            Which direction, from 0.
        """
        if self.plane["kind"] == "pca":
            return f"component {k + 1} ({100 * self.plane['explained_variance'][k]:.0f} % of the variance)"
        if self.plane["kind"] == "hessian":
            return f"eigenvector {k + 1} (λ = {self.plane['eigenvalues'][k]:.3g})"
        return f"direction {k + 1}"

    def select(self, name: str) -> "Surface":
        """Return the surface of another quantity that the loss returned.

        Parameters
        ----------
        name : str
            One of ``values``.

        Raises
        ------
        InputError
            For an unknown name.
        """
        if name not in self.values:
            raise InputError("name", repr(name), "one of " + ", ".join(map(repr, self.values)))
        first = {name: self.values[name]}
        return replace(self, values=first | self.values)

    def difference(self, other: "Surface") -> "Surface":
        """Paired difference of two surfaces on the same points, draw by draw.

        Both must have the same draws (equal seeds: common random numbers), or one of them no randomness, in which case
        its single value stands for all draws. The planes may differ: as in comparing two networks.

        Parameters
        ----------
        other : Surface
            What is subtracted.

        Raises
        ------
        InputError
            Other points, or draws that cannot be paired.
        """
        if len(self.axes) != len(other.axes) or not all(map(np.array_equal, self.axes, other.axes)):
            raise InputError("other", "a surface on other points", "the same span and points")
        mine, theirs = self.values[self.name], other.values[other.name]
        seeds = self.settings["seed"] == other.settings["seed"] and self.draws == other.draws
        if self.random and other.random and not seeds:
            raise InputError("other", "a surface with other draws", "the same seed and number of draws, to be paired")
        if not (self.random and other.random):
            mine = mine if self.random else mine.mean(-1, keepdims=True)
            theirs = theirs if other.random else theirs.mean(-1, keepdims=True)
        error = sum(one.interpolation_error.get(one.name, 0.0) for one in (self, other))
        name = f"{self.name} − {other.name}" if self.name != other.name else f"difference of {self.name}"
        return replace(
            self,
            values={name: mine - theirs},
            evaluated=self.evaluated & other.evaluated,
            interpolation_error={name: error},
            random=self.random or other.random,
        )

    @property
    def is_difference(self) -> bool:
        """Whether the quantity is a difference, as `difference` and `FlowLoss` name it: figures have zero in white."""
        return self.name.startswith("difference") or " − " in self.name

    def rise(self, at: Sequence[int] | None = None) -> "Surface":
        """Paired difference to the value at one point, draw by draw: what the common random numbers make precise.

        Parameters
        ----------
        at : sequence of int, optional
            Index of the point; by default the one nearest to the origin.
        """
        index = self.centre if at is None else tuple(at)
        risen = {name: value - value[index] for name, value in self.values.items()}
        return replace(self, values=risen)

    def plot(self, kind: str = "contour", ax: Any = None, **style: Any) -> Any:
        """Plot the mean over the draws; a line shows its standard error as a band.

        Parameters
        ----------
        kind : {"contour", "surface"}
            Filled contours with logarithmic levels, or a surface in three dimensions; a line is always a cut.
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.
        **style
            See `contour`, `relief` and `cut` in `kolmo.landscape.plots`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        InputError
            For a kind that is not known.
        """
        from kolmo.landscape import plots

        if len(self.axes) == 1:
            return plots.cut(self, ax=ax, **style)
        if kind not in ("contour", "surface"):
            raise InputError("kind", repr(kind), "'contour' or 'surface'")
        return (plots.contour if kind == "contour" else plots.relief)(self, ax=ax, **style)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the surface to one ``.npz`` file (arrays and JSON, no pickle); read it with `Surface.load`."""
        files.write_tree(Path(path), {"surface": self.record()})

    def record(self) -> dict[str, Any]:
        """Return the surface as arrays, numbers and strings, as `kolmo.files.write_tree` takes them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Surface":
        """Return the surface of a record."""
        return cls(**{**record, "axes": tuple(record["axes"])})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Surface":
        """Read a surface.

        Raises
        ------
        InputError
            If the file holds something else, or a surface that is not finished.
        """
        return files.read_record(
            Path(path), "surface", schema.of(cls), cls._consistent, "a file with a finished surface"
        )

    @classmethod
    def _consistent(cls, record: dict[str, Any]) -> "Surface":
        shape = tuple(axis.size for axis in record["axes"])
        _fields(record["values"], record["evaluated"], shape)
        schema.text()(record["plane"].get("kind"), "surface.plane.kind")
        return cls.from_record(record)

    def __repr__(self) -> str:
        shape = " × ".join(str(len(axis)) for axis in self.axes)
        return f"Surface({self.plane['kind']}, {shape} points, {self.draws} draws, {', '.join(self.values)})"


def surface(
    loss: Loss,
    model: nn.Module,
    plane: Plane,
    *,
    span: Any = None,
    points: int | Sequence[int] = 51,
    draws: int = 1,
    seed: int = 0,
    noisy: bool | None = None,
    batchnorm: str = "freeze",
    calibrate: Callable[[nn.Module], Any] | None = None,
    rtol: float | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Surface:
    r"""Evaluate a loss over a plane in weight space.

    .. math:: L(\alpha) = \frac1n \sum_{j<n} \ell_j\big(\theta_0 + \alpha_1 d_1 + \alpha_2 d_2\big)

    Draw j is made after ``torch.manual_seed(seed + j)`` at every point: common random numbers, so that differences over
    the plane, and between surfaces, are far more precise than the values themselves.

    Parameters
    ----------
    loss : callable
        ``loss(f)`` -> a scalar or a dictionary of scalars, such as loss and accuracy; f is the model at the moved
        weights. It must draw its noise from torch's global generator. No gradients are recorded.
    model : nn.Module
        The model. When the call ends, and however it ends, its weights, buffers, gradients and modes, and the global
        random generators, are what they were, bit for bit.
    plane : Plane
        Its origin is where the surface has its centre, whatever the weights of the model.
    span : float, (low, high), or one of these for each direction, optional
        Coordinates covered, shape (2,) or (directions, 2); a float s means (−s, s). Default: that of the plane, (−1, 1)
        for random ones.
    points : int or sequence of int
        Points along each direction; the default 51 is Li et al.'s.
    draws : int
        Noisy passes averaged at every point.
    seed : int
        Seed of the first draw.
    noisy : bool, optional
        True: training mode (noise on); False: evaluation mode; None: each module's mode as it is.
    batchnorm : {"freeze", "recalibrate", "batch"}
        Batch normalisation at moved weights: running statistics as they are; computed anew at every point by
        ``calibrate``; or statistics of the batch that the loss passes through.
    calibrate : callable, optional
        ``calibrate(f)`` passes data through the model, for "recalibrate".
    rtol : float, optional
        None: every point is evaluated. Else evaluations are placed adaptively until the interpolation error of the
        first quantity, checked at cells that were left out, is below ``rtol`` times its largest absolute value.
    path : path, optional
        Where the finished surface is saved. What is there so far is saved too, so that the same call after an
        interruption goes on and ends with the same bytes. A file of another surface is refused; of the loss and the
        noise only what they give at the origin is compared.
    progress : bool
        Whether to show progress on stderr.

    Returns
    -------
    Surface

    Raises
    ------
    InputError
        A plane of another architecture, bad settings, a loss that is not scalar, a file of another surface.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein (2018), Visualizing the loss landscape of neural nets.

    Examples
    --------
    >>> from kolmo import landscape
    >>> model = nn.Linear(2, 1, bias=False)
    >>> plane = landscape.random_plane(model)
    >>> found = landscape.surface(lambda f: {"loss": f.weight.square().sum()}, model, plane, points=11)
    >>> bool(np.isclose(found.mean[5, 5], model.weight.square().sum().item()))
    True
    """
    axes = plane_axes(plane, span, points)
    if rtol is not None and not 0 < rtol < math.inf:
        raise InputError("rtol", rtol, "a positive number, or None for the full grid")
    noise = Draws(draws, seed, noisy, batchnorm, calibrate)
    settings: dict[str, Any] = {**noise.settings(), "rtol": None if rtol is None else float(rtol)}
    with kept(model) as snapshot:
        evaluation = Evaluation(loss, model, snapshot, noise)
        mover = Mover(model, plane)
        mover.to((0.0,) * len(axes))
        settings["origin"], varying = evaluation.probe()
        store = Store(path, {**settings, "plane": plane.fingerprint, "axes": list(axes)}, axes, evaluation.draws)
        if store.finished is not None:
            return store.finished

        def evaluate(index: tuple[int, ...]) -> dict[str, np.ndarray]:
            mover.to([axis[i] for axis, i in zip(axes, index, strict=True)])
            return evaluation.values()

        total, begun = store.done.size if rtol is None else None, int(store.done.sum())
        with store.saving(), tqdm(total=total, initial=begun, disable=not progress, unit="point") as bar:
            wanted = store.evaluating(evaluate, bar)
            if rtol is None:
                wanted(np.ndindex(*store.done.shape))
                values, error = store.values, dict.fromkeys(store.values, 0.0)
            else:
                values, error = place(wanted, store, axes, rtol)
    random = any(varying.values()) or any(_varies(one[store.done]) for one in store.values.values())
    found = Surface(axes, values, store.done, plane.described(), settings, error, random)
    if path is not None:
        found.save(path)
    return found


_UNFINISHED = schema.table(
    {
        "identity": schema.text(),
        "origin": schema.mapping(schema.number(finite=False)),
        "values": schema.mapping(schema.array("f", finite=False), 1),
        "done": schema.array("b"),
    }
)


def _fields(
    values: dict[str, np.ndarray], evaluated: np.ndarray, shape: tuple[int, ...], draws: int | None = None
) -> None:
    """Refuse fields that do not lie over the points of a plane, with as many draws each."""
    if not values or evaluated.dtype != bool or evaluated.shape != shape:
        raise schema.refuse("evaluated", evaluated, f"true or false at {shape} points, and values there")
    draws = next(iter(values.values())).shape[-1] if draws is None else draws
    for name, found in values.items():
        if found.dtype.kind != "f" or found.shape != (*shape, draws):
            raise schema.refuse(f"values.{name}", found, f"numbers of shape {(*shape, draws)}")


class Store:
    """Values that were evaluated, written now and then to a file that the same call can go on from."""

    def __init__(self, path: Any, identity: dict[str, Any], axes: tuple[np.ndarray, ...], draws: int) -> None:
        self._path = None if path is None else Path(path)
        self._identity, self._origin = _digest(identity), identity["origin"]
        self._draws, self._saved = draws, time.monotonic()
        self.values: dict[str, np.ndarray] = {}
        self.done = np.zeros([len(axis) for axis in axes], bool)
        self.finished: Surface | None = None
        if self._path is not None and self._path.exists():
            self._read()

    def _read(self) -> None:
        assert self._path is not None
        tree = files.read_tree(self._path)
        if isinstance(tree, dict) and "unfinished" in tree:
            with files.damage(self._path):
                tree = _UNFINISHED(tree["unfinished"], "unfinished")
                same, origin = tree["identity"] == self._identity, tree["origin"]
                if same:
                    _fields(tree["values"], tree["done"], self.done.shape, self._draws)
            self.values, self.done = tree["values"], tree["done"]
        else:
            self.finished = found = Surface.load(self._path)
            kept_settings = {**found.settings, "plane": found.plane["fingerprint"], "axes": list(found.axes)}
            same, origin = _digest(kept_settings) == self._identity, found.settings.get("origin", {})
        if not same or not _agree(origin, self._origin):
            raise InputError("path", self._path, "a new file, or one of this very surface", "delete or rename it")

    def evaluating(
        self, evaluate: Callable[[tuple[int, ...]], dict[str, np.ndarray]], bar: Any
    ) -> Callable[[Any], None]:
        """Return the function that evaluates those of some points that are not done yet."""

        def wanted(indices: Any) -> None:
            for index in indices:
                if not self.done[index]:
                    self._put(index, evaluate(index))
                    bar.update()

        return wanted

    def _put(self, index: tuple[int, ...], found: dict[str, np.ndarray]) -> None:
        if not self.values:
            self.values = {name: np.full((*self.done.shape, self._draws), np.nan) for name in found}
        if found.keys() != self.values.keys():
            raise InputError("loss", f"the names {list(found)}", f"the same names always, {list(self.values)}")
        for name, value in found.items():
            self.values[name][index] = value
        self.done[index] = True
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self._write()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Write what is there when the block is left by an exception."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def _write(self) -> None:
        if self._path is not None and self.values:
            tree = {"identity": self._identity, "origin": self._origin, "values": self.values, "done": self.done}
            files.write_tree(self._path, {"unfinished": tree})
        self._saved = time.monotonic()


def _varies(values: np.ndarray) -> bool:
    """Whether any row holds different numbers; NaN is equal to itself."""
    first = values[:, :1]
    return bool(((values != first) & ~(np.isnan(values) & np.isnan(first))).any())


def _agree(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether the first loss at the origin is the same but for rounding, which another machine may do otherwise."""
    name = next(iter(other))
    return one.keys() == other.keys() and bool(np.isclose(one[name], other[name], rtol=1e-4, atol=0.0, equal_nan=True))


def _digest(identity: dict[str, Any]) -> str:
    """Name of a surface: what it is of, but for the loss."""
    digest = hashlib.sha256()
    for name, value in sorted((name, value) for name, value in identity.items() if name != "origin"):
        parts = value if name == "axes" else [value]
        digest.update(f"{name}:".encode())
        for part in parts:
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()
