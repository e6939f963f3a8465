"""Sphinx configuration: the reference is written from the public names, formulas are MathML, notebooks run."""

import importlib
import inspect
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

import kolmo

project = "kolmo"
author = "The kolmo authors"
copyright = author
release = kolmo.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated/examples/**/*.ipynb"]  # the gallery writes its scripts as notebooks too
# Notebooks are texts; each runs when it is built, and one that fails fails the build.
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
# Formulas are in the pages themselves: browsers draw MathML, and nothing is loaded.
html_math_renderer = "mathml"
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
    "backreferences_dir": "_generated/backreferences",
    "doc_module": ("kolmo",),
}

html_theme = "furo"
html_title = f"kolmo {release}"
html_copy_source = False
html_static_path = ["_theme"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The reference: parts in a reader's order, each with the names that belong together and the page that tells of them.
# What is not here is inside: its docstrings are for those who read the code.
REFERENCE = {
    "State a problem": ("quick_start", "kolmo", "SDE KolmogorovProblem Box Absorbing Robin Payment"),
    "Solve it": ("quick_start", "kolmo", "solve solve_many Solution Solutions load plan Discretization Grid"),
    "Laws, spectra and paths": (
        "certify",
        "kolmo",
        "solve_forward stationary_density Density spectrum Spectrum monte_carlo certify Certificate",
    ),
    "The generator as a matrix": ("schemes", "kolmo", "discretize Generator"),
    "Errors": (
        "reliability",
        "kolmo",
        "KolmoError InputError NotConvergedError MissingExtraError KolmoWarning ToleranceWarning",
    ),
    "Differentiate and fit": (
        "control",
        "kolmo.control",
        "value values expected_value minimize uncertainty Uncertainty hessian_product gradient_memory GradientMemory "
        "law Law transition_density successive",
    ),
    "Control": (
        "control",
        "kolmo.control",
        "ControlProblem solve_hjb ControlSolution Interval BoxSet Finite Unbounded Game Switching solve_switching "
        "Target arrival Arrival committor Committor hopf_cole HopfColeSolution schroedinger_bridge SchroedingerBridge",
    ),
    "Likelihoods of data": ("likelihood", "kolmo.likelihood", ""),
    "Noise in networks": ("inject", "kolmo.bridge", ""),
    "Loss landscapes": ("landscape", "kolmo.landscape", ""),
}
# Modules that are read as one page.
WHOLE = {
    "Problems with exact answers": ["catalog"],
    "Checks of gradients, orders and signs": ["testing"],
    "Cross-checks with FiPy, and other packages": ["fipy", "interop"],
    "Equations in files": ["equations"],
    "Experiments, runs and reports": ["experiments", "sweep", "runs", "report", "images", "files"],
}


def write_reference(app):
    """Write a page for each public name, with the examples that draw it and its neighbours, and the contents."""
    folder = Path(app.srcdir) / "_generated"
    (folder / "reference").mkdir(parents=True, exist_ok=True)
    parts = []
    for title, (page, room, listed) in REFERENCE.items():
        module = importlib.import_module(room)
        names = listed.split() or [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
        for name in names:
            write_if_new(folder / "reference" / f"{room}.{name}.rst", symbol(room, name, names, page))
        parts.append((title, [f"{room}.{name}" for name in names]))
    for title, modules in WHOLE.items():
        body = "\n".join(f".. automodule:: kolmo.{name}\n   :members:\n" for name in modules)
        write_if_new(folder / "reference" / f"{modules[0]}.rst", f"{title}\n{'=' * len(title)}\n\n{body}")
    parts.append(("Whole modules", [modules[0] for modules in WHOLE.values()]))
    head = "Reference\n=========\n\nA page a public name, with its equation, shapes, defaults and an example."
    trees = [
        f"{title}\n{'-' * len(title)}\n\n.. toctree::\n   :maxdepth: 1\n\n"
        + "".join(f"   reference/{page}\n" for page in pages)
        for title, pages in parts
    ]
    write_if_new(folder / "reference.rst", "\n".join([f"{head}\n", *trees]))


def symbol(room, name, names, page):
    """The page of one name: what it is, examples with their pictures, what stands beside it."""
    found = getattr(importlib.import_module(room), name)
    kind = "autoclass" if inspect.isclass(found) else "autofunction" if callable(found) else "autodata"
    members = "   :members:\n" if kind == "autoclass" else ""
    beside = ", ".join(f":py:obj:`{room}.{other}`" for other in names if other != name)
    title = f"{room}.{name}"
    return (
        f"{title}\n{'=' * len(title)}\n\n.. currentmodule:: {room}\n\n.. {kind}:: {name}\n{members}\n"
        f".. minigallery:: {title}\n   :add-heading: Examples with pictures\n\n"
        f".. rubric:: See also\n\n:doc:`/{page}`" + (f"; {beside}\n" if beside else "\n")
    )


def write_if_new(path, text):
    """Leave a file that would not change alone, so that its page is not built again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def formula(translator, node):
    """A formula as MathML, with its source for those who copy it."""
    display = isinstance(node, nodes.math_block)
    text = node.astext()
    if display and (r"\\" in text or "&" in text) and r"\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    made = convert(text, display="block" if display else "inline")
    translator.body.append(f'<div class="math">{made}</div>' if display else made)
    raise nodes.SkipNode


# What the theme leaves out for those who do not see a page, or have no mouse: levels of headings, names of regions, and
# code that can be scrolled by keys.
SAID = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="On this page">',
    "<pre>": '<pre tabindex="0">',
}


def accessible(app, exception):
    """Write into the finished pages what screen readers and keyboards need."""
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            said = text
            for before, after in SAID.items():
                said = said.replace(before, after)
            if said != text:
                page.write_text(said, encoding="utf-8")


def setup(app):
    """Hook into the build."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("builder-inited", write_reference)
    app.connect("build-finished", accessible)
