#!/usr/bin/env bash
# From checkout to first trained adapter, command by command, with times: what the README's table shows.
#   tools/time_setup.sh [REPOSITORY]      TORCH_ARGS as for the Makefile; pip's own cache is not used
set -euo pipefail
repository=$(cd "${1:-$(dirname "$0")/..}" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1

timed() {
    local start=$SECONDS
    "$@" >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
    printf '| `%s` | %d s |\n' "${label:-$*}" "$((SECONDS - start))"
}

echo '| command | time |'
echo '| --- | --- |'
cd "$folder"
label='git clone … lora_nb && cd lora_nb' timed git clone --quiet "$repository" lora_nb
cd lora_nb
label='make lab, first call: installs' timed make .venv/.lab
label='make lab, later calls: until it starts' timed make .venv/.lab
timed .venv/bin/lora-nb train tone
timed .venv/bin/lora-nb generate "Could you please close the window?" --pair --adapter adapters/tone
