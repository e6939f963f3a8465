"""How "auto" chooses: look at the data, lay out a grid, refine until an estimate meets the tolerance."""
