"""Draw the README's picture, notebooks/images/overview.png, from the model that the course ships.

    make picture        # or: python tests/picture.py
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
matplotlib.use("Agg")

from make_tiny_corpus import floor  # noqa: E402, I001
from tinygpt_helpers import load_checkpoint, load_corpus, split_corpus  # noqa: E402


def sharpest_head(maps):
    """The (layer, head) that looks far back most decidedly: maps is (n_layers, n_heads, T, T)."""
    far = maps.tril(-12)  # leave out the neighbours, where every model looks
    score = far.amax(-1).mean(-1)  # (n_layers, n_heads)
    return divmod(score.argmax().item(), maps.size(1))


def main():
    state = load_checkpoint(ROOT / "data" / "tiny_model.pt")
    model, tokenizer, history = state["model"].eval(), state["tokenizer"], state["history"]
    val_text = split_corpus(load_corpus(), by_line=True)[1]
    story = min((s for s in val_text.splitlines() if " put " in s), key=len)
    _, maps = model(torch.tensor([tokenizer.encode("\n" + story)]), return_attention=True)
    layer, head = sharpest_head(maps[:, 0].detach())

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained",
                                         width_ratios=[1, 1.05])
    losses = torch.tensor(history["train_loss"])
    left.plot(losses, color="C0", alpha=0.25, linewidth=0.6)
    left.plot(range(49, len(losses)), losses.unfold(0, 50, 1).mean(1), color="C0", label="training")
    left.plot(history["val_step"], history["val_loss"], "o--", color="C1", label="validation")
    bound = floor(val_text)
    left.axhline(bound, color="black", linestyle=":", label=f"floor of the text, {bound:.2f}")
    left.set(xlabel="step", ylabel="loss (nats per character)", ylim=(0, None),
             title="From a blind guess towards the floor")
    left.legend()
    letters = [{" ": "␣", "\n": "↵"}.get(ch, ch) for ch in "\n" + story]
    image = right.imshow(maps[layer, 0, head].detach(), cmap="viridis", vmin=0, vmax=1)
    every = range(0, len(letters))
    right.set_xticks(every, letters, fontsize=4)
    right.set_yticks(every, letters, fontsize=4)
    right.set(xlabel="looked at", ylabel="looking",
              title=f"A head reads a story (layer {layer}, head {head})")
    figure.colorbar(image, ax=right, label="attention weight", shrink=0.8)
    target = ROOT / "notebooks" / "images" / "overview.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    print(f"wrote {target.relative_to(ROOT)}: {story}")


if __name__ == "__main__":
    main()
