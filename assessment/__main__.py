"""
What each variant costs and what it buys, measured on this machine.

  python -m assessment cost              the size, compute, memory and speed of gpt2, rope, gqa, swa
                                         and modern (all three), and of attention alone: minutes
  python -m assessment cost config/gqa.py   the same, with the models of config files added
  python -m assessment cost --csv        the same, and writes assessment/results/variants.csv
  python -m assessment cost attention    attention alone: full, masked and in blocks
  python -m assessment cost endless      100,000 tokens from one model with RoPE and windows

  python -m assessment speed             all of the following, or some of them: speed steps decode
    steps        a training step beside nanoGPT's, and of long texts with and without the switches
    start        seconds from the command to the first step, and to the loss nanoGPT ends with
    decode       tokens/s beside transformers (if installed), and with fewer key/value heads
    processes    train.py alone, as DDP and as FSDP: tokens/s, and the bytes a process holds
    --nanogpt=FOLDER    a clone of nanoGPT, for steps and start

  python -m assessment claims            what the papers claim, in miniature: trains small models
                                         and writes assessment/results/papers.csv; or parts of it:
                                         claims rope gqa windows recall longer time
  python -m assessment experiments       larger experiments, whose finished runs are kept in
                                         results/claims.csv; about two hours on two cores, or parts:
                                         experiments rates factorial stretch recall heads text
  python -m assessment gpu               the first twenty minutes on a GPU: writes results/gpu.csv;
                                         without a GPU the same with tiny models
  python -m assessment runs out-a out-b  draws the losses of runs of train.py, by their folders or
                                         their metrics.csv, into losses.png
  python -m assessment plots             draws assessment/*.png from the two CSV files, and prints
                                         the means of papers.csv
"""

from assessment import claims, cost, experiments, gpu, plots, runs, speed
from plumbing.errors import InputError, run_script

COMMANDS = {
    "cost": cost.main,
    "speed": speed.main,
    "claims": claims.main,
    "experiments": experiments.main,
    "gpu": gpu.main,
    "runs": runs.main,
    "plots": plots.main,
}


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    command, *rest = argv
    if command not in COMMANDS:
        raise InputError(
            f"unknown command {command!r}: choose from {', '.join(COMMANDS)}; "
            "python -m assessment explains them"
        )
    COMMANDS[command](rest)


if __name__ == "__main__":
    run_script(main)
