"""What a product in FP8 does not hold exactly, and how it is counted."""
import pytest
import torch

import fp4
import quartet
from data import tokens
from data.corpus import open_corpus
from fp4.backend import select_backend
from fp4.window import WINDOWS, Count, Window, count_beyond, count_in_model
from operands import tiles_of
from tools import run

fp4.build()
has_gpu = torch.cuda.is_available()
gpu = pytest.mark.skipif(not has_gpu, reason="no GPU")
TILES = WINDOWS["own"]


def random_packed(rows, columns, octaves, seed):
    "codes that are often zero, and scales that span so many octaves; a few are NaN"
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    blocks = codes.unflatten(1, (-1, 16))
    blocks[torch.rand(blocks.shape[:2], generator=generator) < .2] = 0x80
    scales = torch.randint(60, 60 + octaves, (rows, columns // 32), generator=generator)
    scales[torch.rand(scales.shape, generator=generator) < .05] = 255
    return codes, scales.to(torch.uint8)


@pytest.mark.parametrize("octaves", [8, 15, 16, 29, 30, 60])
@pytest.mark.parametrize("rows, columns", [(1, 32), (70, 288), (33, 128), (200, 1024)])
def test_blocks_are_counted_like_those_that_the_definition_of_the_tiles_loses(
        rows, columns, octaves):
    packed = random_packed(rows, columns, octaves, octaves)
    for is_right, its_window in enumerate(TILES):
        lost = tiles_of(*packed, bool(is_right))[2]
        assert count_beyond(packed, its_window) == Count(lost, packed[1].numel())


def test_with_a_scale_a_row_every_block_of_the_row_counts():
    codes = torch.full((2, 16 * 9), 0x21, dtype=torch.uint8)
    scales = torch.full((2, 9), 100, dtype=torch.uint8)
    scales[0, 8] = 100 - 15             # Nothing else lies in its tile.
    assert count_beyond((codes, scales), TILES[0]).beyond == 0
    assert count_beyond((codes, scales), WINDOWS["fp8"][0]) == Count(1, 18)
    scales[0, 8] += 1
    assert count_beyond((codes, scales), WINDOWS["fp8"][0]).beyond == 0


def layer_and_loss(precision="fp4", n_tokens=64):
    torch.manual_seed(0)
    layer = fp4.Linear(64, 96, fp4.recipe(precision))
    x = torch.randn(n_tokens, 64)
    dy = torch.randn(n_tokens, 96)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, dy):
            return (self.layer(x) * dy).sum()

    return Loss(), x, dy


@pytest.mark.parametrize("precision, n_blocks", [
    # x, w, and in the backward pass dy, w.T, dy.T and x.T
    ("fp4", 64 * 2 + 96 * 2 + 64 * 3 + 64 * 3 + 96 * 2 + 64 * 2),
    ("fp4-fwd", 64 * 2 + 96 * 2),
])
def test_every_operand_of_every_product_is_counted(precision, n_blocks):
    model, x, dy = layer_and_loss(precision)
    counts = count_in_model(model, x, dy, windows_of=lambda layer: TILES)
    assert counts == {"layer": Count(0, n_blocks)}
    # In a window of no octave, each block is as far from the largest as from itself.
    nothing_fits = (Window(0, 1, 4), Window(0, 32, 4))
    counts = count_in_model(model, x, dy, windows_of=lambda layer: nothing_fits)
    assert counts == {"layer": Count(n_blocks, n_blocks)}


def test_a_token_whose_gradient_is_tiny_is_beyond_the_window_where_it_meets_others():
    """dy's rows lie alone in a group; in dy.T, 32 tokens are a block, and 128 of them a group."""
    model, x, dy = layer_and_loss(n_tokens=128)
    dy[32:64] *= 2. ** -20
    counts = count_in_model(model, x, dy, windows_of=lambda layer: TILES)
    assert counts["layer"].beyond == 96         # the second block of each row of dy.T


def test_counting_changes_nothing():
    model, x, dy = layer_and_loss("fp4-sr")
    model(x, dy).backward()
    before = model.layer.weight.grad.clone()
    state = torch.random.get_rng_state()
    count_in_model(model, x, dy, windows_of=lambda layer: TILES)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(before, model.layer.weight.grad)
    assert not model.layer._forward_hooks


def test_counting_that_fails_leaves_no_hooks():
    model, x, dy = layer_and_loss()
    with pytest.raises(RuntimeError):
        count_in_model(model, x, dy[:, :5], windows_of=lambda layer: TILES)
    assert not model.layer._forward_hooks


def test_a_cpu_has_no_window_and_the_model_does_not_run():
    model, x, dy = layer_and_loss()
    assert count_in_model(model, None, None) == {}
    assert fp4.blocks_beyond_window(model, x, dy) is None
    # Where there is a GPU, a model on the CPU has the backend of that GPU.
    model.layer.backend = select_backend((9, 0))
    assert count_in_model(model, None, None) == {}


def test_the_products_in_fp8_have_a_window_and_the_others_have_none():
    named = {(capability, gemm): select_backend(capability, gemm).window
             for capability, gemm in [((9, 0), "own"), ((9, 0), "fp8"), ((8, 9), "auto"),
                                      ((9, 0), "bf16"), ((8, 0), "auto"), ((7, 5), "auto"),
                                      ((10, 0), "own"), ((12, 0), "own"), (None, "auto")]}
    assert list(named.values()) == ["own", "fp8", "fp8", "", "", "", "", "", ""]


@gpu
@pytest.mark.parametrize("compiled", ["--compile", "--no_compile"])
def test_a_run_that_counts_has_the_losses_of_one_that_does_not(compiled, tmp_path, monkeypatch):
    def history():
        argv = ["--size", "tiny", "--data", "stdlib", "--precision", "fp4-sr", "--steps", "6",
                "--eval_every", "2", "--sample_tokens", "1", "--out", str(tmp_path), compiled]
        quartet.main(argv)
        return run.read_log(tmp_path / "tiny-fp4-sr" / "log.csv").history

    counted = history()
    assert [row.beyond_window is None for row in counted] == [True, False] * 3
    monkeypatch.setattr(fp4, "blocks_beyond_window", lambda *args: None)
    assert [row.loss for row in counted] == [row.loss for row in history()]


def test_the_log_has_the_blocks_beyond_the_window_of_a_million():
    row = run.Step(1, 2., 3., 1e-3, 1., 5., 100., "n/a", 12.345)
    text = run.log_head(dict(precision="fp4", name="a", size="tiny", data="stdlib", seed=0,
                             batch=1, seq=32), "cpu", "none") + run.log_row(row)
    assert text.splitlines()[-2].endswith(",mfu,beyond_window,bpb")
    assert run.parse_log(text).history[-1].beyond_window == 12.35
    without = run.log_row(row._replace(beyond_window=None))
    assert run.parse_log(text + without.replace("1,", "2,", 1)).history[-1].beyond_window is None
    cut_off = "3,2.0,3.0,1e-3,1.0,5.0,100,12.1%\n"
    assert len(run.parse_log(text + cut_off).history) == 1


@pytest.mark.parametrize("step", [0, 24, pytest.param(100, marks=gpu),
                                  pytest.param(400, marks=gpu), pytest.param(1000, marks=gpu)])
def test_hardly_a_block_of_a_run_on_source_code_is_beyond_the_window(step, trained):
    """Every operand of every product: at first, and after more and more steps.

    On an H100 it was 7e-5 at the most. In a window of four octaves, it is a good part of them.
    """
    counts, in_four_octaves = trained(step)
    beyond, blocks = map(sum, zip(*counts.values()))
    assert len(counts) == 16 and blocks > 50_000
    assert beyond <= 2e-4 * blocks, counts
    beyond, blocks = map(sum, zip(*in_four_octaves.values()))
    assert beyond > 2e-4 * blocks


@pytest.fixture(scope="module")
def trained():
    """a function: step -> count_in_model of a tiny model after so many steps"""
    device = "cuda" if has_gpu else "cpu"
    argv = ["--size", "tiny", "--data", "stdlib", "--device", device, "--steps", "1000",
            "--batch", "4", "--seq", "128", "--no_compile"]
    cfg = quartet.resolve(quartet.parse(argv))
    corpus = open_corpus(cfg.data, cfg.vocab)
    model = quartet.build_model(cfg, corpus.vocabulary.size)
    optimizer = quartet.build_optimizer(model, cfg)
    done = 0

    def train_until(step):
        nonlocal done
        while True:
            batch = tokens.batch(corpus.train, done, 4, cfg.seq, 0)
            x, y = quartet.to_device(batch, device)
            fp4.quantize_weights(model)
            if done == step:
                narrow = (Window(4, 1, 4), Window(4, 32, 4))
                return [count_in_model(model, x, y, windows_of=lambda layer: windows)
                        for windows in (TILES, narrow)]
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    return train_until
