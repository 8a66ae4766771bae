"""Let a trained model write: the newest one in runs/, or the one that --checkpoint names."""

import argparse
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

import tinygpt_helpers as tiny

parser = argparse.ArgumentParser(prog="generate.py", description=__doc__)
parser.add_argument("--checkpoint", type=Path, help="the model's file (the newest runs/*/best.pt)")
parser.add_argument("--prompt", help="what the text begins with (a new line)")
parser.add_argument("--max-new-tokens", type=int, default=200, help="how much to write (200)")
parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest always; 1: as "
                    "learned (0.7)")
parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens only")
parser.add_argument("--top-p", type=float, help="sample from the likeliest that reach p only")
parser.add_argument("--seed", type=int, help="a number, for the same text again")
parser.add_argument("--device", help="cpu, cuda or mps (the best there is)")

def newest(file, name=None):
    """Return the newest `file` of the runs, or of those called `name`, `name`-2, ..."""
    pattern = rf"{re.escape(name)}(-\d+)?" if name else ".*"
    found = [path for path in Path("runs").glob(f"*/{file}")
             if re.fullmatch(pattern, path.parent.name)]
    if not found:
        raise ValueError(f"there is no {file} in runs/{name or '*'} yet: run train.py first")
    return max(found, key=lambda path: path.stat().st_mtime)

def command(*words):
    """Return a line to type, with this Python in front."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([sys.executable, *map(str, words)])

def end_clearly(main, parser):
    """Call `main` with the options; end with one line if it is stopped, or something is wrong."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
    args = parser.parse_args()
    try:
        main(args)
    except KeyboardInterrupt as stop:
        sys.exit(f"\nStopped. {stop}".rstrip())
    except (ValueError, OSError, RuntimeError, TypeError, FloatingPointError) as error:
        shut = getattr(error, "errno", None) in (errno.EACCES, errno.EROFS) and "out" in args
        hint = "; --out names another folder to write to" if shut else ""
        sys.exit(f"error: {error}".splitlines()[0] + hint)

def main(args):
    path, device = args.checkpoint or newest("best.pt"), tiny.pick_device(args.device)
    checkpoint = tiny.load_checkpoint(path, device)
    tokenizer = checkpoint["tokenizer"]
    if tokenizer is None:
        raise ValueError(f"{str(path)!r} holds no tokenizer to read with")
    known = tokenizer.decode(range(tokenizer.vocab_size))
    prompt = ("\n" if "\n" in known else known[0]) if args.prompt is None else args.prompt
    idx = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=device)
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    idx = tiny.generate(checkpoint["model"], idx, args.max_new_tokens, args.temperature, args.top_k,
                        args.top_p, generator)
    print(tokenizer.decode(idx[0]))

if __name__ == "__main__":
    end_clearly(main, parser)
