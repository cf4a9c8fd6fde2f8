#!/usr/bin/env bash
# Train a chain for a slot of GPU time: resumes, stops itself in time, and leaves what was learned in small files.
#
#     benchmarks/slot.sh STAGES.toml CKPT OUT SECONDS [STAGE...]
#
# After SECONDS, or when the chain is done, OUT holds the log, `show --json`, each finished or begun stage's best
# network at 16 bits (export checks it against the checkpoint), and, in parts of 15 MB, all that resuming needs:
#     cat OUT/state.part* | tar x    # beside CKPT's parent, and run the script again
set -u
stages=$1 ckpt=$2 out=$3 seconds=$4
shift 4
mkdir -p "$out"
timeout -s INT -k 60 "$seconds" python3 micronet.py chain "$@" --stages "$stages" --ckpt "$ckpt" \
    --data "${DATA:-data}" 2>&1 | tee -a "$out/log.txt"
code=${PIPESTATUS[0]}
python3 micronet.py show --ckpt "$ckpt" --json > "$out/show.json"
for folder in "$ckpt"/*/; do
    name=$(basename "$folder")
    [ -f "$folder/best.safetensors" ] || continue
    python3 micronet.py export "$folder/best.safetensors" "$out/$name.safetensors" --data "${DATA:-data}" \
        > "$out/$name.txt" || code=1
done
tar c --exclude=previous.safetensors -C "$(dirname "$ckpt")" "$(basename "$ckpt")" | split -b 15M - "$out/state.part"
find "$out" -size +15M -name '*.safetensors' -exec sh -c 'split -b 15M "$1" "$1.part" && rm "$1"' _ {} \;
exit "$code"   # 124: out of time, go on with the same command
