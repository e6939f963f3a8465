"""Nodes: tensor grids with their cells, the smooth maps ξ → x of their axes, and nodes in time."""

from kolmo.grid.grid import Axis, Grid

__all__ = ["Axis", "Grid"]
