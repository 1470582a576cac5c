"""Hours of random faults, resumable; `python -m tests.soak` and CONTRIBUTING.md."""
