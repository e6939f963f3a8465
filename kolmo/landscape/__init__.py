"""Loss landscapes: what noise does to them, in weight space and in feature space, with error bars."""

from kolmo.landscape import plots
from kolmo.landscape.batches import BatchLoss
from kolmo.landscape.comparison import Comparison, over_seeds, paired
from kolmo.landscape.curvature import Curvature, curvature, eigenvalues
from kolmo.landscape.features import FeatureLandscape, FlowLoss, feature_landscape
from kolmo.landscape.interactive import write_html
from kolmo.landscape.planes import Plane, hessian_plane, line, pca_plane, random_plane
from kolmo.landscape.summary import Quantity, Summary, sharpness, summary
from kolmo.landscape.surface import Surface, surface

__all__ = [
    "Plane",
    "random_plane",
    "pca_plane",
    "hessian_plane",
    "line",
    "Surface",
    "surface",
    "Curvature",
    "curvature",
    "eigenvalues",
    "BatchLoss",
    "summary",
    "sharpness",
    "over_seeds",
    "paired",
    "Summary",
    "Quantity",
    "Comparison",
    "feature_landscape",
    "FeatureLandscape",
    "FlowLoss",
    "plots",
    "write_html",
]


def __dir__() -> list[str]:
    return sorted(__all__)
