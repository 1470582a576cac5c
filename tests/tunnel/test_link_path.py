"""Paths: text and parts, ranks, and the order in which they are tried."""

from __future__ import annotations

import pytest

from geomirror.config import Config, parse_config
from geomirror.errors import ConfigError
from geomirror.tunnel.link_path import KINDS, LinkPath, expand_paths, parse_path, rank_of


@pytest.mark.parametrize(
    ("text", "path", "kind", "http_host"),
    [
        ("a:1", LinkPath("a", 1), "direct", "a:1"),
        ("[::1]:1", LinkPath("::1", 1), "direct", "[::1]:1"),
        ("a:1 via p:3128", LinkPath("a", 1, proxy="p:3128"), "proxy", "a:1"),
        ("wss://a/x", LinkPath("a", 443, "wss", "/x"), "websocket", "a"),
        ("wss://[::1]", LinkPath("::1", 443, "wss", "/"), "websocket", "[::1]"),
        ("ws://a", LinkPath("a", 80, "ws", "/"), "websocket", "a"),
        (
            "wss://a:8443/x/y via [::1]:1",
            LinkPath("a", 8443, "wss", "/x/y", "[::1]:1"),
            "websocket_proxy",
            "a:8443",
        ),
    ],
)
def test_a_path_is_taken_apart(text, path, kind, http_host):
    assert parse_path(text) == path
    assert KINDS[rank_of(text)] == kind
    assert parse_path(text).http_host == http_host


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "http://a/x",
        "wss://",
        "wss://a b/",
        "wss://a:70000/",
        "wss://a/x?y",
        "wss://a/x\r\nEvil: y",
        "wss://u:p@a/",
        "wss://a/" + "x" * 300,
        "a:1 via p",
        "a:1 via wss://p/",
        "a:1 via p:1 via q:1",
    ],
)
def test_what_is_no_path_is_refused(text):
    with pytest.raises(ConfigError):
        parse_path(text)


def test_paths_are_tried_best_first():
    endpoints = ["wss://front/x", "b:1", "a:1"]
    assert expand_paths(endpoints, None) == ["b:1", "a:1", "wss://front/x"]
    assert expand_paths(endpoints, "p:1") == [
        *("b:1", "a:1", "b:1 via p:1", "a:1 via p:1"),
        *("wss://front/x", "wss://front/x via p:1"),
    ]


def test_every_endpoint_that_the_configuration_takes_is_a_path():
    text = '[peers.west-1]\nendpoints = ["w:1", "[::1]:1", "wss://w/x", "ws://[::1]:80/a/b"]\n'
    for endpoint in parse_config(text, "x").peers["west-1"].endpoints:
        parse_path(endpoint)
    for wrong in ("http://w/x", "wss://", "wss://a/x?y", "wss://u:p@a/"):
        with pytest.raises(ConfigError):
            parse_config(f'[peers.w]\nendpoints = ["{wrong}"]\n', "x")
    node = Config().node
    assert parse_path(f"wss://0.0.0.0:443{node.websocket_path}").resource == "/geomirror"
