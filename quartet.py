"""
Train a Llama in 4-bit floating point with Quartet's method (arXiv 2505.14669), or in any precision of the
table in fp4/recipes.py.

    python quartet.py                                          # tiny model, FP4, on the machine you have
    python quartet.py --precision bf16,fp4                     # both, from the same weights on the same batches
    python quartet.py --size 30M --data python --compile       # the paper's smallest model, on a GPU
    python quartet.py --sample "def main(" --name tiny-fp4     # continue a text with a trained model

Results go to out/NAME: log.csv, curve.svg, ckpt.pt. Read on: settings, sizes, schedule, checkpoint, loop, main.
"""
import argparse, dataclasses, difflib, glob, itertools, json, math, os, subprocess, sys, time
from dataclasses import dataclass
import torch
from tqdm import tqdm
import fp4                                                      # the table of precisions
from data import prepare, tokenizer, tokens                     # corpora, vocabulary, token files
from model import Llama                                         # the model; knows nothing of training


# ---- settings: parser, help text and default in one. A comma list of precisions (or axes) is an ablation

@dataclass(frozen=True)
class Config:
    precision: str = "fp4"          # a row of fp4/recipes.py; a comma list trains one after the other
    scale: str = ""                 # changes the row: forward scale floor | nearest
    rounding: str = ""              # changes the row: backward rounding nearest | stochastic
    signs: str = ""                 # changes the row: random signs before | after the Hadamard
    size: str = ""                  # a row of SIZES; default: tiny on a CPU, 30M on a GPU
    data: str = "stdlib"            # stdlib | python | shakespeare | fineweb | c4 | text file | folder
    seq: int = 0                    # tokens in a sequence; default: 512, tiny 256
    batch: int = 0                  # sequences in a step; default: 512 (262,144 tokens), tiny 16
    micro: int = 0                  # sequences in a microbatch; default: by size
    steps: int = 0                  # length of the run, in steps ...
    tokens: int = 0                 # ... or in tokens ...
    tokens_per_param: float = 0     # ... or in tokens per parameter; default: 25, tiny 300 steps
    lr: float = 0                   # peak learning rate; default: the paper's for the size
    weight_decay: float = 0.1       # on the linears of the blocks only
    clip: float = 1.0               # largest norm of the gradient
    seed: int = 0                   # of weights, batches, rotations and rounding
    eval_every: int = 0             # steps from one evaluation and checkpoint to the next; default: a tenth of the run
    out: str = "out"                # folder of all runs
    name: str = ""                  # folder of this run; default: SIZE-PRECISION
    resume: bool = False            # continue from the run's checkpoint, bit for bit
    compile: bool = False           # torch.compile the model
    sample: str = ""                # do not train: continue this text with the run's checkpoint
    sample_tokens: int = 200        # how long a sample is
    device: str = ""                # cpu | cuda; default: a GPU if there is one
    dtype: str = ""                 # of activations: bfloat16 | float32; default: float32 on a CPU

AXES = "precision", *fp4.AXES

#         layers width heads   lr       tiny is ours, the others are the paper's (Table 4 and main_setup.sh)
SIZES = {
    "tiny":  (4,   128,   2,   4e-3),
    "30M":   (6,   640,   5,   1.2e-3),
    "50M":   (7,   768,   6,   1.2e-3),
    "100M":  (8,   1024,  8,   6e-4),
    "200M":  (10,  1280,  10,  3e-4),
    "430M":  (13,  1664,  13,  1.5e-4),
    "800M":  (16,  2048,  16,  7.5e-5),
    "1600M": (20,  2560,  20,  3.75e-5),
    "3200M": (28,  3072,  24,  7.5e-5),
    "7B":    (32,  4096,  32,  9.375e-6),
}

# dense BF16 TFLOP/s by the vendors' datasheets; the first name that the device's contains
PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362, "L4": 121,
        "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71}


class Stop(Exception):
    """the run cannot start or go on; the message is one sentence for the user"""


def parse(argv):
    source = open(__file__).read()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        help = source.split(f"    {f.name}: ")[1].split("\n")[0].split("# ")[1]
        kind = dict(action="store_true") if f.type is bool else dict(type=number if f.type is int else f.type, metavar="X")
        parser.add_argument("--" + f.name, default=f.default, help=help, **kind)
    def unknown(message):
        word = message.split("arguments: ")[-1].split()[0].split("=")[0]
        near = difflib.get_close_matches(word, ["--" + f.name for f in dataclasses.fields(Config)], 1)
        raise Stop(message + (f" (did you mean {near[0]}?)" if near else " (python quartet.py --help lists all)"))
    parser.error = unknown
    return Config(**vars(parser.parse_args(argv)))


def number(text):
    """3e9 and 3_000_000_000 are numbers of tokens too"""
    value = float(text)
    if value != int(value): raise ValueError
    return int(value)


def complete(cfg):
    """one run's settings, with the defaults that depend on others filled in and everything checked"""
    def check(ok, sentence):
        if not ok: raise Stop(sentence)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(device.split(":")[0] in ("cpu", "cuda"), f"device {device!r} is not cpu or cuda")
    check(device == "cpu" or torch.cuda.is_available(), "device cuda: torch sees no GPU here")
    size = cfg.size or ("tiny" if device == "cpu" else "30M")
    check(size in SIZES, f"size {size!r} is not one of {', '.join(SIZES)}")
    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        check(f.type not in (int, float) or math.isfinite(value) and value >= 0, f"{f.name} must not be negative, got {value}")
    try: fp4.recipe(cfg.precision, **axes(cfg))
    except ValueError as error: raise Stop(str(error))
    tiny, width = size == "tiny", SIZES[size][1]
    batch, dtype = cfg.batch or (16 if tiny else 512), cfg.dtype or ("float32" if device == "cpu" else "bfloat16")
    micro = cfg.micro or math.gcd(batch, max(1, min(64, 2 ** int(math.log2(65536 / width)))))
    check(batch % micro == 0, f"batch {batch} does not divide into microbatches of {micro} sequences")
    check(dtype in ("bfloat16", "float32"), f"dtype {dtype!r} is not bfloat16 or float32")
    given = [n for n in ("steps", "tokens", "tokens_per_param") if getattr(cfg, n)]
    check(len(given) <= 1, f"give only one of {' and '.join(given)}")
    changed = "".join(f"-{value}" for value in axes(cfg).values())
    return dataclasses.replace(cfg, device=device, size=size, dtype=dtype, batch=batch, micro=micro,
        seq=cfg.seq or (256 if tiny else 512), lr=cfg.lr or SIZES[size][3],
        steps=300 if tiny and not given else cfg.steps, tokens_per_param=cfg.tokens_per_param or (0 if tiny or given else 25),
        name=cfg.name or f"{size}-{cfg.precision}{changed}")


def axes(cfg): return {axis: getattr(cfg, axis) for axis in fp4.AXES if getattr(cfg, axis)}


# ---- schedule, evaluation, checkpoint, log

def lr_at(step, steps, peak):
    """a tenth of the run up from peak/100, then down to peak/10, both along a cosine"""
    warm = steps // 10
    if step < warm: low, t = peak / 100, 1 - step / warm
    else:           low, t = peak / 10, (step - warm) / max(1, steps - 1 - warm)
    return low + (peak - low) * (1 + math.cos(math.pi * t)) / 2


def to_device(batch, device): return [torch.from_numpy(a).to(device, non_blocking=True) for a in batch]


@torch.no_grad()
def evaluate(model, shards, cfg, vocab):
    """mean loss over every token of the validation set, in a fixed order"""
    total = count = 0
    for x, y in tokens.val_batches(shards, cfg.micro, cfg.seq, vocab):
        n = int((y >= 0).sum())
        total, count = total + model(*to_device((x, y), cfg.device)).double() * n, count + n
    return (total / count).item()


def write(path, save):
    """save(file) into path, whole or not at all"""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".tmp", "wb") as file:
            save(file)
            file.flush(), os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:                    # torch.save reports a full disk as a RuntimeError
        if os.path.exists(path + ".tmp"): os.remove(path + ".tmp")
        raise Stop(f"cannot write {path}: {getattr(error, 'strerror', None) or 'is the disk full?'}; what was there before is kept")


def load(path):
    if not os.path.exists(path): raise Stop(f"there is no checkpoint {path}: train first, or name another run with --name")
    try: state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error: raise Stop(f"{path} is not a checkpoint of quartet.py ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("version") != 1: raise Stop(f"{path} is not a checkpoint of this version of quartet.py")
    return state


def provenance(cfg, how):
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    try: commit = (git("rev-parse", "--short", "HEAD") or "unknown") + (" + uncommitted changes" if git("status", "--porcelain", "-uno") else "")
    except OSError: commit = "unknown"
    return [f"# commit {commit}", f"# config {json.dumps(dataclasses.asdict(cfg))}",
            f"# device {device_name(cfg)}, torch {torch.__version__}, {torch.get_num_threads()} threads", f"# fp4 {how}"]


def device_name(cfg): return torch.cuda.get_device_name() if cfg.device != "cpu" else "CPU"


def curves(path, runs):
    """{label: [(step, train loss, val loss or None)]} as a picture: val loss as a line, train loss faint behind it"""
    points = [(s, l) for rows in runs.values() for s, *losses in rows for l in losses if l is not None and math.isfinite(l)]
    if not points: return
    right, top = max(s for s, _ in points) or 1, sorted(l for _, l in points)[int(.98 * (len(points) - 1))]
    low = min(l for _, l in points)
    at = lambda s, l: f"{60 + 560 * s / right:.1f},{20 + 300 * (1 - (min(l, top) - low) / ((top - low) or 1)):.1f}"
    line = lambda pts, style: f'<polyline points="{" ".join(at(*p) for p in pts)}" fill="none" {style}/>'
    text = lambda x, y, words, style="": f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="13" {style}>{words}</text>'
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 370"><rect width="640" height="370" fill="white"/>',
           '<path d="M60,20V320H620" fill="none" stroke="#999"/>', text(300, 358, "step"), text(600, 338, right), text(56, 338, 0)]
    for i in range(5):
        l = low + (top - low) * i / 4
        svg.append(text(54, at(0, l).split(",")[1], f"{l:.2f}", 'text-anchor="end"'))
    for i, (label, rows) in enumerate(runs.items()):
        color = ("#333", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e")[i % 6]
        svg += [line([r[:2] for r in rows if math.isfinite(r[1])], f'stroke="{color}" opacity="0.3"'),
                line([(r[0], r[2]) for r in rows if r[2] is not None and math.isfinite(r[2])], f'stroke="{color}" stroke-width="2"'),
                text(430, 40 + 18 * i, label, f'fill="{color}"')]
    write(path, lambda file: file.write("\n".join(svg + ["</svg>\n"]).encode()))


# ---- one run

def corpus(cfg):
    """(train shards, val shards, vocabulary size, folder)"""
    folder = prepare.prepare(cfg.data)
    train, val = (tokens.open_tokens(pattern) for pattern in prepare.files(folder))
    return train, val, tokenizer.vocab_size(folder, train), folder


def build_model(cfg, vocab):
    torch.manual_seed(cfg.seed)
    layers, C, H, _ = SIZES[cfg.size]
    return Llama(layers, C, H, -(-vocab // 64) * 64, cfg.seq, cfg.precision, getattr(torch, cfg.dtype), **axes(cfg)).to(cfg.device)


def train(cfg):
    """train one precision; returns its row of the final table"""
    folder = os.path.join(cfg.out, cfg.name)
    path, log_path = os.path.join(folder, "ckpt.pt"), os.path.join(folder, "log.csv")
    state = load(path) if cfg.resume else None
    train_shards, val_shards, vocab, data_folder = corpus(cfg)
    model = build_model(cfg, vocab)
    B, T = cfg.batch, cfg.seq
    steps = cfg.steps or int((cfg.tokens or cfg.tokens_per_param * model.params()) // (B * T))
    if steps < 1: raise Stop(f"the run is shorter than one step of {B * T:,} tokens")
    every = cfg.eval_every or max(1, steps // 10)
    inside = [p for p in model.blocks.parameters() if p.dim() == 2]
    outside = [p for p in model.parameters() if all(p is not q for q in inside)]
    optimizer = torch.optim.AdamW([dict(params=inside, weight_decay=cfg.weight_decay), dict(params=outside, weight_decay=0.)],
                                  lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    first, history = 0, []
    if state:
        restore(state, cfg, model, optimizer)
        first, history = state["step"], state["history"]
    elif os.path.exists(folder):                                # an earlier run of this name is set aside, not lost
        aside = next(f for i in itertools.count(1) if not os.path.exists(f := f"{folder}.{i}"))
        try: os.rename(folder, aside)
        except OSError as error: raise Stop(f"cannot write {folder}: {error.strerror}")
        print(f"{folder} existed and is now {aside}")
    fp4.quantize_weights_after(optimizer, model)
    how = fp4.build() if fp4.recipe(cfg.precision, **axes(cfg)).forward else "not used"
    step_fn = torch.compile(model, fullgraph=True) if cfg.compile else model
    peak = next((t for name, t in PEAK.items() if name in device_name(cfg)), None)
    flops = model.flops_per_token(T)
    header = provenance(cfg, how) + ["step,loss,val,lr,norm,ms,tokens_per_s,mfu"]
    lines = [l for l in open(log_path).read().splitlines() if l[:1] not in "#s" and int(l.split(",")[0]) <= first] if state else []
    write(log_path, lambda file: file.write(("\n".join(header + lines) + "\n").encode()))
    print(f"{cfg.name}: {model.params():,} parameters + {model.embed.weight.numel() + model.head.weight.numel():,} in embedding and head, "
          f"{steps:,} steps of {B * T:,} tokens, {cfg.dtype} activations on {device_name(cfg)}; fp4: {how}")
    if cfg.device != "cpu": torch.cuda.reset_peak_memory_stats()

    with open(log_path, "a", buffering=1) as log, tqdm(total=steps, initial=first, desc=cfg.name, unit="step", dynamic_ncols=True) as bar:
        for step in range(first, steps):
            start, lr = time.perf_counter(), lr_at(step, steps, cfg.lr)
            for group in optimizer.param_groups: group["lr"] = lr
            x, y = to_device(tokens.batch(train_shards, step, B, T, cfg.seed, vocab), cfg.device)
            loss = torch.zeros((), device=cfg.device)
            for xm, ym in zip(x.split(cfg.micro), y.split(cfg.micro)):
                part = step_fn(xm, ym) * (cfg.micro / B)
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            loss, norm = loss.item(), norm.item()               # the step's one synchronisation
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = f"the last good checkpoint is {path}" if os.path.exists(path) else "there is no checkpoint yet"
                raise Stop(f"{cfg.name}: loss {loss}, gradient norm {norm} at step {step + 1}, lr {lr:.2e}; {kept}")
            optimizer.step()
            optimizer.zero_grad()
            if cfg.device != "cpu": torch.cuda.synchronize()
            seconds, done = time.perf_counter() - start, step + 1
            val = evaluate(step_fn, val_shards, cfg, vocab) if done % every == 0 or done == steps else None
            history.append((done, loss, val))
            speed = B * T / seconds
            mfu = f"{speed * flops / peak / 1e12:.1%}" if peak else "n/a"
            val_text = "" if val is None else f"{val:.4f}"
            bar.write(f"step {done:5d}/{steps}  loss {loss:.4f}  val {val_text:6s}  lr {lr:.2e}  norm {norm:5.2f}  "
                      f"{1000 * seconds:6.0f} ms  {speed:9,.0f} tok/s  MFU {mfu}")
            log.write(f"{done},{loss:.6f},{val_text},{lr:.6e},{norm:.6f},{1000 * seconds:.1f},{speed:.0f},{mfu}\n")
            bar.update()
            if val is not None:
                curves(os.path.join(folder, "curve.svg"), {cfg.name: history})
                write(path, lambda file: torch.save(snapshot(cfg, vocab, data_folder, model, optimizer, done, history), file))
    rates = sorted(float(l.split(",")[6]) for l in open(log_path) if l[0] not in "#s")
    memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB" if cfg.device != "cpu" else "n/a"
    return dict(cfg=cfg, model=model, folder=folder, data=data_folder, history=history, val=history[-1][2],
                speed=rates[len(rates) // 2], memory=memory)


def snapshot(cfg, vocab, data_folder, model, optimizer, step, history):
    return dict(version=1, config=dataclasses.asdict(cfg), vocab=vocab, data=data_folder, step=step, history=history, model=model.state_dict(),
                optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state() if cfg.device != "cpu" else None)


def restore(state, cfg, model, optimizer):
    """everything that a step depends on; the data position is a function of the step"""
    old, new = state["config"], dataclasses.asdict(cfg)
    differ = [k for k in new if k not in ("resume", "out", "name", "sample", "sample_tokens") and new[k] != old.get(k)]
    said = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in differ)
    try: model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError):
        raise Stop(f"the checkpoint of {cfg.name} is of another model ({said or 'the vocabulary differs'}): resume with its settings, or choose another --name")
    if differ: print(f"resuming with other settings: {said}")
    torch.set_rng_state(state["rng"])
    if cfg.device != "cpu" and state["cuda_rng"] is not None: torch.cuda.set_rng_state(state["cuda_rng"])


# ---- main

def sample(model, data_folder, text, n, device):
    encoding = tokenizer.load_encoding(data_folder)
    ids = encoding.encode_ordinary(text) or [encoding.eot_token]
    ids = model.generate(torch.tensor([ids], device=device), n, generator=torch.Generator(device).manual_seed(0))[0].tolist()
    return encoding.decode([i for i in ids if i < encoding.n_vocab])


def sample_from_checkpoint(cfg):
    state = load(os.path.join(cfg.out, cfg.name, "ckpt.pt"))
    was = Config(**{**state["config"], "device": cfg.device, "dtype": cfg.dtype})
    model = build_model(was, state["vocab"])
    model.load_state_dict(state["model"])
    print(sample(model, state["data"], cfg.sample, cfg.sample_tokens, cfg.device))


def table(runs):
    print(f"\n{'run':28s} {'val loss':>9s} {'gap':>8s} {'tokens/s':>11s} {'peak memory':>12s}")
    for run in runs:
        gap = run["val"] - runs[0]["val"]
        print(f"{run['cfg'].name:28s} {run['val']:9.4f} {gap:+8.4f} {run['speed']:11,.0f} {run['memory']:>12s}")


def main(argv):
    asked = parse(argv)
    choices = [[v.strip() for v in getattr(asked, axis).split(",")] for axis in AXES]
    configs = [complete(dataclasses.replace(asked, **dict(zip(AXES, values)))) for values in itertools.product(*choices)]
    if len(configs) > 1 and asked.name:
        configs = [dataclasses.replace(c, name=f"{asked.name}-{'-'.join([c.precision, *axes(c).values()])}") for c in configs]
    if asked.sample:
        return sample_from_checkpoint(configs[0])
    runs = [train(cfg) for cfg in configs]
    for run in runs:
        print(f"\n{run['cfg'].name} continues \"import \":\n" + sample(run["model"], run["data"], "import ", asked.sample_tokens, run["cfg"].device))
    if len(runs) > 1:
        picture = os.path.join(asked.out, "-".join([runs[0]["cfg"].size, *dict.fromkeys(c.precision for c in configs)]) + ".svg")
        curves(picture, {run["cfg"].name: run["history"] for run in runs})
        table(runs)
        print("curves:", picture)
    for run in runs:
        print(f"{run['cfg'].name}: final val loss {run['val']:.4f}; {run['folder']}/log.csv, {run['folder']}/curve.svg, {run['folder']}/ckpt.pt")


if __name__ == "__main__":
    try: main(sys.argv[1:])
    except (Stop, tokens.DataError) as error:
        print(f"quartet: {error}", file=sys.stderr)
        sys.exit(2)
