"""Sphinx configuration. The reference pages are written from the modules that exist, in a reader's order."""

import importlib
import importlib.util
import pkgutil
from pathlib import Path

import kolmo

project = "kolmo"
author = "The kolmo authors"
copyright = author
release = kolmo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"

# A type in a parameter list is linked where it can be; a name that lives in two rooms is no mistake.
suppress_warnings = ["ref.python"]

# Every script in examples/ runs when the pages are built; nothing that differs from build to build is shown.
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["_generated/examples"],
    "filename_pattern": r"\.py",
    "capture_repr": (),
    "min_reported_time": 10_000,
    "write_computation_times": False,
    "download_all_examples": False,
    "show_signature": False,
}

html_theme = "furo"
html_title = f"kolmo {release}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# What each part of the reference is called, and the modules (or packages, with what is in them) that belong to it.
REFERENCE = {
    "problem": (
        "State a problem",
        [
            "problem.sde",
            "problem.box",
            "problem.events",
            "problem.problem",
            "equations",
            "equations.expressions",
            "errors",
        ],
    ),
    "solve": (
        "Solve it",
        [
            "refine.plan",
            "discretization",
            "solve",
            "stationary",
            "solution",
            "forward",
            "spectrum",
            "montecarlo",
        ],
    ),
    "control": ("Differentiate and control", ["control"]),
    "likelihood": ("Likelihoods of data", ["likelihood"]),
    "bridge": ("Noisy networks", ["bridge"]),
    "landscape": ("Loss landscapes", ["landscape"]),
    "check": (
        "Cross-checks and problems with exact answers",
        ["fipy", "interop", "catalog", "testing"],
    ),
    "experiments": (
        "Experiments, runs and reports",
        ["experiments", "sweep", "runs", "report", "images", "files", "cli"],
    ),
    "inside": (
        "Inside the solver",
        [
            "arrays",
            "registry",
            "memory",
            "problem.instants",
            "problem.motion",
            "problem.rest",
            "problem.reach",
            "grid",
            "grid.grading",
            "grid.times",
            "kernels",
            "schemes",
            "steppers",
            "march",
            "refine.scout",
            "refine.layout",
            "refine.estimate",
            "refine.witnesses",
            "refine.residual",
            "refine.smooth",
        ],
    ),
}


def modules(name):
    """Yield the full name of a module that exists, then those inside it, unless it gathers their names itself."""
    if importlib.util.find_spec(f"kolmo.{name}") is None:
        return
    module = importlib.import_module(f"kolmo.{name}")
    yield module.__name__
    if not hasattr(module, "__all__"):
        for inner in pkgutil.iter_modules(getattr(module, "__path__", [])):
            yield f"{module.__name__}.{inner.name}"


def write_reference(app):
    """Write one page for each part of the reference that has a module."""
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    pages = []
    for page, (title, names) in REFERENCE.items():
        found = [module for name in names for module in modules(name)]
        if found:
            blocks = [f"{module}\n{'-' * len(module)}\n\n.. automodule:: {module}\n" for module in found]
            write_if_new(folder / f"{page}.rst", "\n".join([f"{title}\n{'=' * len(title)}\n", *blocks]))
            pages.append(page)
    entries = "\n".join(f"   {page}" for page in pages)
    head = "Reference\n=========\n\nEvery public name, with its equation, shapes, defaults and an example."
    write_if_new(folder / "reference.rst", f"{head}\n\n.. toctree::\n   :maxdepth: 2\n\n{entries}\n")


def write_if_new(path, text):
    """Leave a file that would not change alone, so that its page is not built again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app):
    """Hook into the build."""
    app.connect("builder-inited", write_reference)
