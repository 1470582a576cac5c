"""A node is revoked while applications talk to it over the virtual network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.support import until
from tests.system.virtual_network import (
    Host,
    ip,
    make_virtual_network,
    need_tunnels,
    two_hosts,
)

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
UP_S_MAX = 40.0
CUT_S_MAX = 10.0


def interfaces(host: Host) -> str:
    return ip("-n", host.namespace.name, "-brief", "link", "show")


def test_its_interface_its_route_and_its_keys_go(tmp_path: Path) -> None:
    need_tunnels()
    with two_hosts(tmp_path) as (a, b):
        make_virtual_network(a, b, '[tunnel]\ndriver = "wireguard"\n')
        for host in (a, b):
            until(host.is_through, UP_S_MAX, f"tunnel of {host.name}")
        interface, address = a.neighbour()["interface"], b.tunnel()["address"]
        keys = a.data_dir / "tunnel" / "wireguard.json"
        nodes = {n["node"]: n for n in a.call("node.list")["nodes"]}
        node_id = nodes["west-1"]["node_id"]
        assert interface in interfaces(a) and node_id in keys.read_text()
        assert a.ping(address)

        a.run("node", "revoke", "west-1", "--yes")
        until(lambda: interface not in interfaces(a), CUT_S_MAX, "the interface is gone")
        assert a.tunnel()["neighbours"] == []
        assert a.tunnel()["state"] == "up", "the others' tunnels stay"
        assert not a.ping(address, wait_s=0.3) and not b.ping(a.tunnel()["address"], wait_s=0.3)
        routes = ip("-n", a.namespace.name, "route", "show", "table", "7100")
        assert address not in routes and "unreachable" in routes
        until(lambda: node_id not in keys.read_text(), CUT_S_MAX, "its keys are forgotten")
        a.stop()
        a.restart()
        until(lambda: a.tunnel()["state"] == "up", UP_S_MAX, "a restart brings nothing back")
        assert a.tunnel()["neighbours"] == [] and interface not in interfaces(a)
        assert a.crashes() == b.crashes() == []
