#!/bin/sh
# What the container is: `head`, `worker HEAD:6379`, or any command. Ray's token comes from RAY_AUTH_TOKEN, or from
# the file that RAY_AUTH_TOKEN_PATH names.
set -eu

export RAY_AUTH_MODE=token

need_token() {
    if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
        echo "ftray: no token for Ray; set RAY_AUTH_TOKEN (openssl rand -hex 32), the same on all nodes" >&2
        exit 2
    fi
}

case "${1:-}" in
head)
    shift
    need_token
    # Jobs are submitted from the host, or through a tunnel: the dashboard is not for the world.
    exec ray start --head --block --port=6379 --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" --num-cpus=0 "$@"
    ;;
worker)
    [ $# -ge 2 ] || { echo "ftray: worker needs the head's address, e.g. worker 10.0.0.1:6379" >&2; exit 2; }
    address=$2
    shift 2
    need_token
    exec ray start --block --address="$address" "$@"
    ;;
*)
    exec "$@"
    ;;
esac
