"""Hostile and damaged bytes against everything that reads bytes of others; see CONTRIBUTING.md.

This package imports nothing of geomirror before the engine of a run is chosen: a coverage-guided
one has to instrument the product while it is imported.
"""
