"""
Train a Llama in 4-bit floating point with Quartet's method (arXiv 2505.14669), or in any other
precision of the table in fp4/recipes.py.

    python quartet.py                                  # FP4: tiny on a CPU, 30M on a GPU
    python quartet.py --precision bf16,fp4             # both, from the same weights and batches
    python quartet.py --size 30M --data python         # the paper's smallest model, on a GPU
    python quartet.py --sample "def main("             # continue a text with the trained model

A run leaves log.csv, curve.svg and ckpt.pt in out/NAME.

Read from top to bottom: settings, schedule and evaluation, one run, sampling, main.
"""
import dataclasses
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

from data.files import UserError, atomic_write_text, check
from fp4.recipes import AXES, RECIPES, recipe
from tools import cli, run              # the command line; the files of a run
from tools.cli import flag


# ---- settings

def axis_flag(axis):
    """A flag that changes the precision's row for one run."""
    return flag("", "changes the row: " + " | ".join(AXES[axis]))


@dataclass(frozen=True)
class Settings:
    """Every flag of the command line: its type, its default and its meaning."""

    # Which products are quantised, and how. A comma list makes an ablation.
    precision: str = flag("fp4", "a row of fp4/recipes.py; a comma list, or all, trains each")
    keep_first: int = flag(0, "number of blocks at the beginning that are not quantised")
    keep_last: int = flag(0, "number of blocks at the end that are not quantised")

    # The model and its data.
    size: str = flag("", "a row of PRESETS in model.py; default: tiny on a CPU, 30M on a GPU")
    data: str = flag("", "stdlib | python | shakespeare | fineweb | c4 | a text file | a folder; "
                         "default: python, for tiny stdlib")
    vocab: int = flag(0, "entries of the vocabulary that is made for the corpus; "
                         "default: 4096, for c4 32768")

    # Batch, length and optimizer.
    seq: int = flag(0, "tokens in a sequence; default: 512, for tiny and 3M 256")
    batch: int = flag(0, "sequences in a step; default: 512, for tiny 8, for 3M 128")
    micro: int = flag(0, "sequences in a microbatch; default: by size")
    steps: int = flag(0, "length of the run in steps; default: 350 for tiny")
    tokens: int = flag(0, "length of the run in tokens")
    tokens_per_param: float = flag(0, "length of the run in tokens per parameter; default: 25")
    lr: float = flag(0, "peak learning rate; default: the paper's for the size")
    weight_decay: float = flag(0.1, "weight decay of the linear layers inside the blocks")
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "seed of weights, batches, rotations and rounding")
    seeds: int = flag(1, "number of seeds to train with, from --seed on")

    # Files.
    jobs: int = flag(1, "of several runs, how many train at a time, each with its log.txt")
    eval_every: int = flag(0, "steps between evaluations, each with a checkpoint; "
                              "default: a tenth of the run")
    out: str = flag("out", "folder of all runs")
    name: str = flag("", "folder of this run; default: SIZE-PRECISION")
    resume: bool = flag(False, "continue from the run's checkpoint, on a CPU bit for bit")
    discard: bool = flag(False, "remove the checkpoint when the run is finished")

    # The machine.
    compile: bool = flag(None, "compile the model with torch.compile; default: on a GPU")
    gemm: str = flag("fp8", "how a Blackwell GPU multiplies FP4: fp8 | own | library "
                            "(own: our kernel on its FP4 units; library: NVIDIA's)")
    device: str = flag("", "cpu | cuda; default: a GPU if there is one")
    dtype: str = flag("", "of activations: bfloat16 | float32; default: float32 on a CPU")

    # Sampling.
    sample: str = flag("", "do not train: continue this text with the run's checkpoint")
    sample_tokens: int = flag(200, "length of a sample in tokens")

    # Changes to the precision's row, which fp4/recipes.py explains: five columns, with one value or
    # three for forward:dgrad:wgrad, and three products to switch on or off. A comma list makes an
    # ablation here, too.
    format: str = axis_flag("format")
    scale: str = axis_flag("scale")
    rotation: str = axis_flag("rotation")
    signs: str = axis_flag("signs")
    rounding: str = axis_flag("rounding")
    forward: str = axis_flag("forward")
    dgrad: str = axis_flag("dgrad")
    wgrad: str = axis_flag("wgrad")


def parse(argv):
    return cli.parse(Settings, argv, __doc__)


# The imports below take seconds, and torch may be missing. So the command line is read here for
# the first time, to answer --help and mistyped flags; main() reads it again. Where only .venv has
# torch, the script starts over with the Python of .venv.
if __name__ == "__main__":
    cli.start(parse)

import torch
from tqdm import tqdm

import fp4                              # the quantised linear layer
from data import prepare, tokenizer, tokens
from model import PRESETS, Llama        # the model; it knows nothing of training

# Dense BF16 TFLOP/s by the vendors' datasheets. The first name that the GPU's name contains counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362, "L4": 121,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}


def resolve(settings):
    """The settings of one run, checked, with the defaults that depend on others filled in."""
    for name, value in vars(settings).items():
        is_number = isinstance(value, (int, float))
        check(not is_number or 0 <= value < math.inf,
              f"{name} must be a number and not negative, got {value}")
    device = resolve_device(settings.device)
    size = settings.size or ("tiny" if device == "cpu" else "30M")
    check(size in PRESETS, f"size {size!r} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[size]
    check(settings.keep_first + settings.keep_last <= preset.n_layer,
          f"{size} has {preset.n_layer} blocks: keep_first {settings.keep_first} and "
          f"keep_last {settings.keep_last} are more")
    recipe_of(settings)
    dtype = settings.dtype or ("float32" if device == "cpu" else "bfloat16")
    check(dtype in ("bfloat16", "float32"), f"dtype {dtype!r} is not bfloat16 or float32")
    check(settings.gemm in ("fp8", "own", "library"),
          f"gemm {settings.gemm!r} is not fp8, own or library")

    batch = settings.batch or preset.batch
    micro = settings.micro or default_microbatch(batch, preset.n_embd)
    check(batch % micro == 0,
          f"batch {batch} does not divide into microbatches of {micro} sequences")
    lengths = [name for name in ("steps", "tokens", "tokens_per_param") if getattr(settings, name)]
    check(len(lengths) <= 1, f"give only one of {' and '.join(lengths)}")
    if not lengths:
        settings = dataclasses.replace(
            settings, steps=preset.steps, tokens_per_param=preset.tokens_per_param)
    return dataclasses.replace(
        settings,
        device=device,
        size=size,
        dtype=dtype,
        batch=batch,
        micro=micro,
        seq=settings.seq or preset.seq,
        lr=settings.lr or preset.lr,
        data=settings.data or preset.data,
        compile=device != "cpu" if settings.compile is None else settings.compile,
        name=settings.name or f"{size}-{run.label(vars(settings))}",
    )


def resolve_device(device):
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(device.split(":")[0] in ("cpu", "cuda"), f"device {device!r} is not cpu or cuda")
    check(device == "cpu" or torch.cuda.is_available(), "device cuda: torch sees no GPU here")
    return device


def default_microbatch(batch, n_embd):
    """A power of two that divides the batch, at most 64, and fewer sequences of a wide model."""
    fits = 2 ** int(math.log2(65536 / n_embd))
    return math.gcd(batch, min(64, fits))


def recipe_of(cfg):
    """The row of the table that the settings name, with the columns that they change."""
    axes = {axis: getattr(cfg, axis) for axis in AXES if getattr(cfg, axis)}
    try:
        return recipe(cfg.precision, **axes)
    except ValueError as error:
        raise UserError(str(error))


def n_steps(cfg, n_params):
    """Length of a run in steps; cfg gives it in steps, in tokens or in tokens per parameter."""
    n_tokens = cfg.tokens or cfg.tokens_per_param * n_params
    return cfg.steps or int(n_tokens // (cfg.batch * cfg.seq))


# ---- schedule, data, evaluation

def lr_at(step, steps, peak):
    """The learning rate rises from peak/100 for a tenth of the run, then falls to peak/10; both
    along a cosine."""
    warmup = steps // 10
    if step < warmup:
        lowest = peak / 100
        distance = 1 - step / warmup
    else:
        lowest = peak / 10
        distance = (step - warmup) / max(1, steps - 1 - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * distance)) / 2


class Dataset(NamedTuple):
    train: list                         # of memory-mapped token files
    val: list
    vocab_size: int
    folder: str


def open_dataset(cfg):
    """The corpus of the run, made first if it is not there."""
    folder = prepare.prepare(cfg.data, cfg.vocab)
    train_pattern, val_pattern = prepare.files(folder)
    train_shards = tokens.open_tokens(train_pattern)
    val_shards = tokens.open_tokens(val_pattern)
    vocab_size = tokenizer.vocab_size(folder, train_shards)
    # A corpus that is too short for one sequence is refused here, before anything is written.
    tokens.batch(train_shards, 0, 1, cfg.seq, cfg.seed, vocab_size)
    return Dataset(train_shards, val_shards, vocab_size, folder)


def to_device(batch, device):
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in batch]


@torch.no_grad()
def evaluate(forward, data, cfg):
    """Mean loss over every token of the validation set, in a fixed order."""
    total = 0
    count = 0
    for batch in tokens.val_batches(data.val, cfg.micro, cfg.seq, data.vocab_size):
        x, y = to_device(batch, cfg.device)
        n_targets = int((y >= 0).sum())
        total += forward(x, y).double() * n_targets
        count += n_targets
    return (total / count).item()


# ---- one run

def build_model(cfg, vocab_size):
    """The model of a run with its first weights, which depend on the seed alone."""
    torch.manual_seed(cfg.seed)
    if cfg.compile:
        # In an ablation one run follows another, and torch keeps only 8 compiled versions.
        torch.compiler.reset()
    model_recipe = recipe_of(cfg)
    backend = fp4.build(cfg.gemm) if model_recipe.has_kernels else None
    padded_vocab = 64 * math.ceil(vocab_size / 64)      # Matrix units are faster on such sizes.
    config = PRESETS[cfg.size].model_config(padded_vocab, cfg.seq)
    dtype = getattr(torch, cfg.dtype)
    model = Llama(config, model_recipe, dtype, cfg.keep_first, cfg.keep_last, backend)
    return model.to(cfg.device)


def build_optimizer(model, cfg):
    """AdamW; only the weight matrices inside the blocks decay."""
    decayed = [p for p in model.blocks.parameters() if p.dim() == 2]
    decayed_ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in decayed_ids]
    groups = [
        dict(params=decayed, weight_decay=cfg.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train(cfg):
    """Train one model. What came out is in log.csv and ckpt.pt of its folder."""
    folder = os.path.join(cfg.out, cfg.name)
    log_path = os.path.join(folder, "log.csv")
    checkpoint_path = os.path.join(folder, "ckpt.pt")
    state = run.load_checkpoint(checkpoint_path) if cfg.resume else None
    data = open_dataset(cfg)
    model = build_model(cfg, data.vocab_size)
    steps = n_steps(cfg, model.config.n_params)
    tokens_per_step = cfg.batch * cfg.seq
    check(steps > 0, f"the run is shorter than one step of {tokens_per_step:,} tokens")
    eval_every = cfg.eval_every or max(1, steps // 10)
    optimizer = build_optimizer(model, cfg)

    if state:
        history = run.restore_checkpoint(state, cfg, model, optimizer)
    else:
        history = []
        run.set_aside(folder)           # An earlier run of this name is kept.
    start_log(log_path, cfg, model, history)
    announce(cfg, model, steps)
    on_gpu = cfg.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(cfg.device)

    forward = torch.compile(model, fullgraph=True) if cfg.compile else model
    fp4.quantize_weights(model)
    with open(log_path, "a", buffering=1) as log, progress_bar(cfg, steps, history) as bar:
        for step in range(len(history), steps):
            start = time.perf_counter()
            lr = lr_at(step, steps, cfg.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Which sequences a batch has is a function of the step and the seed alone. The
            # gradients of its microbatches add up, each weighted by its share of the batch.
            x, y = to_device(tokens.batch(data.train, step, cfg.batch, cfg.seq, cfg.seed,
                                          data.vocab_size), cfg.device)
            loss = torch.zeros((), device=cfg.device)
            for x_micro, y_micro in zip(x.split(cfg.micro), y.split(cfg.micro)):
                part = forward(x_micro, y_micro) * (cfg.micro / cfg.batch)
                part.backward()
                loss += part.detach()

            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
            loss = loss.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                log.write(run.log_row(run.Step(step + 1, loss, None, lr, norm, 0, 0, "n/a")))
                raise UserError(divergence(cfg, loss, norm, step, lr, checkpoint_path))
            optimizer.step()
            optimizer.zero_grad()
            # A weight is quantised once a step and serves every microbatch of the next one.
            fp4.quantize_weights(model)
            if on_gpu:
                torch.cuda.synchronize(cfg.device)
            seconds = time.perf_counter() - start

            done = step + 1
            is_evaluated = done % eval_every == 0 or done == steps
            val = round(evaluate(forward, data, cfg), 4) if is_evaluated else None
            speed = tokens_per_step / seconds
            mfu = model_flops_utilisation(cfg, model, speed)
            history.append(run.Step(done, loss, val, lr, norm, 1000 * seconds, speed, mfu))
            log.write(run.log_row(history[-1]))
            show_step(bar, history[-1], steps)
            if is_evaluated:
                run.save_checkpoint(checkpoint_path, cfg, data.vocab_size, data.folder, model,
                                    optimizer, history)
        log.write(run.log_end(peak_memory(cfg)))
    finish(cfg, model, data, history, folder)


def start_log(log_path, cfg, model, history):
    """Write what made the run and the steps so far, those of a resumed run, into log.csv."""
    head = run.log_head(vars(cfg), machine(cfg), backend_description(model))
    text = head + "".join(run.log_row(row) for row in history)
    atomic_write_text(log_path, text)


def device_name(cfg):
    return "CPU" if cfg.device == "cpu" else torch.cuda.get_device_name(cfg.device)


def machine(cfg):
    """The device and what else the speed and the last bits of a loss depend on."""
    parts = [device_name(cfg), f"torch {torch.__version__}"]
    if cfg.device == "cpu":
        parts.append(f"{torch.get_num_threads()} threads")
    return ", ".join(parts)


def backend_description(model):
    """What computes the quantised products, in words."""
    return model.backend.description if model.backend else "not used"


def announce(cfg, model, steps):
    n_params = model.config.n_params
    n_others = sum(p.numel() for p in model.parameters()) - n_params
    print(f"{cfg.name}: {n_params:,} parameters and {n_others:,} in embedding and head; "
          f"{steps:,} steps of {cfg.batch * cfg.seq:,} tokens; {cfg.dtype} on {device_name(cfg)}; "
          f"fp4: {backend_description(model)}")


def progress_bar(cfg, steps, history):
    """A bar on a terminal; nothing where the output goes to a file or a pipe."""
    return tqdm(total=steps, initial=len(history), desc=cfg.name, disable=None)


def show_step(bar, row, steps):
    """Print a step: on a terminal only where it was evaluated, since the bar shows the others."""
    if bar.disable or row.val is not None:
        val = "" if row.val is None else f"{row.val:.4f}"
        bar.write(f"step {row.step:5d}/{steps}  loss {row.loss:.4f}  val {val:6}  lr {row.lr:.2e}  "
                  f"norm {row.norm:5.2f}  {row.ms:6.0f} ms  {row.tokens_per_s:9,.0f} tok/s  "
                  f"MFU {row.mfu}")
    bar.set_postfix_str(f"loss {row.loss:.4f}", refresh=False)
    bar.update()


def divergence(cfg, loss, norm, step, lr, checkpoint_path):
    """The sentence about a run whose loss or gradient is not finite."""
    if os.path.exists(checkpoint_path):
        kept = f"the last good checkpoint is {checkpoint_path}"
    else:
        kept = "there is no checkpoint yet"
    return f"{cfg.name}: loss {loss}, gradient norm {norm} at step {step + 1}, lr {lr:.2e}; {kept}"


def model_flops_utilisation(cfg, model, tokens_per_s):
    """The share of the GPU's peak BF16 rate that the model's own operations take, such as 41.2%."""
    for name, tflops in PEAK_TFLOPS.items():
        if name in device_name(cfg):
            flops = tokens_per_s * model.config.flops_per_token(cfg.seq)
            return f"{flops / (1e12 * tflops):.1%}"
    return "n/a"


def peak_memory(cfg):
    if cfg.device == "cpu":
        return "n/a"
    return f"{torch.cuda.max_memory_allocated(cfg.device) / 2 ** 30:.2f} GiB"


def finish(cfg, model, data, history, folder):
    """Print a sample, draw the curve, and say where everything is."""
    print("\n" + sample(model, data.folder, "def", cfg))
    from tools import report            # Only a finished run needs it.
    files = [os.path.join(folder, "log.csv"),
             report.draw_curves(os.path.join(folder, "curve.svg"), {cfg.name: [history]})]
    checkpoint_path = os.path.join(folder, "ckpt.pt")
    if cfg.discard:
        os.remove(checkpoint_path)
    else:
        files.append(checkpoint_path)
    print(f"\n{cfg.name}: final val loss {history[-1].val:.4f}; {', '.join(files)}")


# ---- sampling

def sample_from_checkpoint(cfg):
    """The text --sample, continued by the checkpoint of the run that cfg names."""
    state = run.load_checkpoint(os.path.join(cfg.out, cfg.name, "ckpt.pt"))
    trained = Settings(**state["config"])
    model = build_model(dataclasses.replace(trained, device=cfg.device), state["vocab"])
    model.load_state_dict(state["model"])
    return sample(model, state["data"], cfg.sample, cfg)


def sample(model, data_folder, text, cfg):
    """The text, continued by the model."""
    try:
        encoding = tokenizer.load_encoding(data_folder)
    except UserError as error:
        return f"(no sample: {error})"
    prompt = encoding.encode_ordinary(text) or [encoding.eot_token]
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    ids = torch.tensor([prompt], device=cfg.device)
    ids = model.generate(ids, cfg.sample_tokens, generator=generator)[0].tolist()
    return encoding.decode([i for i in ids if i < encoding.n_vocab])


# ---- main

def expand_runs(settings):
    """The settings of each run that a command line means, seed by seed."""
    check(settings.seeds > 0 and settings.jobs > 0,
          f"seeds and jobs must be 1 or more, got {settings.seeds} and {settings.jobs}")
    lists = {"precision": settings.precision} | {axis: getattr(settings, axis) for axis in AXES}
    if settings.precision == "all":
        lists["precision"] = ",".join(RECIPES)
    choices = [[value.strip() for value in text.split(",")] for text in lists.values()]
    is_ablation = settings.seeds > 1 or max(map(len, choices)) > 1
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed, *values in itertools.product(seeds, *choices):
        cfg = dataclasses.replace(settings, seed=seed, seeds=1, **dict(zip(lists, values)))
        if settings.name and is_ablation:
            cfg = dataclasses.replace(cfg, name=f"{settings.name}-{run.label(vars(cfg))}")
        yield resolve(cfg)


def main(argv):
    settings = parse(argv)
    configs = list(dict.fromkeys(expand_runs(settings)))
    if settings.sample:
        print(sample_from_checkpoint(configs[0]))
    elif len(configs) == 1:
        train(configs[0])
    else:
        from tools import ablation      # Only several runs need it.
        label = run.label(vars(settings)).replace(",", "-")
        name = settings.name or f"{configs[0].size}-{label}"[:100]
        ablation.compare(configs, os.path.join(settings.out, name), train, sys.argv[0])


def run_cli(argv, main=main):
    """main(argv), in which a mistake of the user ends in one sentence; returns the exit code."""
    return cli.run(main, argv)


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
