#!/usr/bin/env bash
# From a PACS export to a model that scores, searches, explains and is fine-tuned:
#     bash examples/hospital/run.sh EXPORT OUT
# EXPORT holds PACS/, reports.csv and reports.toml, as make_export.py beside this file writes them.
# The tiny model and 40 steps show the commands and nothing else: for a real one take --config paper,
# --image-size 224, and as many steps as docs/training.md says.
set -euo pipefail
export_=$1 out=$2
mmclip=${MMCLIP:-mmclip}

# 1. Images and reports become one checked folder: no name, number or date of a patient is in it.
#    Keep $out/data.id-key apart from it.
$mmclip data build dicom --root "$export_/PACS" --reports "$export_/reports.csv" \
  --mapping "$export_/reports.toml" --image-size 64 --resize pad --val-ratio 0.25 \
  --test-ratio 0.25 --out "$out/data"

# 2. Labels from what the reports say; what splits share; what is installed and sound.
$mmclip data labels "$out/data" > "$out/labels.json"
$mmclip data check "$out/data" > "$out/check.json"
$mmclip doctor "$out/data"

# 3. Pre-training on images with reports, and its score by the derived labels.
$mmclip pretrain --data "$out/data" --config tiny --set data.resize=pad --set train.steps=40 \
  --set train.batch_size=16 --out "$out/run"
$mmclip zeroshot --model "$out/run" --data "$out/data" --finding "pleural effusion" \
  --n-resamples 200 --out "$out/run/test"

# 4. Scores without labels, the nearest patients for a phrase, and a map.
$mmclip predict --model "$out/run" "$out/data" --finding "pleural effusion" --by study \
  --out "$out/predictions.csv"
$mmclip retrieve --model "$out/run" --data "$out/data" --phrase "left pleural effusion" --top 3 \
  --out "$out/found"
image=$($mmclip retrieve --model "$out/run" --data "$out/data" --phrase "pleural effusion" --top 1 |
  sed -n 's/.*"image_id": "\([^"]*\)".*/\1/p')
$mmclip explain --model "$out/run" --data "$out/data" --image-id "$image" \
  --phrase "pleural effusion" --out "$out/map.png"

# 5. Fine-tuning on the derived labels.
$mmclip finetune --model "$out/run" --data "$out/data" --finding "pleural effusion" --fraction 1 \
  --seed 0 --n-resamples 200 --out "$out/finetuned"
