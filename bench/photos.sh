#!/usr/bin/env bash
# The papers' table on photographs and real weights, from the repository's root:
#   bash bench/photos.sh MODEL CLASSIFIER FOLDER
# MODEL is a diffusers folder or hub id, CLASSIFIER a Hugging Face one, FOLDER holds images (in folders by class, if there
# are labels). Counterfactuals by each published setting that fits, restored photos, quality, and an audit go to
# $OUT (photos-table). More words, in the environment: PRESETS ("imagenet-text pets-text"), MORE (options of every command,
# such as "--image-size 512 --labels a,b"), ENCODER (a backbone for S3 and FID), TABLE (options of bench.photos_table).
# What is finished is not made again. Nobody has run it on real weights yet.
set -u -o pipefail
if [ $# -ne 3 ]; then
    echo "usage: bash bench/photos.sh MODEL CLASSIFIER FOLDER" >&2
    exit 2
fi
MODEL=$1 CLASSIFIER=$2 FOLDER=$3
OUT=${OUT:-photos-table}
read -r -a more <<<"${MORE:-}"
read -r -a table <<<"${TABLE:-}"
failed=0 done=()
if [ -z "${PRESETS:-}" ]; then
    PRESETS="imagenet-text pets-text flowers-text pairs-text"
    if [ -d "$MODEL/transformer" ] || [ -d "$MODEL/class_embedder" ]; then PRESETS="imagenet-class pairs-class"; fi
fi
for preset in $PRESETS; do
    echo "== $preset" >&2
    counterlens counterfactual "$FOLDER" --recursive --model "$MODEL" --classifier "$CLASSIFIER" --preset "$preset" \
        --restore --out "$OUT/$preset" "${more[@]}" || failed=1
    [ -s "$OUT/$preset/results.jsonl" ] && done+=("$OUT/$preset")
done
if [ ${#done[@]} -gt 0 ]; then
    [ -n "${ENCODER:-}" ] && table+=(--encoder "$ENCODER")
    python -m bench.photos_table "$MODEL" "$CLASSIFIER" "${done[@]}" "${table[@]}" >"$OUT/table.json" || failed=1
fi
echo "== audit" >&2
counterlens audit "$FOLDER" --recursive --model "$MODEL" --classifier "$CLASSIFIER" --out "$OUT/audit" "${more[@]}" || failed=1
echo "results: $OUT/table.json, $OUT/audit/report.html" >&2
exit $failed
