"""Facts about runs that are stopped, killed, resumed, spoilt, or in each other's way."""
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

import quartet
from data import prepare
from data.files import Stopped, atomic_write
from data.signals import BetweenSteps, become_exceptions, raise_stopped
from fp4 import stored_weight
from model import PRESETS, Llama
from test_train import (        # fixtures and readers
    BRIEF, ROOT, SMALL, corpus, equal, log, run, state, stopping_after)
from tools import checkpoint, generate, machine, report
from tools.run import read_log

# Its runs take a third of the time of tiny's. What a process of its own trains is tiny, though.
SMALLER = dataclasses.replace(PRESETS["tiny"], n_layer=2, n_embd=64, n_head=1)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    if "started" not in request.fixturenames:
        monkeypatch.setitem(quartet.PRESETS, "tiny", SMALLER)


def ago(folder):
    "names and times of change of all files in a folder"
    return {name: os.stat(folder / name).st_mtime_ns for name in sorted(os.listdir(folder))}


# ---- a number that is not finite

def test_a_nan_at_an_evaluation_is_divergence_and_keeps_the_last_good_checkpoint(run, tmp_path):
    code, sentence, _ = run("--precision", "bf16", "--name", "r", "--eval_every", 1,
                            "--steps", 40, "--lr", "1e6")
    assert code == 3 and "has diverged" in sentence
    assert f"the last good checkpoint is {tmp_path}/r/ckpt.pt" in sentence
    kept = state(tmp_path / "r")
    assert all(weight.isfinite().all() for weight in kept["model"].values())


@pytest.mark.parametrize("steps", [2, 3])
def test_a_validation_loss_of_nan_is_never_saved_in_the_middle_or_at_the_end(
        run, tmp_path, monkeypatch, steps):
    evaluate = quartet.evaluate
    losses = iter([None, float("nan")])

    def spoilt(*args):
        return evaluate(*args) if next(losses) is None else float("nan")

    monkeypatch.setattr(quartet, "evaluate", spoilt)
    code, sentence, _ = run("--steps", steps, "--eval_every", 1, "--name", "r")
    assert code == 3 and "validation loss nan" in sentence and "at step 2" in sentence
    assert len(state(tmp_path / "r")["history"]) == 1
    assert read_log(tmp_path / "r" / "log.csv").not_finite


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_weights_and_moments_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch, part):
    pack = checkpoint.pack

    def spoilt(*args):
        packed = pack(*args)
        if part == "weight":
            packed["model"]["norm.weight"].view(-1)[3] = torch.inf
        else:
            packed["optimizer"]["state"]["embed.weight"]["exp_avg_sq"].view(-1)[5] = torch.nan
        return packed

    monkeypatch.setattr(checkpoint, "pack", spoilt)
    code, sentence, _ = run("--steps", 2, "--name", "r")
    assert code == 3 and "there is no checkpoint yet" in sentence
    assert os.listdir(tmp_path / "r") == ["log.csv"]


def test_an_ablation_outlives_a_run_that_diverges_at_its_last_evaluation(
        run, tmp_path, monkeypatch):
    evaluate = quartet.evaluate

    def spoilt(forward, corpus, cfg):
        return float("nan") if cfg.precision == "bf16" else evaluate(forward, corpus, cfg)

    monkeypatch.setattr(quartet, "evaluate", spoilt)
    code, _, out = run("--precision", "bf16,fp4", "--steps", 2, "--name", "n", *BRIEF)
    assert code == 0 and "diverged" in out
    with open(tmp_path / "n.csv") as file:
        assert [row["diverged"] for row in csv.DictReader(file)] == ["1", "0"]


# ---- a sample

def test_a_model_whose_logits_are_not_finite_ends_no_run(run, monkeypatch):
    right = generate.generate

    def spoilt(model, *args, **kw):
        model.head.weight.data.fill_(torch.nan)
        return right(model, *args, **kw)

    monkeypatch.setattr(generate, "generate", spoilt)
    code, _, out = run("--steps", 2, "--name", "r", *BRIEF)
    assert code == 0 and "(no sample: the logits are not finite)" in out
    code, sentence, _ = run("--name", "r", "--sample", "def")
    assert code == 2 and "the logits are not finite" in sentence


def test_a_terminal_that_is_not_utf_8_ends_no_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Übermäßig schöne Größe, naïve façade. " * 300, encoding="utf-8")
    command = [sys.executable, "quartet.py", "--data", text, "--vocab", 270, "--out", tmp_path,
               *SMALL, "--steps", 2, "--sample_tokens", 30]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert b"final val loss" in done.stdout


# ---- resuming

def test_resuming_where_there_is_nothing_begins_anew_and_says_so(run, tmp_path):
    code, _, out = run("--resume", "--name", "r", "--steps", 2, *BRIEF)
    assert code == 0 and "begins anew" in out
    assert len(log(tmp_path / "r")) == 2


def test_resuming_by_name_alone_takes_the_settings_of_the_checkpoint(run, tmp_path):
    args = ["--precision", "fp4-sr", "--seed", 5, "--lr", 3e-3, "--batch", 2, "--seq", 16,
            "--eval_every", 2]
    assert run(*args, "--steps", 6, "--name", "whole", *BRIEF)[0] == 0
    assert run(*args, "--steps", 4, "--name", "r", *BRIEF)[0] == 0
    # The fixture types --data, --size, --batch, --seq and others: here only --out and --name are.
    argv = ["--out", tmp_path, "--name", "r", "--resume", "--sample_tokens", 0]
    before = ago(tmp_path / "r")
    assert quartet.run_cli([str(a) for a in argv]) == 0
    assert ago(tmp_path / "r") == before                    # It was finished.
    assert quartet.run_cli([str(a) for a in [*argv, "--steps", 6]]) == 0
    # Another length is another schedule, so that only the first steps can be compared.
    assert len(log(tmp_path / "r")) == 6
    config = read_log(tmp_path / "r" / "log.csv").config
    assert (config["seed"], config["precision"], config["lr"]) == (5, "fp4-sr", 3e-3)
    assert (config["steps"], config["seq"], config["eval_every"]) == (6, 16, 2)


def test_what_makes_another_run_is_refused_and_what_may_change_is_applied(run, tmp_path):
    assert run("--steps", 4, "--name", "r", *BRIEF)[0] == 0
    before = ago(tmp_path / "r")
    other_dtype = "bfloat16" if state(tmp_path / "r")["config"]["dtype"] == "float32" else "float32"
    for changes in (["--seed", 1], ["--precision", "fp4-sr"], ["--batch", 8, "--micro", 4],
                    ["--seq", 16], ["--dtype", other_dtype], ["--keep_first", 1]):
        code, sentence, _ = run("--name", "r", "--resume", "--steps", 6, *changes)
        assert code == 2 and "is another run" in sentence and "--allow_changes" in sentence, changes
        assert changes[0][2:] in sentence
        assert ago(tmp_path / "r") == before
    code, _, out = run("--name", "r", "--resume", "--steps", 6, "--weight_decay", 0.5,
                       "--lr", 1e-4, *BRIEF)
    assert code == 0 and "weight_decay 0.1 -> 0.5" in out
    groups = state(tmp_path / "r")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert float(log(tmp_path / "r")[-1][3]) == pytest.approx(1e-5)
    code, _, out = run("--name", "r", "--resume", "--steps", 8, "--seed", 1, "--allow_changes",
                       *BRIEF)
    assert code == 0 and "seed 0 -> 1" in out


def test_a_resumed_log_keeps_its_head_and_says_from_which_step_on_what_changed(run, tmp_path):
    run("--steps", 4, "--name", "r", "--seed", 5, *BRIEF)
    head = open(tmp_path / "r" / "log.csv").read().splitlines()[:5]
    rows = log(tmp_path / "r")
    run("--steps", 6, "--name", "r", "--resume", "--seed", 0, "--allow_changes", *BRIEF)
    lines = open(tmp_path / "r" / "log.csv").read().splitlines()
    assert lines[:5] == head and log(tmp_path / "r")[:4] == rows
    resumed = read_log(tmp_path / "r" / "log.csv").resumed
    assert [part["step"] for part in resumed] == [4]
    assert resumed[0]["changes"]["seed"] == [5, 0]


def test_past_its_end_a_run_is_left_alone_with_a_sentence(run, tmp_path):
    run("--steps", 4, "--name", "r", *BRIEF)
    before = ago(tmp_path / "r")
    code, _, out = run("--steps", 4, "--name", "r", "--resume")
    assert code == 0 and "is finished after 4 steps" in out
    code, sentence, _ = run("--steps", 2, "--name", "r", "--resume")
    assert code == 2 and "has 4 steps already" in sentence
    code, sentence, _ = run("--steps", 4, "--name", "r", "--resume", "--seed", 1)
    assert code == 2 and "is another run" in sentence
    assert ago(tmp_path / "r") == before


def test_a_finished_run_without_its_checkpoint_is_not_begun_anew(run, tmp_path):
    run("--steps", 2, "--name", "r", "--discard", *BRIEF)
    before = ago(tmp_path / "r")
    code, _, out = run("--steps", 2, "--name", "r", "--resume")
    assert code == 0 and "is finished" in out and ago(tmp_path / "r") == before


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run, tmp_path):
    args = ["--steps", 6, "--eval_every", 2, "--name"]
    assert run(*args, "whole", *BRIEF)[0] == 0
    assert run(*args, "r", *BRIEF)[0] == 0
    folder = tmp_path / "r"
    assert {"ckpt.pt", "ckpt-4.pt"} <= set(os.listdir(folder))
    damaged = bytearray((folder / "ckpt.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "ckpt.pt").write_bytes(damaged)
    code, _, out = run(*args, "r", "--resume", *BRIEF)
    assert code == 0 and "ckpt.pt is damaged" in out and "ckpt-4.pt" in out
    assert log(folder) == log(tmp_path / "whole")
    assert equal(state(folder)["model"], state(tmp_path / "whole")["model"])


# ---- signals

@pytest.fixture(autouse=True)
def handled_signals():
    "the default answers to signals, also where `make test &` or nohup ignores them"
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture
def started(corpus, tmp_path):
    "started('--steps', 3) -> a process of quartet.py that has done two steps"
    processes = []

    def started(*args):
        command = [sys.executable, "quartet.py", "--data", corpus, "--out", tmp_path, *SMALL,
                   "--name", "r", *BRIEF, *args]
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        while not process.stdout.readline().startswith("step     2/"):
            assert process.poll() is None, process.stderr.read()
        return process

    yield started
    for process in processes:
        process.kill()
        process.communicate()


SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow)
                for number in (signal.SIGHUP, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *SLOW_SIGNALS])
def test_a_signal_stops_a_run_after_its_step_with_a_checkpoint(run, started, tmp_path, number):
    process = started("--steps", 5000)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    last_line = printed.strip().splitlines()[-1]
    assert last_line.startswith("quartet: ") and "--resume" in last_line, printed
    rows = log(tmp_path / "r")
    assert len(state(tmp_path / "r")["history"]) == len(rows) >= 2
    assert set(os.listdir(tmp_path / "r")) == {"log.csv", "ckpt.pt"}


def test_a_run_that_stopped_without_an_evaluation_cannot_end_there(run, tmp_path, monkeypatch):
    with monkeypatch.context() as stopping:
        stopping.setattr(BetweenSteps, "is_asked", property(lambda self: True))
        stopping.setattr(BetweenSteps, "raise_if_asked",
                         lambda self: raise_stopped(signal.SIGUSR1))
        assert run("--steps", 9, "--name", "r", "--eval_every", 9)[0] == 128 + signal.SIGUSR1
    before = ago(tmp_path / "r")
    code, sentence, _ = run("--steps", 1, "--name", "r", "--resume")
    assert code == 2 and "give --steps 2 or more" in sentence and ago(tmp_path / "r") == before
    assert run("--steps", 2, "--name", "r", "--resume", *BRIEF)[0] == 0
    assert log(tmp_path / "r")[-1][2]


@pytest.mark.parametrize("number", [signal.SIGINT, SLOW_SIGNALS[0]])
def test_a_signal_saves_even_where_nobody_reads_what_is_printed(started, tmp_path, number):
    process = started("--steps", 5000, "--eval_every", 1)
    process.stdout.close()              # as when `| tee` ends at the same Ctrl-C
    process.send_signal(number)
    assert process.wait(60) in (128 + number, 128 + signal.SIGPIPE)
    assert len(state(tmp_path / "r")["history"]) == len(log(tmp_path / "r"))


def test_a_stopped_run_that_is_resumed_ends_as_if_it_had_not_been_stopped(
        run, tmp_path, monkeypatch):
    # Its rounding and its signs are random, so that the generators matter, too.
    monkeypatch.setattr(report, "draw_curves", lambda path, runs: path)
    args = ["--precision", "fp4-sr", "--steps", 7, *BRIEF]
    assert run(*args, "--name", "whole")[0] == 0
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(3))
        code, sentence, _ = run(*args, "--name", "r")
    assert code == 128 + signal.SIGTERM and "--resume" in sentence
    assert len(log(tmp_path / "r")) == len(state(tmp_path / "r")["history"]) == 4
    torch.randn(99)                     # as in a new process, whose generator is elsewhere
    assert run(*args, "--name", "r", "--resume")[0] == 0
    assert log(tmp_path / "r") == log(tmp_path / "whole")
    for part in ("model", "optimizer"):
        assert equal(state(tmp_path / "r")[part], state(tmp_path / "whole")[part]), part


def test_a_second_signal_stops_at_once_and_ignored_signals_stay_ignored(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with become_exceptions():
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signal_number == signal.SIGTERM
        with BetweenSteps() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)     # the same request, over another way
            assert stop.is_asked
            now[0] += 2
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Stopped):
                stop.raise_if_asked()
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with become_exceptions(), BetweenSteps() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_asked
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_checkpoint_is_written_by_the_clock_as_well(run, tmp_path, monkeypatch):
    monkeypatch.setattr(quartet, "CHECKPOINT_SECONDS", 0)
    steps = []
    save_checkpoint = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, state, keep: (
        steps.append(len(state["history"])), save_checkpoint(folder, state, keep)))
    assert run("--steps", 4, "--name", "r", *BRIEF)[0] == 0
    assert steps == [1, 2, 3, 4]


def test_an_interrupt_inside_of_torch_save_is_not_a_full_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    class Interrupted:
        "a file in whose second write Ctrl-C is pressed"
        def __init__(self, file):
            self.file = file
            self.n = 0

        def write(self, data):
            self.n += 1
            if self.n == 2:
                raise KeyboardInterrupt
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    with pytest.raises(KeyboardInterrupt):
        atomic_write(str(path), lambda file: torch.save(torch.ones(999), Interrupted(file)))
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


# ---- two processes, and the folders of others

def test_a_second_process_on_a_folder_is_refused_with_the_name_of_the_first(
        run, started, tmp_path):
    process = started("--steps", 5000)
    for args in (["--resume"], []):
        code, sentence, _ = run("--name", "r", "--steps", 50, *args)
        assert code == 2 and str(process.pid) in sentence, sentence
    assert os.listdir(tmp_path) == ["r"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("other", [["--lr", 1e-3], ["--batch", 2], ["--steps", 3]])
def test_another_run_with_the_same_default_name_moves_nothing(run, tmp_path, other):
    assert run("--steps", 2, *BRIEF)[0] == 0
    before = ago(tmp_path / "tiny-fp4")
    code, sentence, _ = run("--steps", 2, *other, *BRIEF)
    assert code == 2 and "other settings" in sentence and "--name" in sentence
    assert other[0][2:] in sentence
    assert os.listdir(tmp_path) == ["tiny-fp4"] and ago(tmp_path / "tiny-fp4") == before


def test_a_folder_that_is_no_run_is_never_moved(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("words")
    code, sentence, _ = run("--name", "thesis", "--steps", 2)
    assert code == 2 and "is not a run" in sentence
    assert os.listdir(tmp_path) == ["thesis"]
    assert os.listdir(tmp_path / "thesis") == ["chapter1.tex"]


# ---- the text and its vocabulary

@pytest.fixture
def notes(tmp_path, monkeypatch):
    "a text file whose corpus is made in a folder of this test"
    monkeypatch.setattr(prepare, "HERE", str(tmp_path / "data"))
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"Note {i}: the {i % 7}th thing is {i * i}.\n" for i in range(900)))
    return path


def test_a_text_that_was_edited_is_noticed_when_its_run_is_resumed(run, tmp_path, notes):
    args = ["--data", notes, "--vocab", 300, "--name", "r"]
    assert run(*args, "--steps", 2, *BRIEF)[0] == 0
    before = ago(tmp_path / "r")
    notes.write_text(notes.read_text().replace("thing", "matter"))
    code, sentence, _ = run(*args, "--steps", 4, "--resume")
    assert code == 2 and "fingerprint" in sentence and ago(tmp_path / "r") == before


def test_a_comma_list_never_mixes_two_texts_in_a_table(run, tmp_path, notes):
    args = ["--data", notes, "--vocab", 300, "--name", "n", "--steps", 2, *BRIEF]
    assert run(*args, "--precision", "bf16")[0] == 0
    os.rename(tmp_path / "n", tmp_path / "n-bf16")
    notes.write_text(notes.read_text().replace("thing", "matter"))
    code, _, out = run(*args, "--precision", "bf16,fp4")
    assert code == 0
    logs = [read_log(tmp_path / name / "log.csv") for name in ("n-bf16", "n-fp4")]
    assert logs[0].corpus["fingerprint"] == logs[1].corpus["fingerprint"]


def test_a_model_writes_in_its_own_vocabulary_after_its_corpus_is_gone(run, tmp_path, notes):
    assert run("--data", notes, "--vocab", 300, "--steps", 3, "--name", "r", *BRIEF)[0] == 0
    sample = ["--name", "r", "--sample", "Note 3", "--sample_tokens", 20]
    before = run(*sample)[2]
    assert before.startswith("Note 3") and len(before) > 10
    shutil.rmtree(tmp_path / "data")
    assert run(*sample)[2] == before


# ---- zeros and whole numbers

def test_zeros_mean_what_people_expect(run, tmp_path):
    for name in ("lr", "steps", "batch", "seq", "micro", "tokens", "eval_every", "keep", "vocab",
                 "jobs", "seeds"):
        code, sentence, _ = run(f"--{name}", 0)
        assert code == 2 and name in sentence, (name, sentence)
    assert "shorter than one step" in run("--tokens_per_param", 0)[1]
    assert os.listdir(tmp_path) == []


def test_a_clip_of_zero_does_not_clip(run, tmp_path):
    for name, clip in (("free", 0), ("large", 1e9), ("clipped", 0.1)):
        code, _, _ = run("--steps", 3, "--name", name, "--clip", clip, "--precision", "bf16",
                         *BRIEF)
        assert code == 0
    assert log(tmp_path / "free") == log(tmp_path / "large") != log(tmp_path / "clipped")


def test_an_empty_sample_samples_from_the_start_and_trains_nothing(run, tmp_path):
    run("--steps", 2, "--name", "r", *BRIEF)
    before = ago(tmp_path / "r")
    code, _, out = run("--name", "r", "--sample", "", "--sample_tokens", 5)
    assert code == 0 and out.strip()
    assert ago(tmp_path / "r") == before and os.listdir(tmp_path) == ["r"]


def test_a_seed_beyond_the_whole_numbers_of_a_float_stays_what_it_is():
    assert quartet.parse(["--seed", "9007199254740993"]).seed == 9007199254740993


# ---- the machine

def test_a_gpu_that_torch_cannot_use_is_said_before_the_cpu_trains(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "unusable_gpu", lambda: "the driver is too old: update it")
    monkeypatch.setattr(quartet, "train", lambda cfg: None)
    sentence = run("--steps", 2, "--name", "r", *BRIEF)[1]
    assert sentence == "quartet: on the CPU, because the driver is too old: update it"
    code, sentence, _ = run("--steps", 2, "--name", "r", "--device", "cuda")
    assert code == 2 and "the driver is too old" in sentence


def test_a_run_that_does_not_fit_into_memory_names_the_next_smaller_microbatch(run, monkeypatch):
    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Llama, "forward", full)
    code, sentence, _ = run("--steps", 2, "--batch", 12, "--micro", 12, "--name", "r")
    assert code == 2 and "--micro 6" in sentence


def test_a_run_without_any_terminal_trains(corpus, tmp_path):
    words = [sys.executable, "quartet.py", "--data", corpus, "--out", tmp_path, *SMALL,
             "--steps", 2, "--name", "r", *BRIEF]
    command = " ".join(map(str, words)) + " >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT).returncode == 0
    assert len(log(tmp_path / "r")) == 2


def test_a_corpus_is_prepared_without_any_terminal(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(999)))
    command = f"{sys.executable} data/prepare.py {text} --vocab 300 --out {tmp_path}/out >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT).returncode == 0
    assert (tmp_path / "out" / "train.bin").exists()


# ---- what such runs log and keep

def test_the_clock_starts_again_at_a_checkpoint(run, monkeypatch):
    now = [0.0]
    steps = []
    save_checkpoint = checkpoint.save

    def wait_ten_minutes(*args):
        now[0] += 10 * 60

    def save(folder, state, keep):
        steps.append(len(state["history"]))
        save_checkpoint(folder, state, keep)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(quartet.run, "show_step", wait_ten_minutes)
    monkeypatch.setattr(checkpoint, "save", save)
    assert run("--steps", 5, "--name", "r", "--precision", "bf16", *BRIEF)[0] == 0
    assert steps == [3, 5]


def test_a_comma_list_moves_no_run_with_other_settings(run, tmp_path):
    assert run("--steps", 2, "--precision", "fp4", *BRIEF)[0] == 0
    before = ago(tmp_path / "tiny-fp4")
    code, sentence, _ = run("--steps", 3, "--precision", "bf16,fp4", *BRIEF)
    assert code == 2 and "tiny-fp4 holds a run with other settings" in sentence
    assert os.listdir(tmp_path) == ["tiny-fp4"] and ago(tmp_path / "tiny-fp4") == before


def test_a_gradient_that_is_not_finite_ends_a_run_before_its_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    code, sentence, _ = run("--steps", 2, "--name", "r")
    assert code == 3 and "gradient norm inf at step 1" in sentence
    found = read_log(tmp_path / "r" / "log.csv")
    assert found.not_finite and "gradient norm inf" in found.divergence


def test_weights_that_are_not_finite_are_said_in_the_log(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "all_finite", lambda state: False)
    assert run("--steps", 2, "--name", "r")[0] == 3
    found = read_log(tmp_path / "r" / "log.csv")
    assert "has diverged" in found.divergence and found.ended


def test_a_length_in_tokens_takes_the_place_of_one_in_steps(run, tmp_path):
    assert run("--steps", 2, "--name", "r", *BRIEF)[0] == 0
    assert run("--tokens", 4 * 4 * 32, "--name", "r", "--resume", *BRIEF)[0] == 0
    assert len(log(tmp_path / "r")) == 4


def test_a_checkpoint_of_a_gpu_is_of_use_on_a_cpu(run, tmp_path):
    assert run("--steps", 2, "--name", "r", "--device", "cpu", *BRIEF)[0] == 0
    packed = state(tmp_path / "r")
    packed["config"] |= dict(device="cuda:7", compile=True, gemm="own")
    torch.save(packed, tmp_path / "r" / "ckpt.pt")
    on_cpu = ["--name", "r", "--device", "cpu"]
    assert run(*on_cpu, "--sample", "def", "--sample_tokens", 5)[0] == 0
    assert run(*on_cpu, "--resume", "--steps", 3, *BRIEF)[0] == 0


def test_an_evaluation_is_the_mean_over_tokens_however_they_are_batched():
    corpus = types.SimpleNamespace(val=[np.arange(100)])
    for micro in (1, 2, 7):
        cfg = types.SimpleNamespace(micro=micro, seq=8, device="cpu")
        loss = quartet.evaluate(lambda x, y: y[y >= 0].float().mean(), corpus, cfg)
        assert loss == pytest.approx(50)


def test_so_many_checkpoints_are_kept_as_were_asked_for(run, tmp_path):
    assert run("--steps", 4, "--eval_every", 1, "--keep", 3, "--name", "r", *BRIEF)[0] == 0
    assert {"ckpt-2.pt", "ckpt-3.pt", "ckpt.pt"} < set(os.listdir(tmp_path / "r"))


@pytest.mark.parametrize("lost, said", [
    ("curve.svg", "final val loss"), ("ckpt.pt", "begins anew")])
def test_a_run_that_was_killed_before_its_end_is_not_finished(run, tmp_path, lost, said):
    assert run("--steps", 2, "--name", "r", *BRIEF)[0] == 0
    path = tmp_path / "r" / "log.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("# finished")))
    os.remove(tmp_path / "r" / lost)
    code, _, out = run("--steps", 2, "--name", "r", "--resume", *BRIEF)
    assert code == 0 and said in out
    assert read_log(path).date and (path.parent / "curve.svg").exists()


def test_a_log_that_is_lost_gets_the_head_of_the_checkpoint(run, tmp_path):
    assert run("--steps", 2, "--name", "r", "--lr", 1e-3, *BRIEF)[0] == 0
    os.remove(tmp_path / "r" / "log.csv")
    assert run("--steps", 3, "--name", "r", "--resume", "--lr", 1e-4, *BRIEF)[0] == 0
    lines = open(tmp_path / "r" / "log.csv").read().splitlines()
    assert json.loads(lines[1].removeprefix("# config "))["lr"] == 1e-3
    assert read_log(tmp_path / "r" / "log.csv").resumed[0]["changes"]["lr"] == [1e-3, 1e-4]


def test_a_weight_is_quantised_once_a_step(run, monkeypatch):
    quantised = []
    quantize = stored_weight.quantize

    def counted(weight, *args, **kw):
        quantised.append(weight)
        return quantize(weight, *args, **kw)

    monkeypatch.setattr(stored_weight, "quantize", counted)
    assert run("--steps", 2, "--micro", 1, "--name", "r", *BRIEF)[0] == 0
    assert len(quantised) == 3 * len({id(weight) for weight in quantised})


def test_the_seed_chooses_the_batches(run, monkeypatch):
    batch = quartet.tokens.batch
    drawn = []

    def noted(*args):
        drawn.append(batch(*args)[0])
        return batch(*args)

    monkeypatch.setattr(quartet.tokens, "batch", noted)
    for seed in (0, 1):
        assert run("--steps", 1, "--seed", seed, "--name", f"r{seed}", *BRIEF)[0] == 0
    assert len(drawn) == 2 and not np.array_equal(*drawn)


def test_what_may_change_is_the_course_and_never_the_row(run):
    assert run("--steps", 2, "--name", "r", *BRIEF)[0] == 0
    for changes in (["--scale", "nearest"], ["--rounding", "stochastic"]):
        code, sentence, _ = run("--name", "r", "--resume", "--steps", 3, *changes)
        assert code == 2 and "is another run" in sentence, (changes, sentence)
    code, _, out = run("--name", "r", "--resume", "--steps", 3, "--clip", 0.5, *BRIEF)
    assert code == 0 and "clip 1.0 -> 0.5" in out


def test_a_text_that_was_moved_is_the_same_text(run, tmp_path, notes):
    args = ["--vocab", 300, "--name", "r", *BRIEF]
    assert run("--data", notes, *args, "--steps", 2)[0] == 0
    shutil.copy(notes, tmp_path / "moved.txt")
    code, sentence, out = run("--data", tmp_path / "moved.txt", *args, "--steps", 3, "--resume")
    assert code == 0 and "steps 2 -> 3" in out, sentence


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with become_exceptions(), BetweenSteps():
        for number, handler in zip(SIGNALS, before):
            assert signal.getsignal(number) != handler, number
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_whose_notice_nobody_reads_is_noted(monkeypatch):
    def write(number, text):
        raise OSError(5, "Input/output error")

    with become_exceptions(), BetweenSteps() as stop:
        monkeypatch.setattr(os, "write", write)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.is_asked


def test_another_thread_may_train():
    problems = []

    def enter():
        try:
            with become_exceptions(), BetweenSteps() as stop:
                stop.raise_if_asked()
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert problems == []
