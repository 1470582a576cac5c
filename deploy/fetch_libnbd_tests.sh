#!/bin/sh
# libnbd's own tests, for tests/interop/test_libnbd_suite.py: Debian's source package in the version
# of the library that is installed, unpacked into DIRECTORY/VERSION. The machine's own mirrors are
# asked; its configuration and lists of packages stay as they are.
set -eu
directory=${1:-build/libnbd}
version=$(dpkg-query --show --showformat '${source:Version}' libnbd-bin)
[ ! -e "$directory/$version/interop/interop.c" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/source" "$directory"
apt-cache policy libnbd-bin |
    awk '$NF == "Packages" { split($3, place, "/"); print "deb-src", $2, place[1], place[2] }' |
    sort -u >"$work/sources.list"
ask() {
    apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::SourceList="$work/sources.list" \
        -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" "$@"
}
ask update
(cd "$work/source" && ask source --only-source "libnbd=$version" >/dev/null)
rm -rf "${directory:?}/$version"
mv "$work/source"/libnbd-*/ "$directory/$version"
