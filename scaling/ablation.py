"""
The same model in several precisions: from the same weights and on the same batches, for each seed.

    python quartet.py --precision bf16,fp4,quartet2 --seeds 3   # `all`: every row; --jobs 8: so many at a time
    make ablation                                               # the README's: on a GPU every row, five seeds
    python -m scaling.ablation --seeds 2                        # the same with other flags of quartet.py
    python -m scaling.ablation out/study/*/log.csv              # the README's table from finished runs, here or copied

Nothing is trained twice: what a run was, and whether it was finished, is in its log.csv. The same command goes on with
what is missing, an interrupted run from its checkpoint. Runs go seed by seed, so that what is there compares.
"""
import ctypes, dataclasses, functools, glob, itertools, os, shutil, subprocess, sys, time
import torch
from fp4 import RECIPES
from scaling.logs import label, read
from scaling.table import report

# 25 tokens a parameter (of 10, bf16's seeds ended 0.2 apart), eight runs at a time. All rows, then what each ingredient of fp4 buys
STUDY = "--size 3M --data python --vocab 2048 --micro 128 --eval_every 400 --seeds 5 --jobs 8 --compile --discard --sample_tokens 0 --out out/study".split()
WHAT = [["--precision", *what.split()] for what in ("all", "fp4 --scale nearest", "fp4 --rotation none:32:32,32:none:32,32:32:none,128",
                                                    "fp4 --rounding nearest:sr:nearest,nearest:nearest:sr")]
SMALL = "--precision bf16,fp4 --size tiny".split()              # without a GPU
SAME = "size", "data", "vocab", "seq", "batch", "steps", "tokens", "tokens_per_param", "lr", "dtype"
PICTURE = os.path.join(os.path.dirname(__file__), "..", ".readme", "ablation.svg")


def earlier(cfg, free):
    """the run in cfg's folder if it is this very one: all settings alike but for the free ones"""
    try: run = read(os.path.join(cfg.out, cfg.name, "log.csv"))
    except (OSError, ValueError): return None
    return run if all(run.config.get(k) == v for k, v in vars(cfg).items() if k not in free) else None


def set_aside(folder):
    """an earlier run of this name is not lost"""
    if not os.path.exists(folder) or os.listdir(folder) == ["log.txt"]: return         # that is from the process around us
    aside = next(f for i in itertools.count(1) if not os.path.exists(f := f"{folder}.{i}"))
    os.rename(folder, aside)
    print(f"{folder} existed and is now {aside}")


# ---- many runs

def compare(configs, path, train, write, free, script):
    """train what is missing, then write path.csv and path.svg; returns {name: why} of what failed. train(cfg) raises
    when it diverges; script is what a process of its own starts: quartet.py, or one that adds rows"""
    todo = []
    for cfg in configs:
        run, folder = earlier(cfg, free), os.path.join(cfg.out, cfg.name)
        if run and run.ended: print(f"{cfg.name} is finished")
        else: todo.append(dataclasses.replace(cfg, resume=run is not None and os.path.exists(f"{folder}/ckpt.pt")))
    failed = {}
    if configs[0].jobs > 1: failed = parallel(todo, configs[0].jobs, free, script)
    else:
        for cfg in todo:
            try: train(cfg)
            except Exception as error:
                run = earlier(cfg, free)
                if not (run and run.broken): raise
                print(error)
    found = [run for cfg in configs if (run := earlier(cfg, free)) and run.ended]
    if found: report(found, path, write)
    return failed


def parallel(todo, jobs, free, script):
    """the same, a process each; a line as each ends. Returns {name: the last line it said} of those that failed"""
    slots, running, failed, total = list(range(jobs)), {}, {}, len(todo)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, gpus = str(max(1, cores // jobs)), torch.cuda.device_count()
    try:
        while todo or running:
            while todo and slots:
                cfg, slot = todo.pop(0), slots.pop(0)
                log = os.path.join(folder := os.path.join(cfg.out, cfg.name), "log.txt")
                if not cfg.resume: set_aside(folder)
                os.makedirs(folder, exist_ok=True)
                env = os.environ | dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_COMPILE_THREADS=threads, TQDM_DISABLE="1")
                if gpus > 1: env["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
                with open(log, "a") as out:
                    process = subprocess.Popen([sys.executable, script, *flags(cfg)], stdout=out, stderr=out, env=env,
                                               preexec_fn=die_with_parent)
                running[process] = cfg, slot, log, time.time()
            time.sleep(.1)
            for process in [p for p in running if p.poll() is not None]:
                cfg, slot, log, start = running.pop(process)
                slots.append(slot)
                run = earlier(cfg, free)
                if not (run and run.ended):
                    failed[cfg.name] = (open(log).read().strip().splitlines() or ["it said nothing"])[-1]
                    said = f"failed: {failed[cfg.name]}"
                elif run.diverged: said = f"diverged, seen at step {run.history[-1][0]}"
                else: said = f"val loss {run.vals[-1]:.4f}"
                print(f"[{total - len(todo) - len(running)}/{total}] {cfg.name}: {said} ({time.time() - start:.0f} s)", flush=True)
    finally:
        for process in running: process.kill()
    return failed


def flags(cfg):
    """cfg as a command line"""
    given = {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default}
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]

# PR_SET_PDEATHSIG, SIGKILL: where the parent is killed no run goes on unseen
die_with_parent = functools.partial(ctypes.CDLL(None).prctl, 1, 9) if sys.platform == "linux" else None


# ---- the README's

def study(logs):
    """the finished runs of these logs, in the order of the table of precisions; refuses to mix"""
    runs = [(os.path.basename(os.path.dirname(path)), read(path)) for path in logs]
    runs = [run for folder, run in runs if run.ended and run.config["name"] == folder]      # else it was set aside
    if not runs: raise ValueError("there is no finished run")
    for what in SAME:
        values = {str(run.config.get(what)) for run in runs}
        if len(values) > 1: raise ValueError(f"these runs differ in --{what}: {', '.join(sorted(values))}")
    return sorted(runs, key=lambda run: ([*RECIPES].index(run.config["precision"]), label(run.config)))


def main(argv):
    import quartet                                              # here: quartet.py imports this file
    from fp4.tables import README, replaced, write
    from scaling.speeds import params
    logs, gpu = [arg for arg in argv if arg.endswith("log.csv")], torch.cuda.is_available()
    try:
        if not logs:
            for what in [SMALL] if not gpu else [[]] if "--precision" in " ".join(argv) else WHAT:
                flags = [*what, *STUDY * gpu, *argv]
                code = subprocess.call([sys.executable, quartet.__file__, *flags])
                if code or not gpu: return code                 # the README's table is a GPU's
            logs = glob.glob(os.path.join(quartet.parse(flags).out, "*", "log.csv"))
        runs = study(logs)
        run = max(runs, key=lambda run: run.date)
        layers, C, _, _ = quartet.SIZES[run.config["size"]]
        tokens = run.history[-1][0] * run.config["batch"] * run.config["seq"]
        body = report(runs, os.path.join("out", "ablation"), quartet.write)
        shutil.copyfile(os.path.join("out", "ablation.svg"), PICTURE)
        head = (f"{params(layers, C) / 1e6:.1f} M parameters in the blocks, {tokens / 1e6:.0f} M tokens of "
                f"`{run.config['data']}`, {run.config['vocab'] or 4096:,} in the vocabulary; {run.device}; {run.date}.")
        write(README, replaced(open(README).read(), f"{head}\n\n![curves](.readme/ablation.svg)\n\n{body}", "ablation"))
    except (OSError, ValueError, quartet.Stop) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
