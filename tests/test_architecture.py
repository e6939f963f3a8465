"""The house: a module imports only from its own room and those above it; `import kolmo` stays light."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kolmo"

# From the top of the house to the bottom. A module, or a subpackage with all its modules, lives in one room;
# a new one has to be given its place here.
ROOMS = [
    ["errors", "arrays", "registry", "files", "memory", "shown"],
    ["kernels"],
    ["problem"],
    ["grid"],
    ["schemes"],
    ["steppers"],
    ["march", "stationary", "limits"],
    ["discretization", "refine"],
    ["solve", "forward", "spectrum", "montecarlo", "solution", "many"],
    ["control"],
    ["likelihood"],
    ["bridge"],
    ["landscape"],
    ["fipy", "interop", "catalog", "testing", "images", "equations"],
    ["runs", "report", "experiments", "sweep", "cli"],
]
FLOOR = {name: level for level, room in enumerate(ROOMS) for name in room}

# What each room may import beside the ground and itself. A row of ROOMS goes by the name of its chief module; in rows
# of which several modules stand here, each stands for itself.
MAY = {
    "kernels": "",
    "problem": "kernels",
    "grid": "problem",
    "schemes": "kernels problem grid",
    "steppers": "kernels problem schemes",
    "march": "kernels grid schemes steppers",
    "refine": "kernels problem grid schemes steppers march",
    "solve": "kernels problem grid schemes steppers march refine",
    "control": "kernels problem grid schemes steppers march refine solve",
    "likelihood": "kernels problem grid schemes march refine solve control",
    "bridge": "kernels problem refine solve control",
    "landscape": "problem bridge",
    "fipy": "problem schemes",
    "interop": "problem",
    "catalog": "problem control",
    "testing": "problem grid schemes refine solve catalog",
    "images": "",
    "equations": "problem control likelihood",
    "runs": "",
    "report": "runs",
    "experiments": "runs",
    "sweep": "runs experiments",
    "cli": "kernels problem solve control likelihood bridge landscape equations runs report experiments sweep",
}
HEAVY = ["torch", "fipy", "matplotlib", "sklearn"]


def module_name(path: Path) -> str:
    """Dotted name of a file below the package, without the leading `kolmo.`; empty for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_experiments" not in path.parts}


def is_type_checking(node: ast.AST) -> bool:
    """Whether the node is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def running_imports(tree: ast.AST):
    """All import statements that can run, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            for other in node.orelse:
                yield from running_imports(ast.Module([other], []))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from running_imports(node)


def imported(name: str, source: str, is_package: bool) -> set[str]:
    """Names of kolmo's modules, without the leading `kolmo.`, that a source imports."""
    found = set()
    for node in running_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                parents = ["kolmo", *name.split(".")][: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            targets = [(base, alias.name) for alias in node.names]
        for base, attribute in targets:
            if base.partition(".")[0] != "kolmo":
                continue
            whole = f"{base}.{attribute}" if attribute else base
            target = whole.partition(".")[2] if whole.partition(".")[2] in MODULES else base.partition(".")[2]
            if target:
                found.add(target)
            elif attribute and not attribute.startswith("_"):
                found.add(attribute)  # a public name of the package: it lives somewhere below, so ask for its module
    return found


def edges() -> dict[str, set[str]]:
    return {
        name: imported(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for name, path in MODULES.items()
        if name
    }


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_room():
    homeless = sorted({room(name) for name in MODULES if name} - FLOOR.keys())
    assert not homeless, f"give {homeless} a room in ROOMS"


def test_the_root_shows_the_architecture():
    files = [path.name for path in PACKAGE.glob("*.py")]
    assert len(files) <= 18, sorted(files)


def test_files_are_short():
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: n for name, n in long.items() if n > 500 and name != "catalog"}


def functions(tree: ast.AST, owner: str = ""):
    """All functions with the class, if any, that each is a method of."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, node
            yield from functions(node, owner)
        else:
            yield from functions(node, owner)


def exported() -> set[str]:
    """Names in some `__all__` of the package."""
    names: set[str] = set()
    for path in MODULES.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= set(ast.literal_eval(node.value))
    return names


def test_functions_are_short_and_are_handed_little():
    # a kernel is compiled as one: what it does for every line costs up to a third more in a function of its own
    public, found = exported(), set()
    for name, path in MODULES.items():
        if room(name) == "kernels":
            continue
        for owner, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
            words = ast.get_docstring(function, clean=False)
            first = function.body[0].end_lineno + 1 if words else function.body[0].lineno
            handed = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            handed = [one for one in handed if one not in ("self", "cls")]
            shown = function.name in public or (owner in public and not function.name.startswith("_"))
            shown |= owner in public and function.name == "__init__"
            if function.end_lineno - first + 1 > 60 or (len(handed) > 8 and not shown):
                found.add(f"{name}.{function.name}")
    assert not found, sorted(found)


def test_imports_go_up_only():
    wrong = [
        f"kolmo.{name} imports kolmo.{target}"
        for name, targets in edges().items()
        for target in targets
        if FLOOR.get(room(target), 0) > FLOOR.get(room(name), len(ROOMS))
    ]
    assert not wrong, "\n".join(wrong)


def chief(module: str) -> str:
    """Name under which MAY knows the room of a module."""
    row = next(row for row in ROOMS if room(module) in row)
    known = [name for name in row if name in MAY]
    return known[0] if len(known) == 1 else room(module)


def test_rooms_import_only_what_they_may():
    used = {}
    for name, targets in edges().items():
        if FLOOR[room(name)] > 0:
            found = {chief(target) for target in targets if FLOOR.get(room(target), 0) > 0} - {chief(name)}
            used.setdefault(chief(name), set()).update(found)
    assert used.keys() == MAY.keys(), f"say in MAY what {sorted(used.keys() ^ MAY.keys())} may import"
    for name, found in used.items():
        assert found == set(MAY[name].split()), (
            f"kolmo.{name} imports {sorted(found)}, and may {MAY[name] or 'nothing'}"
        )


def test_no_cycles_between_modules():
    graph = {name: {target for target in targets if target in MODULES} for name, targets in edges().items()}
    for name, targets in graph.items():
        targets.discard(name)
        # A package's __init__ gathers its modules; that they import it back is no cycle of theirs.
        if MODULES[name].name == "__init__.py":
            targets.difference_update({target for target in targets if target.startswith(f"{name}.")})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from kolmo.grid import Grid", {"grid"}),
        ("def f():\n    import kolmo.solve", {"solve"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kolmo.solve import solve", set()),
        ("from .errors import InputError", {"errors"}),
        ("from kolmo import errors", {"errors"}),
        ("from kolmo import __version__", set()),
        ("import numpy", set()),
    ],
)
def test_the_reader_of_imports_sees(source, expected):
    assert imported("sde", source, is_package=False) == expected


def test_import_kolmo_is_light():
    program = f"import sys, kolmo; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_package_shows_its_public_names_and_gives_its_rooms_when_asked():
    program = (
        "import sys, kolmo\n"
        "shown = dir(kolmo)\n"
        "assert set(shown) > set(kolmo.__all__), shown\n"
        f"assert not any(name in sys.modules for name in {HEAVY})\n"
        "for name in shown:\n"
        "    getattr(kolmo, name)\n"
        "print(*sorted(set(shown) - set(kolmo.__all__)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    rooms = ["bridge", "catalog", "control", "fipy", "landscape", "likelihood", "testing"]
    assert done.stdout.split() == ["__version__", *rooms]
    import kolmo

    with pytest.raises(AttributeError, match="no attribute 'contrl'"):
        kolmo.contrl  # noqa: B018


def named(page: Path, column: int) -> list[tuple[str, str]]:
    """Files and names that stand, as `file.py`: `name`, in a column of a page's tables; a file alone has no name."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| ") or "`" not in line:
            continue
        file = ""
        for word in re.findall("`([^`]+)`", line.split("|")[column]):
            file = word if word.endswith(".py") else file
            found.append((file, "" if word == file else word))
    return found


@pytest.mark.parametrize(
    ("page", "root"), [("docs/architecture.md", "kolmo"), ("tests/README.md", "tests")], ids=["rooms", "rules"]
)
def test_pages_for_developers_name_what_exists(page, root):
    top = PACKAGE.parent
    places = named(top / page, 2)
    assert len({file for file, _ in places}) >= 20
    for file, name in places:
        path = top / root / file
        assert path.is_file(), f"{page}: {file}"
        assert not name or re.search(
            rf"^(def|class) {name}\b|^{name}\b.* = ", path.read_text(encoding="utf-8"), re.M
        ), name


def test_ways_through_the_rooms_stop_at_files_that_exist():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    ways = re.findall(r"^## The way of .*?(?=^## |\Z)", text, re.M | re.S)
    assert len(ways) == 4
    for way in ways:
        assert 5 <= len(re.findall(r"^\d+\. ", way, re.M)) < 12
        for file in re.findall(r"`([a-z_/]+(?:\.py|/))`", way):
            assert (PACKAGE / file).exists(), file


def test_nothing_is_unpickled():
    """`np.load` without pickle, `torch.load` with weights only, and neither pickle nor eval nor exec anywhere."""
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.parent.joinpath("experiments").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path}:{node.lineno}"
            assert called != "np.load" or named.get("allow_pickle") == "False", where
            assert called != "torch.load" or named.get("weights_only") == "True", where
            assert called not in ("pickle.load", "pickle.loads", "eval", "exec", "joblib.load"), where
