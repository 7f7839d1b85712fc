"""
Train a Llama in 4-bit floating point with Quartet's method (arXiv 2505.14669), or in any precision of the
table in fp4/recipes.py.

    python quartet.py                                       # tiny model, FP4, on the machine you have
    python quartet.py --precision bf16,fp4                  # both, from the same weights on the same batches
    python quartet.py --size 30M --data python --compile    # the paper's smallest model, on a GPU
    python quartet.py --sample "def main("                  # continue a text with the trained model

A run leaves out/NAME/log.csv, curve.svg and ckpt.pt. Below: settings, schedule and files, one run, main.
"""
import argparse, dataclasses, datetime, difflib, itertools, json, math, os, subprocess, sys, time
from dataclasses import dataclass
import torch
from tqdm import tqdm
import fp4                                                      # the table of precisions
from data import prepare, tokenizer, tokens                     # corpora, vocabulary, token files
from model import SIZES, Llama                                  # the model; knows nothing of training
from scaling import ablation, logs, table                       # several runs side by side


# ---- settings: parser, help text and default in one. A comma list of precisions (or axes) is an ablation

@dataclass(frozen=True)
class Settings:
    precision: str = "fp4"          # a row of fp4/recipes.py; of a comma list, or of `all`, each
    keep_first: int = 0             # so many blocks at the beginning are not quantised ...
    keep_last: int = 0              # ... and so many at the end
    size: str = ""                  # a row of SIZES in model.py; default: tiny on a CPU, 30M on a GPU
    data: str = ""                  # stdlib | python | shakespeare | fineweb | c4 | text file | folder; default: stdlib, above tiny python
    vocab: int = 0                  # entries of the vocabulary that is made for the corpus; default: 4096, c4 32768
    seq: int = 0                    # tokens in a sequence; default: 512, tiny and 3M 256
    batch: int = 0                  # sequences in a step; default: 512 (262,144 tokens), tiny 8, 3M 128
    micro: int = 0                  # sequences in a microbatch; default: by size
    steps: int = 0                  # length of the run, in steps ...
    tokens: int = 0                 # ... or in tokens ...
    tokens_per_param: float = 0     # ... or in tokens per parameter; default: 25, tiny 350 steps
    lr: float = 0                   # peak learning rate; default: the paper's for the size
    weight_decay: float = 0.1       # on the linears of the blocks only
    clip: float = 1.0               # largest norm of the gradient
    seed: int = 0                   # of weights, batches, rotations and rounding
    seeds: int = 1                  # train with so many, from --seed on
    jobs: int = 1                   # of several runs so many at a time, each a process with its log.txt
    eval_every: int = 0             # steps from one evaluation and checkpoint to the next; default: a tenth of the run
    out: str = "out"                # folder of all runs
    name: str = ""                  # folder of this run; default: SIZE-PRECISION
    resume: bool = False            # continue from the run's checkpoint, bit for bit
    discard: bool = False           # remove the checkpoint when the run is finished
    compile: bool = False           # torch.compile the model
    gemm: str = "fp8"               # where a Blackwell GPU multiplies FP4: fp8 | own | library (FP4 units: our kernel, NVIDIA's)
    sample: str = ""                # do not train: continue this text with the run's checkpoint
    sample_tokens: int = 200        # how long a sample is
    device: str = ""                # cpu | cuda; default: a GPU if there is one
    dtype: str = ""                 # of activations: bfloat16 | float32; default: float32 on a CPU

Config = dataclasses.make_dataclass("Config", [(axis, str, "") for axis in fp4.AXES], bases=(Settings,), frozen=True)
AXES = "precision", *fp4.AXES                                   # what a comma list can be given for
FREE = "resume", "discard", "out", "name", "sample", "sample_tokens", "seeds", "jobs"      # what makes no other run
# dense BF16 TFLOP/s by the vendors' datasheets; the first name that the device's contains
PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362, "L4": 121,
        "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71}


class Stop(Exception):
    """the run cannot start or go on; the message is one sentence for the user"""

def check(ok, sentence):
    if not ok: raise Stop(sentence)

def parse(argv):
    """the dataclass above as a command line; the comments there are the help texts"""
    source, fields = open(__file__).read(), dataclasses.fields(Config)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields:
        help = "changes the row: " + " | ".join(fp4.AXES[f.name]) if f.name in fp4.AXES else \
               source.split(f"    {f.name}: ")[1].split("\n")[0].split("# ")[1]
        kind = dict(action="store_true") if f.type is bool else dict(metavar="X", type={int: number}.get(f.type, f.type))
        parser.add_argument("--" + f.name, default=f.default, help=help, **kind)
    def error(message):
        word = message.split("arguments: ")[-1].split()[0].split("=")[0]
        near = difflib.get_close_matches(word, ["--" + f.name for f in fields], 1)
        raise Stop(message + (f" (did you mean {near[0]}?)" if near else " (python quartet.py --help lists all)"))
    parser.error = error
    return Config(**vars(parser.parse_args(argv)))


def number(text): return int(float(text)) if float(text).is_integer() else int(text)         # 3e9 is a whole number too
def axes(cfg): return {axis: getattr(cfg, axis) for axis in fp4.AXES if getattr(cfg, axis)}


def complete(cfg):
    """the settings of one run, checked, with the defaults that depend on others filled in"""
    for name, value in vars(cfg).items():
        check(isinstance(value, str) or 0 <= value < math.inf, f"{name} must be a number and not negative, got {value}")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(device.split(":")[0] in ("cpu", "cuda"), f"device {device!r} is not cpu or cuda")
    check(device == "cpu" or torch.cuda.is_available(), "device cuda: torch sees no GPU here")
    size = cfg.size or ("tiny" if device == "cpu" else "30M")
    check(size in SIZES, f"size {size!r} is not one of {', '.join(SIZES)}")
    layers, width, _, lr = SIZES[size]
    check(cfg.keep_first + cfg.keep_last <= layers, f"{size} has {layers} blocks: keep_first {cfg.keep_first} and "
                                                    f"keep_last {cfg.keep_last} are more")
    try: fp4.recipe(cfg.precision, **axes(cfg))
    except ValueError as error: raise Stop(str(error))
    dtype = cfg.dtype or ("float32" if device == "cpu" else "bfloat16")
    check(dtype in ("bfloat16", "float32"), f"dtype {dtype!r} is not bfloat16 or float32")
    check(cfg.gemm in ("fp8", "own", "library"), f"gemm {cfg.gemm!r} is not fp8, own or library")
    tiny, small = size == "tiny", size in ("tiny", "3M")
    batch = cfg.batch or {"tiny": 8, "3M": 128}.get(size, 512)
    micro = cfg.micro or math.gcd(batch, min(64, 2 ** int(math.log2(65536 / width))))
    check(batch % micro == 0, f"batch {batch} does not divide into microbatches of {micro} sequences")
    given = [n for n in ("steps", "tokens", "tokens_per_param") if getattr(cfg, n)]
    check(len(given) <= 1, f"give only one of {' and '.join(given)}")
    return dataclasses.replace(cfg, device=device, size=size, dtype=dtype, batch=batch, micro=micro,
        seq=cfg.seq or (256 if small else 512), lr=cfg.lr or lr, data=cfg.data or ("stdlib" if tiny else "python"),
        steps=350 if tiny and not given else cfg.steps,
        tokens_per_param=25 if not tiny and not given else cfg.tokens_per_param,
        name=cfg.name or f"{size}-{logs.label(vars(cfg))}")


# ---- schedule, evaluation, files

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
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise Stop(f"cannot write {path}: {why}; what was there before is kept")


def load(path):
    check(os.path.exists(path), f"there is no checkpoint {path}: train first, or name another run with --name")
    try: state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error: raise Stop(f"{path} is not a checkpoint of quartet.py ({type(error).__name__})")
    check(isinstance(state, dict) and state.get("version") == 1, f"{path} is of another version of quartet.py")
    return state


def device_name(cfg): return "CPU" if cfg.device == "cpu" else torch.cuda.get_device_name(cfg.device)


def log_text(cfg, how, history):
    """log.csv: what made the run, then a line a step"""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try: commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError: commit = ""
    machine = f"{device_name(cfg)}, torch {torch.__version__}" + f", {torch.get_num_threads()} threads" * (cfg.device == "cpu")
    head = f"# commit {commit or 'unknown'}", f"# config {json.dumps(dataclasses.asdict(cfg))}", f"# device {machine}", f"# fp4 {how}"
    return "\n".join([*head, "step,loss,val,lr,norm,ms,tokens_per_s,mfu", *map(csv, history), ""])


def csv(row):
    step, loss, val, lr, norm, ms, speed, mfu = row
    val = "" if val is None else f"{val:.4f}"
    return f"{step},{loss:.6f},{val},{lr:.6e},{norm:.6f},{ms:.1f},{speed:.0f},{mfu}"


# ---- one run

def corpus(cfg):
    """train shards, val shards, vocabulary size, folder"""
    folder = prepare.prepare(cfg.data, cfg.vocab)
    train, val = (tokens.open_tokens(pattern) for pattern in prepare.files(folder))
    vocab = tokenizer.vocab_size(folder, train)
    tokens.batch(train, 0, 1, cfg.seq, cfg.seed, vocab)         # refuses a corpus that is too short
    return train, val, vocab, folder


def build_model(cfg, vocab):
    torch.manual_seed(cfg.seed), cfg.compile and torch.compiler.reset()         # torch keeps 8 compiled versions of a model
    fp4.product.GEMM = cfg.gemm
    layers, C, H, _ = SIZES[cfg.size]
    V = -(-vocab // 64) * 64                                    # matrix units like round numbers
    return Llama(layers, C, H, V, cfg.seq, cfg.precision, getattr(torch, cfg.dtype), cfg.keep_first, cfg.keep_last,
                 **axes(cfg)).to(cfg.device)


def train(cfg):
    """train one precision; what came out is in log.csv"""
    folder = os.path.join(cfg.out, cfg.name)
    path, log_path = os.path.join(folder, "ckpt.pt"), os.path.join(folder, "log.csv")
    state = load(path) if cfg.resume else None
    train_shards, val_shards, vocab, data_folder = corpus(cfg)
    model = build_model(cfg, vocab)
    B, T, N, gpu = cfg.batch, cfg.seq, model.params(), cfg.device != "cpu"
    steps = cfg.steps or int((cfg.tokens or cfg.tokens_per_param * N) // (B * T))
    check(steps > 0, f"the run is shorter than one step of {B * T:,} tokens")
    every = cfg.eval_every or max(1, steps // 10)
    linear = lambda name, p: name.startswith("blocks") and p.dim() == 2
    groups = [dict(params=[p for name, p in model.named_parameters() if linear(name, p) == yes],
                   weight_decay=cfg.weight_decay * yes) for yes in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    history = restore(state, cfg, model, optimizer) if state else []
    if not state: ablation.set_aside(folder)                    # an earlier run of this name
    fp4.quantize_weights_after(optimizer, model)
    how = fp4.build() if fp4.recipe(cfg.precision, **axes(cfg)).kernels else "not used"
    forward = torch.compile(model, fullgraph=True) if cfg.compile else model
    peak = next((tera for name, tera in PEAK.items() if name in device_name(cfg)), None)
    write(log_path, lambda file: file.write(log_text(cfg, how, history).encode()))
    print(f"{cfg.name}: {N:,} parameters and {sum(p.numel() for p in model.parameters()) - N:,} in embedding and head; "
          f"{steps:,} steps of {B * T:,} tokens; {cfg.dtype} on {device_name(cfg)}; fp4: {how}")
    if gpu: torch.cuda.reset_peak_memory_stats(cfg.device)

    with open(log_path, "a", buffering=1) as log, tqdm(total=steps, initial=len(history), desc=cfg.name) as bar:
        for step in range(len(history), steps):
            start, lr = time.perf_counter(), lr_at(step, steps, cfg.lr)
            for group in optimizer.param_groups: group["lr"] = lr
            x, y = to_device(tokens.batch(train_shards, step, B, T, cfg.seed, vocab), cfg.device)
            loss = torch.zeros((), device=cfg.device)
            for xm, ym in zip(x.split(cfg.micro), y.split(cfg.micro)):
                part = forward(xm, ym) * (cfg.micro / B)
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
            loss = loss.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                log.write(csv((step + 1, loss, None, lr, norm, 0, 0, "n/a")) + "\n")
                kept = f"the last good checkpoint is {path}" if os.path.exists(path) else "there is no checkpoint yet"
                raise Stop(f"{cfg.name}: loss {loss}, gradient norm {norm} at step {step + 1}, lr {lr:.2e}; {kept}")
            optimizer.step()
            optimizer.zero_grad()
            if gpu: torch.cuda.synchronize(cfg.device)
            seconds, done = time.perf_counter() - start, step + 1
            speed, evaluated = B * T / seconds, done % every == 0 or done == steps
            val = round(evaluate(forward, val_shards, cfg, vocab), 4) if evaluated else None
            mfu = f"{speed * model.flops_per_token(T) / peak / 1e12:.1%}" if peak else "n/a"
            history.append((done, loss, val, lr, norm, 1000 * seconds, speed, mfu))
            log.write(csv(history[-1]) + "\n")
            bar.write(f"step {done:5d}/{steps}  loss {loss:.4f}  val {val or '':6}  lr {lr:.2e}  norm {norm:5.2f}  "
                      f"{1000 * seconds:6.0f} ms  {speed:9,.0f} tok/s  MFU {mfu}")
            bar.update()
            if evaluated:
                state = snapshot(cfg, vocab, data_folder, model, optimizer, history)
                write(path, lambda file: torch.save(state, file))
        memory = f"{torch.cuda.max_memory_allocated(cfg.device) / 2 ** 30:.2f} GiB" if gpu else "n/a"
        log.write(f"# finished {datetime.date.today()}, peak memory {memory}\n")

    print("\n" + sample(model, data_folder, "def", cfg))
    picture = table.curves(write, os.path.join(folder, "curve.svg"), {cfg.name: [history]})
    if cfg.discard: os.remove(path)
    print(f"\n{cfg.name}: final val loss {history[-1][2]:.4f}; {log_path}, {picture}" + f", {path}" * (not cfg.discard))


def snapshot(cfg, vocab, data_folder, model, optimizer, history):
    """everything that a step depends on; the data position is a function of the step"""
    return dict(version=1, config=dataclasses.asdict(cfg), vocab=vocab, data=data_folder, history=history,
                model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state(cfg.device) if cfg.device != "cpu" else None)


def restore(state, cfg, model, optimizer):
    """the opposite; returns the history"""
    old, new = state["config"], dataclasses.asdict(cfg)
    said = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in new if k not in FREE and new[k] != old.get(k))
    try: model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError):
        why = said or "the vocabulary differs"
        raise Stop(f"the checkpoint of {cfg.name} is of another model ({why}): choose another --name")
    if said: print(f"resuming with other settings: {said}")
    torch.set_rng_state(state["rng"])
    if cfg.device != "cpu" and state["cuda_rng"] is not None: torch.cuda.set_rng_state(state["cuda_rng"], cfg.device)
    return state["history"]


# ---- sampling, main

def sample_from_checkpoint(cfg):
    state = load(os.path.join(cfg.out, cfg.name, "ckpt.pt"))
    model = build_model(dataclasses.replace(Config(**state["config"]), device=cfg.device), state["vocab"])
    model.load_state_dict(state["model"])
    return sample(model, state["data"], cfg.sample, cfg)


def sample(model, data_folder, text, cfg):
    """text, continued by the model"""
    try: encoding = tokenizer.load_encoding(data_folder)
    except tokens.DataError as error: return f"(no sample: {error})"
    ids = torch.tensor([encoding.encode_ordinary(text) or [encoding.eot_token]], device=cfg.device)
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    ids = model.generate(ids, cfg.sample_tokens, generator=generator)[0].tolist()
    return encoding.decode([i for i in ids if i < encoding.n_vocab])


def runs(asked):
    """the settings of each run that the command line means, seed by seed"""
    check(asked.seeds > 0 and asked.jobs > 0, f"seeds and jobs must be 1 or more, got {asked.seeds} and {asked.jobs}")
    rows = dataclasses.replace(asked, precision=",".join(fp4.RECIPES)) if asked.precision == "all" else asked
    choices = [[v.strip() for v in getattr(rows, axis).split(",")] for axis in AXES]
    many = asked.seeds > 1 or max(map(len, choices)) > 1
    for seed, *values in itertools.product(range(asked.seed, asked.seed + asked.seeds), *choices):
        cfg = dataclasses.replace(asked, seed=seed, seeds=1, **dict(zip(AXES, values)))
        name = f"{asked.name}-{logs.label(vars(cfg))}" if asked.name and many else asked.name
        yield complete(dataclasses.replace(cfg, name=name))


def main(argv):
    asked = parse(argv)
    configs = [*dict.fromkeys(runs(asked))]
    if asked.sample: return print(sample_from_checkpoint(configs[0]))
    if len(configs) == 1: return train(configs[0])
    name = asked.name or f"{configs[0].size}-{logs.label(vars(asked))}".replace(",", "-")[:100]
    ablation.compare(configs, os.path.join(asked.out, name), train, write, FREE, sys.argv[0])


def cli(argv, main=main):
    """main, with everything a user can mend said in one sentence; returns the exit code"""
    try: main(argv)
    except (Stop, ablation.Failed, tokens.DataError, OSError) as error:         # OSError: the log's disk is full, say
        print(f"quartet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quartet: stopped; --resume, or the same command for several runs, goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
