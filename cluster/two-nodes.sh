#!/bin/sh
# Two nodes of Ray and a head on this machine, behind a token, for trials of `ftray submit` without a cluster:
#
#   sh cluster/two-nodes.sh [CPUS_A_NODE]
#
# prints the address and the token, and ends all three at Ctrl-C.
set -eu

cpus=${1:-2}
port=${PORT:-6389}
dashboard=${DASHBOARD_PORT:-8275}
place=$(mktemp -d "${TMPDIR:-/tmp}/ftray2.XXXX")
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_AUTH_TOKEN
pids=

finish() {
    trap - EXIT INT TERM
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$place"
}
trap finish EXIT
trap 'exit 0' INT TERM

start() {
    name=$1
    shift
    ray start --block --node-ip-address=127.0.0.1 --object-store-memory=200000000 --disable-usage-stats "$@" \
        >"$place/$name.log" 2>&1 &
    pids="$pids $!"
}

start head --head --port="$port" --num-cpus=0 --temp-dir="$place/ray" --dashboard-host=127.0.0.1 \
    --dashboard-port="$dashboard" --dashboard-agent-listen-port=0 --ray-client-server-port=0 --metrics-export-port=0
tries=0
until RAY_ADDRESS="127.0.0.1:$port" ray job list --address "http://127.0.0.1:$dashboard" >/dev/null 2>&1; do
    tries=$((tries + 1))
    if [ "$tries" -gt 60 ] || ! kill -0 "${pids# }" 2>/dev/null; then
        echo "the head did not come up; its log ends with:" >&2
        tail -n 20 "$place/head.log" >&2
        exit 1
    fi
    sleep 1
done
for node in one two; do
    start "$node" --address="127.0.0.1:$port" --num-cpus="$cpus" --dashboard-agent-listen-port=0 --metrics-export-port=0
done

echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN"
echo "ftray submit jobs/quickstart.yaml storage=$PWD/runs --address http://127.0.0.1:$dashboard"
echo "(Ctrl-C ends the cluster)"
wait
