"""Probes, metrics and paths between sites."""
