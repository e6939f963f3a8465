"""The landscape in feature space: expected loss and class probabilities u(t, ·) of a flow, as its noise grows."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kolmo import files
from kolmo.arrays import as_numpy
from kolmo.bridge.classifier import FlowClassifier
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.modified import modified_sde
from kolmo.bridge.resnet import NoisyResNet, as_generator, independent
from kolmo.errors import InputError
from kolmo.files import schema
from kolmo.problem import KolmogorovProblem
from kolmo.shown import Shown


@dataclass(frozen=True, eq=False, repr=False)
class FeatureLandscape(Shown):
    r"""Expected class losses and class probabilities over feature space, for some noise levels and times.

    Attributes
    ----------
    axes : tuple of ndarray, shape (n_i,)
        Coordinates of the feature space, one array per dimension (1 or 2); fields have ``indexing="ij"``.
    levels : list of str
        Names of the noise levels.
    times : ndarray, shape (nt,)
        Times t; t = 0 is where the network starts.
    loss, probability : ndarray, shape ``(levels, nt, *shape, k)``
        :math:`u(t, x) = E[-\log p_c(X_T) \mid X_t = x]` and :math:`E[p_c(X_T) \mid X_t = x]` for each of k classes c.
    gradient : ndarray, shape ``(levels, *shape, d, 2k)``
        ∇u at t = 0; the losses first, then the probabilities.
    hessian : ndarray, shape ``(levels, *shape, d, d, 2k)``
        ∇²u at t = 0.
    error_estimate : ndarray, shape (levels, 2k)
        Largest error estimate of each column at the check points (data, or corners of the window), t = 0.
    trajectories : ndarray or None, shape (levels, layers + 1, n, d)
        One noisy pass of each data point, layer by layer.
    labels : ndarray or None, shape (n,)
        Their labels.
    settings : dict
        Order, tolerance, seed.

    Examples
    --------
    >>> from kolmo import bridge, landscape
    >>> net = bridge.NoisyResNet([bridge.MLPBranch.create(1, 4, rng=0)] * 2, bridge.Additive(0.3))
    >>> model = bridge.FlowClassifier(torch.nn.Linear(3, 1), net, torch.nn.Linear(1, 2))
    >>> found = landscape.feature_landscape(model, window=[(-1.0, 1.0)], points=11)
    >>> bool(abs(found.probability.sum(-1) - 1).max() < 1e-2), found.slope.shape
    (True, (1, 11, 4))
    """

    axes: tuple[np.ndarray, ...]
    levels: list[str]
    times: np.ndarray
    loss: np.ndarray
    probability: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    error_estimate: np.ndarray
    trajectories: np.ndarray | None = None
    labels: np.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def slope(self) -> np.ndarray:
        """Norm ‖∇u‖ at t = 0, shape ``(levels, *shape, 2k)``."""
        return np.linalg.norm(self.gradient, axis=-2)  # type: ignore[no-any-return]

    @property
    def laplacian(self) -> np.ndarray:
        """Δu at t = 0, shape ``(levels, *shape, 2k)``."""
        return np.trace(self.hessian, axis1=-3, axis2=-2)  # type: ignore[no-any-return]

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Plot level sets of one class at one time and noise level; see `kolmo.landscape.plots.features`."""
        from kolmo.landscape import plots

        return plots.features(self, ax=ax, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one ``.npz`` file (no pickle); read it with `FeatureLandscape.load`."""
        files.write_tree(Path(path), {"features": self.record()})

    def record(self) -> dict[str, Any]:
        """Return it as arrays, numbers and strings, as `kolmo.files.write_tree` takes them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "FeatureLandscape":
        """Return what a record is of."""
        return cls(**{**record, "axes": tuple(record["axes"])})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureLandscape":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file holds something else.
        """
        needed = "a file written by FeatureLandscape.save"
        return files.read_record(Path(path), "features", schema.of(cls), cls._consistent, needed)

    @classmethod
    def _consistent(cls, record: dict[str, Any]) -> "FeatureLandscape":
        levels, shape = len(record["levels"]), tuple(axis.size for axis in record["axes"])
        both = (levels, len(record["times"]), *shape)
        schema.same_shape("features", both, loss=record["loss"], probability=record["probability"])
        schema.same_shape("features", (levels, *shape), gradient=record["gradient"], hessian=record["hessian"])
        schema.same_shape("features", (levels,), error_estimate=record["error_estimate"])
        return cls.from_record(record)


def feature_landscape(
    model: FlowClassifier,
    laws: Mapping[str, NoiseLaw] | None = None,
    *,
    data: tuple[Tensor, Tensor] | None = None,
    window: Sequence[tuple[float, float]] | None = None,
    points: int = 81,
    times: Sequence[float] = (0.0,),
    order: int = 1,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    seed: int = 0,
) -> FeatureLandscape:
    r"""Solve for the expected class losses and class probabilities over feature space.

    .. math:: \partial_t u + b\cdot\nabla u + \tfrac12\operatorname{tr}(\Sigma\nabla^2u) = 0, \qquad
              u(T, z) = -\log\operatorname{softmax}(\mathrm{head}(z))_c \;\text{ and }\; \operatorname{softmax}(\cdot)_c

    Parameters
    ----------
    model : FlowClassifier
        With one or two features; its weights stay fixed as the noise changes.
    laws : dict of str to NoiseLaw, optional
        Noise levels by name, weakest first; by default the network's own.
    data : (x, y), optional
        Data with labels: their features set the window, and their noisy passes are kept.
    window : sequence of (low, high), optional
        Window in feature space, a pair for each feature; by default around the data.
    points : int
        Points along each axis.
    times : sequence of float
        Times in [0, T).
    order : {1, 2, 3}
        Weak order of the modified SDE.
    rtol, atol : float
        Tolerance of the solutions.
    seed : int
        Seed of the noisy passes.

    Returns
    -------
    FeatureLandscape

    Raises
    ------
    InputError
        More than two features, or neither data nor a window.

    Examples
    --------
    >>> from kolmo import bridge, landscape
    >>> net = bridge.NoisyResNet([bridge.MLPBranch.create(1, 4, rng=0)] * 4, bridge.Additive(0.3))
    >>> model = bridge.FlowClassifier(torch.nn.Linear(3, 1), net, torch.nn.Linear(1, 2))
    >>> found = landscape.feature_landscape(model, window=[(-1.0, 1.0)], points=11)
    >>> found.loss.shape
    (1, 1, 11, 2)
    """
    import kolmo

    with torch.no_grad():
        features = None if data is None else model.encoder(data[0]).double().cpu()
    axes = _axes(features, window, points)
    chosen: Mapping[str, NoiseLaw | None] = {"as trained": None} if laws is None else laws
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    corners = mesh[np.ix_(*[[0, -1]] * len(axes))].reshape(-1, len(axes))
    at = corners if features is None else np.concatenate([corners, features.numpy()])
    moments = sorted({0.0, *map(float, times)})
    found: dict[str, list[Any]] = {name: [] for name in ("values", "gradient", "hessian", "error", "paths")}
    for law in chosen.values():
        net = model.net if law is None else NoisyResNet(list(model.net.branches), law, horizon=model.net.horizon)
        problem = KolmogorovProblem(modified_sde(_shortest(net), order), _columns(model), net.horizon)
        sol = kolmo.solve(problem, at=at, rtol=rtol, atol=atol, save=moments)
        found["values"].append([as_numpy(sol(mesh, t=t)) for t in times])
        found["gradient"].append(as_numpy(sol.gradient(mesh)))
        found["hessian"].append(as_numpy(sol.hessian(mesh)))
        found["error"].append(np.max(as_numpy(sol.error_estimate), axis=0))
        if features is not None:
            found["paths"].append(trajectories(net, features, seed))
    values = np.array(found["values"])
    k = values.shape[-1] // 2
    return FeatureLandscape(
        axes=axes,
        levels=list(chosen),
        times=np.array(times, dtype=float),
        loss=values[..., :k],
        probability=values[..., k:],
        gradient=np.array(found["gradient"]),
        hessian=np.array(found["hessian"]),
        error_estimate=np.array(found["error"]),
        trajectories=np.array(found["paths"]) if found["paths"] else None,
        labels=None if data is None else as_numpy(data[1]),
        settings={"order": order, "rtol": rtol, "atol": atol, "seed": seed},
    )


@torch.no_grad()
def trajectories(net: NoisyResNet, x: Tensor, seed: int) -> np.ndarray:
    """One noisy pass layer by layer, shape (layers + 1, n, d)."""
    draw = independent(as_generator(seed, x.device))
    dtype = next((p.dtype for p in net.parameters()), x.dtype)
    states = [x.to(dtype)]
    for k in range(net.depth):
        states.append(net.step(k, states[-1], draw))
    return as_numpy(torch.stack(states).double())  # type: ignore[no-any-return]


def _axes(features: Tensor | None, window: Any, points: int) -> tuple[np.ndarray, ...]:
    """Axes of the window."""
    if window is None:
        if features is None:
            raise InputError("window", None, "a window, or data", "window=[(-2, 2), (-2, 2)]")
        low, high = features.min(0).values.numpy(), features.max(0).values.numpy()
        margin = 0.1 * (high - low)
        window = list(zip(low - margin, high + margin, strict=True))
    if len(window) not in (1, 2) or (features is not None and features.shape[-1] != len(window)):
        raise InputError("window", f"{len(window)} pairs", "one pair for each of one or two features")
    return tuple(np.linspace(low, high, points) for low, high in window)


def _shortest(net: NoisyResNet) -> NoisyResNet:
    """Network of one layer with the same equation, where all layers are one: its coefficients have no breakpoints."""
    branches = {id(branch) for branch in net.branches}
    laws = {id(net.law(k)) for k in range(net.depth)}
    if len(branches) > 1 or len(laws) > 1:
        return net
    return NoisyResNet([net.branches[0]], net.law(0), horizon=net.h)


def _columns(model: FlowClassifier) -> Any:
    """Class losses, then class probabilities, of final features."""

    def columns(z: Tensor) -> Tensor:
        losses = model.class_losses(z)
        return torch.cat([losses, torch.exp(-losses)], -1)

    return columns


class FlowLoss:
    r"""Losses of a flow classifier for `surface`: of the network, of its PDE, their difference, and accuracy.

    .. math:: \text{loss} = \tfrac1n\sum_i E[-\log p_{y_i}(X_T) \mid X_0 = x_i]

    The network's expected loss is sampled with the PDE as control variate, which removes most of its variance: with
    common random numbers too, differences over the plane are precise at every step.

    Parameters
    ----------
    x, y : Tensor, shapes (n, ...) and (n,)
        Data and labels.
    paths : int
        Noisy passes for each example in a draw; 0: no sampling, the PDE alone.
    control : bool
        Whether the PDE is the control variate.
    order : {1, 2, 3}
        Weak order of the modified SDE.
    rtol, atol : float
        Tolerance of the PDE; with a `discretization` it is not used.
    discretization : kolmo.Discretization, optional
        A frozen plan, so that all points of the plane are solved in the same way.

    Raises
    ------
    InputError
        For fewer than two paths, other than none.

    Examples
    --------
    >>> from kolmo import bridge, landscape
    >>> net = bridge.NoisyResNet([bridge.MLPBranch.create(1, 4, rng=0)] * 2, bridge.Additive(0.3))
    >>> model = bridge.FlowClassifier(torch.nn.Linear(3, 1), net, torch.nn.Linear(1, 2))
    >>> loss = landscape.FlowLoss(torch.randn(6, 3), torch.zeros(6, dtype=torch.long), paths=4)
    >>> sorted(loss(model))
    ['accuracy', 'difference', 'network', 'pde']
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        paths: int = 8,
        control: bool = True,
        order: int = 1,
        rtol: float = 1e-3,
        atol: float = 1e-4,
        discretization: Any = None,
    ) -> None:
        if paths == 1 or paths < 0:
            raise InputError("paths", paths, "0, or at least 2")
        self._x, self._y, self._paths, self._control, self._order = x, y, paths, control, order
        self._solved: tuple[Any, list[Any], Any] = (None, [], None)
        self._tolerance: dict[str, Any] = (
            {"rtol": rtol, "atol": atol} if discretization is None else {"discretization": discretization}
        )

    @torch.no_grad()
    def __call__(self, model: FlowClassifier) -> dict[str, float]:
        """Losses at the weights that the model now has; noise from torch's global generator."""
        rows, features = torch.arange(len(self._y), device="cpu"), model.encoder(self._x).double()
        sol = self._solution(model, features)
        pde = torch.from_numpy(as_numpy(sol(features.cpu().numpy())))[rows, self._y.cpu()]
        found = {"pde": float(pde.mean())}
        if self._paths:
            seed = int(torch.randint(2**62, (), device="cpu"))
            control = sol if self._control else None
            network = model.expected_loss(self._x, self._y, paths=self._paths, rng=seed, control_variate=control).mean
            found = {"network": float(network.mean()), **found, "difference": float((network - pde).mean())}
        mean_scores = model.head(model.net.path(model.encoder(self._x)))
        return {**found, "accuracy": float((mean_scores.argmax(-1) == self._y).double().mean())}

    def _solution(self, model: FlowClassifier, features: Tensor) -> Any:
        """Solution of the PDE of this model as it now is; all draws at one point of a plane share it."""
        import kolmo

        net = model.net
        key, parts = _state_of(model)
        if self._solved[0] != key:
            problem = KolmogorovProblem(modified_sde(_shortest(net), self._order), model.class_losses, net.horizon)
            layers = [k * net.h for k in range(net.depth + 1)]
            saved: dict[str, Any] = {"save": layers} if self._paths and self._control else {}
            sol = kolmo.solve(problem, at=features.cpu().numpy(), **self._tolerance, **saved)
            self._solved = key, parts, sol
        return self._solved[2]


def _state_of(model: FlowClassifier) -> tuple[list[Any], list[Any]]:
    """What the equation of a model depends on, to be compared, and the objects whose identity stands for them."""
    found: list[Any] = []
    objects: list[Any] = list(model.modules())
    tensors = list(model.state_dict().values())
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor | np.ndarray):
                tensors.append(torch.as_tensor(value, device="cpu"))
            elif isinstance(value, int | float | str):
                found.append(value if name != "training" else None)
            elif not name.startswith("_"):
                objects.append(value)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return [digest.digest(), *found, *map(id, objects)], objects
