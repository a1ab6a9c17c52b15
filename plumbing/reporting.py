"""What a run tells the user, on the screen and in metrics.csv. `run` is a Run of train.py."""

import math
import os
import shlex
from dataclasses import asdict

import torch
import torch.distributed as dist

from plumbing.device import peak_flops
from plumbing.errors import InputError
from plumbing.progress import clock, sparkline
from plumbing.run_folder import checkpoint_to_resume


def tokens_per_step(run):
    return run.c.batch_size * run.model.config.block_size


def warn_of_slow_evaluation(c, gpt_config, place):
    """Before any download. The default evaluation, of 10 million tokens, looks like a hang."""
    tokens = c.eval_iters * c.batch_size * gpt_config.block_size
    if place.device.type == "cpu" and tokens > 1_000_000:
        print(f"note: an evaluation reads up to {tokens:,} tokens, which takes GPT-2 124M hours on "
              f"a CPU: lower --eval_iters, or use config/shakespeare.py, which is made for CPUs")


def log_resume(run, path, before):
    """path: the checkpoint; before: the settings in it"""
    changes = []
    for name, value in asdict(run.c).items():
        ignored = name in ("init_from", "eval_only")
        if not ignored and before.get(name, value) != value:
            changes.append(f"{name} was {before[name]}, is {value}")
    note = f"; note: {', '.join(changes)}" if changes else ""
    print(f"resuming {path} at step {run.step:,}{note}")


def log_start(run):
    c, place, config = run.c, run.place, run.model.config
    switches = [name for name in ("rope", "gqa", "swa") if getattr(config, f"use_{name}")]
    variant = "+".join(switches) or "gpt2"
    print(f"model: {variant}, {run.model.num_params() / 1e6:.2f}M parameters; "
          f"data: data/{c.dataset}, {run.train_data.n:,} sequences of {config.block_size} tokens")
    accumulation = c.batch_size // (place.micro * place.world)
    processes = "1 process" if place.world == 1 else f"{place.world} processes"
    epochs = c.max_iters * c.batch_size / run.train_data.n
    print(f"batch: {c.batch_size} sequences = {accumulation} accumulation step(s) x {place.micro} "
          f"x {processes}; {tokens_per_step(run):,} tokens per step, {c.max_iters:,} steps, "
          f"{epochs:.2g} epochs")


def log_step(run, loss, steps_per_second, seconds_per_step):
    """
    loss              of the last step, mean over all processes
    steps_per_second  since the last line, training alone
    seconds_per_step  since the start, evaluations and checkpoints included
    """
    if run.metrics is None:
        return
    lr = run.optimizers[0].param_groups[0]["lr"]
    norm = float(run.norm)
    speed = steps_per_second * tokens_per_step(run)
    left = clock(seconds_per_step * (run.c.max_iters - run.step))
    print(f"step {run.step:,}/{run.c.max_iters:,} | loss {loss:.4f} | lr {lr:.2e} | "
          f"norm {norm:.2f} | {speed:,.0f} tokens/s{mfu(run, speed)} | {left} left")
    run.metrics(step=run.step, tokens=run.step * tokens_per_step(run), train_loss=f"{loss:.6f}",
                lr=f"{lr:.6g}", grad_norm=f"{norm:.6g}", tokens_per_s=f"{speed:.0f}")


def mfu(run, tokens_per_second):
    """Model FLOPs utilisation: the share of the GPUs' peak that the model's arithmetic reaches."""
    if run.place.device.type != "cuda" or not run.place.bf16:
        return ""
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return ""
    flops = tokens_per_second * run.model.flops_per_token(run.model.config.block_size)
    return f" | MFU {flops / (peak * run.place.world):.1%}"


def log_eval(run, val_loss):
    best = ", the best so far" if val_loss < run.best_val_loss else ""
    print(f"step {run.step:,}: validation loss {val_loss:.4f}{best}")
    if run.metrics is not None:
        run.metrics(step=run.step, tokens=run.step * tokens_per_step(run),
                    val_loss=f"{val_loss:.6f}")


def check_finite(step, name, value):
    if not math.isfinite(value):
        raise InputError(f"step {step}: {name} {value}. Nothing was overwritten, the previous "
                         f"checkpoint is intact; a lower learning_rate, a longer warm-up or "
                         f"dtype=float32 may help")


def log_stop(run, signal_name, argv):
    print(f"{signal_name}: stopped at step {run.step:,}; continue with\n  "
          f"{resume_command(run, argv)}")


def resume_command(run, argv):
    command = "python"
    if dist.is_initialized():
        here = os.environ["LOCAL_WORLD_SIZE"]
        command = f"torchrun --standalone --nproc_per_node={here}"
        if here != str(run.place.world):   # several machines: how they met, only the user knows
            command = f"torchrun --nproc_per_node={here} ..."
    if checkpoint_to_resume(run.c.out_dir, "auto"):   # not if it stopped before its first step
        argv = [*without_init_from(argv), "--init_from=resume"]
    return f"{command} train.py {shlex.join(argv)}"


def without_init_from(argv):
    """argv without --init_from=X and --init_from X"""
    kept = []
    skip_value = False
    for arg in argv:
        if not skip_value and not arg.startswith("--init_from="):
            kept.append(arg)
        skip_value = arg == "--init_from"
    return [arg for arg in kept if arg != "--init_from"]


def log_end(run):
    curve = [float(row["val_loss"]) for row in run.metrics.rows if row["val_loss"]]
    print(f"\nvalidation loss from {curve[0]:.2f} to {curve[-1]:.4f} {sparkline(curve)}, the best "
          f"{run.best_val_loss:.4f}, in {clock(run.metrics.elapsed())}\n")
    if run.place.device.type == "cuda":
        print(f"peak memory of this GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB\n")
