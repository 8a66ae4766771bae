"""Train a tiny GPT on a text; without options on the course's own stories."""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import tinygpt_helpers as tiny
from data import make_tiny_corpus as judge

SIZES = dict(max_len=128, d_model=96, n_heads=3, n_layers=2, dropout=0.0)
command = subprocess.list2cmdline if os.name == "nt" else shlex.join  # as it is to be typed
parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
add = parser.add_argument
add("--corpus", default="tiny", help="tiny, shakespeare or your own UTF-8 text file (%(default)s)")
add("--steps", type=int, default=6000, help="batches to learn from (%(default)s)")
add("--max-seconds", type=float, default=math.inf, help="end after about so many (%(default)s)")
add("--batch-size", type=int, default=16, help="windows in a batch (%(default)s)")
add("--lr", type=float, default=7e-3, help="the highest learning rate (%(default)s)")
for name, size in SIZES.items():  # no default: a run that is resumed keeps its own
    add("--" + name.replace("_", "-"), type=type(size), help=f"of the model ({size})")
add("--seed", type=int, help="another number: another start and other batches (0)")
add("--eval-every", type=int, default=500, help="steps between two checkpoints (%(default)s)")
add("--val-tokens", type=int, default=200_000, help="validate on so many, 0: all (%(default)s)")
add("--out", type=Path, help="a new folder for the run (runs/tiny, runs/tiny-2, ...)")
add("--resume", action="store_true", help="go on with the newest run, or the one in --out")
add("--stop-at", type=int, help="pause before this step; --resume goes on")
add("--device", help="cpu, cuda or mps (the best there is)")
add("--precision", choices=["float32", "bfloat16", "float16"], help="(the fastest here)")
add("--compile", action="store_true", help="compile the model first: slow to start, then faster")


def story_recipe(tokenizer, ids, val_text, max_len):
    """What train needs for one story a line: windows begin with one, whole ones are judged."""
    validate = partial(tiny.story_loss, tokenizer=tokenizer, text=val_text)
    starts = (ids[:-max_len] == tokenizer.encode("\n")[0]).nonzero().squeeze(1)
    return dict(starts=starts, validate=validate)


def open_folder(args):
    """Return the folder of the newest run to resume, or make one, which no other process gets."""
    first = args.out or Path("runs") / Path(args.corpus).stem
    if args.resume:
        runs = [path.parent for path in sorted(first.parent.glob("*/last.pt"), key=os.path.getmtime)
                if re.fullmatch(re.escape(first.name) + r"(-\d+)?", path.parent.name)]
        return runs[-1] if runs and not args.out else first
    for n in range(1, 10_000):
        folder = first if n == 1 else first.with_name(f"{first.name}-{n}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if args.out:
                raise ValueError(f"{first} is there: --resume, or another --out") from None


def run(args):
    device, stories = tiny.pick_device(args.device), args.corpus == "tiny"
    text, val_text = tiny.split_corpus(tiny.load_corpus(args.corpus), by_line=stories)
    args.out = open_folder(args) if args.resume else args.out
    old = tiny.load_checkpoint(args.out / "last.pt", device) if args.resume else {}
    tokenizer = old.get("tokenizer") or tiny.CharTokenizer(text)
    sizes = old.get("config") or SIZES | {"vocab_size": tokenizer.vocab_size}
    asked = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if old and sizes != sizes | asked:
        raise ValueError(f"{asked} is asked for; the run to resume has {sizes}")
    config = tiny.GPTConfig(**sizes | asked)
    known = "".join(filter(set(text).__contains__, val_text))
    if len(known) < len(val_text):
        print(f"{len(val_text) - len(known)} characters of the validation text do not occur in the "
              "training text; they are left out")
    val_text = known
    ids, val_ids = (torch.tensor(tokenizer.encode(part)) for part in (text, val_text))
    if not stories and len(val_ids) > args.val_tokens > 0:
        print(f"Validating on {args.val_tokens:,} of {len(val_ids):,} tokens: see --val-tokens.")
        val_ids = val_ids[: args.val_tokens]
    if args.val_tokens < 0 or len(val_ids) < 2:
        raise ValueError(f"--val-tokens {args.val_tokens}, and a text with {len(val_ids)}: too few")
    floor = judge.floor(val_text) if stories else None
    recipe = story_recipe(tokenizer, ids, val_text, config.max_len) if stories else {}
    args.seed = (old.get("seed") or 0) if args.seed is None else args.seed
    args.precision = getattr(torch, args.precision or "", None) or tiny.pick_precision(device)
    settings = {k: v for k, v in vars(args).items() if k in tiny.TrainConfig.__dataclass_fields__}
    tiny.TrainConfig(**settings)  # what is wrong is said before there is a folder
    tiny.sample_batch(ids, config.max_len, args.batch_size, starts=recipe.get("starts"))
    torch.empty(min(12 * config.n_layers * config.d_model**2, 2**59))  # as big as the blocks
    torch.manual_seed(args.seed)
    model = old.get("model") or tiny.TinyGPT(config).to(device)
    folder = args.out = open_folder(args)
    for part in folder.glob(".*.pt.*.tmp"):  # of a run that was killed
        part.unlink()
    print(f"{len(text):,} characters to learn from, on {device} ({args.precision}), for a model of "
          f"{sum(p.numel() for p in model.parameters()):,} parameters.\nA blind guess costs "
          f"ln {config.vocab_size} = {math.log(config.vocab_size):.2f} nats a token.\n")
    try:
        history = tiny.train(model, ids, val_ids, out=folder, tokenizer=tokenizer, resume=old,
                             **recipe, **settings)
    finally:
        if not any(folder.iterdir()):  # nothing was learned: leave the name to the next run
            folder.rmdir()
    tiny.plot_loss(history, floor).savefig(folder / "loss.png", dpi=150)
    loss = history["val_loss"][-1]
    if stories:
        judge.report(loss, floor, tiny.sample_stories(model, tokenizer, 200, temperature=0.7))
    else:
        nats, part = loss * (len(val_ids) - 1), tokenizer.decode(val_ids[1:])  # the first is given
        print(f"\nvalidation: {loss:.3f} nats per token, {nats / len(part):.3f} per character, "
              f"{nats / math.log(2) / len(part.encode()):.3f} bits per byte")
    write = [sys.executable, "generate.py", "--checkpoint", str(folder / "best.pt")]
    write += [] if "\n" in text else ["--prompt", text[0]]  # a new line would have no id
    print(f"\nThe loss curve is {folder / 'loss.png'}. Let the model write:\n{command(write)}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
    try:
        run(args)
    except KeyboardInterrupt:
        again = [sys.executable, "train.py", *argv, "--resume", "--out", str(args.out)]
        saved = args.out and (args.out / "last.pt").exists()
        sys.exit(f"\nStopped. To go on:\n{command(again)}" if saved else "\nStopped.")
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}".splitlines()[0])


if __name__ == "__main__":
    main()
