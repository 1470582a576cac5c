"""Real NBD clients over TLS, against a daemon that is configured as an operator would do it."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from geomirror.lab.ports_io import free_port
from tests.interop.clients import run
from tests.nbd.certificates import Authority
from tests.system.support import Site, create, some_sites, until

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
SIZE = 8 << 20


@dataclass
class Secured:
    site: Site
    port: int
    ours: Authority
    foreign: Authority

    def uri(self, certificates: Path, export: str = "pg/0", scheme: str = "nbds") -> str:
        return f"{scheme}://localhost:{self.port}/{export}?tls-certificates={certificates}"

    def qemu(self, certificates: Path) -> list[str]:
        return [
            "--object",
            f"tls-creds-x509,id=t,dir={certificates},endpoint=client",
            "--image-opts",
            f"driver=nbd,host=localhost,port={self.port},export=pg/0,tls-creds=t",
        ]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    root = tmp_path_factory.mktemp("secured")
    ours, foreign = Authority(root / "ours"), Authority(root / "foreign")
    with some_sites(root, "east-1") as (site,):
        site.run(
            *("network", "create", "acme", "--site", "east", "--node", "east-1"),
            *("--listen", f"127.0.0.1:{site.port}"),
        )
        port = free_port()
        config = site.data_dir / "geomirror.toml"
        certificate, key = ours.server
        (site.data_dir / "nbd-key.pem").write_bytes(key.read_bytes())
        (site.data_dir / "nbd-key.pem").chmod(0o600)
        config.write_text(
            f'[nbd]\ntcp_listen = "127.0.0.1:{port}"\ntls_certificate = "{certificate}"\n'
            f'tls_key = "nbd-key.pem"\ntls_ca = "{ours.ca}"\n'
        )
        config.chmod(0o600)
        site.restart()
        create(site, "pg", size="8M", secondary=None)
        yield Secured(site, port, ours, foreign)
        assert site.crashes() == []


async def test_status_shows_a_uri_that_says_tls(secured: Secured) -> None:
    secured.site.uri()
    (volume,) = secured.site.resource()["volumes"]
    assert volume["nbd_tcp_uri"] == f"nbds://127.0.0.1:{secured.port}/pg/0"
    assert "nbd_tcp_is_exposed" not in secured.site.log()


async def test_nbdinfo_with_our_certificate(secured: Secured) -> None:
    size = await run("nbdinfo", "--size", secured.uri(secured.ours.directory))
    assert int(size) == SIZE
    told = await run("nbdinfo", secured.uri(secured.ours.directory))
    assert "protocol: newstyle-fixed with TLS" in told


async def test_nbdcopy_both_ways(secured: Secured, tmp_path: Path) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    source.write_bytes(random.Random(7).randbytes(SIZE))
    uri = secured.uri(secured.ours.directory)
    await run("nbdcopy", "--flush", source, uri)
    await run("nbdcopy", uri, target)
    assert target.read_bytes() == source.read_bytes()


async def test_qemu_writes_and_reads(secured: Secured) -> None:
    commands = ("-c", "write -P 0x5a 1M 2M", "-c", "flush", "-c", "read -P 0x5a 1M 2M")
    said = await run("qemu-io", *secured.qemu(secured.ours.directory), *commands)
    assert "verification failed" not in said
    assert await secured.site.read(1 << 20, 4) == b"\x5a" * 4


async def test_clients_without_our_certificate_are_refused(
    secured: Secured, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "ca-cert.pem").write_bytes(secured.ours.ca.read_bytes())
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "ca-cert.pem").write_bytes(secured.ours.ca.read_bytes())
    for found in secured.foreign.client:
        (mixed / found.name).write_bytes(found.read_bytes())
    for certificates in (nothing, mixed, secured.foreign.directory):
        await run("nbdinfo", secured.uri(certificates), is_failure_wanted=True)
    await run("qemu-io", *secured.qemu(mixed), "-c", "read 0 4k", is_failure_wanted=True)


async def test_a_client_without_tls_is_told_what_it_lacks(secured: Secured) -> None:
    plain = f"nbd://localhost:{secured.port}/pg/0"
    await run("nbdinfo", plain, is_failure_wanted=True)
    said = await run("qemu-img", "info", plain, is_failure_wanted=True)
    assert "TLS" in said


async def test_new_certificates_are_taken_over_without_a_restart(secured: Secured) -> None:
    site, config = secured.site, secured.site.data_dir / "geomirror.toml"
    before = config.read_text()
    certificate, key = secured.foreign.server
    text = before.replace(str(secured.ours.server[0]), str(certificate))
    text = text.replace('"nbd-key.pem"', f'"{key}"')
    assert site.process is not None
    # A mistake changes nothing.
    config.write_text(text.replace(str(certificate), "absent.pem"))
    site.process.send_signal(signal.SIGHUP)
    until(lambda: site.events("configuration_refused"))
    await run("nbdinfo", "--size", secured.uri(secured.ours.directory))
    config.write_text(text.replace(str(secured.ours.ca), str(secured.foreign.ca)))
    site.process.send_signal(signal.SIGHUP)
    until(lambda: site.events("configuration_reloaded"))
    await run("nbdinfo", "--size", secured.uri(secured.foreign.directory))
    await run("nbdinfo", secured.uri(secured.ours.directory), is_failure_wanted=True)
    config.write_text(before)
    site.process.send_signal(signal.SIGHUP)
    until(lambda: len(site.events("configuration_reloaded")) == 2)


def test_a_daemon_whose_key_others_may_read_does_not_start(tmp_path: Path) -> None:
    ours = Authority(tmp_path / "tls")
    with some_sites(tmp_path, "east-1") as (site,):
        site.run("network", "create", "acme", "--site", "east", "--node", "east-1")
        ours.server[1].chmod(0o644)
        config = site.data_dir / "geomirror.toml"
        config.write_text(
            f'[nbd]\ntls_certificate = "{ours.server[0]}"\ntls_key = "{ours.server[1]}"\n'
        )
        config.chmod(0o600)
        assert "others may use it" in site.failed_start(expected=2)
