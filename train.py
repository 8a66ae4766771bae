"""Train a tiny GPT on a text: without options, on the course's own stories."""

import argparse
import math
import sys
from contextlib import suppress
from pathlib import Path

import torch

import tinygpt_helpers as tiny
from data import make_tiny_corpus as judge
from data.make_tiny_model import story_recipe
from generate import command, end_clearly, newest

parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
parser.add_argument("--corpus", default="tiny", help="tiny, shakespeare or a UTF-8 file (tiny)")
parser.add_argument("--out", type=Path, help="a new folder (runs/tiny, runs/tiny-2, ...)")
parser.add_argument("--resume", action="store_true", help="go on: the newest run, or --out")
parser.add_argument("--device", help="cpu, cuda or mps (the best there is)")
parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], help="(the fastest)")
parser.add_argument("--compile", action="store_true", help="slow to start, then faster")
for name, default, what in [
        ("steps", 6000, "batches to learn from"), ("batch_size", 16, "windows in a batch"),
        ("max_seconds", math.inf, "end after so many seconds"), ("lr", 7e-3, "highest rate"),
        ("eval_every", 500, "steps from save to save"), ("max_len", 128, "tokens in a window"),
        ("val_tokens", 200_000, "judge by so many, <1: all"), ("d_model", 96, "width of the model"),
        ("n_heads", 3, "heads"), ("n_layers", 2, "blocks"), ("dropout", 0.0, "share set to zero"),
        ("seed", 0, "of weights and batches"), ("stop_at", math.inf, "pause before this step")]:
    parser.add_argument("--" + name.replace("_", "-"), default=default, help=f"{what} ({default})",
                        type=int if name == "stop_at" else type(default))

def new_folder(out, run):
    for folder in [out] if out else [run, *(Path(f"{run}-{n}") for n in range(2, 10_000))]:
        with suppress(FileExistsError):  # another run has it
            folder.mkdir(parents=True)
            return folder
    raise ValueError(f"{folder} is there: --resume, or another --out")

def main(args):
    device, old, stories = tiny.pick_device(args.device), {}, args.corpus == "tiny"
    if args.resume:
        args.out = args.out or newest("last.pt", Path(args.corpus).stem).parent
        old = tiny.load_checkpoint(args.out / "last.pt", device)
        vars(args).update(old["config"], seed=old["seed"] or 0)
        parser.parse_args(namespace=args)  # what is asked for goes before what the run has
    text, val_text = tiny.split_corpus(tiny.load_corpus(args.corpus), by_line=stories)
    tokenizer = old.get("tokenizer") or tiny.CharTokenizer(text)
    args.vocab_size = tokenizer.vocab_size
    args.precision = getattr(torch, args.precision or "", None) or tiny.pick_precision(device)
    config, settings = (kind(**{k: v for k, v in vars(args).items() if k in kind.__match_args__})
                        for kind in (tiny.GPTConfig, tiny.TrainConfig))
    if vars(config) != old.get("config", vars(config)):
        raise ValueError(f"{config} is asked for; the run to resume has {old['config']}")
    known = "".join(filter(set(text).__contains__, val_text))  # what has no id is left out
    ids, val_ids = (torch.tensor(tokenizer.encode(part)) for part in (text, known))
    val_ids = val_ids if stories else val_ids[: max(args.val_tokens, 0) or None]
    recipe = story_recipe(tokenizer, ids, known, config.max_len) if stories else {}
    tiny.sample_batch(ids, config.max_len, args.batch_size, starts=recipe.get("starts"))
    torch.empty(min(12 * config.n_layers * config.d_model**2, 2**59))  # as big as the blocks
    torch.manual_seed(args.seed)
    model = tiny.TinyGPT(config).to(device)
    folder = args.out if args.resume else new_folder(args.out, Path("runs", Path(args.corpus).stem))
    print(f"{len(text):,} characters to learn from, {len(val_ids):,} of {len(val_text):,} to judge "
          f"by; {sum(map(torch.numel, model.parameters())):,} weights; {device}, {args.precision}"
          f"\nA blind guess costs ln {config.vocab_size} = {math.log(config.vocab_size):.2f} nats.")
    try:
        history = tiny.train(model, ids, val_ids, out=folder, tokenizer=tokenizer, resume=old,
                             **recipe, **vars(settings))
    except KeyboardInterrupt:
        again = f"To go on:\n{command(*sys.argv, '--resume', '--out', folder)}"
        raise KeyboardInterrupt(again if (folder / "last.pt").exists() else "") from None
    finally:
        for part in folder.glob(".*.pt.*.tmp"):  # of a run that was killed
            part.unlink(missing_ok=True)
        with suppress(OSError):  # nothing was learned: leave the name to the next run
            folder.rmdir()
    floor, loss = judge.floor(known) if stories else None, history["val_loss"][-1]
    tiny.plot_loss(history, floor).savefig(folder / "loss.png", dpi=150)
    if stories:
        judge.report(loss, floor, tiny.sample_stories(model, tokenizer, 200, temperature=0.7))
    else:
        nats, part = loss * (len(val_ids) - 1), tokenizer.decode(val_ids[1:])  # the first is given
        print(f"\nvalidation: {loss:.3f} nats per token, {nats / len(part):.3f} per character, "
              f"{nats / math.log(2) / len(part.encode()):.3f} bits per byte")
    print(f"\nThe loss curve is {folder / 'loss.png'}. Let the model write:")
    print(command("generate.py", "--checkpoint", folder / "best.pt"))

if __name__ == "__main__":
    end_clearly(main, parser)
