"""
Text from a trained model, shown as it is made.

  python sample.py --out_dir=out-shakespeare                        from the best checkpoint of a run
  python sample.py --init_from=gpt2 --prompt="The meaning of life"  from the released GPT-2, or gpt2-medium, -large, -xl
  python sample.py --init_from=gpt2 --prompt_file=question.txt --num_samples=3 --temperature=0.8 --top_p=0.95
  python sample.py --init_from=gpt2 --compile --dtype=bfloat16      several times as fast on a CPU, after a few seconds
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

import torch
from torch import nn

import weights
from launch import choose_device, run, why_no_compiler
from model import GPT, InputError, check_sampling
from prepare_data import Tokenizer


def load(init_from, out_dir):
    """-> model in eval mode, its tokenizer"""
    path = init_from or weights.of_run(out_dir)
    if path is None:
        raise InputError(f"{out_dir} holds no best.pt or ckpt.pt: train one with train.py, or try --init_from=gpt2")
    model = GPT.from_pretrained(path)
    if model.tokenizer is None:
        raise InputError(f"{init_from} does not tell what its {model.config.vocab_size} token ids mean: a folder of weights has no tokenizer; "
                         f"for a run of train.py use --out_dir")
    return model, Tokenizer(model.tokenizer)


def read_prompt(args, tokenizer):
    """-> list of ids, at least one"""
    if args.prompt is not None and args.prompt_file is not None:
        raise InputError("give --prompt or --prompt_file, not both")
    text = args.prompt
    if args.prompt_file is not None:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{args.prompt_file} is not UTF-8 text") from None
    if text is None:
        return [tokenizer.start]   # as a document begins
    if not text:
        raise InputError("empty prompt: give at least one character, or leave --prompt out to start a new text")
    return tokenizer.encode(text)


def compile_products(model):
    """
    Make decoding with batch size 1 faster on a CPU. A new token takes each weight once, so its time is that of reading all
    weights. Torch's own products of a matrix and one vector run at between a third and all of the memory bandwidth, which
    depends on machine and dtype; written as product and sum, and compiled, they are one loop over the weights at all of it.
    """
    multiply = torch.compile(lambda weight, x: (weight * x).sum(-1), dynamic=True)   # one compilation for all shapes

    def compiled(linear):
        def forward(x, several=linear.forward):   # x (..., in)
            if x.numel() > linear.in_features:
                return several(x)
            y = multiply(linear.weight.detach(), x.flatten()).view(*x.shape[:-1], -1)   # of a parameter each shape would be compiled
            return y if linear.bias is None else y + linear.bias
        return forward
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        linear.forward = compiled(linear)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python sample.py [--out_dir=DIR | --init_from=NAME] [--prompt=TEXT] ... (--help for all)")
    parser.add_argument("--out_dir", default="out", help="folder of a run of train.py (default: out)")
    parser.add_argument("--init_from", help="instead: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder, or a checkpoint")
    parser.add_argument("--prompt", help="text to continue (default: begin a new one)")
    parser.add_argument("--prompt_file", help="a file with the text to continue, UTF-8")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, one after the other (default: 1)")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="a sample (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=lambda s: None if s.lower() == "none" else int(s), default=200,
                        help="sample from the k likeliest tokens; none = from all (default: 200)")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens that reach this probability together")
    parser.add_argument("--seed", type=int, default=1337, help="another seed, another text (default: 1337)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "auto"), help="of the weights; auto = what is fast here (default: float32)")
    parser.add_argument("--compile", action="store_true", help="faster on a CPU, for texts worth a few seconds of compilation")
    args = parser.parse_args(argv)
    check_sampling(args.temperature, args.top_k, args.top_p)
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"{name}={getattr(args, name)}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"seed={args.seed}: must be at least 0 and less than 2**32")

    device, bf16, line = choose_device(args.device, args.dtype)
    print(line, file=sys.stderr)
    model, tokenizer = load(args.init_from, args.out_dir)
    model.to(device, torch.bfloat16 if bf16 else torch.float32)
    if args.compile:
        if lacks := why_no_compiler(device):
            print(f"torch.compile failed, going on without it: {lacks}", file=sys.stderr)
        else:
            compile_products(model)
    prompt = read_prompt(args, tokenizer)
    torch.manual_seed(args.seed)
    made, start = 0, time.perf_counter()
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 80)
        idx = torch.tensor([prompt], device=device)
        # A character may be spread over several tokens: the decoder holds its first bytes until the last has come.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if args.prompt or args.prompt_file:
            print(tokenizer.decode(prompt), end="", flush=True)
        stop = tokenizer.start if tokenizer.spec["kind"] == "gpt2" else None   # <|endoftext|>: the document is complete
        for token in model.stream(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, stop, tokenizer.vocab_size):
            made += 1
            if (number := token.item()) != stop:
                print(decoder.decode(tokenizer.token_bytes(number)), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)
    seconds = time.perf_counter() - start
    print(f"{made} tokens in {seconds:.1f} s: {made / seconds:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run(main)
