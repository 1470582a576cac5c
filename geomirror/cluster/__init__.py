"""Generations and leases: who may write."""
