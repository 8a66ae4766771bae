"""Train the model that the pages open, and write down what it could do along the way.

    python data/make_tiny_model.py             # data/tiny_model.pt and data/tiny_model.json
    python data/make_tiny_model.py --steps 20 --folder /tmp/try    # only the first steps

tiny_model.pt is a checkpoint without its optimiser. tiny_model.json holds, for every EVERY steps of
the same run: the loss of whole stories that it has not seen, the shares of 200 stories written at
temperature 0.7 that are spelled, grammatical, remember and count, and what it makes of "I love ".
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the folder above holds tinygpt_helpers.py
import tinygpt_helpers as tiny  # noqa: E402
from data import make_tiny_corpus as judge  # noqa: E402

STEPS, EVERY = 4000, 160
SETTINGS = dict(steps=STEPS, batch_size=12, lr=4e-3, eval_every=EVERY, seed=0)
SKILLS = ("spelled", "grammatical", "remembers", "counts")


def story_recipe(tokenizer, ids, val_text, max_len):
    """What train needs for one story a line: windows begin with one, whole ones are judged."""
    [newline], whole = tokenizer.encode("\n"), torch.tensor(tokenizer.encode("\n" + val_text))
    starts, cuts = ((part == newline).nonzero()[:, 0] for part in (ids[:-max_len], whole[:-1]))
    return dict(starts=starts, validate=partial(tiny.evaluate, ids=whole, starts=cuts))


def make_model(folder, stop_at=STEPS, quick=False):
    """Train up to step `stop_at` of the run; write the two files; return what the JSON holds.

    quick: judge a few stories only, to try the command; the weights come out the same.
    """
    train_text, val_text = tiny.split_corpus(tiny.load_corpus("tiny"), by_line=True)
    tokenizer = tiny.CharTokenizer(train_text)
    ids = torch.tensor(tokenizer.encode(train_text))
    torch.manual_seed(0)
    model = tiny.TinyGPT(tokenizer.vocab_size, d_model=128, n_heads=4, n_layers=3, max_len=192)
    n_stories = 2 if quick else 200
    if quick:
        val_text = "".join(val_text.splitlines(keepends=True)[:20])
    diary = {"floor": judge.floor(val_text), "step": [], "story_loss": [], "sample": []}
    diary |= {skill: [] for skill in SKILLS}

    def write_down(history):
        stories = tiny.sample_stories(model, tokenizer, n_stories, temperature=0.7)
        scores = judge.score_stories(stories)
        diary["step"].append(history["val_step"][-1])
        diary["story_loss"].append(round(history["val_loss"][-1], 4))
        diary["sample"].append(
            tiny.sample_stories(model, tokenizer, 1, "I love ", temperature=0.7)[0])
        for skill in SKILLS:
            diary[skill].append(round(scores[skill], 4))

    history = tiny.train(
        model, ids, None, **SETTINGS, stop_at=stop_at, on_eval=write_down,
        **story_recipe(tokenizer, ids, val_text, model.max_len))
    diary["train_loss"] = [round(loss, 4) for loss in history["train_loss"]]
    tiny.save_checkpoint(folder / "tiny_model.pt", model, step=stop_at, tokenizer=tokenizer)
    tiny.write_atomically(folder / "tiny_model.json", json.dumps(diary, indent=0).encode())
    return diary


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="stop before this step")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the two files go")
    parser.add_argument("--quick", action="store_true", help="judge a few stories only")
    args = parser.parse_args()
    diary = make_model(args.folder, min(args.steps, STEPS), args.quick)
    last = {skill: diary[skill][-1] for skill in SKILLS}
    print(f"step {diary['step'][-1]}: {diary['story_loss'][-1]} nats per character, {last}")


if __name__ == "__main__":
    main()
