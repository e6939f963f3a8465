"""What results show at a prompt and in notebooks, films of solutions, names that a room shows, and warming up."""

import importlib
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kolmo
from kolmo import bridge, control, landscape, likelihood
from kolmo.cli import main
from kolmo.errors import InputError, KolmoWarning
from kolmo.shown import Shown, brief, with_error

OU = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
PROBLEM = kolmo.KolmogorovProblem(OU, lambda x: x[..., 0] ** 2, 1.0, kolmo.Box(-3.0, 3.0, "reflecting"))

# What a result is, in every room: whatever a call returns that is no array.
RESULTS = [
    *[kolmo.Solution, kolmo.Solutions, kolmo.Density, kolmo.Spectrum, kolmo.Certificate],
    *[control.ControlSolution, control.HopfColeSolution, control.SchroedingerBridge, control.Switching],
    *[control.Committor, control.Arrival, control.Law, control.Uncertainty, control.GradientMemory],
    *[likelihood.Fit, likelihood.Comparison, likelihood.Residuals, likelihood.Likelihood, likelihood.Trials],
    *[bridge.LossEstimate, bridge.Diagnosis, bridge.WeakErrorTable, bridge.Regularisation, bridge.Schedule],
    *[bridge.SiteEffects, bridge.Injection, landscape.Surface, landscape.Plane, landscape.Curvature],
    *[landscape.Summary, landscape.Quantity, landscape.Comparison, landscape.FeatureLandscape],
]


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_every_result_shows_itself_by_the_one_mechanism(kind):
    assert issubclass(kind, Shown)
    assert kind._repr_html_ is Shown._repr_html_
    assert "__create_fn__" not in kind.__repr__.__qualname__
    assert not hasattr(kind.__repr__, "__wrapped__"), "the repr that dataclasses make shows whole arrays"


def test_results_fit_a_prompt_and_tell_value_error_and_status():
    solution = kolmo.solve(PROBLEM, at=[0.5], rtol=1e-4)
    paths = kolmo.monte_carlo(PROBLEM, [0.5], paths=100, steps=4, rng=0)
    many = kolmo.monte_carlo(PROBLEM, np.linspace(-1, 1, 50)[:, None], paths=20, steps=4, rng=0)
    for found in (solution, paths, many):
        assert len(repr(found)) < 330
        assert "\n" not in repr(found)
    assert "±" in repr(paths)
    assert "array (50,)" in repr(many)
    page = solution._repr_html_()
    assert page.count("<tr>") >= 5
    assert "converged" in page
    assert page.count('scope="row"') == page.count("<tr>")


@dataclass(frozen=True, repr=False)
class Found(Shown):
    mean: float
    values: np.ndarray
    message: str = ""
    nothing: None = None
    _kept: int = 3


def test_what_is_shown_is_escaped_and_what_is_missing_left_out():
    found = Found(1 / 3, np.array([[np.nan, 2.0], [1.0, 4.0]]), "<script>")
    assert repr(found) == "Found(mean=0.333333, values=array (2, 2) from 1 to 4, 1 not finite, message=<script>)"
    assert "<script>" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()


def test_what_prints_as_a_table_shows_the_table():
    quantity = landscape.Quantity(1.0, 0.5, "a <thing>")
    assert repr(quantity) == str(quantity)
    assert "<pre>" in quantity._repr_html_()


def test_things_are_brief():
    assert brief(torch.arange(3.0)) == "[0, 1, 2]"
    assert brief({"a": 1, "b": 2.0, "c": "d", "e": None, "f": 4}).endswith("… (5)")
    assert brief(np.array(["x"] * 9)) == "array (9,)"
    assert brief(np.full(7, np.nan)) == "array (7,), nothing finite"
    assert brief(test_things_are_brief) == "test_things_are_brief"
    assert len(brief(object)) < 100 > len(brief(Exception("x" * 500))) - 1
    assert with_error(np.arange(2.0), 0.5) == "[0 ± 5.0e-01, 1 ± 5.0e-01]"
    assert with_error(1.5, None) == "1.5"


def test_a_minimum_is_told_in_a_line_and_stays_a_result_of_scipy():
    p = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    found = control.minimize(lambda: (p**2).sum(), [p])
    assert repr(found).startswith("Minimum(status=converged")
    assert found["x"] == pytest.approx(0.0, abs=1e-6)
    assert found.success
    assert "history" not in found._repr_html_()


@pytest.mark.parametrize("room", ["control", "likelihood", "bridge", "landscape", "testing"])
def test_a_room_shows_what_is_meant_to_be_used(room):
    module = importlib.import_module(f"kolmo.{room}")
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in dir(module))


# ------------------------------------------------------------------------------------------------------------ films


def film_of(found, tmp_path, frames):
    film = found.animate()
    film.save(tmp_path / "film.gif", writer="pillow", dpi=40)
    from PIL import Image

    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == frames
    return film


def test_a_solution_is_filmed_on_one_scale(tmp_path):
    import matplotlib.pyplot as plt

    solution = kolmo.solve(PROBLEM, grid=41, steps=20, save=np.linspace(0.0, 1.0, 5))
    ax = plt.subplots()[1]
    film = solution.animate(ax=ax, color="k")
    low, high = ax.get_ylim()
    assert low < solution.values.min() < solution.values.max() < high
    film._func(4)
    drawn = ax.lines[0].get_ydata()
    assert np.array_equal(drawn, solution.values[4])
    assert ax.get_title() == "$t = 1$"
    film._draw_was_started = True  # it is not shown
    film_of(solution, tmp_path, 5)


def test_a_film_needs_times():
    with pytest.raises(InputError, match=r"two saved times.*save="):
        kolmo.solve(PROBLEM, grid=41, steps=20).animate()


def test_planes_densities_controls_and_moving_faces_are_filmed(tmp_path):
    plane = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=2)
    box = kolmo.Box([-2.0, -2.0], [2.0, 2.0], "reflecting")
    problem = kolmo.KolmogorovProblem(plane, lambda x: x[..., 0] * x[..., 1], 1.0, box)
    film_of(kolmo.solve(problem, grid=21, steps=8, save=[0.0, 0.5, 1.0]), tmp_path, 3)
    law = kolmo.solve_forward(PROBLEM, [0.5], grid=41, steps=20, save=[0.2, 0.6, 1.0])
    film_of(law, tmp_path, 3)
    moving = kolmo.KolmogorovProblem(
        OU, lambda x: 1.0 + 0 * x[..., 0], 1.0, kolmo.Box(-2.0, lambda t: 1 + t, "absorbing")
    )
    film = kolmo.solve(moving, grid=41, steps=20, save=[0.0, 0.5, 1.0]).animate()
    film._func(2)
    assert film._fig.axes[0].lines[0].get_xdata()[-1] == pytest.approx(2.0)
    film._draw_was_started = True
    steered = control.ControlProblem(
        lambda t, x, a: a,
        1.0,
        controls=control.Interval(-1.0, 1.0),
        horizon=1.0,
        terminal=lambda x: x[..., 0] ** 2,
        box=kolmo.Box(-3.0, 3.0, "reflecting"),
    )
    film = control.solve_hjb(steered, at=[0.5], rtol=1e-2).animate()
    film._func(0)
    film._draw_was_started = True


# ------------------------------------------------------------------------------------------------- words of mistakes


def test_functions_of_numpy_that_are_handed_tensors_are_told_once():
    sde = kolmo.SDE(lambda t, x: -np.sin(x), diffusion=1.0, dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: torch.tanh(torch.as_tensor(x)[..., 0]), 1.0)
    x = torch.zeros((1, 1), dtype=torch.float64)
    with pytest.warns(KolmoWarning, match=r"drift hands tensors to NumPy.*torch\.sin") as heard:
        problem.sde.drift(0.0, x)
    assert len(heard) == 1
    with pytest.raises(InputError, match=r"drift.*torch\.sin in place of np\.sin"):
        problem.sde.drift(0.0, x.requires_grad_())


def test_a_warning_of_ones_own_function_is_passed_on():
    import warnings

    def drift(t, x):
        warnings.warn("mine", UserWarning, stacklevel=2)
        return -x

    sde = kolmo.SDE(drift, diffusion=1.0, dim=1)
    with pytest.warns(UserWarning, match="mine"):
        sde.drift(0.0, torch.zeros((1, 1), dtype=torch.float64))


def test_words_of_textbooks_are_translated():
    with pytest.raises(InputError, match="'absorbing' here"):
        kolmo.Box(-1.0, 1.0, "Dirichlet")
    with pytest.raises(InputError, match="did you mean 'reflecting'"):
        kolmo.Box(-1.0, 1.0, "reflectin")


def test_constants_that_a_function_returns_are_told_by_their_own_shape():
    sde = kolmo.SDE(lambda t, x: -x, diffusion=lambda t, x: np.array([1.0, 2.0]), dim=2)
    with pytest.raises(InputError, match=r"a result of shape \(2,\); needed .*diagonal.*without a function"):
        sde.diffusion(0.0, np.zeros((5, 2)))


def test_choices_that_are_words_are_refused_by_name():
    with pytest.raises(InputError, match=r"choices.*upper.*1 for the upper face"):
        likelihood.Trials([0.4], ["upper"])


# -------------------------------------------------------------------------------------------------- the command line


def test_warming_up_solves_something_of_every_kind(capsys):
    assert main(["warmup", "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["seconds"]) == 6
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert 0 <= found["compiled"] <= found["total"]


def test_help_shows_no_option_that_is_refused(capsys):
    import dataclasses

    from kolmo import experiments

    for name in experiments.names():
        known = {field.name for field in dataclasses.fields(experiments.load(name).Config)}
        assert main(["experiment", name, "--help"]) == 0
        told = capsys.readouterr().out
        assert ("--seeds" in told) == ("seeds" in known), name
