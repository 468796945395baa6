# What every script of this folder shares: paths, pins, progress lines and the cache. Sourced, never run.
# shellcheck shell=bash disable=SC2034  # the scripts that source this file use these variables
set -euo pipefail
umask 022

KUBERNETES_VERSION=v1.34.4 # of components/go.mod, which also pins etcd 3.6.4 and CoreDNS 1.12.4

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLUSTER_DIR=${CLUSTER_DIR:-$(cd "$HERE/../.." && pwd)/.cluster}                # the running cluster's own
CACHE_DIR=${TURBOQUANT_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/turboquant-operator} # kept between runs

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# say TEXT: one line of progress, with the seconds since this script began.
say() {
  local elapsed=$((${EPOCHREALTIME/[.,]/} - STARTED_AT))
  printf '%5d.%ds  %s\n' $((elapsed / 1000000)) $((elapsed / 100000 % 10)) "$*" >&2
}
STARTED_AT=${EPOCHREALTIME/[.,]/}

# step TEXT LOG COMMAND...: run COMMAND with its output in LOG; if it fails, show the end of LOG and stop.
step() {
  local text=$1 log=$2
  shift 2
  mkdir -p "$(dirname "$log")"
  if ! "$@" >>"$log" 2>&1; then
    say "FAILED: $text"
    tail -n 25 "$log" | sed 's/^/    /' >&2
    die "$text failed; the whole log is $log"
  fi
  say "$text"
}

# poll SECONDS COMMAND...: repeat COMMAND until it succeeds; false when SECONDS have passed.
poll() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}

# key_of TEXT...: a short key made from the texts and from standard input.
key_of() { { printf '%s\n' "$@" && cat; } | sha256sum | cut -c1-16; }

# cached NAME COMMAND...: print the path CACHE_DIR/NAME; when it is not there yet, COMMAND fills a folder (its
# last argument) that then takes the name. So a half-made product never has the name, and two callers at once
# make it once.
cached() {
  local product=$CACHE_DIR/$1 building=$CACHE_DIR/.building-$1
  shift
  if ! [ -e "$product" ]; then
    mkdir -p "$CACHE_DIR"
    exec {lock}>"$building.lock"
    flock "$lock"
    if ! [ -e "$product" ]; then
      rm -rf "$building"
      mkdir "$building"
      "$@" "$building" {lock}>&- || die "could not make $product"
      mv -T "$building" "$product"
    fi
    rm -f "$building.lock"
    exec {lock}>&-
  fi
  echo "$product"
}
