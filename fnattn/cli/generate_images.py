"""Draws digits from their names with a checkpoint of `fnattn train-images`.

  fnattn generate-images --text three --out grid.png
  fnattn generate-images --text one two 3 --count 5 --cond-scale 3 --seed 7 --out grid.png

One row of pictures per text. The same seed gives the same pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import checkpoint, random
from ..core import check
from ..models import dalle
from . import digits, loop

HELP = "draw digits from their names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the texts, and how to draw."""
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/digits"), help="folder of a training, or its checkpoint")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME", help="names of digits, such as three, or their figures")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="picture to write")
    parser.add_argument("--count", type=int, default=8, help="pictures per text")
    parser.add_argument("--cond-scale", type=float, default=2.0, help="guidance: above 1 keeps closer to the text")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 keeps to what is probable; 0 takes the most probable")
    parser.add_argument("--filter-thres", type=float, default=0.0, help="share of the vocabulary that is never drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    check(args.count >= 1, "generate-images: --count must be at least 1; got {}.", args.count, remedy="Leave it out for 8.")
    path = args.checkpoint / loop.CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    words = digits.encode(args.text).repeat_interleave(args.count, 0)
    found = checkpoint.load(path)
    check(isinstance(found.cfg, dalle.Config) and found.cfg.num_image_tokens == digits.LEVELS,
          "generate-images: {} does not hold a model of digits; got {}.", path, type(found.cfg).__module__,
          remedy="Train one with `fnattn train-images`.")
    with torch.no_grad():
        pictures = dalle.generate_images(found.params, words, random.key(args.seed), filter_thres=args.filter_thres,
                                         temperature=args.temperature, cond_scale=args.cond_scale)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace(args.out, digits.grid(pictures, args.count))
    print(f"wrote {args.out}: {len(args.text)} x {args.count} pictures")
    return 0
