"""The commands themselves; each is thin, the work is done elsewhere."""

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import kolmo as package
from kolmo import experiments
from kolmo.cli import equation, landscape
from kolmo.cli import experiment as of_experiment
from kolmo.cli import fit as of_fit
from kolmo.cli import sweep as of_sweep
from kolmo.cli.perform import Manner, rewrite
from kolmo.cli.text import readable
from kolmo.errors import InputError
from kolmo.runs import Run, environment

__all__ = ["kolmo"]

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_PATH = click.Path(path_type=Path)


def _manners(what: str) -> list[click.Option]:
    """Options of every command that makes a run."""
    unsure = "With --resume, also where it cannot be told whether another process still writes."
    return [
        click.Option(["--out"], type=_PATH, help="A new folder for the run; default: a fresh one in ./runs."),
        click.Option(["--resume"], type=_PATH, help=f"Continue the {what} in this folder."),
        click.Option(["--take-over"], is_flag=True, help=unsure),
        click.Option(["--quiet"], is_flag=True, help="Show no progress."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
    ]


def _in_a_manner(call: Callable[..., int]) -> Callable[..., int]:
    """The function with the options of ``_manners`` gathered to one argument, ``manner``."""

    @functools.wraps(call)
    def gathered(**given: Any) -> int:
        return call(manner=Manner(**{name: given.pop(name) for name in Manner._fields}), **given)

    return gathered


class _Running(click.Command):
    """A command that makes a run, named after the command."""

    def __init__(self, name: str, *, params: list[click.Parameter], callback: Callable[..., int], **given: Any) -> None:
        super().__init__(name, params=[*params, *_manners(name)], callback=_in_a_manner(callback), **given)


class _ExperimentCommand(click.Command):
    """The command that runs one experiment; the experiment is imported only when it runs or shows its options."""

    def __init__(self, experiment: str, name: str) -> None:
        super().__init__(
            name,
            callback=_in_a_manner(functools.partial(of_experiment.experiment, experiment)),
            help=experiments.describe(experiment),
            params=[
                click.Option(["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help="Set an option."),
                click.Option(["--seeds"], metavar="N", help="How many seeds: the same as --set seeds=N."),
                click.Option(["--seed"], metavar="S", help="The first seed: the same as --set seed=S."),
                *_manners("run"),
            ],
        )
        self.experiment = experiment

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Options, without those for seeds where the experiment draws nothing."""
        known = {field.name for field in dataclasses.fields(experiments.load(self.experiment).Config)}
        return [one for one in super().get_params(ctx) if one.name not in {"seeds", "seed"} - known]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the experiment's own options under those of the command, with an example."""
        options = experiments.options(experiments.load(self.experiment).Config)
        rows = [(f"{name}={experiments.written(value)}", kind) for name, kind, value in options]
        example = "".join(f" --set {shlex.quote(f'{name}={experiments.written(v)}')}" for name, _, v in options[-1:])
        with formatter.section("Example"):
            formatter.write_text(f"kolmo experiment {self.experiment}{example} --out runs/mine")
        with formatter.section("Options of this experiment, for --set, with their defaults"):
            formatter.write_dl(rows)


class _Experiments(click.Group):
    """One subcommand for each experiment there is."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return experiments.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _ExperimentCommand(cmd_name, cmd_name) if cmd_name in experiments.names() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in experiments.names():
            experiments.load(args[0])  # says which ones there are
        return super().resolve_command(ctx, args)


class _Kolmo(click.Group):
    """The commands below, and `demo`: the experiment of that name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "demo"] if "demo" in experiments.names() else super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "demo" and "demo" in experiments.names():
            return _ExperimentCommand("demo", "demo")
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Kolmo, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package.__version__, prog_name="kolmo")
def kolmo() -> None:
    """Solve backward Kolmogorov equations and read noisy residual networks through them.

    Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed or interrupted, 2 bad input.

    \b
    Examples:
      kolmo demo                               a noisy network, its SDE and its PDE side by side
      kolmo solve call.toml --set K=90         an equation of your own, from a small file
      kolmo list                               the experiments
      eval "$(_KOLMO_COMPLETE=bash_source kolmo)"      completion in bash; zsh_source, fish_source likewise
    """  # noqa: D301 - \b keeps click from wrapping a paragraph


@kolmo.group(cls=_Experiments)
def experiment() -> None:
    """Run an experiment; its numbers, figures and report go to a fresh folder in ./runs.

    A run that was interrupted, or killed, goes on with --resume FOLDER and loses at most the unit of work in flight.

    \b
    Examples:
      kolmo experiment lqg --help              its options and their defaults
      kolmo experiment lqg --set sigma=0.3 --set paths=50000
      kolmo experiment lqg --resume runs/lqg-20260101-120000
    """  # noqa: D301 - \b keeps click from wrapping a paragraph


_FILE = click.argument("file", type=_PATH)
_SET = click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Set a parameter of the file.")
_KEEP = click.option("--out", type=_PATH, help="Keep it as a run in this new folder, with a report.")
_QUIET = click.option("--quiet", is_flag=True, help="Show no progress.")


@kolmo.command()
@_FILE
@_SET
@click.option("--save", type=_PATH, help="Write the solution here (npz; read it with kolmo.load).")
@_KEEP
@_QUIET
@_JSON
def solve(
    file: Path, assignments: tuple[str, ...], save: Path | None, out: Path | None, quiet: bool, as_json: bool
) -> int:
    """Solve the equation in FILE, a small TOML file, and print its values with error estimates.

    \b
    For example, a call option under geometric Brownian motion:
        [parameters]
        K = 100.0
        [equation]
        drift = "0.05 * x[0]"
        diffusion = "0.2 * x[0]"
        terminal = "maximum(x[0] - K, 0)"
        killing = 0.05
        horizon = 1.0
        [box]
        lower = [0.0]
        upper = [inf]
        boundary = [["natural", "open"]]
        [solve]
        at = [90.0, 100.0, 110.0]
        rtol = 1e-5

    \b
    Examples:
      kolmo solve call.toml
      kolmo solve call.toml --set K=90 --json
      kolmo solve call.toml --out runs/call    with the solution, a figure and a report
    """  # noqa: D301 - \b keeps click from wrapping a paragraph
    return equation.solve(file, assignments, save, out, quiet, as_json)


@kolmo.command()
@_FILE
@_SET
@_KEEP
@_QUIET
@_JSON
def control(file: Path, assignments: tuple[str, ...], out: Path | None, quiet: bool, as_json: bool) -> int:
    """Solve the control problem in FILE, or fit the parameters that it names.

    \b
    As for kolmo solve, with one table more. Dynamic programming: formulas may use a[0]..,
        [controls]
        lower = [-1.0]
        upper = [1.0]
    with running_cost, obstacle and sense = "min" or "max" in [equation]. Or a fit of the values at the points:
        [fit]
        parameters = ["kappa"]
        targets = [0.3, 0.5]
    Without targets the sum of the values is minimised.

    \b
    Examples:
      kolmo control regulator.toml
      kolmo control fit.toml --set kappa=0.3 --json
    """  # noqa: D301 - \b keeps click from wrapping a paragraph
    return equation.control(file, assignments, out, quiet, as_json)


@kolmo.command(cls=_Running)
@click.argument("file", required=False, type=_PATH)
@click.argument("data", required=False, type=_PATH)
@_SET
def fit(file: Path | None, data: Path | None, assignments: tuple[str, ...], manner: Manner) -> int:
    """Estimate the parameters of the model in FILE from the table DATA, with intervals, by maximum likelihood.

    FILE is a TOML file as for kolmo solve, with the columns of DATA (CSV) in [data]; estimates, standard errors,
    residuals, pictures and a report go to a run folder.

    \b
    For example, choices and response times:
        [parameters]
        bound = 1.0
        delay = 0.3
        speed = 5.0
        [equation]
        drift = "speed * coherence"
        diffusion = 1.0
        [decision]
        lower = "-bound"
        upper = "bound"
        delay = "delay"
        [data]
        times = "rt"
        choices = "choice"
        covariates = ["coherence"]
        [fit]
        bounds = { bound = [0.1, 5.0], delay = [0.0, 1.0], speed = [0.0, 50.0] }
    or a sampled path: model = "ou", "cir" or "gbm" in [equation] (or formulas), times and states in [data].

    \b
    Examples:
      kolmo fit decisions.toml trials.csv
      kolmo fit decisions.toml trials.csv --set speed=8 --json
      kolmo fit --resume runs/fit-20260101-120000
    """  # noqa: D301 - \b keeps click from wrapping a paragraph
    if manner.resume is not None:
        if file is not None or assignments or manner.out is not None:
            raise InputError("resume", "files or options beside it", "none but --take-over, --quiet and --json")
        return of_fit.resume(manner.resume, manner)
    if file is None or data is None:
        raise InputError("file, data", "nothing" if file is None else f"{file} alone", "a TOML file and a CSV file")
    return of_fit.fit(file, data, assignments, manner)


@kolmo.command(cls=_Running)
@click.argument("name")
@click.option("--vary", multiple=True, metavar="KEY=VALUE", help="One value of a varied option; repeat it for more.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set an option for all tasks.")
@click.option("--seeds", type=click.IntRange(1), help="This many seeds, each a task.")
@click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler, tcp://host:8786; default: a local cluster.")
@click.option("--workers", default=2, type=click.IntRange(0), help="Processes of the local cluster; 0: without Dask.")
def sweep(name: str, vary: tuple[str, ...], assignments: tuple[str, ...], **options: Any) -> int:
    """Run the experiment NAME for every combination of settings and seeds, on Dask workers.

    Results do not depend on the workers; one that is killed costs the task that it had. A sweep that was interrupted,
    or killed, goes on with --resume FOLDER.

    \b
    Examples:
      kolmo sweep lqg --vary sigma=0.3 --vary sigma=0.6 --seeds 5
      kolmo sweep lqg --vary sigma=0.3 --seeds 20 --scheduler tcp://host:8786
      kolmo sweep lqg --resume runs/sweep-lqg-20260101-120000
    """  # noqa: D301 - \b keeps click from wrapping a paragraph
    varied: dict[str, list[str]] = {}
    for key, value in of_experiment.pairs(vary, "--vary"):
        varied[key] = [*varied.get(key, []), value]
    return of_sweep.sweep(name, fixed=dict(of_experiment.pairs(assignments, "--set")), varied=varied, **options)


@kolmo.command()
@click.argument("run", type=_PATH)
@click.option(
    "--network", "only", multiple=True, metavar="NAME", help="Only the network of this name; may be repeated."
)
@click.option("--examples", type=click.IntRange(1), help="So many held-out examples; default: all.")
@click.option("--order", default=1, type=click.IntRange(1, 3), help="Weak order of the modified equation.")
@click.option("--rtol", default=1e-4, type=click.FloatRange(0.0, min_open=True), help="Tolerance of both losses.")
@_QUIET
@_JSON
def compare(run: Path, **options: Any) -> int:
    """Compute the expected loss of each network in RUN twice: by the network itself, and by its Kolmogorov equation.

    The network's side is its own transition applied layer by layer, without sampling; the other side is the backward
    equation of the modified SDE. Each comes with the estimate of its error.

    \b
    Examples:
      kolmo compare runs/demo-20260101-120000 --examples 50
      kolmo compare runs/demo-20260101-120000 --order 2 --json
    """  # noqa: D301 - \b keeps click from wrapping a paragraph
    from kolmo.cli.compare import compare as perform_compare

    return perform_compare(run, **options)


@kolmo.command("landscape", cls=_Running)
@click.argument("model", required=False)
@click.option("--network", metavar="NAME", help="Which network of a run.")
@click.option("--state", type=click.Path(), help="A state dict to load first (torch.save; read with weights_only).")
@click.option("--points", default=31, type=click.IntRange(5, 1001), help="Points along each direction.")
@click.option("--draws", default=1, type=click.IntRange(1), help="Noisy passes averaged at every point.")
@click.option("--seed", default=0, type=int, help="Seed of the plane and of the first draw.")
@click.option("--span", default=1.0, type=click.FloatRange(0.0, min_open=True), help="Coordinates from -SPAN to SPAN.")
@click.option("--noisy/--plain", default=None, help="Training or evaluation mode; default: as the factory leaves it.")
@click.pass_context
def measure_landscape(context: click.Context, /, manner: Manner, **options: Any) -> int:
    """Measure and draw the loss of a network over a random filter-normalised plane through its weights.

    MODEL is the folder of a run that holds networks, or package.module:factory, a function without arguments that
    returns a pair (model, loss), where loss(f) gives the loss (a scalar, or a dictionary of scalars) of f, the model at
    moved weights. The module is looked for in the current folder too.

    \b
    Examples:
      kolmo landscape mymodels:digits --state weights.pt --noisy --draws 16
      kolmo landscape runs/demo-20260101-120000 --network NAME
      kolmo landscape --resume runs/landscape-20260101-120000
    """  # noqa: D301 - \b keeps click from wrapping a paragraph
    if manner.resume is not None:
        source = click.core.ParameterSource.DEFAULT
        given = [name for name in ("out", *options) if context.get_parameter_source(name) != source]
        if given:
            needed = "none but --quiet and --json: a run goes on as it was started"
            raise InputError("resume", f"options beside it ({', '.join(given)})", needed)
        return landscape.resume(manner.resume, manner)
    if options["model"] is None:
        raise InputError("model", "none", "a run folder, or package.module:factory")
    return landscape.landscape(landscape.Options(**options), manner)


@kolmo.command("list")
@_JSON
def list_experiments(as_json: bool) -> None:
    """List the experiments, each with a line on what it does.

    Example: kolmo list; then kolmo experiment NAME --help shows the options of one.
    """
    found = {name: experiments.describe(name) for name in experiments.names()}
    click.echo(json.dumps(found, indent=2) if as_json else readable(found))


@kolmo.command()
@click.argument("run", type=_PATH)
@_JSON
def report(run: Path, as_json: bool) -> None:
    """Write the report of the run in folder RUN again, from what the folder holds.

    Example: kolmo report runs/demo-20260101-120000
    """
    path = str(rewrite(Run.open(run)))
    click.echo(json.dumps({"report": path}) if as_json else path)


@kolmo.command()
@_QUIET
@_JSON
def warmup(quiet: bool, as_json: bool) -> None:
    """Compile the kernels, once after an installation, by solving a small problem of every kind.

    What is compiled is kept on disk: without this each kernel is compiled when it is first used, which takes seconds.

    Example: kolmo warmup
    """
    from kolmo.cli.warmup import warm_up

    found = warm_up(quiet)
    said = f"ready: {found['total']:.1f} s, {found['compiled']:.1f} s of them compilation"
    click.echo(json.dumps(found, indent=2) if as_json else said)


@kolmo.command()
@_JSON
def info(as_json: bool) -> None:
    """Show versions, threads and devices: what to paste into a bug report.

    Example: kolmo info --json > machine.json
    """
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {**environment(), "devices": devices or ["CPU only"]}
    facts["experiments"] = str(experiments.folder())
    del facts["seeds"]
    click.echo(json.dumps(facts, indent=2) if as_json else readable(facts))
