"""One module per target: `run(data)` fails when an invariant is broken; `seeds()` are good inputs.

`run` must be deterministic, must catch exactly the errors that its subject documents, and should
check more than that nothing was raised: what is accepted encodes to itself, however the input is
cut the outcome is the same, memory is bounded by the limits.
"""
