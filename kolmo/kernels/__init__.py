"""The only compiled code: applying one-dimensional operators along lines, and banded solves. Knows no equation."""
