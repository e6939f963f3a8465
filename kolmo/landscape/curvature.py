r"""Curvature of a noise-averaged loss: leading eigenpairs, trace and spectral density of its Hessian and the like.

The Hessian H of :math:`\frac1n\sum_j \ell_j(\theta)` is used through products Hv only, under fixed draws ℓ_j, so that
it is one symmetric matrix.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kolmo import files
from kolmo.errors import InputError
from kolmo.files import schema
from kolmo.landscape.draws import Draws, standard_error, whole
from kolmo.landscape.lanczos import Pairs, leading, spectral_quadrature
from kolmo.landscape.operators import Given, Hessian, matrix_of
from kolmo.landscape.state import Evaluation, Loss, kept
from kolmo.shown import Shown

_POINTS = 512  # of the plotted density


@dataclass(frozen=True, eq=False)
class Curvature(Shown):
    r"""Hessian :math:`H = \nabla^2\,\tfrac1n\sum_j \ell_j` of a loss that is averaged over n noise draws.

    Attributes
    ----------
    eigenvalues : ndarray, shape (k,)
        Largest eigenvalues, decreasing.
    residuals : ndarray, shape (k,)
        Norms ‖Hv − λv‖ for the unit eigenvectors.
    eigenvalue_standard_error : ndarray, shape (k,)
        Standard error over the noise draws, to first order: that of vᵀH_j v over j; NaN for a single random draw.
    eigenvectors : list of dict
        Unit eigenvectors by parameter name.
    trace : float
        Trace, the part of the found eigenvectors exactly; NaN if no probes were asked for.
    trace_standard_error : float
        Of the probes: against the exact trace under these draws. Widened by Student's factor for few probes, so that
        ±2 of it hold the trace with probability 95.4 %.
    trace_draw_error : float
        Standard error over the noise draws; NaN for a single random draw.
    nodes, weights : ndarray, shape (probes, steps)
        Spectral density of H without the found eigenvectors, by Gauss quadrature: one measure of mass 1 per probe.
    parameters : int
        Number of parameters P.
    products : int
        Number of Hessian-vector products (of the averaged loss) that were used.
    loss : float
        The averaged loss.
    gradient_norm : float
        Norm of its gradient.
    settings : dict
        Draws, seed, mode, treatment of batch normalisation.

    References
    ----------
    Meyer, Musco, Musco & Woodruff (2021), Hutch++ (trace); Ubaru, Chen & Saad (2017) (spectral density).

    Examples
    --------
    >>> from kolmo import landscape
    >>> model = nn.Linear(3, 1, bias=False)
    >>> scale = torch.tensor([3.0, 2.0, -1.0])
    >>> curv = landscape.curvature(lambda f: 0.5 * (scale * f.weight**2).sum(), model, top=2)
    >>> curv.eigenvalues.round(4).tolist()
    [3.0, 2.0]
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    eigenvalue_standard_error: np.ndarray
    eigenvectors: list[dict[str, Tensor]]
    trace: float
    trace_standard_error: float
    trace_draw_error: float
    nodes: np.ndarray
    weights: np.ndarray
    parameters: int
    products: int
    loss: float
    gradient_norm: float
    settings: dict[str, Any] = field(default_factory=dict)

    def density(self, x: Any = None, width: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Spectral density, smoothed by a Gaussian, with its standard error over the probes.

        Parameters
        ----------
        x : array_like, optional
            Where; by default 512 points over the spectrum.
        width : float, optional
            Standard deviation of the Gaussian; by default 1/100 of the spectrum.

        Returns
        -------
        x, density, standard_error : ndarray
            The density of eigenvalues, of total mass 1.

        Raises
        ------
        InputError
            Where no density was asked for.

        References
        ----------
        Ghorbani, Krishnan & Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue density.
        """
        self._needs_density()
        low = min(self.nodes.min(), self.eigenvalues.min(initial=np.inf))
        high = max(self.nodes.max(), self.eigenvalues.max(initial=-np.inf))
        width = (high - low or 1.0) / 100 if width is None else width
        grid = np.linspace(low - 4 * width, high + 4 * width, _POINTS) if x is None else np.asarray(x, dtype=float)

        def bells(centres: np.ndarray) -> np.ndarray:
            return stats.norm.pdf(grid[:, None], centres, width)  # type: ignore[no-any-return]

        found = len(self.eigenvalues)
        bulk = np.array([bells(n) @ w for n, w in zip(self.nodes, self.weights, strict=True)])
        bulk *= (self.parameters - found) / self.parameters
        exact = bells(self.eigenvalues).sum(1) / self.parameters
        return grid, exact + bulk.mean(0), standard_error(bulk)

    def fraction_below(self, threshold: float = 0.0) -> tuple[float, float]:
        """Fraction of eigenvalues below a threshold, with its standard error over the probes.

        A threshold a little below 0 gives the fraction of negative curvature. Eigenvalues nearer to the threshold than
        the resolution of the quadrature are counted on either side, which the standard error does not show: most
        eigenvalues of a network are near 0.

        Raises
        ------
        InputError
            Where no density was asked for.
        """
        self._needs_density()
        bulk = np.where(self.nodes < threshold, self.weights, 0.0).sum(1)
        share = (self.parameters - len(self.eigenvalues)) / self.parameters
        exact = float((self.eigenvalues < threshold).sum()) / self.parameters
        return exact + share * float(bulk.mean()), share * float(standard_error(bulk))

    @property
    def smallest(self) -> float:
        """Smallest node of the spectral density: an upper bound of the smallest eigenvalue, close to it.

        Raises
        ------
        InputError
            Where no density was asked for.
        """
        self._needs_density()
        return float(self.nodes.min())

    def _needs_density(self) -> None:
        if self.nodes.size == 0:
            raise InputError("density_probes", 0, "at least one", "curvature(..., density_probes=5)")

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Plot the spectral density on a logarithmic scale, with the leading eigenvalues marked.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.
        **style
            See `kolmo.landscape.plots.spectrum`.

        Returns
        -------
        matplotlib.axes.Axes
        """
        from kolmo.landscape import plots

        return plots.spectrum(self, ax=ax, **style)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one ``.npz`` file (no pickle); read it with `Curvature.load`."""
        files.write_tree(Path(path), {"curvature": self.record()})

    def record(self) -> dict[str, Any]:
        """Return it as arrays, numbers and strings, as `kolmo.files.write_tree` takes them."""
        tree = {name: getattr(self, name) for name in self.__dataclass_fields__}
        tree["eigenvectors"] = [{n: v.cpu().numpy() for n, v in vector.items()} for vector in self.eigenvectors]
        return tree

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Curvature":
        """Return what a record is of."""
        vectors = [
            {name: torch.as_tensor(v, device="cpu") for name, v in one.items()} for one in record["eigenvectors"]
        ]
        return cls(**{**record, "eigenvectors": vectors})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Curvature":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file holds something else.
        """
        check = schema.of(cls, {Tensor: schema.array("f", finite=False)}, settings=schema.mapping(schema.anything))
        needed = "a file written by Curvature.save"
        return files.read_record(Path(path), "curvature", check, cls._consistent, needed)

    @classmethod
    def _consistent(cls, record: dict[str, Any]) -> "Curvature":
        count = len(record["eigenvectors"])
        for name in ("eigenvalues", "residuals", "eigenvalue_standard_error"):
            if record[name].shape != (count,):
                raise schema.refuse(f"curvature.{name}", record[name], f"shape ({count},)")
        if record["nodes"].ndim != 2 or record["nodes"].shape != record["weights"].shape:
            raise schema.refuse("curvature.weights", record["weights"], "the shape of the nodes")
        return cls.from_record(record)

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.4g}" for value in self.eigenvalues)
        return f"Curvature(λ = {values}; trace {self.trace:.4g} ± {self.trace_standard_error:.2g})"


def curvature(
    loss: Loss | Any,
    model: nn.Module | None = None,
    *,
    kind: str = "hessian",
    top: int = 5,
    draws: int = 1,
    seed: int = 0,
    noisy: bool | None = None,
    batchnorm: str = "freeze",
    calibrate: Callable[[nn.Module], Any] | None = None,
    rtol: float = 1e-3,
    max_products: int = 200,
    probes: int = 20,
    density_probes: int = 5,
    density_steps: int = 30,
    name: str | None = None,
    where: str = "**",
    progress: bool = False,
) -> Curvature:
    r"""Measure the curvature of a loss at the weights of a model.

    Leading eigenpairs by Lanczos with full re-orthogonalisation. Trace by probing with what they leave over,

    .. math:: \operatorname{tr} H = \sum_{i\le k} \lambda_i
              + E\,z^T (I - VV^T)\,H\,(I - VV^T)\,z, \qquad z_i = \pm1,

    and spectral density by stochastic Lanczos quadrature with the same deflation.

    Parameters
    ----------
    loss : callable
        ``loss(f)`` -> a scalar, or a dictionary of scalars of which the first (or `name`) is meant; twice
        differentiable. It must draw its noise from torch's global generator. A `BatchLoss` is gone through batch by
        batch, in the memory of one. Or, without a model, a symmetric operator with ``shape`` and ``@``, such as those
        of curvlinops and SciPy.
    model : nn.Module, optional
        The model. Its state and the global random generators are brought back, however the call ends.
    kind : {"hessian", "ggn", "fisher"}
        The matrix: Hessian; Gauss–Newton, Jᵀ(∂²ℓ/∂o²)J with o the outputs of the model and J their Jacobian; empirical
        Fisher, the mean of gᵢgᵢᵀ over the gradients gᵢ of the samples, of which the loss is the mean and each is a row
        of the outputs. The last two are positive semidefinite and leave out what acts on the weights beside o.
    top : int
        Number of eigenpairs with the largest eigenvalues.
    draws, seed, noisy, batchnorm, calibrate
        As in `surface`; draw j is made after ``torch.manual_seed(seed + j)`` in every product. With "recalibrate", the
        statistics are those at the weights of the model, and constants: what they would change is not differentiated.
    rtol : float
        Residuals wanted, ‖Hv − λv‖ relative to the largest eigenvalue found.
    max_products : int
        Most products spent on the eigenpairs; what the residuals then are is in the result.
    probes : int
        Probes of the trace, 0 for none.
    density_probes, density_steps : int
        Probes of the spectral density, and Lanczos steps for each; 0 probes: no density.
    name : str, optional
        Which of the losses.
    where : str
        Pattern of the names of the parameters that are the variables, such as "layer1.**" for a block or "head.weight"
        for a layer: the Hessian is then that block of the whole one. ``*`` does not cross dots, ``**`` does.
    progress : bool
        Whether to show progress on stderr.

    Returns
    -------
    Curvature

    Raises
    ------
    InputError
        Bad settings, or a loss that does not depend on the weights or is not twice differentiable.

    Notes
    -----
    Up to 48 parameters the Krylov space is the whole space. Beyond, an eigenvalue that occurs several times is found
    once, as by every Lanczos iteration from one vector, unless the Krylov space becomes invariant.

    References
    ----------
    Golub & Van Loan, Matrix Computations (Lanczos); Hutchinson (1990) and Meyer, Musco, Musco & Woodruff (2021),
    Hutch++ (trace); Ubaru, Chen & Saad (2017) (stochastic Lanczos quadrature).

    Examples
    --------
    >>> from kolmo import landscape
    >>> model = nn.Linear(40, 1, bias=False)
    >>> scale = torch.arange(1.0, 41.0)
    >>> curv = landscape.curvature(lambda f: 0.5 * (scale * f.weight**2).sum(), model, top=1)
    >>> bool(abs(curv.trace - 820) <= 3 * curv.trace_standard_error + 1e-2)
    True
    """
    top, probes, density_probes = (
        whole("top", top, 0),
        whole("probes", probes, 0),
        whole("density_probes", density_probes, 0),
    )
    density_steps, max_products = whole("density_steps", density_steps, 1), whole("max_products", max_products, 1)
    if probes == 1:
        raise InputError("probes", probes, "none, or at least 2 to have a standard error")
    if not rtol > 0:
        raise InputError("rtol", rtol, "a positive number")
    noise = Draws(draws, seed, noisy, batchnorm, calibrate)
    settings = noise.settings()
    asked = _Asked(top, rtol, max_products, probes, density_probes, density_steps, noise.seed, settings)
    if model is None:
        if not (hasattr(loss, "shape") and hasattr(loss, "__matmul__")):
            raise InputError("model", None, "a model, or an operator with shape and @ in place of the loss")
        with tqdm(disable=not progress, unit="product") as bar:
            return _measured(Given(loss, bar), asked)
    matrix = matrix_of(kind)
    settings["kind"] = kind
    # of the kernels of attention only the plain one has second derivatives
    with kept(model) as snapshot, sdpa_kernel(SDPBackend.MATH):
        evaluation = Evaluation(loss, model, snapshot, noise)
        first, varying = evaluation.probe(name, gradients=True)
        random = varying[next(iter(first)) if name not in first else name]
        evaluation.settle()
        with tqdm(disable=not progress, unit="product") as bar:
            return _measured(matrix(evaluation, model, name, random, bar, where), asked)


def eigenvalues(loss: Loss | Any, model: nn.Module | None = None, *, top: int = 5, **options: Any) -> Curvature:
    r"""Measure the largest eigenvalues alone: `curvature` without trace and density, which take most of its products.

    .. math:: Hv_i = \lambda_iv_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    Parameters
    ----------
    loss, model, top
        As in `curvature`.
    **options
        Its other options, but for those of trace and density.

    Returns
    -------
    Curvature
        With ``eigenvalues`` of shape (top,), ``trace`` NaN and no density.

    Raises
    ------
    InputError
        As `curvature`.

    References
    ----------
    C. Lanczos (1950), Journal of Research of the National Bureau of Standards 45.

    Examples
    --------
    >>> import scipy.sparse as sp
    >>> from kolmo import landscape
    >>> found = landscape.eigenvalues(sp.diags(np.arange(1.0, 200.0)), top=2, rtol=1e-6)
    >>> found.eigenvalues.round(4).tolist()
    [199.0, 198.0]
    """
    return curvature(loss, model, top=top, probes=0, density_probes=0, **options)


class _Asked(NamedTuple):
    """What is to be measured, and how well."""

    top: int
    rtol: float
    most: int
    probes: int
    density_probes: int
    density_steps: int
    seed: int
    settings: dict[str, Any]


def _measured(hessian: Any, asked: _Asked) -> Curvature:
    """Eigenpairs, trace and density of a matrix of which there are products."""
    generator = torch.Generator().manual_seed(asked.seed)
    pairs = leading(hessian, min(asked.top, hessian.size), asked.rtol, asked.most, generator)
    forms = _forms(hessian, pairs.vectors)
    trace = _trace(hessian, pairs, forms, asked.probes, generator)
    quadrature = spectral_quadrature(hessian, pairs, asked.density_probes, asked.density_steps, generator)
    return Curvature(
        eigenvalues=pairs.values,
        residuals=pairs.residuals,
        eigenvalue_standard_error=_over_draws(forms, hessian.random),
        eigenvectors=[hessian.named(vector) for vector in pairs.vectors],
        trace=trace.value,
        trace_standard_error=trace.probe_error,
        trace_draw_error=trace.draw_error,
        nodes=quadrature[0],
        weights=quadrature[1],
        parameters=hessian.size,
        products=hessian.products,
        loss=hessian.loss,
        gradient_norm=hessian.gradient_norm,
        settings=asked.settings,
    )


def _forms(hessian: Hessian, vectors: Tensor) -> np.ndarray:
    """vᵀH_j v for every eigenvector and draw, shape (k, draws); one draw needs no products."""
    if hessian.draws == 1:
        return np.zeros((len(vectors), 1))
    return np.array([hessian(v)[1] for v in vectors]).reshape(len(vectors), hessian.draws)


def _over_draws(forms: np.ndarray, random: bool) -> np.ndarray:
    """Standard error over the draws (last axis)."""
    if not random and not np.ptp(forms, axis=-1).any():
        return np.zeros(forms.shape[:-1])
    return np.asarray(standard_error(forms, -1))


class _Trace(NamedTuple):
    value: float
    probe_error: float
    draw_error: float


def _trace(hessian: Hessian, pairs: Pairs, forms: np.ndarray, probes: int, generator: torch.Generator) -> _Trace:
    """Trace by probes that are orthogonal to the found eigenvectors."""
    if probes == 0:
        return _Trace(math.nan, math.nan, math.nan)
    rest = []
    for _ in range(probes):
        z = hessian.signs(generator)
        rest.append(hessian(z - pairs.vectors.T @ (pairs.vectors @ z))[1])
    table = np.array(rest)  # (probes, draws)
    spread = table.mean(1)
    student = stats.t.ppf(stats.norm.cdf(2.0), probes - 1) / 2.0
    by_draw = forms.sum(0) + table.mean(0)
    return _Trace(
        float(pairs.values.sum() + spread.mean()),
        float(student * spread.std(ddof=1) / math.sqrt(probes)),
        float(_over_draws(by_draw, hessian.random)),
    )
