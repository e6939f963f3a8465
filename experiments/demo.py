"""A noisy network on handwritten digits, its SDE and its PDE side by side.

Small classifiers send scanned digits through an encoder into the plane, there through a noisy residual flow
X_{k+1} = X_k + h f(X_k) + noise, and read the class off a linear head. They are trained without noise, with additive
Gaussian noise √h s ζ, and with centred Bernoulli noise c √h f ⊙ (±1). Then, on held-out digits,

1. the expected loss is computed twice: by sampling the network, and as u(0, x) of the backward Kolmogorov equation of
   its modified SDE, all ten class losses in one solve;
2. the two are compared as the depth of the same flow grows, the network's side without sampling by recursion over its
   layers: their difference must fade with the weak order of the equation;
3. the surface u(0, ·) is measured as the noise is raised, at fixed weights and at weights trained with that noise.

Without noise the equation is transport, and is solved along its characteristics.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from kolmo.experiments._crew import Crew

import kolmo
from kolmo import bridge, experiments
from kolmo.errors import InputError
from kolmo.experiments import _demo_figures as figures
from kolmo.experiments import _digits as digits
from kolmo.report import Figure, Measured, Section, Table, agrees, compared
from kolmo.runs import Run

NONE = "no noise"
Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 1
    seed: int = 0
    noise: tuple[float, ...] = (0.1, 0.3)  # s of the additive Gaussian noise; no noise is always there too
    moderate: float = 0.3  # the level of the depth study and of the headline
    bernoulli: float = 0.8  # c of the centred Bernoulli noise
    held_out: int = 450
    epochs: int = 200
    batch: int = 256
    rate: float = 0.01
    kinetic: float = 0.02  # penalty on E ∫ |f|² dt
    encoder_width: int = 128
    width: int = 32
    depth: int = 16  # layers while training
    depths: tuple[int, ...] = (8, 16, 32, 64)  # of the depth study
    paths: int = 200  # noisy passes per held-out digit
    rtol: float = 1e-4  # of the surfaces
    depth_atol: float = 2e-5  # of the depth study
    digit: int = 8  # the class whose loss surface is drawn
    workers: int = 2  # processes; the numbers do not depend on it


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    check(config)
    seeds = range(config.seed, config.seed + config.seeds)
    units = len(seeds) * (2 * len(laws(config)) + len(config.noise) + len(studied(config)))
    with Crew(run, config.workers, units=units, progress=progress) as crew:
        trained = crew.do(
            {_key("train", seed, name): (train, (config, name, seed)) for seed in seeds for name in laws(config)}
        )
        found = [_one_seed(config, seed, crew, trained) for seed in seeds]
    results = _summary(config, found)
    for name, figure in figures.draw(config.digit, found[0], results).items():
        run.save_figure(name, figure)
    return results


def check(config: Config) -> None:
    """Say what is wrong with options before anything is trained."""
    least = dict.fromkeys(("seeds", "epochs", "batch", "encoder_width", "width", "depth", "workers"), 1) | {"paths": 2}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise InputError(name, getattr(config, name), f"at least {value}")
    for name in ("rate", "bernoulli", "rtol", "depth_atol"):
        if not getattr(config, name) > 0.0:
            raise InputError(name, getattr(config, name), "a positive number")
    if not config.noise or not all(s > 0.0 for s in config.noise) or config.moderate not in config.noise:
        raise InputError("noise, moderate", (config.noise, config.moderate), "positive levels, moderate one of them")
    if not config.depths or min(config.depths) < 1:
        raise InputError("depths", config.depths, "at least one, each at least 1")
    if not 0 <= config.digit < digits.CLASSES:
        raise InputError("digit", config.digit, f"from 0 to {digits.CLASSES - 1}")
    digits.split(config.seed, config.held_out)


def networks(run: Run) -> dict[str, Any]:
    """The trained classifiers, with the held-out digits of their seed."""
    config = experiments.configure(Config, run.config)
    found = {}
    for seed in range(config.seed, config.seed + config.seeds):
        test = digits.split(seed, config.held_out)[1]
        for name in laws(config):
            model = restored(config, name, run.load_unit(_key("train", seed, name))["state"])
            found[f"{name}, seed {seed}"] = model, test.x.double(), test.y
    return found


# ------------------------------------------------------------------------------------------------------- the method


def laws(config: Config) -> dict[str, bridge.NoiseLaw]:
    """Noise laws by name, weakest first."""
    additive = {_gaussian(s): bridge.Additive(s) for s in config.noise}
    bernoulli = {f"Bernoulli {config.bernoulli:g}": bridge.CentredBernoulli(config.bernoulli)}
    return {NONE: bridge.Additive(0.0), **additive, **bernoulli}


def studied(config: Config) -> list[str]:
    """Noise laws of the depth study."""
    return [NONE, _gaussian(config.moderate), f"Bernoulli {config.bernoulli:g}"]


def _gaussian(s: float) -> str:
    return f"Gaussian {s:g}"


def _key(kind: str, seed: int, name: str) -> str:
    return f"{kind}-{seed}-{name.replace(' ', '-')}"


def _one_seed(config: Config, seed: int, crew: Crew, trained: dict[str, Any]) -> dict[str, Any]:
    """Evaluate every trained classifier, raise the noise at fixed weights, and vary the depth."""
    weights = {name: trained[_key("train", seed, name)]["state"] for name in laws(config)}
    plain, noises = weights[NONE], [_gaussian(s) for s in config.noise]
    done = crew.do(
        # The longest first, so that the last to end is a short one.
        {
            _key("depth", seed, name): (depth_study, (config, name, weights[name], seed))
            for name in studied(config)[::-1]
        }
        | {_key("fixed", seed, name): (surface, (config, name, plain, seed)) for name in noises}
        | {_key("evaluate", seed, name): (evaluate, (config, name, weights[name], seed)) for name in laws(config)}
    )

    def results(kind: str, names: Iterable[str]) -> dict[str, Any]:
        return {name: done[_key(kind, seed, name)] for name in names}

    evaluated = results("evaluate", laws(config))
    return {
        "labels": digits.split(seed, config.held_out)[1].y.numpy(),
        "trained": evaluated,
        "fixed": {NONE: evaluated[NONE], **results("fixed", noises)},
        "depth": results("depth", studied(config)),
    }


def train(config: Config, name: str, seed: int) -> dict[str, Any]:
    """Train the classifier with some noise; return its weights and the mean loss of every epoch."""
    model = _untrained(config, laws(config)[name], seed)
    history = digits.train(
        model,
        digits.split(seed, config.held_out)[0],
        seed,
        epochs=config.epochs,
        batch=config.batch,
        rate=config.rate,
        kinetic=config.kinetic,
    )
    return {"state": {key: value.numpy() for key, value in model.state_dict().items()}, "history": history}


def _untrained(config: Config, law: bridge.NoiseLaw, seed: int) -> bridge.FlowClassifier:
    return digits.classifier(law, config.depth, seed, encoder_width=config.encoder_width, width=config.width)


def restored(config: Config, name: str, weights: Weights) -> bridge.FlowClassifier:
    """Classifier of these weights under some noise, in double precision: what follows is about small differences."""
    model = _untrained(config, laws(config)[name], config.seed)
    model.load_state_dict({key: torch.as_tensor(value) for key, value in weights.items()})
    return model.double().eval()


def evaluate(config: Config, name: str, weights: Weights, seed: int) -> dict[str, Any]:
    """Accuracy, and the expected loss of every held-out digit by sampling and by the Kolmogorov equation."""
    sampling = sampled(config, restored(config, name, weights), digits.split(seed, config.held_out)[1], seed)
    return {**sampling, **surface(config, name, weights, seed)}


@torch.no_grad()
def sampled(config: Config, model: bridge.FlowClassifier, test: digits.Digits, seed: int) -> dict[str, Any]:
    """Accuracy of the mean network and of noisy passes, and their mean loss with its standard error."""
    x, y, rows = test.x.double(), test.y, torch.arange(len(test.y))
    features = model.encoder(x)
    net = bridge.expected_loss(model.net, _losses_and_hits(model), features, paths=config.paths, rng=seed)
    error = net.standard_error[rows, y]  # type: ignore[index]
    return {
        "accuracy": float((model(x).argmax(-1) == y).double().mean()),
        "noisy_accuracy": float(net.mean[rows, digits.CLASSES + y].mean()),
        "network": net.mean[rows, y].numpy(),
        "network_error": float(error.square().sum().sqrt() / len(y)),
        "lines": _trajectories(model, features, seed),
        "regions": model.head(torch.as_tensor(_points(figures.WIDE))).argmax(-1).numpy(),
    }


def _losses_and_hits(model: bridge.FlowClassifier) -> Callable[[torch.Tensor], torch.Tensor]:
    """Class losses of final features, and which class is chosen."""

    def columns(z: torch.Tensor) -> torch.Tensor:
        losses = model.class_losses(z)
        return torch.cat([losses, torch.nn.functional.one_hot(losses.argmin(-1), digits.CLASSES)], -1)

    return columns


def _trajectories(model: bridge.FlowClassifier, x: torch.Tensor, seed: int) -> np.ndarray:
    """One noisy pass layer by layer, shape (layers + 1, n, 2)."""
    draw = bridge.resnet.independent(torch.Generator().manual_seed(seed))
    states = [x]
    for k in range(model.net.depth):
        states.append(model.net.step(k, states[-1], draw))
    return torch.stack(states).numpy()


def layer_equation(net: bridge.NoisyResNet, depth: int, order: int) -> kolmo.SDE:
    """Modified SDE of the flow at some depth: that of one layer, for all layers share their weights."""
    layer = bridge.NoisyResNet([net.branches[0]], net.law(0), horizon=net.horizon / depth)
    return bridge.modified_sde(layer, order)


def surface(config: Config, name: str, weights: Weights, seed: int) -> dict[str, Any]:
    """Solve for the ten class losses, and for the ten class probabilities; measure u(0, ·) at the held-out digits."""
    model, test = restored(config, name, weights), digits.split(seed, config.held_out)[1]
    with torch.no_grad():
        points = model.encoder(test.x.double()).numpy()
    rows, labels = np.arange(len(points)), test.y.numpy()
    losses, probabilities = solved(config, model, points)
    return {
        "points": points,
        "pde": losses(points)[rows, labels],
        "pde_error": losses.error_estimate[rows, labels],
        "status": losses.status,
        "losses": losses(points),
        "plane": losses(_points(figures.PLANE)),
        "gradient": np.linalg.norm(losses.gradient(points)[rows, :, labels], axis=-1),
        "laplacian": np.trace(losses.hessian(points)[rows, :, :, labels], axis1=1, axis2=2),
        "probability_slope": np.linalg.norm(probabilities.gradient(points), axis=1).max(-1),
    }


def solved(config: Config, model: bridge.FlowClassifier, points: np.ndarray) -> tuple[Any, Any]:
    """Class losses by tolerance at the points, and class probabilities on the same grid; without noise, transported."""
    equation, horizon = layer_equation(model.net, config.depth, 1), model.net.horizon

    def probabilities(z: torch.Tensor) -> torch.Tensor:
        return torch.exp(-model.class_losses(z))

    if model.net.law(0).noiseless:
        return tuple(digits.Transported(equation, phi, horizon, points) for phi in (model.class_losses, probabilities))
    at = np.concatenate([points, _points(figures.PLANE[[0, -1]])])  # with the corners of the square that is drawn
    problem = kolmo.KolmogorovProblem(equation, model.class_losses, horizon)
    losses = kolmo.solve(problem, at=at, rtol=config.rtol, atol=config.rtol)
    problem = kolmo.KolmogorovProblem(equation, probabilities, horizon)
    return losses, kolmo.solve(problem, discretization=losses.discretization)


def _points(axis: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


# -------------------------------------------------------------------------------------------------- the depth study


@torch.no_grad()
def depth_study(config: Config, name: str, weights: Weights, seed: int) -> dict[str, Any]:
    """Root-mean-square difference of network and equation over the held-out digits, for every depth and order."""
    model, test = restored(config, name, weights), digits.split(seed, config.held_out)[1]
    features = model.encoder(test.x.double())
    law, branch = model.net.law(0), model.net.branches[0]
    label = np.arange(len(features)), test.y.numpy()
    orders = [order for order in (1, 2) if order <= law.weak_order().order]
    network, network_error = [], []
    # What is left over after the equation of order 1 is larger: it needs less accuracy to be seen.
    tolerance = config.depth_atol * (1.0 if 2 in orders else 10.0)
    for depth in config.depths:
        # Differences fade with depth, those that stay resolved like 1/depth: so may the tolerance grow.
        atol = 0.25 * tolerance * depth / config.depths[0]
        net = digits.flow(branch, law, depth)
        exact = bridge.expected_loss(net, model.class_losses, features, method="recursion", rtol=0.0, atol=atol)
        network.append(exact.mean.numpy()[label])
        network_error.append(_rms(exact.error_estimate.numpy()[label]))  # type: ignore[union-attr]
    equations = _characteristics if law.noiseless else _grids
    values, errors = equations(config, model, features.numpy(), label, orders, tolerance)
    difference = np.array([[_rms(u - v) for u, v in zip(network, values[order], strict=True)] for order in orders])
    return {
        "orders": orders,
        "network": np.array([np.mean(u) for u in network]),
        "network_error": np.array(network_error),
        "pde": np.array([[np.mean(v) for v in values[order]] for order in orders]),
        "pde_error": np.array([[_rms(e) for e in errors[order]] for order in orders]),
        "difference": difference,
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


Found = tuple[dict[int, list[np.ndarray]], dict[int, list[np.ndarray]]]
"""Values at the held-out digits, and their error estimates: by order, for every depth."""


def _characteristics(
    config: Config, model: bridge.FlowClassifier, x: np.ndarray, label: Any, orders: list[int], tolerance: float
) -> Found:
    """Without noise the equation is transport: u(0, x) is the loss at the end of the characteristic from x."""

    def solution(order: int, depth: int) -> digits.Transported:
        return digits.Transported(
            layer_equation(model.net, depth, order), model.class_losses, model.net.horizon, x, steps=128
        )

    found = {order: [solution(order, depth) for depth in config.depths] for order in orders}
    values = {order: [one(x)[label] for one in solutions] for order, solutions in found.items()}
    return values, {order: [one.error_estimate[label] for one in solutions] for order, solutions in found.items()}


def _grids(
    config: Config, model: bridge.FlowClassifier, x: np.ndarray, label: Any, orders: list[int], tolerance: float
) -> Found:
    """Solve by tolerance for the equation that differs most from the others, then for those on the same recipe."""

    def problem(order: int, depth: int) -> kolmo.KolmogorovProblem:
        return kolmo.KolmogorovProblem(layer_equation(model.net, depth, order), model.class_losses, model.net.horizon)

    hardest = orders[-1], config.depths[0]
    searched = kolmo.solve(problem(*hardest), at=x, rtol=0.0, atol=tolerance)
    # Explicit steps are as long as they are stable for one of the equations; the others get a margin.
    steps = math.ceil(1.3 * searched.discretization.steps)
    times = tuple(np.linspace(0.0, model.net.horizon, steps + 1))
    recipe = dataclasses.replace(searched.discretization, times=times)

    def value(order: int, depth: int) -> np.ndarray:
        same = (order, depth) == hardest
        return (searched if same else kolmo.solve(problem(order, depth), discretization=recipe))(x)[label]

    values = {}
    for order in orders:
        depths = config.depths if order > 1 else config.depths[:1]  # of order 1 there is one equation for all depths
        found = [value(order, depth) for depth in depths]
        values[order] = found if order > 1 else found * len(config.depths)
    error = searched.error_estimate[label]  # type: ignore[index]
    return values, {order: [error] * len(config.depths) for order in orders}


def slope(depths: tuple[int, ...], difference: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """Observed order over the deepest pair of depths whose differences are resolved."""
    resolved = difference >= figures.RESOLVED * error
    pairs = [k for k in range(len(depths) - 1) if resolved[k] and resolved[k + 1]]
    if not pairs:
        return {"slope": None, "pair": None}
    k = pairs[-1]
    rate = math.log(difference[k] / difference[k + 1]) / math.log(depths[k + 1] / depths[k])
    return {"slope": rate, "pair": [depths[k], depths[k + 1]]}


# ---------------------------------------------------------------------------------------------------------- numbers


def _summary(config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "accuracy": {name: _over_seeds([one["trained"][name]["accuracy"] for one in found]) for name in laws(config)},
        "moderate": _gaussian(config.moderate),
        "losses": {name: [_losses(one["trained"][name]) for one in found] for name in laws(config)},
        "depth": {name: [depth_numbers(config, one["depth"][name]) for one in found] for name in studied(config)},
        "smoothing": smoothing(config, found),
    }


def _over_seeds(values: list[float]) -> dict[str, Any]:
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "values": [float(value) for value in values]}


def _losses(one: dict[str, Any]) -> dict[str, Any]:
    difference = one["network"] - one["pde"]
    return {
        "noisy_accuracy": one["noisy_accuracy"],
        "network": float(one["network"].mean()),
        "network_standard_error": one["network_error"],
        "pde": float(one["pde"].mean()),
        "pde_error_estimate": float(one["pde_error"].mean()),
        "difference": float(difference.mean()),
        "status": one["status"],
    }


def depth_numbers(config: Config, one: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"depths": config.depths, "network": one["network"], "network_error": one["network_error"]}
    for order, pde, error, difference in zip(
        one["orders"], one["pde"], one["pde_error"], one["difference"], strict=True
    ):
        total = error + one["network_error"]
        numbers = {"pde": pde, "difference": difference, "error_estimate": total}
        found[f"order {order}"] = {**numbers, **slope(config.depths, difference, total)}
    return found


def smoothing(config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Measures of the surface for every noise, at fixed weights and at those trained with it, over the seeds."""
    measures = {
        weights: {name: _measures([one[weights][name] for one in found]) for name in found[0][weights]}
        for weights in ("fixed", "trained")
    }
    for name, numbers in measures["fixed"].items():  # at fixed weights the digits keep their features
        changes = [one["fixed"][name]["losses"] - one["fixed"][NONE]["losses"] for one in found]
        numbers["largest_change"] = _over_seeds([float(np.abs(change).max()) for change in changes])
    return measures


def _measures(surfaces: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "mean_gradient": _over_seeds([float(one["gradient"].mean()) for one in surfaces]),
        "largest_laplacian": _over_seeds([float(np.abs(one["laplacian"]).max()) for one in surfaces]),
        "largest_probability_slope": _over_seeds([float(one["probability_slope"].max()) for one in surfaces]),
    }


# ----------------------------------------------------------------------------------------------------------- report


def conclusions(run: Run) -> list[str]:
    results, told = run.results, []
    plain = results["accuracy"][NONE]
    for name, accuracy in results["accuracy"].items():
        if name != NONE:
            pairs = np.array(accuracy["values"]) - np.array(plain["values"])
            error = float(pairs.std(ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else None
            between = "without noise", f"trained with {name}"
            told.append(compared("Accuracy", plain["mean"], accuracy["mean"], error, between))
    for name, seeds in results["losses"].items():
        one = seeds[0]
        uncertainty = 2 * one["network_standard_error"] + one["pde_error_estimate"]
        told.append(agrees(f"{name}: the losses of network and equation", one["difference"], uncertainty))
    for name, seeds in results["depth"].items():
        for order in (key for key in seeds[0] if key.startswith("order")):
            told.append(_fallen(name, order.split()[1], seeds[0][order]))
    return told


def _fallen(name: str, order: str, found: dict[str, Any]) -> str:
    """How the difference from an equation falls with the depth."""
    if found["slope"] is None:
        return f"{name}: how the difference from the equation of order {order} falls with the depth is not resolved."
    first, last = found["pair"]
    rate = f"L^-{found['slope']:.2f}, L = {first} to {last}"
    return f"{name}: the difference from the equation of order {order} falls like {rate}."


def report(run: Run) -> list[Section]:
    results, seed = run.results, run.config["seed"]
    return [
        Section("What was done", _what(run)),
        Section(
            "The flow",
            [Figure(run.figure("flow"), "decision regions of the heads, with noisy trajectories", figures.FLOW)],
        ),
        Section("Network and equation", [_loss_table(results, seed)]),
        Section(
            "Network and equation over the depth",
            [Figure(run.figure("depth"), "difference against depth, log-log", figures.DEPTH), _depth_table(results)],
        ),
        Section(
            "What the noise does to the surface",
            [
                Figure(run.figure("surfaces"), "expected loss of one class for every noise", figures.SURFACES),
                Figure(run.figure("smoothing"), "measures of the surface for every noise", figures.SMOOTHING),
                _smoothing_table(results),
            ],
        ),
    ]


def _what(run: Run) -> list[Any]:
    config, results = run.config, run.results
    accuracy = results["accuracy"][results["moderate"]]
    held = _measured(accuracy)
    return [
        f"Classifiers of scikit-learn's handwritten digits, {config['held_out']} of them held out, send every image to "
        f"a point of the plane and from there through {config['depth']} noisy residual layers that share weights. At "
        f"the moderate level ({results['moderate']}) the held-out accuracy is "
        f"{held if isinstance(held, Measured) else f'{held:.3f}'} (seeds: {len(accuracy['values'])}).",
        "A layer is a step of a stochastic differential equation, so the expected loss of the network is, up to an "
        "order in the step, the solution of a backward Kolmogorov equation. Below are both, and their difference.",
    ]


def _measured(numbers: dict[str, Any]) -> Any:
    error = numbers["standard_error"]
    return numbers["mean"] if error is None else Measured(numbers["mean"], error)


def _loss_table(results: dict[str, Any], seed: int) -> Table:
    rows = []
    for name, accuracy in results["accuracy"].items():
        one = results["losses"][name][0]
        error, estimate = one["network_standard_error"], one["pde_error_estimate"]
        rows.append(
            [
                name,
                _measured(accuracy),
                one["noisy_accuracy"],
                Measured(one["network"], error) if error else one["network"],
                Measured(one["pde"], estimate),
                Measured(one["difference"], error + estimate),
            ]
        )
    header = ["noise", "accuracy", "with noise on", "network loss", "PDE loss", "difference"]
    return Table(
        header,
        rows,
        f"Held-out digits. Accuracy: mean network, over all seeds (± standard error). The rest: seed {seed}; network "
        "loss by sampling ± standard error, PDE loss (order 1) ± its error estimate, averaged over the digits.",
    )


def _depth_table(results: dict[str, Any]) -> Table:
    rows = []
    for name, seeds in results["depth"].items():
        for order in (key for key in seeds[0] if key.startswith("order")):
            first = seeds[0][order]
            pair = "–" if first["pair"] is None else f"{first['pair'][0]} to {first['pair'][1]}"
            slopes = [f"{one[order]['slope']:.2f}" if one[order]["slope"] else "–" for one in seeds[1:]]
            rows.append([name, order.split()[1], *first["difference"], first["slope"], pair, ", ".join(slopes) or "–"])
    depths = next(iter(results["depth"].values()))[0]["depths"]
    header = ["noise", "order", *(f"L = {depth}" for depth in depths), "slope", "from L", "other seeds"]
    return Table(
        header,
        rows,
        "Root mean square over the held-out digits of network loss − PDE loss, first seed. Slope: over the deepest "
        f"pair of depths whose differences are at least {figures.RESOLVED:g} times the error estimates of PDE and "
        "recursion together.",
    )


def _smoothing_table(results: dict[str, Any]) -> Table:
    rows = [
        [
            {"fixed": "without noise", "trained": "with it"}[weights],
            name,
            *(_measured(measures[key]) if key in measures else None for key in figures.MEASURES),
        ]
        for weights, levels in results["smoothing"].items()
        for name, measures in levels.items()
        if not (weights == "trained" and name == NONE)
    ]
    return Table(
        ["trained", "noise", *figures.MEASURES.values()],
        rows,
        "At the held-out digits: mean |∇u| and max |Δu| for the loss of the true class, largest slope of any class "
        "probability, largest change of any class loss against the same weights without noise.",
    )
