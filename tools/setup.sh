# shellcheck shell=bash
# What tools/test and tools/demo stand on. To be sourced by bash, from anywhere:
#
#     . "$(dirname "$0")/setup.sh"
#
# Installs the packages that are missing (root), has the lab's kernel built in the background when it is
# not cached, makes .venv, builds the extension modules in place. Fast and silent when all is there;
# else one line a step on stderr. Exits with 1, and says why, when something cannot be had.
#
# With SETUP_KERNEL=no no kernel is built; with SETUP_MACHINE=yes the lab's Debian machine is made, too.
#
# Leaves behind
#   the checkout's root as the current directory, and in ROOT
#   PYTHON          the venv's Python; .venv/bin is first in PATH, with `ublk-ubi` in it
#   jobs            what is built in the background; tools/lab waits for it by itself. An EXIT trap ends
#                   what still runs: set another only with `kill $(jobs -pr)` in it.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
export PATH=$VENV/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin

# What is needed: a program or a file, and the Debian package that has it.
NEEDED="
    gcc=gcc /usr/include/stdio.h=libc6-dev /usr/include/linux/types.h=linux-libc-dev
    /usr/include/liburing.h=liburing-dev git=git flock=util-linux losetup=mount sfdisk=fdisk
    qemu-img=qemu-utils fio=fio mkfs.ext4=e2fsprogs mkfs.xfs=xfsprogs dmsetup=dmsetup
    systemd-analyze=systemd udevadm=udev cryptsetup=cryptsetup-bin
    make=make flex=flex bison=bison bc=bc xz=xz-utils perl=perl
    debootstrap=debootstrap depmod=kmod
    qemu-system-x86_64=qemu-system-x86 qemu-storage-daemon=qemu-system-common"

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# Runs a command into a log; on failure shows the log's end.
logged() {
    local log=$1
    shift
    mkdir -p build
    if ! "$@" >"build/$log" 2>&1 </dev/null; then
        tail -n 30 "build/$log" >&2
        die "failed: $* (whole log: build/$log)"
    fi
}

# As `logged`, of what needs the network: a mirror may be amid a change, or out of reach for a moment.
fetched() {
    local log=$1 try
    for try in 1 2; do
        mkdir -p build
        ! "${@:2}" >"build/$log" 2>&1 </dev/null || return 0
        say "failed, try $try of 3: ${*:2}"
        sleep 5
    done
    logged "$@"
}

# The first Python that is new enough.
find_python() {
    local name
    for name in python3 python3.1{5,4,3,2,1}; do
        name=$(PATH=${PATH#"$VENV/bin:"} type -P "$name") || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo "$name" && return
    done
    return 1
}

missing_packages() {
    local pair python
    for pair in $NEEDED; do
        [[ -e ${pair%=*} ]] || type -P "${pair%=*}" >/dev/null || echo "${pair#*=}"
    done
    if python=$(find_python); then
        "$python" - <<-'CHECK'
		import importlib.util, os, sys, sysconfig
		name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
		if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
		    print(f"{name}-venv")
		if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
		    print(f"{name}-dev")
		CHECK
    else
        echo python3 python3-venv python3-dev
    fi
}

apt_install() {
    local options=(-o DPkg::Lock::Timeout=300)
    apt-get "${options[@]}" update && apt-get "${options[@]}" install -y --no-install-recommends "$@"
}

install_packages() {
    local packages
    packages=$(missing_packages | xargs)
    [[ -n $packages ]] || return 0
    if [[ $(id -u) != 0 ]] || ! type -P apt-get >/dev/null; then
        die "missing: apt-get install $packages"
    fi
    say "installing $packages"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    fetched apt.log apt_install $packages
}

in_background() {
    mkdir -p build
    "$2" tools/lab --print "$1" >"build/$1.log" 2>&1 </dev/null &
    # What still runs alone: the number of what has ended may be another's by then.
    trap 'kill $(jobs -pr) 2>/dev/null || true' EXIT
}

start_kernel_build() {
    local python=$1 cached='from labkit import kernel
raise SystemExit(kernel.find(kernel.cache_folder()) is None)'
    [[ ${SETUP_KERNEL-yes} == yes ]] || return 0
    ! PYTHONPATH=tools "$python" -B -c "$cached" || return 0
    say "building the lab's kernel in the background (some minutes; log: build/kernel.log)"
    mkdir -p build
    in_background kernel "$python"
}

# The Debian machine: for tests of packaged kernels, systemd and VMs, which are skipped without it.
start_machine_build() {
    local python=$1 cached='from labkit import kernel, machine
raise SystemExit(machine.find(kernel.cache_folder(), "newest") is None)'
    [[ ${SETUP_MACHINE-no} == yes ]] || return 0
    ! PYTHONPATH=tools "$python" -B -c "$cached" || return 0
    if [[ $(id -u) != 0 ]]; then
        say "no Debian machine for the tests that need one: run this as root once"
        return 0
    fi
    say "making the lab's Debian machine in the background (some minutes; log: build/machine.log)"
    in_background machine "$python"
}

# The venv: what pyproject.toml names, the checkout as it is, the command.
make_venv() {
    local python=$1 place stamp anew=()
    place="$("$python" -V) $ROOT"
    stamp="$place $(cksum <pyproject.toml)"
    [[ ! -x $PYTHON || $(cat "$VENV/stamp" 2>/dev/null) != "$stamp" ]] || return 0
    say "making .venv"
    [[ $(cat "$VENV/stamp" 2>/dev/null) == "$place "* ]] || anew=(--clear)
    logged venv.log "$python" -m venv "${anew[@]}" "$VENV"
    "$PYTHON" >build/requirements.txt <<-'LIST'
	import tomllib
	with open("pyproject.toml", "rb") as file:
	    settings = tomllib.load(file)
	project = settings["project"]
	needed = settings["build-system"]["requires"] + project["dependencies"]
	print(*needed, *project["optional-dependencies"]["dev"], sep="\n")
	LIST
    fetched venv.log "$PYTHON" -m pip install -qq --upgrade -r build/requirements.txt
    echo "$ROOT" >"$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ublk-ubi.pth"
    printf '#!%s\nfrom ublk_ubi.cli import main\nmain()\n' "$PYTHON" >"$VENV/bin/ublk-ubi"
    chmod +x "$VENV/bin/ublk-ubi"
    echo "$stamp" >"$VENV/stamp"
}

# Guests of the lab see this folder read-only, and would compile all of it at every start.
compile_package() {
    "$PYTHON" -m compileall -q ublk_ubi || die "ublk_ubi/ does not compile"
}

sources_and_modules() {
    cat cython/ublk_ubi/*.p[yx][xd] | cksum
    find cython/ublk_ubi ublk_ubi -maxdepth 1 -name '*.pyx' -o -name '*.so' | sort
}

# The extension modules: anew when a source has changed, all of them when the recipe has.
build_modules() {
    local recipe sources force=() module
    recipe=$("$PYTHON" -V; echo "${UBLK_UBI_SANITIZE-} ${UBLK_UBI_COVERAGE-}"
             sed '/^\[build-system\]/,/^$/!d' pyproject.toml | cat - setup.py cython/ublk_ubi/*.h | cksum)
    sources=$(sources_and_modules)
    if [[ $(cat build/stamp.recipe 2>/dev/null) != "$recipe" ]]; then
        force=(--force)
        rm -rf build/lib* build/temp* build/testing
    fi
    [[ ${#force[@]} != 0 || $(cat build/stamp.sources 2>/dev/null) != "$sources" ]] || return 0
    say "building the extension modules"
    for module in ublk_ubi/_*.so; do
        module=$(basename "${module%%.*}")
        [[ -e cython/ublk_ubi/$module.pyx ]] || rm -f "ublk_ubi/$module".*.so
    done
    UBLK_UBI_ANNOTATE=1 UBLK_UBI_TEST=1 \
        logged build.log "$PYTHON" setup.py build_ext --inplace -j "$(nproc)" "${force[@]}"
    echo "$recipe" >build/stamp.recipe
    sources_and_modules >build/stamp.sources
}

setup() {
    local python
    install_packages
    python=$(find_python) || die "no Python of 3.11 or later here: install one"
    start_kernel_build "$python"
    start_machine_build "$python"
    mkdir -p build
    (
        flock 9  # another call in this checkout may be at it
        make_venv "$python" 9>&-
        build_modules 9>&-
        compile_package 9>&-
    ) 9>build/lock
}

setup
