"""What feeds a target: libFuzzer through atheris, guided by coverage, or hypothesis anywhere."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz import corpus
from tests.fuzz.corpus import BUILD, CORPUS

ENGINES = ("atheris", "hypothesis")
MALLOC_MIB_MAX = 256
"""No single allocation is larger: every length is bounded before memory is taken."""
ROUND_EXAMPLES = 200


def has_atheris() -> bool:
    """Whether the coverage-guided engine is installed (`pip install -e .[fuzz]`)."""
    return importlib.util.find_spec("atheris") is not None


def run_atheris(name: str, seconds: int, number: int) -> None:
    """Fuzz until the time is over or something fails; does not return: libFuzzer ends the process.

    New inputs go to `build/fuzz/NAME/corpus`, one that fails to `build/fuzz/NAME/crash-HASH`.
    """
    import atheris

    with atheris.instrument_imports(include=["geomirror", "tomllib"]):
        target = corpus.load(name)
    grown, seeds = BUILD / name / "corpus", BUILD / name / "seeds"
    grown.mkdir(parents=True, exist_ok=True)
    for data in target.seeds():
        corpus.store(seeds, data)
    kept = CORPUS / name
    directories = [grown, seeds, *([kept] if kept.is_dir() else [])]
    words = BUILD / name / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in corpus.words(target)))
    options = [
        *([f"-dict={words}"] if corpus.words(target) else []),
        f"-max_total_time={seconds}",
        f"-seed={number}",
        f"-max_len={corpus.bytes_max(target)}",
        f"-artifact_prefix={BUILD / name}/",
        f"-malloc_limit_mb={MALLOC_MIB_MAX}",
        "-timeout=20",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([name, *options, *map(str, directories)], target.run)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def mutations(inputs: list[bytes], words: list[bytes], length_max: int) -> SearchStrategy[bytes]:
    """Known inputs, changed here and there, cut, doubled, joined; and plain noise."""
    place = st.integers(0, length_max)
    new = st.one_of(st.binary(max_size=8), *([st.sampled_from(words)] if words else []))
    change = st.tuples(st.sampled_from("xisdcz"), place, st.integers(1, 255), new)
    changed = st.builds(
        lambda data, changes, other: _changed(data, changes, other)[:length_max],
        st.sampled_from(inputs),
        st.lists(change, max_size=6),
        st.sampled_from(inputs),
    )
    return st.one_of(changed, st.binary(max_size=min(length_max, 256)))


def _changed(data: bytes, changes: list[tuple[str, int, int, bytes]], other: bytes) -> bytes:
    for kind, place, value, new in changes:
        at = place % (len(data) + 1)
        if kind == "x":
            data = data[:at] + bytes(b ^ value for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == "i":
            data = data[:at] + new + data[at:]
        elif kind == "s":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "d":
            data = data[:at] + data[at + value % 16 :]
        elif kind == "c":
            data = data[:at] + other[at:]
        else:
            data = data[:at] + bytes(value) + data[at + value :]
    return data


def hypothesis_round(name: str, examples: int, number: int | None) -> Callable[[], None]:
    """A test of one target; with the same number it is the same test, None: always the same."""
    target = corpus.load(name)
    length_max = corpus.bytes_max(target)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(mutations(corpus.inputs(name), corpus.words(target), length_max))
    def round_(data: bytes) -> None:
        failed.append(data)
        target.run(data)
        failed.pop()

    failed: list[bytes] = []
    test = round_ if number is None else seed(number)(round_)

    def run() -> None:
        try:
            test()
        except BaseException:
            # The last one is the shortest that was found.
            if failed:
                corpus.store(BUILD / name, failed[-1], "crash-")
            raise

    return run


def run_hypothesis(name: str, seconds: int, first: int) -> int:
    """Rounds of examples until the time is over; how many rounds."""
    until, number = time.monotonic() + seconds, first
    while time.monotonic() < until:
        hypothesis_round(name, ROUND_EXAMPLES, number)()
        number += 1
    return number - first
