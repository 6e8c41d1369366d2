"""Streams text from a checkpoint, one byte at a time, through the model's explicit state.

  fnattn generate runs/demo --prompt "def main(" --tokens 400 --temperature 0.8 --top-k 40
  fnattn generate runs/ensemble --member 2 --seed 7 > sample.txt

The prompt is read once; every further byte costs the same for families whose state does not grow. The same seed gives the same
text, and fewer tokens give the beginning of it.
"""

from __future__ import annotations

import argparse
import codecs
import sys
from pathlib import Path

import torch

from .. import checkpoint, data, ensemble, random
from ..core import check
from ..models import lm
from ..models.generate import stream
from .loop import CHECKPOINT

HELP = "stream text from a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the prompt, and how to draw."""
    parser.add_argument("checkpoint", type=Path, help="folder of a training, or its checkpoint.safetensors")
    parser.add_argument("--prompt", default="\n", help="text to continue; '-' reads it from stdin")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="below 1 keeps to what is probable; 0 takes the most probable")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K most probable bytes only; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw among the most probable bytes that together reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--member", type=int, default=0, metavar="I", help="member of an ensemble")
    parser.add_argument("--capacity", type=int, metavar="N",
                        help="positions that the state has room for (default: what prompt and tokens need)")
    parser.add_argument("--impl", default="auto", help="implementation of the operators: see `fnattn report`")
    parser.add_argument("--no-echo", action="store_true", help="print the new text without the prompt")


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    params = load_member(args.checkpoint, args.member)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    check(bool(prompt), "generate: expected a prompt; got none.", remedy="Leave --prompt out to start with a new line.")
    ids = data.encode(prompt)[None]
    tokens = stream(params, ids, args.tokens, key=random.key(args.seed), temperature=args.temperature, top_k=args.top_k,
                    top_p=args.top_p, capacity=args.capacity, impl=args.impl)
    # Bytes of a character that is not complete yet wait for the rest of it.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    if not args.no_echo:
        sys.stdout.write(prompt)
    for token in tokens:
        sys.stdout.write(decoder.decode(bytes(token.tolist())))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    return 0


def load_member(path: Path, member: int) -> lm.Params:
    """The parameters of one model in the checkpoint at a folder or file."""
    found = checkpoint.load(path / CHECKPOINT if path.is_dir() else path)
    check(isinstance(found.cfg, lm.Config) and found.cfg.num_tokens == 256,
          "generate: {} does not hold a language model over bytes; got {}.", path, type(found.cfg).__module__,
          remedy="Train one with `fnattn train`.")
    check(0 <= member < max(1, found.members), "generate: {} has {} members; got --member {}.", path, max(1, found.members), member,
          remedy="Count from 0.")
    # Small operators on a busy machine run faster alone.
    torch.set_num_threads(1)
    return ensemble.member(found.params, member) if found.members else found.params
