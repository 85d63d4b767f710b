#!/bin/sh
# Asks a Kubernetes API server whether it would take what k8s/ holds, without changing anything: KubeRay's definitions
# (and for overlays Kueue's and Prometheus') must be there, and the namespace: kubectl apply -f k8s/base/namespace.yaml
set -eu
cd "$(dirname "$0")"
for place in base overlays/*; do
    echo "$place"
    kubectl kustomize "$place" | kubectl apply --dry-run=server -f -
done
