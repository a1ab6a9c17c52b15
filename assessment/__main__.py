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
    profile      where the time of a training step of GPT-2 124M goes
    --nanogpt=FOLDER    a clone of nanoGPT, for steps and start
    --csv               writes assessment/results/speed.csv

  python -m assessment claims            what the papers claim, in miniature: trains small models,
                                         two hours and a half on two cores; finished runs are kept
                                         in assessment/results/claims.csv; or parts of it: claims
                                         rates factorial windows stretch recall heads text
  python -m assessment claims --again PART   makes finished runs again
  python -m assessment gpu               the first twenty minutes on a GPU: writes results/gpu.csv;
                                         without a GPU the same with tiny models; takes
                                         --nanogpt=FOLDER, too
  python -m assessment runs out-a out-b  draws the losses of runs of train.py, by their folders or
                                         their metrics.csv, into losses.png
  python -m assessment plots             draws assessment/*.png from the CSV files
  python -m assessment figures           compares the figures in the pages with the CSV files;
                                         figures --write renews the tables first
"""

from assessment import claims, cost, figures, gpu, plots, runs, speed
from plumbing.errors import InputError, run_script

COMMANDS = {
    "cost": cost.main,
    "speed": speed.main,
    "claims": claims.main,
    "gpu": gpu.main,
    "runs": runs.main,
    "plots": plots.main,
    "figures": figures.main,
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
