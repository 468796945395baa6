# The cluster's namespaces, cgroup and image store as seen from the machine. Sourced by `up`, `down` and
# `load-image`, after lib.sh.
# shellcheck shell=bash

IMAGE_STORE=$CACHE_DIR/containerd # containerd's root folder
CGROUP=turboquant-$(key_of "$CLUSTER_DIR" </dev/null)

# first_process: the process id (on the machine) of the first process of the cluster's namespaces.
first_process() {
  local pid
  for pid in $(marked "TURBOQUANT_CLUSTER=$CLUSTER_DIR"); do
    # NSpid lists the process's ids from the outer namespace to the inner: the first process is 1 inside.
    if awk '/^NSpid:/ {exit !(NF == 3 && $3 == 1)}' "/proc/$pid/status" 2>/dev/null; then
      echo "$pid"
      return
    fi
  done
  return 1
}

# inside COMMAND...: run COMMAND in the cluster's namespaces.
inside() { nsenter -t "$(first_process)" --net --mount --pid --ipc --uts --wd="$PWD" -- "$@"; }

# cgroup_roots: every cgroup hierarchy's root: one (version 2) or one for each controller (version 1).
cgroup_roots() { awk '$3 == "cgroup" || $3 == "cgroup2" {print $2}' /proc/mounts; }

# make_cgroup: the cgroup that all pods are under, in every hierarchy.
make_cgroup() {
  local root controller controllers
  for root in $(cgroup_roots); do
    mkdir "$root/$CGROUP"
    if [ "$root" = /sys/fs/cgroup ]; then # version 2: children get the controllers that are enabled for them
      read -ra controllers <"$root/cgroup.controllers"
      for controller in "${controllers[@]}"; do
        grep -qw "$controller" "$root/cgroup.subtree_control" && continue
        # `down` takes back what is added here, so it is written down before it is added.
        echo "$root -$controller" >>"$CLUSTER_DIR/state/cgroup-controllers"
        echo "+$controller" >"$root/cgroup.subtree_control" ||
          say "the cgroup controller $controller cannot be enabled here: pods get no such limits"
      done
    fi
    if [ -e "$root/cpuset.cpus" ]; then # version 1: empty until set, and then nothing may run
      cat "$root/cpuset.cpus" >"$root/$CGROUP/cpuset.cpus"
      cat "$root/cpuset.mems" >"$root/$CGROUP/cpuset.mems"
    fi
    if [ -e "$root/cpu.shares" ]; then # version 1: else all pods together would weigh as much as one process
      echo $((1024 * $(nproc))) >"$root/$CGROUP/cpu.shares"
    fi
  done
}

remove_cgroup() {
  local root change
  for root in $(cgroup_roots); do
    [ ! -d "$root/$CGROUP" ] || poll 10 find "$root/$CGROUP" -depth -type d -exec rmdir {} + ||
      say "$root/$CGROUP stays: a process is still in it"
  done
  if [ -e "$CLUSTER_DIR/state/cgroup-controllers" ]; then
    while read -r root change; do
      echo "$change" >"$root/cgroup.subtree_control" || true # someone else uses the controller by now
    done <"$CLUSTER_DIR/state/cgroup-controllers"
  fi
}

# lock_image_store: hold the image store for as long as this process, or one it starts, has file descriptor 8.
lock_image_store() {
  stackable "$IMAGE_STORE"
  exec 8<>"$IMAGE_STORE.lock"
  # Not at once: one that was just ended may take a moment to let go.
  flock --wait 5 8 || die "the image store is in use by the cluster of $(cat "$IMAGE_STORE.lock")"
  echo "$CLUSTER_DIR" >"$IMAGE_STORE.lock"
}

# take_down: end the cluster and everything it holds, in whatever state it is. The logs stay.
take_down() {
  kill_marked "TURBOQUANT_CLUSTER=$CLUSTER_DIR"
  remove_cgroup
  rm -rf --one-file-system "${CLUSTER_DIR:?}"/{state,bin,kubeconfig,env}
}
