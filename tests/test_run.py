"""Facts about the files of a run: its folder, lock, log and checkpoints. Nothing is trained."""
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

import quartet
from data.files import UserError
from fp4.axes import AXES
from test_train import equal
from tools import checkpoint, run
from tools.run import Step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CORPUS = dict(fingerprint="0123456789abcdef", vocabulary="fedcba9876543210", vocab_size=320)
CONFIG = dict(precision="fp4", name="r", size="tiny", data="stdlib", seed=5, batch=8, seq=256,
              steps=9, lr=2e-3, micro=4, device="cpu", out="out", scale=None)


def step(number, val=None):
    return Step(number, 5 - .1 * number, val, 1e-3, 1.25, 10.5, 204.7, "n/a")


def log_text(n_steps, config=CONFIG, corpus=CORPUS):
    rows = [run.log_row(step(number)) for number in range(1, n_steps + 1)]
    return run.log_head(config, "CPU", "test", corpus) + "".join(rows)


@pytest.fixture
def folder(tmp_path):
    "the folder of a run"
    (tmp_path / "r").mkdir()
    return tmp_path / "r"


@pytest.fixture
def log(folder):
    "its log, of nine steps"
    path = folder / "log.csv"
    path.write_text(log_text(9))
    return path


# ---- checkpoints

class Corpus:
    folder = "somewhere"
    identity = CORPUS

    @property
    def vocabulary(self):
        return types.SimpleNamespace(state=lambda: dict(kind="test", tokens=[b"a", b"b\xff"]))


def model_and_optimizer(seed=0, width=6):
    torch.manual_seed(seed)
    model = torch.nn.Linear(width, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(3, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_after(n_steps, width=6):
    "a checkpoint whose weights depend on its step"
    history = [step(number) for number in range(1, n_steps + 1)]
    return checkpoint.pack(CONFIG, Corpus(), *model_and_optimizer(n_steps, width), history)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_checkpoint_holds_what_the_next_step_depends_on(folder):
    model, optimizer = model_and_optimizer()
    history = [step(1), step(2, val=4.5)]
    checkpoint.save(str(folder), checkpoint.pack(CONFIG, Corpus(), model, optimizer, history), 2)
    state = checkpoint.load(str(folder))
    other, its_optimizer = model_and_optimizer(1)
    assert checkpoint.restore(state, other, its_optimizer) == history
    assert equal(other.state_dict(), model.state_dict())
    assert equal(its_optimizer.state_dict(), optimizer.state_dict())
    assert state["config"] == CONFIG and state["corpus"]["identity"] == CORPUS
    assert state["corpus"]["vocabulary"]["tokens"] == [b"a", b"b\xff"]


def test_a_checkpoint_of_another_model_or_version_is_refused_in_a_sentence(folder):
    state = state_after(1)
    with pytest.raises(UserError, match="of another model, choose another --name: size mismatch"):
        checkpoint.restore(state, *model_and_optimizer(width=8))
    torch.save(state | dict(version=1), folder / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt is of another version of quartet.py: there is"):
        checkpoint.load(str(folder))
    torch.save([1], folder / "ckpt.pt")
    with pytest.raises(UserError, match="is of another version"):
        checkpoint.load(str(folder))
    (folder / "ckpt.pt").write_text("hello")
    with pytest.raises(UserError, match="damaged or not a checkpoint of quartet.py .BadZipFile"):
        checkpoint.load(str(folder))
    os.remove(folder / "ckpt.pt")
    with pytest.raises(UserError, match="there is no checkpoint .*ckpt.pt: train first"):
        checkpoint.load(str(folder))


def test_a_checkpoint_that_would_run_code_is_refused(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "evil"),)

    torch.save(state_after(1) | dict(config=Evil()), folder / "ckpt.pt")
    with pytest.raises(UserError, match="UnpicklingError"):
        checkpoint.load(str(folder))
    assert not (folder / "evil").exists()


def flips(data, n):
    "n copies, each with one other bit: in the tensors, the headers, the directory, everywhere"
    numbers = random.Random(0).sample(range(8 * len(data)), n)
    for number in numbers:
        changed = bytearray(data)
        changed[number // 8] ^= 1 << number % 8
        yield number, bytes(changed)


@pytest.mark.parametrize("width, n", [(6, 400), (2000, 200)])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(folder, width, n):
    state = state_after(3, width)
    checkpoint.save(str(folder), state, 1)
    path = folder / "ckpt.pt"
    data = path.read_bytes()
    noticed = 0
    for number, changed in flips(data, n):
        path.write_bytes(changed)
        try:
            loaded = checkpoint.read(str(path))
        except UserError as error:
            assert str(error).startswith(f"{path} is ")
            noticed += 1
        else:                           # in the padding between the parts, or in a date
            assert equal(loaded, state), number
    # Of a small file much is padding; of a real one nearly nothing.
    assert noticed > (.95 if width == 2000 else .3) * n


def test_a_truncated_checkpoint_is_noticed(folder):
    checkpoint.save(str(folder), state_after(3), 1)
    path = folder / "ckpt.pt"
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(str(path))


def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used_and_said(folder, capsys):
    for number in (10, 20, 30):
        checkpoint.save(str(folder), state_after(number), 3)
    assert names(folder) == ["ckpt-10.pt", "ckpt-20.pt", "ckpt.pt"]
    (folder / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:-100])
    capsys.readouterr()
    assert len(checkpoint.load(str(folder))["history"]) == 20
    out = capsys.readouterr().out
    assert f"{folder}/ckpt.pt is damaged" in out
    assert out.endswith(f"going on from {folder}/ckpt-20.pt, after step 20\n")
    assert out.count("\n") == 1

    # What is damaged is not kept as a good one.
    checkpoint.save(str(folder), state_after(25), 3)
    assert "it is replaced" in capsys.readouterr().out
    assert names(folder) == ["ckpt-10.pt", "ckpt-20.pt", "ckpt.pt"]
    for name in names(folder):
        (folder / name).write_text("")
    with pytest.raises(UserError, match="there is nothing to go on from"):
        checkpoint.load(str(folder))
    assert names(folder) == ["ckpt-10.pt", "ckpt-20.pt", "ckpt.pt"]


def steps_kept(folder):
    return {name: len(checkpoint.read(str(folder / name))["history"]) for name in names(folder)
            if name.endswith(".pt") and name.startswith("ckpt")}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept_and_nothing_else_is_touched(folder, keep):
    for name in ("ckpt-best.pt", "ckpt-07.pt", "ckpt-10.pt.bak", "model.pt", "ckpt-5.txt"):
        (folder / name).write_text("mine")
    before = names(folder)
    for number in (10, 20, 30, 40):
        checkpoint.save(str(folder), state_after(number), keep)
    added = ["ckpt.pt", "ckpt-30.pt", "ckpt-20.pt"][:keep]
    assert names(folder) == sorted([*before, *added])
    assert all((folder / name).read_text() == "mine" for name in before)
    checkpoint.discard(str(folder))
    assert names(folder) == before and not checkpoint.exists(str(folder))


def test_one_can_go_back_to_before_a_spike(folder, capsys):
    for number in (10, 20, 30):
        checkpoint.save(str(folder), state_after(number), 3)
    os.rename(folder / "ckpt-10.pt", folder / "ckpt.pt")
    assert len(checkpoint.load(str(folder))["history"]) == 10
    assert capsys.readouterr().out == ""
    # What was trained after step 10 in the first course is no older checkpoint of the second.
    checkpoint.save(str(folder), state_after(15), 3)
    assert steps_kept(folder) == {"ckpt.pt": 15, "ckpt-10.pt": 10}
    os.remove(folder / "ckpt.pt")
    assert checkpoint.exists(str(folder))
    assert len(checkpoint.load(str(folder))["history"]) == 10
    assert f"there is no {folder}/ckpt.pt: going on from" in capsys.readouterr().out


CALLS = [(os, "link"), (os, "replace"), (os, "remove"), (os, "fsync"), (torch, "save")]


class Crash(BaseException):
    "what a power cut is to these tests"


@pytest.mark.parametrize("at", range(7))
def test_at_any_instant_of_a_save_there_is_a_whole_checkpoint(folder, monkeypatch, at):
    for number in (10, 20):
        checkpoint.save(str(folder), state_after(number), 2)
    shutil.copy(folder / "ckpt.pt", folder / "ckpt-20.pt")      # left by a crash between two calls
    state = state_after(30)
    calls = []

    def counted(function):
        def call(*args, **kw):
            calls.append(function)
            if len(calls) > at:         # After a power cut nothing is cleaned up either.
                raise Crash
            return function(*args, **kw)
        return call

    for module, name in CALLS:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    crashed = False
    try:
        checkpoint.save(str(folder), state, 2)
    except Crash:
        crashed = True
    monkeypatch.undo()
    found = checkpoint.read(str(folder / "ckpt.pt"))
    assert len(found["history"]) in (20, 30) and equal(found, state_after(len(found["history"])))
    assert crashed == (at < 6)
    if not crashed:
        assert steps_kept(folder) == {"ckpt.pt": 30, "ckpt-20.pt": 20}


def test_without_links_the_one_before_is_copied(folder, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    for number in (10, 20, 30):
        checkpoint.save(str(folder), state_after(number), 2)
    assert steps_kept(folder) == {"ckpt-20.pt": 20, "ckpt.pt": 30}


def test_a_full_disk_leaves_the_checkpoints_as_they_were(folder, monkeypatch):
    for number in (10, 20):
        checkpoint.save(str(folder), state_after(number), 2)
    before = {name: (folder / name).read_bytes() for name in names(folder)}

    def save(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="cannot write .*ckpt.pt: No space left on device"):
        checkpoint.save(str(folder), state_after(30), 2)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_weights_and_moments_that_are_not_finite_are_noticed():
    assert checkpoint.all_finite(state_after(1))
    for value in (math.nan, math.inf, -math.inf):
        for key, tensor in state_after(1)["model"].items():
            state = state_after(1)
            state["model"][key].view(-1)[-1] = value
            assert not checkpoint.all_finite(state), key
        for moment in ("exp_avg", "exp_avg_sq"):
            state = state_after(1)
            state["optimizer"]["state"]["bias"][moment][2] = value
            assert not checkpoint.all_finite(state), moment


def test_each_tensor_of_a_checkpoint_is_looked_at_whatever_is_beside_it():
    finite = torch.zeros(3, dtype=torch.bfloat16)
    for spoilt in ("first", "middle", "last"):
        model = dict(first=finite, numbers=torch.arange(3), middle=finite, last=finite)
        state = dict(model=model, optimizer=dict(state={}))
        assert checkpoint.all_finite(state)
        model[spoilt] = torch.tensor([0, math.nan, 0], dtype=torch.bfloat16)
        assert not checkpoint.all_finite(state), spoilt


# ---- the log is written

def test_a_line_of_the_log_says_each_number_in_its_column():
    row = Step(7, 5.1234567, 4.56789, 1.25e-3, 0.5, 12.34, 98765.4, "41.2%")
    columns = run.log_row(row).rstrip("\n").split(",")
    assert columns[:8] == ["7", "5.123457", "4.5679", "1.250000e-03", "0.500000", "12.3", "98765",
                           "41.2%"]
    assert run.log_row(row._replace(val=None)).split(",")[2] == ""
    head = run.log_head(CONFIG, "A GPU, torch 2", "what multiplies", CORPUS)
    *notes, names_of_columns = head.splitlines()
    assert notes[1:] == [
        f"# config {json.dumps(CONFIG)}", "# device A GPU, torch 2", "# fp4 what multiplies",
        f"# data {json.dumps(CORPUS)}"]
    assert names_of_columns.split(",") == list(run.COLUMNS) and len(columns) == len(run.COLUMNS)
    assert names_of_columns.startswith("step,loss,val,lr,norm,ms,tokens_per_s,mfu")
    found = run.parse_log(head + run.log_row(row) + run.log_end("1.03 GiB", "n/a"))
    assert found.history == [Step(7, 5.123457, 4.5679, 1.25e-3, 0.5, 12.3, 98765, "41.2%")]
    assert found.device == "A GPU, torch 2" and found.memory == "1.03 GiB"
    assert found.date == str(datetime.date.today())


def test_a_validation_loss_of_zero_was_evaluated():
    found = run.parse_log(log_text(0) + run.log_row(step(1, val=0.0)) + run.log_end("n/a", "n/a"))
    assert found.vals == [0.0] and found.ended


def test_the_name_of_a_run_tells_what_its_settings_change():
    settings = dict(precision="fp4", seed=0, keep_first=0, keep_last=0, scale=None)
    assert run.label(settings) == "fp4"
    assert run.label(settings | dict(seed=2)) == "fp4-seed2"
    assert run.label(settings | dict(scale="nearest", keep_first=1, seed=2)) == \
        "fp4-nearest-keep_first-1-seed2"
    assert run.label(settings | dict(keep_last=3)) == "fp4-keep_last-3"


# ---- the log of a resumed run

def test_a_resumed_run_keeps_the_head_of_its_log_and_says_from_which_step_on(log):
    own_head = log_text(0).splitlines()
    history = [step(number) for number in range(1, 7)]
    other_head = run.log_head(CONFIG | dict(seed=0, lr=1.0), "another machine", "other", CORPUS)
    run.resume_log(str(log), other_head, history, {"lr": [2e-3, 1e-3]})
    lines = log.read_text().splitlines()
    assert lines == [
        *own_head,
        *log_text(6).splitlines()[len(own_head):],
        '# resumed {"step": 6, "changes": {"lr": [0.002, 0.001]}, "commit": "%s"}'
        % run.git_commit(),
    ]
    found = run.read_log(log)
    assert found.config == CONFIG | dict(lr=1e-3) and found.config["seed"] == 5
    assert found.resumed == [
        {"step": 6, "changes": {"lr": [2e-3, 1e-3]}, "commit": run.git_commit()}]
    assert found.corpus == CORPUS
    assert [row.step for row in found.history] == [1, 2, 3, 4, 5, 6]


def test_every_resume_is_said_and_what_is_trained_again_is_dropped(log):
    def steps(first, last):
        return [step(number, val=None if number % 4 else 4.5) for number in range(first, last + 1)]

    def train(first, last):
        with open(log, "a") as file:
            file.writelines(map(run.log_row, steps(first, last)))

    def resume(n_steps, changes):
        run.resume_log(str(log), "", steps(1, n_steps), changes)
        return [entry["step"] for entry in run.read_log(log).resumed]

    log.write_text(log_text(0))
    train(1, 7)
    assert resume(4, {}) == [4]
    train(5, 8)
    with open(log, "a") as file:
        file.write(run.log_end("n/a", "n/a"))
    assert run.read_log(log).ended
    assert resume(8, {"steps": [9, 12]}) == [4, 8]
    assert not run.read_log(log).ended and run.read_log(log).config["steps"] == 12
    train(9, 10)
    with open(log, "a") as file:
        file.write("11,4.0,,1e-3,1.")   # killed in the middle of a line
    assert resume(10, {}) == [4, 8, 10]
    assert resume(6, {}) == [4, 6]      # gone back to before a spike
    assert run.read_log(log).config["steps"] == 9
    assert [row.step for row in run.read_log(log).history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("content", [
    None, b"", b"\xff\xfe\x00binary", b"mine\n", log_text(9).replace("4.7", "4.6").encode(),
], ids=["missing", "empty", "binary", "foreign", "of other steps"])
def test_a_log_that_is_missing_or_of_another_run_is_replaced_and_not_lost(log, content, capsys):
    if content is None:
        os.remove(log)
    else:
        log.write_bytes(content)
    head = log_text(0, CONFIG | dict(seed=7))
    run.resume_log(str(log), head, [step(1), step(2), step(3)], {})
    found = run.read_log(log)
    assert found.config["seed"] == 7 and len(found.history) == 3 and found.resumed[0]["step"] == 3
    if content is not None:
        assert (log.parent / "log.csv.1").read_bytes() == content
        assert "is not the log of this checkpoint and is now" in capsys.readouterr().out


def test_steps_that_a_power_cut_took_from_the_log_come_back_from_the_checkpoint(log):
    log.write_text(log_text(4) + run.log_row(step(5))[:20])
    run.resume_log(str(log), "", [step(number) for number in range(1, 8)], {})
    assert log.read_text() == log_text(7) + run.log_resumed(7, {})


def older(text):
    "a log as it was before there were the columns beyond_window and bpb"
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            line = ",".join(line.rstrip("\n").split(",")[:8]) + "\n"
        lines.append(line)
    return "".join(lines)


def test_the_log_of_an_older_version_is_gone_on_with_and_gets_the_new_columns(log, capsys):
    names = "step,loss,val,lr,norm,ms,tokens_per_s,mfu"
    log.write_text(older(log_text(9)))
    assert names + "\n1,4.900000,,1.000000e-03,1.250000,10.5,205,n/a\n2," in log.read_text()
    run.resume_log(str(log), "", [step(number) for number in range(1, 7)], {})
    assert log.read_text() == log_text(6) + run.log_resumed(6, {})
    assert os.listdir(log.parent) == ["log.csv"] and capsys.readouterr().out == ""
    with open(log, "a") as file:
        file.write(run.log_row(step(7, val=4.5)._replace(bpb=1.23456)))
    assert [row.bpb for row in run.read_log(log).history] == [None] * 6 + [1.2346]
    # One column is missing, and the steps are others.
    lines = log_text(9).replace(",bpb", "").replace(",n/a,,", ",n/a,")
    log.write_text(lines.replace("4.7", "4.6"))
    run.resume_log(str(log), log_text(0), [step(1), step(2), step(3)], {})
    assert (log.parent / "log.csv.1").exists()


# ---- the log is read

def test_an_older_log_and_an_older_checkpoint_have_no_bits_per_byte():
    text = log_text(0) + run.log_row(step(1, val=4.5)._replace(bpb=1.5)) + run.log_row(step(2))
    assert run.parse_log(text).bpb == 1.5
    assert [row.bpb for row in run.parse_log(text).history] == [1.5, None]
    found = run.parse_log(older(text))
    assert found.vals == [4.5] and found.bpb is None and found.history[0] == step(1, 4.5)._replace(
        tokens_per_s=205)
    for n_fields in (8, 9, 10):         # A checkpoint keeps each step as a tuple.
        assert Step(*tuple(step(1, 4.5))[:n_fields]) == step(1, 4.5)
    assert run.parse_log(log_text(2)).bpb is None


def test_a_step_that_was_evaluated_is_printed_with_its_bits_per_byte():
    bar = types.SimpleNamespace(disable=True, write=lambda text: printed.append(text),
                                set_postfix_str=lambda *args, **kwargs: None,
                                update=lambda: None)
    printed = []
    for row in (step(35, 4.5)._replace(bpb=1.23456), step(36, 4.5), step(37)):
        run.show_step(bar, row, 350)
    assert [line.split("  lr")[0] for line in printed] == [
        "step    35/350  loss 1.5000  val 4.5000  bpb 1.2346",
        "step    36/350  loss 1.4000  val 4.5000  bpb n/a   ",
        "step    37/350  loss 1.3000  val         bpb       ",
    ]


def test_a_run_with_a_validation_loss_that_is_not_finite_has_ended_and_diverged(log):
    for val in (math.nan, math.inf):
        log.write_text(log_text(4) + run.log_row(step(5, val=val)))
        found = run.read_log(log)
        assert found.not_finite and found.ended and found.diverged
    log.write_text(log_text(4) + run.log_diverged("r has diverged: a weight is not finite"))
    assert run.read_log(log).not_finite
    assert run.read_log(log).divergence == "r has diverged: a weight is not finite"
    log.write_text(log_text(4))
    assert not run.read_log(log).not_finite and not run.read_log(log).ended


def test_a_run_that_ends_no_better_than_it_began_diverged(log):
    for last, diverged in ((4.4, False), (4.5, False), (4.6, True)):
        rows = [step(1, val=4.5), step(2), step(3, val=last)]
        log.write_text(log_text(0) + "".join(map(run.log_row, rows)) + run.log_end("n/a", "n/a"))
        found = run.read_log(log)
        assert found.vals == [4.5, last] and found.ended and not found.not_finite
        assert found.diverged == diverged, last
    log.write_text(log_text(3) + run.log_row(step(4)._replace(norm=math.inf)))
    assert run.read_log(log).not_finite and math.isnan(run.read_log(log).history[-1].loss)


def test_what_is_kept_of_a_log_are_its_notes_the_evaluated_steps_and_the_last():
    rows = [step(1), step(2, val=4.5), step(3), step(4)]
    lines = list(map(run.log_row, rows))
    head = log_text(0)
    text = head + lines[0] + lines[1] + run.log_resumed(2, {}) + lines[2] + lines[3]
    assert run.thin_log(text) == head + lines[1] + run.log_resumed(2, {}) + lines[3]
    assert run.split_logs(text + head) == [text, head]


def test_a_run_whose_last_step_was_not_evaluated_has_not_ended(log):
    rows = [step(1), step(2, val=4.5), step(3)]
    unfinished = log_text(0) + "".join(map(run.log_row, rows)) + run.log_end("n/a", "n/a")
    for text in (unfinished, log_text(0) + run.log_end("n/a", "n/a")):
        log.write_text(text)
        assert run.read_log(log).date == "" and not run.read_log(log).ended
        assert not run.is_finished(str(log.parent))
    log.write_text(unfinished.replace(run.log_row(rows[2]), ""))
    assert run.read_log(log).ended and run.is_finished(str(log.parent))


def test_an_older_log_without_a_corpus_stays_usable():
    found = run.parse_log(log_text(3, corpus=None))
    assert found.corpus == {} and found.resumed == [] and found.config == CONFIG
    with open(os.path.join(ROOT, "tools", "studies", "recipes.csv")) as file:
        logs = run.split_logs(file.read())
    assert len(logs) > 100 and all(run.parse_log(log).ended for log in logs)


def with_config(**settings):
    return log_text(2, CONFIG | settings)


def whole_row(text):
    "a row of the table that has all of its columns, the last of which may be empty"
    return text + "," * (len(run.COLUMNS) - 1 - text.count(",")) + "\n"


GOOD = log_text(2)
FOREIGN = {
    "empty": "",
    "another table": "step,loss\n1,2\n",
    "a list of settings": GOOD.replace(json.dumps(CONFIG), "[1, 2]"),
    "settings in a text": GOOD.replace(json.dumps(CONFIG), '"mine"'),
    "settings that are null": GOOD.replace(json.dumps(CONFIG), "null"),
    "settings that are cut off": GOOD.replace(json.dumps(CONFIG), '{"precision": '),
    "settings without end": GOOD.replace(json.dumps(CONFIG), "[" * 200_000),
    "a precision that is a number": with_config(precision=4),
    "a seed that is a list": with_config(seed=[1]),
    "a seed that is text": with_config(seed="1"),
    "a name that is null": with_config(name=None),
    "an axis that is a number": with_config(scale=3),
    "jobs that are text": with_config(jobs="many"),
    "tokens that are text": with_config(tokens="1B"),
    "no precision": with_config().replace('"precision"', '"recision"'),
    "a corpus that is a list": GOOD.replace(json.dumps(CORPUS), "[]"),
    "a corpus that is deep": GOOD.replace(json.dumps(CORPUS), '{"fingerprint": {}}'),
    "a resume that is a list": GOOD + "# resumed []\n",
    "a resume without a step": GOOD + '# resumed {"changes": {}}\n',
    "a resume at a text": GOOD + '# resumed {"step": "3", "changes": {}}\n',
    "a resume without changes": GOOD + '# resumed {"step": 3}\n',
    "changes that are a list": GOOD + '# resumed {"step": 3, "changes": ["lr"]}\n',
    "a change of one value": GOOD + '# resumed {"step": 3, "changes": {"lr": [1]}}\n',
    "a change of a type": GOOD + '# resumed {"step": 3, "changes": {"seed": [1, "a"]}}\n',
    "a step that is text": GOOD + whole_row("third,1,,1,1,1,1,n/a"),
    "a loss that is text": GOOD + whole_row("3,high,,1,1,1,1,n/a"),
    "a step twice": GOOD + run.log_row(step(2)),
    "a step that is cut off in the middle": GOOD + "3,1,\n" + run.log_row(step(4)),
    "no device": GOOD.replace("# device", "# machine"),
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_no_log_is_refused_in_a_sentence(text, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="^not a log of quartet.py .") as caught:
        run.read_log(path)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_text_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "log.csv"
    for content in (os.urandom(300), GOOD.encode("utf-16"), GOOD.encode() + b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^not a log of quartet.py"):
            run.read_log(path)
    with pytest.raises(OSError, match="Is a directory"):
        run.read_log(tmp_path)


def difference(log, corpus=CORPUS, **changed):
    return run.difference(run.read_log(log), CONFIG | changed, corpus)


def test_the_same_run_has_the_same_settings_and_the_same_corpus(log):
    assert difference(log) == difference(log, keep=7, jobs=4, allow_changes=True) == ""
    for name, value in dict(lr=1.0, seed=6, steps=10, micro=2).items():
        assert difference(log, **{name: value}) == f"{name} {CONFIG[name]} -> {value}"
    for name in CORPUS:
        assert difference(log, CORPUS | {name: "other"}) == f"{name} {CORPUS[name]} -> other"
    log.write_text(log_text(9, corpus=None))
    assert difference(log) == ""


def test_what_a_corpus_is_called_matters_only_where_its_content_is_not_known(log):
    renamed = dict(data="data/stdlib", vocab=4096)
    assert difference(log, **renamed) == ""
    assert difference(log, None, **renamed) == "data stdlib -> data/stdlib, vocab None -> 4096"
    config = CONFIG | renamed
    assert run.changes_to(str(log.parent), config, CORPUS) == {}
    assert [*run.changes_to(str(log.parent), config)] == ["data", "vocab"]
    with open(log, "a") as file:        # As an earlier version wrote it.
        file.write(run.log_resumed(9, dict(data=["stdlib", "data/stdlib"])))
    assert difference(log) == ""
    log.write_text(log_text(9, corpus=None))
    assert difference(log, **renamed) == "data stdlib -> data/stdlib, vocab None -> 4096"


def test_a_run_that_changed_on_the_way_is_not_the_same_as_one_that_did_not(log):
    log.write_text(log_text(4, CONFIG | dict(lr=1.0)) + run.log_resumed(4, dict(lr=[1.0, 2e-3])))
    assert run.read_log(log).config == CONFIG
    assert difference(log) == "resumed after step 4 with lr 1.0 -> 0.002"
    log.write_text(log_text(4, CONFIG | dict(micro=2)) + run.log_resumed(4, dict(micro=[2, 4])))
    assert difference(log) == ""


def test_changes_leave_out_what_makes_no_other_model():
    new = CONFIG | dict(lr=1.0, resume=True, keep=3, name="other", allow_changes=True)
    assert run.changes(CONFIG, new) == {"lr": [2e-3, 1.0]}
    assert run.describe_changes(run.changes(CONFIG, new)) == "lr 0.002 -> 1.0"
    assert not set(run.MAY_CHANGE) & set(run.NOT_IDENTITY)


def test_what_makes_another_model_may_neither_change_nor_be_passed_over():
    settings = {field.name for field in dataclasses.fields(quartet.Settings)}
    assert {*run.MAY_CHANGE, *run.NOT_IDENTITY} <= settings
    # The row, the blocks, the batches and the numbers in between: a run has the same to its end.
    assert settings - {*run.MAY_CHANGE, *run.NOT_IDENTITY} == {
        "precision", *AXES, "switch", "keep_first", "keep_last", "size", "seq", "batch", "seed",
        "dtype"}
    # What only says how fast, on what and how often looked at makes two runs comparable.
    assert set(run.HARMLESS) == {
        "micro", "compile", "replay", "device", "gemm", "eval_every", "weight_stats"}


# ---- one process at a time

HOLD = """
import sys, time
from tools import run
with run.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
CONTEND = """
import sys
from data.files import UserError
from tools import run
sys.stdin.readline()
try:
    run.set_aside(sys.argv[1])
    with run.lock(sys.argv[1]):
        print("goes on", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
    sys.stdin.readline()
"""


# Names that look like what a killed process leaves, but are the user's.
MINE = ["log.csv-notes.tmp", "ckpt.pt.backup.tmp", "ckpt-07.pt.tmp", "notes.tmp",
        "log.csv.tmp.mine", "my-ckpt.pt.tmp"]


def start(code, folder):
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.fixture
def holder(folder):
    "a process that holds the lock of the folder"
    process = start(HOLD, folder)
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.wait()


def test_a_second_process_is_refused_with_the_name_of_the_first(holder, folder, log):
    refusal = f"{folder} is in use by process {holder.pid} on {os.uname().nodename}, started 20"
    with pytest.raises(UserError) as caught:
        with run.lock(str(folder)):
            raise AssertionError("two at a time")
    assert str(caught.value).startswith(refusal)
    with pytest.raises(UserError) as caught:
        run.set_aside(str(folder))
    assert str(caught.value).startswith(refusal)
    assert names(folder) == ["lock", "log.csv"] and not (folder.parent / "r.1").exists()
    holder.stdin.close()
    holder.wait()
    assert names(folder) == ["log.csv"]
    with run.lock(str(folder)):
        pass


def test_what_a_killed_process_leaves_does_not_matter(holder, folder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for name in ("log.csv.tmp", "ckpt.pt.tmp", "ckpt-280.pt.tmp", *MINE, "ckpt.pt"):
        (folder / name).write_text("")
    assert "lock" in names(folder)
    with run.lock(str(folder)):
        assert names(folder) == sorted(["ckpt.pt", "lock", *MINE])
        assert f"process {os.getpid()} " in (folder / "lock").read_text()
    assert names(folder) == sorted(["ckpt.pt", *MINE])


def test_a_folder_in_which_nothing_was_written_does_not_stay(tmp_path):
    with run.lock(str(tmp_path / "new")):
        assert names(tmp_path / "new") == ["lock"]
    assert names(tmp_path) == []
    (tmp_path / "old").mkdir()
    with run.lock(str(tmp_path / "old")):
        pass
    assert names(tmp_path) == ["old"]


@pytest.mark.parametrize("is_old", [False, True], ids=["new folder", "an earlier run"])
def test_of_two_processes_that_start_at_the_same_instant_one_goes_on(tmp_path, is_old):
    folder = tmp_path / "r"
    for attempt in range(4):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if is_old:
            folder.mkdir()
            (folder / "log.csv").write_text(GOOD)
        processes = [start(CONTEND, folder) for _ in range(3)]
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = []
        for process in processes:
            line = process.stdout.readline()
            while line.startswith(str(folder)) and "is now" in line:
                line = process.stdout.readline()
            said.append(line)
        assert said.count("goes on\n") == 1, said
        assert sum("is in use by process" in line for line in said) == 2, said
        assert names(tmp_path) == (["r", "r.1"] if is_old else ["r"])
        for process in processes:
            process.communicate("end\n")
        assert not is_old or names(tmp_path / "r.1") == ["log.csv"]


def test_a_folder_in_use_is_refused_and_not_waited_for(folder, monkeypatch):
    def flock(file, how):
        assert how & fcntl.LOCK_NB, "it waits"
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", flock)
    (folder / "lock").write_text("process 1 on another-machine, started 2026-01-02 03:04:05")
    with pytest.raises(UserError, match="in use by process 1 on .*: wait until it ends, or choose"):
        with run.lock(str(folder)):
            raise AssertionError("two at a time")


def test_a_lock_file_that_was_taken_away_meanwhile_is_not_ours(folder, monkeypatch):
    flock = fcntl.flock
    taken = []

    def slow(file, how):
        if not taken:                   # Its holder ends between our open and our lock.
            os.remove(folder / "lock")
            taken.append(file)
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with run.lock(str(folder)):
        assert str(os.getpid()) in (folder / "lock").read_text()
    assert names(folder) == []


def test_where_there_are_no_locks_one_line_says_so(folder, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with run.lock(str(folder)):
        assert names(folder) == ["lock"]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "this file system has no locks (No locks available)" in out


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/r/lock: Not a directory"):
        with run.lock(str(tmp_path / "file" / "r")):
            pass


@pytest.mark.parametrize("make, words", [
    (lambda path: os.symlink("nowhere", path), "cannot write {}/lock: {} is not a folder; mend"),
    (os.mkfifo, "cannot write {}/lock: {} is not a folder; mend that"),
    (lambda path: (os.mkdir(path), os.mkfifo(path / "lock")), "{}/lock is something else than a"),
    (lambda path: (path / "lock").mkdir(parents=True), "cannot write {}/lock: Is a directory;"),
], ids=["a dangling link", "a pipe", "a pipe as a lock", "a folder as a lock"])
def test_what_no_folder_can_be_locked_at_is_named(tmp_path, make, words):
    folder = tmp_path / "r"
    make(folder)
    with pytest.raises(UserError, match=words.replace("{}", str(folder))):
        with run.lock(str(tmp_path / "r")):
            pass


def test_a_folder_that_cannot_be_made_in_proc_is_named():
    with pytest.raises(UserError, match="cannot write /proc/r/lock: No such file or directory"):
        with run.lock("/proc/r"):
            pass


def test_on_a_full_disk_the_lock_is_named_and_nothing_of_it_stays(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*/r/lock: File too large; mend that"):
            with run.lock(str(tmp_path / "r")):
                raise AssertionError("locked without words")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_a_file_of_the_user_that_is_called_lock_stays_as_it_is(folder, log):
    (folder / "lock").write_text("the combination is 1234")
    for function in (run.set_aside, lambda path: run.lock(path).__enter__()):
        with pytest.raises(UserError, match="r/lock is something else than a lock"):
            function(str(folder))
    assert (folder / "lock").read_text() == "the combination is 1234"
    assert names(folder.parent) == ["r"]


# ---- only runs are set aside

def test_an_earlier_run_is_set_aside_whole(log, folder, capsys):
    (folder / "notes.txt").write_text("mine")
    run.set_aside(str(folder))
    assert names(folder.parent) == ["r.1"]
    assert names(folder.parent / "r.1") == ["log.csv", "notes.txt"]
    assert capsys.readouterr().out == f"{folder} existed and is now {folder}.1\n"
    folder.mkdir()
    torch.save(state_after(2), folder / "ckpt-280.pt")
    run.set_aside(str(folder))
    assert names(folder.parent) == ["r.1", "r.2"]


@pytest.mark.parametrize("present", [[], ["log.txt"], ["log.csv.tmp", "ckpt.pt.tmp"]])
def test_a_folder_without_a_run_is_used_as_it_is(folder, present):
    for name in present:
        (folder / name).write_text("")
    run.set_aside(str(folder))
    assert names(folder.parent) == ["r"] and names(folder) == sorted(present)


@pytest.mark.parametrize("name, content", [
    ("thesis.tex", "mine"), ("log.csv", "date,what\n"), ("ckpt-best.pt", ""), ("log.csv/x", ""),
    ("ckpt.pt", "mine"), ("ckpt.pt/x", ""), ("log.csv-notes.tmp", "mine"),
])
def test_what_is_not_a_run_is_never_renamed(folder, name, content):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    before = names(folder)
    with pytest.raises(UserError, match="r is not a run of quartet.py: choose another --name"):
        run.set_aside(str(folder))
    assert names(folder) == before and names(folder.parent) == ["r"]


def test_a_checkpoint_of_another_trainer_is_never_renamed_and_loses_nothing(folder):
    model, optimizer = model_and_optimizer()
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), model_args={},
                    iter_num=1, best_val_loss=1.0, config={}), folder / "ckpt.pt")
    for name in (*MINE, "log.csv.tmp"):
        (folder / name).write_text("mine")
    before = names(folder)
    with pytest.raises(UserError, match="r is not a run of quartet.py: choose another --name"):
        run.set_aside(str(folder))
    assert names(folder) == before and names(folder.parent) == ["r"]


def test_a_file_of_that_name_is_never_renamed(tmp_path):
    (tmp_path / "r").write_text("mine")
    with pytest.raises(UserError, match="r is a file: choose another --name"):
        run.set_aside(str(tmp_path / "r"))
    assert (tmp_path / "r").read_text() == "mine"


# ---- odd neighbours

def test_the_lock_of_another_is_not_removed(folder):
    with run.lock(str(folder)):
        os.remove(folder / "lock")
        (folder / "lock").write_text("another process")
    assert names(folder) == ["lock"]


def test_a_link_to_nowhere_is_a_name_that_is_taken(folder):
    torch.save(state_after(1), folder / "ckpt.pt")
    (folder.parent / "r.1").symlink_to("nowhere")
    run.set_aside(str(folder))
    assert names(folder.parent) == ["r.1", "r.2"]


def test_older_checkpoints_are_in_the_order_of_their_steps(folder):
    for number in (8, 9, 10, 100, 110):
        checkpoint.save(str(folder), state_after(number), 3)
    assert steps_kept(folder) == {"ckpt.pt": 110, "ckpt-100.pt": 100, "ckpt-10.pt": 10}


def test_a_checkpoint_of_another_optimizer_is_refused_in_a_sentence():
    packed = state_after(1)
    del packed["optimizer"]["state"]["bias"]
    with pytest.raises(UserError, match="the checkpoint is of another optimizer, choose another"):
        checkpoint.restore(packed, *model_and_optimizer())
