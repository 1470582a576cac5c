"""Reads the configuration file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from geomirror.config import Config, parse_config
from geomirror.errors import ConfigError


def load_config(path: Path) -> Config:
    """The configuration in a file; the defaults when there is none.

    :raises ConfigError: it cannot be read or used, or somebody else could write it.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path}: others may write it", hint=f'run "chmod go-w {path}"')
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason}") from error
    return parse_config(text, str(path))
