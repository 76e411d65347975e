#!/usr/bin/env bash
# Installs all that a pool needs into the cluster of the current context, in the order that works, and waits for each part.
# What is there already stays as it is, so it may be run again. Needs kubectl 1.32 or newer, git, and GitHub.
#
#     k8s/install.sh eks        # or kind, or the name of an overlay of your own
set -euo pipefail
cd "$(dirname "$0")"

overlay="overlays/${1:?which overlay? $(cd overlays && echo *)}"
if [ "$1" = eks ] && [ ! -s "$overlay/site.yaml" ]; then
    echo "$overlay/site.yaml is not there; terraform -chdir=terraform/aws output -raw overlay > k8s/$overlay/site.yaml" >&2
    exit 2
fi
wanted=$(kubectl kustomize "$overlay")

apply() { kubectl apply --server-side -k "$1"; }
ready() { kubectl --namespace "$1" rollout status "$2" --timeout=10m; }

apply operators/kuberay
kubectl wait --for=condition=Established --timeout=2m crd/rayjobs.ray.io crd/rayclusters.ray.io
ready kuberay-system deployment/kuberay-operator

# The API server knows no queue before, and the operator refuses queues until it is ready.
if grep -q '^apiVersion: kueue.x-k8s.io/' <<<"$wanted"; then
    apply operators/kueue
    kubectl wait --for=condition=Established --timeout=2m crd/clusterqueues.kueue.x-k8s.io crd/localqueues.kueue.x-k8s.io
    ready kueue-system deployment/kueue-controller-manager
fi

apply "$overlay"
if grep -q '^  name: cluster-autoscaler$' <<<"$wanted"; then
    ready kube-system deployment/cluster-autoscaler
fi
pool=$(sed -n 's/^    raylaunch.dev\/pool: //p' <<<"$wanted")
echo "launch doctor --cluster $pool --namespace raylaunch  # says what is missing still"
