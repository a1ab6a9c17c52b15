"""
Text from a trained model, shown as it is generated.

  python sample.py --out_dir=out-shakespeare                        from a run's best checkpoint
  python sample.py --init_from=gpt2 --prompt="The meaning of life"  from the released GPT-2, or
                                                                    gpt2-medium, -large or -xl
  python sample.py --init_from=roneneldan/TinyStories-33M           from the Hugging Face Hub
  python sample.py --init_from=gpt2 --prompt_file=question.txt --num_samples=3 --top_p=0.95
  python sample.py --init_from=gpt2 --dtype=bfloat16                half the memory, often faster
"""

if __name__ == "__main__":
    import plumbing.ctrl_c  # noqa: F401, before the imports that take seconds

import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

from model import GPT, check_sampling
from plumbing.device import choose_device, disable_cudnn_attention
from plumbing.errors import InputError, as_input_error, run_script
from plumbing.run_folder import checkpoint_of_run
from plumbing.tokenizer import Tokenizer


def load(init_from, out_dir):
    """-> the model that init_from names, or that of the run in out_dir; and its tokenizer"""
    path = checkpoint_of_run(out_dir) if init_from in (None, "resume") else init_from
    if path is None:
        raise InputError(
            f"{out_dir} holds no best.pt or ckpt.pt: train one with train.py, or try "
            "--init_from=gpt2"
        )
    with as_input_error():
        model = GPT.from_pretrained(path)
    if model.tokenizer_spec is None:
        raise InputError(
            f"{path} has no tokenizer, so its {model.config.vocab_size} token ids cannot be turned "
            "into text: docs/fine_tuning.md says how to add one"
        )
    return model, Tokenizer(model.tokenizer_spec)


def read_prompt(args, tokenizer):
    """-> list of ids, at least one"""
    text = args.prompt
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{args.prompt_file} is not UTF-8 text") from None
    if text is None:
        return [tokenizer.start]   # how a new text begins
    if not text:
        raise InputError(
            "empty prompt: give at least one character, or leave --prompt out to start a new text"
        )
    return tokenizer.encode(text)


def stream_text(model, tokenizer, prompt, args):
    """Print one continuation of prompt while it is generated -> number of new tokens"""
    idx = torch.tensor([prompt], device=next(model.parameters()).device)   # (1,T)
    # A character may be spread over several tokens: its first bytes wait here for the last.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    new_tokens = 0
    for token in model.stream(
        idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
        stop_token=tokenizer.end, vocab_size=tokenizer.vocab_size,
    ):
        new_tokens += 1
        number = token.item()
        if number != tokenizer.end:
            print(decoder.decode(tokenizer.token_bytes(number)), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    return new_tokens


def parse_args(argv):
    def int_or_none(text):
        return None if text.lower() == "none" else int(text)

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python sample.py [--out_dir=DIR | --init_from=NAME] [--prompt=TEXT] ... "
              "(--help for all)",
    )
    add = parser.add_argument
    add("--out_dir", default="out", help="the folder of a run of train.py (default: out)")
    add("--init_from", help="instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name "
                            "on the Hugging Face Hub, a Hugging Face folder, or a checkpoint")
    add("--start", help=argparse.SUPPRESS)   # nanoGPT's name for the next two
    add("--prompt", help="text to continue (default: start a new text)")
    add("--prompt_file", help="a file with the text to continue, UTF-8")
    add("--num_samples", type=int, default=1, help="number of texts (default: 1)")
    add("--max_new_tokens", type=int, default=500, help="per text (default: 500)")
    add("--temperature", type=float, default=0.8,
        help="0 = always the likeliest token (default: 0.8)")
    add("--top_k", type=int_or_none, default=200,
        help="sample from the k likeliest tokens; none = from all (default: 200)")
    add("--top_p", type=float,
        help="sample from the likeliest tokens that together reach this probability")
    add("--seed", type=int, default=1337, help="another seed, another text (default: 1337)")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "auto"),
        help="of the weights; auto = the faster one on this device (default: float32)")
    return parser.parse_args(argv)


def check(args):
    """InputError for a value out of range"""
    if args.start is not None:
        raise InputError("--start is nanoGPT's: here it is --prompt=TEXT, or --prompt_file=NAME "
                         "for its FILE:NAME")
    if args.prompt is not None and args.prompt_file is not None:
        raise InputError("give --prompt or --prompt_file, not both")
    with as_input_error():
        check_sampling(args.temperature, args.top_k, args.top_p)
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}={getattr(args, name)}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: must be at least 0 and less than 2**32")


def main(argv):
    args = parse_args(argv)
    check(args)
    device, bf16, line = choose_device(args.device, args.dtype)
    print(line, file=sys.stderr)
    disable_cudnn_attention()
    model, tokenizer = load(args.init_from, args.out_dir)
    model.to(device, torch.bfloat16 if bf16 else torch.float32)
    prompt = read_prompt(args, tokenizer)
    has_prompt = args.prompt is not None or args.prompt_file is not None

    torch.manual_seed(args.seed)
    new_tokens = 0
    start = time.perf_counter()
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 80)
        if has_prompt:
            print(tokenizer.decode(prompt), end="", flush=True)
        new_tokens += stream_text(model, tokenizer, prompt, args)
    seconds = time.perf_counter() - start
    speed = new_tokens / seconds
    print(f"{new_tokens} tokens in {seconds:.1f} s: {speed:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
