#!/usr/bin/env bash
# Does an image do what the pods of a run ask of it, with no more rights than they have, and without a network?
#
#     k8s/image/smoke.sh IMAGE
set -euo pipefail

image=${1:?which image?}
pod() {
    docker run --rm --network none --cap-drop ALL --security-opt no-new-privileges --shm-size 1g \
        --tmpfs /cache:mode=1777 --env XDG_CACHE_HOME=/cache "$image" "$@"
}

test "$(pod launch --version)" = \
    "launch, version $(docker inspect --format '{{index .Config.Labels "org.opencontainers.image.version"}}' "$image")"
pod python -c '
import json, os
import trainers.data.crops as crops

assert os.getuid() != 0, "it runs as root"
assert not crops.draw_crops.stats.cache_misses, "its kernels are compiled at every start"
listed = {part["name"] for part in json.load(open("/usr/share/doc/raylaunch/sbom.cdx.json"))["components"]}
assert {"ray", "torch", "timm", "raylaunch"} <= listed, "the list of its parts has holes"
'
# As KubeRay starts a head.
pod /bin/bash -c -- "ulimit -n 65536; ray start --head --num-cpus=0 --dashboard-host=0.0.0.0 && ray stop" >/dev/null
pod launch --data sample://digits --epochs 1 --storage /tmp/runs --name smoke
