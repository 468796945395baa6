# Building images with buildah. Sourced by `base-image`, `build-image` and `load-image`, after lib.sh.
# shellcheck shell=bash

BUILDAH_STORAGE=$CACHE_DIR/buildah

# run_buildah ARGUMENTS...: with its storage in the cache, so that a changed source file does not install the
# dependencies anew; in namespaces of its own, so that ending it ends the commands that it runs and leaves no mount.
run_buildah() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  unshare --mount --pid --fork --kill-child --mount-proc \
    bash -c 'mount -t tmpfs tmpfs "$1/run" && exec buildah --root "$1" --runroot "$1/run" --storage-driver overlay "${@:2}"' \
    - "$BUILDAH_STORAGE" "$@"
}

# build CONTEXT DOCKERFILE NAME ARGUMENTS...
build() {
  run_buildah bud --isolation chroot --pull-never --layers --file "$2" --tag "$3" "${@:4}" "$1"
}

# is_built NAME
is_built() { grep -qsF "\"$1\"" "$BUILDAH_STORAGE/overlay-images/images.json"; }

# once KEY COMMAND...: run COMMAND with an empty folder as its last argument, alone for KEY.
once() {
  local work=$CACHE_DIR/building-$1
  stackable "$BUILDAH_STORAGE/run"
  mkdir -p "$CACHE_DIR/locks"
  exec {builds}>"$CACHE_DIR/locks/builds" {building}>"$CACHE_DIR/locks/$1"
  flock --shared "$builds" # `tidy` looks for others here
  flock "$building"
  rm -rf "$work"
  mkdir "$work"
  "${@:2}" "$work"
  rm -rf "$work"
  exec {builds}>&- {building}>&-
}

# tidy NAME: unless another build runs, delete what killed builds left and all but the three newest images of each
# kind and NAME. Within `once`.
tidy() {
  local old
  flock --exclusive --nonblock "$builds" || return 0
  run_buildah rm --all
  run_buildah images --format '{{.Name}}:{{.Tag}}' | # the newest first
    awk -F: -v keep="$1" '/turboquant-/ && ++seen[$1] > 3 && $0 != keep' |
    while read -r old; do run_buildah rmi "$old" </dev/null; done
}
