#!/usr/bin/env python3
"""The DRT once more, in plain numpy and double precision: forward, hand-written backward, ten AdamW steps.
It writes fixtures (safetensors) for `train_gca verify FILE`, and checks existing ones with --check. It shares no code with the
trainer, so an agreement means that two readings of the model meet. Forward stands beside backward: every op returns its result
and a function `back` that takes the gradient of the result, ADDS to the gradients of its weights, and returns that of its input."""
import argparse
import json
import os
import struct
import sys
import types

try:
  import numpy as np
except ImportError:
  sys.exit("make_oracle.py needs numpy: apt-get install python3-numpy")

EPS, ENCODER_EPS = 1e-5, 1e-6  # the second in the encoder's own norms, the first in all others
NO_TARGET = -100
STEPS, LR, BETA1, BETA2, ADAM_EPS, DECAY, CLIP = 10, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
ADAMW_IN_WORDS = "lr=1e-3 betas=0.9,0.95 eps=1e-8 weight_decay=0.1 on matrices, 0 on vectors; global gradient norm clipped to 1.0"
TOLERANCE = 1e-10    # --check: largest difference over the tensor's largest entry
SMALLEST_GAP = 1e-5  # two ranked scores nearer than this could swap in another precision: such a fixture is refused

class OracleError(Exception):
  pass

# ---- the model's numbers ------------------------------------------------------------------------------------------------
SIZES = dict(  # name: (default, least, meaning); with groups and null_slot all that defines a model and its batch
  vocab=(53, 2, "ids; the last one is the landmark"), width=(24, 2, "D"), heads=(2, 1, "H"), ffn=(40, 1, "F"),
  lower=(1, 0, "layers below the retrieval"), encoder=(1, 0, "chunk encoder layers (0 without groups)"),
  chunk=(8, 2, "S, slots a chunk, its landmark included"), topk=(2, 1, "K, chunks fetched"), window=(12, 0, "W, slots looked back"),
  batch=(2, 1, "rows"), chunks=(6, 1, "C, chunks a row"))

def make_config(groups=(1,), null_slot=1, **sizes):
  """groups: upper layers in each retrieval group, () is the sliding-window baseline."""
  defaults = {name: default for name, (default, _, _) in SIZES.items()}
  config = types.SimpleNamespace(groups=groups, null_slot=null_slot, **defaults | sizes)
  for name, (_, least, _) in SIZES.items():
    if not least <= getattr(config, name) <= 1 << 20:
      raise OracleError(f"{name} is {getattr(config, name)}; expected {least} to {1 << 20}")
  config.landmark_id, config.slots = config.vocab - 1, config.chunk * config.chunks
  config.encoder = config.encoder if groups else 0  # nothing would read it
  if min(groups, default=1) < 1 or sum(groups) + config.lower + config.encoder > 1000:
    raise OracleError(f"groups are {groups}; expected at least one layer in each, and 1000 layers at most in the whole model")
  if config.width % (2 * config.heads):
    raise OracleError(f"width {config.width} over {config.heads} heads is no even head size (rotary pairs): change width or heads")
  if config.batch * config.slots * max(config.vocab, config.heads * config.slots) > 1 << 28:
    raise OracleError(f"{config.batch} rows of {config.slots} slots are too many for whole attention matrices: fewer rows or chunks")
  return config

def to_metadata(config):
  metadata = {name: str(getattr(config, name)) for name in (*SIZES, "null_slot", "landmark_id")}
  return metadata | dict(groups=",".join(map(str, config.groups)), eps=str(EPS), adamw=ADAMW_IN_WORDS)

def from_metadata(metadata):
  try:
    sizes = {name: int(metadata[name]) for name in (*SIZES, "null_slot")}
    config = make_config(parse_groups(metadata["groups"]), **sizes)
    landmark, eps = int(metadata["landmark_id"]), float(metadata["eps"])
  except (KeyError, ValueError, TypeError, AttributeError) as bad:
    raise OracleError(f"__metadata__ is not that of a DRT fixture ({type(bad).__name__}: {bad})") from None
  if (landmark, eps) != (config.landmark_id, EPS):
    raise OracleError(f"landmark_id and eps are {landmark} and {eps}; expected {config.landmark_id} and {EPS}")
  return config

def parse_groups(text):
  return tuple(int(layers) for layers in text.split(",") if layers)

def parameter_shapes(config):
  """name -> shape, in the order of the flat buffer; matrices are (out, in)."""
  D, F, shapes = config.width, config.ffn, {}
  def layer(prefix, upper=False):
    shapes[prefix + "input_layernorm.weight"] = (D,)
    for name in "qkvo":
      shapes[f"{prefix}self_attn.{name}_proj.weight"] = (D, D)
    if upper:
      shapes[prefix + "gca.pre_norm.weight"] = (D,)
      shapes[prefix + "gca.q_proj.weight"] = shapes[prefix + "gca.o_proj.weight"] = (D, D)
    shapes[prefix + "post_attention_layernorm.weight"] = (D,)
    shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (F, D)
    shapes[prefix + "mlp.down_proj.weight"] = (D, F)
  shapes["model.embed_tokens.weight"] = (config.vocab, D)
  for i in range(config.lower):
    layer(f"model.lower_layers.{i}.")
  if config.groups:
    shapes["model.enc_prenorm.weight"] = (D,)
    for i in range(config.encoder):
      layer(f"model.encoder.layers.{i}.")
    shapes["model.encoder.norm.weight"] = (D,)
    shapes["model.chunk_k_proj.weight"] = shapes["model.chunk_v_proj.weight"] = (D, D)
  for g, layers in enumerate(config.groups):
    shapes[f"model.lmk_norms.{g}.weight"] = (D,)
    for i in range(layers):
      layer(f"model.upper_layers.{g}.{i}.", upper=True)
  shapes["model.norm.weight"] = (D,)
  return shapes

# ---- ops without weights ------------------------------------------------------------------------------------------------
def softmax(logits):
  """Over the last axis; a row of nothing but -inf is all 0 (no past chunk: weights 0)."""
  top = logits.max(-1, keepdims=True)
  e = np.exp(logits - np.where(np.isfinite(top), top, 0))
  total = e.sum(-1, keepdims=True)
  return e / np.where(total > 0, total, 1)

def softmax_back(p, dp):
  return p * (dp - (p * dp).sum(-1, keepdims=True))

def split_heads(x, heads):  # (..., n, D) -> (..., H, n, d)
  return np.swapaxes(x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads), -2, -3)

def merge_heads(x):  # (..., H, n, d) -> (..., n, D)
  x = np.swapaxes(x, -2, -3)
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

def attend(q, k, v, bias):
  """softmax(q k^T / sqrt(d) + bias) v on (..., H, n, d); bias broadcasts, -inf hides a key. back(do) -> dq, dk, dv."""
  scale = 1 / np.sqrt(q.shape[-1])
  p = softmax(q @ np.swapaxes(k, -1, -2) * scale + bias)
  def back(do):
    ds = softmax_back(p, do @ np.swapaxes(v, -1, -2)) * scale
    return ds @ k, np.swapaxes(ds, -1, -2) @ q, np.swapaxes(p, -1, -2) @ do
  return p @ v, back

def rotate(u, direction):
  """Rotary embedding of (..., S, d): columns (t, t + d/2) turn by direction * p * 10000^(-2t/d); direction -1 is the backward."""
  positions, half = np.arange(u.shape[-2]), u.shape[-1] // 2
  angle = direction * positions[:, None] * 10000.0 ** (-2.0 * np.arange(half) / u.shape[-1])
  a, b = u[..., :half], u[..., half:]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

def window_bias(config):
  """(H,T,T): ALiBi inside the window 0 <= i-j <= W, -inf outside."""
  distance = np.arange(config.slots)[:, None] - np.arange(config.slots)
  slope = 2.0 ** (-8.0 * (np.arange(config.heads) + 1) / config.heads)
  return np.where((distance >= 0) & (distance <= config.window), -slope[:, None, None] * distance, -np.inf)

def cross_entropy(logits, targets):
  """Mean over the slots that have a target -> loss, dlogits."""
  row, slot = np.nonzero(targets != NO_TARGET)
  p = softmax(logits)
  top = logits.max(-1)
  log_total = top + np.log(np.exp(logits - top[..., None]).sum(-1))
  loss = np.mean(log_total[row, slot] - logits[row, slot, targets[row, slot]])
  dlogits = np.zeros_like(p)
  dlogits[row, slot] = p[row, slot]
  dlogits[row, slot, targets[row, slot]] -= 1
  return loss, dlogits / len(row)

# ---- one pass: B rows, T = C*S slots ------------------------------------------------------------------------------------
class Pass:
  """noise: a (B,C,C) array a group, or None (evaluation). picks: indices to use instead of the K largest, a (B,C,K) array a group.
  After construction: logits (B,T,V), tensors (stage.*, group*.*), picks, gap (smallest difference between ranked scores).
  backward(dlogits) is called once and gives {name: gradient}."""

  def __init__(self, config, param, tokens, noise=None, picks=None):
    self.config, self.param = config, param
    self.grad = {name: np.zeros_like(value) for name, value in param.items()}
    self.tensors, self.picks, self.gap, self.tokens = {}, [], np.inf, tokens
    swa, E = window_bias(config), "model.embed_tokens.weight"
    self.lower_backs, self.group_backs = [], []
    x = param[E][tokens]
    for i in range(config.lower):
      x, back = self.layer(f"model.lower_layers.{i}.", x, EPS, swa)
      self.lower_backs.append(back)
    self.tensors["stage.lower_out"] = x
    if config.groups:
      self.chunk_memory(x)
    for g, layers in enumerate(config.groups):
      x, back = self.group(g, layers, x, swa, noise and noise[g], picks and picks[g])
      self.group_backs.append(back)
      self.tensors[f"stage.group{g}_out"] = x
    n, self.norm_back = self.norm("model.norm", x, EPS)
    self.logits, self.head_back = self.linear("model.embed_tokens", n)

  def backward(self, dlogits):
    dx = self.norm_back(self.head_back(dlogits))
    for back in reversed(self.group_backs):
      dx = back(dx)
    if self.config.groups:
      dx = dx + self.memory_back()  # after every group has added to dL, dCK, dCV
    for back in reversed(self.lower_backs):
      dx = back(dx)
    np.add.at(self.grad["model.embed_tokens.weight"], self.tokens, dx)
    return self.grad

  def linear(self, name, x):
    """y = x W^T"""
    w, name = self.param[name + ".weight"], name + ".weight"
    def back(dy):
      self.grad[name] += dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
      return dy @ w
    return x @ w.T, back

  def norm(self, name, x, eps):
    """gain * x / sqrt(mean(x^2) + eps)"""
    gain, name = self.param[name + ".weight"], name + ".weight"
    inverse = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    unit = x * inverse
    def back(dy):
      self.grad[name] += (dy * unit).reshape(-1, len(gain)).sum(0)
      dunit = dy * gain
      return inverse * (dunit - unit * np.mean(dunit * unit, -1, keepdims=True))
    return gain * unit, back

  def mlp(self, prefix, z):
    """Wdown( silu(Wgate z) * (Wup z) )"""
    gate, gate_back = self.linear(prefix + "mlp.gate_proj", z)
    up, up_back = self.linear(prefix + "mlp.up_proj", z)
    sigmoid = 1 / (1 + np.exp(-gate))
    y, down_back = self.linear(prefix + "mlp.down_proj", gate * sigmoid * up)
    def back(dy):
      dh = down_back(dy)
      dsilu = sigmoid * (1 + gate * (1 - sigmoid))
      return gate_back(dh * up * dsilu) + up_back(dh * gate * sigmoid)
    return y, back

  def self_attention(self, prefix, n, bias, rotary):
    """Wo Attention(Wq n, Wk n, Wv n) over the second last axis: the row's T slots, or the S slots of a chunk."""
    (q, q_back), (k, k_back), (v, v_back) = (self.linear(f"{prefix}self_attn.{name}_proj", n) for name in "qkv")
    q, k, v = (split_heads(u, self.config.heads) for u in (q, k, v))
    if rotary:
      q, k = rotate(q, 1), rotate(k, 1)
    o, attend_back = attend(q, k, v, bias)
    y, o_back = self.linear(prefix + "self_attn.o_proj", merge_heads(o))
    def back(dy):
      dq, dk, dv = attend_back(split_heads(o_back(dy), self.config.heads))
      if rotary:
        dq, dk = rotate(dq, -1), rotate(dk, -1)
      return q_back(merge_heads(dq)) + k_back(merge_heads(dk)) + v_back(merge_heads(dv))
    return y, back

  def layer(self, prefix, x, eps, bias, rotary=False, retrieval=None):
    """a = x + SelfAttention(Norm(x));  x = a + MLP(Norm(a)), or with a retrieval x = a + MLP(Norm(a + Wo' o)): what was fetched
    enters through the MLP's input only."""
    n, input_norm_back = self.norm(prefix + "input_layernorm", x, eps)
    y, attention_back = self.self_attention(prefix, n, bias, rotary)
    a = x + y
    f, fetch_back = self.fetch(prefix, a, retrieval) if retrieval else (0, lambda df: 0)
    z, post_norm_back = self.norm(prefix + "post_attention_layernorm", a + f, eps)
    y, mlp_back = self.mlp(prefix, z)
    def back(dx):
      dsum = post_norm_back(mlp_back(dx))  # of a + f
      da = dx + dsum + fetch_back(dsum)
      return da + input_norm_back(attention_back(da))
    return a + y, back

  def chunk_memory(self, x):
    """The chunk encoder, then L (B,C,D) and CK, CV (B,C,H,S,d), shared by all groups and upper layers, and their gradients."""
    config, backs = self.config, []
    h, prenorm_back = self.norm("model.enc_prenorm", x, EPS)
    h = h.reshape(config.batch, config.chunks, config.chunk, config.width)
    for i in range(config.encoder):
      h, back = self.layer(f"model.encoder.layers.{i}.", h, ENCODER_EPS, 0.0, rotary=True)
      backs.append(back)
    h, norm_back = self.norm("model.encoder.norm", h, ENCODER_EPS)
    self.tensors["stage.encoder_out"] = h
    is_key = (np.arange(config.chunk) < config.chunk - 1)[:, None]  # the landmark's row of CK and CV is zero
    ck, ck_back = self.linear("model.chunk_k_proj", h)
    cv, cv_back = self.linear("model.chunk_v_proj", h)
    self.L, self.CK, self.CV = h[:, :, -1], split_heads(ck * is_key, config.heads), split_heads(cv * is_key, config.heads)
    self.dL, self.dCK, self.dCV = (np.zeros_like(u) for u in (self.L, self.CK, self.CV))
    def memory_back():
      dh = ck_back(merge_heads(self.dCK) * is_key) + cv_back(merge_heads(self.dCV) * is_key)
      dh[:, :, -1] += self.dL
      dh = norm_back(dh)
      for back in reversed(backs):
        dh = back(dh)
      return prenorm_back(dh.reshape(x.shape))
    self.memory_back = memory_back

  def group(self, g, layers, x, swa, noise, picks):
    retrieval, retrieve_back = self.retrieve(g, x, noise, picks)
    backs = []
    for i in range(layers):
      x, back = self.layer(f"model.upper_layers.{g}.{i}.", x, EPS, swa, retrieval=retrieval)
      backs.append(back)
    def back(dx):
      for layer_back in reversed(backs):
        dx = layer_back(dx)
      return dx + retrieve_back()  # after every layer has added to dw
    return x, back

  def retrieve(self, g, x, noise, picks):
    """-> {pick (B,C,K), w (B,C,K), dw}. Indices are constants: the gradient flows through w to the raw scores only."""
    C, S, scale = self.config.chunks, self.config.chunk, 1 / np.sqrt(self.config.width)
    r, norm_back = self.norm(f"model.lmk_norms.{g}", x[:, S - 1::S], EPS)
    past = np.arange(C) < np.arange(C)[:, None]  # [fetching, fetched]: strictly past
    score = np.where(past, r @ np.swapaxes(self.L, 1, 2) * scale, -np.inf)
    ranked = score if noise is None else score + noise
    order = np.argsort(-ranked, -1, kind="stable")[..., :self.config.topk]  # stable: of equal scores the lower index first
    gaps = np.diff(np.sort(np.where(past, -ranked, np.nan), -1)[..., :self.config.topk + 1])  # NaN (no past chunk) sorts last
    self.gap = min(self.gap, gaps[~np.isnan(gaps)].min(initial=np.inf))
    pick = order if picks is None else picks
    w = softmax(np.take_along_axis(score, pick, -1))
    self.picks.append(pick)
    self.tensors |= {f"group{g}.topk_index": pick.astype(np.int32), f"group{g}.topk_weight": w}
    retrieval = dict(pick=pick, w=w, dw=np.zeros_like(w))
    def back():
      dscore = np.zeros_like(score)
      np.put_along_axis(dscore, pick, softmax_back(w, retrieval["dw"]) * scale, -1)
      self.dL += np.swapaxes(dscore, 1, 2) @ r
      dx = np.zeros_like(x)
      dx[:, S - 1::S] = norm_back(dscore @ self.L)
      return dx
    return retrieval, back

  def fetch(self, prefix, a, retrieval):
    """Wo' o, o[slot in chunk c+1] = sum_k w[c,k] Attend(q, CK[pick[c,k]], CV[pick[c,k]]), q = Wq' Norm(a); chunk 0 gets zero."""
    config, dw = self.config, retrieval["dw"]
    n, norm_back = self.norm(prefix + "gca.pre_norm", a, EPS)
    q, q_back = self.linear(prefix + "gca.q_proj", n)
    by_chunk = (config.batch, config.chunks, config.chunk, config.width)
    q = split_heads(q.reshape(by_chunk)[:, 1:], config.heads)  # (B,C-1,H,S,d)
    pick, w = retrieval["pick"][:, :-1], retrieval["w"][:, :-1, :, None, None, None]
    fetched = (np.arange(config.batch)[:, None, None], pick)
    bias = np.zeros(config.chunk)
    if not config.null_slot:
      bias[-1] = -np.inf  # plain softmax; otherwise the landmark's zero row stays: one logit 0 with value 0
    each, attend_back = attend(q[:, :, None], self.CK[fetched], self.CV[fetched], bias)  # (B,C-1,K,H,S,d)
    o = np.zeros(by_chunk)
    o[:, 1:] = merge_heads((w * each).sum(2))
    y, o_back = self.linear(prefix + "gca.o_proj", o.reshape(a.shape))
    def back(dy):
      do = split_heads(o_back(dy).reshape(by_chunk)[:, 1:], config.heads)[:, :, None]
      dw[:, :-1] += (do * each).sum((-1, -2, -3))
      dq, dk, dv = attend_back(w * do)
      for at in np.ndindex(pick.shape):  # (b,c,k); a chunk is fetched many times: sums over all
        self.dCK[at[0], pick[at]] += dk[at]
        self.dCV[at[0], pick[at]] += dv[at]
      dq_row = np.zeros(by_chunk)
      dq_row[:, 1:] = merge_heads(dq.sum(2))
      return norm_back(q_back(dq_row.reshape(a.shape)))
    return y, back

# ---- a fixture's results ------------------------------------------------------------------------------------------------
def loss_and_gradients(config, param, tokens, targets, noise, picks=None):
  """-> the pass, its loss, {name: gradient}, their common norm before clipping."""
  run = Pass(config, param, tokens, noise, picks)
  loss, dlogits = cross_entropy(run.logits, targets)
  grad = run.backward(dlogits)
  return run, loss, grad, np.sqrt(sum((value ** 2).sum() for value in grad.values()))

def train(config, param, tokens, targets, noise):
  """STEPS of AdamW on the one batch -> the loss before each, smallest gap."""
  param = {name: value.copy() for name, value in param.items()}
  m, v = ({name: np.zeros_like(value) for name, value in param.items()} for _ in range(2))
  losses, gap = [], np.inf
  for step in range(1, STEPS + 1):
    run, loss, grad, norm = loss_and_gradients(config, param, tokens, targets, noise)
    for name, w in param.items():
      g = grad[name] * min(1.0, CLIP / (norm + 1e-6))
      if w.ndim == 2:
        w *= 1 - LR * DECAY
      m[name] = BETA1 * m[name] + (1 - BETA1) * g
      v[name] = BETA2 * v[name] + (1 - BETA2) * g * g
      w -= LR * (m[name] / (1 - BETA1 ** step)) / (np.sqrt(v[name] / (1 - BETA2 ** step)) + ADAM_EPS)
    losses.append(loss)
    gap = min(gap, run.gap)
  return np.array(losses), gap

def results(config, param, tokens, targets, noise):
  """All that a fixture holds besides its inputs -> {name: array}, smallest gap between ranked scores of any pass."""
  run, loss, grad, norm = loss_and_gradients(config, param, tokens, targets, noise)
  evaluation = Pass(config, param, tokens)
  losses, gap = train(config, param, tokens, targets, noise)
  tensors = {"logits": run.logits, "loss": np.array([loss]), **run.tensors, "eval.logits": evaluation.logits,
             "train.grad_norm_first": np.array([norm]), "train.losses": losses}
  return tensors | {"grad." + name: value for name, value in grad.items()}, min(gap, evaluation.gap)

def draw_inputs(config, seed, last_target=True):
  """-> param (float32 numbers), tokens, targets, noise. RandomState: its stream is frozen, so a seed stays the same file."""
  random, param = np.random.RandomState(seed), {}
  for name, shape in parameter_shapes(config).items():  # wider than the initialisation, so that every path carries signal
    normal = random.standard_normal(shape)
    param[name] = (1 + 0.2 * normal if len(shape) == 1 else normal * 0.7 / np.sqrt(shape[1])).astype(np.float32)
  B, C, S = config.batch, config.chunks, config.chunk
  real = random.randint(0, config.landmark_id, (B, C * (S - 1) + 1))  # one more than the row shows: the last target
  tokens, targets = np.full((B, C, S), config.landmark_id, np.int32), np.full((B, C, S), NO_TARGET, np.int32)
  tokens[..., :-1] = real[:, :-1].reshape(B, C, S - 1)
  targets[..., :-1] = real[:, 1:].reshape(B, C, S - 1)
  if not last_target:
    targets[:, -1, S - 2] = NO_TARGET
  noise = [(-np.log(random.standard_exponential((B, C, C)))).astype(np.float32) for _ in config.groups]
  return param, tokens.reshape(B, C * S), targets.reshape(B, C * S), noise

def doubles(param):
  return {name: value.astype(np.float64) for name, value in param.items()}

def make(path, config, seed, last_target):
  param, tokens, targets, noise = draw_inputs(config, seed, last_target)
  tensors, gap = results(config, doubles(param), tokens, targets, noise)
  if gap < SMALLEST_GAP:
    raise OracleError(f"two ranked scores lie {gap:.1e} apart, so rounding could swap picks; choose another --seed")
  inputs = {"tokens": tokens, "targets": targets} | {f"group{g}.gumbel_noise": value for g, value in enumerate(noise)}
  size_bytes = write_safetensors(path, inputs | {"param." + name: value for name, value in param.items()} | tensors, to_metadata(config))
  print(f"{path}: {sum(value.size for value in param.values())} parameters, {size_bytes} bytes, loss {tensors['loss'][0]:.6f}, "
        f"smallest gap between ranked scores {gap:.1e}")

def check(path):
  """Recomputes a fixture from its inputs and compares every other tensor; prints the worst -> whether all are within TOLERANCE."""
  stored, metadata = read_safetensors(path)
  config = from_metadata(metadata)
  B, C, T = config.batch, config.chunks, config.slots
  def take(name, shape, kind):
    value = stored.pop(name, None)
    if value is None or value.shape != shape or value.dtype.kind != kind:
      found = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
      raise OracleError(f"tensor {name}: expected {dict(f='floats', i='integers')[kind]} {list(shape)}, found {found}")
    return value
  tokens, targets = take("tokens", (B, T), "i"), take("targets", (B, T), "i")
  real = targets[targets != NO_TARGET]
  if real.size == 0 or min(tokens.min(), real.min()) < 0 or max(tokens.max(), real.max()) >= config.vocab:
    raise OracleError(f"tokens or targets hold an id outside 0..{config.vocab - 1}, or no slot has a target")
  noise = [take(f"group{g}.gumbel_noise", (B, C, C), "f") for g in range(len(config.groups))]
  param = {name: take("param." + name, shape, "f") for name, shape in parameter_shapes(config).items()}
  computed, _ = results(config, doubles(param), tokens, targets, noise)
  errors = {}
  for name, value in computed.items():
    expected = take(name, value.shape, value.dtype.kind)
    difference = np.abs(expected - value.astype(np.float64))
    if name.endswith("topk_index"):
      difference *= computed[name.replace("index", "weight")] > 0  # where the weight is 0 the index is arbitrary
    errors[name] = np.nan_to_num(difference.max() / (np.abs(expected).max() or 1), nan=np.inf)
  if stored:
    raise OracleError(f"tensor {min(stored)} is unknown to this oracle")
  worst = max(errors, key=errors.get)
  print(f"{path}: {len(errors)} tensors, worst {errors[worst]:.1e} ({worst}){'' if errors[worst] <= TOLERANCE else ' FAIL'}", flush=True)
  return errors[worst] <= TOLERANCE

def finite_differences(config, seed):
  """Each parameter tensor along one random direction, picks held; error relative to the gradient's norm -> whether all pass."""
  param, *inputs = draw_inputs(config, seed)
  param, step, worst = doubles(param), 1e-5, 0.0
  run, _, grad, _ = loss_and_gradients(config, param, *inputs)
  random = np.random.RandomState(seed ^ 1)
  for name, value in param.items():
    direction = random.standard_normal(value.shape)
    after, before = (loss_and_gradients(config, param | {name: value + h * direction}, *inputs, run.picks)[1] for h in (step, -step))
    slope = (after - before) / (2 * step)
    error = abs(slope - (grad[name] * direction).sum()) / (np.sqrt((grad[name] ** 2).sum()) or 1)
    worst = max(worst, error)
    print(f"{name:60} slope {slope:+.9f}  error {error:.1e}")
  print(f"worst {worst:.1e}{'' if worst < 1e-6 else ' FAIL'}")
  return worst < 1e-6

# ---- safetensors --------------------------------------------------------------------------------------------------------
DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4"}

def write_safetensors(path, tensors, metadata):
  """Through a temporary name, so that a full disk leaves no half fixture -> bytes written."""
  header, blocks, offset = {"__metadata__": metadata}, [], 0
  for name, value in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # doubles first: all stay aligned
    dtype = {"f8": "F64", "f4": "F32", "i4": "I32"}[value.dtype.str[1:]]
    blocks.append(np.ascontiguousarray(value, DTYPES[dtype]).tobytes())
    header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, offset + len(blocks[-1])]}
    offset += len(blocks[-1])
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path + ".partial", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + b"".join(blocks))
  os.replace(path + ".partial", path)
  return 8 + len(text) + offset

def read_safetensors(path):
  """-> {name: array}, metadata. Refuses sizes and offsets that do not add up."""
  with open(path, "rb") as file:
    data = file.read()
  header_bytes = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
  if not 2 <= header_bytes <= len(data) - 8:
    raise OracleError(f"not a safetensors file, or cut short: {len(data)} bytes, header of {header_bytes}")
  tensors, end_before, data_bytes = {}, 0, len(data) - 8 - header_bytes
  try:
    header = json.loads(data[8:8 + header_bytes])
    metadata = header.pop("__metadata__", {})
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
      (begin, end), dtype, shape = info["data_offsets"], info["dtype"], info["shape"]
      if begin != end_before or not begin <= end <= data_bytes:
        raise OracleError(f"tensor {name} has bytes {begin}..{end} of {data_bytes}, expected from {end_before} on: cut short or damaged")
      tensors[name] = np.frombuffer(data[8 + header_bytes + begin:8 + header_bytes + end], DTYPES[dtype]).reshape(shape)
      end_before = end
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as bad:
    raise OracleError(f"the safetensors header cannot be read ({type(bad).__name__}: {bad}); types known: {', '.join(DTYPES)}") from None
  return tensors, metadata

# ---- command line -------------------------------------------------------------------------------------------------------
TEST_SET = dict(  # name=(last token has a target, model): small, and between them every corner that a backend can get wrong
  one_group=(True, dict(vocab=40, width=16, ffn=24)),
  two_groups=(True, dict(vocab=47, width=16, heads=4, ffn=24, groups=(1, 2), encoder=2, topk=3, window=10, batch=1, chunks=7)),
  baseline=(True, dict(vocab=41, lower=2, groups=(), window=100)),  # window larger than the row
  plain_softmax=(False, dict(vocab=37, width=16, lower=2, null_slot=0, window=3)),  # window smaller than a chunk
  all_past=(True, dict(vocab=31, width=30, heads=3, ffn=20, topk=9, chunks=5)),  # K above C, in two rows; head size 10
  chunk_of_five=(False, dict(vocab=29, width=12, heads=1, ffn=28, lower=0, groups=(2, 1), chunk=5, topk=4, window=7, chunks=9)),
  plain_groups=(True, dict(vocab=59, width=36, heads=3, groups=(1, 1), null_slot=0, topk=5, window=8, chunks=5)),  # W = S, K = C
  chunk_of_16=(True, dict(vocab=131, width=48, heads=4, ffn=80, lower=2, groups=(1, 2), encoder=2, chunk=16, topk=3, window=21, batch=1, chunks=9)),
  chunk_of_64=(True, dict(vocab=97, width=64, heads=1, ffn=96, chunk=64, topk=5, window=150, batch=1, chunks=8)))  # head size 64

def main():
  parser = argparse.ArgumentParser(description="Makes and checks fixtures for train_gca verify, in numpy and double precision.")
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--out", metavar="FILE", help="write one fixture of the model below")
  action.add_argument("--test-set", metavar="DIR", help="write the small set that make test uses")
  action.add_argument("--check", metavar="FILE", nargs="+", help="recompute fixtures and compare every tensor")
  action.add_argument("--finite-differences", action="store_true", help="test the gradients of the model below")
  for name, (default, _, meaning) in SIZES.items():
    parser.add_argument("--" + name, type=int, metavar="N", default=default, help=f"{meaning} (default {default})")
  parser.add_argument("--groups", type=parse_groups, metavar="N,N", default=(1,), help="layers of each retrieval group ('' for none)")
  parser.add_argument("--no-null-slot", action="store_true", help="plain softmax over a chunk's S-1 keys")
  parser.add_argument("--no-last-target", action="store_true", help="the token after the row is not known")
  parser.add_argument("--seed", type=int, metavar="N", default=1, help="of weights, tokens and noise (default 1)")
  args = parser.parse_args()
  if not 0 <= args.seed < 1 << 32:
    parser.error(f"--seed is {args.seed}; expected 0 to {(1 << 32) - 1}")
  path = args.out or ""
  try:
    if args.check:
      passed = True
      for path in args.check:
        passed &= check(path)
      return not passed
    if args.test_set:
      os.makedirs(args.test_set, exist_ok=True)
      for name, (last_target, model) in TEST_SET.items():
        path = os.path.join(args.test_set, f"drt_{name}.safetensors")
        make(path, make_config(**model), args.seed, last_target)
      return 0
    config = make_config(args.groups, int(not args.no_null_slot), **{name: getattr(args, name) for name in SIZES})
    if args.finite_differences:
      return not finite_differences(config, args.seed)
    make(path, config, args.seed, not args.no_last_target)
    return 0
  except (OracleError, OSError, MemoryError) as error:
    print("make_oracle.py:", f"{path}:" if path else "", error, file=sys.stderr)
    return 1

if __name__ == "__main__":
  sys.exit(main())
