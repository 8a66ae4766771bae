"""Draw the README's picture, notebooks/images/overview.png, from the model that the course ships.

    make picture        # or: python tests/picture.py
"""

import json
import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

from data.make_tiny_corpus import floor  # noqa: E402
from tinygpt_helpers import (  # noqa: E402
    AttentionRecorder,
    load_checkpoint,
    load_corpus,
    split_corpus,
)

TWICE = re.compile(r' put an? (\w+) (\w+) in .* "The \1 \2!"$')  # a colour and a thing


def recalling_head(maps, text, words):
    """The (layer, head) that looks at the first mention of words most, when they are due again.

    maps: (n_layers, n_heads, T, T), attention over the text; each word stands in it twice.
    """
    score = 0
    for word in words:
        first, due = text.index(word), text.rindex(word) - 1
        score = score + maps[:, :, due, first : first + len(word)].sum(-1)
    return divmod(score.argmax().item(), maps.size(1))


def main():
    state = load_checkpoint(ROOT / "data" / "tiny_model.pt")
    model, tokenizer = state["model"].eval(), state["tokenizer"]
    diary = json.loads((ROOT / "data" / "tiny_model.json").read_text(encoding="utf-8"))
    val_text = split_corpus(load_corpus(), by_line=True)[1]
    story = min((s for s in val_text.splitlines() if TWICE.search(s)), key=len)
    text = "\n" + story
    ending = text.rindex(". ") + 1
    recorder = AttentionRecorder()
    model(torch.tensor([tokenizer.encode(text)]), recorder)
    maps = recorder.weights
    layer, head = recalling_head(maps[:, 0], text, TWICE.search(text).groups())
    rows = maps[layer, 0, head, ending + 1 :].detach()  # the last sentence reads the story

    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 7), layout="constrained",
                                          height_ratios=[1, 1.1])
    losses = torch.tensor(diary["train_loss"])
    above.plot(losses, color="C0", alpha=0.25, linewidth=0.6)
    smooth = losses.unfold(0, 50, 1).mean(1)
    above.plot(range(49, len(losses)), smooth, color="C0", label="training")
    above.plot(diary["step"], diary["story_loss"], "o--", color="C1", label="validation")
    bound = floor(val_text)
    above.axhline(bound, color="black", linestyle=":", label=f"floor of the text, {bound:.2f}")
    above.set(xlabel="step", ylabel="loss (nats per character)", ylim=(0, None),
              title="From a blind guess towards the floor")
    above.legend()
    letters = [{" ": "␣", "\n": "↵"}.get(ch, ch) for ch in text]
    image = below.imshow(rows, cmap="viridis", aspect="auto")
    below.set_xticks(range(len(letters)), letters, fontsize=7)
    below.set_yticks(range(len(rows)), letters[ending + 1 :], fontsize=7)
    below.tick_params(length=0)
    below.set(xlabel="looked at: the whole story", ylabel="looking: its last words",
              title=f"One head looks back over the story (layer {layer}, head {head})")
    figure.colorbar(image, ax=below, label="attention weight")
    target = ROOT / "notebooks" / "images" / "overview.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    print(f"wrote {target.relative_to(ROOT)}: {story}")


if __name__ == "__main__":
    main()
