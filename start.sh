#!/usr/bin/env bash
# Start the platform and the activity job on it: ./start.sh [docker|processes]
# Without an argument: Docker where an engine answers, else plain processes (Linux).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -f .env ]; then
  set -a
  . ./.env
  set +a
fi

with=${1:-}
if [ -z "$with" ]; then
  with=processes
  if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then with=docker; fi
fi

case $with in
  docker)
    docker compose up --build --detach --wait
    docker compose run --rm activity
    dashboard=127.0.0.1:28081
    produce="docker compose run --rm producer" verify="docker compose run --rm verify"
    stop="docker compose down"
    ;;
  processes)
    make up
    make activity
    eval "$(.venv/bin/python -m stack env)"
    dashboard=$FLINK_MASTER
    produce="make produce" verify="make verify" stop="make down"
    ;;
  *)
    echo "usage: ./start.sh [docker|processes], not $with" >&2
    exit 2
    ;;
esac

cat <<END

The job runs.
  open      http://$dashboard
  events    $produce
  check     $verify
  stop      $stop
END
