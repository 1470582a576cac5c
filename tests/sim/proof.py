"""Whether an error that ended a run shows a broken promise.

A mutation is found by the oracle, or by a check that is in the product for that purpose: an
assertion of its own, or an error that says that bytes are not what they were. Whatever else a
broken product stumbles over is a failure of the run, and proves nothing.
"""

from __future__ import annotations

from pathlib import Path

import geomirror
from geomirror.errors import FencedError, IntegrityError, SupersededError
from tests.sim.oracle import OracleError

_PRODUCT = str(Path(geomirror.__file__).parent)


class StumbleError(Exception):
    """A run ended in an error that is neither the oracle's nor a check's."""


def is_proof(error: BaseException) -> bool:
    """Whether it is the oracle's word, or that of a check of the product."""
    if isinstance(error, AssertionError) and not isinstance(error, OracleError):
        return _is_of_product(error)
    is_check = isinstance(error, IntegrityError | FencedError)
    return isinstance(error, OracleError) or (is_check and not isinstance(error, SupersededError))


def _is_of_product(error: BaseException) -> bool:
    """Whether it was raised there, not by the simulation around it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PRODUCT)
