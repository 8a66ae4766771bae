"""The command line and the device: as a learner starts them, and as they are interrupted."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import generate
import tinygpt_helpers as helpers
import train
from tinygpt_helpers import load_checkpoint, load_corpus, pick_device

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"train": train, "generate": generate}
SMALL = ["--batch-size", "4", "--max-len", "16", "--d-model", "16", "--n-heads", "2",
         "--n-layers", "1", "--eval-every", "10", "--device", "cpu"]  # fmt: skip


def start(program, *args, cwd, code=None, encoding="utf-8"):
    """A new process: train.py, generate.py or Python code that may change the module first."""
    script = ["-c", code] if code else [str(ROOT / f"{program}.py")]
    command = [sys.executable, *script, *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONIOENCODING": encoding}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding=encoding)


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command line within this process, in an empty folder: `(exit status, out, err)`."""
    monkeypatch.chdir(tmp_path)

    def call(program, *args):
        capsys.readouterr()
        try:
            status = PROGRAMS[program].main([*map(str, args)])
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


@pytest.mark.parametrize(("program", "options"), [
    ("train", "--corpus --steps --max-len --lr --out --resume --stop-at --device --val-tokens"),
    ("generate", "--checkpoint --prompt --temperature --top-k --top-p --seed"),
])
def test_help(tmp_path, program, options):
    status, out, err = finish(start(program, "--help", cwd=tmp_path))
    assert status == 0 and err == "" and os.listdir(tmp_path) == []
    assert all(option in out for option in options.split())


@pytest.mark.parametrize("args", [["train", "--steps", "many"], ["generate", "--loud"],
                                  ["generate", "--top-k", "1.5"], ["train", "--precision", "int8"],
                                  ["train", "dance"]])
def test_a_wrong_option_is_named(call, args):
    status, out, err = call(*args)
    assert status == 2 and out == "" and "error: " in err and args[-1] in err


def test_without_options_it_trains_on_the_courses_own_stories(call):
    args = train.parser.parse_args([])
    assert (args.corpus, args.resume, args.out) == ("tiny", False, None)


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
    for unit in ("nats per token", "per character", "bits per byte"):
        assert unit in printed


def test_the_stories_get_a_report(call, tmp_path):
    status, out, err = call("train", "--steps", 2, "--val-tokens", 9, *SMALL)
    assert status == 0, err
    assert "--val-tokens" not in out  # whole stories are judged, all of them
    assert (tmp_path / "runs" / "tiny" / "loss.png").is_file()
    for word in ("floor", "grammar", "count", "Three of them"):
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
    Path("runs/other-2").mkdir()  # the run of another text, or one that another corpus is called by
    Path("runs/other-2/last.pt").touch()
    parse = train.parser.parse_args
    assert train.open_folder(parse(["--corpus", "small", "--resume"])) == Path("runs/small-2")
    assert train.open_folder(parse(["--corpus", "small", "--resume", "--out", "o"])) == Path("o")


def test_runs_that_start_together_get_folders_of_their_own(call):
    args, gate = train.parser.parse_args(["--corpus", "small"]), threading.Barrier(8)

    def opened(_):
        gate.wait()
        return train.open_folder(args)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(opened, range(8)))
    assert len(folders) == 8 and {str(f) for f in folders} == {
        str(Path("runs") / name) for name in ["small", *(f"small-{n}" for n in range(2, 9))]}


@pytest.mark.parametrize(("option", "fits"), [
    (["--d-model", 32], False), (["--dropout", 0.5], False), (["--seed", 1], False),
    (["--seed", 0], True), (["--max-len", 16], True), ([], True)])
def test_what_is_resumed_keeps_its_sizes_and_its_seed(call, trained, option, fits):
    shutil.copytree(trained[0], "o")
    Path("o/.last.pt.4321.tmp").touch()  # of a process that was killed
    before = Path("o/last.pt").read_bytes()
    status, _, err = call("train", "--corpus", trained[1], "--steps", 32, "--device", "cpu",
                          "--batch-size", 4, "--out", "o", "--resume", *option)
    if fits:
        assert status == 0 and load_checkpoint("o/last.pt")["step"] == 32, err
        assert not list(Path("o").glob("*.tmp"))
    else:
        assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
        assert str(option[1]) in err and Path("o/last.pt").read_bytes() == before


def test_validation_stops_at_val_tokens_and_says_so(call, tmp_path):
    corpus, seen = small_corpus(tmp_path), []
    args = ["train", "--corpus", corpus, "--steps", 1, *SMALL]
    for n in (100, 0, 300):
        status, out, err = call(*args, "--val-tokens", n)
        assert status == 0, err
        seen.append(out.count("--val-tokens"))
        assert ("100 of 300 tokens" in out) == (n == 100)
    assert seen == [1, 0, 0]


def test_a_terminal_that_cannot_show_a_character_gets_another(tmp_path):
    (tmp_path / "c.txt").write_text("мама мыла раму\n" * 100, encoding="utf-8")
    for args in (["train", "--corpus", "c.txt", "--steps", 1, "--out", "o", *SMALL],
                 ["generate", "--checkpoint", "o/best.pt", "--prompt", "мама"]):
        process = start(*args, cwd=tmp_path, encoding="cp1252")
        status, out, err = finish(process)
        assert status == 0 and err == ""
    assert out.startswith("????")


def test_nothing_that_was_trained_is_overwritten(call, trained):
    out, corpus, _ = trained
    before = {path: path.read_bytes() for path in out.iterdir()}
    status, _, err = call("train", "--corpus", corpus, "--steps", 1, "--out", out, *SMALL)
    assert status == 1 and err.startswith("error: ") and "--resume" in err
    assert str(out) in err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_characters_that_only_the_validation_text_has_are_left_out(call, tmp_path):
    (tmp_path / "odd.txt").write_text("abc " * 250 + "xyzx", encoding="utf-8")
    status, out, err = call("train", "--corpus", "odd.txt", "--steps", 1, "--out", "o", *SMALL)
    assert status == 0, err
    assert load_checkpoint("o/last.pt")["tokenizer"].vocab_size == 4


@pytest.mark.parametrize(("best", "args", "expected"), [
    (torch.bfloat16, [], torch.bfloat16), (torch.float32, [], torch.float32),
    (torch.bfloat16, ["--precision", "float32"], torch.float32),
    (torch.float32, ["--precision", "bfloat16"], torch.bfloat16),
])
def test_it_learns_in_the_precision_that_is_asked_for_or_the_best(
        call, tmp_path, monkeypatch, best, args, expected):
    seen, learn, here = [], helpers.train, torch.device("cpu:0")
    monkeypatch.setattr(helpers, "pick_precision", lambda device: best if device == here else 0)
    monkeypatch.setattr(helpers, "pick_device", lambda name: here)
    monkeypatch.setattr(helpers, "train", lambda *a, **k: (seen.append(k["precision"]),
                                                           learn(*a, **k))[1])
    status, out, err = call("train", "--corpus", small_corpus(tmp_path), "--steps", 2, *args,
                            *SMALL)
    assert status == 0, err
    assert seen == [expected] and f"on cpu:0 ({expected})" in out


def test_a_text_of_one_line_is_written_on_as_the_last_line_says(call, tmp_path):
    (tmp_path / "line.txt").write_text("the cat and the hat " * 60, encoding="utf-8")
    status, out, err = call("train", "--corpus", "line.txt", "--steps", 2, *SMALL)
    assert status == 0, err
    advice = shlex.split(out.splitlines()[-1])
    assert advice[:2] == [sys.executable, "generate.py"]
    status, out, err = call("generate", *advice[2:], "--max-new-tokens", 5)
    assert status == 0 and len(out) == 1 + 5 + 1, err


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(call, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(helpers, "validate_and_save", interrupted)
    status, out, err = call("train", "--corpus", small_corpus(tmp_path), "--steps", 2, *SMALL)
    assert (status, err, os.listdir("runs")) == (1, "\nStopped.\n", [])


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
    results = [finish(process) for process in [start(*args, cwd=tmp_path) for _ in "12"]]
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
    "an empty prompt": ("generate --checkpoint good.pt --prompt ''", "T at least 1"),
    "below zero": ("generate --checkpoint good.pt --temperature -1", "temperature is -1"),
    "no number": ("generate --checkpoint good.pt --temperature nan", "temperature is nan"),
    "no token left": ("generate --checkpoint good.pt --top-k 0", "top_k is 0"),
    "more than all": ("generate --checkpoint good.pt --top-p 2", "top_p is 2"),
    "fewer than none": ("generate --checkpoint good.pt --max-new-tokens -1", "tokens is -1"),
    "no such device": ("generate --checkpoint good.pt --device gpu", "'gpu' is not known"),
    "no such corpus": ("train --corpus nowhere.txt --out o", "nowhere.txt"),
    "an old encoding": ("train --corpus latin.txt --out o", "latin.txt' is not UTF-8"),
    "an empty corpus": ("train --corpus empty.txt --out o", "is empty"),
    "a short corpus": ("train --corpus short.txt --out o --max-len 64 --device cpu", "too few"),
    "nothing to resume": ("train --corpus small.txt --resume --device cpu", "last.pt"),
    "a file for a folder": ("train --corpus small.txt --out small.txt --device cpu", "small.txt"),
    "no step": ("train --corpus small.txt --out o --steps 0", "steps is 0"),
    "no batch": ("train --corpus small.txt --out o --batch-size 0", "batch_size is 0"),
    "no validation": ("train --corpus small.txt --out o --eval-every 0", "eval_every is 0"),
    "heads that do not divide": ("train --corpus small.txt --out o --n-heads 7", "n_heads=7"),
    "no head": ("train --corpus small.txt --out o --n-heads 0", "n_heads=0"),
    "no window": ("train --corpus small.txt --out o --max-len 0", "max_len=0"),
    "less than no window": ("train --corpus small.txt --out o --max-len -5", "max_len=-5"),
    "a model that cannot read": ("generate --checkpoint mute.pt", "mute.pt' holds no tokenizer"),
    "all dropped out": ("train --corpus small.txt --out o --dropout 2", "2"),
    "no dropout": ("train --corpus small.txt --out o --dropout nan", "dropout=nan"),
    "no time": ("train --corpus small.txt --out o --max-seconds nan", "max_seconds is nan"),
    "far too wide": ("train --corpus small.txt --out o --d-model 99999999999", "memory"),
    "far too deep": ("train --corpus small.txt --out o --n-layers 99999999999", "memory"),
    "far too long": ("train --corpus small.txt --out o --max-len 99999999999", "too few"),
    "far too many": ("train --corpus small.txt --out o --batch-size 99999999999", "memory"),
    "a window too long": ("train --out o --max-len 994000", "too few"),
    "nothing to judge on": ("train --corpus small.txt --out o --val-tokens 1", "--val-tokens 1"),
    "less than nothing": ("train --corpus small.txt --out o --val-tokens -1", "--val-tokens -1"),
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
    args = ["--corpus", str(corpus), "--steps", "100000", "--lr", "0.002", "--out", "my o", *SMALL]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        process = start("train", *args, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    last = tmp_path / "my o" / "last.pt"
    wait_for(lambda: last.exists() and load_checkpoint(last)["step"] >= 10, process)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status not in (0, None) and "Traceback" not in err
    checkpoint = load_checkpoint(last)
    assert checkpoint["step"] >= 10 and checkpoint["step"] == len(
        checkpoint["history"]["train_loss"])
    # the command that it prints goes on with the same run: same corpus, steps, rate, all
    (advice,) = [line.strip() for line in err.splitlines() if "--resume" in line]
    python, program, *rest = shlex.split(advice)
    assert (python, program) == (sys.executable, "train.py")
    parse = train.parser.parse_args
    assert vars(parse(rest)) == vars(parse([*args, "--resume"]))


HALF_WRITTEN = """
import sys, time
import tinygpt_helpers as helpers, train

def halt(file):  # the data is in the temporary file, which has not got its name yet
    print("in the middle", flush=True)
    time.sleep(300)

def save(path, model, *args, **options):
    if options["step"] == 20 and path.name == name:
        helpers.os.fsync = halt
    old_save(path, model, *args, **options)

name, *args = sys.argv[1:]
old_save, helpers.save_checkpoint = helpers.save_checkpoint, save
train.main(args)
"""


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(call, tmp_path, name):
    args = ["--corpus", small_corpus(tmp_path), "--out", "o", *SMALL, "--steps"]
    process = start("", name, *args, 1000, cwd=tmp_path, code=HALF_WRITTEN)
    assert "in the middle\n" in iter(process.stdout.readline, ""), process.communicate()
    process.kill()  # no chance to tidy up
    finish(process)
    assert len(list(Path("o").glob(".*.tmp"))) == 1
    saved = {p.name: load_checkpoint(p) for p in Path("o").glob("*.pt")}
    assert saved[name]["step"] == 10 and set(saved) == {"best.pt", "last.pt"}
    status, _, err = call("train", *args, 30, "--resume")  # and the run goes on
    assert status == 0 and load_checkpoint("o/last.pt")["step"] == 30, err
    assert sorted(os.listdir("o")) == ["best.pt", "last.pt", "loss.png"]


# ---------------------------------------------------------------- devices


def test_the_cpu_is_chosen_without_waking_the_gpu(monkeypatch):
    def forbidden(*args):
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "_lazy_init", "init", "device_count"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cpux", "CUDA", "tpu:0"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is not known; choose"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_here_is_named(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"'{name}' was asked for.*use 'cpu'"):
        pick_device(name)


@pytest.mark.parametrize(("cuda", "mps", "best"), [(True, True, "cuda"), (True, False, "cuda"),
                                                   (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_that_there_is(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device() == torch.device(best)
