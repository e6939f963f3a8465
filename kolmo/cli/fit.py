"""Parameters of a model from a table of data, as a run: estimates, intervals, residuals and pictures."""

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from kolmo.cli.equation import numbers, spoken
from kolmo.cli.kinds import KINDS, Kind, asked
from kolmo.cli.perform import Manner, perform, reopened
from kolmo.equations import Observed
from kolmo.equations.document import MAX_BYTES
from kolmo.errors import InputError, NotConvergedError
from kolmo.files import read_text, schema
from kolmo.report import Block, Code, Figure, Measured, Section, Table, write_report
from kolmo.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kolmo.likelihood import Fit, Likelihood, PassageLikelihood

__all__ = ["fit", "report", "resume"]

_KIND = "fit"
_MODEL, _DATA = "equation.toml", "data.csv"
SEED = 0
# Conditions and paths that are drawn at most.
DRAWN = 6
LEVEL = 0.95


def fit(file: Path, data: Path, assignments: tuple[str, ...], manner: Manner) -> int:
    """Fit the parameters; return the exit code."""
    observed = Observed(file, data, numbers(assignments))
    with spoken(observed):
        observed.likelihood()  # what is wrong with the data is said before there is a run
    config = {"parameters": observed.parameters, "data": str(data)}
    files = {_MODEL: observed.text.encode(), _DATA: observed.sheet.content}
    run = Run.create(_KIND, config, out=manner.out, seeds=[SEED], files=files)
    return _performed(run, observed, manner)


def resume(folder: Path, manner: Manner) -> int:
    """Go on with a fit that was interrupted; starts that were finished are kept. Return the exit code."""
    config = asked(reopened(folder, _KIND, "one of kolmo fit"), _CONFIG)
    observed = Observed(folder / _MODEL, folder / _DATA, config["parameters"])
    return _performed(Run.resume(folder, take_over=manner.take_over), observed, manner)


_CONFIG = schema.table({"parameters": schema.mapping(schema.number()), "data": schema.text()})


def _performed(run: Run, observed: Observed, manner: Manner) -> int:
    def work() -> dict[str, Any]:
        with spoken(observed):
            return _Work(run, observed, manner.quiet).done()

    return perform(run, work, manner.as_json)


class _Work:
    """The fit of one run: every start, and what follows from the best, is a unit of it."""

    def __init__(self, run: Run, observed: Observed, quiet: bool) -> None:
        import torch

        self.run, self.observed, self.quiet = run, observed, quiet
        names = observed.estimation.parameters
        self.free: dict[str, Tensor] = {
            name: torch.tensor(observed.parameters[name], dtype=torch.float64, requires_grad=True) for name in names
        }
        self.tensors = list(self.free.values())
        self.likelihood: Likelihood = observed.likelihood(self.free)

    def done(self) -> dict[str, Any]:
        wanted = self.observed.estimation
        starts = [self.run.unit(f"start-{k:03d}", partial(self._from, k)) for k in range(wanted.starts)]
        if not any(np.isfinite(found["log_likelihood"]) for found in starts):
            raise NotConvergedError("no start has a finite likelihood: move the parameters, or their bounds")
        best = max(starts, key=lambda found: float(found["log_likelihood"]))
        final = self.run.unit("intervals", lambda: self._intervals(np.asarray(best["x"])))
        self._put(np.asarray(final["x"]))
        checks = self._drawn()
        columns = zip(wanted.parameters, final["x"], final["errors"], final["ends"], strict=True)
        p, ell = len(wanted.parameters), float(final["log_likelihood"])
        return {
            "status": str(final["status"]),
            "message": str(final["message"]),
            "parameters": {
                name: {
                    "estimate": float(x),
                    "standard_error": _finite(error),
                    "low": _finite(low),
                    "high": _finite(high),
                    "start": self.observed.parameters[name],
                }
                for name, x, error, (low, high) in columns
            },
            "intervals": "profile" if wanted.profile else "normal",
            "log_likelihood": ell,
            "error_estimate": float(final["error_estimate"]),
            "observations": self.likelihood.count,
            "aic": 2.0 * p - 2.0 * ell,
            "bic": p * float(np.log(self.likelihood.count)) - 2.0 * ell,
            "residuals": checks,
            "starts": [_finite(found["log_likelihood"]) for found in starts],
        }

    def _from(self, k: int) -> dict[str, Any]:
        """Maximise from the k-th start."""
        wanted = self.observed.estimation
        begin = np.array([self.observed.parameters[name] for name in wanted.parameters])
        low, high = np.array(wanted.bounds).T
        draws = np.random.default_rng(SEED).uniform(size=(wanted.starts, len(begin)))
        try:
            found = self._fitted(begin if k == 0 else low + draws[k] * (high - low))
        except (InputError, NotConvergedError):
            # what is wrong with the first start is wrong with what was asked
            if k == 0:
                raise
            return {"x": begin, "log_likelihood": -np.inf}
        if not self.quiet:
            told = f"start {k + 1} of {wanted.starts}: log-likelihood {found.log_likelihood:.6g}"
            click.echo(told, err=True)
        return {"x": found.x, "log_likelihood": found.log_likelihood}

    def _intervals(self, x: np.ndarray) -> dict[str, Any]:
        """Go on from the best start to the end, and see how well the parameters are known there."""
        found = self._fitted(x)
        nothing = np.full(len(x), np.nan)
        message, errors, ends = str(found.result.message), nothing, np.stack([nothing, nothing], -1)
        try:
            known = found.uncertainty(level=LEVEL, profile=self.observed.estimation.profile)
            errors, ends = known.standard_errors, known.intervals if known.profile is None else known.profile
        except NotConvergedError as error:
            message = f"{message}; no intervals: {error}"
        met = self.likelihood.status == "converged" and found.success
        return {
            "x": found.x,
            "errors": errors,
            "ends": ends,
            "log_likelihood": found.log_likelihood,
            "error_estimate": found.error_estimate,
            "status": "converged" if met else str(found.result.status),
            "message": message,
        }

    def _fitted(self, x: np.ndarray) -> "Fit":
        """Maximise from parameters on."""
        from kolmo import likelihood

        self._put(x)
        wanted = self.observed.estimation
        return likelihood.fit(self.likelihood, self.tensors, bounds=list(wanted.bounds), maxiter=wanted.maxiter)

    def _put(self, x: np.ndarray) -> None:
        import torch

        with torch.no_grad():
            for tensor, value in zip(self.tensors, x, strict=True):
                tensor.copy_(torch.as_tensor(value))

    def _drawn(self) -> dict[str, dict[str, float]]:
        """Pictures of data and model, and whether the residuals are uniform."""
        from matplotlib.figure import Figure as Canvas

        from kolmo.likelihood import residuals

        self.run.save_figure("data", _data(self.observed, self.likelihood))
        try:
            found = residuals(self.likelihood, rng=SEED)
        except InputError:  # beyond one dimension there are none of processes that are not linear
            return {}
        canvas = Canvas(figsize=(5.2, 3.8), layout="constrained")
        found.plot(canvas.subplots())
        self.run.save_figure("residuals", canvas)
        return {name: {"statistic": d, "p": p} for name, (d, p) in found.check().items()}


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _data(observed: Observed, likelihood: Any) -> Any:
    """Observed and fitted densities of every condition, or the paths."""
    from matplotlib.figure import Figure as Canvas

    if observed.choices:
        return _choices(likelihood)
    canvas = Canvas(figsize=(8.0, 3.2), layout="constrained")
    ax = canvas.subplots()
    for t, x in list(zip(*observed.paths(), strict=True))[:DRAWN]:
        ax.plot(t, x, lw=0.9, marker=".", ms=3)
    ax.set(xlabel="time", ylabel="state")
    return canvas


def _choices(likelihood: "PassageLikelihood") -> Any:
    from matplotlib.figure import Figure as Canvas

    from kolmo.likelihood import plot_choices

    trials = likelihood.trials
    timed = ~np.isnan(trials.times) & ~trials.censored
    some = [c for k, c in enumerate(trials.conditions) if (timed & (trials.group == k)).any()]
    shown = some[:DRAWN] if trials.covariates and len(some) <= DRAWN else [{}]
    wide = min(len(shown), 3)
    tall = -(-len(shown) // wide)
    figure = Canvas(figsize=(1.0 + 3.2 * wide, 3.0 * tall), layout="constrained")
    axes = figure.subplots(tall, wide, squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, condition in zip(axes.flat, shown, strict=False):
        plot_choices(likelihood, condition, ax=ax)
        ax.set_title(", ".join(f"{name} = {value:g}" for name, value in condition.items()), fontsize="medium")
        ax.label_outer()
    for ax in axes.flat[1:]:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    return figure


def report(run: Run) -> Path:
    """Write the report from what the folder holds."""
    found = run.results
    kind = "Profile intervals" if found["intervals"] == "profile" else "Intervals of two standard errors"
    rows: list[list[object]] = [
        [name, v["start"], _measured(v["estimate"], v["standard_error"]), v["low"], v["high"]]
        for name, v in found["parameters"].items()
    ]
    known = Measured(found["log_likelihood"], found["error_estimate"])
    good = [known, found["observations"], found["aic"], found["bic"]]
    titles = ["log-likelihood", "observations", "AIC", "BIC"]
    blocks: list[Block] = [
        f"{found['status'].capitalize()}: {found['message']}.",
        Table(["parameter", "start", "estimate", "from", "to"], rows, f"{kind}, {LEVEL:.0%}."),
        Table(titles, [good], "± the estimated error of the discretisation."),
    ]
    sections = [Section("Answer", blocks), Section("Does it fit?", _fits(run, found))]
    text = read_text(run.folder / _MODEL, MAX_BYTES, in_run=True)
    sections.append(Section("What was asked", [f"`{_MODEL}` in the folder:", Code(text)]))
    return write_report(run, sections, title="Parameters from data", command=_command(run))


def _fits(run: Run, found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [
        Figure(
            run.figure("data"),
            "The data, and what the fitted model makes of them",
            "Bars or dots: observed. Lines: fitted; of two choices, the lower one downwards.",
        )
    ]
    if found["residuals"]:
        rows = [[name, v["statistic"], v["p"]] for name, v in found["residuals"].items()]
        caption = "Residuals by the probability integral transform are uniform where the model is right."
        blocks.append(Table(["residual", "Kolmogorov–Smirnov", "p"], rows, caption))
        alt = "Distribution of the residuals less the uniform one, with a band of 95 %"
        blocks.append(Figure(run.figure("residuals"), alt, "Outside the band the model does not explain the data."))
    return blocks


def _measured(value: float, error: float | None) -> Measured | float:
    return value if error is None else Measured(value, error)


def _command(run: Run) -> str:
    sets = "".join(f" --set {shlex.quote(f'{n}={v!r}')}" for n, v in asked(run, _CONFIG)["parameters"].items())
    return f"kolmo fit {_MODEL} {_DATA}{sets}"


def _shown(results: dict[str, Any]) -> dict[str, Any]:
    """A line for each parameter, and how good the fit is."""

    def line(v: Mapping[str, Any]) -> str:
        ends = "" if v["low"] is None or v["high"] is None else f"  [{v['low']:.6g}, {v['high']:.6g}]"
        return f"{_measured(v['estimate'], v['standard_error'])}{ends}"

    good = {key: results[key] for key in ("log_likelihood", "aic", "bic", "observations", "status")}
    checks = {f"p of {name}": v["p"] for name, v in results["residuals"].items()}
    return {**{name: line(v) for name, v in results["parameters"].items()}, **good, **checks}


_NUMBER = schema.optional(schema.number())
_PARAMETER = schema.table(
    {"estimate": schema.number(), "standard_error": _NUMBER, "low": _NUMBER, "high": _NUMBER, "start": schema.number()}
)
_RESULTS = schema.table(
    {
        "status": schema.text(),
        "message": schema.text(),
        "parameters": schema.mapping(_PARAMETER, 1),
        "intervals": schema.text(["profile", "normal"]),
        **dict.fromkeys(("log_likelihood", "error_estimate", "aic", "bic"), schema.number()),
        "observations": schema.whole(1),
        "residuals": schema.mapping(schema.table({"statistic": schema.number(), "p": schema.number()})),
        "starts": schema.many(_NUMBER, 1),
    }
)
KINDS.add(
    _KIND,
    Kind(lambda run: f"kolmo fit --resume {shlex.quote(str(run.folder))}", report, _RESULTS, _shown),
)
