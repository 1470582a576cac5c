#!/bin/sh
# Real NBD clients for the interop tests, a compiler and ip for the packet-level emulator. Without
# root the tests that need a missing one are skipped with its name as the reason.
set -eu
missing=
for pair in nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-io:qemu-utils fio:fio nbdkit:nbdkit \
            mke2fs:e2fsprogs nbd-client:nbd-client cc:gcc ip:iproute2; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
# The compiler alone has no headers.
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "not installed, their tests will be skipped:$missing" >&2
fi
