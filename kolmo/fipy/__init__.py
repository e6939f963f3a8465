"""Cross-check on FiPy: the same equation, put together from FiPy's own terms on its meshes."""

from kolmo.fipy.front import FipySolution, solve
from kolmo.fipy.structured import System
from kolmo.fipy.unstructured import MeshSolution, read_mesh

__all__ = ["FipySolution", "MeshSolution", "System", "read_mesh", "solve"]
