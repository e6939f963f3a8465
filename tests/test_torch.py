"""The march in torch: the numbers of NumPy's kernels to rounding, on the device of the tensors, and only there."""

import importlib
import itertools
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from kolmo import SDE, Box, InputError, KolmogorovProblem, control, discretize, solve
from kolmo.arrays import as_like, as_numpy
from kolmo.control import adjoint
from kolmo.discretization import Discretization
from kolmo.march import March
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS, Operator
from kolmo.testing import manufactured

STEPPERS_IN_TORCH = ("rk4", "mcs", "mcs3", "semi-lagrangian", "exponential")
FACES = ["open", "natural", "reflecting", "entrance", "absorbing", "robin", "periodic"]
MOVING = ["open", "natural", "reflecting", "periodic"]
TIMES = np.array([0.0, 5e-4, 1e-3])
NODES = {1: (21,), 2: (11, 12), 3: (8, 7, 8)}
# Numbers a step may send or fetch: what steers it, a handful, but no field.
STEERING = 64

# A device that torch counts changes what it does in the whole process (checkpointing, for one, asks every device):
# tests on the pretended one run in a process of their own, which this variable tells apart.
PRETENDED = "KOLMO_TESTS_PRETEND_A_DEVICE"
if os.environ.get(PRETENDED):
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up

    set_up("elsewhere")  # before any gradient is taken


class Elsewhere(torch.Tensor):
    """A tensor on a device that this machine only pretends to have: it holds its numbers in one on the CPU.

    What mixes it with tensors on the CPU fails, as it does on a GPU; what is sent or fetched is counted.
    """

    sent: ClassVar[list[int]] = []
    fetched: ClassVar[list[int]] = []

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="elsewhere:0", **layout)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return elsewhere(op, *args, **(kwargs or {}))


def elsewhere(op, *args, **kwargs):
    """Run an operation on what the tensors hold."""
    tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    local = [v for v in tensors if not isinstance(v, Elsewhere)]
    name, target = op.name(), kwargs.get("device")
    if name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::index.Tensor", "aten::index_put_"):
        Elsewhere.sent += [v.numel() for v in local]
    else:
        assert not [v for v in local if v.ndim], f"{name} of tensors here and there"
    args, kwargs = tree_map(lambda v: v.inner if isinstance(v, Elsewhere) else v, (args, kwargs))
    kwargs = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    if name == "aten::_copy_from":
        args[1].copy_(args[0])
        return tensors[1]
    result = op(*args, **kwargs)
    if name == "aten::_local_scalar_dense":
        Elsewhere.fetched.append(1)
    if name == "aten::_to_copy" and target is not None and target.type == "cpu":
        Elsewhere.fetched.append(result.numel())
        return result
    known = {id(v.inner): v for v in tensors if isinstance(v, Elsewhere)}
    return tree_map(lambda v: known.get(id(v), v if not isinstance(v, torch.Tensor) else Elsewhere(v)), result)


@pytest.fixture(scope="session")
def pretended():
    """The pretended device."""
    if not os.environ.get(PRETENDED):
        pytest.skip("in a process of its own")
    library = torch.library.Library("aten", "IMPL")
    for name, overload in [("empty", "memory_format"), ("empty_strided", "default"), ("_copy_from", "default")]:
        op = getattr(getattr(torch.ops.aten, name), overload)
        full = name if overload == "default" else f"{name}.{overload}"
        library.impl(full, lambda *args, op=op, **kwargs: elsewhere(op, *args, **kwargs), "PrivateUse1")
    yield torch.device("elsewhere:0")
    library._destroy()


@pytest.fixture(params=["cpu", "elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.getfixturevalue("pretended") if request.param == "elsewhere" else torch.device(request.param)


def test_all_of_this_on_a_pretended_device():
    if not hasattr(
        importlib.import_module("torch.utils.backend_registration"), "_setup_privateuseone_for_python_backend"
    ):
        pytest.skip("this torch cannot pretend to have a device")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "elsewhere", __file__]
    done = subprocess.run(command, env=os.environ | {PRETENDED: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.fixture
def in_torch(monkeypatch):
    """``control.value`` marches in torch on the CPU too."""
    monkeypatch.setattr(adjoint, "march_like", adjoint.tensor_like)


def a_problem(dim, word, stepper, clock=1.0):
    """Faces of a kind along the first axis, and what the stepper can do."""
    if stepper != "semi-lagrangian":
        others = [("robin", "absorbing"), ("periodic", "periodic")]
        return manufactured([(word, word), *others][:dim], horizon=0.02, autonomous=clock == 0.0).problem
    others = [("open", "reflecting"), ("periodic", "periodic")]
    end = {"natural": 0.0}.get(word, 0.6)
    noisy = np.array([1.0, float(dim < 3), 0.0])[:dim]  # with noise along all of three axes each node has 54 feet
    sde = SDE(
        # not zero at the faces: whether a foot lies on a face or just behind it would be a matter of rounding
        lambda t, x: (1.0 + clock * t) * (0.3 - x),
        diffusion=lambda t, x: 0.3 * (end + x * (1.0 - x)) * (1.0 + clock * t) * as_like(noisy, x),
        dim=dim,
    )
    box = Box([0.0] * dim, [1.0] * dim, [(word, word), *others][:dim])
    wave = lambda x: (x - 0.2 * x**2).sum(-1)  # noqa: E731
    return KolmogorovProblem(sde, wave, 0.02, box, killing=lambda t, x: 0.3 * x[..., 0], source=lambda t, x: x[..., 0])


def prepared(problem, stepper, like, dt=1e-4, times=(0.0, 0.01, 0.02), scheme="central2"):
    """A step whose coefficients change in its course."""
    dim = problem.dim
    generator = discretize(problem.handing("torch", like.device) if like is not None else problem, NODES[dim], scheme)
    fixed = generator.fixed if generator.fixed.any() else None
    chosen = [times[0 if stepper == "exponential" else round(2 * c)] for c in STEPPERS[stepper].nodes]
    made = {t: generator.at(t, like) for t in dict.fromkeys(chosen)}
    operators = {t: Operator(s.stencil, s.a, fixed) for t, s in made.items()}
    return STEPPERS[stepper].prepare([operators[t] for t in chosen], dt)


def draw(problem, stepper, columns=2):
    """Random state, weights and loads, zero at fixed nodes."""
    generator, rng = discretize(problem, NODES[problem.dim], "central2"), np.random.default_rng(1)
    shape = (generator.grid.size, columns)
    return [~generator.fixed[:, None] * rng.standard_normal(shape) for _ in range(2 + len(STEPPERS[stepper].nodes))]


def faces_of(step, u, p, loads):
    """All that the three faces of a step give."""
    state = step.apply(u, loads)
    back, adjoints = step.apply_transposed(p)
    again, more, numbers = step.pullback(u, loads, p)
    return [state, back, *adjoints, again, *more, *numbers]


def paired(f, g):
    return float((f * g).sum())


CASES = [
    pytest.param(dim, word, stepper, marks=pytest.mark.slow if dim == 3 and word not in ("open", "robin") else ())
    for dim, stepper in itertools.product((1, 2, 3), STEPPERS_IN_TORCH)
    for word in (MOVING if stepper == "semi-lagrangian" else FACES)
]


@pytest.mark.parametrize(("dim", "word", "stepper"), CASES)
def test_every_face_of_a_step_gives_the_numbers_of_numpy(dim, word, stepper):
    problem = a_problem(dim, word, stepper)
    u, p, *loads = draw(problem, stepper)
    like = torch.zeros((), dtype=torch.float64)
    step = prepared(problem, stepper, like)
    tensors = [torch.as_tensor(v) for v in (u, p, *loads)]
    found = faces_of(step, tensors[0], tensors[1], tensors[2:])
    wanted = faces_of(prepared(problem, stepper, None), u, p, loads)
    # noise that vanishes at a natural face: the derivative of its root there enlarges the rounding of its square
    rounding = 1e-6 if (word, stepper) == ("natural", "semi-lagrangian") else 1e-12
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=rounding, atol=rounding * max(np.abs(other).max(), 1e-300))
    # and in torch, too, the transpose is the transpose
    back, adjoints = step.apply_transposed(tensors[1])
    sides = paired(tensors[1], found[0]), paired(back, tensors[0])
    paid = sum(paired(q, r) for q, r in zip(adjoints, tensors[2:], strict=True))
    assert abs(sides[0] - sides[1] - paid) < 1e-12 * np.abs(p).sum() * max(np.abs(u).max(), 1.0)


@pytest.mark.parametrize(("dim", "stepper"), [(1, "rk4"), (2, "mcs3"), (2, "semi-lagrangian"), (3, "mcs")])
def test_a_step_stays_on_its_device(dim, stepper, device):
    """Once prepared, a step sends no field and fetches none; the pullback along characteristics traces them again."""
    problem = a_problem(dim, {"semi-lagrangian": "open"}.get(stepper, "absorbing"), stepper)
    u, p, *loads = draw(problem, stepper)
    step = prepared(problem, stepper, torch.zeros((), dtype=torch.float64, device=device))
    tensors = [torch.as_tensor(v, device=device) for v in (u, p, *loads)]
    faces_of(step, tensors[0], tensors[1], tensors[2:])  # constants are sent at their first use
    Elsewhere.sent.clear(), Elsewhere.fetched.clear()
    found = faces_of(step, tensors[0], tensors[1], tensors[2:])
    assert all(v.device.type == device.type for v in found)
    assert max([*Elsewhere.sent, *Elsewhere.fetched, 0]) <= STEERING
    if stepper != "semi-lagrangian":
        assert not Elsewhere.sent
        assert not Elsewhere.fetched
    for one, other in zip(found, faces_of(prepared(problem, stepper, None), u, p, loads), strict=True):
        np.testing.assert_allclose(as_numpy(one), other, rtol=1e-12, atol=1e-12 * max(np.abs(other).max(), 1e-300))


@pytest.mark.parametrize("stepper", [s for s in STEPPERS_IN_TORCH if s != "exponential"])
def test_a_march_with_coefficients_that_change_stays_on_its_device(stepper, device):
    problem = a_problem(2, {"semi-lagrangian": "reflecting"}.get(stepper, "robin"), stepper)
    like = torch.zeros((), dtype=torch.float64, device=device)
    state, generator = draw(problem, stepper)[0], discretize(problem.handing("torch", device), NODES[2], "central2")
    marched = March(generator, STEPPERS[stepper], TIMES, like)
    first = torch.as_tensor(state, device=device)
    marched.backward(first)
    again = March(generator, STEPPERS[stepper], TIMES, like)
    again.mask = marched.mask  # a constant of the grid
    Elsewhere.sent.clear(), Elsewhere.fetched.clear()
    run = again.backward(first)
    assert max([*Elsewhere.sent, *Elsewhere.fetched, 0]) <= STEERING
    plain = March(discretize(problem, NODES[2], "central2"), STEPPERS[stepper], TIMES)
    wanted = plain.backward(state).state
    np.testing.assert_allclose(as_numpy(run.state), wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def rotation(columns, k=None):
    """Ornstein–Uhlenbeck in two dimensions with several terminal functions; k: a parameter."""
    turn = np.array([[-0.5, 2.0], [-2.0, -0.5]])

    def drift(t, x):
        return (1.0 if k is None else k) * (x @ as_like(turn, x))

    def terminal(x):
        return x[..., :1] + (x[..., 1:] - 0.1 * x[..., :1]) ** 2 * as_like(np.linspace(0.5, 1.5, columns), x)

    return KolmogorovProblem(SDE(drift, diffusion=0.4, dim=2), terminal, 0.1, Box([-3.0] * 2, [3.0] * 2))


@pytest.mark.parametrize("stepper", STEPPERS_IN_TORCH)
def test_many_terminal_functions_on_a_given_grid(stepper, device):
    methods = {"grid": 15, "steps": 8 if stepper == "rk4" else 2, "scheme": "central4", "stepper": stepper}
    problem = rotation(columns=7)
    wanted = solve(problem, save=[0.1], **methods).values
    at = torch.zeros(1, 2, dtype=torch.float64, device=device)
    found = solve(problem, at=at, save=[0.1], backend="torch", **methods)
    assert found.values.device.type == device.type
    np.testing.assert_allclose(as_numpy(found.values), wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    assert found(at).device.type == device.type


@pytest.mark.parametrize("noise", [0.4, pytest.param(0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_by_tolerance_torch_takes_the_same_steps(noise, device):
    problem = rotation(columns=2)
    problem.sde = SDE(problem.sde.given["drift"], diffusion=noise, dim=2)
    x = np.array([[0.5, 0.2], [-0.3, 0.4]])
    one = solve(problem, at=x, rtol=1e-2)
    other = solve(problem, at=torch.as_tensor(x, device=device), rtol=1e-2, backend="torch")
    assert one.discretization.stepper == other.discretization.stepper
    assert one.grid.shape == other.grid.shape
    np.testing.assert_allclose(as_numpy(other.values), one.values, rtol=0, atol=1e-11 * np.abs(one.values).max())


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("stepper", STEPPERS_IN_TORCH)
def test_values_and_gradients_of_control(stepper, device, monkeypatch):
    def both(place):
        k = torch.tensor(1.1, dtype=torch.float64, device=place, requires_grad=True)
        x = torch.tensor([[0.3, -0.2], [0.8, 0.1]], dtype=torch.float64, device=place, requires_grad=True)
        u = control.value(rotation(2, k), x, discretization=recipe)
        assert u.device == x.device
        return [u.detach(), *torch.autograd.grad((u * u).sum(), [k, x])]

    steps = 8 if stepper == "rk4" else 2
    recipe = solve(rotation(2), grid=13, steps=steps, scheme="central4", stepper=stepper).discretization
    found = both(device)
    monkeypatch.undo()
    for one, other in zip(found, both("cpu"), strict=True):
        np.testing.assert_allclose(as_numpy(one), other.numpy(), rtol=1e-11, atol=1e-11)


def test_solve_in_torch_records_no_gradients():
    k = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    assert not solve(rotation(2, k), grid=11, steps=2, backend="torch", stepper="mcs").values.requires_grad


@pytest.mark.parametrize("stepper", ["radau5", "implicit-euler"])
def test_what_torch_cannot_do_is_refused(stepper):
    with pytest.raises(InputError, match="tensors"):
        solve(rotation(2), grid=11, steps=2, stepper=stepper, backend="torch")


def test_a_stationary_equation_is_solved_all_the_same():
    problem = KolmogorovProblem(
        SDE(0.1, diffusion=0.7, dim=1), None, None, Box(0.0, 1.0, boundary="absorbing"), source=1.0
    )
    one, other = (solve(problem, grid=21, backend=backend) for backend in ("numba", "torch"))
    np.testing.assert_array_equal(one.values, other.values)
    assert isinstance(one.discretization, Discretization)
    assert one.discretization.scheme in SCHEMES
