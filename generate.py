"""Let a trained model write: the newest one in runs/, or the one that --checkpoint names."""

import argparse
import sys
from pathlib import Path

import torch

import tinygpt_helpers as tiny

parser = argparse.ArgumentParser(prog="generate.py", description=__doc__)
add = parser.add_argument
add("--checkpoint", type=Path, help="the model's file (default: the newest runs/*/best.pt)")
add("--prompt", default="\n", help="what the text begins with (default: a new line)")
add("--max-new-tokens", type=int, default=200, help="how much to write (default 200)")
add("--temperature", type=float, default=0.7, help="0: the likeliest always; 1: as learned "
    "(default 0.7)")
add("--top-k", type=int, help="sample from the k likeliest tokens only")
add("--top-p", type=float, help="sample from the likeliest tokens that together reach p only")
add("--seed", type=int, help="a number, for the same text again")
add("--device", help="cpu, cuda or mps (default: the best there is)")


def run(args):
    device = tiny.pick_device(args.device)
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not (args.checkpoint or found):
        raise ValueError("there is no model in runs/ yet: run train.py first")
    path = args.checkpoint or found[-1]
    checkpoint = tiny.load_checkpoint(path, device)
    tokenizer = checkpoint["tokenizer"]
    if tokenizer is None:
        raise ValueError(f"{str(path)!r} holds no tokenizer to read with")
    idx = torch.tensor([tokenizer.encode(args.prompt)], dtype=torch.long, device=device)
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    idx = tiny.generate(checkpoint["model"], idx, args.max_new_tokens, args.temperature, args.top_k,
                        args.top_p, generator)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
    print(tokenizer.decode(idx[0]))


def main(argv=None):
    args = parser.parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}".splitlines()[0])


if __name__ == "__main__":
    main()
