"""Planes and lines in weight space: random, along a training trajectory, along curvature, between two networks."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolmo import files
from kolmo.errors import InputError
from kolmo.files import schema
from kolmo.landscape.draws import whole
from kolmo.landscape.state import normal
from kolmo.shown import Shown

Weights = dict[str, Tensor]
Span = tuple[tuple[float, float], ...]

NORMALIZATIONS = ("filter", "layer", "model", "none")
ONE_DIMENSIONAL = ("zero", "scale")
_MARGIN = 0.15  # of the extent of a trajectory, around it


@dataclass(frozen=True, eq=False)
class Plane(Shown):
    r"""Affine plane :math:`\theta(\alpha) = \theta_0 + \sum_i \alpha_i d_i` in weight space (one direction: a line).

    Attributes
    ----------
    origin : dict of str to Tensor
        θ₀, by parameter name.
    directions : tuple of dict
        One or two directions dᵢ, by parameter name; parameters that are not in it do not move.
    kind : str
        "random", "pca", "hessian" or "line".
    record : dict
        How it was made: seed, normalisation, treatment of one-dimensional parameters, explained variance, eigenvalues.
    span : tuple of (low, high)
        Coordinates that a surface covers by default, one pair per direction.
    trajectory : ndarray or None, shape (n, directions)
        Coordinates of the checkpoints of a training run.
    distance : ndarray or None, shape (n,)
        Distance of the checkpoints from the plane.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein (2018), Visualizing the loss landscape of neural nets.

    Examples
    --------
    >>> from kolmo import landscape
    >>> model = nn.Linear(3, 2)
    >>> plane = landscape.random_plane(model)
    >>> plane
    Plane(random, 2 directions, 8 parameters)
    >>> bool(torch.equal(plane.weights(0.0, 0.0)["weight"], model.weight))
    True
    """

    origin: Weights
    directions: tuple[Weights, ...]
    kind: str
    record: dict[str, Any] = field(default_factory=dict)
    span: Span = ()
    trajectory: np.ndarray | None = None
    distance: np.ndarray | None = None

    @property
    def gram(self) -> np.ndarray:
        """Gram matrix ⟨dᵢ, dⱼ⟩ of the directions: lengths and angles in weight space of what a surface shows."""
        return np.array([[_dot(a, b) for b in self.directions] for a in self.directions])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of origin and directions."""
        digest = hashlib.sha256()
        for weights in (self.origin, *self.directions):
            for name, value in weights.items():
                digest.update(name.encode())
                content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # bfloat16 is not NumPy's
                digest.update(content.numpy().tobytes())
        return digest.hexdigest()

    def weights(self, *coordinates: float) -> Weights:
        """Weights θ(α) at the given coordinates, by parameter name."""
        moved = dict(self.origin)
        for alpha, direction in zip(coordinates, self.directions, strict=True):
            for name, d in direction.items():
                moved[name] = moved[name] + alpha * d
        return moved

    def project(self, checkpoint: Any) -> tuple[np.ndarray, float]:
        """Coordinates of a checkpoint (a module or a state dictionary), and its distance from the plane.

        Raises
        ------
        InputError
            For a checkpoint of another architecture.
        """
        found = weights_of(checkpoint, self.origin, "checkpoint")
        step = {name: found[name].double() - self.origin[name].double() for name in self.origin}
        along = np.array([_dot(step, d) for d in self.directions])
        alpha = np.linalg.solve(self.gram, along)
        return alpha, max(_dot(step, step) - float(along @ alpha), 0.0) ** 0.5

    def described(self) -> dict[str, Any]:
        """What a surface keeps of its plane: all but the weights."""
        return {
            "kind": self.kind,
            **self.record,
            "gram": self.gram,
            "fingerprint": self.fingerprint,
            "trajectory": self.trajectory,
            "distance": self.distance,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plane with its weights to one ``.npz`` file (no pickle); read it with `Plane.load`."""
        tree = {
            "origin": _arrays(self.origin),
            "directions": [_arrays(direction) for direction in self.directions],
            "kind": self.kind,
            "record": self.record,
            "span": self.span,
            "trajectory": self.trajectory,
            "distance": self.distance,
        }
        files.write_tree(Path(path), {"plane": tree})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plane":
        """Read a plane.

        Raises
        ------
        InputError
            If the file holds something else.
        """
        weights = schema.mapping(schema.array("f", finite=False))
        check = schema.of(cls, origin=weights, directions=schema.many(weights, 1, 2))
        return files.read_record(Path(path), "plane", check, cls._from_record, "a file written by Plane.save")

    @classmethod
    def _from_record(cls, tree: dict[str, Any]) -> "Plane":
        for direction in tree["directions"]:
            for name, values in direction.items():
                if name not in tree["origin"] or values.shape != tree["origin"][name].shape:
                    raise schema.refuse(f"plane.directions.{name}", values, "the weights of the origin")
        if len(tree["span"]) not in (0, len(tree["directions"])):
            raise schema.refuse("plane.span", tree["span"], "a pair for each direction")
        tree["origin"] = _tensors(tree["origin"])
        tree["directions"] = tuple(_tensors(direction) for direction in tree["directions"])
        return cls(**tree)

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.origin.values())
        return f"Plane({self.kind}, {len(self.directions)} directions, {count} parameters)"


def random_plane(
    model: nn.Module,
    seed: int = 0,
    normalization: str = "filter",
    *,
    one_dimensional: str = "zero",
    directions: int = 2,
) -> Plane:
    r"""Plane through the weights of a model along random Gaussian directions.

    .. math:: d_{i,j} \leftarrow \frac{d_{i,j}}{\|d_{i,j}\|}\,\|\theta_{i,j}\| \qquad\text{(filter j of tensor i)}

    so that coordinate 1 is a change as large as the weights themselves, and surfaces of different networks compare.

    Parameters
    ----------
    model : nn.Module
        The model.
    seed : int
        Seed of the directions.
    normalization : {"filter", "layer", "model", "none"}
        Norm that is matched: of every filter (first axis of a convolution, row of a linear layer), of every tensor, of
        all weights together, or none (standard normal entries).
    one_dimensional : {"zero", "scale"}
        Biases and parameters of normalisation layers, which have one axis: not moved, as Li et al. do for their
        figures, or scaled to the norm of the whole tensor.
    directions : {1, 2}
        One: a line.

    Returns
    -------
    Plane
        Its directions are not orthogonalised after scaling (that would undo it); see `Plane.gram`.

    Raises
    ------
    InputError
        Bad settings, or weights that such a direction does not move: all zero, or all one-dimensional and not moved.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein (2018), Visualizing the loss landscape of neural nets.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> d = random_plane(model, seed=0).directions[0]
    >>> torch.allclose(d["weight"].norm(dim=1), model.weight.norm(dim=1))
    True
    >>> d["bias"].tolist()
    [0.0, 0.0]
    """
    if normalization not in NORMALIZATIONS:
        raise InputError("normalization", repr(normalization), "one of " + ", ".join(map(repr, NORMALIZATIONS)))
    if one_dimensional not in ONE_DIMENSIONAL:
        raise InputError("one_dimensional", repr(one_dimensional), "'zero' or 'scale'")
    if directions not in (1, 2):
        raise InputError("directions", directions, "1 or 2")
    seed = whole("seed", seed)
    origin = _own_weights(model)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(directions):
        # Drawn on the CPU in double precision: the same directions on every device and in every precision.
        raw = {n: normal(v.shape, generator) for n, v in origin.items()}
        if one_dimensional == "zero":
            raw = {name: d if origin[name].ndim > 1 else torch.zeros_like(d) for name, d in raw.items()}
        found.append(_normalized(raw, origin, normalization))
        if not any(bool(d.any()) for d in found[-1].values()):
            still = "weights that are all zero, or one-dimensional and not moved: the direction is empty"
            raise InputError("model", still, "weights to move", "one_dimensional='scale' or normalization='none'")
    record = {"seed": seed, "normalization": normalization, "one_dimensional": one_dimensional}
    return Plane(origin, tuple(found), "random", record, ((-1.0, 1.0),) * directions)


def pca_plane(model: nn.Module, checkpoints: Sequence[Any]) -> Plane:
    r"""Plane of the two leading principal components of a training trajectory, through the weights of the model.

    .. math:: \theta_t \approx \theta_0 + \alpha_{1t}d_1 + \alpha_{2t}d_2, \qquad d_i \cdot d_j = \delta_{ij}

    Parameters
    ----------
    model : nn.Module
        The model, usually at the end of training: the origin.
    checkpoints : sequence of nn.Module or dict
        At least three modules or state dictionaries along the training.

    Returns
    -------
    Plane
        With unit directions, ``record["explained_variance"]`` (share of the variance of the checkpoints along each),
        the coordinates of the n checkpoints in ``trajectory``, shape (n, 2), and their ``distance`` from the plane:
        where that is large, the surface is not what the training saw.

    Raises
    ------
    InputError
        Fewer than three checkpoints, or checkpoints of another architecture.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein (2018), Visualizing the loss landscape of neural nets.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> path = [{"weight": torch.tensor([[float(i), float(i % 2)]])} for i in range(5)]
    >>> plane = pca_plane(model, path)
    >>> float(np.sum(plane.record["explained_variance"]))
    1.0
    """
    origin = _own_weights(model)
    found = [weights_of(one, origin, "checkpoints") for one in checkpoints]
    if len(found) < 3:
        raise InputError("checkpoints", f"{len(found)} of them", "at least three")
    rows = torch.stack([torch.cat([one[name].double().reshape(-1) for name in origin]) for one in found])
    centred = rows - rows.mean(0)
    values, vectors = np.linalg.eigh((centred @ centred.T).numpy())
    if values[-2] <= 1e-12 * values[-1]:
        raise InputError("checkpoints", "a trajectory along a line", "checkpoints that span a plane", "landscape.line")
    units = [vectors[:, -k] @ centred.numpy() / np.sqrt(values[-k]) for k in (1, 2)]
    directions = tuple(_split(torch.from_numpy(unit), origin) for unit in units)
    record = {"explained_variance": values[[-1, -2]] / values.clip(0).sum(), "checkpoints": len(found)}
    bare = Plane(origin, directions, "pca")
    projected = [bare.project(one) for one in found]
    trajectory = np.array([alpha for alpha, _ in projected])
    distance = np.array([off for _, off in projected])
    return Plane(origin, directions, "pca", record, _around(trajectory), trajectory, distance)


def hessian_plane(
    loss: Callable[[nn.Module], Any],
    model: nn.Module,
    *,
    draws: int = 1,
    seed: int = 0,
    noisy: bool | None = None,
    rtol: float = 1e-3,
    **options: Any,
) -> Plane:
    r"""Plane of the two eigenvectors of the Hessian of a loss with the largest eigenvalues, of unit length.

    .. math:: H d_i = \lambda_i d_i, \qquad \|d_i\| = 1, \quad \lambda_1 \ge \lambda_2

    Parameters
    ----------
    loss, model, draws, seed, noisy, rtol, **options
        As in `curvature`.

    Returns
    -------
    Plane
        With ``record["eigenvalues"]`` and ``record["residuals"]``, shape (2,) each.

    Raises
    ------
    InputError
        As `curvature`; for a model of a single weight.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> plane = hessian_plane(lambda f: 3 * f.weight[0, 0] ** 2 + f.weight[0, 1] ** 2, model)
    >>> [round(float(value), 4) for value in plane.record["eigenvalues"]]
    [6.0, 2.0]
    """
    from kolmo.landscape.curvature import curvature

    options |= {"draws": draws, "seed": seed, "noisy": noisy, "rtol": rtol}
    found = curvature(loss, model, top=2, probes=0, density_probes=0, **options)
    if len(found.eigenvectors) < 2:
        raise InputError("model", f"{len(found.eigenvectors)} weight", "at least two, to span a plane")
    origin = _own_weights(model)
    directions = tuple(
        {name: found.eigenvectors[k].get(name, torch.zeros_like(value)) for name, value in origin.items()}
        for k in (0, 1)
    )
    record = {"eigenvalues": found.eigenvalues, "residuals": found.residuals, "draws": draws, "seed": seed}
    return Plane(origin, directions, "hessian", record, ((-1.0, 1.0),) * 2)


def line(model_a: Any, model_b: Any) -> Plane:
    r"""Line :math:`\theta_a + \alpha\,(\theta_b - \theta_a)` between two networks, at α = 0 and α = 1.

    Parameters move, buffers do not: they stay those of the model that `surface` gets. With batch normalisation, use its
    ``batchnorm="recalibrate"``, or α = 1 is not the second network.

    Parameters
    ----------
    model_a : nn.Module
        The network at α = 0.
    model_b : nn.Module or dict
        The network, or its state dictionary, at α = 1.

    Raises
    ------
    InputError
        If they differ in architecture or not at all.

    References
    ----------
    Goodfellow, Vinyals & Saxe (2015), Qualitatively characterizing neural network optimization problems.

    Examples
    --------
    >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> torch.allclose(line(a, b).weights(1.0)["weight"], b.weight)
    True
    """
    origin = _own_weights(model_a)
    end = weights_of(model_b, origin, "model_b")
    step = {name: end[name].to(value) - value for name, value in origin.items()}
    if not any(bool(value.any()) for value in step.values()):
        raise InputError("model_b", "the same weights as model_a", "other weights")
    return Plane(origin, (step,), "line", {}, ((-0.5, 1.5),))


def weights_of(source: Any, like: Weights, argument: str) -> Weights:
    """Parameters of the same names and shapes, from a module or a state dictionary, on the CPU."""
    values = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    if not isinstance(values, Mapping):
        raise InputError(argument, type(source).__name__, "a module or a state dictionary")
    missing = [name for name in like if name not in values]
    if missing:
        raise InputError(argument, f"weights without {missing[0]!r}", "the same architecture as the model's")
    found = {name: torch.as_tensor(values[name], device="cpu").detach() for name in like}
    for name, value in found.items():
        if value.shape != like[name].shape:
            given = f"{name!r} of shape {tuple(value.shape)}"
            raise InputError(argument, given, f"shape {tuple(like[name].shape)}, that of the model's architecture")
    return found


def _own_weights(model: nn.Module) -> Weights:
    """Copies of the parameters of a model, on the CPU."""
    if not isinstance(model, nn.Module):
        raise InputError("model", type(model).__name__, "an nn.Module")
    found = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.is_floating_point()}
    if not found:
        raise InputError("model", "no parameters", "a model with weights")
    return found


def _normalized(raw: dict[str, Tensor], origin: Weights, normalization: str) -> Weights:
    """Direction scaled to the norms of the weights, in their precision."""
    if normalization == "model":
        whole = [torch.stack([v.double().norm() for v in part.values()]).norm() for part in (origin, raw)]
        raw = {name: d * (whole[0] / whole[1]) for name, d in raw.items()}
    elif normalization != "none":
        raw = {name: _scaled(d, origin[name].double(), normalization) for name, d in raw.items()}
    return {name: d.to(origin[name].dtype) for name, d in raw.items()}


def _scaled(d: Tensor, weight: Tensor, normalization: str) -> Tensor:
    """Match norms filter by filter, or of the whole tensor."""
    filters = d.ndim > 1 and normalization == "filter"
    axes = tuple(range(1, d.ndim)) if filters else tuple(range(d.ndim))
    if d.ndim == 0:
        return d.sign() * weight.abs()
    wanted, drawn = (torch.linalg.vector_norm(v, dim=axes, keepdim=True) for v in (weight, d))
    return torch.where(drawn > 0, d * (wanted / drawn), 0.0)


def _split(vector: Tensor, like: Weights) -> Weights:
    """Flat vector -> tensors by name."""
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {
        name: part.reshape(value.shape).to(value.dtype) for (name, value), part in zip(like.items(), parts, strict=True)
    }


def _around(trajectory: np.ndarray) -> Span:
    """Ranges that hold the trajectory and the origin, with a margin."""
    low, high = np.minimum(trajectory.min(0), 0.0), np.maximum(trajectory.max(0), 0.0)
    margin = _MARGIN * (high - low)
    return tuple((float(a), float(b)) for a, b in zip(low - margin, high + margin, strict=True))


def _dot(a: Weights, b: Weights) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a if name in b))


def _arrays(weights: Weights) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in weights.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> Weights:
    return {name: torch.as_tensor(value, device="cpu") for name, value in arrays.items()}
