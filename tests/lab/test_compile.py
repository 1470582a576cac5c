"""Programs that are compiled when they are needed, and what stands in the way of it."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, StorageError
from geomirror.lab.compile_io import FLAGS, compile_program, default_cache
from geomirror.lab.packet_emulator_io import SOURCE
from tests.lab.packet_support import need_compiler

pytestmark = pytest.mark.system


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int main(void) { return 42; }\n")
    return path


def compiled(source: Path, cache: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    return asyncio.run(compile_program(source, cache=cache, flags=flags))


def test_a_program_is_made_once_and_anew_for_a_new_source(source: Path, tmp_path: Path) -> None:
    need_compiler()
    cache = tmp_path / "cache"
    program = compiled(source, cache)
    assert subprocess.run([program], check=False).returncode == 42
    made = program.stat().st_mtime_ns
    compiled(source, cache)
    assert program.stat().st_mtime_ns == made
    assert compiled(source, cache, ("-O0",)) != program
    source.write_text("int main(void) { return 43; }\n")
    other = compiled(source, cache)
    assert subprocess.run([other], check=False).returncode == 43
    assert len(list(cache.iterdir())) == 3  # and no half-made one


async def test_two_at_once_make_the_same_program(source: Path, tmp_path: Path) -> None:
    need_compiler()
    cache = tmp_path / "cache"
    made = await asyncio.gather(*(compile_program(source, cache=cache) for _ in range(2)))
    assert [*cache.iterdir()] == [made[0]] == [made[1]]


def test_a_source_with_mistakes_leaves_nothing(source: Path, tmp_path: Path) -> None:
    need_compiler()
    source.write_text("int main(void) { return answer; }\n")
    with pytest.raises(GeomirrorError, match="answer"):
        compiled(source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


async def test_without_a_compiler_the_next_command_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(NotFoundError, match="apt-get install gcc libc6-dev"):
        await compile_program(source, cache=tmp_path / "cache")


async def test_a_cache_of_others_is_not_trusted(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(RefusedError, match="chmod 700"):
        await compile_program(source, cache=cache)
    with pytest.raises(StorageError):
        await compile_program(source, cache=source / "below")


def test_the_cache_is_where_the_desktop_specification_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert default_cache() == Path("/var/cache/me/geomirror")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == Path.home() / ".cache/geomirror"


async def test_the_emulator_compiles_without_a_warning(tmp_path: Path) -> None:
    need_compiler()
    await compile_program(SOURCE, flags=(*FLAGS, "-Werror"), cache=tmp_path / "cache")
