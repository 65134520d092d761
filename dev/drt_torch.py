"""The DRT as one PyTorch module, written from the formulas: to read beside model.h, to load a checkpoint into, and what
bench_peer.py and peer_curve.py compare with. Needs torch alone.

    python3 dev/drt_torch.py FILE...   checks oracle files (dev/make_oracle.py) in float64 on CPU and GPU: loss, logits,
                                       picks, weights, gradients, ten steps of AdamW; exit 1 above 1e-9
    model = drt_torch.load(PATH)       a checkpoint's folder (RUN/step_00001000) or a .safetensors file

B rows, C chunks, S slots a chunk (its landmark last), T = C*S, N = B*C, D width, H heads, d = D/H, K chunks fetched."""
import json, math, os, struct, sys, types
import torch, torch.nn as nn, torch.nn.functional as F

def Config(**changes):  # groups: layers of each, () for the sliding-window baseline; eps: not the encoder's
    paper = dict(vocab=50304, width=768, heads=12, ffn=2048, lower=6, groups=(6,), encoder=2, chunk=64, topk=8,
                 window=512, null_slot=True, eps=1e-5)
    return types.SimpleNamespace(**paper | changes)

def wide(x):  # at least float32, for sums and exponentials
    return x.to(torch.promote_types(x.dtype, torch.float32))

def matrices(**shapes):  # name=(out, in)
    return nn.ModuleDict({name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in shapes.items()})

def joint(x, *layers):  # linear layers that read the same x, as one product
    return F.linear(x, torch.cat([l.weight for l in layers])).split([l.out_features for l in layers], -1)

def split_heads(x, H):  # (..,n,D) -> (..,H,n,d)
    return x.unflatten(-1, (H, -1)).transpose(-2, -3)

class Norm(nn.Module):
    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps
    def forward(self, x):
        y = wide(x)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)

class Layer(nn.Module):
    def __init__(self, c, eps, upper=False):
        super().__init__()
        D, self.H, self.gca = c.width, c.heads, None
        self.input_layernorm, self.post_attention_layernorm = Norm(D, eps), Norm(D, eps)
        self.self_attn = matrices(q_proj=(D, D), k_proj=(D, D), v_proj=(D, D), o_proj=(D, D))
        if upper:
            self.gca = matrices(q_proj=(D, D), o_proj=(D, D))
            self.gca.pre_norm = Norm(D, eps)
        self.mlp = matrices(gate_proj=(c.ffn, D), up_proj=(c.ffn, D), down_proj=(D, c.ffn))
    def forward(self, x, attend, fetched=()):  # x (B,n,D); attend: q, k, v (B,H,n,d) -> (B,H,n,d)
        of = self.self_attn
        q, k, v = (split_heads(y, self.H) for y in joint(self.input_layernorm(x), of.q_proj, of.k_proj, of.v_proj))
        a = x + of.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        m = a + self.fetched(a, *fetched) if self.gca else a
        gate, up = joint(self.post_attention_layernorm(m), self.mlp.gate_proj, self.mlp.up_proj)  # (B,n,F)
        return a + self.mlp.down_proj(F.silu(gate) * up)  # a, not m: what was fetched enters through the MLP alone
    def fetched(self, a, keys, values, w):  # sum_k w_k softmax(q CK_k^T / sqrt(d)) CV_k, a softmax a chunk and head
        (N, H, _, d), K = keys.shape, w.shape[1]  # a (B,T,D); what serves each chunk: keys, values (N,H,K*S,d), w (N,K)
        q = split_heads(self.gca.q_proj(self.gca.pre_norm(a)).view(N, -1, H * d), H)  # (N,H,S,d)
        logits = wide(q * d**-0.5 @ keys.mT).unflatten(-1, (K, -1))                   # (N,H,S,K,S)
        p = logits.softmax(-1) * w[:, None, None].expand(logits.shape[:-1])[..., None]
        return self.gca.o_proj((p.flatten(-2).to(values.dtype) @ values).transpose(1, 2).reshape(a.shape))

def attend_in_chunk(q, k, v):  # (N,H,S,d): all slots see each other; rotary embedding of the columns t and t + d/2
    (S, d), real = q.shape[-2:], dict(dtype=wide(q[:0]).dtype, device=q.device)
    angle = torch.arange(S, **real)[:, None] * 10000.0 ** (torch.arange(0, d, 2, **real) / -d)  # (S,d/2)
    def rotated(x):
        (a, b), cos, sin = wide(x).chunk(2, -1), angle.cos(), angle.sin()  # (N,H,S,d/2)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return F.scaled_dot_product_attention(rotated(q), rotated(k), v)

def window_attention(c, flex, T, dtype, device):  # slot i sees j, 0 <= i-j <= W: logit q.k/sqrt(d) - slope_h (i-j)
    W, slopes = c.window, 2.0 ** (-8.0 * torch.arange(1, c.heads + 1, dtype=torch.float64, device=device) / c.heads)
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j <= W), None, None, T, T, device=device)
        slopes = slopes.to(torch.promote_types(dtype, torch.float32))
        return lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s - slopes[h] * (i - j), mask)
    L = max(1, min(W, T))  # the row in n blocks of L queries, whose keys are their own and the block before
    i, j = torch.arange(-(-T // L) * L, device=device).view(-1, L, 1), torch.arange(2 * L, device=device) - L
    distance = i % L - j  # (n,L,2L)
    seen = (distance >= 0) & (distance <= W) & (distance <= i)
    bias = (-slopes[:, None, None, None] * distance).masked_fill(~seen, -math.inf).flatten(0, 1).to(dtype)
    blocks = lambda x, before: F.pad(x, (0, 0, before, -T % L)).unflatten(2, (-1, L))  # (B,H,T,d) -> (B,H,n,L,d)
    pairs = lambda x: torch.cat((x[:, :, :-1], x[:, :, 1:]), 3).flatten(1, 2)          # (B,H*n,2L,d)
    def attend(q, k, v):
        B, H, T, d = q.shape
        q, k, v = blocks(q, 0).flatten(1, 2), pairs(blocks(k, L)), pairs(blocks(v, L))
        return F.scaled_dot_product_attention(q, k, v, bias).reshape(B, H, -1, d)[:, :, :T]
    return attend

class DRT(nn.Module):  # impl "flex": compiled, FlexAttention for the window, CUDA; "dense": plain PyTorch, anywhere
    def __init__(self, config, impl="dense"):
        super().__init__()
        m, c, D, self.flex, self.attend, self.picks = nn.Module(), config, config.width, impl == "flex", {}, []
        m.embed_tokens = nn.Embedding(c.vocab, D)
        m.lower_layers = nn.ModuleList(Layer(c, c.eps) for _ in range(c.lower))
        if c.groups:
            m.enc_prenorm, m.encoder = Norm(D, c.eps), nn.Module()
            m.encoder.layers, m.encoder.norm = nn.ModuleList(Layer(c, 1e-6) for _ in range(c.encoder)), Norm(D, 1e-6)
            m.chunk_k_proj, m.chunk_v_proj = matrices(k=(D, D), v=(D, D)).values()
        m.lmk_norms = nn.ModuleList(Norm(D, c.eps) for _ in c.groups)
        m.upper_layers = nn.ModuleList(nn.ModuleList(Layer(c, c.eps, True) for _ in range(n)) for n in c.groups)
        m.norm, self.model, self.config = Norm(D, c.eps), m, c
        self.step = torch.compile(self.whole, dynamic=False) if self.flex else self.whole
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(matrix, std=0.02)
    def encode(self, x):  # (B,T,D) -> landmarks (B,C,D); CK, CV, (N*H,S*d) each, a row for each chunk and head
        m, c = self.model, self.config
        h = m.enc_prenorm(x).view(-1, c.chunk, c.width)  # (N,S,D)
        for layer in m.encoder.layers:
            h = layer(h, attend_in_chunk)
        h = m.encoder.norm(h)
        kv = joint(h[:, :-1], m.chunk_k_proj, m.chunk_v_proj)  # the landmark's row is zero (null slot) or left out
        kv = [split_heads(F.pad(y, (0, 0, 0, int(c.null_slot))), c.heads) for y in kv]
        return h[:, -1].view(len(x), -1, c.width), [y.reshape(len(h) * c.heads, -1) for y in kv]
    def retrieve(self, r, landmarks, noise):  # (B,C,D) -> picks, weights (B,C,K); no gradient passes through the choice
        with torch.autocast(r.device.type, enabled=False):
            score = wide(r) @ wide(landmarks).mT / math.sqrt(self.config.width)  # (B,C,C), the fetching chunk first
        past = torch.ones_like(score, dtype=torch.bool).tril(-1)
        score = score.masked_fill(~past, -1e30)
        ranked = torch.sort(score if noise is None else score + noise, dim=-1, descending=True, stable=True)
        pick = ranked.indices[..., : self.config.topk]  # of equals the first
        return pick, score.gather(-1, pick).softmax(-1) * past.gather(-1, pick)
    def fetch(self, pick, w, kv):  # what serves each chunk's slots: the picks of the chunk before it, none in chunk 0
        (B, C, K), H = pick.shape, self.config.heads
        pick, w = (F.pad(t[:, :-1], (0, 0, 1, 0)) for t in (pick, w))
        chunk = pick + torch.arange(B, device=pick.device)[:, None, None] * C
        rows = chunk.view(B * C, 1, K) * H + torch.arange(H, device=pick.device)[:, None]  # (N,H,K), of CK and CV
        return *(F.embedding(rows, m).view(B * C, H, -1, self.config.width // H) for m in kv), w.view(B * C, K)
    def whole(self, tokens, targets, noise, attend, dtype):
        m, S, x, picks = self.model, self.config.chunk, self.model.embed_tokens(tokens).to(dtype), []  # x (B,T,D)
        for layer in m.lower_layers:
            x = layer(x, attend)
        landmarks, kv = self.encode(x) if self.config.groups else (None, None)
        for g, layers in enumerate(m.upper_layers):
            pick, w = self.retrieve(m.lmk_norms[g](x[:, S - 1 :: S]), landmarks, noise[g] if noise else None)
            fetched = self.fetch(pick, w, kv)
            for layer in layers:
                x = layer(x, attend, fetched)
            picks.append((pick, w.detach()))
        logits = F.linear(m.norm(x), m.embed_tokens.weight)  # (B,T,V)
        return logits if targets is None else F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten()), picks
    def forward(self, tokens, targets=None, noise=None):
        """tokens, targets (B,T), -100: none; noise: a (B,C,C) a group -> the mean loss; without targets the logits.
        self.picks has each group's picks and weights. Under autocast the residual stream is of autocast's type."""
        kind, dtype = tokens.device.type, self.model.norm.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        key = self.flex, tokens.shape[1], dtype, tokens.device
        if key not in self.attend:
            self.attend = {key: window_attention(self.config, *key)}
        result, self.picks = self.step(tokens, targets, noise, self.attend[key], dtype)
        return result

def read(path):  # safetensors -> {name: tensor}, metadata
    dtypes = dict(F64=torch.float64, F32=torch.float32, BF16=torch.bfloat16, I32=torch.int32)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data, metadata = bytearray(file.read()), header.pop("__metadata__", {})
    bits = lambda t: dict(dtype=dtypes[t["dtype"]], count=math.prod(t["shape"]), offset=t["data_offsets"][0])
    return {name: torch.frombuffer(data, **bits(t)).view(t["shape"]) for name, t in header.items()}, metadata

def load(path, impl="dense", **sizes):  # which others are read in state.json or an oracle file, or are the paper's
    tensors, said = read(path if os.path.isfile(path) else os.path.join(path, "model.safetensors"))
    if os.path.isdir(path):
        said = json.load(open(os.path.join(path, "state.json")))["settings"]
        said["null_slot"] = said["null-slot"]
    reads = dict(groups=lambda t: [int(n) for n in t.split(",") if n], eps=float, null_slot=lambda t: t in ("1", "on"))
    weights = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith(("model.", "param."))}
    sizes = {n: reads.get(n, int)(said[n]) for n in vars(Config()) if n in said} | sizes
    model = DRT(Config(**sizes | {"vocab": len(weights["model.embed_tokens.weight"])}), impl)
    model.load_state_dict(weights)
    return model

def check(path, device):
    model, stored = load(path).to(device, torch.float64), {n: t.to(device) for n, t in read(path)[0].items()}
    distance = lambda n: ((found[n] - stored[n]).abs().max() / stored[n].abs().max().clamp(1e-300)).nan_to_num(math.inf)
    groups, params = range(len(model.config.groups)), dict(model.named_parameters())
    batch = stored["tokens"], stored["targets"].long(), [stored[f"group{g}.gumbel_noise"] for g in groups]
    kinds = [dict(params=[p for p in params.values() if p.dim() == n], weight_decay=0.1 * (n - 1)) for n in (1, 2)]
    optimizer, losses = torch.optim.AdamW(kinds, lr=1e-3, betas=(0.9, 0.95)), []
    found = {"eval.logits": model(batch[0]), "logits": model(batch[0], None, batch[2])}
    for step in range(10):
        losses.append(model(*batch))
        losses[-1].backward()
        if step == 0:
            found |= {"loss": losses[0][None]} | {"grad." + n: p.grad.clone() for n, p in params.items()}
            for g in groups:
                name, (pick, w) = f"group{g}.topk_", model.picks[g]  # where the weight is 0 the index is arbitrary
                found |= {name + "weight": w, name + "index": pick.where(w > 0, stored[name + "index"])}
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        found.setdefault("train.grad_norm_first", norm[None])
        optimizer.step()
        optimizer.zero_grad()
    found["train.losses"] = torch.stack(losses)
    worst, name = max((distance(n).item(), n) for n in found)
    print(f"{path}: {device}, {len(found)} tensors, worst {worst:.1e} ({name}){'' if worst <= 1e-9 else ' FAIL'}")
    return worst <= 1e-9

if __name__ == "__main__":
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    good = [check(path, device) for path in sys.argv[1:] for device in devices]
    sys.exit(not all(good) if good else __doc__)
