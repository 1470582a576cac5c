"""What counts as having found a mutation: a broken promise or a check, not any error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from geomirror.errors import (
    FencedError,
    GeomirrorError,
    IntegrityError,
    NotFoundError,
    StorageError,
    SupersededError,
)
from geomirror.volume.engine import Engine
from geomirror.volume.image import Image
from tests.sim import mutation_runs, mutations
from tests.sim.disk import SimStore
from tests.sim.oracle import OracleError
from tests.sim.proof import is_proof


def caught(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except (AssertionError, GeomirrorError, LookupError) as error:
        return error
    raise ValueError("it raised nothing")


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> None:
        raise error

    return call


def test_the_oracle_checks_for_damage_and_assertions_of_the_product_are_proof() -> None:
    image = Image(0, "0", 4096, SimStore().create("volumes/0.img", 4096))
    for call in (
        raising(OracleError("O1")),
        raising(IntegrityError("damaged")),
        raising(FencedError("half applied")),
        lambda: image.block_bytes(7),
    ):
        assert is_proof(caught(call))


def test_stumbling_is_none() -> None:
    for call in (
        raising(KeyError("epoch 4")),
        raising(IndexError()),
        raising(StorageError("pwritev: No space left on device")),
        raising(NotFoundError("no such epoch")),
        raising(SupersededError("a higher token")),
        raising(AssertionError("of the simulation itself")),
    ):
        assert not is_proof(caught(call))


def test_a_product_that_only_stumbles_is_not_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumbling() -> list[Any]:
        def seal_job(self: Engine, draft: Any) -> Any:
            raise KeyError("table")

        return [(Engine, "seal_job", seal_job)]

    monkeypatch.setitem(mutations.MUTATIONS, "stumbling", stumbling)
    monkeypatch.setattr(mutation_runs, "SEEDS_MAX", 2)
    with pytest.raises(AssertionError, match="not found within 2 seeds"):
        mutation_runs.find("stumbling")
