#!/bin/sh
# The figures of a GPU: tables, JSON and logs, into a folder.
#
#   sh tests/gpu/figures.sh FOLDER [main|sizes|models|capacity ...]      without names: all but capacity
#
# main      one model in full: limits, the naive way, questions, both at once, real sockets, kernels
# sizes     the same model at other sizes and chunk sizes
# models    the other models
# capacity  a clip of 1080p to the end of 12 GiB; needs the extra `tools`
# Seconds for each: MAIN_S, SIZES_S, MODELS_S. Compiling a model for the first time comes on top of them.
set -u
out=${1:?a folder for the results}
shift
[ $# -gt 0 ] || set -- main sizes models
mkdir -p "$out"
PYTHON=${PYTHON:-python3}

bench() {
    name=$1
    shift
    "$PYTHON" -m onlooker.node.bench --json "$out/$name.json" "$@" >"$out/$name.txt" 2>"$out/$name.log" ||
        echo "a part of $name failed: see its notes" >&2
    cat "$out/$name.txt"
}

for part in "$@"; do
    case $part in
    main)
        bench main --config qwen2.5-vl-3b --size 1920x1080 --size 1920x1080@392x224 --history 0,28500,150000 \
            --wire 480 --wire-encoding jpeg,rgb8 --profile --budget-s "${MAIN_S:-110}"
        ;;
    sizes)
        bench sizes --config qwen2.5-vl-3b --size 448x448 --size 1280x720 --size 1920x1080 --chunk-frames 1,2,4,6,8 \
            --history 28500 --quick --wire 0 --naive off --budget-s "${SIZES_S:-45}"
        ;;
    models)
        bench models --config qwen2.5-vl-7b --config qwen3-vl-4b --config qwen3-vl-8b --size 1920x1080 \
            --size 1920x1080@392x224 --history 28500 --quick --wire 0 --naive off --budget-s "${MODELS_S:-60}"
        ;;
    capacity)
        "$PYTHON" - "$out/clip.mp4" <<'CLIP'
import sys

import cv2

from onlooker.node.bench_camera import pictures

writer = cv2.VideoWriter(sys.argv[1], cv2.VideoWriter.fourcc(*"mp4v"), 8.0, (1920, 1080))
for picture in pictures((1920, 1080), 320):
    writer.write(picture[..., ::-1].copy())
writer.release()
CLIP
        "$PYTHON" -m onlooker.tools.cli capacity "$out/clip.mp4" --config qwen2.5-vl-3b --reader cv2 --memory 12GiB \
            --json >"$out/capacity.json" 2>"$out/capacity.log"
        cat "$out/capacity.log"
        rm -f "$out/clip.mp4"
        ;;
    *)
        echo "there is no part $part" >&2
        exit 2
        ;;
    esac
done
