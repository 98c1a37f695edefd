# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What the scripts in this directory share. Sourced, never run.

# With it, cd would print where it goes.
unset CDPATH

top=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck disable=SC2034 # used by the scripts that source this
work=$top/work
prog=${0##*/}
# shellcheck disable=SC2034
default_base=10.0

# Messages of tools are read by these scripts, and lists must sort alike everywhere.
export LC_ALL=C.UTF-8

# What a user runs; QEMU's build has as much again that nobody here needs.
# shellcheck disable=SC2034
binaries=(qemu-img qemu-io qemu-nbd storage-daemon/qemu-storage-daemon qemu-system-x86_64)

# The Debian suite whose source package is the base.
base_suite() {
    case $1 in
        10.0) echo trixie ;;
        *) return 1 ;;
    esac
}

say() {
    printf '[%s] %4ds  %s\n' "$prog" "$SECONDS" "$*"
}

die() {
    printf '%s: %s\n' "$prog" "$*" >&2
    exit 1
}

check_base() { # BASE
    base_suite "$1" >/dev/null ||
        die "unknown base '$1': the bases are 10.0"
    [ -f "$top/patches/$1/series" ] ||
        die "no series for base $1: patches/$1/series is missing"
}

# One at a time: the lock is held until this script and what it started are gone.
take_lock() { # FILE
    mkdir -p "${1%/*}"
    exec 9>"$1"
    flock -n 9 && return
    say "waiting for another $prog of this folder"
    flock 9
}

# --- long commands ---

logged_pid=

stop_logged() {
    [ -n "$logged_pid" ] || return 0
    kill "$logged_pid" 2>/dev/null || true
    # One that was stopped does not end before it goes on.
    kill -CONT "$logged_pid" 2>/dev/null || true
    wait "$logged_pid" 2>/dev/null || true
    logged_pid=
}
trap stop_logged EXIT
trap 'echo "$prog: interrupted" >&2; exit 130' INT
trap 'echo "$prog: interrupted" >&2; exit 143' TERM HUP

# How far a command is, by its log: ninja's last "[n/m]". Scripts may have another.
progress_of() { # LOG
    tail -c 4096 "$1" | grep -ao '\[[0-9]*/[0-9]*\]' | tail -n 1
}

# Run a command with its output in LOG, and say now and then how far it is.
run_logged() { # LOG CMD...
    local log=$1 status=0 every=30 next at
    shift
    [ ! -t 1 ] || every=1
    next=$((SECONDS + every))
    mkdir -p "${log%/*}"
    "$@" >"$log" 2>&1 </dev/null &
    logged_pid=$!
    while kill -0 "$logged_pid" 2>/dev/null; do
        sleep 0.2
        [ "$SECONDS" -ge "$next" ] || continue
        next=$((SECONDS + every))
        at=$(progress_of "$log") || at=
        if [ -t 1 ]; then
            printf '\r[%s] %4ds  %s\033[K' "$prog" "$SECONDS" "${at:-still at it}"
        else
            say "${at:-still at it}"
        fi
    done
    [ ! -t 1 ] || printf '\r\033[K'
    wait "$logged_pid" || status=$?
    logged_pid=
    return "$status"
}

# The end of the log, then the reason and where to read more.
die_log() { # LOG MESSAGE
    tail -n 30 "$1" >&2
    die "$2 (log: $1)"
}

# --- packages ---

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        return 1
    fi
}

system_apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -o Acquire::Retries=3 \
        -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" \
        >>"$work/log/packages.log" 2>&1 </dev/null
}

# Someone else's update may hold the lock on the lists, for which apt does not wait.
update_lists() {
    local try
    as_root true 2>/dev/null || return 1
    mkdir -p "$work/log"
    say "updating the machine's package lists"
    for try in 1 2 3; do
        ! system_apt update || return 0
        sleep $((try * 5))
    done
    return 1
}

missing_packages() { # PACKAGE...
    local p
    for p; do
        dpkg-query -W -f '${db:Status-Status}\n' "$p" 2>/dev/null |
            grep -qx installed || echo "$p"
    done
}

# A machine's lists may be empty or stale: only then is an update worth its time.
install_packages() { # PACKAGE|./FILE.deb...
    mkdir -p "$work/log"
    if ! as_root true; then
        die "needs root or sudo to install: $*"
    fi
    system_apt install --no-install-recommends "$@" && return
    update_lists || true
    system_apt install --no-install-recommends "$@" && return
    die_log "$work/log/packages.log" "could not install $*"
}

need_packages() { # PACKAGE...
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    install_packages "${missing[@]}"
}

# --- the series ---

patch_names() { # BASE
    sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "$top/patches/$1/series"
}

# The new files: they stand in this repository at the path that they have in QEMU.
# Files of an editor or a merge are not among them.
new_files() (
    local at=(posix-aio-compat.c posix-aio-compat.h block tests/unit tests/qtest
              tests/bench tests/qemu-iotests)
    cd "$top" || exit
    if [ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$top" ]; then
        git ls-files --cached --others --exclude-standard -- "${at[@]}"
    else
        find "${at[@]}" ! -type d \
            ! -name '.*' ! -name '*~' ! -name '*.orig' ! -name '*.rej' 2>/dev/null || true
    fi | while IFS= read -r p; do
        [ ! -f "$p" ] || echo "$p"
    done | sort -u
)

# The files that the patches change.
patched_files() { # BASE
    # shellcheck disable=SC2016 # of awk
    patch_names "$1" | (cd "$top/patches/$1" && xargs -r -d '\n' awk '
        /^--- / { old = $2; next }
        /^\+\+\+ / && old { print old; print $2 }
        { old = "" }') | sed -n 's|^[ab]/||p' | sort -u
}

# One name for what would be applied, to tell one version of it from another.
series_id() { # BASE
    local p
    {
        patch_names "$1" | (cd "$top/patches/$1" && xargs -r -d '\n' sha256sum)
        new_files | while IFS= read -r p; do
            [ ! -x "$top/$p" ] || echo "executable $p"
        done
        new_files | (cd "$top" && xargs -r -d '\n' sha256sum)
    } | sha256sum | cut -c 1-16
}

# As much of a tree as scripts/apply needs, to try something on.
skeleton_tree() { # BASE FROM TO
    local p to
    to=$(realpath -m "$3")
    mkdir -p "$to"
    {
        printf '%s\n' VERSION meson.build configure block/file-posix.c
        patched_files "$1"
    } | sort -u | (cd "$2" && xargs -d '\n' cp -a --parents -t "$to")
    new_files | while IFS= read -r p; do
        p=$(dirname "$p")
        while [ ! -d "$2/$p" ]; do
            p=$(dirname "$p")
        done
        mkdir -p "$to/$p"
    done
}
