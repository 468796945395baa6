# What every script of this folder shares: paths, progress lines, the cache, and finding our own processes.
# Sourced, never run.
# shellcheck shell=bash disable=SC2034  # the scripts that source this file use these variables
set -euo pipefail
shopt -s inherit_errexit
umask 022

KUBERNETES_VERSION=v1.34.4 # as in components/go.mod, which also pins etcd 3.6.4 and CoreDNS 1.12.4

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLUSTER_DIR=$(realpath -m "${CLUSTER_DIR:-$HERE/../../.cluster}")               # the running cluster's own
CACHE_DIR=$(realpath -m "${XDG_CACHE_HOME:-$HOME/.cache}/turboquant-operator") # kept between runs

STARTED_AT=${STARTED_AT:-${EPOCHREALTIME/[.,]/}} # inherited by scripts that a script calls

# say TEXT: one line of progress, with the seconds since the first script began.
say() {
  local elapsed=$((${EPOCHREALTIME/[.,]/} - STARTED_AT))
  printf '%5d.%ds  %s\n' $((elapsed / 1000000)) $((elapsed / 100000 % 10)) "$*" >&2
}

die() {
  say "$(basename "$0"): $*"
  exit 1
}

# step TEXT LOG COMMAND...: run COMMAND with its output in LOG; if it fails, show the end of LOG and exit.
# A trap and not `if`, because inside a condition bash would not stop at a function's first failing command; a
# subshell, because the trap would write where a function that exits writes.
step() {
  STEP=$1 STEP_LOG=$2
  mkdir -p "$(dirname "$STEP_LOG")"
  trap step_failed EXIT
  ("${@:3}") >>"$STEP_LOG" 2>&1
  trap - EXIT
  say "$STEP"
}

step_failed() {
  say "FAILED: $STEP. The end of $STEP_LOG:"
  tail -n 25 "$STEP_LOG" | sed 's/^/    /' >&2
}

# poll SECONDS COMMAND...: repeat COMMAND until it succeeds; false when SECONDS have passed.
poll() {
  local deadline=$((SECONDS + $1))
  until "${@:2}" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

# key_of TEXT...: a short key made from the texts and from standard input.
key_of() { { printf '%s\n' "$@" && cat; } | sha256sum | cut -c1-16; }

# cached NAME COMMAND...: print the path CACHE_DIR/NAME. Where it is missing, COMMAND first fills a folder (its
# last argument) that then takes this name: a half-made product never has the name, and of two callers at once
# the second waits for the first.
cached() {
  local product=$CACHE_DIR/$1 building=$CACHE_DIR/building-$1
  mkdir -p "$CACHE_DIR/locks"
  (
    flock 9
    if ! [ -e "$product" ]; then
      rm -rf "$building"
      mkdir "$building"
      "${@:2}" "$building" >&2 9>&-
      mv -T "$building" "$product"
    fi
  ) 9>"$CACHE_DIR/locks/$1"
  echo "$product"
}

# stackable FOLDER: make FOLDER, and stop where overlayfs cannot stack its file system's folders.
stackable() {
  mkdir -p "$1"
  [ "$(stat --file-system --format %T "$1")" != overlayfs ] ||
    die "$1 is on an overlay file system, which cannot hold image layers: set XDG_CACHE_HOME to a folder on a disk"
}

# Every process that these scripts leave running, and every one that builds, carries a mark in its environment:
# TURBOQUANT_CLUSTER=FOLDER or TURBOQUANT_BUILD=FOLDER. It finds them all whatever was killed before, and nothing
# that is not ours has it.

# start FOLDER NAME COMMAND...: run COMMAND in the background, marked, with its output in FOLDER/logs/NAME.log.
start() {
  mkdir -p "$1/logs"
  TURBOQUANT_CLUSTER=$1 setsid "${@:3}" >>"$1/logs/$2.log" 2>&1 </dev/null 9>&- &
}

# marked MARK: the ids of the processes that carry it. (grep also fails on a process that just ended.)
marked() { { grep -lzsxF "$1" /proc/[0-9]*/environ || true; } | cut -d/ -f3; }

# kill_marked MARK: end them. At once: what they hold is thrown away.
kill_marked() {
  local pids
  while pids=$(marked "$1") && [ -n "$pids" ]; do
    # shellcheck disable=SC2086  # a list of numbers
    kill -9 $pids 2>/dev/null || true
    sleep 0.05
  done
}
