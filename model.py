"""
GPT-2 in one file: the model, text generation, and the released weights, loaded exactly.

Read it top to bottom: configuration, attention, MLP, block, the whole model, sampling, then loading and saving.

Sources
  GPT-2    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
           its released code, https://github.com/openai/gpt-2/blob/master/src/model.py
  GPT      Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"
  attention  Vaswani et al. 2017, "Attention Is All You Need", section 3.2

Dimension key, used everywhere
  B batch   T tokens   C channels (n_embd)   H heads   D head width (C = H*D)   V vocabulary   L layers
"""

import json
import math
import os
import pickle
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class InputError(ValueError):
    """Something the user can put right. The scripts print it as one line; any other error keeps its traceback."""


@dataclass
class GPTConfig:
    """The shape of a model. GPTConfig() is exactly GPT-2 124M."""
    block_size: int = 1024    # longest sequence trained on, in tokens
    vocab_size: int = 50257   # 50,000 byte-pair merges + 256 bytes + <|endoftext|>
    n_layer: int = 12         # transformer blocks
    n_head: int = 12          # attention heads a block
    n_embd: int = 768         # channels of the residual stream
    dropout: float = 0.0      # 0 for pretraining; 0.1 or more where the text is small
    bias: bool = True         # biases in linear layers and layer norms, as GPT-2 has them

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise InputError(f"{name}={getattr(self, name)!r}: must be a whole number, at least 1")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"each head takes n_embd/n_head channels")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: must be at least 0 and less than 1")


# ----------------------------------------------------------------------------------------------------------------------
# The model

class Attention(nn.Module):
    """Causal multi-head self-attention: every token gathers from itself and the tokens before it. (B,T,C) -> (B,T,C)"""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # queries, keys, values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3 * self.n_head, -1).transpose(1, 2)        # (B,T,3C) -> (B,3H,T,D)
        q_BHTD, k_BHTD, v_BHTD = heads.split(self.n_head, dim=1)
        # softmax(q k' / sqrt(D)) v without ever storing the (T,T) scores, where the device has such a kernel
        y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True,
                                                dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))                      # heads side by side again
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """What a block does with what attention gathered, each token by itself. (B,T,C) -> (B,T,C)"""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")   # GPT-2 was trained with the tanh form; the exact one is up to 5e-4 off
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Each half normalises its input and adds its output to the residual stream (pre-norm: GPT-2, section 2.3)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)   # eps 1e-5, as GPT-2's
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """A decoder-only transformer. Parameters carry the names of the released checkpoint, so loading one is a loop."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # token embedding
        self.wpe = nn.Embedding(config.block_size, config.n_embd)   # position embedding, learned
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight                       # tied (GPT, section 4.1: one matrix in and out)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # Every block adds to the residual stream twice: scaling those 2L projections by 1/sqrt(2L)
                # keeps the variance of the sum independent of depth (GPT-2, section 2.3).
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None):
        """
        idx      (B,T) int64 token ids, T at most block_size
        targets  (B,T) int64, the token that follows each one; -1 = do not count this position
        returns  logits (B,T,V), loss: mean cross-entropy in nats a token, None without targets
        raises   ValueError if T is longer than block_size: there are no more learned positions
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise InputError(f"{T} tokens are more than block_size={self.config.block_size}: shorten the input")
        x = self.wte(idx) + self.wpe(torch.arange(T, device=idx.device))   # (B,T,C) + (T,C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def num_params(self):
        """Number of trained values; the tied embedding and head count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """
        Floating-point operations to train on one token of a sequence of T: for every weight of a matrix 2 forward and 4
        backward (Kaplan et al. 2020, section 2.1), and in every layer 2*T*C each for q k' and for the weighted sum of v.
        """
        c = self.config
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2) - self.wpe.weight.numel()   # wpe is looked up
        return 6 * weights + 3 * c.n_layer * 4 * T * c.n_embd

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, vocab_size=None):
        """Like generate, but an iterator: yields each new column (B,1) as soon as it is sampled."""
        if idx.shape[1] == 0:
            raise InputError("empty prompt: give at least one token")
        check_sampling(temperature, top_k, top_p)
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            token = sample(logits[:, -1, :vocab_size], temperature, top_k, top_p)
            if stop_token is not None:
                token[done] = stop_token      # a row that has ended stays ended
                done |= token == stop_token
            yield token
            idx = torch.cat((idx, token), dim=1)
            if done.all():
                return

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, vocab_size=None):
        """
        Continue each row of idx, (B,T) int64 with T >= 1; call model.eval() first, or dropout takes part.

        temperature  logits are divided by it; 0 takes the likeliest token (greedy)
        top_k        keep only the k likeliest tokens
        top_p        keep only the likeliest tokens that together reach probability p (Holtzman et al. 2020, section 3.1)
        stop_token   end a row at this id, fill it up with the same, and return once every row has ended
        vocab_size   never sample an id at or past this: for a vocabulary padded beyond its tokenizer
        returns      (B, T + new), new at most max_new_tokens; each token sees at most the block_size tokens before it
        raises       ValueError for an empty prompt, temperature < 0, top_k < 1 or top_p outside (0, 1]
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop_token, vocab_size)
        return torch.cat((idx, *new), dim=1)

    # ------------------------------------------------------------------------------------------------------------------
    # Loading and saving

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """
        A model with trained weights, in eval mode, float32 on the CPU.

        name_or_folder  "gpt2" (124M), "gpt2-medium" (355M), "gpt2-large" (774M), "gpt2-xl" (1558M): downloaded once to
                        checkpoints/; or a Hugging Face folder of a GPT-2 (config.json with model.safetensors or
                        pytorch_model.bin); or a folder of train.py (best.pt, else ckpt.pt); or one such .pt file
        overrides       fields of GPTConfig to change: dropout, or a smaller block_size, which drops the last positions
        raises          ValueError that names the file and what is wrong with it
        """
        path = Path(name_or_folder)
        if not path.exists() and str(name_or_folder) in GPT2_SIZES:
            path = download_gpt2(str(name_or_folder))
        if path.is_dir() and not (path / "config.json").exists():
            path = next((path / f for f in ("best.pt", "ckpt.pt") if (path / f).exists()), path)
        if path.is_file():
            checkpoint = load_checkpoint(path)
            config, weights = checkpoint["gpt_config"], checkpoint["model"]
        elif (path / "config.json").exists():
            config, weights = read_gpt2_folder(path)
        else:
            raise InputError(f"{name_or_folder}: not one of {', '.join(GPT2_SIZES)}, nor a folder with config.json and weights")
        if overrides.get("block_size", 0) > config["block_size"]:
            raise InputError(f"block_size={overrides['block_size']}: {path} has only {config['block_size']} positions")
        model = cls(GPTConfig(**{**config, **overrides}))
        if overrides.get("block_size") and "wpe.weight" in weights:
            weights["wpe.weight"] = weights["wpe.weight"][:overrides["block_size"]]
        copy_weights(model, weights, path)
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, in float32, as transformers' GPT2LMHeadModel reads them."""
        c = self.config
        config = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=c.vocab_size, n_positions=c.block_size,
                      n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, layer_norm_epsilon=1e-5,
                      activation_function="gelu_new", tie_word_embeddings=True, torch_dtype="float32",
                      resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
                      bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        weights = {}
        for name, p in self.named_parameters():   # the tied head is listed once, as wte
            weights["transformer." + name] = p.detach().t() if name.endswith(CONV1D) else p.detach()
            if not c.bias and name.endswith("weight") and not name.startswith(("wte", "wpe")):
                weights["transformer." + name[:-6] + "bias"] = torch.zeros(len(p))   # GPT-2 has biases: zero is the same
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", weights)
        with replacing(folder / "config.json") as f:
            f.write(json.dumps(config, indent=2).encode())


def check_sampling(temperature, top_k, top_p):
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: must be at least 1, or None to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: must be greater than 0 and at most 1")


def sample(logits, temperature, top_k, top_p):
    """One token for each row: (B,V) -> (B,1)"""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p   # what comes before it already reaches top_p
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), num_samples=1)


# ----------------------------------------------------------------------------------------------------------------------
# Files: trust nothing. Every size and offset is checked, and no file that is loaded can run code.

GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")   # released as (in, out); nn.Linear keeps (out, in)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def download_gpt2(name):
    """checkpoints/<name>, filled from the Hugging Face Hub, or the mirror that HF_ENDPOINT names, unless it is there."""
    from prepare_data import download, hub_url   # here, so that model.py works as a single file
    folder = Path("checkpoints") / name
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            download(hub_url(f"openai-community/{name}/resolve/main/{file}"), folder / file)
    return folder


def read_gpt2_folder(folder):
    """A Hugging Face folder -> (fields of GPTConfig, {name in this file: tensor})"""
    try:
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = dict(block_size=hf["n_positions"], vocab_size=hf["vocab_size"], n_layer=hf["n_layer"],
                      n_head=hf["n_head"], n_embd=hf["n_embd"], dropout=hf.get("resid_pdrop", 0.1))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{folder / 'config.json'} is not the configuration of a GPT-2: {e!r}") from None
    fixed = dict(model_type=("gpt2",), activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(1e-5,),
                 n_inner=(None, 4 * config["n_embd"]), scale_attn_weights=(True,), add_cross_attention=(False,),
                 scale_attn_by_inverse_layer_idx=(False,))   # reorder_and_upcast_attn changes only the rounding
    for key, allowed in fixed.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise InputError(f"{folder / 'config.json'}: {key}={hf[key]!r} is not GPT-2 as model.py has it ({allowed[0]!r})")
    config["dropout"] = 0.0   # a setting of their training, not of the weights; ask for yours as an override

    file = folder / "model.safetensors"
    if file.exists():
        loaded = read_safetensors(file)
    elif (folder / "pytorch_model.bin").exists():
        file = folder / "pytorch_model.bin"
        loaded = load_pickle(file)
        if not isinstance(loaded, dict) or not all(isinstance(w, torch.Tensor) for w in loaded.values()):
            raise InputError(f"{file} is not a dictionary of tensors")
    else:
        raise InputError(f"{folder} has config.json but neither model.safetensors nor pytorch_model.bin")
    weights = {}
    for name, w in loaded.items():
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):   # old files keep the causal mask as a buffer
            weights[name] = w.t() if name.endswith(CONV1D) and w.dim() == 2 else w
    if "wte.weight" in weights and not torch.equal(weights.pop("lm_head.weight", weights["wte.weight"]), weights["wte.weight"]):
        raise InputError(f"{file}: lm_head.weight differs from wte.weight, and GPT-2's head is tied")
    return config, weights


@torch.no_grad()
def copy_weights(model, weights, path):
    """Copy weights (a dict by name) into model; they must be the same names and shapes. path is for the error alone."""
    own = dict(model.named_parameters())
    for what, names in (("lacks", own.keys() - weights.keys()), ("has the unknown", weights.keys() - own.keys() - {"lm_head.weight"})):
        if names:
            raise InputError(f"{path} {what} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}{' …' * (len(names) > 3)}")
    for name, p in own.items():
        if p.shape != weights[name].shape:
            raise InputError(f"{path}: {name} has shape {tuple(weights[name].shape)}, the model {tuple(p.shape)}")
        p.copy_(weights[name])


def read_safetensors(path):
    """{name: tensor} of a file in the safetensors format: 8 bytes of header length, a JSON header, the raw tensors."""
    size, tensors = os.path.getsize(path), {}
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):   # before reading it: the length itself may lie
                raise ValueError(f"the header cannot be {length:,} bytes long in a file of {size:,}")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            end = 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                if any(type(n) is not int or n < 0 for n in shape):
                    raise ValueError(f"{name} has shape {shape}")
                # The tensors must tile the rest of the file: no gap, no overlap, nothing past the end.
                if start != end or stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
                    raise ValueError(f"{name}, {entry['dtype']} of shape {shape}, cannot be bytes {start} to {stop}")
                raw, end = bytearray(f.read(stop - start)), stop
                tensors[name] = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(shape)
        if 8 + length + end != size:
            raise ValueError(f"the tensors end at byte {8 + length + end:,} of {size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path} is cut short or not a safetensors file: {e}; delete it and fetch it again") from None
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0   # transformers asks for this entry
    for name, w in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [end, end + 4 * w.numel()]}
        end += 4 * w.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)   # tensors start at a multiple of 8 bytes
    with replacing(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w in tensors.values():
            f.write(w.to("cpu", torch.float32).contiguous().numpy().data)


def load_pickle(path):
    """What torch.save wrote, if it is tensors and plain values: anything that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e):   # the pickle asks for a function that torch does not know to be harmless
            raise InputError(f"{path} holds more than tensors and plain values: loading it could run code") from None
        raise InputError(f"{path} is cut short or not a checkpoint") from None
    except Exception as e:
        # torch reports a damaged file as RuntimeError, EOFError, OSError and more: to the user they are all one thing
        raise InputError(f"{path} is cut short or not a checkpoint: {str(e).splitlines()[0] if str(e) else e!r}") from None


def load_checkpoint(path):
    """The dictionary train.py saved at path."""
    checkpoint = load_pickle(path)
    keys = ("model", "optimizer", "gpt_config", "train_config", "step", "best_val_loss", "tokenizer")
    if not isinstance(checkpoint, dict) or not all(k in checkpoint for k in keys):
        raise InputError(f"{path} is not a checkpoint of train.py")
    try:
        checkpoint["gpt_config"] = asdict(GPTConfig(**checkpoint["gpt_config"]))
    except TypeError as e:
        raise InputError(f"{path} is not a checkpoint of train.py: {e}") from None
    return checkpoint



@contextmanager
def replacing(path):
    """`with replacing(path) as f`: path changes at the end, whole or not at all, even if the power fails in between."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())   # the bytes reach the disk before the name does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
