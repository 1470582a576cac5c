"""A host as `ip` and `wg` show and change it, without one: for plans of tunnels."""

from __future__ import annotations

import copy
import ipaddress
import json
from dataclasses import dataclass, field
from typing import Any

from geomirror.tunnel.wireguard_actual import (
    Actual,
    InterfaceState,
    only_ours,
    parse_addresses,
    parse_rules,
    parse_table,
    parse_wg_dump,
)
from geomirror.tunnel.wireguard_plan import Remove, Start, Step

NONE = "(none)"


@dataclass
class Device:
    """A network device; `answers` is whether `wg` can configure it."""

    is_up: bool = False
    mtu: int = 1420
    answers: bool = True
    private_key: str = NONE
    port: int = 0
    peers: dict[str, list[str]] = field(default_factory=dict)
    """Public key → the other fields of a line of `wg show dump`."""


@dataclass
class World:
    """Everything of a host that plans look at or change."""

    devices: dict[str, Device] = field(default_factory=dict)
    addresses: set[str] = field(default_factory=lambda: {"127.0.0.1/8", "::1/128"})
    routes: list[dict[str, str]] = field(default_factory=list)
    """All of them, as `ip -j route show table all` has them."""
    rules: list[dict[str, Any]] = field(default_factory=list)

    # What tools print.

    def actual(self, tag: str, ranges: tuple[str, ...]) -> Actual:
        """As the shell reads it."""
        links: list[dict[str, Any]] = [
            {"ifname": name, "flags": ["UP"] if d.is_up else [], "mtu": d.mtu, "addr_info": []}
            for name, d in self.devices.items()
        ]
        info = [
            dict(zip(("local", "prefixlen"), a.split("/"), strict=True)) for a in self.addresses
        ]
        links.append({"ifname": "lo", "flags": ["UP"], "mtu": 65536, "addr_info": info})
        found = Actual()
        interfaces, found.addresses = parse_addresses(json.dumps(links).encode(), tag)
        for name, state in interfaces.items():
            found.interfaces[name] = self._configured(name, state)
        for is_ipv6 in (False, True):
            routes = [r for r in self.routes if (":" in r["dst"]) == is_ipv6]
            ours = [r for r in routes if r["table"] == "7100"]
            found.routes |= parse_table(json.dumps(ours).encode())
            rules = [r for r in self.rules if (":" in r.get("dst", "")) == is_ipv6]
            found.rules += parse_rules(json.dumps(rules).encode())
        return only_ours(found, tag, ranges)

    def _configured(self, name: str, state: InterfaceState) -> InterfaceState:
        device = self.devices[name]
        if not device.answers:
            return state
        lines = [[device.private_key, "x", str(device.port), "off"]]
        lines += [[key, *fields] for key, fields in device.peers.items()]
        private, port, peers = parse_wg_dump("\n".join("\t".join(line) for line in lines))
        return InterfaceState(state.is_up, state.mtu, private, port, peers)

    # What steps do.

    def do(self, step: Step) -> None:
        """One step; a command that a real tool would refuse is an error."""
        if isinstance(step, Start):
            assert step.interface not in self.devices
            self.devices[step.interface] = Device()
        elif isinstance(step, Remove):
            del self.devices[step.interface]
            # As the kernel does.
            self.routes = [r for r in self.routes if r.get("dev") != step.interface]
        elif step.arguments[0] == "wg":
            assert step.stdin is not None
            self._configure(step.arguments[2], step.stdin.reveal().decode())
        else:
            words = [word for word in step.arguments[1:] if word not in ("-4", "-6")]
            getattr(self, f"_{words[0]}")(words[1], words[2:])

    def _configure(self, name: str, text: str) -> None:
        device = self.devices[name]
        assert device.answers
        found = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
        device.private_key, device.port = found["PrivateKey"], int(found["ListenPort"])
        key = found["PublicKey"]
        handshake = device.peers.get(key, [NONE] * 3 + ["0"])[3]
        allowed = found["AllowedIPs"].replace(" ", "")
        endpoint = found.get("Endpoint", NONE)
        keepalive = found["PersistentKeepalive"]
        fields = [found["PresharedKey"], endpoint, allowed, handshake, "0", "0", keepalive]
        device.peers = {key: fields}

    def _link(self, verb: str, words: list[str]) -> None:
        assert verb == "set" and words[0] == "dev" and words[2] == "mtu" and words[4] == "up"
        device = self.devices[words[1]]
        device.mtu, device.is_up = int(words[3]), True

    def _address(self, verb: str, words: list[str]) -> None:
        assert words[1:3] == ["dev", "lo"]
        if verb == "replace":
            self.addresses.add(words[0])
        else:
            self.addresses.remove(words[0])

    def _route(self, verb: str, words: list[str]) -> None:
        route = {}
        if words[0] == "unreachable":
            route["type"] = words.pop(0)
        target = ipaddress.ip_network(words.pop(0))
        is_single = target.prefixlen == target.max_prefixlen
        route["dst"] = str(target.network_address if is_single else target)
        names = {"dev": "dev", "src": "prefsrc", "table": "table", "protocol": "protocol"}
        for name, value in zip(words[::2], words[1::2], strict=True):
            route[names[name]] = value
        if verb == "replace" and "dev" in route:
            assert self.devices[route["dev"]].is_up
        if verb == "replace" and "prefsrc" in route:
            length = 128 if ":" in route["prefsrc"] else 32
            assert f"{route['prefsrc']}/{length}" in self.addresses
        same = [r for r in self.routes if (r["table"], r["dst"]) == (route["table"], route["dst"])]
        if verb == "replace":
            self.routes = [r for r in self.routes if r not in same[:1]] + [route]
        else:
            # The kernel's IPv6 "unreachable" is on lo; nobody has to say so.
            matching = [r for r in same if {**r, **route} == r]
            self.routes.remove(matching[0])

    def _rule(self, verb: str, words: list[str]) -> None:
        found = dict(zip(words[::2], words[1::2], strict=True))
        target = ipaddress.ip_network(found["to"])
        rule = {
            "priority": int(found["priority"]),
            "src": "all",
            "dst": str(target.network_address),
            "dstlen": target.prefixlen,
            "table": found["lookup"],
            "protocol": found["protocol"],
        }
        if verb == "add":
            self.rules.append(rule)
        else:
            self.rules.remove(rule)

    def copy(self) -> World:
        """The same once more."""
        return copy.deepcopy(self)
