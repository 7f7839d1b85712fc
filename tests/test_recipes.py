"""Facts about the table of precisions, its axes, and the emulated rows."""
import os, re, subprocess, sys
import pytest, torch, torch.nn.functional as F
import fp4, quartet
from fp4 import emulated, error
from fp4.recipes import Product
from model import Llama
from scaling.logs import label

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EMULATED = [name for name, row in fp4.RECIPES.items() if row.quantised and not row.kernels]


# ---- the methods, written out: float64, rounding by searching the list of a format's values

def values(mantissa, emin, top):
    full = [m * 2. ** (e - mantissa) for e in range(emin, 10) for m in range(2 ** mantissa, 2 ** (mantissa + 1))]
    return torch.tensor([m * 2. ** (emin - mantissa) for m in range(2 ** mantissa)] + [v for v in full if v <= top], dtype=torch.float64)

E2M1, E4M3, INT4 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64), values(3, -6, 448), torch.arange(8.).double()

def to(u, grid): return grid[(u.abs()[..., None] - grid).abs().argmin(-1)] * u.sign()
def largest(v, n): return v.unflatten(-1, (-1, n)).abs().amax(-1, True)
def had(v, n):
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n: H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    v = F.pad(v, (0, -v.shape[-1] % n))
    return (v.unflatten(-1, (-1, n)) @ H * n ** -.5).flatten(-2)

def quest(v):
    b = had(v, 32).unflatten(-1, (-1, 32))
    s = 2 ** (.487079760 * b.std(-1, keepdim=True, correction=0) + 1e-8).log2().floor()
    return (to(b / s, E2M1) * s).flatten(-2), (b / s).abs().flatten(-2) < 6
def absmax34(v, factor=1.):
    b = had(v, 32).unflatten(-1, (-1, 32))
    s = 2 ** (largest(b.flatten(-2), 32).log2().floor() - 2)
    return (to(.75 * b / s, E2M1) * s * 4 / 3 * factor).flatten(-2)
def mxfp8(v):
    v = F.pad(v, (0, -v.shape[-1] % 32))
    s = 2 ** (largest(v, 32).log2().floor() - 8)
    return (to(v.unflatten(-1, (-1, 32)) / s, E4M3) * s).flatten(-2)
def nvfp4(v, top=6, cap=448, ratio=(1,), tile=False, correct=False):
    v, R = F.pad(v, (0, -v.shape[-1] % 16, 0, -len(v) % 16)), len(v)
    t, best = v.abs().max() / (cap * top), None
    for r in ratio:
        a = largest(v, 16)
        if tile: a = a.unflatten(0, (-1, 16)).amax(1, True).expand(-1, 16, -1, -1).flatten(0, 1)
        b = to(a / (top / r * t), E4M3)
        b = torch.where(b == 0, 1., b)
        x = v.unflatten(-1, (-1, 16))
        q = to(x / (b * t), E2M1)
        if correct: b = to(b * (x * x).sum(-1, True) / (x * q * b * t).sum(-1, True), E4M3)
        wrong = (q * b * t - x).square().sum(-1, True)
        if tile: wrong = wrong.unflatten(0, (-1, 16)).sum(1, True).expand(-1, 16, -1, -1).flatten(0, 1)
        if best is None: q0, best = q * b * t, wrong
        else: q0 = torch.where(wrong < best, q * b * t, q0)
    return q0.flatten(-2)[:R]
def sr(v, n): return nvfp4(had(v, n) if n else v, top=6 * 16 / 17)
def eden(v): return nvfp4(had(v, 128), 6 * 16 / 17 / .93, 256, correct=True)
def tensor(v, s, grid=E2M1): return to(v / s, grid) * s
def tile(v):
    p = F.pad(v, (0, -v.shape[1] % 32, 0, -len(v) % 32)).unflatten(-1, (-1, 32)).unflatten(0, (-1, 32))
    s = p.abs().amax((1, 3), True) / 6
    return (to(p / s, E2M1) * s).flatten(0, 1).flatten(-2)[:len(v), :v.shape[1]]
def sawb(v): return (v / (s := 2 / 15 * (12.1 * v.square().mean().sqrt() - 12.2 * v.abs().mean()))).clamp(-8, 7).round() * s
def luq(v): return tensor(v, v.abs().max() / 64, torch.tensor([0., 1, 2, 4, 8, 16, 32, 64]).double())

def quartet_like(x, w, dy, Q, forward):
    (X, mx), (W, mw) = (forward(x), forward(w)) if forward else ((x, 1), (w, 1))
    back = (lambda d, m: had(d * m, 32)) if forward else lambda d, m: d
    return X @ W.T, back(Q(dy) @ Q(W.T).T, mx), back(Q(dy.T) @ Q(X.T).T, mw)
def three(f, g, h): return lambda x, w, dy: (f(x, w), g(dy, w), h(dy.T, x.T))
def nvidia(ratio, cap):
    X, W = lambda x: nvfp4(x, cap=cap, ratio=ratio), lambda w: nvfp4(w, cap=cap, ratio=ratio, tile=True)
    return three(lambda x, w: X(x) @ W(w).T, lambda dy, w: sr(dy, 0) @ W(w), lambda dyt, xt: sr(dyt, 16) @ nvfp4(had(xt, 16)).T)
def with_forward(Q, G): return three(lambda x, w: Q(x) @ Q(w).T, lambda dy, w: G(dy) @ G(Q(w).T).T, lambda dyt, xt: G(dyt) @ G(Q(xt.T).T).T)
def halo(v): return tensor(v, v.abs().max() / 8)
four_six = lambda v: nvfp4(v, cap=256, ratio=(1, 1.5))

STATEMENT = {
    "fp4-bwd": lambda x, w, dy: quartet_like(x, w, dy, absmax34, None),
    "fp4-pma": lambda x, w, dy: quartet_like(x, w, dy, lambda v: absmax34(v, 1.009276), quest),
    "mxfp8": three(*[lambda a, b: mxfp8(a) @ mxfp8(b).T, lambda dy, w: mxfp8(dy) @ mxfp8(w.T).T, lambda dyt, xt: mxfp8(dyt) @ mxfp8(xt).T]),
    "nvfp4": nvidia((1,), 448), "four-over-six": nvidia((1, 1.5), 256),
    "tetrajet2": with_forward(nvfp4, lambda v: sr(v, 32)),
    "quartet2": with_forward(four_six, eden),
    "luq-int4": three(lambda x, w: sawb(x) @ sawb(w).T, lambda dy, w: luq(dy) @ sawb(w), lambda dyt, xt: luq(dyt) @ sawb(xt).T),
    "luq-fp4": three(lambda x, w: tensor(x, x.abs().max() / 6) @ tensor(w, w.abs().max() / 6).T,
                     lambda dy, w: luq(dy) @ tensor(w, w.abs().max() / 6), lambda dyt, xt: luq(dyt) @ tensor(xt, xt.abs().max() / 6).T),
    "jetfire-fp4": three(lambda x, w: tile(tile(x) @ tile(w).T), lambda dy, w: tile(tile(dy) @ tile(w)), lambda dyt, xt: tile(dyt) @ tile(xt).T),
    "halo-fp4": three(lambda x, w: halo(had(x, 32)) @ halo(had(w, 32)).T,
                      lambda dy, w: had((halo(had(dy.T, 8).T) @ halo(w)).T, 8).T, lambda dyt, xt: halo(dyt) @ halo(xt).T),
}


def data(tokens=40, n_in=96, n_out=64):
    torch.manual_seed(0)
    return torch.randn(tokens, n_in), torch.randn(n_out, n_in) * .3, torch.randn(tokens, n_out) * 1e-3


def passes(recipe, x, w, dy):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = emulated.Matmul.apply(x, w, recipe)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


@pytest.fixture
def halves(monkeypatch):
    "every random number is one half: all signs are plus, and stochastic rounding rounds to nearest"
    half = lambda dy, x, n: torch.full((n,), .5)
    monkeypatch.setattr(emulated, "uniform", half)
    monkeypatch.setattr(fp4.baselines, "uniform", half)


@pytest.mark.parametrize("name", STATEMENT)
def test_an_emulated_row_is_the_method_written_out(name, halves):
    x, w, dy = data()
    got = passes(fp4.RECIPES[name], x, w, dy)
    distance = lambda want: max(((g - v).norm() / v.norm()).item() for g, v in zip(got, want))
    double = x.double(), w.double(), dy.double()
    assert distance(STATEMENT[name](*double)) <= 1e-5
    others = [distance(f(*double)) for other, f in STATEMENT.items() if other != name]
    assert min(others) > 1e-3                                   # and no other row's


def test_every_emulated_row_has_a_statement_here_or_a_file_of_tests():
    assert set(EMULATED) == {*STATEMENT, "fp8", "lss-int4"}     # test_fp8.py; below


def test_lss_splits_the_gradient_into_two_four_bit_halves_and_keeps_about_half_of_their_rows(monkeypatch):
    x, w, dy = data(tokens=512)
    row, seen = fp4.RECIPES["lss-int4"], []
    monkeypatch.setattr(fp4.baselines, "product", lambda a, b, f, dtype: seen.append(a) or emulated.product(a, b, f, dtype))
    passes(row, x, w, dy)
    X, W = (to(had(v.double(), 32) / (s := .354 * v.double().square().mean().sqrt()), INT4) * s for v in (x, w))
    assert torch.allclose(passes(row, x, w, dy)[0].double(), X @ W.T, atol=1e-4)
    kept = (seen[1].abs().sum(1) > 0).double().mean()           # of tokens: high or low half or both
    assert .6 < kept < .95
    monkeypatch.setattr(fp4.baselines, "uniform", lambda dy, x, n: torch.cat((torch.full((n - 4 * len(dy),), .5), torch.zeros(4 * len(dy)))))
    seen.clear()
    passes(row, x, w, dy)                                       # all rows kept: both halves together are dy, divided by p
    weight = seen[1].double() / dy.double()
    assert (weight.median(1).values >= .5).all()


@pytest.mark.parametrize("name, axes", [*((name, {}) for name in EMULATED if not fp4.RECIPES[name].method), *(("fp4", dict(signs=s, rotation=r, rounding=q))
    for s in ("before:before:after", "after:before:before") for r in ("16", "128:32:64") for q in ("nearest", "sr"))])
def test_gradients_are_autograds_when_the_quantiser_is_the_identity(name, axes, monkeypatch):
    "so rotations, signs, paddings and factors are all undone"
    monkeypatch.setattr(emulated, "quantize", lambda v, how, noise, square: (v / 3, v.new_full((1, 1), 3.), None))
    x, w, dy = data()
    for got, want in zip(passes(fp4.recipe(name, **axes), x, w, dy), (x @ w.T, dy @ w, dy.T @ x)):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


# ---- biased or not: the mean of 1024 gradients

def ladder(name, product=1):
    "bits gained by four times the draws, up to 1024, against the gradient without backward quantisation"
    x, w, dy = data(tokens=32, n_in=64, n_out=64)
    row = fp4.RECIPES[name]
    forward, backward = emulated.METHODS[row.method]
    _, saved = forward(x, w, row)
    if not row.method: exact = emulated.backward(dy, saved, row._replace(dgrad=None, wgrad=None))
    elif name == "fp8": exact = dy @ (saved[2].float() * saved[3]), dy.T @ (saved[0].float() * saved[1])
    elif "luq" in name: exact = dy @ (saved[2] * saved[3]), dy.T @ (saved[0] * saved[1])
    elif "lss" in name: exact = [emulated.rotate(d * m, 32) for d, m in ((dy @ (saved[2] * saved[3]), saved[4]), (dy.T @ (saved[0] * saved[1]), saved[5]))]
    elif "jetfire" in name: exact = dy @ saved[1], dy.T @ saved[0]
    else: exact = dy @ w, dy.T @ x
    torch.manual_seed(1)
    total, bits = [0, 0], []
    for n in range(1, 1025):
        total = [t + d.double() for t, d in zip(total, backward(dy, saved, row))]
        if n in (1, 4, 16, 64, 256, 1024): bits.append([-torch.log2((t / n - e).norm() / e.norm()) for t, e in zip(total, exact)])
    return [[(b[i] - a[i]).item() for a, b in zip(bits, bits[1:])] for i in (0, 1)]


@pytest.mark.parametrize("name", ["tetrajet2", "quartet2", "luq-int4", "luq-fp4", "lss-int4"])
def test_the_mean_of_an_unbiased_gradient_gains_a_bit_for_four_times_the_draws(name):
    for gains in ladder(name): assert min(gains) >= .6 and sum(gains) >= 4.5, gains


@pytest.mark.parametrize("name", ["nvfp4", "four-over-six"])
def test_nvidias_recipe_is_unbiased_in_dgrad_only_because_x_rounds_to_nearest_in_wgrad(name):
    dgrad, wgrad = ladder(name)
    assert min(dgrad) >= .8 and wgrad[-1] <= .6, (dgrad, wgrad)


@pytest.mark.parametrize("name", ["fp4-bwd", "fp8", "mxfp8", "jetfire-fp4", "halo-fp4"])
def test_a_biased_gradients_mean_stops_gaining(name):
    for gains in ladder(name): assert gains[-1] <= .5, gains


# ---- errors

@pytest.mark.parametrize("how, mse, misalignment", [
    (Product("mxfp4", "floor"), 2.235e-2, 5.2e-2), (Product("mxfp4", "nearest"), 1.338e-2, 1.5e-2),
    (Product(), 1.366e-2, 9.45e-3), (Product(rounding="stochastic"), 2.778e-2, 0), (Product("mxfp4", "absmax"), 1.335e-2, 2.2e-2)])
def test_errors_over_an_octave_are_the_papers_table_2(how, mse, misalignment):
    torch.manual_seed(0)
    got = error.gaussian(how)
    assert abs(got[0] / mse - 1) <= .01 and abs(got[1] - misalignment) <= 6e-4, got


@pytest.mark.parametrize("changes, mse", [
    (dict(), 9.05e-3), (dict(scale="four-six"), 7.56e-3), (dict(right="square"), 12.40e-3), (dict(scale="four-six", right="square"), 12.38e-3),
    (dict(rounding="stochastic"), 23.55e-3), (dict(scale="four-six", rounding="stochastic"), 17.48e-3), (dict(rounding="eden"), 9.32e-3)])
def test_errors_of_nvfp4_are_quartet_iis_table_1(changes, mse):
    torch.manual_seed(0)
    got = error.gaussian(Product("nvfp4", "absmax", 128, "before")._replace(**changes), sigmas=4)
    assert abs(got[0] / mse - 1) <= .02, got
    biased = changes.get("rounding") is None or "scale" in changes          # choosing by the error is a bias too
    assert abs(got[1]) > 1e-3 if biased else abs(got[1]) <= 4e-4


def test_eden_takes_the_shrinkage_away_and_pma_most_of_it():
    shrinkage = lambda **how: error.gaussian(Product(**how), sigmas=4)[1]
    assert abs(shrinkage(rounding="eden")) <= 1e-4 and abs(shrinkage(scale="pma")) <= 1e-3 and shrinkage() >= 5e-3


def test_gradients_keep_their_length_through_depth_only_where_the_rounding_is_unbiased():
    def model(**changes):
        torch.manual_seed(0)
        m = Llama(4, 128, 2, 256, 32, "fp4-bwd" if changes or quantised else "bf16", torch.float32, **changes)
        with torch.no_grad(): [p.mul_(3) for p in m.blocks.parameters() if p.dim() == 2]       # so that blocks matter beside the residual
        return m
    torch.manual_seed(1)
    x, y = torch.randint(256, (2, 8, 32))
    quantised = False
    exact = error.gradients(model(), x, y)
    assert len(exact) == 5 and exact[0].shape == (8, 32, 128)
    quantised, got = True, {}
    for name, changes in error.BACKWARD.items():
        torch.manual_seed(2)
        got[name] = error.depth(exact, model(**changes), x, y)
        assert got[name][0] == (1, 1) or abs(got[name][0][1] - 1) <= 1e-6                      # no block yet
    aligned = lambda name, k: got[name][k][1]
    assert abs(aligned("stochastic", 3) - 1) <= .02 and abs(aligned("nearest, EDEN", 3) - 1) <= .02
    assert aligned("QuEST", 3) < .85 < aligned("nearest", 3) < .96 and aligned("nearest", 4) < aligned("nearest", 1)
    assert got["stochastic"][4][0] < got["nearest"][4][0]       # but in direction, to nearest is better


def test_the_depth_table_of_a_checkpoint_ranks_the_roundings_and_ignores_what_the_run_had_kept(tmp_path, capsys):
    (tmp_path / "text.py").write_text("".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(1500)))
    args = ["--precision", "fp4", "--keep_first", "4", "--steps", "60", "--eval_every", "60", "--batch", "4", "--seq", "64"]
    assert quartet.cli([*args, "--data", str(tmp_path / "text.py"), "--out", str(tmp_path), "--name", "r", "--sample_tokens", "0"]) == 0
    capsys.readouterr()
    error.checkpoint(str(tmp_path / "r" / "ckpt.pt"), sequences=4)
    _, _, head, *lines = capsys.readouterr().out.splitlines()
    got = {line[:20].strip(): [tuple(map(float, pair.split("/"))) for pair in re.findall(r"\S+ /\s*\S+", line[20:])] for line in lines}
    assert head.split() == ["backward", "1", "2", "3", "4"] and got.keys() == error.BACKWARD.keys()
    last = {name: values[-1] for name, values in got.items()}
    assert last["QuEST"][1] < last["nearest"][1] < .97 and all(abs(last[name][1] - 1) < .05 for name in ("stochastic", "nearest, EDEN", "nearest, PMA"))
    assert last["stochastic"][0] < last["nearest"][0] < 1


# ---- axes

def test_a_value_changes_the_products_it_belongs_to_and_three_values_all():
    row, base = fp4.recipe("fp4", rotation="none"), fp4.RECIPES["fp4"]
    assert [p.rotation for p in row[:3]] == [0, 0, 0] and [p.signs for p in row[:3]] == ["none"] * 3 and not row.kernels
    row = fp4.recipe("fp4", rotation="32:none:128")
    assert [p.rotation for p in row[:3]] == [32, 0, 128] and [p.signs for p in row[:3]] == ["none", "none", "before"]
    row = fp4.recipe("fp4", scale="quest-nearest", rounding="sr")
    assert row == fp4.recipe("fp4-sr", scale="nearest") and row.kernels and base.kernels
    assert fp4.recipe("fp4", dgrad="off", wgrad="off") == fp4.RECIPES["fp4-fwd"]
    assert fp4.recipe("fp4", forward="off") == fp4.RECIPES["fp4-bwd"] == fp4.recipe("bf16", dgrad="on", wgrad="on")
    assert fp4.recipe("fp4", rounding="sr", signs="after") == fp4.RECIPES["fp4-original"]
    assert [p.scale for p in fp4.recipe("fp4", format="nvfp4")[:3]] == ["absmax"] * 3


@pytest.mark.parametrize("precision, axes, words", [
    ("fp4", dict(scale="four-six"), "forward: scale 'four-six' is not one of format mxfp4's: floor, nearest, absmax34"),
    ("fp4", dict(rotation="none", signs="before"), "dgrad: random signs before a rotation need a rotation"),
    ("fp4", dict(rounding="eden", signs="after"), "dgrad: rounding eden is unbiased only behind a random rotation"),
    ("fp4", dict(rounding="sr:sr:sr"), "forward: stochastic rounding is unbiased only where the scale neither clips nor corrects, and floor of mxfp4 does"),
    ("quartet2", dict(scale="four-six:four-six:four-six"), "dgrad: scale four-six chooses by the error"),
    ("nvfp4", dict(rotation="32"), "dgrad: this row multiplies with the forward product's weight as it is"),
    ("nvfp4", dict(format="mxfp4", dgrad="off", rotation="32:32:32", signs="before:before:before", rounding="eden:eden:eden"),
     "forward: square blocks of mxfp4 have no rounding eden"),
    ("bf16", dict(scale="nearest"), "bf16 has no quantised product whose scale could change"),
    ("fp4-fwd", dict(rounding="sr"), "fp4-fwd has no quantised product whose rounding could change"),
    ("luq-int4", dict(format="mxfp4"), "luq-int4 is a method of its own and has no format to change"),
    ("fp4", dict(rotation="32:64"), "rotation '32:64': give one value or three, forward:dgrad:wgrad"),
    ("fp4", dict(rotation="48"), "rotation '48' is not one of none, 16, 32, 64, 128"),
    ("fp4", dict(wgrad="on:off:on"), "wgrad 'on:off:on': give one value"),
    ("fp4", dict(rotations="32"), "rotations '32' is not one of format, scale, rotation"),
])
def test_a_combination_without_meaning_is_refused_with_a_sentence_and_exit_code_2(precision, axes, words, capsys):
    with pytest.raises(ValueError, match=re.escape(words)): fp4.recipe(precision, **axes)
    if "rotations" in axes: return
    assert quartet.cli(["--precision", precision, "--steps", "1", *(f"--{k}={v}" for k, v in axes.items())]) == 2
    assert words in capsys.readouterr().err


def test_every_axis_is_a_flag_and_names_the_run():
    settings = quartet.parse(["--rotation", "none", "--signs", "none", "--dgrad", "off", "--scale", "nearest"])
    assert label(vars(settings)) == "fp4-nearest-rotation-none-signs-none-dgrad-off"
    assert {f"--{axis}" for axis in fp4.AXES} == {"--format", "--scale", "--rotation", "--signs", "--rounding", "--forward", "--dgrad", "--wgrad"}


# ---- emulation and kernels

@pytest.mark.parametrize("axes", [dict(signs="after"), dict(signs="after", scale="nearest"), dict(dgrad="off", wgrad="off"),
                                  dict(rotation="32:none:none"), dict(rotation="32:none:32", signs="none:none:after")])
def test_the_emulation_of_what_the_kernels_compute_agrees_with_them(axes):
    x, w, dy = data()                                           # signs after the Hadamard cancel: nothing is random
    row = fp4.recipe("fp4", **axes)
    layer = fp4.Linear(96, 64, "fp4", **axes)
    assert row.kernels
    with torch.no_grad(): layer.weight.copy_(w)
    a = x.clone().requires_grad_()
    y = layer(a)
    y.backward(dy)
    for got, want in zip(passes(row, x, w, dy), (y.detach(), a.grad, layer.weight.grad)):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", EMULATED)
def test_nan_reaches_outputs_and_gradients_of_its_token_in_every_row(name):
    x, w, dy = data()
    x[3, 40] = float("nan")
    y, dx, dw = passes(fp4.RECIPES[name], x, w, torch.where(torch.arange(40)[:, None] == 3, torch.nan, dy))
    assert y[3].isnan().all() and dx[3].isnan().all() and dw.isnan().any()


@pytest.mark.parametrize("name", EMULATED)
def test_any_number_of_tokens_and_features_of_odd_multiples_work_in_bfloat16(name):
    x, w, dy = data(7, 48, 80)
    for n, got in zip(((7, 80), (7, 48), (80, 48)), passes(fp4.RECIPES[name], x.bfloat16(), w, dy.bfloat16())):
        assert got.shape == n and got.isfinite().all() and got.abs().max() > 0


def test_zeros_stay_zeros_in_every_row():
    x, w, dy = data()
    for name in EMULATED:
        y, dx, dw = passes(fp4.RECIPES[name], 0 * x, w, 0 * dy)
        assert not y.any() and not dx.any() and not dw.any(), name


def test_the_readmes_own_recipe_runs_in_under_twenty_lines(tmp_path):
    code = re.search(r"```python\n(# mine\.py.*?)```", open(os.path.join(ROOT, "README.md")).read(), re.S).group(1)
    assert len(code.splitlines()) < 20
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "text.py").write_text("".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(1500)))
    done = subprocess.run([sys.executable, tmp_path / "mine.py", "--precision", "mine", "--steps", "3", "--batch", "4", "--seq", "32", "--data", tmp_path / "text.py",
                           "--sample_tokens", "5", "--out", tmp_path], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "tiny-mine" / "ckpt.pt").exists(), done.stderr


@pytest.mark.parametrize("name", ["nvfp4", "luq-int4"])
def test_compiled_equals_eager_in_bfloat16_but_for_roundings_that_fusion_leaves_out(name):
    torch.compiler.reset()                                      # float32, where it is equality: test_linear.py
    x, w, dy = data()
    layer, results = fp4.Linear(96, 64, name), []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        a = x.bfloat16().requires_grad_()
        layer.weight.grad = None
        torch.manual_seed(3)
        y = run(a)
        y.backward(dy.bfloat16())
        results.append((y.detach(), a.grad, layer.weight.grad))
    for a, b in zip(*results): assert (a.float() - b.float()).norm() <= 5e-3 * b.float().norm()
