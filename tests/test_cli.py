"""The command line and the device: as a learner starts them, and as they are interrupted."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import tinygpt_helpers as helpers
from tinygpt_helpers import load_checkpoint, load_corpus, main, pick_device

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tinygpt_helpers.py"
SMALL = ["--batch-size", "4", "--max-len", "16", "--d-model", "16", "--n-heads", "2",
         "--n-layers", "1", "--eval-every", "10", "--device", "cpu"]  # fmt: skip


def start(*args, cwd, code=None):
    """A new process: the command line, or Python code that may change the module first."""
    command = [sys.executable, *(["-c", code] if code else [str(PROGRAM)]), *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8")


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command line within this process, in an empty folder: `(exit status, out, err)`."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        capsys.readouterr()
        try:
            status = main([*map(str, args)])
        except SystemExit as end:
            status = end.code
        if isinstance(status, str):  # what Python itself does with such an end
            print(status, file=sys.stderr)
            status = 1
        return status or 0, *capsys.readouterr()

    yield call
    plt.close("all")


def small_corpus(folder):
    path = folder / "small.txt"
    path.write_text(load_corpus()[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 30 steps in a process of its own: `(folder, corpus, stdout)`."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = small_corpus(folder)
    process = start("train", "--corpus", corpus, "--steps", 30, "--out", "out", *SMALL, cwd=folder)
    status, out, err = finish(process)
    assert status == 0, err
    return folder / "out", corpus, out


# ---------------------------------------------------------------- help


def test_help_in_a_process_of_its_own(tmp_path):
    status, out, err = finish(start("--help", cwd=tmp_path))
    assert status == 0 and err == "" and os.listdir(tmp_path) == []
    assert "train a model on a text" in out and "let a trained model write" in out


@pytest.mark.parametrize(
    ("command", "options"),
    [("train", ["--corpus", "--steps", "--lr", "--out", "--resume", "--stop-at", "--device",
                "--precision"]),
     ("generate", ["--checkpoint", "--prompt", "--temperature", "--top-k", "--top-p", "--seed"])],
)
def test_help_of_a_command(call, command, options):
    status, out, _ = call(command, "--help")
    assert status == 0 and all(option in out for option in options)


def test_the_help_says_where_the_options_are(call):
    assert "'train --help' and 'generate --help'" in " ".join(call("--help")[1].split())


@pytest.mark.parametrize("args", [["dance"], ["train", "--steps", "many"], ["--corpus", "x"],
                                  ["generate", "--loud"], ["generate", "--top-k", "1.5"],
                                  ["train", "--precision", "int8"]])
def test_a_wrong_option_is_named(call, args):
    status, out, err = call(*args)
    assert status == 2 and out == "" and "error: " in err and args[-1] in err


def test_without_a_command_it_trains_on_the_courses_own_stories(call, monkeypatch):
    seen = []
    monkeypatch.setattr(helpers, "train_command", seen.append)
    assert call() == (0, "", "")
    assert (seen[0].command, seen[0].corpus, seen[0].resume) == ("train", "tiny", False)


# ---------------------------------------------------------------- train


def test_a_run_leaves_two_checkpoints_and_a_picture(trained):
    out, corpus, printed = trained
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "loss.png"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    last = load_checkpoint(out / "last.pt")
    assert last["step"] == 30 and len(last["history"]["train_loss"]) == 30
    assert last["history"]["val_step"] == [0, 10, 20, 30]
    config = dict(d_model=16, n_heads=2, n_layers=1, max_len=16)
    assert last["config"].items() >= config.items()
    assert last["tokenizer"].vocab_size == len(set(corpus.read_text("utf-8")[:2700]))
    assert "2,700 characters" in printed and "step 30  loss" in printed
    assert str(Path("out") / "best.pt") in printed and "generate" in printed


def test_the_stories_get_a_report(call, tmp_path):
    status, out, err = call("train", "--steps", 2, *SMALL)
    assert status == 0, err
    assert (tmp_path / "runs" / "tiny" / "loss.png").is_file()
    for word in ("floor", "grammar", "count", "I love "):
        assert word in out


def test_each_run_has_a_folder_of_its_own(call, tmp_path):
    corpus = small_corpus(tmp_path)
    for _ in range(2):
        assert call("train", "--corpus", corpus, "--steps", 1, *SMALL)[0] == 0
    assert sorted(os.listdir("runs")) == ["small", "small-2"]
    status, _, err = call("train", "--corpus", corpus, "--steps", 3, "--resume", *SMALL)
    assert status == 0, err
    steps = [load_checkpoint(f"runs/{name}/last.pt")["step"] for name in ("small", "small-2")]
    assert steps == [1, 3]  # the newest went on


def test_nothing_that_was_trained_is_overwritten(call, trained):
    out, corpus, _ = trained
    before = {path: path.read_bytes() for path in out.iterdir()}
    status, _, err = call("train", "--corpus", corpus, "--steps", 1, "--out", out, *SMALL)
    assert status == 1 and err.startswith("error: ") and "holds a run already" in err
    assert str(out) in err and "--resume" in err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_characters_that_only_the_validation_text_has_are_left_out(call, tmp_path):
    (tmp_path / "odd.txt").write_text("abc " * 250 + "xyzx", encoding="utf-8")
    status, out, err = call("train", "--corpus", "odd.txt", "--steps", 1, "--out", "o", *SMALL)
    assert status == 0, err
    assert "4 characters of the validation text" in out
    assert load_checkpoint("o/last.pt")["tokenizer"].vocab_size == 4


@pytest.mark.parametrize(("best", "args", "expected"), [
    (torch.bfloat16, [], torch.bfloat16), (torch.float32, [], torch.float32),
    (torch.bfloat16, ["--precision", "float32"], torch.float32),
    (torch.float32, ["--precision", "bfloat16"], torch.bfloat16),
])
def test_it_learns_in_the_precision_that_is_asked_for_or_the_best(
        call, tmp_path, monkeypatch, best, args, expected):
    seen, train, here = [], helpers.train, torch.device("cpu:0")
    monkeypatch.setattr(helpers, "pick_precision", lambda device: best if device == here else 0)
    monkeypatch.setattr(helpers, "pick_device", lambda name: here)
    monkeypatch.setattr(helpers, "train", lambda *a, **k: (seen.append(k["precision"]),
                                                           train(*a, **k))[1])
    status, out, err = call("train", "--corpus", small_corpus(tmp_path), "--steps", 2, *args,
                            *SMALL)
    assert status == 0, err
    assert seen == [expected] and f"on cpu:0 ({expected})" in out


def test_a_text_of_one_line_is_written_on_as_the_last_words_say(call, tmp_path):
    (tmp_path / "line.txt").write_text("the cat and the hat " * 60, encoding="utf-8")
    status, out, err = call("train", "--corpus", "line.txt", "--steps", 2, *SMALL)
    assert status == 0, err
    advice = shlex.split(out.splitlines()[-1])
    assert advice[:3] == ["python", "tinygpt_helpers.py", "generate"]
    status, out, err = call(*advice[2:], "--max-new-tokens", 5)
    assert status == 0 and len(out) == 1 + 5 + 1, err


@pytest.mark.parametrize("where", ["validate_and_save", "plot_loss"])
def test_ctrl_c_before_the_first_checkpoint_or_after_the_last(call, tmp_path, monkeypatch, where):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(helpers, where, interrupted)
    status, out, err = call("train", "--corpus", small_corpus(tmp_path), "--steps", 2, *SMALL)
    assert (status, err) == (1, "\nStopped.\n")


def test_time_is_up(call, tmp_path):
    status, out, err = call("train", "--corpus", small_corpus(tmp_path), "--steps", 5000,
                            "--max-seconds", 0.3, "--out", "o", *SMALL)
    assert status == 0, err
    assert 0 < load_checkpoint("o/last.pt")["step"] < 5000 and Path("o/loss.png").is_file()


def test_a_run_resumed_in_a_new_process_is_the_same_run(call, tmp_path):
    corpus = small_corpus(tmp_path)
    common = ["train", "--corpus", corpus, "--steps", 40, "--dropout", 0.2, *SMALL]
    assert call(*common, "--out", "whole")[0] == 0
    assert call(*common, "--out", "parts", "--stop-at", 20)[0] == 0
    assert load_checkpoint("parts/last.pt")["step"] == 20
    status, _, err = finish(start(*common, "--out", "parts", "--resume", cwd=tmp_path))
    assert status == 0, err
    one, two = (load_checkpoint(f"{name}/last.pt") for name in ("whole", "parts"))
    assert one["history"] == two["history"] and len(one["history"]["train_loss"]) == 40
    weights = zip(one["model"].parameters(), two["model"].parameters())
    assert all(torch.equal(a, b) for a, b in weights)


# ---------------------------------------------------------------- generate


def test_a_trained_model_writes_on_from_the_prompt(trained, tmp_path):
    args = ["generate", "--checkpoint", trained[0] / "best.pt", "--prompt", "the cat",
            "--max-new-tokens", 40, "--seed", 7, "--device", "cpu"]  # fmt: skip
    results = [finish(process) for process in [start(*args, cwd=tmp_path) for _ in range(2)]]
    (status, out, err), again = results
    assert status == 0 and err == "" and again == results[0]
    assert out.startswith("the cat") and len(out.removesuffix("\n")) >= 40
    assert os.listdir(tmp_path) == []


def test_seed_temperature_and_cuts_reach_the_sampler(call, trained):
    base = ["generate", "--checkpoint", trained[0] / "best.pt", "--prompt", "a", "--device", "cpu"]
    hot = [call(*base, "--temperature", 3, "--seed", seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2] and len(hot[0][1]) == 202
    greedy = call(*base, "--temperature", 0)
    assert greedy[0] == 0
    for cut in (["--top-k", 1], ["--top-p", 1e-6], ["--temperature", 0, "--seed", 5]):
        assert call(*base, *cut) == greedy
    assert call(*base, "--temperature", 0, "--max-new-tokens", 3)[1] == greedy[1][:4] + "\n"


def test_the_newest_model_writes_if_none_is_named(call, trained):
    content = (trained[0] / "best.pt").read_bytes()
    for name, age in [("old", 100), ("new", 0)]:
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "best.pt").write_bytes(content if name == "new" else b"not this one")
        os.utime(folder / "best.pt", (time.time() - age,) * 2)
    status, out, err = call("generate", "--prompt", "a", "--device", "cpu")
    assert status == 0 and out.startswith("a"), err


# ---------------------------------------------------------------- errors: one line, no traceback

WRONG = {
    "a checkpoint that is not there": ("generate --checkpoint none.pt", "none.pt"),
    "no model yet": ("generate", "no model in runs/ yet"),
    "a damaged checkpoint": ("generate --checkpoint half.pt", "half.pt"),
    "a text for a checkpoint": ("generate --checkpoint small.txt", "small.txt"),
    "an unknown character": ("generate --checkpoint good.pt --prompt xΩ", "character 'Ω'"),
    "an empty prompt": ("generate --checkpoint good.pt --prompt ''", "at least 1 token"),
    "below zero": ("generate --checkpoint good.pt --temperature -1", "temperature is -1"),
    "no number": ("generate --checkpoint good.pt --temperature nan", "temperature is nan"),
    "no token left": ("generate --checkpoint good.pt --top-k 0", "top_k is 0"),
    "more than all": ("generate --checkpoint good.pt --top-p 2", "top_p is 2"),
    "fewer than none": ("generate --checkpoint good.pt --max-new-tokens -1", "max_new_tokens -1"),
    "no such device": ("generate --checkpoint good.pt --device gpu", "'gpu' is not known"),
    "no such corpus": ("train --corpus nowhere.txt --out o", "nowhere.txt"),
    "an old encoding": ("train --corpus latin.txt --out o", "latin.txt' is not UTF-8"),
    "an empty corpus": ("train --corpus empty.txt --out o", "is empty"),
    "a short corpus": ("train --corpus short.txt --out o --max-len 64 --device cpu", "too few"),
    "nothing to resume": ("train --corpus small.txt --resume --device cpu", "last.pt"),
    "a file for a folder": ("train --corpus small.txt --out small.txt --device cpu", "small.txt"),
    "no step": ("train --corpus small.txt --out o --steps 0", "steps=0"),
    "no batch": ("train --corpus small.txt --out o --batch-size 0", "batch_size=0"),
    "no validation": ("train --corpus small.txt --out o --eval-every 0", "eval_every=0"),
    "heads that do not divide": ("train --corpus small.txt --out o --n-heads 7", "'n_heads': 7"),
    "no head": ("train --corpus small.txt --out o --n-heads 0", "'n_heads': 0"),
    "no window": ("train --corpus small.txt --out o --max-len 0", "'max_len': 0"),
    "less than no window": ("train --corpus small.txt --out o --max-len -5", "'max_len': -5"),
    "a model that cannot read": ("generate --checkpoint mute.pt", "mute.pt' holds no tokenizer"),
    "all dropped out": ("train --corpus small.txt --out o --dropout 2", "2"),
    "uphill": ("train --corpus small.txt --out o --lr -1 --device cpu", "-1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_line(call, trained, case):
    args, words = WRONG[case]
    small_corpus(Path.cwd())
    Path("good.pt").write_bytes((trained[0] / "best.pt").read_bytes())
    Path("half.pt").write_bytes((trained[0] / "best.pt").read_bytes()[:5000])
    helpers.save_checkpoint("mute.pt", helpers.TinyGPT(5, 8, 2, 1, 8))
    Path("latin.txt").write_bytes("naïve".encode("latin-1") * 50)
    Path("empty.txt").touch()
    Path("short.txt").write_text("Too short to learn from, isn't it?\n", encoding="utf-8")
    before = sorted(os.listdir())
    status, out, err = call(*shlex.split(args))
    assert status == 1 and err.startswith("error: ") and words in err
    assert len(err.splitlines()) == 1, err
    assert sorted(os.listdir()) == before  # no folder that would be in the way of the next try


def test_an_error_in_a_process_of_its_own(tmp_path):
    process = start("generate", "--checkpoint", "none.pt", "--prompt", "x", cwd=tmp_path)
    status, out, err = finish(process)
    assert status == 1 and out == "" and "Traceback" not in err
    assert err.startswith("error: ") and "none.pt" in err and len(err.splitlines()) == 1


def test_a_loss_that_explodes_is_one_line_and_the_files_stay(call, tmp_path):
    status, _, err = call("train", "--corpus", small_corpus(tmp_path), "--steps", 50, "--lr", 1e30,
                          "--out", "o", *SMALL)
    assert status == 1 and err.startswith("error: step ") and len(err.splitlines()) == 1
    assert all(p.isfinite().all() for p in load_checkpoint("o/last.pt")["model"].parameters())


# ---------------------------------------------------------------- interrupted


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited a minute for nothing"
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_ctrl_c_keeps_what_was_learned_and_says_how_to_go_on(tmp_path):
    corpus = small_corpus(tmp_path)
    args = ["train", "--corpus", str(corpus), "--steps", "100000", "--lr", "0.002", "--out", "my o",
            *SMALL]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        process = start(*args, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    last = tmp_path / "my o" / "last.pt"
    wait_for(lambda: last.exists() and load_checkpoint(last)["step"] >= 10, process)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status not in (0, None) and "Traceback" not in err and "last.pt" in err
    checkpoint = load_checkpoint(last)
    assert checkpoint["step"] >= 10 and checkpoint["step"] == len(
        checkpoint["history"]["train_loss"])
    # the command that it prints goes on with the same run: same corpus, steps, rate, all
    (advice,) = [line.strip() for line in err.splitlines() if "--resume" in line]
    python, program, *rest = shlex.split(advice)
    assert (python, program) == ("python", "tinygpt_helpers.py")
    parse = helpers.command_line().parse_args
    assert vars(parse(rest)) == vars(parse([*args, "--resume"]))


HALF_WRITTEN = """
import io, sys, time
import tinygpt_helpers as helpers

class Slow(io.FileIO):
    def write(self, data):
        super().write(data[: len(data) // 2])
        print("half is written", flush=True)
        time.sleep(300)

count = 0
def slow_open(path, mode="r", *args):
    global count
    count += "w" in mode and name in str(path)
    return Slow(path, mode) if count == 3 else open(path, mode, *args)

name, *args = sys.argv[1:]
helpers.open = slow_open  # the module's own `open`, before Python's
helpers.main(args)
"""


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, name):
    corpus = small_corpus(tmp_path)
    process = start(name, "train", "--corpus", corpus, "--steps", 1000, "--out", "o", *SMALL,
                    cwd=tmp_path, code=HALF_WRITTEN)  # fmt: skip
    for line in process.stdout:
        if line == "half is written\n":
            break
    assert process.poll() is None, process.communicate()
    process.kill()  # no chance to tidy up
    finish(process)
    saved = {p.name: load_checkpoint(p) for p in (tmp_path / "o").glob("*.pt")}
    # steps 0 and 10 were saved; the file of step 20 got no further than half
    assert saved[name]["step"] == 10 and set(saved) == {"best.pt", "last.pt"}
    model = saved["last.pt"]["model"]
    assert all(weight.isfinite().all() for weight in model.parameters())
    if name == "last.pt":  # and the run goes on
        again = ["train", "--corpus", corpus, "--steps", 30, "--out", tmp_path / "o", "--resume"]
        main([*map(str, again), *SMALL])
        assert load_checkpoint(tmp_path / "o" / "last.pt")["step"] == 30
        plt.close("all")


# ---------------------------------------------------------------- devices


def test_the_cpu_is_chosen_without_waking_the_gpu(monkeypatch):
    def forbidden(*args):
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "_lazy_init", "init", "device_count"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cpux", "CUDA", "tpu:0"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is not known; choose 'cpu', 'cuda' or 'mps'"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_here_is_named(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"'{name[:4].strip(':')}' was asked for.*use 'cpu'"):
        pick_device(name)


@pytest.mark.parametrize(("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"),
                                                   (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_that_there_is(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(best)
