#!/usr/bin/env bash
# A Debian or Ubuntu root with nothing in it, the committed state of this checkout, and one command there.
#
#   fresh_root.sh [--suite NAME] [--mirror URL] [COMMAND...]     default: this machine's release and mirror, ./dev demo
#
# Needs root and debootstrap. The base system, apt's archives and pip's downloads are kept in .cache/fresh for the next
# run; the root itself is removed. Everything runs in mount and process namespaces of its own, so that whatever
# happens no mount and no process stays. How packages are found is taken from this machine: mirror and proxies of apt,
# pip's configuration, DNS and certificates.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
CACHE=$PWD/.cache/fresh

fail() {
    printf 'fresh_root: %s\n' "$*" >&2
    exit 1
}

mirror() {
    { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null || true; } |
        sed -nE -e 's/^URIs: *([^ ]+).*/\1/p' -e 's/^deb +(\[[^]]*\] +)?([^ ]+).*/\2/p' | grep -m 1 .
}

# base SUITE [MIRROR]: the path of a bare system, made on first use
base() {
    local suite=$1 uri=$2 components=main
    if [ ! -d "$CACHE/base-$suite" ]; then
        [ -n "$uri" ] || uri=$(mirror) || fail "no package mirror found in /etc/apt"
        case "$uri" in
            *ubuntu*) components=main,universe ;;
        esac
        rm -rf "$CACHE/base-$suite.partial"
        printf 'fresh_root: debootstrap %s from %s (once; about a minute)\n' "$suite" "$uri" >&2
        debootstrap --variant=minbase --components="$components" "$suite" "$CACHE/base-$suite.partial" "$uri" \
            >"$CACHE/debootstrap.log" 2>&1 ||
            fail "debootstrap failed, see $CACHE/debootstrap.log: $(tail -n 1 "$CACHE/debootstrap.log")"
        rm -f "$CACHE/base-$suite.partial"/var/cache/apt/archives/*.deb
        # as installers do: Python 3.11 for Ubuntu 22.04 came with an update
        printf "deb $uri %s ${components/,/ }\n" "$suite" "$suite-updates" \
            >"$CACHE/base-$suite.partial/etc/apt/sources.list"
        mv "$CACHE/base-$suite.partial" "$CACHE/base-$suite"
    fi
    echo "$CACHE/base-$suite"
}

# Local directories that pip's configuration and environment name: file: indexes, wheel directories
pip_paths() {
    {
        env | sed -nE 's/^PIP_[A-Z_]+=(.*)$/\1/p'
        sed -nE 's/^[^#;=]+=(.*)$/\1/p' /etc/pip.conf "$HOME"/.pip/pip.conf "$HOME"/.config/pip/pip.conf 2>/dev/null
    } | tr ' ' '\n' | sed -E -e 's#^file://##' -e 's#/simple/?$##' | grep '^/' | grep -v '^/etc/' | sort -u || true
}

# The second half, inside the namespaces: mounts, then the command
inside() {
    local root=$1 path
    shift
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    mkdir -p "$CACHE/apt/partial" "$CACHE/pip" "$root/var/cache/pip"
    mount --bind "$CACHE/apt" "$root/var/cache/apt/archives"
    mount --bind "$CACHE/pip" "$root/var/cache/pip"
    for path in $(pip_paths); do
        [ -d "$path" ] || continue
        mkdir -p "$root$path"
        mount --bind "$path" "$root$path"
    done
    for path in /etc/resolv.conf /etc/hosts /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
        [ -e "$path" ] || continue
        mkdir -p "$root/${path%/*}"
        cp -L "$path" "$root$path"
    done
    apt-config dump | grep -iE '^Acquire::.*(proxy|cainfo)' >"$root/etc/apt/apt.conf.d/99host" || true
    local keep=() name
    for name in $(compgen -e | grep -E '^(PIP_[A-Z_]+|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY)$'); do
        keep+=("$name=${!name}")
    done
    path=${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}
    if [ -e "$path" ]; then
        cp -L "$path" "$root/etc/this-machine-ca.crt" # beside the root's own, which a package manages
        keep+=(PIP_CERT=/etc/this-machine-ca.crt)
    fi
    exec chroot "$root" env -i HOME="$HOME" TERM=dumb LANG=C.UTF-8 \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PIP_CACHE_DIR=/var/cache/pip "${keep[@]}" \
        bash -c 'cd /root/meshwall && exec "$@"' bash "$@"
}

main() {
    local suite root bare mirror='' status=0
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    while [ $# -gt 0 ]; do
        case "$1" in
            --suite) suite=$2 ;;
            --mirror) mirror=$2 ;;
            *) break ;;
        esac
        shift 2
    done
    [ $# -gt 0 ] || set -- ./dev demo
    [ "$(id -u)" = 0 ] || fail "needs root"
    command -v debootstrap >/dev/null || fail "debootstrap is not installed (apt-get install debootstrap)"
    mkdir -p "$CACHE"
    exec 9>"$CACHE/lock"
    flock -n 9 || fail "another run holds $CACHE/lock"
    find "$CACHE" -maxdepth 1 -name 'root.*' -exec rm -rf --one-file-system {} +
    bare=$(base "$suite" "$mirror")
    root=$(mktemp -d "$CACHE/root.XXXXXX")
    trap "rm -rf --one-file-system '$root'" EXIT
    chmod 755 "$root"
    cp -a "$bare/." "$root"
    mkdir -p "$root/root/meshwall"
    git archive HEAD | tar -x -C "$root/root/meshwall"
    printf 'fresh_root: %s, %s packages, %s: %s\n' "$suite" \
        "$(grep -c '^Package:' "$root/var/lib/dpkg/status")" "$(git log -1 --format='commit %h')" "$*" >&2
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        "$0" --inside "$root" "$@" 9>&- </dev/null &
    trap "kill $! 2>/dev/null; exit 143" INT TERM HUP
    wait $! || status=$?
    printf 'fresh_root: exit status %d after %d s\n' "$status" "$SECONDS" >&2
    return "$status"
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
else
    main "$@"
fi
