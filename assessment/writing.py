"""The quality of generated text, in figures that a program can count"""

import re
import statistics

import torch

from model import GPT
from plumbing.tokenizer import Tokenizer

PROMPT, NEW = 16, 240   # characters
TEXTS = 40              # of each model
RECENT = 10             # words


def words_of(text):
    return re.findall(r"[A-Za-z']+", text.lower())


def prompts(validation):
    """The beginnings of lines, far apart in the validation text"""
    lines = [line for line in validation.split("\n") if len(line) >= PROMPT]
    step = len(lines) // TEXTS
    return [line[:PROMPT] for line in lines[::step][:TEXTS]]


def texts_of(out, validation, seed):
    """What a model in the folder out makes of the prompts: the same prompts and seeds for all"""
    model = GPT.from_pretrained(out / "ckpt.pt")
    tokenizer = Tokenizer(model.tokenizer_spec)
    torch.manual_seed(seed)
    idx = torch.tensor([tokenizer.encode(prompt) for prompt in prompts(validation)])
    idx = model.generate(idx, NEW, temperature=0.8, vocab_size=tokenizer.vocab_size)
    return [tokenizer.decode(row[PROMPT:].tolist()) for row in idx]


def text_quality(texts, known):
    """
    distinct-4   of all sequences of 4 characters in the texts, the share of different ones
    repetition   the share of words that are one of the 10 before them
    real words   the share of words that occur in the training text, a set
    """
    fours = [text[i:i + 4] for text in texts for i in range(len(text) - 3)]
    repeated = []
    real = []
    for text in texts:
        words = words_of(text)[1:-1]   # the first and the last may be cut
        for i, word in enumerate(words):
            repeated.append(word in words[max(0, i - RECENT):i])
            real.append(word in known)
    return {
        "distinct-4": len(set(fours)) / len(fours),
        "repetition": statistics.mean(repeated),
        "real words": statistics.mean(real),
    }
