"""What the docstring of every exported name has to say: equation, shapes, parameters, and what is raised."""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from functools import cache

import pytest

import kolmo

ROOMS = ("kolmo", *(f"kolmo.{room}" for room in ("control", "likelihood", "bridge", "landscape", "fipy", "testing")))
ERRORS = {name for name in kolmo.__all__ if name.endswith("Error")} | {"FileError"}

ERROR = "an error or a warning: its message says what is meant"
HANDLE = "a handle, a list or a table: nothing is computed"
FILE = "reads or writes a file"
# Names without an equation, and why.
NO_EQUATION = {
    **dict.fromkeys([name for name in kolmo.__all__ if name.endswith(("Error", "Warning"))], ERROR),
    **dict.fromkeys(["Discretization", "GradientMemory", "Injection", "eject", "Sites", "Summary", "Table"], HANDLE),
    **dict.fromkeys(["load", "write_html", "read_mesh"], FILE),
    "variable": "a look-up by name",
    "Quantity": "a number with its error; its definition says which",
}


def _public():
    found = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                found.setdefault(id(thing), (f"{room}.{name}", inspect.unwrap(thing)))
    return list(found.values())


PUBLIC = _public()
every = pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])


def _own(thing):
    return inspect.cleandoc(thing.__doc__ or "")


def _section(doc, title):
    found = re.search(rf"^{title}\n-+\n(.*?)(?=\n\n\w+\n-+\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def _entries(doc):
    """Names, types and descriptions of the parameters and attributes."""
    text = _section(doc, "Parameters") + "\n" + _section(doc, "Attributes")
    for entry in re.split(r"\n(?=\S)", text):
        head, _, rest = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        yield [part.strip().lstrip("*") for part in names.split(",")], kind, rest


# ---------------------------------------------------------------------------------------------------- what is raised
@cache
def _tree(function):
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _raised(function, owner, seen):
    """Errors of kolmo that code in the module of a function raises, in it or in what it calls there."""
    function = inspect.unwrap(function)
    module = sys.modules.get(getattr(function, "__module__", None))
    if id(function) in seen or module is None or not module.__name__.startswith("kolmo"):
        return set()
    seen.add(id(function))
    if inspect.isclass(function):
        makers = (vars(function).get(name) for name in ("__init__", "__post_init__"))
        return set().union(*(_raised(maker, function, seen) for maker in makers if inspect.isfunction(maker)))
    tree = _tree(function)
    found = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found |= {ast.unparse(node.exc.func).split(".")[-1]} & ERRORS
        elif isinstance(node, ast.Call):
            called, whose = _called(node.func, owner, module)
            if called is not None and getattr(called, "__module__", None) == module.__name__:
                found |= _raised(called, whose, seen)
    return found


def _called(f, owner, module):
    """The function or class that a call names, and the class whose method it is."""
    if isinstance(f, ast.Name):
        thing = vars(module).get(f.id)
        return (thing, None) if inspect.isfunction(inspect.unwrap(thing)) or inspect.isclass(thing) else (None, None)
    if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in ("self", "cls") and owner:
        thing = getattr(owner, f.attr, None)
        return (thing, owner) if inspect.isfunction(thing) else (None, None)
    return None, None


def _methods(thing):
    for name, member in inspect.getmembers(thing):
        if name.startswith("_") and name != "__call__":
            continue
        member = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        member = inspect.unwrap(member) if callable(member) else member
        if inspect.isfunction(member) and member.__module__.startswith("kolmo"):
            yield name, member


@every
def test_what_is_raised_is_named(name, thing):
    """In a section "Raises" of the function, or of the method or its class."""
    own = _section(_own(thing), "Raises")
    missing = [f"{name}: {error}" for error in _raised(thing, None, set()) if error not in own]
    for method, function in _methods(thing) if inspect.isclass(thing) else ():
        told = own + _section(_own(function), "Raises")
        missing += [f"{name}.{method}: {error}" for error in _raised(function, thing, set()) if error not in told]
    assert not missing


# ------------------------------------------------------------------------------------ equation, shapes, arguments
@every
def test_what_is_computed_has_an_equation(name, thing):
    doc = _own(thing)
    short = name.rsplit(".", 1)[-1]
    assert (short in NO_EQUATION) != (".. math::" in doc or ":math:" in doc), NO_EQUATION.get(short, "no equation")


@every
def test_arrays_have_shapes(name, thing):
    """Every argument and attribute that is an array or a tensor, and not a number, says its shape."""
    shapeless = []
    for names, kind, text in _entries(_own(thing)):
        arrays = re.search(r"\b(nd)?arrays?(_like)?\b|\b[Tt]ensors?\b", kind) and not re.search(
            "dict|iterable|number", kind
        )
        if arrays and not re.search(r"shape|``\(|``mesh", kind + text):
            shapeless += names
    assert not shapeless


@every
def test_every_argument_is_described(name, thing):
    try:
        arguments = inspect.signature(thing).parameters.values()
    except ValueError:  # of built-in classes
        return
    if inspect.isclass(thing) and "__init__" not in vars(thing) and "Attributes" not in _own(thing):
        arguments = ()  # that of a base class, which describes it
    described = {name for names, _, _ in _entries(_own(thing)) for name in names}
    made_elsewhere = re.search(r"see :(func|meth):`", _own(thing))
    wanted = {p.name for p in arguments if not p.name.startswith("_") and p.name not in ("args", "kwargs")}
    assert made_elsewhere or wanted <= described, wanted - described


def test_the_tests_of_docstrings_can_fail():
    def careless(x):
        """Nothing.

        Parameters
        ----------
        x : ndarray
            Something.
        """

    for test in (test_what_is_computed_has_an_equation, test_arrays_have_shapes):
        with pytest.raises(AssertionError):
            test("careless", careless)
    careless.__doc__ = careless.__doc__.replace("x :", "y :")
    with pytest.raises(AssertionError):
        test_every_argument_is_described("careless", careless)
    assert _raised(kolmo.discretize, None, set()) == {"InputError"}
