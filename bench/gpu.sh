#!/usr/bin/env bash
# One command for a bare GPU machine: installs the wheels carried in $WHEELS (default .whl), if there are any, into a
# temporary folder, and runs bench/gpu.py with the arguments given. PYTHON names the interpreter (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
shopt -s nullglob
wheels=("$WHEELS"/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --target "$tmp/site" "${wheels[@]}"
  export PYTHONPATH="$tmp/site${PYTHONPATH:+:$PYTHONPATH}"
else
  echo "no wheels in $WHEELS: parts whose packages this machine lacks are not run" >&2
fi
export PYTHONUNBUFFERED=1
"$PYTHON" bench/gpu.py "$@"
