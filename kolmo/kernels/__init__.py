"""The only compiled code: operators along lines, banded solves, splines, noisy chains. Knows no equation."""
