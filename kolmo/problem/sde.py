"""The process: dX = b(t, X) dt + σ(t, X) dW, given by its drift and noise matrix or covariance rate, and its jumps."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kolmo.arrays import (
    UNTRANSFORMED,
    Array,
    as_like,
    as_numpy,
    called,
    fresh,
    is_module,
    is_tensor,
    namespace,
    transformed,
)
from kolmo.errors import InputError, KolmoWarning

Coefficient = Callable[[float, Array], Array]


class SDE:
    r"""A stochastic differential equation in :math:`R^d`, in the Itô sense.

    .. math:: dX_t = b(t, X_t)\,dt + \sigma(t, X_t)\,dW_t + \sum_j J_j(t, X_{t-})\,dN^j_t,
        \qquad \Sigma = \sigma\sigma^T

    with N^j counting jumps that come at the rates λ_j(t, X), if there are any.

    Parameters
    ----------
    drift : callable or array_like
        ``drift(t, x)`` -> ``(..., d)`` with t a float and x of shape ``(..., d)``, vectorised over the leading axes; in
        one dimension ``(...)`` is accepted too. A constant number or ``(d,)`` array may be given instead.
    diffusion : callable or array_like, optional
        Noise matrix σ: scalar, ``(d,)`` (diagonal) or ``(d, m)``; constant, or a callable like drift whose result has
        these trailing axes.
    covariance : callable or array_like, optional
        Covariance rate Σ = σσᵀ instead of σ: scalar, ``(d,)`` or ``(d, d)``. With neither there is no noise.
    jumps : sequence of (rate, displacement), optional
        Finitely many kinds of jumps: each comes at the rate λ_j ≥ 0 (a number, or ``rate(t, x)`` -> ``(...)``) and
        moves the state from x to x + J_j (a number, ``(d,)``, or ``displacement(t, x)`` -> ``(..., d)``). They are
        not compensated: the drift is b alone. A jump beyond a face ends on it, beyond an open cut it goes on.
    dim : int, optional
        Dimension d; needed only where neither a constant coefficient nor the box tells it.
    breakpoints : sequence of float, optional
        Times at which coefficients jump (network layers). Between them coefficients are read on ``[t_k, t_{k+1})``.
    autonomous : bool, optional
        True: constant in time between breakpoints. None (default): found out by comparing values at several times.
    arrays : {None, "numpy", "torch"}, optional
        What the functions work on. None: NumPy float64, or torch when one of them is an ``nn.Module``.

    Raises
    ------
    InputError
        If both diffusion and covariance are given, breakpoints do not increase, or jumps are no pairs.

    References
    ----------
    I. Karatzas and S. E. Shreve (1991), Brownian Motion and Stochastic Calculus, chapter 5.

    Examples
    --------
    >>> ou = SDE(lambda t, x: -x, diffusion=0.5, dim=2)
    >>> ou.drift(0.0, np.ones((3, 2))).shape
    (3, 2)
    >>> ou.covariance(0.0, np.ones(2))
    array([[0.25, 0.  ],
           [0.  , 0.25]])

    Jumps of +1 and −½, three and one a unit of time:

    >>> jumping = SDE(0.0, 0.2, jumps=[(3.0, 1.0), (1.0, -0.5)], dim=1)
    >>> rates, displacements = jumping.jumps(0.0, np.zeros((5, 1)))
    >>> rates.shape, displacements[0].tolist()
    ((5, 2), [[1.0], [-0.5]])
    """

    def __init__(
        self,
        drift: Coefficient | Any,
        diffusion: Coefficient | Any = None,
        *,
        covariance: Coefficient | Any = None,
        jumps: Sequence[tuple[Any, Any]] | None = None,
        dim: int | None = None,
        breakpoints: Sequence[float] | None = None,
        autonomous: bool | None = None,
        arrays: str | None = None,
    ) -> None:
        if diffusion is not None and covariance is not None:
            raise InputError(
                "diffusion, covariance", "both", "one of them", "give σ as diffusion= or σσᵀ as covariance="
            )
        if arrays not in (None, "numpy", "torch"):
            raise InputError("arrays", repr(arrays), "None, 'numpy' or 'torch'")
        self._drift, self._diffusion, self._covariance = drift, diffusion, covariance
        self.kinds = _checked_jumps(jumps)
        self.dim = _dimension(dim, drift, diffusion, covariance)
        self.breakpoints: tuple[float, ...] = tuple(float(t) for t in (() if breakpoints is None else breakpoints))
        if any(a >= b for a, b in zip(self.breakpoints, self.breakpoints[1:], strict=False)):
            raise InputError("breakpoints", self.breakpoints, "increasing times")
        self.autonomous = autonomous
        parts = (drift, diffusion, covariance, *(part for kind in self.kinds for part in kind))
        torch_needed = any(is_module(f) or is_tensor(f) for f in parts)
        self.arrays = arrays if arrays is not None else ("torch" if torch_needed else None)
        self.device: Any = None
        # set by a problem with events: what moves the state at given times
        self.events: tuple[Any, ...] = ()

    @classmethod
    def from_torchsde(cls, module: Any, dim: int | None = None, *, breakpoints: Sequence[float] | None = None) -> "SDE":
        r"""The process of a torchsde module, in the Itô sense.

        .. math:: b = f \quad\text{(Itô)}, \qquad b_i = f_i + \tfrac12\sum_{j,k} g_{kj}\,\partial_k g_{ij}
            \quad\text{(Stratonovich)}, \qquad \sigma = g

        Parameters
        ----------
        module : object
            With ``f(t, y)`` -> (batch, d), ``g(t, y)``, ``noise_type`` ("diagonal", "scalar", "additive" or "general")
            and ``sde_type`` ("ito" or "stratonovich"), as ``torchsde.sdeint`` takes it. Its parameters keep their
            gradients in ``control.value``.
        dim : int, optional
            Dimension d, where no box tells it.
        breakpoints : sequence of float, optional
            Times at which coefficients jump.

        Raises
        ------
        InputError
            For a module that lacks one of these.

        Examples
        --------
        >>> import torch
        >>> class Geometric:
        ...     noise_type, sde_type = "diagonal", "stratonovich"
        ...     def f(self, t, y):
        ...         return 0.1 * y
        ...     def g(self, t, y):
        ...         return 0.4 * y
        >>> sde = SDE.from_torchsde(Geometric(), dim=1)
        >>> sde.drift(0.0, np.array([1.0]))  # 0.1 + ½ 0.4²
        array([0.18])
        """
        f, g = _torchsde_coefficients(module)
        return cls(f, g, dim=dim, breakpoints=breakpoints, arrays="torch")

    def drift(self, t: float, x: Array) -> Array:
        """Drift b of shape ``(..., d)`` at time t and points x of shape ``(..., d)``."""
        b = evaluate(self._drift, t, x, "drift", self.arrays, self.device)
        d = x.shape[-1]
        if d == 1 and b.shape == x.shape[:-1]:
            b = b[..., None]
        return _expand(b, x.shape, "drift", f"(..., {d}) for points of shape {tuple(x.shape)}")

    @property
    def given(self) -> dict[str, Any]:
        """Drift and covariance as they were given (the noise matrix in place of the covariance, if it was that)."""
        return {"drift": self._drift, "covariance": self._covariance if self._diffusion is None else self._diffusion}

    @property
    def rooted(self) -> bool:
        """Whether the noise matrix was given, and not the covariance."""
        return self._diffusion is not None

    @property
    def noiseless(self) -> bool:
        """Whether no noise was given at all, nor jumps."""
        return self._diffusion is None and self._covariance is None and not self.kinds

    @property
    def modules(self) -> list[Any]:
        """Coefficients that are ``nn.Module`` instances."""
        jumping = (part for kind in self.kinds for part in kind)
        return [f for f in (self._drift, self._diffusion, self._covariance, *jumping) if is_module(f)]

    def jumps(self, t: float, x: Array) -> tuple[Array, Array]:
        """Rates ``(..., J)`` and displacements ``(..., J, d)`` of the J kinds of jumps at time t and points x.

        Raises
        ------
        InputError
            Where a rate is negative or not finite.
        """
        d, lead, xp = x.shape[-1], tuple(x.shape[:-1]), namespace(x)
        rates, moves = [], []
        for rate, displacement in self.kinds:
            r = evaluate(rate, t, x, "rate of a jump", self.arrays, self.device)
            r = r[..., 0] if r.ndim == len(lead) + 1 and r.shape[-1] == 1 and callable(rate) else r
            rates.append(_expand(r, lead, "rate of a jump", f"{lead}"))
            J = evaluate(displacement, t, x, "displacement of a jump", self.arrays, self.device)
            J = J[..., None] if d == 1 and callable(displacement) and tuple(J.shape) == lead else J
            moves.append(_expand(J, (*lead, d), "displacement of a jump", f"(..., {d})"))
        found = xp.stack(rates, -1), xp.stack(moves, -2)
        wrong = ~(xp.isfinite(found[0]) & (found[0] >= 0.0))
        if bool(wrong.any()) or not bool(xp.isfinite(found[1]).all()):
            given = f"{as_numpy(found[0])[as_numpy(wrong)][0]:g}" if bool(wrong.any()) else "an infinite displacement"
            raise InputError("jumps", f"{given} at t = {t:g}", "finite displacements at rates that are not negative")
        return found

    def diffusion(self, t: float, x: Array) -> Array:
        """Noise matrix σ of shape ``(..., d, m)``; the symmetric square root where only Σ was given."""
        if self._diffusion is not None:
            return self._matrix(self._diffusion, t, x, "diffusion")
        S = self.covariance(t, x)
        xp = namespace(S)
        eigenvalues, Q = xp.linalg.eigh(S)
        return (Q * xp.sqrt(xp.clip(eigenvalues, 0.0, None))[..., None, :]) @ xp.swapaxes(Q, -1, -2)

    def covariance(self, t: float, x: Array) -> Array:
        """Covariance rate Σ = σσᵀ of shape ``(..., d, d)`` at time t and points x of shape ``(..., d)``."""
        if self._covariance is not None:
            return self._matrix(self._covariance, t, x, "covariance")
        if self._diffusion is None:
            return as_like(0.0, x) + namespace(x).zeros_like(x)[..., None] * namespace(x).zeros_like(x)[..., None, :]
        s = self.diffusion(t, x)
        if x.ndim > 1 and not callable(self._diffusion):  # one product for all points
            s = s[(0,) * (x.ndim - 1)] if s.shape[0] else s
            return _expand(s @ namespace(s).swapaxes(s, -1, -2), (*x.shape, x.shape[-1]), "diffusion", "")
        return s @ namespace(s).swapaxes(s, -1, -2)

    def _matrix(self, f: Any, t: float, x: Array, argument: str) -> Array:
        """Read a scalar, diagonal or full matrix coefficient as (..., d, m)."""
        value, d, lead = evaluate(f, t, x, argument, self.arrays, self.device), x.shape[-1], tuple(x.shape[:-1])
        axes = value.ndim - (len(lead) if callable(f) and value.ndim > 0 else 0)
        square, eye = argument == "covariance", as_like(np.eye(d), x)
        if axes == 0:
            needed = f"{(*lead,)} (scalar), {(*lead, d)} (diagonal) or {(*lead, d, 'm')} (matrix)".replace("'", "")
            return _expand(value[..., None, None] * eye, (*lead, d, d), argument, needed, value)
        if axes == 1:
            return _expand(value[..., None] * eye, (*lead, d, d), argument, f"{(*lead, d)} (diagonal)", value)
        columns = d if square else value.shape[-1] if axes == 2 else 0
        if axes == 2 and value.shape[-2:] == (d, columns):
            return _expand(value, (*lead, d, columns), argument, f"{(*lead, d, columns)}")
        trailing = f"(..., {d}, {d})" if square else f"(..., {d}, m)"
        raise InputError(
            argument,
            f"a result of shape {tuple(value.shape)}",
            f"a scalar (...), a diagonal (..., {d}) or a matrix {trailing} for points of shape {tuple(x.shape)}",
            f"{argument}(t, x) must be vectorised over the leading axes of x and keep them",
        )

    def __repr__(self) -> str:
        noise = "no noise" if self.noiseless else ("diffusion" if self._diffusion is not None else "covariance")
        layers = f", {len(self.breakpoints)} breakpoints" if self.breakpoints else ""
        jumps = f", {len(self.kinds)} kinds of jumps" if self.kinds else ""
        return f"SDE(dim={self.dim}, {noise}{jumps}{layers})"


def _checked_jumps(jumps: Sequence[tuple[Any, Any]] | None) -> tuple[tuple[Any, Any], ...]:
    """Pairs of rate and displacement."""
    kinds = () if jumps is None else tuple(jumps)
    if any(not isinstance(kind, tuple | list) or len(kind) != 2 for kind in kinds):
        raise InputError("jumps", repr(jumps), "pairs (rate, displacement)", "jumps=[(3.0, -0.5)]")
    return tuple((rate, displacement) for rate, displacement in kinds)


def refuse_jumps(sde: SDE, method: str, instead: str) -> None:
    """Raise an InputError where a method does not know jumps.

    Examples
    --------
    >>> refuse_jumps(SDE(0.0, 1.0, dim=1), "a method without jumps", "kolmo.solve")
    """
    if sde.kinds:
        raise InputError("sde", f"{len(sde.kinds)} kinds of jumps", f"a process without jumps for {method}", instead)


def evaluate(f: Any, t: float, x: Array, argument: str, arrays: str | None = None, device: Any = None) -> Array:
    """Value of a coefficient (callable or constant) at (t, x) in the library of x, as float64.

    Functions that work on torch are handed tensors even where x is a NumPy array (on the ``device``; gradients are
    dropped then).
    """
    if not callable(f):
        return as_like(checked(f, argument), x)
    hand = x
    if arrays == "torch" and not is_tensor(x):
        import torch

        hand = torch.as_tensor(x, device="cpu" if device is None else device)  # whatever the default device is
    elif arrays == "numpy" and is_tensor(x):
        hand = as_numpy(x)
    if is_module(f):
        parameter = next(iter(f.parameters()), None)
        if parameter is not None:
            hand = hand.to(parameter.dtype)
    try:
        with _listening(f, argument, hand):
            if is_tensor(hand) and not is_tensor(x):
                import torch

                with torch.no_grad():
                    value, new = called(f, t, hand)
            else:
                value, new = called(f, t, hand)
    except InputError:
        raise
    except Exception as error:
        kind = "torch tensors" if is_tensor(hand) else "NumPy arrays (SDE(..., arrays='torch') hands out tensors)"
        raise InputError(
            argument,
            f"{type(error).__name__}: {error}",
            f"a function of t (a float) and points of shape {tuple(x.shape)} that works on whole arrays",
            _way_out(error) or f"write it with x[..., i] and array functions; it is handed {kind}",
        ) from error
    value = checked(value, argument)
    result = as_like(value, x)
    # a function that fills the same array again, or returns what it was handed, gets nothing into its hands
    return result if new or "64" not in str(value.dtype) else fresh(result)


def _way_out(error: Exception) -> str:
    """What to do about the two commonest mistakes; else nothing."""
    said = str(error)
    if "dtype" in said or "scalar type" in said:
        return "points are float64: call .double() on a module of single precision, or hand it x.float()"
    if isinstance(error, TypeError) and "positional argument" in said:
        return "the time comes first: f(t, x), and f(t, x, a) in control problems, also where t plays no part"
    if "__array_wrap__" in said or "requires grad" in said:
        return "it is handed tensors: write it with functions of torch, torch.sin in place of np.sin"
    return ""


_HEARD: "weakref.WeakSet[Any]" = weakref.WeakSet()


@contextlib.contextmanager
def _listening(f: Any, argument: str, handed: Any) -> Iterator[None]:
    """Tell, once for a function, that it hands tensors to NumPy: gradients end there, and NumPy is to give it up."""
    try:
        known = not is_tensor(handed) or is_module(f) or f in _HEARD
        _HEARD.add(f)
    except TypeError:  # what cannot be held weakly is not listened to
        known = True
    if known:
        yield
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.filterwarnings("always", "__array_wrap__")
        yield
    for one in heard:
        if "__array_wrap__" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if any("__array_wrap__" in str(one.message) for one in heard):
        text = f"{argument} hands tensors to NumPy, where gradients end: write torch.sin in place of np.sin"
        warnings.warn(text, KolmoWarning, stacklevel=2)


def checked(value: Any, argument: str) -> Any:
    """Real numbers, as an array or a tensor; text, complex numbers and other objects are refused by name."""
    if transformed(value):
        raise InputError(argument, "a tensor inside a transform of torch.func", *UNTRANSFORMED)
    if is_tensor(value):
        kind = str(value.dtype).removeprefix("torch.")
        odd = value.is_complex() or value.is_quantized or value.device.type == "meta" or value.layout != _strided()
        given = f"a tensor of {kind} on {value.device} with layout {value.layout}" if odd else ""
    else:
        try:
            array = np.asanyarray(value)
        except Exception as error:
            raise InputError(argument, f"a {type(value).__name__} ({error})", _NUMBERS, _FIX) from error
        odd = array.dtype.kind not in "biuf" or bool(np.ma.is_masked(array))
        words = {"c": "complex numbers", "U": "text", "S": "text", "O": f"an object of type {type(value).__name__}"}
        given = words.get(
            array.dtype.kind, "masked values" if array.dtype.kind in "biuf" else f"values of {array.dtype}"
        )
        value = array if type(array) is np.ndarray else np.asarray(array)
    if odd:
        raise InputError(argument, given, _NUMBERS, "take its real part" if "complex" in given else _FIX)
    return value


_NUMBERS = "real numbers, as an array or a tensor"
_FIX = "return one array, put together by np.stack or torch.stack"


def _strided() -> Any:
    import torch

    return torch.strided


def _torchsde_coefficients(module: Any) -> tuple[Coefficient, Coefficient]:
    """Itô drift and noise matrix of a torchsde module, at points (..., d)."""
    import torch

    kinds = {"noise_type": ("diagonal", "scalar", "additive", "general"), "sde_type": ("ito", "stratonovich")}
    for name, known in kinds.items():
        if getattr(module, name, None) not in known:
            raise InputError(f"module.{name}", repr(getattr(module, name, None)), "one of " + ", ".join(known))
    for name in ("f", "g"):
        if not callable(getattr(module, name, None)):
            raise InputError(f"module.{name}", "nothing to call", f"a method {name}(t, y)", "f_and_g is not read")
    parameter = next(iter(module.parameters()), None) if is_module(module) else None
    dtype = torch.float64 if parameter is None else parameter.dtype
    diagonal = module.noise_type == "diagonal"

    def flat(t: float, x: Any) -> tuple[Any, Any]:
        return torch.as_tensor(t, dtype=dtype, device=x.device), x.reshape(-1, x.shape[-1]).to(dtype)

    def diffusion(t: float, x: Any) -> Any:
        s = module.g(*flat(t, x))
        return s.reshape(*x.shape[:-1], *s.shape[1:]).double()

    def matrix(now: Any, y: Any) -> Any:
        return torch.diag_embed(module.g(now, y)) if diagonal else module.g(now, y)

    def drift(t: float, x: Any) -> Any:
        now, y = flat(t, x)
        b = module.f(now, y)
        if module.sde_type == "stratonovich":
            s = matrix(now, y)
            for j in range(s.shape[-1]):
                b = b + 0.5 * torch.func.jvp(lambda z: matrix(now, z)[..., j], (y,), (s[..., j],))[1]  # noqa: B023
        return b.reshape(x.shape).double()

    return drift, diffusion


def _dimension(dim: int | None, drift: Any, diffusion: Any, covariance: Any) -> int | None:
    """Dimension told by dim or by the shape of a constant coefficient; None when nothing tells it."""
    if dim is not None and dim < 1:
        raise InputError("dim", dim, "a positive integer")
    for constant in (drift, diffusion, covariance):
        if dim is None and constant is not None and not callable(constant) and np.ndim(as_numpy(constant)) >= 1:
            dim = int(np.shape(as_numpy(constant))[0])
    return dim


def _expand(value: Array, shape: tuple[int, ...], argument: str, needed: str, given: Array | None = None) -> Array:
    """Broadcast a value to the shape needed; constants may lack leading axes. The error tells the shape ``given``."""
    if tuple(value.shape) == tuple(shape):
        return value
    try:
        return namespace(value).broadcast_to(value, tuple(shape))
    except (ValueError, RuntimeError):
        raise InputError(
            argument,
            f"a result of shape {tuple(value.shape if given is None else given.shape)}",
            f"shape {needed}",
            f"{argument}(t, x) must be vectorised over the leading axes of x and keep them"
            + ("; what is constant is handed over as it is, without a function" if given is not None else ""),
        ) from None
