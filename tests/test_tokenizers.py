"""
Tokenizers: characters, GPT-2's byte pairs, and those of Hugging Face folders. The authorities are
transformers, the tokenizers library, and tiktoken.
"""

import json
import random
from pathlib import Path

import pytest
import requests
import tiktoken
import tokenizers
import transformers
from helpers import fails
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import prepare_data
import sample
import train
from model import GPT, GPTConfig
from plumbing.errors import InputError
from plumbing.tokenizer import Tokenizer, byte_alphabet, same_tokenizer
from plumbing.tokenizer_files import read_tokenizer, write_tokenizer

END = "<|endoftext|>"
TEXTS = [
    "", "Hello world", "naïve café 😀\n\ttab", " leading", "日本語", "x = [1, 23,  456]\r\n\n  ",
    "it's 10\u00a0% \u0301 \u2028", f"a{END}b",
]


def code_and_unicode():
    """A text of many kinds of pieces, the same on every machine"""
    rng = random.Random(1)
    words = [
        *"aAzZ09_ \t\n\r'éß日本語😀\u00a0\u3000١²",
        "'s", "'ll", "  ", "\n\n", "12", "the", " the", "of", " of", " def", "self", "    ",
    ]
    return "".join(rng.choice(words) for _ in range(20_000))


def trained(split="gpt2", special=(END,)):
    """A byte-level BPE of 400 tokens, made by the tokenizers library"""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split == "starcoder":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([code_and_unicode()], trainer)
    return tokenizer


def edited(change, split="gpt2"):
    """tokenizer.json of a trained tokenizer, after change(its dictionary), in the current folder"""
    data = json.loads(trained(split).to_str())
    change(data)
    write("tokenizer.json", data)


def write(name, data):
    Path(name).write_text(json.dumps(data), encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# Text and back

@pytest.mark.parametrize("text", TEXTS)
def test_characters_give_back_the_text(text):
    tokenizer = Tokenizer({"kind": "char", "chars": "".join(sorted(set(text)))})
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_byte_pairs_give_back_the_text(text, gpt2_tokenizer):
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text


def test_without_tokenizer_and_network_the_error_says_what_to_copy(monkeypatch):
    def no_network(name):
        raise requests.ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    argv = ["--input", "text.txt", "--tokenizer=gpt2", "--name", "x"]
    fails(prepare_data, *argv, match="TIKTOKEN_CACHE_DIR")


# ------------------------------------------------------------------------------------------------
# Reading the files of others

@pytest.mark.parametrize("split", ["gpt2", "starcoder"])
def test_tokenizer_json_is_read_with_the_same_ids_for_every_text(split):
    theirs = trained(split)
    theirs.save("tokenizer.json")
    spec = read_tokenizer(".")
    ours = Tokenizer(json.loads(json.dumps(spec)))   # as meta.json keeps it
    assert spec["split"] == split and ours.vocab_size == 400 and ours.end == 0
    for text in [*TEXTS[:-1], code_and_unicode()]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert 0 not in ours.encode(END)   # it is text, and never a special token


def test_vocab_json_and_merges_txt_are_read_as_tokenizer_json_is():
    theirs = trained()
    theirs.save("tokenizer.json")
    expected = read_tokenizer(".")
    Path("tokenizer.json").unlink()
    theirs.model.save(".")
    assert same_tokenizer(read_tokenizer("."), expected)
    write("added_tokens.json", {END: 0})
    with pytest.raises(InputError, match="added_tokens.json"):
        read_tokenizer(".")


def test_end_of_text_is_what_config_json_says_if_it_is_a_special_token():
    trained(special=("<s>", "</s>", END)).save("tokenizer.json")
    assert read_tokenizer(".")["end"] == 2
    assert read_tokenizer(".", end=1)["end"] == 1
    assert read_tokenizer(".", end=50256)["end"] == 2
    assert read_tokenizer(".", end=[1, 2])["end"] == 2
    assert read_tokenizer(".", end=1.0)["end"] == 2
    trained(special=()).save("tokenizer.json")
    spec = read_tokenizer(".", end=1)
    tokenizer = Tokenizer(spec)
    assert tokenizer.end is None and [tokenizer.start] == tokenizer.encode("\n")


@pytest.mark.parametrize("change, match", [
    (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
    (lambda d: d["model"].update(type="Unigram"), "Unigram"),
    (lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
    (lambda d: d["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda d: d["model"].update(dropout=0.1), "dropout"),
    (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
    (lambda d: d["pre_tokenizer"].update(use_regex=False), "pre_tokenizer"),
    (lambda d: d["pre_tokenizer"].update(type="Whitespace"), "pre_tokenizer"),
    (lambda d: d.update(pre_tokenizer=None), "tokenizer"),
    (lambda d: d.update(post_processor={"type": "TemplateProcessing"}), "post_processor"),
    (lambda d: d.update(decoder={"type": "Metaspace"}), "decoder"),
    (lambda d: d["added_tokens"][0].update(special=False), "endoftext"),
    (lambda d: d["added_tokens"][0].update(id=401), "gives it id 0"),
    (lambda d: d["model"]["vocab"].update({"qq": 400}), "order of its merges"),
    (lambda d: d["model"]["merges"].reverse(), "order of its merges"),
    (lambda d: d["model"]["merges"].pop(), "order of its merges"),
    (lambda d: d["model"]["vocab"].pop("Ġ"), "ids are not"),
    (lambda d: d["model"].pop("vocab"), "vocab"),
    (lambda d: d.pop("model"), "model"),
    (lambda d: d.update(model=3), "tokenizer"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_read_exactly_is_refused_in_one_line(change, match):
    edited(change)
    with pytest.raises(InputError, match=f"its tokenizer .*{match}"):
        read_tokenizer(".")


def test_a_pair_that_only_tiktoken_would_merge_is_refused():
    """abc from a, bc in their list; from ab, c by the ids alone."""
    letters = list(byte_alphabet().values())
    vocab = {char: i for i, char in enumerate(letters)}
    vocab |= {"ab": 256, "bc": 257, "abc": 258}
    data = json.loads(trained(special=()).to_str())
    data["model"] |= {"vocab": vocab, "merges": [["a", "b"], ["b", "c"], ["a", "bc"]]}
    write("tokenizer.json", data)
    assert tokenizers.Tokenizer.from_file("tokenizer.json").encode("abc").ids == [256, vocab["c"]]
    with pytest.raises(InputError, match="order of its merges"):
        read_tokenizer(".")


@pytest.mark.parametrize("files, match", [
    ({"tokenizer.json": "[]"}, "tokenizer.json is broken"),
    ({"tokenizer.json": "{"}, "tokenizer.json is broken"),
    ({"vocab.json": "{}"}, "merges.txt"),
    ({"vocab.json": "{}", "merges.txt": ""}, "no tokens for some bytes"),
    ({"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}, "neither tokenizer.json"),
    ({"vocab.json": '{"a": 0}', "tokenizer_config.json": '{"tokenizer_class": "CTRLTokenizer"}'},
     "CTRLTokenizer"),
    ({"vocab.json": "{}", "tokenizer_config.json": '{"add_prefix_space": true}'}, "space"),
    ({"vocab.json": "{}", "tokenizer_config.json": '{"add_bos_token": true}'}, "add_bos_token"),
])
def test_other_files_are_refused_in_one_line(files, match):
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(InputError, match=match):
        read_tokenizer(".")


@pytest.mark.parametrize("spec", [
    {"kind": "bpe"},
    {"kind": "bpe", "split": "gpt2", "vocab": {}, "special": 3, "end": None},
    {"kind": "bpe", "split": "none", "vocab": {}, "special": {}, "end": None},
    {"kind": "bpe", "split": "gpt2", "vocab": {"日": 0}, "special": {}, "end": None},
    {"kind": "bpe", "split": "gpt2", "vocab": {"a": 0, "b": 0}, "special": {}, "end": None},
    {"kind": "char", "chars": "abca"},
    {"kind": "word"},
    None,
])
def test_broken_spec_is_one_clear_line(spec):
    with pytest.raises(InputError, match="tokenizer"):
        Tokenizer(spec)


# ------------------------------------------------------------------------------------------------
# Writing files for others

def opened_by_transformers():
    return transformers.AutoTokenizer.from_pretrained("exported")


def export(spec, **changes):
    tokenizer = Tokenizer(spec)
    shape = {"block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape, **changes)).eval()
    model.tokenizer_spec = spec
    model.save_pretrained("exported")
    return model, tokenizer


def test_characters_in_transformers_give_every_text_back():
    text = "".join(TEXTS) + "[UNK] \n\n"
    model, tokenizer = export({"kind": "char", "chars": "".join(sorted(set(text)))})
    theirs = opened_by_transformers()
    assert theirs.model_max_length == 64 and theirs.bos_token is None
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    with pytest.raises(Exception, match="UNK"):   # of the tokenizers library
        theirs("Q")
    assert GPT.from_pretrained("exported").tokenizer_spec == model.tokenizer_spec


@pytest.mark.parametrize("split", ["gpt2", "starcoder"])
def test_byte_pairs_in_transformers_have_the_same_ids(split):
    trained(split).save("tokenizer.json")
    model, tokenizer = export(read_tokenizer("."))
    theirs = opened_by_transformers()
    text = code_and_unicode()
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token == theirs.bos_token == END and theirs(END)["input_ids"] == [0]
    assert GPT.from_pretrained("exported").tokenizer_spec == model.tokenizer_spec


def test_GPT2s_files_are_those_of_the_release(gpt2_tokenizer):
    """Its ids are tiktoken's, and its merges in the order that tiktoken's own ids give."""
    write_tokenizer(".", gpt2_tokenizer, 1024)
    spec = read_tokenizer(".")
    assert same_tokenizer(spec, {"kind": "gpt2"}) and spec["end"] == 50256
    theirs = transformers.AutoTokenizer.from_pretrained(".")
    assert len(theirs) == 50257 and theirs.eos_token_id == 50256
    for text in [*TEXTS[:-1], code_and_unicode()]:
        assert theirs(text)["input_ids"] == gpt2_tokenizer.encode(text)
        assert theirs.decode(gpt2_tokenizer.encode(text)) == text


def test_where_none_is_known_the_export_says_so(capsys):
    GPT(GPTConfig(8, 17, 1, 2, 16)).save_pretrained("exported")
    assert "no tokenizer was written to exported, because none is known" in capsys.readouterr().out
    assert GPT.from_pretrained("exported").tokenizer_spec is None
    assert not list(Path("exported").glob("*token*"))


@pytest.mark.parametrize("changes, prompt", [({}, "the cat"), ({"use_rope": True}, "")])
def test_pipeline_continues_a_prompt_and_begins_a_text(changes, prompt):
    export({"kind": "char", "chars": "\n .?acdeghlmnostw"}, **changes)
    generator = transformers.pipeline("text-generation", model="exported", device="cpu")
    (out,) = generator(prompt, max_new_tokens=20, return_full_text=True)
    new = out["generated_text"].removeprefix(prompt)
    assert out["generated_text"].startswith(prompt) and 19 <= len(new) <= 21


# ------------------------------------------------------------------------------------------------
# In the scripts

def test_foreign_tokenizer_of_50257_entries_is_used_and_not_taken_for_GPT2s(capsys):
    foreign = trained()
    fill = [f"<{i}>" for i in range(50257 - 400)]
    foreign.add_special_tokens(fill)
    GPT(GPTConfig(8, 50257, 1, 2, 16)).save_pretrained("weights")
    foreign.save("weights/tokenizer.json")
    capsys.readouterr()
    sample.main(["--init_from=weights", "--prompt=the of", "--max_new_tokens=3", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the of")
    spec = GPT.from_pretrained("weights").tokenizer_spec
    assert Tokenizer(spec).encode("the of") == foreign.encode("the of").ids
    assert not same_tokenizer(spec, {"kind": "char", "chars": "ab"})


def test_tokenizer_with_more_ids_than_the_model_is_refused():
    GPT(GPTConfig(8, 399, 1, 2, 16)).save_pretrained("weights")
    trained().save("weights/tokenizer.json")
    fails(sample, "--init_from=weights", match="tokenizer has 400 ids, its model 399")


def test_data_for_weights_with_their_own_tokenizer(capsys):
    """Prepared with another tokenizer it is refused, prepared with theirs it trains on."""
    Path("weights").mkdir()
    trained().save("weights/tokenizer.json")
    GPT(GPTConfig(8, 512, 1, 2, 16)).save_pretrained("weights")   # a padded vocabulary
    flags = ["--init_from=weights", "--max_iters=2", "--batch_size=2", "--device=cpu",
             "--dtype=float32"]
    fails(train, "--dataset=tiny", *flags, match="another tokenizer.*--tokenizer weights")

    prepare_data.main(["--input", "text.txt", "--tokenizer=weights", "--name=own"])
    meta = json.loads(Path("data/own/meta.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == read_tokenizer("weights") and meta["vocab_size"] == 400
    train.main(["--dataset=own", *flags])
    assert "more of it" in capsys.readouterr().out
    GPT.from_pretrained("out").save_pretrained("exported")
    assert read_tokenizer("exported") == meta["tokenizer"]


def test_characters_of_weights_without_tokenizer_must_be_as_many():
    GPT(GPTConfig(8, 18, 1, 2, 16)).save_pretrained("weights")
    fails(train, "--dataset=tiny", "--init_from=weights", match="18 ids and the dataset 17 char")
    fails(prepare_data, "--input", "text.txt", "--tokenizer=weights", "--name=own",
          match="weights has no tokenizer")


