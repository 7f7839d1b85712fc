"""
The same model in several precisions: from the same weights and on the same batches, for each seed.

    python quartet.py --precision bf16,fp4,quartet2 --seeds 3   # `all`: every row; --jobs 8: so many at a time

Nothing is trained twice: what a run was, and whether it was finished, is in its log.csv. The same command goes on with
what is missing, an interrupted run from its checkpoint. Runs go seed by seed, so that what is there compares.
"""
import ctypes, dataclasses, functools, itertools, os, subprocess, sys, time
import torch
from data.prepare import prepare
from fp4 import build
from scaling.logs import read
from scaling.table import report


class Failed(Exception):
    """some runs failed or do not compare; the message is one sentence for the user"""


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
    """train what is missing, then write path.csv and path.svg"""
    failure = finish(configs, train, free, script)
    found = [run for cfg in configs if (run := earlier(cfg, free)) and run.ended]
    if found: report(found, path, write)
    if failure: raise failure


def finish(configs, train, free, script):
    """train what is missing; returns what is to be raised if some failed. train(cfg) raises when it diverges; script is
    what a process of its own starts: quartet.py, or one that adds rows"""
    todo = []
    for cfg in configs:
        run, folder = earlier(cfg, free), os.path.join(cfg.out, cfg.name)
        if run and run.ended: print(f"{cfg.name} is finished")
        else: todo.append(dataclasses.replace(cfg, resume=run is not None and os.path.exists(f"{folder}/ckpt.pt")))
    failed = {}
    if configs[0].jobs > 1:
        prepare(configs[0].data, configs[0].vocab), build()     # once, not in each process
        failed = parallel(todo, configs[0].jobs, free, script)
    else:
        for cfg in todo:
            try: train(cfg)
            except Exception as error:
                run = earlier(cfg, free)
                if not (run and run.broken): raise
                print(error)
    if failed: return Failed(f"{len(failed)} of {len(configs)} runs failed, the same command tries them again: " + "; ".join(
                             f"{os.path.join(configs[0].out, name, 'log.txt')}: {said}" for name, said in failed.items()))


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
