"""Facts about the trainer, from the command line to the files it leaves."""
import dataclasses
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch

import fp4
import quartet
from data import prepare, tokens
from data.corpus import open_corpus
from data.files import UserError
from model import PRESETS, Llama, ModelConfig, count_params
from test_model import doubled, losses_by_hand
from tools import machine, schedule
from tools.run import Step, read_log

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BRIEF = ("--sample_tokens", 5)
# On a GPU the default is a larger model, compiled, which would take most of a test's time.
# A run is evaluated at its end only, unless a test says otherwise.
SMALL = ("--size", "tiny", "--batch", 4, "--seq", 32, "--no_compile", "--eval_every", 1000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "a small text, so that a run takes seconds"
    folder = tmp_path_factory.mktemp("corpus")
    functions = [f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(1500)]
    (folder / "text.py").write_text("".join(functions))
    return prepare.prepare(str(folder / "text.py"), 320, out=str(folder / "corpus"))


@pytest.fixture
def run(corpus, tmp_path, capsys):
    "run('--steps', 3) -> exit code, last line on stderr, what was printed"
    def run(*args):
        capsys.readouterr()
        first = ("--data", corpus, "--out", tmp_path, *SMALL)
        code = quartet.run_cli([str(arg) for arg in (*first, *args)])
        printed = capsys.readouterr()
        last_line = (printed.err.strip().splitlines() or [""])[-1]
        return code, last_line, printed.out
    return run


def log(folder):
    "the columns of the log that do not measure time"
    with open(folder / "log.csv") as file:
        return [line.split(",")[:5] for line in file if line[0] not in "#s"]


def state(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---- the model

PAPER = {
    "30M": 30_482_560, "50M": 49_556_736, "100M": 102_777_856, "200M": 203_188_480,
    "430M": 443_068_288, "800M": 822_151_168, "1600M": 1_586_076_160, "3200M": 3_171_068_928,
    "7B": 6_476_271_616,
}


@pytest.mark.parametrize("size", PAPER)
def test_each_size_has_the_papers_number_of_parameters(size):
    config = PRESETS[size].model_config(32000, 512)
    with torch.device("meta"):
        model = Llama(config, fp4.RECIPES["bf16"], torch.bfloat16)
    in_blocks = sum(p.numel() for p in model.parameters())
    in_blocks -= model.embed.weight.numel() + model.head.weight.numel()
    assert in_blocks == config.n_params == PAPER[size]
    assert count_params(config.n_layer, config.n_embd) == PAPER[size]


def test_the_model_is_causal_and_its_loss_ignores_targets_of_minus_one():
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_embd=64, n_head=2, vocab_size=128, block_size=32)
    model = Llama(config, fp4.RECIPES["fp4"], torch.float32)
    x = torch.randint(128, (2, 32))
    changed = x.clone()
    changed[:, 20] = (x[:, 20] + 1) % 128
    a = model(x)
    b = model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])
    y = torch.full_like(x, -1)
    y[0, 3] = 7
    assert torch.allclose(model(x, y), -a[0, 3].log_softmax(-1)[7])


def test_rotary_embedding_depends_on_the_distance_only():
    from model import rope, rope_table
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    cos, sin = rope_table(50, 64)

    def score(i, j):
        turned_q = rope(q, cos[i:i + 1], sin[i:i + 1])
        turned_k = rope(k, cos[j:j + 1], sin[j:j + 1])
        return (turned_q * turned_k).sum()

    assert torch.allclose(score(7, 3), score(45, 41), atol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-4)


def test_the_schedule_is_the_papers():
    lr = [quartet.lr_at(s, 1000, 1.0) for s in range(1000)]
    assert lr[0] == pytest.approx(.01) and max(lr) == lr[100] == 1 and lr[-1] == pytest.approx(.1)
    assert np.all(np.diff(lr[:101]) > 0) and np.all(np.diff(lr[100:]) < 0)
    assert lr[50] == pytest.approx((1 + .01) / 2)
    short = [quartet.lr_at(s, n, 1.) for n in (1, 2, 9, 10, 11) for s in range(n)]
    assert all(np.isfinite(short))


@pytest.mark.parametrize("steps", [20, 359, 2861])
def test_the_schedule_is_torchs_one_cycle_with_its_peak_after_a_tenth(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    # Its first part ends one step before this share of all steps.
    share = (steps // 10 + 1) / steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-4, total_steps=steps, pct_start=share, anneal_strategy="cos",
        cycle_momentum=False, div_factor=100, final_div_factor=.1)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert quartet.lr_at(step, steps, 3e-4) == pytest.approx(expected, rel=1e-6), step
        optimizer.step()
        if step + 1 < steps:
            schedule.step()


# ---- the trainer, written out

TWO_BLOCKS = dataclasses.replace(PRESETS["tiny"], n_layer=2, n_embd=64, n_head=2)


@pytest.fixture
def two_blocks(monkeypatch):
    "tiny with two small blocks: a run takes a second"
    monkeypatch.setitem(PRESETS, "tiny", TWO_BLOCKS)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """a folder of tokens: those for validation are mostly others than those to train on, and fill
    one sequence of 32 and a part of another"""
    folder = tmp_path_factory.mktemp("uneven")
    rng = np.random.default_rng(0)
    for name, values in (("train", np.cumsum(rng.integers(1, 4, 3000)) % 90),
                         ("val", 99 - rng.integers(0, 40, 38))):
        with tokens.TokenWriter(str(folder / f"{name}.bin"), 100) as writer:
            writer.append(values)
    return folder


def lr_by_hand(step, steps, peak):
    warmup = steps // 10
    if step < warmup:
        return peak / 100 + (peak - peak / 100) * (1 - math.cos(math.pi * step / warmup)) / 2
    share = (step - warmup) / (steps - 1 - warmup)
    return peak / 10 + (peak - peak / 10) * (1 + math.cos(math.pi * share)) / 2


def adamw_by_hand(name, w, gradient, moments, t, lr, weight_decay):
    "step t, from 1 on, of w, with beta 0.9 and 0.95; in place"
    m, v = moments
    m.copy_(.9 * m + .1 * gradient)
    v.copy_(.95 * v + .05 * gradient ** 2)
    if name.startswith("blocks.") and "norm" not in name:
        w *= 1 - lr * weight_decay
    w -= lr * (m / (1 - .9 ** t)) / ((v / (1 - .95 ** t)).sqrt() + 1e-8)


def validation_by_hand(weights, val, cfg):
    losses = []
    for first in range(0, len(val) - 1, cfg.seq):
        part = torch.from_numpy(val[first:first + cfg.seq + 1])
        losses.append(losses_by_hand(weights, part[:-1], part[1:], TWO_BLOCKS.n_head))
    return torch.cat(losses).mean().item()


def train_by_hand(weights, train, val, cfg):
    "-> (loss, validation loss, lr, norm of the gradient) of each step; weights change in place"
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    rows = []
    for step in range(cfg.steps):
        batch = tokens.batch(train, step, cfg.batch, cfg.seq, cfg.seed)
        for w in weights.values():
            w.requires_grad_()
        losses = [losses_by_hand(weights, x, y, TWO_BLOCKS.n_head)
                  for x, y in zip(*map(torch.from_numpy, batch))]
        loss = torch.cat(losses).mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()])))
        norm = math.sqrt(sum((g ** 2).sum().item() for g in gradients.values()))
        shrink = min(1, cfg.clip / norm) if cfg.clip else 1
        lr = lr_by_hand(step, cfg.steps, cfg.lr)
        for name, w in weights.items():
            w.requires_grad_(False)
            adamw_by_hand(name, w, shrink * gradients[name], moments[name], step + 1, lr,
                          cfg.weight_decay)
        is_evaluated = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
        value = validation_by_hand(weights, val, cfg) if is_evaluated else None
        rows.append((loss.item(), value, lr, norm))
    return rows


@pytest.mark.parametrize("settings", [
    "--steps 20 --eval_every 8",
    "--steps 12 --eval_every 5 --micro 1 --clip 0.3 --weight_decay 5 --lr 1e-2 --seed 3",
    "--steps 8 --eval_every 8 --micro 2 --clip 0",
], ids=["defaults", "clipped-and-decaying-in-four-microbatches", "not-clipped"])
def test_a_run_is_that_of_a_trainer_written_out(run, two_blocks, uneven, tmp_path, settings):
    args = ["--data", uneven, "--vocab", 100, "--precision", "bf16", "--dtype", "float32",
            "--device", "cpu", "--name", "r", *settings.split()]
    assert run(*args, *BRIEF)[0] == 0
    got = state(tmp_path / "r")
    cfg = quartet.Settings(**got["config"])
    first = quartet.build_model(cfg, 100)
    weights = doubled(first)
    val = np.fromfile(uneven / "val.bin", np.uint16, offset=1024).astype(np.int64)
    train = tokens.open_tokens(str(uneven / "train.bin"))
    rows = train_by_hand(weights, train, val, cfg)
    for (number, *row), expected in zip(got["history"], rows, strict=True):
        loss, value, lr, norm = expected
        assert row[0] == pytest.approx(loss, abs=5e-5), number
        assert row[1] == (value if value is None else pytest.approx(value, abs=2e-4)), number
        assert row[2] == pytest.approx(lr, rel=1e-9), number
        assert row[3] == pytest.approx(norm, rel=2e-4), number
    for name, w in weights.items():
        moved = (w - doubled(first)[name]).norm()
        assert (got["model"][name] - w).norm() <= 1e-3 * moved, name


def resolved(*args):
    return quartet.resolve(quartet.parse([str(arg) for arg in (*args, "--device", "cpu")]))


def test_only_matrices_inside_the_blocks_decay_and_the_papers_values_are_the_defaults(two_blocks):
    cfg = resolved("--size", "tiny")
    model = quartet.build_model(cfg, 100)
    optimizer = quartet.build_optimizer(model, cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(names.values())
    layers = ("attention.qkv", "attention.proj", "mlp.gate_up", "mlp.proj")
    matrices = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert {name for name, group in grouped if group["weight_decay"]} == matrices
    for name, group in grouped:
        assert group["weight_decay"] == (.1 if name in matrices else 0)
        assert (group["betas"], group["eps"], group["lr"]) == ((.9, .95), 1e-8, 2e-3)
    assert isinstance(optimizer, torch.optim.AdamW) and cfg.clip == 1
    for size, preset in PRESETS.items():
        cfg = resolved("--size", size)
        assert (cfg.lr, cfg.batch, cfg.seq) == (preset.lr, preset.batch, preset.seq)
    cfg = resolved("--size", "50M", "--lr", 3e-4, "--batch", 8, "--seq", 64)
    assert (cfg.lr, cfg.batch, cfg.seq) == (3e-4, 8, 64)


def test_the_length_of_a_run_is_by_the_parameters_without_embedding_and_head():
    # 25 x 30,482,560 tokens in steps of 512 x 512, and so on; what is left over is not trained.
    for args, steps in (
            (["--size", "30M"], 2907),
            (["--size", "30M", "--tokens_per_param", 100, "--batch", 128], 46512),
            (["--size", "7B", "--tokens_per_param", .5], 12352),
            (["--size", "3M"], 1951),
            (["--size", "30M", "--tokens", "1e6", "--seq", 256], 7),
            (["--size", "30M", "--steps", 9], 9),
            (["--size", "tiny"], 350)):
        cfg = resolved(*args)
        assert schedule.n_steps(cfg, PRESETS[cfg.size].n_params) == steps, args


def test_a_run_by_tokens_per_parameter_has_the_steps_of_its_blocks(run, two_blocks, tmp_path):
    # A block has 4 x 64 x 64 + 3 x 64 x 256 weights and two norms; a step has 128 tokens.
    n_params = 2 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64) + 64
    assert run("--tokens_per_param", 3.5 * 128 / n_params, "--name", "r", *BRIEF)[0] == 0
    assert len(log(tmp_path / "r")) == 3


def test_first_weights_depend_on_the_seed_and_on_nothing_else(two_blocks):
    def weights(*args):
        return dict(quartet.build_model(resolved("--size", "tiny", *args), 100).named_parameters())

    first = weights()
    torch.manual_seed(5)                # What was drawn before does not matter,
    torch.randn(7)
    for args in ([], ["--precision", "bf16"], ["--keep_first", 1], ["--batch", 2], ["--lr", 1]):
        assert equal(first, weights(*args)), args
    drawn = [weights("--seed", seed) for seed in (0, 1, 2)]
    assert equal(first, drawn[0])
    for a, b in itertools.combinations(drawn, 2):
        for name in first:
            assert torch.equal(a[name], b[name]) == ("norm" in name), name


def test_each_step_of_each_seed_draws_random_numbers_of_its_own(run, two_blocks, monkeypatch):
    batch = tokens.batch
    drawn = []

    def draw(*args):
        drawn.append(torch.rand(()).item())     # as the microbatch that is asked for would
        return batch(*args)

    monkeypatch.setattr(tokens, "batch", draw)
    for seed in (0, 1):
        assert run("--steps", 3, "--micro", 2, "--seed", seed, "--name", seed, *BRIEF)[0] == 0
    assert len(set(drawn)) == len(drawn) == 2 * 3 * 2


@pytest.mark.parametrize("vocab_size, rows", [(64, 64), (65, 128), (100, 128), (32000, 32000)])
def test_the_vocabulary_is_padded_to_a_multiple_of_64(two_blocks, vocab_size, rows):
    model = quartet.build_model(resolved("--size", "tiny", "--seq", 16), vocab_size)
    assert model.embed.weight.shape == model.head.weight.shape == (rows, 64)
    assert model.config.block_size == 16
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_a_microbatch_is_the_largest_power_of_two_that_divides_the_batch_and_fits():
    for n_embd, batch in itertools.product((64, 640, 1024, 1280, 2048, 3072, 4096),
                                           (1, 2, 6, 7, 48, 512, 1024)):
        powers = [2 ** i for i in range(7)]
        fit = [p for p in powers if p * n_embd <= 65536 and batch % p == 0]
        assert quartet.default_microbatch(batch, n_embd) == max(fit), (n_embd, batch)
    assert resolved("--size", "800M").micro == 32
    assert resolved("--size", "30M", "--batch", 24).micro == 8


def test_speed_and_utilisation_of_a_step_are_those_of_its_time(
        run, two_blocks, tmp_path, monkeypatch):
    clock = itertools.count(10, 2e-6)   # A step takes two millionths of a second.
    monkeypatch.setattr(quartet, "time", types.SimpleNamespace(
        perf_counter=lambda: next(clock), monotonic=time.monotonic))
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert run("--steps", 2, "--micro", 2, "--name", "r", *BRIEF)[0] == 0
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64) + 64
    head = 320 * 64
    per_token = 6 * (blocks + head) + 12 * 2 * 64 * 32      # two layers, 64 wide, 32 tokens
    share = 128 / 2e-6 * per_token / 989e12
    assert .05 < share < .1
    history = [Step(*row) for row in state(tmp_path / "r")["history"]]
    assert len(history) == 2
    for row in history:
        assert row.ms == pytest.approx(2e-3, rel=1e-6)
        assert row.tokens_per_s == pytest.approx(128 / 2e-6, rel=1e-6)
        assert row.mfu == f"{share:.1%}"


@pytest.mark.parametrize("args, evaluated", [
    (["--steps", 25], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25]),
    (["--steps", 7], [1, 2, 3, 4, 5, 6, 7]),
    (["--steps", 7, "--eval_every", 3], [3, 6, 7]),
])
def test_a_run_is_evaluated_and_saved_ten_times_or_as_asked_and_at_its_end(
        corpus, two_blocks, tmp_path, monkeypatch, args, evaluated):
    saved = []
    save = quartet.checkpoint.save

    def noted(folder, packed, keep):
        saved.append(len(packed["history"]))
        save(folder, packed, keep)

    monkeypatch.setattr(quartet.checkpoint, "save", noted)
    argv = ["--data", corpus, "--out", tmp_path, *SMALL, "--precision", "bf16", "--name", "r",
            *BRIEF, *args]
    if "--eval_every" not in args:
        i = argv.index("--eval_every")
        del argv[i:i + 2]
    assert quartet.run_cli([str(arg) for arg in argv]) == 0
    assert [int(row[0]) for row in log(tmp_path / "r") if row[2]] == evaluated == saved


# ---- which runs, and with which settings

def test_comma_lists_mean_every_combination_seed_by_seed():
    argv = ["--precision", "fp4, fp4-fwd", "--scale", "floor,nearest", "--seed", "3", "--seeds",
            "2", "--keep_last", "1", "--device", "cpu"]
    expected = [(seed, precision, scale) for seed in (3, 4) for precision in ("fp4", "fp4-fwd")
                for scale in ("floor", "nearest")]
    for name, start in (([], "tiny"), (["--name", "n"], "n")):
        configs = list(quartet.expand_runs(quartet.parse([*argv, *name])))
        assert [(cfg.seed, cfg.precision, cfg.scale) for cfg in configs] == expected
        assert [cfg.name for cfg in configs] == [
            f"{start}-{precision}-{scale}-keep_last-1-seed{seed}"
            for seed, precision, scale in expected]
        assert {cfg.seeds for cfg in configs} == {1}
    alone, = quartet.expand_runs(quartet.parse(["--name", "n", "--seed", "3", "--device", "cpu"]))
    assert (alone.name, alone.seed) == ("n", 3)


def test_the_largest_seed_and_the_largest_number_of_runs_are_still_taken(monkeypatch):
    monkeypatch.setattr(quartet, "resolve", lambda cfg: cfg)

    def runs(*args):
        return list(quartet.expand_runs(quartet.parse([str(arg) for arg in args])))

    largest = quartet.cli.LARGEST_INT
    assert runs("--seed", largest - 1, "--seeds", 2)[-1].seed == largest
    with pytest.raises(UserError, match="the last seed is too large"):
        runs("--seed", largest - 1, "--seeds", 3)
    assert len(runs("--precision", "bf16,fp4", "--seeds", 5000)) == 10_000
    with pytest.raises(UserError, match="10,002 runs, more than 10,000"):
        runs("--precision", "bf16,fp4", "--seeds", 5001)


def test_a_checkpoints_settings_hold_but_for_what_was_typed_or_is_the_machines():
    old = resolved("--size", "tiny", "--seed", 5, "--steps", 7, "--lr", 3e-3, "--name", "old",
                   "--keep", 4, "--compile", "--data", "text")
    packed = dict(config=vars(old))
    new = quartet.parse(["--name", "new", "--sample_tokens", "9", "--device", "cpu"])
    got = quartet.settings_of(packed, new)
    assert (got.seed, got.steps, got.lr, got.data) == (5, 7, 3e-3, "text")
    assert (got.name, got.keep, got.sample_tokens, got.compile) == ("new", 2, 9, False)
    typed = dataclasses.replace(new, lr=1e-4, tokens=4096 * 512)
    got = quartet.settings_of(packed, typed, ("lr", "tokens"))
    assert (got.lr, got.tokens, got.steps, got.seed) == (1e-4, 4096 * 512, None, 5)
    packed["config"] = vars(old) | dict(odd=1)
    with pytest.raises(UserError, match="of another version"):
        quartet.settings_of(packed, new)
    packed["config"] = vars(old) | dict(batch=-1)
    with pytest.raises(UserError, match="--batch -1: must be 1 or more"):
        quartet.settings_of(packed, new)


def test_blocks_that_are_kept_may_be_all_and_not_more():
    assert resolved("--size", "tiny", "--keep_first", 3, "--keep_last", 1).keep_first == 3
    model = quartet.build_model(resolved("--size", "tiny", "--keep_first", 2, "--keep_last", 1), 64)
    quantised = [block.mlp.proj.recipe.is_quantized for block in model.blocks]
    assert quantised == [False, False, True, False]
    with pytest.raises(UserError, match="tiny has 4 blocks: keep_first 3 and keep_last 2 are more"):
        resolved("--size", "tiny", "--keep_first", 3, "--keep_last", 2)


def test_a_row_that_multiplies_mxfp4_has_the_backend_for_it():
    for args, is_used in ((["--precision", "fp4", "--scale", "mse"], True),
                          (["--precision", "fp4-bwd"], True), (["--precision", "nvfp4"], False)):
        model = quartet.build_model(resolved("--size", "tiny", *args), 64)
        assert model.backend is (quartet.fp4.build() if is_used else None)


# ---- runs

def stopping_after(step):
    "run.show_step, which sends SIGTERM with this step; the next one is still done and saved"
    show_step = quartet.run.show_step

    def show_and_stop(bar, row, steps):
        if row.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        show_step(bar, row, steps)

    return show_and_stop


# The validation loss after 30 steps from seed 0. Two rows that round otherwise end .01 apart, and
# fp4 without the gradient of its inputs ends at 1.690. jetfire-fp4 and lss-int4 are not in the
# list: their seeds 0 to 4 end between 1.60 and 1.70, and between 1.59 and 1.70. So does seed 0 when
# the order of a sum changes, as it does from one processor to another.
LOSSES = {
    "bf16": 1.637, "fp4": 1.645, "fp4-sr": 1.647, "fp4-fwd": 1.647, "fp4-bwd": 1.636,
    "fp4-original": 1.642, "quartet2": 1.631, "luq-int4": 1.688, "luq-fp4": 1.673,
    "halo-fp4": 1.665,
}


@pytest.mark.parametrize("precision", fp4.RECIPES)
def test_the_loss_falls_in_every_precision(run, two_blocks, tmp_path, precision):
    assert run("--precision", precision, "--steps", 30, "--lr", 6e-3, "--name", "r", *BRIEF)[0] == 0
    rows = log(tmp_path / "r")
    first = float(rows[0][1])
    last = float(rows[-1][2])
    assert abs(first - math.log(320)) <= .03        # At first all 320 tokens are equally likely.
    assert 1.58 <= last <= 1.74
    assert abs(last - LOSSES.get(precision, last)) <= .03
    assert {"log.csv", "curve.svg", "ckpt.pt"} == set(os.listdir(tmp_path / "r"))


def test_the_log_says_what_made_it(run, tmp_path):
    run("--steps", 2, "--name", "r", *BRIEF)
    lines = open(tmp_path / "r" / "log.csv").read().splitlines()
    assert [line.split()[1] for line in lines[:5]] == ["commit", "config", "device", "fp4", "data"]
    assert '"precision": "fp4"' in lines[1]
    assert '"train_tokens": ' in lines[4]
    assert lines[5] == "step,loss,val,lr,norm,ms,tokens_per_s,mfu,beyond_window,bpb"
    assert lines[6].split(",")[7].endswith("%" if "H100" in lines[2] else "n/a")


def test_an_evaluation_is_in_bits_per_byte_of_the_validation_text_too(run, corpus, tmp_path):
    _, _, out = run("--steps", 4, "--name", "r", "--eval_every", 2, *BRIEF)
    opened = open_corpus(corpus)
    ids = [i for shard in opened.val for i in shard[1:].tolist()]
    n_bytes = len(opened.vocabulary.encoding.decode_bytes([i for i in ids if i != 319]))
    found = read_log(tmp_path / "r" / "log.csv")
    expected = [row.val and row.val * len(ids) / math.log(2) / n_bytes for row in found.history]
    assert [value is None for value in expected] == [True, False, True, False]
    assert [row.bpb for row in found.history] == [
        value and pytest.approx(value, abs=5.1e-5) for value in expected]
    assert f" tokens of {n_bytes / len(ids):.2f} bytes; " in out
    last = expected[-1]
    assert f"val {found.vals[-1]:.4f}  bpb {last:.4f}  lr" in out
    assert f"r: final val loss {found.vals[-1]:.4f}, {last:.4f} bits per byte; " in out
    assert [Step(*row).bpb for row in state(tmp_path / "r")["history"]] == pytest.approx(expected)


def test_the_same_seed_gives_the_same_log_and_another_seed_another(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--steps", 6, "--name", name, "--seed", seed, *BRIEF)
    assert log(tmp_path / "a") == log(tmp_path / "b") != log(tmp_path / "c")


def test_microbatches_change_nothing_but_the_order_of_sums(run, tmp_path):
    for micro in (4, 1):
        run("--precision", "bf16", "--dtype", "float32", "--steps", 4, "--name", micro,
            "--micro", micro, *BRIEF)
    for a, b in zip(log(tmp_path / "4"), log(tmp_path / "1")):
        assert abs(float(a[1]) - float(b[1])) <= 1e-3


def test_a_comma_list_trains_each_on_the_same_batches_and_ends_with_a_table(run, tmp_path):
    code, _, out = run("--precision", "bf16,fp4,fp4-sr", "--steps", 4, *BRIEF)
    assert code == 0 and "gap" in out and (tmp_path / "tiny-bf16-fp4-fp4-sr.svg").exists()
    first = [float(log(tmp_path / f"tiny-{p}")[0][1]) for p in ("bf16", "fp4", "fp4-sr")]
    # Their weights are the same, so that only quantisation tells the first losses apart.
    assert first[1] == first[2] and 0 < abs(first[0] - first[1]) < .02
    run("--precision", "fp4", "--steps", 4, "--name", "alone", *BRIEF)
    assert log(tmp_path / "alone") == log(tmp_path / "tiny-fp4")


def test_an_axis_changes_the_row_and_names_the_run(run, tmp_path):
    assert run("--steps", 2, "--scale", "floor,nearest", *BRIEF)[0] == 0
    assert log(tmp_path / "tiny-fp4-floor") != log(tmp_path / "tiny-fp4-nearest")


def test_a_compiled_run_learns_the_same(run, tmp_path, monkeypatch):
    one_block = dataclasses.replace(TWO_BLOCKS, n_layer=1)      # It compiles in half the time.
    monkeypatch.setitem(PRESETS, "tiny", one_block)
    for name, flag in (("eager", "--no_compile"), ("compiled", "--compile")):
        run("--steps", 4, "--name", name, "--dtype", "float32", *BRIEF, flag)
    eager = state(tmp_path / "eager")
    compiled = state(tmp_path / "compiled")
    # They sum in another order. Losses were 1e-6 apart and norms 1e-7; a value of a block that is
    # rounded to its other neighbour makes 1e-5.
    for a, b in zip(eager["history"], compiled["history"], strict=True):
        assert abs(a[1] - b[1]) <= 1e-4
        assert abs(a[4] - b[4]) <= 1e-3 * a[4]
    for name, weight in eager["model"].items():
        assert (compiled["model"][name] - weight).norm() <= 1e-3 * weight.norm(), name


def test_a_gpu_compiles_by_default_and_a_cpu_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not quartet.resolve(quartet.parse([])).compile
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert quartet.resolve(quartet.parse([])).compile
    assert not quartet.resolve(quartet.parse(["--no_compile"])).compile
    assert quartet.resolve(quartet.parse(["--compile", "--device", "cpu"])).compile


def test_an_earlier_run_of_the_same_name_is_set_aside(run, tmp_path):
    for _ in range(2):
        code, _, out = run("--steps", 2, "--name", "r", *BRIEF)
    assert code == 0 and "existed and is now" in out
    assert log(tmp_path / "r") == log(tmp_path / "r.1")


def test_a_sample_comes_from_the_checkpoint_and_repeats(run):
    _, _, out = run("--steps", 30, "--name", "r", *BRIEF)
    a, b = (run("--name", "r", "--sample", "def f", "--sample_tokens", 20)[2] for _ in range(2))
    assert a == b and a.startswith("def f") and len(a) > 20
    # The one at the end of a run comes from the same weights.
    assert f"\n{run('--name', 'r', '--sample', 'def', *BRIEF)[2]}" in out


def test_output_to_a_pipe_has_a_line_a_step_and_no_progress_bar(corpus, tmp_path):
    command = [sys.executable, "quartet.py", "--data", corpus, "--out", tmp_path, *SMALL,
               "--steps", 3, "--eval_every", 3, *BRIEF]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == [
        "1/3", "2/3", "3/3"]
    assert "it/s" not in done.stderr + done.stdout and "\r" not in done.stderr + done.stdout


# ---- stop and resume

KILL = """
import os, signal, sys, torch, quartet
save = torch.save
saved = []
def killed(state, file):
    saved.append(state)
    if len(saved) == 2:                     # in the middle of the second checkpoint
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = killed
quartet.run_cli(sys.argv[1:])
"""


def test_a_run_killed_in_a_checkpoint_and_resumed_is_bit_for_bit_the_same(run, tmp_path, corpus):
    args = ["--precision", "fp4-sr", "--steps", 9, "--eval_every", 3, *BRIEF]
    assert run(*args, "--name", "whole")[0] == 0
    command = [sys.executable, "-c", KILL, "--data", corpus, "--out", tmp_path, *SMALL, *args,
               "--name", "killed"]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    assert len(state(tmp_path / "killed")["history"]) == 3 and len(log(tmp_path / "killed")) == 6
    assert run(*args, "--name", "killed", "--resume")[0] == 0
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    a = state(tmp_path / "killed")
    b = state(tmp_path / "whole")
    for key in ("model", "optimizer"):
        assert equal(a[key], b[key]), key
    assert [row[:5] for row in a["history"]] == [row[:5] for row in b["history"]]
    assert not (tmp_path / "killed" / "ckpt.pt.tmp").exists()


def test_resuming_with_another_model_stops_and_keeps_the_checkpoint(run, tmp_path):
    run("--steps", 4, "--name", "r", *BRIEF)
    before = open(tmp_path / "r" / "ckpt.pt", "rb").read()
    code, sentence, _ = run("--steps", 4, "--name", "r", "--resume", "--size", "3M")
    assert code == 2 and "is another run (size tiny -> 3M" in sentence
    code, sentence, _ = run("--steps", 6, "--name", "r", "--resume", "--size", "3M",
                            "--allow_changes")
    assert code == 2 and "the checkpoint is of another model" in sentence
    assert open(tmp_path / "r" / "ckpt.pt", "rb").read() == before


# ---- bad input: one sentence, exit code 2, nothing half-written

@pytest.mark.parametrize("args, words", [
    (["--precison", "fp4"], "did you mean --precision?"),
    (["--precision", "fp5"], "precision 'fp5' is not one of bf16, fp4"),
    (["--precision", "bf16,fp5"], "'fp5'"),
    (["--scale", "ceil"], "scale 'ceil' is not one of floor, nearest"),
    (["--size", "31M"], "size '31M' is not one of tiny, 3M"),
    (["--steps", "1.5"], "--steps"),
    (["--steps", "inf"], "--steps"),
    (["--steps", "-3"], "--steps -3: must be 1 or more"),
    (["--lr", "nan"], "--lr nan: must be"),
    (["--keep_first", "-1"], "--keep_first -1: must be 0 or more"),
    (["--tokens_per_param", "1e308"], "must be 1000000 or less"),
    (["--tokens", "1e18"], "more than 2,147,483,648 steps"),
    (["--seed", "18446744073709551616"], "--seed"),
    (["--seeds", "1e9"], "runs, more than 10,000"),
    (["--name", "../r"], "is not the name of a folder"),
    (["--name", ""], "is not the name of a folder"),
    (["--out", ""], "is not the path of a folder"),
    (["--scale", "floor,,nearest"], "scale '' is not one of floor, nearest"),
    (["--gemm", "fp64"], "gemm 'fp64' is not one of auto, fp8"),
    (["--device", "cuda:one"], "device 'cuda:one' is not cpu, cuda or cuda:NUMBER"),
    (["--steps", "3", "--tokens", "1e6"], "give only one of steps and tokens"),
    (["--tokens", "100"], "shorter than one step of 128 tokens"),
    (["--batch", "6", "--micro", "4"], "batch 6 does not divide into microbatches of 4"),
    (["--seq", "100000"], "too few for a sequence of 100000"),
    (["--device", "tpu"], "device 'tpu' is not cpu, cuda or cuda:NUMBER"),
    (["--dtype", "float16"], "dtype 'float16' is not bfloat16 or float32"),
    (["--data", "nosuch"], "data 'nosuch' is not a file, a folder, or one of stdlib"),
    (["--sample", "x", "--name", "none"], "there is no checkpoint"),
    (["--sample", "x", "--precision", "bf16,fp4"], "--sample is for one run"),
    (["--resume", "--precision", "bf16,fp4"], "--resume is for one run"),
])
def test_a_bad_setting_is_one_sentence_and_writes_nothing(run, tmp_path, args, words):
    has_length = "--steps" in args or "--tokens" in args
    length = [] if has_length or "--tokens_per_param" in args else ["--steps", 2]
    code, sentence, _ = run(*length, *args)
    assert code == 2 and words in sentence and sentence.startswith("quartet: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_said(run):
    assert "torch sees no GPU" in run("--device", "cuda")[1]


def test_damaged_token_files_and_tokens_outside_the_vocabulary_stop_the_run(run, tmp_path, corpus):
    bad = tmp_path / "bad"
    shutil.copytree(corpus, bad)
    with open(bad / "train.bin", "r+b") as file:
        file.truncate(2000)
    code, sentence, _ = run("--data", bad, "--steps", 2)
    assert code == 2 and "train.bin is truncated" in sentence
    with tokens.TokenWriter(str(bad / "train.bin"), 4096) as writer:
        writer.append(np.full(5000, 4000))
    code, sentence, _ = run("--data", bad, "--steps", 2, "--name", "r")
    assert code == 2 and "token 4000 at position" in sentence


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(run, tmp_path):
    path = tmp_path / "r" / "ckpt.pt"
    path.parent.mkdir()
    path.write_bytes(b"hello")
    code, sentence, _ = run("--resume", "--name", "r", "--steps", 2)
    assert code == 2 and f"{path} is damaged or not a checkpoint of quartet.py" in sentence
    torch.save({"weights": 1}, path)
    assert "is of another version" in run("--resume", "--name", "r", "--steps", 2)[1]


def test_a_loss_that_is_not_finite_stops_with_step_loss_rate_and_checkpoint(run, tmp_path):
    code, sentence, _ = run("--precision", "bf16", "--lr", "1e10", "--steps", 40,
                            "--eval_every", 1, "--name", "r")
    assert code == 3 and "gradient norm nan at step 2, lr 1.55e+09" in sentence
    assert f"the last good checkpoint is {tmp_path}/r/ckpt.pt" in sentence
    assert all(p.isfinite().all() for p in state(tmp_path / "r")["model"].values())


def mounted(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    return folder


def test_a_full_disk_is_said_and_keeps_the_last_checkpoint(run, tmp_path):
    # A checkpoint has 13 MB, and the old one stays while the new one is written.
    disk = mounted(tmp_path / "disk", "size=30m")
    path = disk / "r" / "ckpt.pt"
    try:
        assert run("--steps", 2, "--out", disk, "--name", "r", *BRIEF)[0] == 0
        before = open(path, "rb").read()
        with open(disk / "ballast", "wb") as file:
            file.write(bytes(8 << 20))
        code, sentence, _ = run("--steps", 4, "--out", disk, "--name", "r", "--resume")
        assert code == 2 and "cannot write" in sentence and "ckpt.pt" in sentence
        assert open(path, "rb").read() == before
        assert not (disk / "r" / "ckpt.pt.tmp").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_said(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, sentence, _ = run("--steps", 2, "--out", tmp_path / "file")
    assert code == 2 and f"{tmp_path}/file/tiny-fp4" in sentence and "Not a directory" in sentence
    disk = mounted(tmp_path / "ro", "size=1m,ro")
    try:
        assert "Read-only file system" in run("--steps", 2, "--out", disk)[1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- the command as it is typed

def shell(*command, cwd=ROOT, **kw):
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, **kw)


def test_the_exit_code_reaches_the_shell():
    done = shell(sys.executable, "quartet.py", "--size", "huge")
    sentence = "quartet: size 'huge' is not one of " + ", ".join(PRESETS) + "\n"
    assert done.returncode == 2 and done.stderr == sentence


def test_help_lists_every_setting_with_its_meaning_and_imports_no_torch():
    code = ("import runpy, sys\n"
            "sys.argv = ['quartet.py', '--help']\n"
            "try:\n    runpy.run_path('quartet.py', run_name='__main__')\n"
            "finally:\n    assert not {'torch', 'numpy', 'tiktoken'} & sys.modules.keys()\n")
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    for name in vars(quartet.parse([])):
        assert f"--{name} " in done.stdout
    assert "largest norm of the gradient" in done.stdout


def test_the_flags_of_the_axes_are_those_of_the_recipes():
    settings = vars(quartet.parse([]))
    assert list(settings)[-len(fp4.AXES):] == list(fp4.AXES)
    changed = quartet.parse(["--scale", "nearest", "--rotation=32:none:32", "--no_compile"])
    assert quartet.parse(quartet.cli.to_flags(changed)) == changed


@pytest.fixture
def bare_python(tmp_path):
    "the interpreter of these tests, but without any package"
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path):
    "a copy of the sources without a .venv"
    copy = tmp_path / "tree"
    skipped = shutil.ignore_patterns("build", "__pycache__", "*.csv", "*.svg")
    for name in ("fp4", "data", "tools"):
        shutil.copytree(os.path.join(ROOT, name), copy / name, ignore=skipped)
    for name in ("quartet.py", "model.py"):
        shutil.copy(os.path.join(ROOT, name), copy)
    return copy


def start_in(tree, python, *args):
    # -I leaves out the folder of the script as well, so that it is put back here.
    code = f"import runpy, sys; sys.path.insert(0, {str(tree)!r}); sys.argv[0] = 'quartet.py'; " \
           "runpy.run_path('quartet.py', run_name='__main__')"
    return shell(python, "-c", code, *args, cwd=tree)


def test_where_torch_is_missing_one_sentence_says_what_to_do_and_help_works(tree, bare_python):
    done = start_in(tree, bare_python, "--precision", "fp4")
    assert done.returncode == 2 and "make kernels" in done.stderr, done.stderr
    assert done.stderr.startswith("quartet: ") and done.stderr.count("\n") == 1
    done = start_in(tree, bare_python, "--help")
    assert done.returncode == 0 and "--precision" in done.stdout
    done = start_in(tree, bare_python, "--precison", "fp4")
    assert done.returncode == 2 and "did you mean --precision?" in done.stderr


def test_where_only_venv_has_torch_the_script_goes_on_there(tree, bare_python):
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "the Python of .venv got: $@"\n')
    python.chmod(0o755)
    done = start_in(tree, bare_python, "--precision", "fp4", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the Python of .venv got: quartet.py --precision fp4 --steps 3\n"


def test_without_a_compiler_the_definition_runs_and_one_line_says_so(tmp_path):
    shutil.copytree(os.path.join(ROOT, "fp4"), tmp_path / "fp4",
                    ignore=shutil.ignore_patterns("build", "__pycache__"))
    code = ("import fp4, torch\n"
            "layer = fp4.Linear(64, 32, fp4.recipe('fp4'))\n"
            "layer(torch.randn(3, 64)).sum().backward()\n"
            "print(layer.weight.grad.norm() > 0)\n")
    done = shell(sys.executable, "-c", code, cwd=tmp_path,
                 env={**os.environ, "CXX": "/nonexistent/c++"})
    lines = done.stderr.strip().splitlines()
    assert done.stdout == "tensor(True)\n"
    announced = [line for line in lines if line.startswith("fp4 runs reference.py")]
    assert len(announced) == 1, done.stderr
