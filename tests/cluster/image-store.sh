# Images in the cluster's containerd. Sourced by `node` and `load-image`, after lib.sh.
# shellcheck shell=bash

CTR=(ctr --namespace k8s.io) # `load-image` puts before it how to get inside

# archive_name ARCHIVE: the name of a docker-archive's only image.
archive_name() {
  tar -xOf "$1" manifest.json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["RepoTags"][0])'
}

# import_archive ARCHIVE: nothing is done when this very image was imported before.
import_archive() {
  local archive=$1 name digest
  name=$(archive_name "$archive")
  # The manifest names the image's configuration by digest, and that names the layers.
  digest=$(tar -xOf "$archive" manifest.json | key_of)
  if [ -z "$("${CTR[@]}" images ls -q "name==\"$name\",labels.\"turboquant/archive\"==\"$digest\"")" ]; then
    "${CTR[@]}" images import "$archive"
    "${CTR[@]}" images label "$name" "turboquant/archive=$digest"
  fi
}
