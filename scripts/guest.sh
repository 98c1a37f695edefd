# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# The parts of a small guest: kernel and busybox from the machine's archive, programs with their
# libraries from the machine; and what scripts/bench-guest keeps ready of them.
# Sourced after lib.sh, never run.

# What is fetched stays here.
guest=${work:?}/guest
# What its kernel must load
guest_modules='virtio_pci virtio_rng virtio_blk virtio_scsi sd_mod ext4'
# For the caller to set: a folder on the same file system, which it removes at its end.
scratch=
# A user's own path lacks e2fsprogs.
PATH=$PATH:/usr/sbin:/sbin

# --- packages ---

# One look-up for both, since each costs apt a second where its cache isn't kept.
look_up_packages() {
    local field value name=
    kernel_package='' kernel='' busybox=''
    while IFS=' ' read -r field value; do
        case $name:$field in
            *:Package:) name=$value ;;
            linux-image-cloud-amd64:Version:) kernel=$value ;;
            # The package that the name without a version stands for today
            linux-image-cloud-amd64:Depends:) kernel_package=${value%%[ ,]*} ;;
            busybox-static:Version:) busybox=$guest/busybox-static_${value#*:} ;;
        esac
    done < <(apt-cache show --no-all-versions linux-image-cloud-amd64 busybox-static 2>/dev/null)
    kernel=$guest/${kernel_package}_$kernel-$(cksum <<<"$guest_modules" | cut -d ' ' -f 1)
    [ -n "$kernel_package" ] && [ -n "$busybox" ]
}

download() { # PACKAGE
    say "fetching $1"
    mkdir -p "$scratch/$1"
    # As root apt would say that its own user can't write here.
    run_logged "$scratch/apt.log" env -C "$scratch/$1" \
        apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$1" 2>/dev/null
}

unpack() { # PACKAGE PATTERN...
    local d=$scratch/$1
    shift
    dpkg-deb --fsys-tarfile "$d"/*.deb | tar -x -C "$d" --no-same-owner --wildcards "$@"
}

seal() { # FOLDER|FILE: remembers what is in it
    local sums=$scratch/SHA256SUMS
    if [ -d "$1" ]; then
        (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$sums"
        mv "$sums" "$1/"
    else
        sha256sum <"$1" >"$1.sha256"
    fi
}

# Whether it is there, and still what it was; if it is not, it goes.
is_sealed() { # FOLDER|FILE
    [ -e "$1" ] || return 1
    if [ -d "$1" ]; then
        ! (cd "$1" && sha256sum --status -c SHA256SUMS 2>/dev/null) || return 0
    else
        ! sha256sum --status -c "$1.sha256" <"$1" 2>/dev/null || return 0
    fi
    say "${1##*/} in work/guest is not what it was: it is fetched anew"
    rm -rf "$1"
    return 1
}

# Nothing here may rely on set -e: it is called as a condition.
fetch_packages() {
    look_up_packages || return 1
    is_sealed "$kernel" || download "$kernel_package" || return 1
    is_sealed "$busybox" || download busybox-static || return 1
}

# The module's file and, before it, those that it depends on: it names them itself.
add_module() { # NAME
    local name=$1 file dependency
    file=$(find "$modules" -name "${name//_/[-_]}.ko*" -print -quit)
    if [ -z "$file" ]; then
        grep -q "/${name//_/[-_]}\.ko$" "$modules/modules.builtin" ||
            die "$kernel_package has no module $name"
        return
    fi
    [ ! -e "$new/modules/$name.ko" ] || return 0
    case $file in
        *.xz) "$busybox" xzcat "$file" ;;
        *) cat "$file" ;;
    esac >"$new/modules/$name.ko"
    for dependency in $(tr '\0' '\n' <"$new/modules/$name.ko" | sed -n 's/^depends=//p' | tr ',-' ' _'); do
        add_module "$dependency"
    done
    echo "$name.ko" >>"$new/modules/order"
}

fetch_guest() {
    local modules new=$scratch/new name
    mkdir -p "$guest"
    # Lists that are missing, or so old that they name files which are gone
    if ! fetch_packages; then
        update_lists || true
        if ! fetch_packages; then
            look_up_packages ||
                die "apt knows no linux-image-cloud-amd64 or no busybox-static on this machine"
            die "could not download $kernel_package and busybox-static: $(grep -m 1 '^E:' "$scratch/apt.log")"
        fi
    fi
    # Moved when complete: an interrupted run leaves no half of it.
    if [ ! -e "$busybox" ]; then
        unpack busybox-static '*/bin/busybox'
        mv "$(find "$scratch/busybox-static" -path '*/bin/busybox')" "$scratch/busybox"
        seal "$scratch/busybox"
        mv "$scratch/busybox.sha256" "$busybox.sha256"
        mv "$scratch/busybox" "$busybox"
    fi
    if [ ! -e "$kernel" ]; then
        unpack "$kernel_package" './boot/vmlinuz-*' '*/lib/modules/*'
        modules=$(find "$scratch/$kernel_package" -name modules.builtin -printf %h)
        mkdir -p "$new/modules"
        for name in $guest_modules; do
            add_module "$name"
        done
        mv "$scratch/$kernel_package/boot"/vmlinuz-* "$new/vmlinuz"
        seal "$new"
        mv -T "$new" "$kernel" || [ -e "$kernel/vmlinuz" ]
        rm -rf "${scratch:?}/$kernel_package"
    fi
}

# Sets "archive", the one that this machine uses, and "suite", which it is for.
find_archive() {
    local try
    for try in 1 2; do
        # shellcheck disable=SC2016,SC2034 # apt's own variables; ours are for the caller
        if read -r archive suite < <(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' \
            'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 2>/dev/null |
            awk '$2 !~ /-/ { print; exit }'); then
            return
        fi
        # A fresh machine has no lists, and without them the archive has no label.
        [ "$try" = 2 ] || update_lists || true
    done
    die "no Debian archive among this machine's package sources, or no lists of it and no network"
}

# --- initramfs ---

# A tree to be packed, named by "tree": busybox, the modules, the first process, and programs of the
# machine with their libraries.
start_initramfs() { # INIT PROGRAM...
    local init=$1 name file
    shift
    tree=$scratch/initramfs
    mkdir -p "$tree/bin" "$tree/sbin"
    cp "$busybox" "$tree/bin/busybox"
    cp "$init" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/busybox"
    cp -r "$kernel/modules" "$tree/"
    for name; do
        cp "$(command -v "$name")" "$tree/sbin/"
    done
    libraries_of "$@" >"$scratch/libraries"
    while IFS= read -r file; do
        mkdir -p "$tree${file%/*}"
        cp -L "$file" "$tree$file"
    done <"$scratch/libraries"
}

libraries_of() { # PROGRAM...
    local name
    for name; do
        ldd "$(command -v "$name")"
    done | grep -o '/[^ ]*' | sort -u
}

# The tree goes, and its archive is the standard output.
pack_initramfs() {
    (cd "$tree" && find . | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null)
    rm -rf "$tree"
}

# --- for scripts/bench-guest ---

# What is made is moved to its place when complete; beside it lies a key, of what it was made of.
is_current() { # FOLDER KEY
    [ "$(cat "$1/key" 2>/dev/null)" = "$2" ]
}

publish() { # NEW FOLDER KEY
    echo "$3" >"$1/key"
    rm -rf "$2"
    mv -T "$1" "$2"
}

# bench/ with vmlinuz and initramfs, bench-source/ with image.qcow2
prepare_bench() { # [QEMU-IMG]
    mkdir -p "$guest"
    take_lock "$guest/bench.lock"
    scratch=$guest/bench.scratch
    rm -rf "$scratch"
    trap 'stop_logged; rm -rf "$scratch"' EXIT
    mkdir "$scratch"
    need_packages fio e2fsprogs
    fetch_guest
    make_bench_boot
    make_bench_source "$1"
}

make_bench_boot() {
    local key
    key=$({
        echo "$kernel"
        cat "${top:?}/scripts/bench-guest-init" "${BASH_SOURCE[0]}"
        {
            echo "$busybox"
            command -v fio
            libraries_of fio
        } | xargs -d '\n' stat -L -c '%n %s %Y'
    } | sha256sum | cut -c 1-16)
    ! is_current "$guest/bench" "$key" || return 0
    say "making the initramfs"
    start_initramfs "$top/scripts/bench-guest-init" fio
    mkdir "$scratch/bench"
    # Not compressed: the guest would unpack it under emulation, at each start.
    pack_initramfs >"$scratch/bench/initramfs"
    cp "$kernel/vmlinuz" "$scratch/bench/"
    publish "$scratch/bench" "$guest/bench" "$key"
}

# An ext4 file system of 512 MiB with up to 300 MiB of the machine's own files, of many sizes. It stays
# as it is when the machine's packages change: only then are figures of two days of the same work.
make_bench_source() { # [QEMU-IMG]
    local qemu_img=$1 files=$scratch/files raw=$scratch/source.raw new=$scratch/source key
    key=$(declare -f make_bench_source | sha256sum | cut -c 1-16)
    ! is_current "$guest/bench-source" "$key" || return 0
    if [ -z "$qemu_img" ]; then
        qemu_img=$(find "$work"/*/build "$work"/*/build-stock -maxdepth 1 -name qemu-img -print -quit \
            2>/dev/null) || true
    fi
    if [ -z "$qemu_img" ]; then
        need_packages qemu-utils
        qemu_img=qemu-img
    fi
    [ "$(df --output=avail -B 1M "$scratch" | tail -n 1)" -ge 1200 ] ||
        die "the file system of $work has less than 1.2 GB left"
    say "making the image for convert"
    find /usr/lib /usr/share -xdev -type f -readable -size -64M ! -name $'*\n*' -printf '%p\t%s\n' | sort |
        awk -F '\t' '{
            size = int(($2 + 4095) / 4096) * 4096
            if (count < 16000 && sum + size <= 300 * 1048576) {
                count++
                sum += size
                print $1
            }
        }' >"$files"
    mkdir "$scratch/files.d" "$new"
    xargs -d '\n' cp --parents --preserve=timestamps -t "$scratch/files.d" <"$files"
    # mke2fs would say that it makes this file. What else would differ from one time to the next:
    # identifiers, the hash of folders.
    : >"$raw"
    mke2fs -q -F -t ext4 -N 24576 -U 6a1d5c3e-0b52-4c8f-9d57-2f0e8b1c7a43 \
        -E hash_seed=6a1d5c3e-0b52-4c8f-9d57-2f0e8b1c7a43,lazy_itable_init=0,root_owner=0:0 \
        -d "$scratch/files.d" "$raw" 512M
    rm -rf "$scratch/files.d"
    "$qemu_img" convert -f raw -O qcow2 "$raw" "$new/image.qcow2"
    rm "$raw"
    publish "$new" "$guest/bench-source" "$key"
}
