#!/usr/bin/env bash
# Sets mixlocal up in this checkout: virtual environment, PyTorch, mixlocal, a command on the PATH.
# `./install.sh --help` tells the rest. stderr says what happens; a failure is one line and an exit code.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

TORCH=2.13.0
MARK='# mixlocal: written by install.sh, removed by install.sh --uninstall'
QUESTION='Why is the sky blue?'
SEED=3

# The exit codes of mixlocal/errors.py, as far as an installer meets them.
UNEXPECTED=1 USAGE=2 NOT_FOUND=3 REFUSED=4 NETWORK=5 DISK=6 LOCKED=13 NO_PERMISSION=14

usage() {
    cat <<HELP
Usage: ./install.sh [--cpu] [--no-modify-path] [--demo] [--test [-- PYTEST ARGUMENTS]] [--dry-run]
       ./install.sh --uninstall [--no-modify-path] [--dry-run]

Sets mixlocal up in .venv of this checkout and puts a mixlocal command in ~/.local/bin.
Run it again at any time: it does only what is missing, and nothing where nothing is.

  --cpu              the PyTorch build without CUDA, where pip's indexes have one
  --no-modify-path   leave ~/.local/bin alone
  --demo             then get the model smolmix and ask it: $QUESTION
  --test             then run all tests: ruff, mypy, pytest
  --uninstall        remove what this script made; models stay
  --dry-run          say what would be done, and do nothing
  -h, --help         this text

Environment: MIXLOCAL_VENV         another place for .venv
             MIXLOCAL_PYTHON       the Python to use, 3.11 or newer
             MIXLOCAL_TORCH_INDEX  the package index to take PyTorch from
Exit codes:  1 unexpected, 2 usage, 3 not found, 4 refused (old Python, a folder that is not ours), 5 network,
             6 disk full, 13 another install.sh is at work, 14 no permission to write
The log of what pip did last is install.log in the virtual environment.
HELP
}

note() { printf 'install.sh: %s\n' "$*" >&2; }

fail() { # CODE TEXT...
    explained=yes
    note "${@:2}"
    exit "$1"
}

step() { # announce one step; false in a dry run, so that its caller leaves it out
    if [ "$dry_run" = yes ]; then
        printf '==> (dry run) %s\n' "$*"
        return 1
    fi
    printf '==> %s\n' "$*" >&2
}

# ---- the command line and the folders

parse_arguments() {
    cpu=no path=yes demo=no tests=no uninstall=no dry_run=no pytest_arguments=()
    while [ $# -gt 0 ]; do
        case $1 in
            --cpu) cpu=yes ;;
            --no-modify-path) path=no ;;
            --demo) demo=yes ;;
            --test) tests=yes ;;
            --uninstall) uninstall=yes ;;
            --dry-run) dry_run=yes ;;
            -h | --help) usage && exit 0 ;;
            --) shift && pytest_arguments=("$@") && break ;;
            *) fail $USAGE "unknown argument '$1'; see ./install.sh --help" ;;
        esac
        shift
    done
    [ $# -eq 0 ] || [ "$tests" = yes ] || fail $USAGE "arguments after -- go to pytest and need --test"
    [ "$uninstall" = no ] || [ "$cpu$demo$tests" = nonono ] ||
        fail $USAGE "--uninstall goes with --no-modify-path and --dry-run only"
}

locate() { # sets root, venv, stamp, log, command, name and $MIXLOCAL_PYTHON's full path; the work is done in root
    local source=${BASH_SOURCE[0]} target
    while [ -L "$source" ]; do
        target=$(readlink "$source")
        case $target in
            /*) source=$target ;;
            *) source=$(dirname "$source")/$target ;;
        esac
    done
    root=$(cd -P "$(dirname "$source")" && pwd)
    if ! [ -f "$root/pyproject.toml" ] || ! [ -d "$root/mixlocal" ]; then
        fail $NOT_FOUND "$root is no checkout of mixlocal"
    fi
    venv=$(absolute "${MIXLOCAL_VENV:-$root/.venv}")
    case ${MIXLOCAL_PYTHON:-} in */*) MIXLOCAL_PYTHON=$(absolute "$MIXLOCAL_PYTHON") ;; esac
    stamp=$venv/mixlocal-install log=$venv/install.log command="" name=$venv/bin/mixlocal
    if [ "$path" = yes ] && [ -d "${HOME:-}" ]; then command=$HOME/.local/bin/mixlocal; fi
    cd "$root"
}

absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) printf '%s\n' "$PWD/$1" ;;
    esac
}

# ---- the stamp: made=yes (by us, so ours to remove), test=yes and cpu=yes (as was asked), key=FINGERPRINT (none:
# unfinished), lacks=WHAT (why there are no compiled kernels)

stamped() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

write_stamp() {
    printf '%s\n' "$@" >"$stamp.new"
    mv -f "$stamp.new" "$stamp"
}

fingerprint() { # of all that decides what pip installs; Python files count by their names, as they are not copied
    {
        printf '%s\n' "$root" "$venv"
        cat pyproject.toml install.sh
        find mixlocal -name '*.py' | LC_ALL=C sort
        find mixlocal/kernels/native -type f ! -name '*.py*' -exec cksum {} + | LC_ALL=C sort
    } | cksum
}

toolchain() { # what the compiled kernels would be built with, or what is lacking
    local compiler include
    include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null) || include=""
    for compiler in "${CXX:-c++}" g++ clang++; do
        compiler=$(command -v "$compiler") || continue
        [ -f "$include/Python.h" ] || compiler=""
        if [ -n "$compiler" ]; then echo "the build with $compiler failed, see $log"; else echo "no Python.h"; fi
        return
    done
    echo "no C++ compiler"
}

is_current() {
    [ -x "$venv/bin/mixlocal" ] && [ "$(stamped key)" = "$(fingerprint)" ] || return 1
    [ -z "$(stamped lacks)" ] || [ "$(stamped lacks)" = "$(toolchain)" ] || return 1
    [ "$tests" = no ] || [ "$(stamped test)" = yes ] || return 1
    [ "$cpu" = no ] || [ "$(stamped cpu)" = yes ]
}

# ---- what must hold before anything is done

existing() { # the folder itself, or the nearest one above it that exists
    local folder=$1
    while [ ! -e "$folder" ]; do folder=$(dirname "$folder"); done
    printf '%s\n' "$folder"
}

check_writable() { # FOLDER HINT
    local folder
    folder=$(existing "$1")
    if ! [ -d "$folder" ] || ! [ -w "$folder" ] || ! [ -x "$folder" ]; then
        fail $NO_PERMISSION "cannot write to $folder; $2"
    fi
}

check_disk() {
    local need=3000 free
    if has_torch '*'; then need=500; fi
    free=$(df -Pm "$(existing "$venv")" 2>/dev/null | tail -n 1 | { read -r _ _ _ free _ && echo "$free"; }) || return 0
    case $free in '' | *[!0-9]*) return 0 ;; esac
    [ "$free" -ge $need ] ||
        fail $DISK "$venv needs $need MB and its disk has $free MB free; make room, or set MIXLOCAL_VENV elsewhere"
}

has_torch() { # '*' for any build, '+cpu'
    (cd "$venv/lib" && compgen -G "python3*/site-packages/torch-$TORCH$1.dist-info") >/dev/null 2>&1
}

find_python() { # sets python
    local found="" version candidates=(python3.13 python3.12 python3.11 python3)
    if [ -n "${MIXLOCAL_PYTHON:-}" ]; then candidates=("$MIXLOCAL_PYTHON"); fi
    for python in "${candidates[@]}"; do
        if is_supported "$python"; then return; fi
        version=$(version_of "$python") && found="$python is Python $version"
    done
    [ -z "$found" ] || fail $REFUSED "mixlocal needs Python 3.11 or newer, and $found; MIXLOCAL_PYTHON can name another"
    fail $NOT_FOUND "no Python found (${candidates[*]}); install Python 3.11 or newer, or set MIXLOCAL_PYTHON"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null; }

is_supported() {
    case $(version_of "$1") in
        3.1[1-9] | 3.[2-9][0-9]) true ;;
        *) false ;;
    esac
}

# ---- setting up

set_up() {
    if ! is_current; then
        check_writable "$root" "that is where the kernels are built"
        check_writable "$venv" "set MIXLOCAL_VENV to a folder that can be written"
        [ -z "$command" ] || check_writable "$(dirname "$command")" "use --no-modify-path to leave it alone"
        check_disk
        lock
        prepare_venv
        install_all
        unlock
    fi
    install_command
    [ "$demo$tests$dry_run" != nonono ] || step "ready in $venv; try: $name prompt \"$QUESTION\""
}

lock() { # one install.sh at a time in a checkout; where there is no flock, nobody checks
    exec 9<"$root/install.sh"
    if command -v flock >/dev/null; then
        flock -n 9 || fail $LOCKED "another install.sh is at work in $root; wait for it to end"
    fi
}

unlock() { exec 9<&-; }

prepare_venv() {
    if [ "$(stamped made)" = yes ]; then
        if is_supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
        create_venv
    elif [ -f "$venv/pyvenv.cfg" ]; then
        adopt_venv
    elif [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        fail $REFUSED "$venv is not empty and no virtual environment; move it away, or set MIXLOCAL_VENV"
    else
        create_venv
    fi
}

create_venv() {
    find_python
    step "creating $venv with Python $(version_of "$python")" || return 0
    rm -rf "$venv"
    mkdir -p "$venv"
    write_stamp made=yes
    "$python" -m venv "$venv" >"$log" 2>&1 </dev/null && return
    explain_log "the virtual environment" || true
    fail $NOT_FOUND "$python cannot make a virtual environment (Debian: apt install python3-venv); see $log"
}

adopt_venv() {
    is_supported "$venv/bin/python" || fail $REFUSED "$venv is no environment of Python 3.11 or newer; move it away"
    step "using $venv, which was there before; --uninstall will leave it" || return 0
    [ -f "$stamp" ] || write_stamp made=no
}

install_all() {
    local made key lacks="" extra=$tests # what is there once stays
    made=$(stamped made)
    if [ "$(stamped test)" = yes ]; then extra=yes; fi
    if [ "$(stamped cpu)" = yes ]; then cpu=yes; fi
    key=$(fingerprint)
    [ "$dry_run" = yes ] || write_stamp "made=$made" "test=$extra" "cpu=$cpu"
    install_torch
    install_mixlocal "$extra"
    [ "$dry_run" = yes ] || write_stamp "made=$made" "test=$extra" "cpu=$cpu" "key=$key" "lacks=$lacks"
}

install_torch() {
    local from=()
    if [ -n "${MIXLOCAL_TORCH_INDEX:-}" ]; then from=(--no-deps --index-url "$MIXLOCAL_TORCH_INDEX"); fi
    if [ "$cpu" = yes ] && ! has_torch '+cpu' && step "installing PyTorch $TORCH for the CPU (about 200 MB)"; then
        if pip_install ${from[@]+"${from[@]}"} "torch==$TORCH+cpu"; then return; fi
        explain_log PyTorch || [ $? = $NOT_FOUND ] || fail_with_log PyTorch
        note "pip finds no PyTorch $TORCH+cpu here, so its default is taken; MIXLOCAL_TORCH_INDEX can name an index"
    fi
    if has_torch '*'; then return; fi
    step "installing PyTorch $TORCH (about 200 MB; several times that where the default is for CUDA)" || return 0
    pip_install ${from[@]+"${from[@]}"} "torch==$TORCH" || fail_with_log "PyTorch $TORCH"
}

install_mixlocal() { # WITH THE TEST EXTRA: yes|no; sets lacks
    local what=. missing
    if [ "$1" = yes ]; then what='.[test]'; fi
    step "installing mixlocal and compiling its kernels" || return 0
    pip_install -e "$what" "torch==$TORCH" || fail_with_log mixlocal
    missing=$("$venv/bin/python" -P -c 'from mixlocal.kernels.cpu import MISSING; print(MISSING)' 2>>"$log") ||
        fail $UNEXPECTED "mixlocal is installed and does not start; see $log"
    [ -z "$missing" ] || lacks=$(toolchain)
    [ -z "$lacks" ] || note "no compiled kernels ($lacks): PyTorch computes instead, 5 to 50 times slower;" \
        "install a C++ compiler and Python's headers, and run install.sh again"
}

pip_install() { "$venv/bin/python" -m pip -v install "$@" >"$log" 2>&1 </dev/null; }

# ---- why pip failed, from what it wrote

fail_with_log() { # WHAT
    explain_log "$1" || [ $? = $UNEXPECTED ] || fail $NOT_FOUND "pip finds no $1 for this Python and machine; see $log"
    fail $UNEXPECTED "installing $1 failed: $(reason); see $log"
}

explain_log() { # WHAT: stops at a full disk, a forbidden folder or a lost network; else false: NOT_FOUND or UNEXPECTED
    if grep -Eq 'Errno 28|No space left on device|Disk quota exceeded' "$log"; then
        fail $DISK "the disk filled up while installing $1; make room (TMPDIR counts too) and run it again; see $log"
    elif grep -Eq 'Errno 13|Errno 30' "$log"; then
        fail $NO_PERMISSION "no permission while installing $1: $(reason); see $log"
    elif grep -Eq "$network_trouble" "$log"; then
        fail $NETWORK "the network gave up while installing $1; run it again to go on; see $log"
    elif grep -q 'No matching distribution found for torch' "$log"; then
        return $NOT_FOUND
    fi
    return $UNEXPECTED
}

network_trouble='Max retries exceeded|connection broken by|Connection.*Error|Time.?out.*Error|Read timed out'
network_trouble+='|name resolution|HTTP error [45]|Server Error|SSLError|problem confirming the ssl|IncompleteRead'

reason() { # pip's last complaint, in one line
    local line
    line=$(grep -i 'error' "$log" | tail -n 1) || line=$(tail -n 1 "$log")
    printf '%s\n' "${line:0:160}"
}

# ---- the command on the PATH

command_text() {
    printf '#!/bin/sh\n%s\nexec %s "$@"\n' "$MARK" "'${venv//\'/\'\\\'\'}/bin/mixlocal'"
}

install_command() {
    if [ -z "$command" ]; then
        [ "$path" = no ] || note "HOME is no folder, so no mixlocal command goes on the PATH: run $venv/bin/mixlocal"
    elif [ -e "$command" ] && ! grep -qsxF "$MARK" "$command"; then
        note "$command is not ours and stays as it is: run $venv/bin/mixlocal"
    else
        write_command
        name=mixlocal
        case ":$PATH:" in
            *":${command%/*}:"*) ;;
            *) note "add this line to your shell's profile: export PATH=\"\$HOME/.local/bin:\$PATH\"" ;;
        esac
    fi
}

write_command() {
    if [ -x "$command" ] && [ "$(cat "$command")" = "$(command_text)" ]; then return; fi
    step "writing $command" || return 0
    mkdir -p "${command%/*}"
    command_text >"$command.new"
    chmod 755 "$command.new"
    mv -f "$command.new" "$command"
}

# ---- the other jobs

run_demo() {
    step "mixlocal pull smolmix" && mixlocal pull smolmix
    step "mixlocal prompt --seed $SEED \"$QUESTION\"" && mixlocal prompt --seed $SEED "$QUESTION"
    return 0
}

mixlocal() { # which explains its own failures
    "$venv/bin/mixlocal" "$@" </dev/null && return
    local code=$?
    explained=yes
    exit $code
}

run_tests() {
    local failed=""
    check ruff check
    check mypy
    check pytest -q ${pytest_arguments[@]+"${pytest_arguments[@]}"}
    [ -z "$failed" ] || fail $UNEXPECTED "failed:$failed"
}

check() {
    step "$*" || return 0
    "$venv/bin/python" -m "$@" || failed+=" $1"
}

remove_all() {
    if [ -n "$command" ] && [ -f "$command" ] && [ "$(cat "$command")" = "$(command_text)" ]; then
        step "removing $command" && rm -f "$command"
    fi
    case $(stamped made) in
        yes)
            step "removing $root/build" && rm -rf "$root/build"
            step "removing $venv" && rm -rf "$venv"
            ;;
        no) note "$venv was there before install.sh and stays" ;;
        *) note "$venv was not made by install.sh and stays as it is" ;;
    esac
    tell_models
}

tell_models() {
    local models
    models=$(data_folder)/models
    if [ -d "$models" ]; then
        note "models stay, $(du -sh "$models" | cut -f 1); to remove them: rm -r $(printf %q "$models")"
    else
        note "no models in $models"
    fi
}

data_folder() { # as mixlocal/store/paths.py
    if [ -n "${MIXLOCAL_HOME:-}" ]; then
        printf '%s\n' "$MIXLOCAL_HOME"
    elif [ "$(uname)" = Darwin ]; then
        printf '%s\n' "${HOME:-}/Library/Application Support/mixlocal"
    else
        printf '%s\n' "${XDG_DATA_HOME:-${HOME:-}/.local/share}/mixlocal"
    fi
}

main() {
    explained=no
    trap 'code=$?; [ $code = 0 ] || [ $explained = yes ] || note "stopped at an unexpected error (code $code)"' EXIT
    trap 'fail 130 "interrupted; run it again to go on"' INT
    trap 'fail 143 "terminated; run it again to go on"' TERM
    parse_arguments "$@"
    locate
    if [ "$uninstall" = yes ]; then
        remove_all
        return
    fi
    set_up
    if [ "$demo" = yes ]; then run_demo; fi
    if [ "$tests" = yes ]; then run_tests; fi
}

main "$@"
exit 0
