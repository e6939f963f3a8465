"""Numbers that say how flat, how rough and how connected a loss landscape is, with their uncertainty."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import interpolate
from torch import Tensor, nn

from kolmo.errors import InputError
from kolmo.landscape.curvature import Curvature
from kolmo.landscape.draws import Draws, standard_error, whole
from kolmo.landscape.state import Evaluation, Loss, kept, normal
from kolmo.landscape.surface import Surface
from kolmo.shown import Shown

_RAYS = 64  # directions along which the radius is measured
_ALONG = 400  # points on each ray
_RESOLUTION = 1e-3  # of the largest eigenvalue: most eigenvalues of a network are nearer to 0, on either side


@dataclass(frozen=True, repr=False)
class Quantity(Shown):
    """A number with its standard error and what it means.

    Attributes
    ----------
    value : float
        The number.
    standard_error : float
        0 where nothing is random; NaN where it is unknown.
    definition : str
        What it is, with its source.

    Examples
    --------
    >>> print(Quantity(0.7334, 0.0021, "cross-entropy"))
    0.7334 ± 0.0021
    """

    value: float
    standard_error: float
    definition: str

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """Named quantities; ``summary["barrier"]``, iteration and ``len`` work as with a dictionary.

    Attributes
    ----------
    quantities : dict of str to Quantity
        By name.

    Examples
    --------
    >>> found = Summary({"loss": Quantity(0.7, 0.01, "cross-entropy"), "trace": Quantity(216.0, 6.0, "of the Hessian")})
    >>> list(found), found["trace"].value
    (['loss', 'trace'], 216.0)
    """

    quantities: dict[str, Quantity]

    def __getitem__(self, name: str) -> Quantity:
        """Return a quantity by name."""
        if name not in self.quantities:
            raise InputError("name", repr(name), "one of " + ", ".join(map(repr, self.quantities)))
        return self.quantities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.quantities)

    def __len__(self) -> int:
        return len(self.quantities)

    def values(self) -> dict[str, float]:
        """Return the numbers alone."""
        return {name: quantity.value for name, quantity in self.quantities.items()}

    def __str__(self) -> str:
        return "\n".join(f"{name}: {quantity}" for name, quantity in self.quantities.items())


def summary(
    surface: Surface | None = None,
    curvature: Curvature | None = None,
    sharpness: Summary | None = None,
    *,
    radius: float = 0.25,
) -> Summary:
    r"""Summarise a surface, a curvature, or both.

    Standard errors are over the noise draws: by the jackknife for what is computed from a surface; over draws and
    probes for what comes from a curvature. Over independently trained networks, use `over_seeds` and `paired`. The
    interpolation error of a surface that was evaluated by tolerance is not in them.

    Parameters
    ----------
    surface : Surface, optional
        In a plane or on a line. Gives, with L₀ at the origin (NaN where some value of the surface is not finite),

        - ``doubling radius``: mean over directions of the distance from the origin at which the loss reaches 2L₀, in
          coordinates of the plane (∞ if it does not within the window, along some direction; NaN without L₀ > 0);
        - ``least doubling radius``: the smallest over directions;
        - ``sharpness in the plane``: :math:`100\,(\max_{|\alpha|_\infty\le r} L(\alpha) - L_0)/(1 + L_0)`, the
          ε-sharpness of Keskar et al. (2017) restricted to the plane, at the given `radius`;
        - ``barrier`` (lines from α = 0 to 1): largest excess of the loss over the straight line between its ends
          (Entezari et al., 2022);
        - ``negative curvature in the plane``: share of points at which the surface bends down in some direction (Li et
          al., 2018, look at the same in weight space);
        - ``mean slope``: total variation over area, the mean of ‖∇L‖ in coordinates of the plane;
        - ``excess variation``: mean over grid lines of (total variation)/(largest − smallest value), less what a
          profile with one minimum has: 0 where every line falls once and rises once;
        - ``short-wave share``: share of the variance, after removal of a polynomial of degree 4, in waves shorter than
          a quarter of the window.

        The first three need the origin among the points, as an odd number of them has it. Negative curvature, excess
        variation and short-wave share need the full grid: an interpolation below its tolerance changes them.
    curvature : Curvature, optional
        Gives ``largest eigenvalue``, ``trace``, ``negative fraction`` (of the eigenvalues: those below −0.001 of the
        largest modulus; nearer to 0 the quadrature cannot tell signs), and ``indefiniteness`` −λ_min/λ_max (the ratio
        of Li et al., 2018).
    sharpness : Summary, optional
        What `sharpness` returned; taken over.
    radius : float
        Of the sharpness in the plane.

    Returns
    -------
    Summary

    Raises
    ------
    InputError
        If there is nothing to summarise.

    Examples
    --------
    >>> from kolmo import landscape
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 0.0)
    >>> plane = landscape.random_plane(model, normalization="none")
    >>> bowl = landscape.surface(lambda f: 0.5 + 0.0 * f.weight.sum(), model, plane, points=5)
    >>> landscape.summary(bowl)["doubling radius"].value
    inf
    """
    if surface is None and curvature is None and sharpness is None:
        raise InputError("surface, curvature", "neither", "at least one of them")
    found: dict[str, Quantity] = {}
    if surface is not None:
        found |= _of_surface(surface, radius)
    if curvature is not None:
        found |= _of_curvature(curvature)
    if sharpness is not None:
        found |= sharpness.quantities
    return Summary(found)


def sharpness(
    loss: Loss,
    model: nn.Module,
    *,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    sigma: float = 0.01,
    pairs: int = 10,
    draws: int = 1,
    seed: int = 0,
    noisy: bool | None = None,
    batchnorm: str = "freeze",
    calibrate: Callable[[nn.Module], Any] | None = None,
) -> Summary:
    r"""Measure published definitions of sharpness that need the network itself.

    - ``SAM sharpness``: :math:`L(\theta + \rho\, g/\|g\|) - L(\theta)`, g = ∇L (Foret et al., 2021);
    - ``adaptive SAM sharpness``: :math:`L(\theta + \rho'\, T^2 g/\|Tg\|) - L(\theta)`, T = diag|θ|, invariant to the
      scale of weights (Kwon et al., 2021);
    - ``random sharpness``: :math:`E\,L(\theta + \varepsilon) - L(\theta)`, ε normal with deviation σ|θᵢ| in each weight
      (the expected sharpness of PAC-Bayes bounds, Neyshabur et al., 2017, with the magnitude-aware deviations of Jiang
      et al., 2020), by pairs ±ε, whose means are free of the slope; its standard error is over the pairs.

    Parameters
    ----------
    loss, model, draws, seed, noisy, batchnorm, calibrate
        As in `curvature`; "recalibrate" holds for the losses, the gradient g is that of `curvature`.
    rho, adaptive_rho, sigma : float
        ρ, ρ' and σ.
    pairs : int
        Pairs of random perturbations, at least 2.

    Returns
    -------
    Summary

    Raises
    ------
    InputError
        For a loss that is not finite at the weights, fewer than two pairs, and as `curvature`.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> found = sharpness(lambda f: (f.weight**2).sum(), model, rho=0.1)
    >>> round(found["SAM sharpness"].value, 4)
    0.21
    """
    pairs = whole("pairs", pairs, 2)
    noise = Draws(draws, seed, noisy, batchnorm, calibrate)
    with kept(model) as snapshot:
        evaluation = Evaluation(loss, model, snapshot, noise)
        weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        random = next(iter(evaluation.probe()[1].values()))
        origin = [p.detach().clone() for p in weights]
        slope = _slope(evaluation, weights)
        base = _losses(evaluation)
        if not np.isfinite(base).all():
            raise InputError("loss", f"{base.mean():g} at the weights of the model", "a finite loss")

        def rises(steps: list[Tensor]) -> np.ndarray:
            with torch.no_grad():
                for p, start, step in zip(weights, origin, steps, strict=True):
                    p.copy_(start + step)
            return np.asarray(_losses(evaluation) - base)

        norm = _norm(slope)
        scaled = [p.abs() * g for p, g in zip(origin, slope, strict=True)]
        adaptive = [p.abs() * s for p, s in zip(origin, scaled, strict=True)]
        generator = torch.Generator().manual_seed(noise.seed)
        along = rises([rho / norm * g for g in slope])
        relative = rises([adaptive_rho / _norm(scaled) * a for a in adaptive])
        blurred = []
        for _ in range(pairs):
            step = [sigma * p.abs() * normal(p.shape, generator).to(p) for p in origin]
            blurred.append(0.5 * (rises(step).mean() + rises([-part for part in step]).mean()))
    return Summary(
        {
            "SAM sharpness": _over(along, random, f"L(θ + ρ g/|g|) − L(θ), ρ = {rho:g} (Foret et al., 2021)"),
            "adaptive SAM sharpness": _over(
                relative, random, f"L(θ + ρ T²g/|Tg|) − L(θ), T = |θ|, ρ = {adaptive_rho:g} (Kwon et al., 2021)"
            ),
            "random sharpness": Quantity(
                float(np.mean(blurred)),
                float(standard_error(np.array(blurred))),
                f"E L(θ + ε) − L(θ), ε normal with deviation {sigma:g} |θ| (Neyshabur et al., 2017)",
            ),
        }
    )


def _of_surface(surface: Surface, radius: float) -> dict[str, Quantity]:
    axes, spread = surface.axes, [axis[-1] - axis[0] for axis in surface.axes]
    centred = all(axis[0] < 0 < axis[-1] and np.abs(axis).min() < 1e-6 * (axis[1] - axis[0]) for axis in axes)
    found: dict[str, tuple[Callable[[np.ndarray], float], str]] = {}
    if centred:
        unit = "in coordinates of the plane"
        found["doubling radius"] = (
            lambda field: float(_radii(axes, field).mean()),
            f"distance at which the loss doubles, mean over directions, {unit}",
        )
        found["least doubling radius"] = (
            lambda field: float(_radii(axes, field).min()),
            f"least distance at which the loss doubles, {unit}",
        )
        if all(radius <= min(-axis[0], axis[-1]) for axis in axes):
            found["sharpness in the plane"] = (
                lambda field: _keskar(axes, field, radius),
                f"100 (max L − L₀)/(1 + L₀) over |α| ≤ {radius:g} (Keskar et al., 2017, restricted to the plane)",
            )
    if surface.plane["kind"] == "line" and axes[0][0] <= 0 and axes[0][-1] >= 1:
        found["barrier"] = (
            lambda field: _barrier(axes[0], field),
            "largest excess of the loss over the line between its ends (Entezari et al., 2022)",
        )
    found["mean slope"] = (lambda field: _mean_slope(axes, field), "total variation over area: mean |∇L|")
    complete = bool(surface.evaluated.all())
    if complete:
        found["excess variation"] = (
            _excess_variation,
            "total variation over range, less that of a profile with one minimum, mean over grid lines",
        )
    if complete and min(len(axis) for axis in axes) >= 5:
        found["negative curvature in the plane"] = (
            lambda field: _bending_down(axes, field),
            "share of points where the surface bends down in some direction",
        )
    if complete and min(len(axis) for axis in axes) >= 16:
        found["short-wave share"] = (
            lambda field: _short_waves(axes, field),
            f"share of the variance in waves shorter than a quarter of the window ({min(spread) / 4:g})",
        )
    values = surface.values[surface.name]
    if not np.isfinite(values).all():
        return {name: Quantity(math.nan, math.nan, definition) for name, (_, definition) in found.items()}
    return {
        name: Quantity(function(values.mean(-1)), _jackknife(function, values, surface.random), definition)
        for name, (function, definition) in found.items()
    }


def _jackknife(function: Callable[[np.ndarray], float], values: np.ndarray, random: bool) -> float:
    """Standard error over the draws (last axis) of a function of their mean."""
    n = values.shape[-1]
    if not random:
        return 0.0
    if n == 1:
        return math.nan
    total = values.sum(-1)
    left_out = np.array([function((total - values[..., j]) / (n - 1)) for j in range(n)])
    if not np.isfinite(left_out).all():
        return math.nan
    return float(np.sqrt((n - 1) * left_out.var()))


def _spline(axes: tuple[np.ndarray, ...], field: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Interpolant at points (..., directions)."""
    if len(axes) == 1:
        line = interpolate.make_interp_spline(axes[0], field, k=min(3, len(axes[0]) - 1))
        return lambda points: np.asarray(line(points[..., 0]))
    degrees = [min(3, len(axis) - 1) for axis in axes]
    plane = interpolate.RectBivariateSpline(*axes, field, kx=degrees[0], ky=degrees[1])
    return lambda points: np.asarray(plane.ev(points[..., 0], points[..., 1]))


def _radii(axes: tuple[np.ndarray, ...], field: np.ndarray) -> np.ndarray:
    """Distance from the origin at which the loss doubles, along rays; infinite where it does not, NaN without sense."""
    if len(axes) == 1:
        directions = np.array([[-1.0], [1.0]])
    else:
        angles = 2 * np.pi * np.arange(_RAYS) / _RAYS
        directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    value = _spline(axes, field)
    ends = np.min(
        [
            np.where(d > 0, axis[-1], -axis[0]) / np.maximum(np.abs(d), 1e-12)
            for d, axis in zip(directions.T, axes, strict=True)
        ],
        axis=0,
    )
    r = np.linspace(0.0, 1.0, _ALONG + 1)[:, None] * ends
    centre = float(value(np.zeros((1, len(axes))))[0])
    if centre <= 0:
        return np.full(len(directions), np.nan)
    along = value(r[..., None] * directions) - 2.0 * centre
    radii = np.full(len(directions), np.inf)
    for k, profile in enumerate(along.T):
        above = np.flatnonzero(profile >= 0)
        if len(above):
            i = above[0]
            share = profile[i - 1] / (profile[i - 1] - profile[i])
            radii[k] = r[i - 1, k] + share * (r[i, k] - r[i - 1, k])
    return radii


def _keskar(axes: tuple[np.ndarray, ...], field: np.ndarray, radius: float) -> float:
    fine = np.linspace(-radius, radius, 41)
    points = np.stack(np.meshgrid(*[fine] * len(axes), indexing="ij"), -1)
    value = _spline(axes, field)
    centre = float(value(np.zeros(len(axes))))
    return 100.0 * (float(value(points).max()) - centre) / (1.0 + centre)


def _barrier(axis: np.ndarray, field: np.ndarray) -> float:
    value = _spline((axis,), field)
    inside = np.union1d(axis[(axis >= 0) & (axis <= 1)], [0.0, 1.0])
    ends = value(np.array([[0.0], [1.0]]))
    return float((value(inside[:, None]) - (1 - inside) * ends[0] - inside * ends[1]).max())


def _mean_slope(axes: tuple[np.ndarray, ...], field: np.ndarray) -> float:
    slopes = np.gradient(field, *axes)
    return float(np.sqrt(np.sum(np.square(slopes if len(axes) > 1 else [slopes]), axis=0)).mean())


def _excess_variation(field: np.ndarray) -> float:
    """Zero for lines that fall once and rise once."""
    excess = []
    for k in range(field.ndim):
        lines = np.moveaxis(field, k, -1).reshape(-1, field.shape[k])
        total = np.abs(np.diff(lines, axis=1)).sum(1)
        lowest = lines.min(1)
        needed = (lines[:, 0] - lowest) + (lines[:, -1] - lowest)
        extent = np.ptp(lines, axis=1)
        excess.append(np.where(extent > 0, (total - needed) / np.where(extent > 0, extent, 1.0), 0.0))
    return float(np.concatenate(excess).mean())


def _bending_down(axes: tuple[np.ndarray, ...], field: np.ndarray) -> float:
    """Share of inner points whose matrix of second differences has a negative eigenvalue."""
    steps = [axis[1] - axis[0] for axis in axes]
    matrices = np.empty((*[n - 2 for n in field.shape], len(axes), len(axes)))
    for i, h in enumerate(steps):
        second = np.diff(field, 2, axis=i) / h**2
        matrices[..., i, i] = second[tuple(slice(None) if k == i else slice(1, -1) for k in range(len(axes)))]
    if len(axes) == 2:
        mixed = (field[2:, 2:] - field[2:, :-2] - field[:-2, 2:] + field[:-2, :-2]) / (4 * steps[0] * steps[1])
        matrices[..., 0, 1] = matrices[..., 1, 0] = mixed
    lowest = np.linalg.eigvalsh(matrices)[..., 0]
    # Rounding of a straight surface is no curvature.
    small = 1e-7 * max(float(np.abs(field).max()), 1e-300) / min(steps) ** 2
    return float(np.mean(lowest < -small))


def _short_waves(axes: tuple[np.ndarray, ...], field: np.ndarray) -> float:
    """Share of the windowed, detrended variance in waves shorter than a quarter of the window."""
    grids = np.meshgrid(*[np.linspace(-1, 1, len(axis)) for axis in axes], indexing="ij")
    powers = [p for p in product(range(5), repeat=len(axes)) if sum(p) <= 4]
    basis = np.stack([np.prod([g**q for g, q in zip(grids, p, strict=True)], axis=0).ravel() for p in powers], 1)
    flat = field.ravel() - basis @ np.linalg.lstsq(basis, field.ravel(), rcond=None)[0]
    rest = flat.reshape(field.shape)
    for k, n in enumerate(field.shape):
        rest = rest * np.hanning(n).reshape([-1 if i == k else 1 for i in range(field.ndim)])
    power = np.abs(np.fft.fftn(rest)) ** 2
    waves = np.meshgrid(*[np.fft.fftfreq(n) * n for n in field.shape], indexing="ij")
    radius = np.sqrt(np.sum(np.square(waves), axis=0))
    total = power[radius > 0].sum()
    return float(power[radius > 4].sum() / total) if total > 0 else 0.0


def _of_curvature(curvature: Curvature) -> dict[str, Quantity]:
    found = {}
    if len(curvature.eigenvalues):
        value, error = float(curvature.eigenvalues[0]), float(curvature.eigenvalue_standard_error[0])
        found["largest eigenvalue"] = Quantity(value, error, "largest eigenvalue of the Hessian")
    if not math.isnan(curvature.trace):
        errors = [curvature.trace_standard_error, curvature.trace_draw_error]
        found["trace"] = Quantity(curvature.trace, math.hypot(*errors), "trace of the Hessian")
    if curvature.nodes.size:
        extent = float(max(np.abs(curvature.nodes).max(), np.abs(curvature.eigenvalues).max(initial=0.0)))
        fraction, error = curvature.fraction_below(-_RESOLUTION * extent)
        definition = f"share of eigenvalues below −{_RESOLUTION:g} max |λ|, which the quadrature tells from 0"
        found["negative fraction"] = Quantity(fraction, error, definition)
        if len(curvature.eigenvalues) and curvature.eigenvalues[0] > 0:
            ratio = max(-curvature.smallest, 0.0) / float(curvature.eigenvalues[0])
            found["indefiniteness"] = Quantity(ratio, math.nan, "−λ_min/λ_max of the Hessian (Li et al., 2018)")
    return found


def _slope(evaluation: Evaluation, weights: list[Tensor]) -> list[Tensor]:
    """Gradient of the averaged loss."""
    evaluation.settle()
    total = [torch.zeros_like(p) for p in weights]
    for j in range(evaluation.draws):
        value = next(iter(evaluation.draw(j).values()))
        found = torch.autograd.grad(value, weights, allow_unused=True)
        total = [t if g is None else t + g / evaluation.draws for t, g in zip(total, found, strict=True)]
    return total


def _losses(evaluation: Evaluation) -> np.ndarray:
    return next(iter(evaluation.values().values()))


def _norm(parts: list[Tensor]) -> float:
    """Norm; 1 for zero, which then stays zero."""
    size = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
    return size or 1.0


def _over(rises: np.ndarray, random: bool, definition: str) -> Quantity:
    """Mean over the draws with its standard error."""
    if not random and not np.ptp(rises):
        return Quantity(float(rises[0]), 0.0, definition)
    return Quantity(float(rises.mean()), float(standard_error(rises)), definition)
