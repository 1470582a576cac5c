#!/bin/sh
# Real NBD clients for the interop tests and libnbd's own tests, a compiler and ip for the packet-level
# emulator, PostgreSQL for the database story, mounts and namespaces for attached volumes, WireGuard for
# tunnels, nginx in front of WebSockets, and what the benchmarks compare with. Without root the tests
# that need a missing one are skipped with its name as the reason.
set -eu
here=$(dirname "$0")
fetch_tests() {
    sh "$here/fetch_libnbd_tests.sh" "$here/../build/libnbd" ||
        echo "libnbd's source package cannot be had, its tests will be skipped" >&2
}
missing=
for pair in nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-io:qemu-utils fio:fio nbdkit:nbdkit \
            mke2fs:e2fsprogs nbd-client:nbd-client nbdsh:python3-libnbd cc:gcc ip:iproute2 \
            qemu-storage-daemon:qemu-system-common wg:wireguard-tools \
            wireguard-go:wireguard-go rsync:rsync losetup:mount nsenter:util-linux \
            dpkg-source:dpkg-dev nginx:nginx-light; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
# The compiler alone has no headers.
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
[ -e /usr/include/libnbd.h ] || missing="$missing libnbd-dev"
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"
[ -n "$missing" ] || { fetch_tests; exit 0; }
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    case $missing in
        *postgresql*)
            # The programs are wanted, not a server of the system that starts at once.
            mkdir -p /etc/postgresql-common
            [ -e /etc/postgresql-common/createcluster.conf ] ||
                echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf ;;
    esac
    # Likewise of nginx: Debian's own switch for "start no services now".
    policy=/usr/sbin/policy-rc.d
    [ -e "$policy" ] || {
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT
    }
    # Without a network the tests of what is there are run nevertheless.
    # shellcheck disable=SC2086
    { apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    } || echo "cannot be installed, their tests will be skipped:$missing" >&2
else
    echo "not installed, their tests will be skipped:$missing" >&2
fi
fetch_tests
