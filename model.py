"""
GPT-2 in one file, and three changes that later models made to it: rotary positions (RoPE),
grouped-query attention (GQA) and sliding-window attention (SWA). Each is switched on by a
boolean of GPTConfig, the last two with a size beside it. With all three on, this is the
architecture of StarCoder2.

Read it top to bottom: configuration, positions, attention, cache, block, sampling, the whole
model.

Sources
  GPT-2      Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
             its code, https://github.com/openai/gpt-2/blob/master/src/model.py
  GPT        Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"
  attention  Vaswani et al. 2017, "Attention Is All You Need", section 3.2
  RoPE       Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding",
             sections 3.2 and 3.4.2
  GQA        Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from
             Multi-Head Checkpoints"
  SWA        Beltagy et al. 2020, "Longformer: The Long-Document Transformer", section 3.1;
             with a rolling cache: Jiang et al. 2023, "Mistral 7B", section 2

Dimension key, used everywhere
  B  batch                   H  query heads
  T  query tokens            K  key/value heads (K = H unless use_gqa)
  S  key tokens              G  query heads per key/value head (H = G*K)
  C  channels (n_embd)       D  channels per head (C = H*D)
  V  vocabulary              W  window
  L  layers

A window of W means that token i sees token j if 0 <= i - j < W: W tokens, itself included.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of a model. GPTConfig() is exactly GPT-2 124M."""
    block_size: int = 1024    # tokens per training sequence; with learned positions, the limit
    vocab_size: int = 50257   # 50,000 byte-pair merges + 256 bytes + <|endoftext|>
    n_layer: int = 12         # transformer blocks
    n_head: int = 12          # attention heads per block
    n_embd: int = 768         # channels of the residual stream
    dropout: float = 0.0      # 0 for pretraining; 0.1 or more when the text is small
    bias: bool = True         # biases in linear layers and layer norms, as in GPT-2
    tied: bool = True         # one matrix for token embedding and head, as in GPT-2
    use_rope: bool = False    # rotary embeddings instead of learned positions
    rope_theta: float = 10000.0    # base of the rotation frequencies; larger = slower rotation
    use_gqa: bool = False     # fewer key/value heads, each shared by several query heads
    n_kv_head: int | None = None   # with use_gqa: how many; 1 = multi-query, n_head = multi-head
    use_swa: bool = False     # each token sees itself and the window_size-1 tokens before it
    window_size: int | tuple[int, ...] | None = None   # with use_swa: W, or one per layer; 0 = full

    def __post_init__(self):
        if isinstance(self.window_size, list):   # as JSON has it
            self.window_size = tuple(self.window_size)
        check_config(self)   # at the end of this file

    @property
    def windows(self):
        """The window of every layer, in tokens; 0 = full attention."""
        if isinstance(self.window_size, tuple):
            return self.window_size
        W = self.window_size or 0
        return (W,) * self.n_layer


# ----------------------------------------------------------------------------------------------
# Positions

def rotate(x, pos, theta):
    """
    Rotate each pair of channels by an angle proportional to the token's position:
    x (B,heads,T,D), pos (T,) -> the same shape as x.

    Channel d is paired with channel d + D/2, as in Hugging Face's files. (The paper pairs
    neighbours, which is the same up to a permutation of channels.) Pair d turns by the angle
    pos * theta^(-2d/D). The product of a rotated query and a rotated key depends on their
    positions only through the difference of the angles, that is through the distance between the
    tokens (RoFormer, equations 11 to 16). Computed in float32: bfloat16 cannot tell position 257
    from 256. Angles are recomputed per layer, so there is no cos/sin table to keep on the right
    device, dtype or length.
    """
    D = x.shape[-1]
    exponent = torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / -D
    angle = pos[:, None].float() * theta ** exponent     # (T,D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)                    # (B,heads,T,D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def visible(query_pos, key_pos, window):
    """
    Which queries see which keys: positions (T,) and (S,) -> (T,S) bool. window 0 = no limit.

    Three cases satisfy this rule without a mask: causal attention over no more than W tokens
    (is_causal=True below), decoding one token, because the cache (below) keeps only what that token
    may see, and flash attention, which is given the window.
    """
    distance = query_pos[:, None] - key_pos
    if window:
        return (distance >= 0) & (distance < window)
    return distance >= 0


# ----------------------------------------------------------------------------------------------
# Attention

def copy_heads(x, H):
    """
    Each key/value head once for every query head that reads it: (B,K,S,D) -> (B,H,S,D). Copies,
    because not every fused kernel accepts fewer key/value heads (enable_gqa=True).
    """
    G = H // x.shape[1]
    return x.repeat_interleave(G, dim=1) if G > 1 else x


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    r"""
    softmax(q k' / sqrt(D)) v: q (B,H,T,D), k and v (B,K,S,D) -> (B,H,T,D).

    mask    (T,S) bool, True = visible; None = every key is visible to every query
    causal  True = query i sees keys 0 to i, without a mask; needs T = S

    Query head h reads key/value head h // G, for example with H = 4:

      multi-head (K = H)      grouped (K = H/2)       multi-query (K = 1)
      q  0  1  2  3           q  0  1  2  3           q  0  1  2  3
         |  |  |  |               \/    \/                \  \/  /
      kv 0  1  2  3           kv   0     1            kv      0
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    if causal:
        k, v = copy_heads(k, H), copy_heads(v, H)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # The G heads of a group become G*T queries of their key/value head, so that none is repeated:
    # (B,H,T,D) -> (B,K,G*T,D). Not above: is_causal would number these queries 0 to G*T - 1.
    G = H // K
    q = q.reshape(B, K, G * T, D)
    if mask is not None:
        mask = mask.repeat(G, 1)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    return y.reshape(B, H, T, D)


def attend_in_blocks(q, k, v, window, dropout=0.0):
    """
    Sliding-window attention over a whole sequence in O(T*W) time and memory:
    q (B,H,T,D), k and v (B,K,T,D) -> (B,H,T,D).

    The sequence is split into blocks of W tokens. Everything that a block may see lies in the
    block itself and the one before it (Longformer, section 3.2: "chunks").
    """
    # split, not k[:, :, a:b] in the loop: the gradient of each such slice would be a tensor of the
    # whole length T, zero almost everywhere.
    qs, ks, vs = (x.split(window, dim=2) for x in (q, k, v))     # blocks (B,heads,W,D)
    pos = torch.arange(2 * window, device=q.device)
    mask = visible(pos[window:], pos, window)                    # (W,2W): only distances matter
    y = []
    for i in range(len(qs)):
        # cat copies the first block, too: a view of it would keep all of k and v for the gradient.
        near = slice(max(i - 1, 0), i + 1)
        k_near = torch.cat(ks[near], dim=2)                      # (B,K,S,D): S = W, then 2W
        v_near = torch.cat(vs[near], dim=2)
        n, S = qs[i].shape[2], k_near.shape[2]                   # less if the last block is shorter
        end = window + n                                         # of this block in the mask's keys
        y.append(attend(qs[i], k_near, v_near, mask[:n, end - S:end], dropout=dropout))
    return torch.cat(y, dim=2)


def flash_fits(q, dropout):
    """Whether attend_with_flash can be used: on GPUs since Ampere, in bfloat16, without dropout"""
    if not q.is_cuda or q.dtype != torch.bfloat16 or dropout > 0:
        return False
    is_new = torch.cuda.get_device_properties(q.device).major >= 8
    D = q.shape[-1]
    return is_new and D % 8 == 0 and D <= 192 and torch.backends.cuda.is_flash_attention_available()


def attend_with_flash(q, k, v, window):
    """
    What attend_in_blocks does, by flash attention (Dao 2023), which skips keys outside the window:
    q (B,H,T,D), k and v (B,K,T,D) -> (B,H,T,D). It takes the sequences of the batch end to end,
    (B*T,H,D), and the positions where one ends and the next begins.
    """
    from torch.nn.attention.varlen import varlen_attn  # imported here: CPUs do not need it

    B, H, T, D = q.shape
    k, v = copy_heads(k, H), copy_heads(v, H)
    q, k, v = (x.transpose(1, 2).reshape(B * T, H, D) for x in (q, k, v))
    bounds = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
    y = varlen_attn(q, k, v, bounds, bounds, T, T, window_size=(window - 1, 0))
    return y.view(B, T, H, D).transpose(1, 2)


# ----------------------------------------------------------------------------------------------
# The cache

class LayerCache:
    """
    Keys and values of one layer, (B,K,slots,D) each, and the position of the token in each slot
    (-1 = empty).

    Slots are used in turn: the token at position p goes to slot p % slots. With a window there
    are W slots, so that a token replaces the one that has just left the window. For W = 4:

      tokens so far          4          5          6          7
      positions in slots  0 1 2 3    4 1 2 3    4 5 2 3    4 5 6 3
    """

    def __init__(self, shape, device, dtype):
        self.k, self.v = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.pos = torch.full((shape[2],), -1, device=device)
        self.length = 0   # tokens seen so far, evicted ones included

    def read(self):
        """-> k and v (B,K,S,D), pos (S,) of the tokens that are kept"""
        used = min(self.length, len(self.pos))
        return self.k[:, :, :used], self.v[:, :, :used], self.pos[:used]

    def write(self, k, v, pos):
        """Keep k, v (B,K,T,D) of the tokens at pos (T,), in place of those that have to go."""
        slots = len(self.pos)
        slot = pos[-slots:] % slots             # if T > slots, only the last tokens are kept
        # detach: otherwise each call would keep its autograd graph alive
        self.k[:, :, slot] = k[:, :, -slots:].detach().type_as(self.k)
        self.v[:, :, slot] = v[:, :, -slots:].detach().type_as(self.v)
        self.pos[slot] = pos[-slots:]
        self.length += len(pos)


class KVCache:
    """Keys and values of a batch of sequences, kept so that new tokens need not recompute them."""

    def __init__(self, config, batch_size, device, dtype):
        self.config = config
        self.batch_size = batch_size
        self.length = 0   # tokens seen so far: the position of the next one
        K, D = config.n_kv_head or config.n_head, config.n_embd // config.n_head
        self.layers = [LayerCache((batch_size, K, W or config.block_size, D), device, dtype)
                       for W in config.windows]


# ----------------------------------------------------------------------------------------------
# The model

class Linear(nn.Linear):
    """nn.Linear with shortcuts for a single token on a CPU, for decoding."""

    def forward(self, x):
        if x.numel() != self.in_features or x.device.type != "cpu":
            return super().forward(x)
        if self.weight.dtype == torch.float32:
            y = self.in_parts(x)
        else:
            y = super().forward(x.view(-1))   # in bfloat16, up to 1.6 times as fast as (1,1,C)
        return y.view(*x.shape[:-1], -1)

    def in_parts(self, x):
        """
        Some CPU libraries multiply a matrix by one vector in a single thread. As a batch of n
        products, each with a part of the rows, all threads share it. x: (1,1,in) -> (out,)
        """
        n = next(n for n in range(64, 0, -1) if self.out_features % n == 0)
        parts = self.weight.view(n, -1, self.in_features)
        y = (x.view(1, 1, -1) @ parts.mT).flatten()
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """
    Causal self-attention: each token attends to itself and the tokens before it.
    x (B,T,C), pos (T,) -> (B,T,C)
    """

    def __init__(self, config, window):
        super().__init__()
        self.H = config.n_head
        self.K = config.n_kv_head or config.n_head
        self.D = config.n_embd // config.n_head
        self.theta = config.rope_theta if config.use_rope else None
        self.window = window
        self.dropout = config.dropout
        # one projection for q, k and v; the names are those of GPT-2's checkpoint
        self.c_attn = Linear(config.n_embd, (self.H + 2 * self.K) * self.D, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, pos, layer_cache=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, self.H + 2 * self.K, self.D).transpose(1, 2)
        q, k, v = heads.split((self.H, self.K, self.K), dim=1)   # (B,H,T,D), (B,K,T,D), (B,K,T,D)
        if self.theta is not None:
            q = rotate(q, pos, self.theta)
            k = rotate(k, pos, self.theta)                       # before the cache: once per key
        dropout = self.dropout if self.training else 0.0

        has_past = layer_cache is not None and layer_cache.length > 0
        one_more = has_past and T == 1
        if one_more:        # decoding: evict, then attend to everything that is kept
            layer_cache.write(k, v, pos)
            k, v, _ = layer_cache.read()
            y = attend(q, k, v, dropout=dropout)
        elif has_past:      # a chunk: attend, then write: its last tokens evict what its first see
            old_k, old_v, old_pos = layer_cache.read()
            mask = visible(pos, torch.cat((old_pos, pos)), self.window)
            all_k = torch.cat((old_k, k), dim=2)                 # (B,K,S,D)
            all_v = torch.cat((old_v, v), dim=2)
            y = attend(q, all_k, all_v, mask, dropout=dropout)
        elif 0 < self.window < T and flash_fits(q, dropout):
            y = attend_with_flash(q, k, v, self.window)
        elif 0 < self.window < T:
            y = attend_in_blocks(q, k, v, self.window, dropout)
        else:
            y = attend(q, k, v, causal=True, dropout=dropout)
        if layer_cache is not None and not one_more:
            layer_cache.write(k, v, pos)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))      # concatenate the heads
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """The feed-forward network, which treats each token by itself. (B,T,C) -> (B,T,C)"""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")   # as in GPT-2; exact GELU is up to 5e-4 off
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm residual block: x + attn(ln(x)), then x + mlp(ln(x)) (GPT-2, section 2.3)."""

    def __init__(self, config, window):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)   # eps 1e-5, as in GPT-2
        self.attn = Attention(config, window)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, pos, layer_cache=None):
        x = x + self.attn(self.ln_1(x), pos, layer_cache)
        x = x + self.mlp(self.ln_2(x))
        return x


def sample(logits, temperature, top_k, top_p):
    """
    Draw one token per row: (B,V) -> (B,1). The arguments are those of generate: temperature 0 takes
    the likeliest token, otherwise it divides the logits; then top_k, then top_p; None = all tokens.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature   # at most 0: no overflow
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:   # 1 keeps all; a rounded sum would drop some
        p, order = logits.softmax(-1).sort(descending=True)
        surplus = p.cumsum(-1) - p >= top_p               # the more likely ones already suffice
        excluded = torch.empty_like(surplus).scatter(-1, order, surplus)   # sorted order -> ids
        logits = logits.masked_fill(excluded, -torch.inf)
    return torch.multinomial(logits.softmax(-1), num_samples=1)


class GPT(nn.Module):
    """
    A decoder-only transformer. Parameters carry the names of the released checkpoint, as
    Hugging Face publishes it.
    """
    tokenizer_spec = None   # what the ids mean (plumbing/tokenizer.py); from_pretrained sets it

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # token embedding
        if not config.use_rope:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)   # position embedding
        self.h = nn.ModuleList(Block(config, window) for window in config.windows)
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight                       # GPT 2018, section 3.1
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                # Each block adds to the residual stream twice. Scaling these 2L projections by
                # 1/sqrt(2L) keeps the sum's variance independent of depth (GPT-2, section 2.3).
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """
        idx      (B,T) int64 token ids: at most block_size, cached ones included. With RoPE
                 there is no limit unless a layer without a window has to cache them
        targets  (B,T) int64, the token that follows each one; -1 = ignore this position
        cache    from new_cache(B), for inference only: idx continues what the cache has seen,
                 and is added to it
        loss_only  True = None for the logits: torch.compile would give them a gradient of zeros
        returns  logits (B,T,V), and the loss: mean cross-entropy in nats per token, None
                 without targets, NaN if all targets are -1
        raises   ValueError for too many tokens, or a cache of another model or batch size
        """
        logits = self.lm_head(self.hidden(idx, cache))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        if loss_only:
            logits = None
        return logits, loss

    def hidden(self, idx, cache=None):
        """The final hidden states, which lm_head reads: (B,T) -> (B,T,C)"""
        B, T = idx.shape
        past = 0
        if cache is not None:
            fits = cache.batch_size == B and cache.config == self.config
            require(fits, f"the cache belongs to another model or batch size "
                          f"({cache.batch_size}, here {B}): use model.new_cache({B})")
            past = cache.length
        # Learned positions end at block_size, and so does a cache of full attention.
        is_limited = not self.config.use_rope or (cache is not None and 0 in self.config.windows)
        require(not is_limited or past + T <= self.config.block_size,
                f"{past + T} tokens exceed block_size={self.config.block_size}")

        pos = torch.arange(past, past + T, device=idx.device)
        x = self.wte(idx)                                                # (B,T,C)
        if not self.config.use_rope:
            x = x + self.wpe(pos)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, pos, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def new_cache(self, batch_size):
        """
        An empty cache to pass to forward: first the prompt, whole or in chunks (prefill), then
        one or more tokens per call. A layer keeps its window, or block_size tokens without one.
        """
        weight = self.wte.weight
        return KVCache(self.config, batch_size, weight.device, weight.dtype)

    def num_params(self):
        """The number of parameters. A tied embedding and head count once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """
        Floating-point operations to train on one token of a sequence of T tokens. Each weight
        of a matrix takes 2 forward and 4 backward (Kaplan et al. 2020, section 2.1). In each
        layer, each key costs as much as 2C weights: C for q k', C for the weighted sum of v.
        """
        lookups = ["wpe.weight"]             # read, not multiplied
        if not self.config.tied:
            lookups.append("wte.weight")     # a tied embedding is also the head, which multiplies
        weights = sum(p.numel() for name, p in self.named_parameters()
                      if p.dim() == 2 and name not in lookups)
        keys = sum(keys_per_query(T, W) for W in self.config.windows)
        return 6 * (weights + 2 * keys * self.config.n_embd)

    # ------------------------------------------------------------------------------------------
    # Generation

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 stop_token=None, vocab_size=None):
        """
        Continue each row of idx, (B,T) int64 with T >= 1. Call model.eval() first, or dropout
        is active.

        temperature  divides the logits; 0 takes the most likely token (greedy)
        top_k        keep only the k most likely tokens
        top_p        keep only the most likely tokens that together reach probability p
                     (Holtzman et al. 2020, section 3.1); 1 keeps all
        stop_token   end a row at this id, pad it with the same id, and return once every row
                     has ended
        vocab_size   sample only ids below this: for a vocabulary padded beyond its tokenizer
        returns      (B, T + new), new <= max_new_tokens. With RoPE and a window in every layer,
                     time and memory per token stay constant (up to about a million tokens,
                     where float32 angles become coarse). Otherwise, once prompt plus output
                     exceeds block_size, each token re-encodes the last block_size tokens
        raises       ValueError for an empty prompt, temperature < 0, top_k < 1 or top_p outside
                     (0, 1]
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop_token, vocab_size)
        return torch.cat((idx, *new), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
               stop_token=None, vocab_size=None):
        """
        Like generate, but an iterator: yields each new column (B,1) as soon as it is sampled.
        Arguments are validated when the first token is requested.
        """
        require(idx.shape[1] > 0, "empty prompt: give at least one token")
        check_sampling(temperature, top_k, top_p)
        block_size = self.config.block_size
        can_slide_forever = self.config.use_rope and all(self.config.windows)
        cache = self.new_cache(len(idx))
        new_tokens = idx   # those the cache has not seen
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if not can_slide_forever and cache.length + new_tokens.shape[1] > block_size:
                cache = self.new_cache(len(idx))
                new_tokens = idx[:, -block_size:]
            x = self.hidden(new_tokens, cache)
            logits = self.lm_head(x[:, -1])        # (B,V); the head is costly
            token = sample(logits[:, :vocab_size], temperature, top_k, top_p)
            if stop_token is not None:
                token[ended] = stop_token          # a row that has ended stays ended
                ended |= token == stop_token
            yield token
            if stop_token is not None and ended.all():
                return
            idx = torch.cat((idx, token), dim=1)[:, -block_size:]
            new_tokens = token

    # ------------------------------------------------------------------------------------------
    # Loading and saving

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """
        A model with trained weights, in eval mode, float32 on the CPU.

        name_or_folder  "gpt2" (124M), "gpt2-medium" (355M), "gpt2-large" (774M) or "gpt2-xl"
                        (1558M), or "owner/name" on the Hugging Face Hub, downloaded once to
                        checkpoints/; or a Hugging Face folder; or the out_dir of a run of
                        train.py, or a .pt file of it or of nanoGPT. A folder's model_type is
                        gpt2, gpt_bigcode, gpt_neo or starcoder2 (plumbing/architectures.py)
        overrides       fields of GPTConfig to change: dropout; a smaller block_size, which
                        drops the last positions; use_swa and window_size, which keep every
                        weight; use_gqa and n_kv_head, which make each key/value head the mean
                        of those it replaces (GQA, section 2.1); use_rope, which drops wpe. A
                        model with a new switch needs further training
        raises          ValueError that names the field or the file, and what is wrong with it
        """
        # Imported here, so that model.py runs on its own.
        from plumbing.conversion import adapt, copy_tensors
        from plumbing.huggingface import load_pretrained

        fields, tensors, tokenizer_spec, path = load_pretrained(name_or_folder)
        for name in (*fields, *overrides):
            is_field = name in GPTConfig.__dataclass_fields__
            require(is_field, f"{path}: {name} is not a field of GPTConfig")
        try:
            theirs = GPTConfig(**fields)
        except (TypeError, ValueError) as e:
            raise ValueError(f"{path}: {e}") from None
        model = cls(replace(theirs, **overrides))
        model.tokenizer_spec = tokenizer_spec
        copy_tensors(model, adapt(tensors, theirs, model.config, path), path)
        return model.eval()

    def save_pretrained(self, folder):
        """
        Write a folder that transformers opens: config.json, weights in float32, and the
        tokenizer if tokenizer_spec tells it. The model_type is the one of the four that has
        the switches of this model; missing biases are written as zeros. Raises ValueError for
        a combination of switches that none of them has.
        """
        from plumbing.huggingface import save_pretrained
        save_pretrained(folder, asdict(self.config), dict(self.named_parameters()),
                        self.tokenizer_spec)


# ----------------------------------------------------------------------------------------------
# Details: the cost of attention, and checks

def keys_per_query(T, W):
    """
    The cost of attention: how many keys are multiplied with one query, on average over a sequence
    of T tokens. Full attention: T, half of them masked. In blocks: W in the first block, 2W in
    the ones after it, and W + r in a last block of r < W tokens. (Flash attention skips some.)
    """
    if not 0 < W < T:
        return T
    n, r = divmod(T, W)
    return (W * W + (n - 1) * W * 2 * W + r * (W + r)) / T


def require(condition, message):
    if not condition:
        raise ValueError(message)


def is_count(value):
    return isinstance(value, int) and 1 <= value < 2**31


def check_config(c):
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        value = getattr(c, name)
        require(is_count(value), f"{name}={value!r} must be a positive integer below 2**31")
    require(c.n_embd % c.n_head == 0, f"n_embd={c.n_embd} must be divisible by n_head={c.n_head}")
    require(0 <= c.dropout < 1, f"dropout={c.dropout} must be from 0 to less than 1")

    require(0 < c.rope_theta < 1e30, f"rope_theta={c.rope_theta} must be positive, below 1e30")
    require(c.use_rope or c.rope_theta == GPTConfig.rope_theta,
            f"rope_theta={c.rope_theta} only applies when use_rope=True")
    D = c.n_embd // c.n_head
    require(not c.use_rope or D % 2 == 0,
            f"n_embd={c.n_embd}, n_head={c.n_head}: a head of {D} channels is odd, and RoPE "
            f"rotates pairs of channels")

    require(c.use_gqa == (c.n_kv_head is not None),
            f"use_gqa={c.use_gqa} with n_kv_head={c.n_kv_head}: set both or neither")
    if c.use_gqa:
        divides = is_count(c.n_kv_head) and c.n_head % c.n_kv_head == 0
        require(divides, f"n_kv_head={c.n_kv_head!r} must be a positive integer that divides "
                         f"n_head={c.n_head}")

    require(c.use_swa == (c.window_size is not None),
            f"use_swa={c.use_swa} with window_size={c.window_size}: set both or neither")
    are_windows = all(W == 0 or is_count(W) for W in c.windows)
    require(are_windows and len(c.windows) == c.n_layer,
            f"window_size={c.window_size!r} with n_layer={c.n_layer}: must be an integer, or one "
            f"per layer; 0 = full attention")


def check_sampling(temperature, top_k, top_p):
    in_range = temperature == 0 or temperature >= 1e-40   # less would be 0 in float32
    require(in_range, f"temperature={temperature} must be 0 (greedy) or at least 1e-40")
    require(top_k is None or top_k >= 1, f"top_k={top_k} must be at least 1, or None to keep all")
    in_range = top_p is None or 1e-40 <= top_p <= 1
    require(in_range, f"top_p={top_p} must be greater than 0 (at least 1e-40) and at most 1")
