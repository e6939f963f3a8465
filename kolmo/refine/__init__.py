"""Refinement: what turns solves on finer and finer levels into an answer with an estimate of its error."""
