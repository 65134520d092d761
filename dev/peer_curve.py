"""The losses of a training run of ours against PyTorch's (dev/drt_torch.py): same initial weights, same rows, same optimiser, no noise.

    train_gca train FLAGS --noise off --steps 1 --lr 0 --lr-final 0 --weight-decay 0 --out INIT      # the initial weights
    train_gca train FLAGS --noise off --steps 500 --save-every 500 --out RUN
    peer_curve.py INIT/step_00000001 RUN/step_00000500... [--device cuda]

Several runs may differ in steps and rates; PyTorch takes their precision. Prints both losses at every tenth step and the largest difference; exit 1
where one is over 1%. Needs torch and numpy."""
import argparse, glob, json, math, os, sys, time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("init")
parser.add_argument("runs", nargs="+")
parser.add_argument("--device", default="cpu")
arguments = parser.parse_args()
try:
    import numpy as np, torch
except ImportError:
    sys.exit("peer_curve.py needs numpy and torch: pip install numpy torch")
import drt_torch

settings = [json.load(open(run + "/state.json"))["settings"] for run in arguments.runs]
for other in settings:
    unlike = {n for n in other if other[n] != settings[0][n]} - {"out", "steps", "lr", "lr-final", "warmup", "save-every"}
    if unlike:
        sys.exit(f"{' '.join(arguments.runs)}: expected runs that differ in steps and rates alone, found {', '.join(sorted(unlike))}")
s = settings[0]
number = lambda name: float(s[name]) if "." in s[name] or "e" in s[name] else int(s[name])
B, C, S, seed = (number(n) for n in ("batch", "chunks", "chunk", "seed"))
if s["noise"] != "off" or s["no-cross"] != "off":
    sys.exit(f"{arguments.runs[0]}: expected a run with --noise off and rows that cross documents, found noise {s['noise']}, no-cross {s['no-cross']}")


# ---- rows: dataloader.h in Python ----
M = 0xFFFFFFFF
def philox(key, stream, c0, c1, c2, c3):
    k0, k1 = key & M, ((key >> 32) + stream * 0x632BE5AB) & M
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & M, (a >> 32) ^ c3 ^ k1, a & M
        k0, k1 = (k0 + 0x9E3779B9) & M, (k1 + 0xBB67AE85) & M
    return c0

def permuted(index, count, epoch):
    half = ((count - 1).bit_length() + 1) // 2
    mask, place = (1 << half) - 1, index
    while True:
        left, right = place >> half, place & mask
        for r in range(8):
            left, right = right, left ^ (philox(seed, 2, right & M, r, epoch & M, epoch >> 32) & mask)
        place = left << half | right
        if place < count:
            return place

shards = sorted(glob.glob(s["data"]))
stream = np.concatenate([np.fromfile(f, "<u2", offset=1024) for f in shards]).astype(np.int64)
step_tokens = C * (S - 1)
count = (len(stream) - 1) // step_tokens
cuda = arguments.device == "cuda"
model = drt_torch.load(arguments.init, "flex" if cuda else "dense").to(arguments.device)
weights = {name: t.clone() for name, t in model.state_dict().items()}
V = weights["model.embed_tokens.weight"].shape[0]
landmark = V - 1 if V == 50265 else V - 6  # GPT-2's vocabulary in the paper's order; else end-of-text, landmark and five more after the tokens

def row(index):
    first = permuted(index % count, count, index // count) * step_tokens
    window = stream[first : first + step_tokens + 1]
    tokens, targets = np.full((C, S), landmark), np.full((C, S), -100)
    tokens[:, :-1], targets[:, :-1] = window[:-1].reshape(C, S - 1), window[1:].reshape(C, S - 1)
    return tokens.reshape(-1), targets.reshape(-1)


# ---- PyTorch's training ----
worst = 0.0
for run, s in zip(arguments.runs, settings):
    ours = {line["step"]: line["loss"] for line in map(json.loads, open(os.path.dirname(run.rstrip("/")) + "/log.jsonl")) if "loss" in line}
    model.load_state_dict(weights)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": number("weight-decay")}, {"params": gains, "weight_decay": 0.0}],
                                  betas=(number("beta1"), number("beta2")), eps=1e-8, fused=cuda)
    lr, lr_final, warmup, steps = number("lr"), number("lr-final"), number("warmup"), number("steps")
    warmup = warmup if warmup >= 0 else steps // 50
    began, losses = time.time(), []
    for step in range(steps):
        rate = lr_final + 0.5 * (lr - lr_final) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = lr * (step + 1) / warmup if step < warmup else rate
        tokens, targets = (torch.from_numpy(np.stack(x)).to(arguments.device) for x in zip(*(row(step * B + b) for b in range(B))))
        with torch.autocast(arguments.device, torch.bfloat16, enabled=s["precision"] == "bf16"):
            loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), number("clip"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())  # read late: the GPU need not wait
        if step == 4:
            losses[-1].item()
            began = time.time()
    largest = 0.0
    for step in range(10, steps + 1, 10):
        theirs = losses[step - 1].item()
        difference = ours[step] / theirs - 1
        largest = max(largest, abs(difference))
        print(f"step {step:5}  ours {ours[step]:.4f}  PyTorch {theirs:.4f}  {100 * difference:+.2f}%")
    print(f"{run}: lr {lr:g}, warm-up {warmup}: largest difference {100 * largest:.2f}%; "
          f"PyTorch {torch.__version__}, {(time.time() - began) / max(1, steps - 5) * 1e3:.1f} ms a step after the first five", flush=True)
    worst = max(worst, largest)
sys.exit(worst > 0.01)
