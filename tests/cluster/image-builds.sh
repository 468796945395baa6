# Building images with buildah, and the folder that finished ones are kept in. Sourced by `base-image`,
# `build-image` and `load-image`, after lib.sh.
# shellcheck shell=bash

LAYOUT=$CACHE_DIR/images # an OCI image layout: what images share is stored once

# run_buildah ARGUMENTS...: with its storage in the cache, so that a changed source file does not install the
# dependencies anew; in namespaces of its own, so that ending it ends the commands that it runs and leaves no mount.
run_buildah() {
  local storage=$CACHE_DIR/buildah driver=overlay
  mkdir -p "$storage/run"
  [ "$(stat --file-system --format %T "$storage")" != overlayfs ] || driver=vfs # no overlay over an overlay
  # shellcheck disable=SC2016  # expanded by the inner shell
  unshare --mount --pid --fork --kill-child --mount-proc \
    bash -c 'mount -t tmpfs tmpfs "$1/run" && exec buildah --root "$1" --runroot "$1/run" --storage-driver "$2" "${@:3}"' \
    - "$storage" "$driver" "$@"
}

# build CONTEXT DOCKERFILE NAME ARGUMENTS...
build() {
  run_buildah bud --isolation chroot --pull-never --layers --file "$2" --tag "$3" "${@:4}" "$1"
}

# in_layout NAME: whether the finished image is there.
in_layout() { grep -qsF "\"$1\"" "$LAYOUT/index.json"; }

# publish NAME: copy a built image into LAYOUT, uncompressed: it is unpacked on this same machine.
publish() {
  exec {publishing}>"$CACHE_DIR/locks/images"
  flock "$publishing" # two at once would lose one's entry in the index
  run_buildah push --disable-compression --format oci "$1" "oci:$LAYOUT:$1"
  exec {publishing}>&-
}

# once KEY COMMAND...: run COMMAND with an empty folder as its last argument, alone for KEY.
once() {
  local work=$CACHE_DIR/building-$1
  mkdir -p "$CACHE_DIR/locks"
  exec {building}>"$CACHE_DIR/locks/$1"
  flock "$building"
  rm -rf "$work"
  mkdir "$work"
  "${@:2}" "$work"
  rm -rf "$work"
  exec {building}>&-
}
