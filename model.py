"""
GPT-2 in one file, and the three changes that made it a modern decoder: rotary positions, grouped-query attention and
sliding-window attention, each behind a boolean of GPTConfig. With all three on it is the architecture of StarCoder2.

Read it top to bottom: configuration, who sees whom, attention, cache, block, the whole model, generation. How weights are
read from and written to files is in weights.py.

Sources
  GPT-2      Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
             its released code, https://github.com/openai/gpt-2/blob/master/src/model.py
  GPT        Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"
  attention  Vaswani et al. 2017, "Attention Is All You Need", section 3.2
  RoPE       Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", sections 3.2 and 3.4.2
  GQA        Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
  window     Beltagy et al. 2020, "Longformer: The Long-Document Transformer", section 3.1; looking back only, and with a
             rolling cache, as in Jiang et al. 2023, "Mistral 7B", section 2

Dimension key, used everywhere
  B batch   T query tokens   S key tokens   C channels (n_embd)   V vocabulary   L layers
  H query heads   K key/value heads (K = H unless use_gqa)   G = H/K   D head width (C = H*D)   W window   n blocks of W

A window of W means: token i sees token j where 0 <= i - j < W, that is W tokens, itself included.
"""

import math
from dataclasses import dataclass, replace

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
    tied: bool = True         # one matrix as token embedding and head, as GPT-2 has it; larger StarCoder2 have two
    use_rope: bool = False    # rotary embeddings instead of wpe
    rope_theta: float = 10000.0   # the slowest pair of channels turns once in at most 2*pi*rope_theta tokens
    use_gqa: bool = False     # n_kv_head key/value heads, each shared by n_head/n_kv_head query heads
    n_kv_head: int | None = None   # with use_gqa: 1 is multi-query, n_head is multi-head attention
    use_swa: bool = False     # each token sees itself and the window_size-1 tokens before it
    window_size: int | tuple[int, ...] | None = None   # with use_swa: one for all layers, or one a layer; 0 = full attention

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise InputError(f"{name}={getattr(self, name)!r}: must be a whole number, at least 1")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             f"each head takes n_embd/n_head channels")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise InputError(f"dropout={self.dropout!r}: must be a number, at least 0 and less than 1")
        if self.use_rope and (self.n_embd // self.n_head) % 2:
            raise InputError(f"use_rope with n_embd={self.n_embd}, n_head={self.n_head}: a head of {self.n_embd // self.n_head} "
                             f"channels is odd, and RoPE turns pairs; change n_embd or n_head")
        if not self.rope_theta > 0 or (self.rope_theta != GPTConfig.rope_theta and not self.use_rope):
            raise InputError(f"rope_theta={self.rope_theta}: must be positive, and another than the default needs use_rope=True")
        if self.use_gqa != (self.n_kv_head is not None):
            raise InputError(f"use_gqa={self.use_gqa} with n_kv_head={self.n_kv_head}: set both or neither")
        if self.use_gqa and (not isinstance(self.n_kv_head, int) or self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise InputError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}, or that is no whole number: "
                             f"each key/value head serves n_head/n_kv_head query heads")
        if self.use_swa != (self.window_size is not None):
            raise InputError(f"use_swa={self.use_swa} with window_size={self.window_size}: set both or neither")
        if isinstance(self.window_size, list):
            self.window_size = tuple(self.window_size)
        if len(self.windows) != self.n_layer or not all(isinstance(w, int) and w >= 0 for w in self.windows):
            raise InputError(f"window_size={self.window_size} with n_layer={self.n_layer}: one whole number, or one for each "
                             f"layer; 0 = full attention")

    @property
    def windows(self):
        """The window of every layer; 0 = full attention."""
        return self.window_size if isinstance(self.window_size, tuple) else (self.window_size or 0,) * self.n_layer


# ----------------------------------------------------------------------------------------------------------------------
# Positions and windows

def rotate(x, pos, theta):
    """
    Turn each pair of channels by an angle proportional to the token's position: x (B,H,T,D), pos (T,) -> (B,H,T,D).

    Channel d is paired with channel d + D/2, as in Hugging Face's files (the paper pairs neighbours: the same up to a
    permutation of channels). Pair d turns by pos * theta^(-2d/D). A product of a turned query and a turned key depends on
    the difference of the angles alone, so on how far apart the tokens are (RoFormer, equations 11 to 16). In float32:
    bfloat16 cannot tell position 257 from 256. Angles are made anew in each layer: no table to move, cast or outgrow.
    """
    D = x.shape[-1]
    frequency = theta ** (torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / -D)   # (D/2,)
    angle = pos[:, None].float() * frequency                                                  # (T,D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)                                                         # (B,H,T,D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def visible(query_pos, key_pos, window):
    """Who sees whom: positions (T,), (S,) -> (T,S) bool; window 0 = no limit. Where no mask is made, this is why none is needed."""
    distance = query_pos[:, None] - key_pos                                        # (T,S)
    return (distance >= 0) & (distance < (window or torch.inf)) & (key_pos >= 0)   # -1 marks an empty slot of the cache


def attend(q, k, v, mask=None, dropout=0.0):
    r"""
    softmax(q k' / sqrt(D)) v for q (B,H,T,D), k and v (B,K,S,D) -> (B,H,T,D). mask (T,S) bool, True = seen; None = causal,
    or everything where there is one query. Query head h reads key/value head h // (H/K):

      multi-head (K = H)      grouped (K = H/2)       multi-query (K = 1)
      q  0  1  2  3           q  0  1  2  3           q  0  1  2  3
         |  |  |  |               \/    \/                \  \/  /
      kv 0  1  2  3           kv   0     1            kv      0
    """
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    if T == 1 and mask is None:   # one query, as in decoding: the heads of a group become the queries of one head, no key is copied
        q_BKGD = q.reshape(q.shape[0], k.shape[1], G, -1)
        return F.scaled_dot_product_attention(q_BKGD, k, v, dropout_p=dropout).reshape(q.shape)
    if G > 1:
        k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)   # (B,H,S,D)
    # is_causal lines query 0 up with key 0: right only where T = S, and nobody asks for it elsewhere
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)


def attend_in_blocks(q, k, v, window, dropout=0.0):
    """
    Sliding-window attention of whole sequences, T > W, in O(T*W) time and memory: q (B,H,T,D), k and v (B,K,T,D) -> (B,H,T,D).
    Cut into blocks of W: what a block sees lies in itself and the block before it (Longformer, section 3.2: "chunks").
    """
    B, T = q.shape[0], q.shape[2]
    first = attend(q[:, :, :window], k[:, :, :window], v[:, :, :window], dropout=dropout)   # has no block before it
    if T % window:
        q, k, v = (F.pad(t, (0, 0, 0, -T % window)) for t in (q, k, v))
    q = q[:, :, window:].unflatten(2, (-1, window))                                         # (B,H,n,W,D)
    k, v = (t.unfold(2, 2 * window, window).mT for t in (k, v))   # (B,K,n,D,2W) -> (B,K,n,2W,D): views, they overlap by W
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))   # (B*n,H,W,D), (B*n,K,2W,D): every block an entry of the batch
    pos = torch.arange(2 * window, device=q.device)                  # within the two blocks: only distances matter
    rest = attend(q, k, v, visible(pos[window:], pos, window), dropout)
    rest = rest.transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)                         # (B,n*W,H,D)
    return torch.cat((first.transpose(1, 2), rest), dim=1)[:, :T].transpose(1, 2)


class LayerCache:
    """
    Keys and values of one layer, (B,K,slots,D) each, and the position of the token in every slot (-1 = empty).

    With a window the slots are a ring: the token at position p goes to slot p % W, over the one that has just left the
    window. W = 4, positions in the slots after 4, 5, 6 and 7 tokens:   0 1 2 3    4 1 2 3    4 5 2 3    4 5 6 3
    Without a window the slots double when they are full.
    """

    def __init__(self, window):
        self.window, self.length = window, 0   # length: tokens taken in so far
        self.k = self.v = self.pos = None

    def update(self, k, v, pos):
        """Take in k, v (B,K,T,D) of the tokens at pos (T,) -> k, v (B,K,S,D), pos (S,): all that any of these may see, or more."""
        k, v, T = k.detach(), v.detach(), len(pos)   # for inference: or the graph of every call would stay in memory
        if self.pos is None:                         # the first call: now dtype and device are known
            slots = self.window or 64                # without a window a first guess, doubled below
            self.k, self.v = (torch.zeros(*t.shape[:2], slots, t.shape[3], device=t.device, dtype=t.dtype) for t in (k, v))
            self.pos = torch.full((slots,), -1, device=k.device)
        self.length += T
        while not self.window and self.length > len(self.pos):
            self.k, self.v = (F.pad(t, (0, 0, 0, len(self.pos))) for t in (self.k, self.v))
            self.pos = F.pad(self.pos, (0, len(self.pos)), value=-1)
        slots = len(self.pos)
        if T > 1 and self.length > slots:   # the last of these tokens replace what the first still see: attend, then evict
            seen = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2), torch.cat((self.pos, pos))
            self.write(k[:, :, -slots:], v[:, :, -slots:], pos[-slots:])
            return seen
        self.write(k, v, pos)
        n = min(self.length, slots)         # slots filled so far
        return self.k[:, :, :n], self.v[:, :, :n], self.pos[:n]

    def write(self, k, v, pos):
        slot = pos % len(self.pos)
        self.k[:, :, slot], self.v[:, :, slot], self.pos[slot] = k, v, pos


class KVCache:
    """What a model remembers of a batch of sequences, so that new tokens need not compute the old ones again."""

    def __init__(self, config, batch_size):
        self.config, self.batch_size = config, batch_size
        self.reset()

    def reset(self):
        """Forget everything."""
        self.layers = [LayerCache(window) for window in self.config.windows]

    @property
    def length(self):
        """Number of tokens taken in, which is the position of the next one."""
        return self.layers[-1].length   # the last layer is the last to take them in: until then a forward pass finds the old length


# ----------------------------------------------------------------------------------------------------------------------
# The model

class Attention(nn.Module):
    """Every token gathers from itself and the tokens before it, all or a window of them. (B,T,C) -> (B,T,C)"""

    def __init__(self, config, window):
        super().__init__()
        self.H, self.K, self.D = config.n_head, config.n_kv_head or config.n_head, config.n_embd // config.n_head
        self.theta, self.window, self.dropout = config.rope_theta if config.use_rope else None, window, config.dropout
        self.c_attn = nn.Linear(config.n_embd, (self.H + 2 * self.K) * self.D, bias=config.bias)   # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, pos, cache=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)   # (B,H+2K,T,D)
        qk, v_BKTD = heads.split((self.H + self.K, self.K), dim=1)
        if self.theta is not None:
            qk = rotate(qk, pos, self.theta)                                     # before the cache: a key is turned once
        q_BHTD, k_BKTD = qk.split((self.H, self.K), dim=1)
        dropout = self.dropout if self.training else 0.0
        if cache is not None and cache.length > 0:
            k_BKSD, v_BKSD, key_pos = cache.update(k_BKTD, v_BKTD, pos)
            mask = visible(pos, key_pos, self.window) if T > 1 else None         # None: one token sees all that the cache kept
            y_BHTD = attend(q_BHTD, k_BKSD, v_BKSD, mask, dropout)
        else:
            blocks = 0 < self.window < T
            y_BHTD = (attend_in_blocks(q_BHTD, k_BKTD, v_BKTD, self.window, dropout) if blocks else
                      attend(q_BHTD, k_BKTD, v_BKTD, dropout=dropout))
            if cache is not None:
                cache.update(k_BKTD, v_BKTD, pos)
        y = self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C))                 # heads side by side again
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """What a block does with what attention gathered, each token by itself. (B,T,C) -> (B,T,C)"""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")   # as GPT-2 was trained; the exact form is up to 5e-4 off
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Each half normalises its input and adds its output to the residual stream (pre-norm: GPT-2, section 2.3)."""

    def __init__(self, config, window):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)   # eps 1e-5, as GPT-2's
        self.attn = Attention(config, window)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, pos, cache=None):
        x = x + self.attn(self.ln_1(x), pos, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


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
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature   # the largest is 0, so nothing overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:      # a float32 sum of all p may pass 1 too early
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p   # what comes before it already reaches top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)   # from sorted order back to ids
    return torch.multinomial(logits.softmax(-1), num_samples=1)


class GPT(nn.Module):
    """A decoder-only transformer. Parameters carry the names of the released checkpoint, so loading one is a loop."""
    tokenizer = None   # a dict that prepare_data.Tokenizer takes; from_pretrained sets it where the files tell what ids mean

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)   # token embedding
        if not config.use_rope:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)   # position embedding, learned
        self.h = nn.ModuleList(Block(config, window) for window in config.windows)
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight                   # one matrix in and out (GPT, section 3.1)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # Every block adds to the residual stream twice: scaling those 2L projections by 1/sqrt(2L)
                # keeps the variance of the sum independent of depth (GPT-2, section 2.3).
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None, cache=None):
        """
        idx      (B,T) int64 token ids; without RoPE at most block_size of them, the cache's tokens counted in
        targets  (B,T) int64, the token that follows each one; -1 = do not count this position
        cache    from new_cache(B), for inference (no gradient reaches its keys): idx continues what it has seen, and is added
        returns  logits (B,T,V), loss: mean cross-entropy in nats a token, None without targets, NaN if all of them are -1
        raises   ValueError for more tokens than there are learned positions, or a cache of another batch size or model
        """
        logits = self.lm_head(self.hidden(idx, cache))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def hidden(self, idx, cache=None):
        """The normalised residual stream that the head reads: (B,T) -> (B,T,C)"""
        B, T = idx.shape
        if cache is not None and (cache.batch_size != B or cache.config != self.config):
            raise InputError(f"the cache is of another model or batch size ({cache.batch_size}, here {B}): take model.new_cache({B})")
        start = cache.length if cache is not None else 0
        if not self.config.use_rope and start + T > self.config.block_size:
            raise InputError(f"{start + T} tokens are more than block_size={self.config.block_size}, and every learned position "
                             f"is one of those: shorten the input")
        pos = torch.arange(start, start + T, device=idx.device)
        x = self.wte(idx)                                                        # (B,T,C)
        if not self.config.use_rope:
            x = x + self.wpe(pos)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, pos, cache.layers[i] if cache is not None else None)
        return self.ln_f(x)

    def new_cache(self, batch_size):
        """An empty cache, to be passed to forward: first a prompt, whole or in chunks, then one or several tokens a call."""
        return KVCache(self.config, batch_size)

    def num_params(self):
        """Number of trained values; the tied embedding and head count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """
        Floating-point operations to train on one token of a sequence of T: for every weight of a matrix 2 forward and 4
        backward (Kaplan et al. 2020, section 2.1), and in every layer 2*S*C each for q k' and for the weighted sum of v,
        where S keys are computed for a query: T, or in blocks W for the first block and 2W for the others.
        """
        c = self.config
        lookups = {"wpe.weight"} if c.tied else {"wpe.weight", "wte.weight"}   # read, not multiplied; a tied wte is also the head
        multiplied = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name not in lookups)
        keys = sum((2 * math.ceil(T / W) - 1) * W * W / T if 0 < W < T else T for W in c.windows)
        return 6 * multiplied + 3 * 4 * keys * c.n_embd

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, vocab_size=None):
        """Like generate, but an iterator: yields each new column (B,1) as soon as it is sampled; errors come with the first."""
        if idx.shape[1] == 0:
            raise InputError("empty prompt: give at least one token")
        check_sampling(temperature, top_k, top_p)
        endless = self.config.use_rope and all(self.config.windows)   # nothing in it knows how long the text has become
        block_size, cache, unread = self.config.block_size, self.new_cache(len(idx)), idx   # unread: what the cache has not seen
        done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if not endless and cache.length + unread.shape[1] > block_size:   # no position is left: read the last ones anew
                cache.reset()
                unread = idx[:, -block_size:]
            logits = self.lm_head(self.hidden(unread, cache)[:, -1])          # (B,V): the head is costly, so the last token alone
            token = sample(logits[:, :vocab_size], temperature, top_k, top_p)
            if stop_token is not None:
                token[done] = stop_token      # a row that has ended stays ended
                done |= token == stop_token
            yield token
            idx, unread = torch.cat((idx, token), dim=1)[:, -block_size:], token
            if done.all():
                return

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None, vocab_size=None):
        """
        Continue each row of idx, (B,T) int64 with T >= 1; call model.eval() first, or dropout takes part.

        temperature  logits are divided by it; 0 takes the likeliest token (greedy)
        top_k        keep only the k likeliest tokens
        top_p        keep only the likeliest tokens that together reach probability p (Holtzman et al. 2020, section 3.1); 1 = all
        stop_token   end a row at this id, fill it up with the same, and return once every row has ended
        vocab_size   never sample an id at or past this: for a vocabulary padded beyond its tokenizer
        returns      (B, T + new), new at most max_new_tokens. With RoPE and a window in every layer, memory and time a
                     token stay constant (to about a million tokens, where float32 angles grow coarse). Otherwise, past
                     block_size, also of the prompt, the last block_size tokens are read anew for each token: GPT-2 has no
                     further positions, and no model was trained on more
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
                        checkpoints/; or a Hugging Face folder of a GPT-2 or StarCoder2 (config.json with model.safetensors,
                        whole or in shards, or pytorch_model.bin); or a folder of train.py (best.pt, else ckpt.pt), or a .pt
        overrides       fields of GPTConfig to change: dropout; a smaller block_size, which drops the last positions;
                        use_swa and window_size, which keep every weight; use_gqa and n_kv_head, which make each
                        key/value head the mean of those it replaces (GQA, section 2.1); use_rope, which drops wpe.
                        The last three give a start for training, not a trained model.
        raises          ValueError that names the field or the file, and what is wrong with it
        """
        import weights   # here, so that model.py runs by itself
        if unknown := overrides.keys() - vars(GPTConfig()):
            raise InputError(f"{', '.join(unknown)}: no field of GPTConfig")
        config, tensors, tokenizer, path = weights.load(name_or_folder)
        model = cls(replace(config, **overrides))
        model.tokenizer = tokenizer
        weights.copy(model, weights.adapt(tensors, config, model.config, path), path)
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write config.json and model.safetensors, in float32, as transformers reads them: a gpt2 folder with no switch on, a
        starcoder2 folder with RoPE and, if any, one window for all layers; absent biases as zeros, and no tokenizer. Raises
        ValueError for what neither can be.
        """
        import weights
        weights.save(self, folder)
