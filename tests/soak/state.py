"""What a soak has done so far, on disk: it goes on where it was interrupted.

`state.json` names the seed and the next round; `rounds.jsonl` has one line for each round that has
ended. A round that was under way when the machine or the soak stopped is done again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass
class Round:
    """One round that has ended."""

    number: int
    kind: str
    seed: int
    verdict: str
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    figures: dict[str, int | float] = field(default_factory=dict)
    why: str = ""
    """What was wrong, or why it could not be."""
    directory: str = ""
    """Kept logs and disks of a failed round."""


@dataclass
class State:
    """The totals; `load` gives the ones of an earlier run of the same directory."""

    directory: Path
    seed: int
    next_round: int = 0
    seconds: float = 0.0
    verdicts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Kind → verdict → count."""
    under_way: str = ""
    """The round that runs, or ran when everything stopped."""

    @classmethod
    def load(cls, directory: Path, seed: int) -> State:
        """Of an earlier run, or a new one with this seed."""
        path = directory / "state.json"
        if not path.exists():
            return cls(directory, seed)
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(directory, **found)

    @property
    def failures(self) -> int:
        """Rounds that failed, in all runs."""
        return sum(counts.get(FAILED, 0) for counts in self.verdicts.values())

    def begin(self, kind: str, seed: int) -> None:
        """A round begins."""
        self.under_way = f"{self.next_round} {kind} {seed}"
        self._save()

    def end(self, one: Round) -> None:
        """A round has ended: its line first, so that it is never counted without one."""
        with (self.directory / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        counts = self.verdicts.setdefault(one.kind, {})
        counts[one.verdict] = counts.get(one.verdict, 0) + 1
        self.next_round, self.under_way = one.number + 1, ""
        self.seconds = round(self.seconds + one.seconds, 1)
        self._save()

    def _save(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        document = {key: value for key, value in asdict(self).items() if key != "directory"}
        path = self.directory / "state.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
