"""FiPy on triangle meshes: closed forms on a disc, agreement with `solve` on a box, conditions by physical group."""

import numpy as np
import pytest

import kolmo
import kolmo.fipy
from kolmo.errors import InputError

try:
    gmsh = pytest.importorskip("gmsh")
except OSError as error:  # the package is there, a system library that it needs is not
    pytest.skip(f"gmsh needs {error}", allow_module_level=True)

POINTS = np.array([[0.0, 0.0], [0.3, 0.4], [0.55, -0.6], [-0.2, 0.7]])


def mesh_of(path, size, shape="disc"):
    """Write a mesh of the unit disc with a group `rim`, or of a rectangle with a group for each side."""
    gmsh.initialize(interruptible=False)
    try:
        gmsh.option.setNumber("General.Terminal", 0)
        occ = gmsh.model.occ
        area = occ.addDisk(0, 0, 0, 1, 1) if shape == "disc" else occ.addRectangle(-1, -1, 0, 2, 2)
        occ.synchronize()
        curves = [abs(tag) for _, tag in gmsh.model.getBoundary([(2, area)])]
        names = ["rim"] if shape == "disc" else ["bottom", "right", "top", "left"]
        for curve, name in zip(curves, names, strict=True):
            gmsh.model.addPhysicalGroup(1, [curve], name=name)
        gmsh.model.addPhysicalGroup(2, [area])
        gmsh.option.setNumber("Mesh.MeshSizeMax", size)
        gmsh.model.mesh.generate(2)
        gmsh.write(str(path))
    finally:
        gmsh.finalize()
    return path


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discs")
    return [mesh_of(folder / f"{size}.msh", size) for size in (0.14, 0.07)]


def stationary(**coefficients):
    return kolmo.KolmogorovProblem(kolmo.SDE(dim=2, **coefficients), None, None, source=1.0)


S = np.array([[1.0, 0.6], [0.6, 0.8]])
# Mean exit times of the unit disc: (1 − r²)/tr Σ, and with the drift b = −x (noise 1) an integral over the radius.
EXITS = [
    (stationary(drift=0.0, diffusion=1.0), lambda r: (1 - r**2) / 2),
    (stationary(drift=0.0, covariance=S), lambda r: (1 - r**2) / np.trace(S)),
    # Σ = (1 + r²)I: ∇²u = −2/(1 + r²), so ru' = −log(1 + r²)
    (
        stationary(drift=0.0, diffusion=lambda t, x: np.sqrt(1 + (x**2).sum(-1))),
        lambda r: [np.trapezoid(np.log1p(s**2) / np.maximum(s, 1e-12), s) for s in np.linspace(r, 1, 4001).T],
    ),
    (
        stationary(drift=lambda t, x: -x, diffusion=1.0),
        lambda r: [np.trapezoid(np.expm1(s**2) / np.maximum(s, 1e-12), s) for s in np.linspace(r, 1, 4001).T],
    ),
]


@pytest.mark.parametrize(("problem", "exact"), EXITS, ids=["brownian", "correlated", "varying", "drift"])
def test_the_exit_time_of_a_disc_converges_with_the_mesh(discs, problem, exact):
    expected = np.array(exact(np.linalg.norm(POINTS, axis=1)))
    errors = [
        np.sqrt(np.mean((kolmo.fipy.solve(problem, mesh, faces={"rim": "absorbing"})(POINTS) - expected) ** 2))
        for mesh in discs
    ]
    assert errors[1] < 1e-3 * max(1.0, expected.max())
    assert errors[1] < 0.5 * errors[0]


def test_an_elastic_rim_and_data_on_it_agree_with_closed_forms(discs):
    # u = x₁ is harmonic; with ½∂u/∂n + 2u = v on the rim, v = 2.5 x₁
    still = kolmo.KolmogorovProblem(kolmo.SDE(0.0, diffusion=1.0, dim=2), None, None)
    for face in (kolmo.Robin(2.0, lambda t, x: 2.5 * x[..., 0]), kolmo.Absorbing(lambda t, x: x[..., 0])):
        assert np.allclose(kolmo.fipy.solve(still, discs[1], faces={"rim": face})(POINTS), POINTS[:, 0], atol=2e-3)


def test_a_mesh_of_the_box_agrees_with_solve(tmp_path):
    mesh = mesh_of(tmp_path / "box.msh", 0.09, "rectangle")
    box = kolmo.Box([-1, -1], [1, 1], [("reflecting", "absorbing"), ("reflecting", kolmo.Robin(1.0, 0.5))])
    sde = kolmo.SDE(lambda t, x: np.stack([0.5 - x[..., 1], 0.3 * x[..., 0]], -1), [0.8, 0.6])
    problem = kolmo.KolmogorovProblem(sde, lambda x: np.cos(x).prod(-1)[..., None] * [1, 2], 0.5, box, killing=0.2)
    faces = {"left": "reflecting", "right": "absorbing", "bottom": "reflecting", "top": kolmo.Robin(1.0, 0.5)}
    u = kolmo.fipy.solve(problem, mesh, steps=20, faces=faces)
    assert u.values.shape[1] == 2
    assert np.abs(u(POINTS) - kolmo.solve(problem, at=POINTS, rtol=1e-3)(POINTS)).max() < 8e-3


def test_mistakes_with_meshes_are_named(discs, tmp_path):
    problem, mesh = EXITS[0][0], discs[0]
    rim = {"rim": "absorbing"}
    with pytest.raises(InputError, match="needed a physical group of lines: rim"):
        kolmo.fipy.solve(problem, mesh, faces={"edge": "absorbing"})
    with pytest.raises(InputError, match=r"no condition at .* more lines"):
        kolmo.fipy.solve(problem, mesh, faces={})
    with pytest.raises(InputError, match="'open'"):
        kolmo.fipy.solve(problem, mesh, faces={"rim": "open"})
    with pytest.raises(InputError, match="without absorbing"):
        kolmo.fipy.solve(problem, mesh, faces={"rim": "reflecting"})
    with pytest.raises(InputError, match="steps"):
        kolmo.fipy.solve(problem, mesh, steps=3, faces=rim)
    with pytest.raises(InputError, match="point outside"):
        kolmo.fipy.solve(problem, mesh, faces=rim)([1.5, 0.0])
    (tmp_path / "no.msh").write_text("nothing")
    for path in (tmp_path / "no.msh", tmp_path / "none.msh"):
        with pytest.raises(InputError, match="mesh"):
            kolmo.fipy.solve(problem, path, faces=rim)
