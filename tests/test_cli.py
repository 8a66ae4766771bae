"""The command line and the device: as a learner starts them, and as they are interrupted."""

import io
import itertools
import math
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import pytest
import torch

import tinygpt_helpers as tiny
import train
from tinygpt_helpers import load_checkpoint, pick_device

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--batch-size", 4, "--max-len", 16, "--d-model", 16, "--n-heads", 2, "--n-layers", 1,
         "--eval-every", 10, "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """Where each test runs; small.txt, to learn from, is all that is there."""
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text(tiny.load_corpus()[:3000], encoding="utf-8")


def call(program, *args, encoding="utf-8"):
    """The command line within this process: `(exit status, out, err)`."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, newline="\n") for _ in ("out", "err")]
    argv = [f"{program}.py", *map(str, args)]
    with patch("sys.argv", argv), redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        if isinstance(status, str):  # what Python itself does with such an end
            print(status, file=sys.stderr)
            status = 1
        plt.close("all")
        for stream in streams:
            stream.flush()
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in streams)


def learn(*args):
    """train.py on small.txt, which is to end well: what it prints."""
    status, out, err = call("train", "--corpus", "small.txt", *args)
    assert status == 0, err
    return out


def start(*command):
    """A new process of Python."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONUTF8": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **pipes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 30 steps: `(its folder, what it printed)`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.txt").write_text(tiny.load_corpus()[:3000], encoding="utf-8")
    return folder / "o", learn("--corpus", folder / "c.txt", "--steps", 30, "--dropout", 0.2,
                               "--seed", 5, "--out", folder / "o", *SMALL)


@pytest.mark.parametrize(("program", "options"), [
    ("train", "--corpus --steps --max-len --lr --out --resume --stop-at --device --val-tokens"),
    ("generate", "--checkpoint --prompt --temperature --top-k --top-p --seed")])
def test_help(program, options):
    status, out, err = call(program, "--help")
    assert status == 0 and err == "" and os.listdir() == ["small.txt"]
    assert all(option in out for option in options.split())


@pytest.mark.parametrize("args", ["train --steps many", "generate --loud", "train dance",
                                  "generate --top-k 1.5", "train --stop-at 2.5",
                                  "train --precision int8"])
def test_a_wrong_option_is_named(args):
    status, out, err = call(*args.split())
    assert status == 2 and out == "" and "error: " in err and args.split()[-1] in err


def test_a_run_leaves_two_checkpoints_and_a_picture(trained):
    out, printed = trained
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "loss.png"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    last = load_checkpoint(out / "last.pt")
    assert last["step"] == 30 and len(last["history"]["train_loss"]) == 30
    assert last["history"]["val_step"] == [0, 10, 20, 30]
    config = dict(d_model=16, n_heads=2, n_layers=1, max_len=16, dropout=0.2)
    assert last["config"].items() >= config.items()
    assert last["tokenizer"].vocab_size == len(set(tiny.load_corpus()[:2700]))
    assert "2,700 characters" in printed and "step 30  loss" in printed
    loss = last["history"]["val_loss"][-1]
    assert (f"{loss:.3f} nats per token, {loss:.3f} per character, {loss / math.log(2):.3f} bits "
            "per byte") in printed  # a token is a character, and that a byte


def test_without_a_text_it_learns_from_the_stories_and_reports_on_them():
    status, out, err = call("train", "--steps", 2, "--val-tokens", 9, *SMALL)
    assert status == 0 and Path("runs/tiny/loss.png").is_file(), err
    n_val = f"{len(tiny.split_corpus(tiny.load_corpus(), by_line=True)[1]):,}"
    for words in ("floor", "grammar", "count", "Three of them", f"{n_val} of {n_val}"):
        assert words in out  # whole stories are judged, all of them


def test_each_run_has_a_folder_of_its_own():
    for _ in range(2):
        learn("--steps", 1, *SMALL)
    assert sorted(os.listdir("runs")) == ["small", "small-2"]
    for other in ("other-2", "small-town", "smaller"):  # the runs of other texts
        Path("runs", other).mkdir()
        Path("runs", other, "last.pt").touch()
    learn("--steps", 3, "--resume", *SMALL)
    first, second = (Path("runs", name, "last.pt") for name in ("small", "small-2"))
    assert [load_checkpoint(last)["step"] for last in (first, second)] == [1, 3]  # the newest
    learn("--steps", 2, "--resume", "--out", first.parent, *SMALL)
    assert [load_checkpoint(last)["step"] for last in (first, second)] == [2, 3]  # the one named
    before = {path: path.read_bytes() for path in first.parent.iterdir()}
    status, _, err = call("train", "--corpus", "small.txt", "--out", first.parent, *SMALL)
    assert status == 1 and err.startswith(f"error: {first.parent} is there: --resume")
    assert {path: path.read_bytes() for path in first.parent.iterdir()} == before


@pytest.mark.parametrize(("out", "owners"), [(None, 8), (Path("new"), 1)])
def test_of_runs_that_start_together_no_two_get_one_folder(out, owners):
    gate = threading.Barrier(8)

    def opened(_):
        gate.wait()
        try:
            return train.new_folder(out, Path("runs/small"))
        except ValueError as error:
            assert "--resume, or another --out" in str(error)

    with ThreadPoolExecutor(8) as pool:
        folders = [folder for folder in pool.map(opened, range(8)) if folder]
    assert len(folders) == len(set(folders)) == owners
    if not out:
        names = {"small", *(f"small-{n}" for n in range(2, 9))}
        assert {folder.name for folder in folders} == names


@pytest.mark.parametrize(("option", "fits"), [
    ("--d-model 32", False), ("--dropout 0.5", False), ("--seed 1", False), ("--seed 5", True),
    ("--max-len 16", True), ("--stop-at 32 --steps 40", True), ("", True)])
def test_what_is_resumed_keeps_its_sizes_and_its_seed(trained, option, fits):
    shutil.copytree(trained[0], "o")
    Path("o/.last.pt.4321.tmp").touch()  # of a process that was killed
    before = Path("o/last.pt").read_bytes()
    status, _, err = call("train", "--corpus", "small.txt", "--steps", 32, "--device", "cpu",
                          "--batch-size", 4, "--out", "o", "--resume", *option.split())
    if fits:
        assert status == 0 and load_checkpoint("o/last.pt")["step"] == 32, err
        assert not list(Path("o").glob(".*"))
    else:
        assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
        assert option.split()[1] in err and Path("o/last.pt").read_bytes() == before


@pytest.mark.parametrize(("n", "used"), [(100, 100), (0, 300), (-5, 300), (10**6, 300)])
def test_validation_stops_at_val_tokens_and_says_so(monkeypatch, n, used):
    seen, real = [], tiny.evaluate
    monkeypatch.setattr(tiny, "evaluate", lambda model, ids: seen.append(ids) or real(model, ids))
    out = learn("--steps", 1, "--val-tokens", n, *SMALL)
    assert f"{used} of 300" in out
    assert {len(ids) for ids in seen} == {used}


def test_a_terminal_that_cannot_show_a_character_gets_another():
    Path("c.txt").write_text("мама мыла раму\n" * 100, encoding="utf-8")
    for args in (["train", "--corpus", "c.txt", "--steps", 1, "--out", "мама", *SMALL],
                 ["generate", "--checkpoint", "мама/best.pt", "--prompt", "мама"]):
        status, out, err = call(*args, encoding="cp1252")
        assert status == 0 and err == "" and "????" in out
    assert out.startswith("????")


def test_a_text_of_one_line_that_ends_in_new_characters():
    """They are left out, and the last line that is printed lets the model write."""
    Path("small.txt").write_text("abc " * 250 + "xyzx", encoding="utf-8")
    out = learn("--steps", 2, "--out", "my $o's", *SMALL)
    assert "97 of 101" in out
    assert load_checkpoint("my $o's/last.pt")["tokenizer"].vocab_size == len("abc ")
    advice = shlex.split(out.splitlines()[-1])
    assert advice[:2] == [sys.executable, "generate.py"]
    status, out, err = call("generate", *advice[2:], "--max-new-tokens", 5)
    assert status == 0 and len(out) == 1 + 5 + 1, err


@pytest.mark.parametrize(("best", "args", "expected"), [
    (torch.bfloat16, [], torch.bfloat16), (torch.float32, [], torch.float32),
    (torch.bfloat16, ["--precision", "float32"], torch.float32),
    (torch.float32, ["--precision", "bfloat16"], torch.bfloat16)])
def test_the_precision_that_is_asked_for_or_the_best(monkeypatch, best, args, expected):
    seen, real, here = set(), tiny.train, torch.device("cpu:0")
    monkeypatch.setattr(tiny, "pick_precision", lambda device: best if device == here else 0)
    monkeypatch.setattr(tiny, "pick_device", lambda name: here)
    monkeypatch.setattr(tiny, "train", lambda *a, **k: seen.add(k["precision"]) or real(*a, **k))
    assert f"weights; cpu:0, {expected}" in learn("--steps", 2, *args, *SMALL)
    assert seen == {expected}


def test_time_is_up():
    learn("--steps", 5000, "--max-seconds", 0.3, "--out", "o", *SMALL)
    assert 0 < load_checkpoint("o/last.pt")["step"] < 5000 and Path("o/loss.png").is_file()


def test_a_run_resumed_in_a_new_process_is_the_same_run(trained):
    args = ["--corpus", "small.txt", "--steps", 30, "--dropout", 0.2, "--out", "parts", *SMALL]
    learn(*args, "--seed", 5, "--stop-at", 20)
    assert load_checkpoint("parts/last.pt")["step"] == 20
    process = start(ROOT / "train.py", *args, "--resume")
    assert process.communicate()[1] == "" and process.returncode == 0
    one, two = (load_checkpoint(folder / "last.pt") for folder in (trained[0], Path("parts")))
    assert one["history"] == two["history"] and len(one["history"]["train_loss"]) == 30
    weights = zip(one["model"].parameters(), two["model"].parameters())
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_trained_model_writes_on_from_the_prompt_in_any_process(trained):
    args = ["--checkpoint", trained[0] / "best.pt", "--prompt", "the cat", "--seed", 7,
            "--max-new-tokens", 40, "--device", "cpu"]  # fmt: skip
    process = start(ROOT / "generate.py", *args)
    out, err = process.communicate()
    assert (process.returncode, out, err) == call("generate", *args)
    assert (process.returncode, err, len(out)) == (0, "", 48) and out.startswith("the cat")
    assert os.listdir() == ["small.txt"]


def test_seed_temperature_and_cuts_reach_the_sampler(trained):
    base = ["generate", "--checkpoint", trained[0] / "best.pt", "--prompt", "a", "--device", "cpu"]
    hot = [call(*base, "--temperature", 3, "--seed", seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2] and len(hot[0][1]) == 202
    greedy = call(*base, "--temperature", 0)
    assert greedy[0] == 0
    for cut in (["--top-k", 1], ["--top-p", 1e-6], ["--temperature", 0, "--seed", 5]):
        assert call(*base, *cut) == greedy
    assert call(*base, "--temperature", 0, "--max-new-tokens", 3)[1] == greedy[1][:4] + "\n"


def test_the_newest_model_writes_if_none_is_named(trained):
    content = (trained[0] / "best.pt").read_bytes()
    for name, age in [("old", 100), ("new", 0), ("older", 200)]:
        path = Path("runs", name, "best.pt")
        path.parent.mkdir(parents=True)
        path.write_bytes(content if name == "new" else b"not this one")
        os.utime(path, (time.time() - age,) * 2)
    status, out, err = call("generate", "--device", "cpu")
    assert status == 0 and out.startswith("\n"), err


# ---------------------------------------------------------------- errors: one line, no traceback

WRONG = {
    "train --corpus small.txt --out o --device cpu": {
        "--corpus nowhere.txt": "nowhere.txt", "--corpus latin.txt": "latin.txt' is not UTF-8",
        "--corpus empty.txt": "is empty", "--corpus short.txt --max-len 64": "no window of 64",
        "--corpus tiny --max-len 994000": "no window", "--max-len 99999999999": "no window",
        "--resume": "last.pt", "--out small.txt": "small.txt", "--steps 0": "steps is 0",
        "--batch-size 0": "batch_size is 0", "--eval-every 0": "eval_every is 0", "--lr -1": "-1",
        "--max-seconds nan": "max_seconds is nan", "--n-heads 7": "n_heads=7",
        "--n-heads 0": "n_heads=0", "--max-len 0": "max_len=0", "--max-len -5": "max_len=-5",
        "--dropout 2": "dropout=2", "--dropout nan": "dropout=nan", "--stop-at -1": "stop_at is -1",
        f"--n-layers {10**11}": "memory", f"--d-model {3 * 10**11}": "memory",
        f"--batch-size {10**11}": "memory", f"--batch-size {10**20}": "'size'",
        "--val-tokens 1": "1 tokens are too few"},
    "train --corpus small.txt": {"--resume": "last.pt"},
    "generate": {"": "there is no best.pt in runs/*", "--checkpoint none.pt": "none.pt",
                 "--checkpoint half.pt": "half.pt", "--checkpoint small.txt": "small.txt",
                 "--checkpoint mute.pt": "mute.pt' holds no tokenizer"},
    "generate --checkpoint good.pt": {
        "--prompt xΩ": "character 'Ω'", "--prompt ''": "T > 0", "--top-k 0": "top_k is 0",
        "--temperature -1": "temperature is -1", "--temperature nan": "temperature is nan",
        "--top-p 2": "top_p is 2", "--device gpu": "no device 'gpu'",
        "--max-new-tokens -1": "tokens is -1", f"--max-new-tokens {10**20}": "long"}}


@pytest.mark.parametrize(("command", "option"), [
    (command, option) for command, options in WRONG.items() for option in options])
def test_an_error_is_one_line(trained, command, option):
    best = (trained[0] / "best.pt").read_bytes()
    files = {"good.pt": best, "half.pt": best[:5000], "empty.txt": b"",
             "latin.txt": "naïve".encode("latin-1") * 50, "short.txt": b"Too short.\n" * 3}
    for name, data in files.items():
        Path(name).write_bytes(data)
    tiny.save_checkpoint("mute.pt", tiny.TinyGPT(5, 8, 2, 1, 8))
    before = sorted(os.listdir())
    status, out, err = call(*shlex.split(f"{command} {option}"))
    assert status == 1 and err.startswith("error: ") and WRONG[command][option] in err
    assert len(err.splitlines()) == 1, err
    assert sorted(os.listdir()) == before  # no folder that would be in the way of the next try


def test_where_nothing_may_be_written_the_option_that_helps_is_named(monkeypatch):
    def shut(folder, **_):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "mkdir", shut)
    status, _, err = call("train", "--corpus", "small.txt", "--steps", 2, *SMALL)
    assert status == 1 and len(err.splitlines()) == 1
    assert "Permission denied: 'runs" in err and "--out names another folder" in err


def test_a_loss_that_explodes_is_one_line_and_the_files_stay():
    status, _, err = call("train", "--corpus", "small.txt", "--steps", 50, "--lr", 1e30, "--out",
                          "o", *SMALL)
    assert status == 1 and err.startswith("error: step ") and len(err.splitlines()) == 1
    assert all(p.isfinite().all() for p in load_checkpoint("o/last.pt")["model"].parameters())


@pytest.mark.parametrize(("at", "call_number"), [("validate_and_save", 1), ("train_step", 16)])
def test_ctrl_c_keeps_what_was_learned_and_says_how_to_go_on(monkeypatch, at, call_number):
    """Before the first checkpoint there is nothing to keep, and no folder is left."""
    original, calls = getattr(tiny, at), itertools.count(1)

    def ctrl_c(*args, **options):
        if next(calls) == call_number:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(tiny, at, ctrl_c)
    args = ["--corpus", "small.txt", "--steps", "100", "--lr", "0.002", *map(str, SMALL)]
    status, _, err = call("train", *args)
    assert status == 1
    if at == "validate_and_save":
        assert (err, os.listdir("runs")) == ("\nStopped.\n", [])
        return
    checkpoint = load_checkpoint("runs/small/last.pt")
    assert checkpoint["step"] == 10 == len(checkpoint["history"]["train_loss"])
    # the command that it prints goes on with the same run: same corpus, steps, rate, all
    python, program, *rest = shlex.split(err.splitlines()[-1])
    assert (python, program) == (sys.executable, str(ROOT / "train.py"))
    parse = train.parser.parse_args
    assert vars(parse(rest)) == vars(parse([*args, "--resume", "--out", "runs/small"]))


HALT = """import itertools, os, sys, time, train
writes, at = itertools.count(1), int(sys.argv.pop(1))

def fsync(file):  # the data is in the temporary file, which has not got its name yet
    if next(writes) == at:
        print("in the middle", flush=True)
        time.sleep(300)

os.fsync = fsync
train.main(train.parser.parse_args())
"""


def test_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before():
    runs = {}
    for name, at in {"best.pt": 5, "last.pt": 6}.items():  # those of step 20
        args = ["--corpus", "small.txt", "--out", name[:4], *SMALL, "--steps"]
        runs[name] = Path(name[:4]), args, start("-c", HALT, at, *args, 1000)
    for name, (folder, args, process) in runs.items():
        assert "in the middle\n" in iter(process.stdout.readline, ""), process.communicate()
        process.kill()  # no chance to tidy up
        process.communicate()
        assert len(list(folder.glob(f".{name}.{process.pid}.tmp"))) == 1
        steps = {path.name: load_checkpoint(path)["step"] for path in folder.glob("*.pt")}
        assert steps == {"best.pt": 20, "last.pt": 10} | {name: 10}
        learn(*args, 30, "--resume")  # and the run goes on
        assert load_checkpoint(folder / "last.pt")["step"] == 30
        assert sorted(os.listdir(folder)) == ["best.pt", "last.pt", "loss.png"]


@pytest.mark.parametrize(("cuda", "mps", "asked", "expected"), [
    (True, True, None, "cuda"), (True, False, None, "cuda"), (False, True, None, "mps"),
    (False, False, None, "cpu"), (True, True, "cpu", "cpu"), (True, True, "cuda:1", "cuda:1"),
    (False, True, "cuda", "here: 'cpu' always"), (False, True, "cuda:1", "here: 'cpu' always"),
    (True, False, "mps", "here: 'cpu' always"), (True, True, "gpu", "here: 'cpu' always"),
    (True, True, "cpux", "here: 'cpu' always"), (True, True, "CUDA", "here: 'cpu' always"),
    (True, True, "tpu:0", "here: 'cpu' always")])
def test_the_device_that_is_asked_for_or_the_best(monkeypatch, cuda, mps, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if " " not in expected:
        assert pick_device(asked) == torch.device(expected)
        return
    with pytest.raises(ValueError, match=f"no device '{asked}' {expected}"):
        pick_device(asked)


def test_the_cpu_is_chosen_without_waking_the_gpu(monkeypatch):
    for name in ("is_available", "_lazy_init", "init", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("CUDA was touched"))
    assert pick_device("cpu") == torch.device("cpu")
