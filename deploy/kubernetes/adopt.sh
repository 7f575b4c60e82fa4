#!/bin/sh
# Makes the runner pod the owner of the workspace pod: adopt.sh NAMESPACE [SESSION]   (SESSION defaults to demo)
#
# The daemon runs commands only in a pod that its own pod owns, by UID, and a UID exists only once the pod does. Safe to
# repeat; to be repeated when either pod was created anew. `session-proxy session up` does this by itself.
set -eu

namespace=${1:?usage: adopt.sh NAMESPACE [SESSION]}
session=${2:-demo}
runner=$session-runner
workspace=$session-workspace

uid=$(kubectl get pod "$runner" --namespace "$namespace" --output 'jsonpath={.metadata.uid}')
[ -n "$uid" ] || { echo "adopt.sh: pod $runner has no UID" >&2; exit 1; }
# controller: a pod that has one is adopted by no ReplicaSet whose labels it happens to match.
kubectl patch pod "$workspace" --namespace "$namespace" --type merge --patch \
	"{\"metadata\":{\"ownerReferences\":[{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"name\":\"$runner\",\"uid\":\"$uid\",\"controller\":true}]}}"
