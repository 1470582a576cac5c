"""`python -m tests.fuzz TARGET --seconds 300`: fuzz one target, or `all` one after the other."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
from pathlib import Path

from tests.fuzz import corpus
from tests.fuzz.corpus import BUILD, CORPUS
from tests.fuzz.engines import ENGINES, has_atheris, run_atheris, run_hypothesis

SECONDS = 60


def main() -> int:
    """Exit code 1 when an input breaks an invariant; it is kept, and how to replay it is said."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", default="all", choices=["all", *corpus.names()])
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each target ({SECONDS})")
    parser.add_argument("--seed", type=int, help="of all that is chosen; another each time without")
    parser.add_argument("--engine", choices=ENGINES, help="atheris where it is installed")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input, nothing else")
    parser.add_argument(
        "--keep", action="store_true", help="add what found new steps to tests/fuzz/corpus"
    )
    parser.add_argument("--list", action="store_true", help="show the targets")
    arguments = parser.parse_args()
    engine = arguments.engine or ("atheris" if has_atheris() else "hypothesis")
    # libFuzzer takes 0 for "choose one".
    seed = arguments.seed if arguments.seed is not None else 1 + secrets.randbelow((1 << 31) - 1)
    chosen = corpus.names() if arguments.target == "all" else [arguments.target]
    if arguments.list:
        print("\n".join(corpus.names()))
    elif arguments.replay is not None:
        corpus.load(_one(parser, chosen)).run(arguments.replay.read_bytes())
    elif arguments.keep:
        for name in chosen:
            _keep(name)
    elif len(chosen) > 1:
        return max(_run_apart(name, engine, arguments.seconds, seed) for name in chosen)
    elif engine == "hypothesis":
        rounds = run_hypothesis(chosen[0], arguments.seconds, seed)
        print(f"{chosen[0]}: {rounds} rounds, nothing found")
    else:
        os.nice(5)
        run_atheris(chosen[0], arguments.seconds, seed)
    return 0


def _one(parser: argparse.ArgumentParser, chosen: list[str]) -> str:
    if len(chosen) != 1:
        parser.error("--replay needs one target")
    return chosen[0]


def _run_apart(name: str, engine: str, seconds: int, seed: int) -> int:
    """A process of its own per target: libFuzzer ends the one that it runs in."""
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds)]
    done = subprocess.run([*command, "--engine", engine, "--seed", str(seed)], check=False)
    if done.returncode:
        for path in sorted((BUILD / name).glob("crash-*")):
            print(f"replay: python -m tests.fuzz {name} --replay {path}")
    return int(done.returncode != 0)


def _keep(name: str) -> None:
    """Choose anew which inputs the repository keeps; those that once failed always stay."""
    candidates = [path.read_bytes() for path in (BUILD / name / "corpus").glob("*")]
    kept = [path for path in corpus.kept(name) if not path.name.startswith("crash-")]
    candidates += [path.read_bytes() for path in kept]
    chosen = corpus.minimise(name, candidates)
    for path in kept:
        path.unlink()
    for data in chosen:
        corpus.store(CORPUS / name, data)
    print(f"{name}: {len(chosen)} of {len(candidates)} inputs kept, {sum(map(len, chosen))} bytes")


if __name__ == "__main__":
    sys.exit(main())
