"""In CI a test that skips itself fails, wherever it does so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SKIPPED_IN_CI, skip_reason

ROOT = Path(__file__).parents[1]
HOOKS = "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport\n"
SKIPPERS = {
    "inside": 'import pytest\ndef test_it():\n    pytest.skip("no such tool")\n',
    "mark": 'import pytest\n@pytest.mark.skip(reason="no such tool")\ndef test_it(): pass\n',
    "fixture": (
        "import pytest\n@pytest.fixture\ndef disk():\n"
        '    pytest.skip("no such tool")\ndef test_it(disk): pass\n'
    ),
    "file": 'import pytest\npytest.skip("no such tool", allow_module_level=True)\n',
    "import": 'import pytest\ndef test_it():\n    pytest.importorskip("no_such_tool")\n',
}


def play(directory: Path, text: str, ci: str) -> tuple[int, str]:
    (directory / "conftest.py").write_text(HOOKS)
    (directory / "test_it.py").write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "-rs"),
            *(f"--rootdir={directory}", str(directory)),
        ],
        cwd=directory,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", SKIPPERS)
def test_a_skip_fails_in_ci(tmp_path: Path, name: str) -> None:
    code, said = play(tmp_path, SKIPPERS[name], "true")
    assert code in (1, 2), said  # 2: a file that cannot be collected
    assert "CI skips nothing" in said
    assert "no" in said and "such" in said


def test_a_skip_is_a_skip_elsewhere(tmp_path: Path) -> None:
    code, said = play(tmp_path, SKIPPERS["inside"], "")
    assert (code, "no such tool" in said, "1 skipped" in said) == (0, True, True), said


def test_what_passes_and_what_is_expected_to_fail_is_left_alone(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.xfail\ndef test_it():\n    assert 0\ndef test_b(): pass\n"
    code, said = play(tmp_path, text, "true")
    assert (code, "1 passed, 1 xfailed" in said) == (0, True), said


def test_every_exception_has_its_reason() -> None:
    assert all(SKIPPED_IN_CI.values())
    assert skip_reason(("file", 1, "Skipped: no such tool")) == "no such tool"


def test_what_ci_runs_says_that_it_is_ci() -> None:
    text = (ROOT / ".ci/run").read_text()
    assert 'export CI="${CI:-true}"' in text
    assert "make test" in text
