#!/usr/bin/env bash
# The whole path in minutes: environment, real photographs, shards, training, results.
#   bash launch/quickstart.sh [section.key=value …]     for example train.epochs=2
# Running it again goes on where it stopped. Nothing is downloaded but Python packages.
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '2,4s/^# //p' "$0"
  exit 0
fi
source "$(dirname "$0")/environment.sh" sample

data=data/quickstart
python tools/make_dataset.py --source sample --output $data/images
# With this seed the two held-out pictures are a scene with fine detail (coffee) and a smooth one (retina).
python tools/split_dataset.py --images $data/images --val-fraction 0.2 --seed 18
python tools/make_shards.py --images $data/images/train.txt --output $data/shards --tile 128

# One process, on a GPU if there is one; `accelerate launch` starts several (README).
result=$(python launch/train.py --config configs/quickstart.yaml "$@")
[ -z "$result" ] || echo "$result"
run=$(sed -n 's/^Run folder: //p' <<< "$result")
if [ -z "$run" ]; then  # --dry-run
  exit 0
fi

cat <<TEXT

Look further:
  . .venv/bin/activate
  tensorboard --logdir $(dirname "$run")            # losses, PSNR, pictures of every epoch
  ls $run/samples/*/        # LR | bicubic | SR | HR, side by side
  python launch/upscale.py --checkpoint $run --input YOUR_PICTURE.jpg --output upscaled/
  python launch/evaluate.py --data YOUR_PICTURES/ --method bicubic --checkpoint $run --output results/
TEXT
weight='import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["loss"]["content"]["weight"])'
if [ "$(python -c "$weight" "$run/config.yaml")" = 0.0 ]; then
  cat <<'TEXT'

The content loss was left off, because its weights are a 14 MB download. With it:
  bash launch/quickstart.sh run.name=quickstart_content loss.content.weight=0.006
TEXT
fi
