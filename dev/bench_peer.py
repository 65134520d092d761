"""Training speed of a PyTorch DRT on this machine's CPU, at the shapes of dev/bench.cu, for `make bench`.
Usage: bench_peer.py FOLDER [THREADS]     FOLDER holds peer_drt.py; needs torch (pip install torch)."""
import os, sys, time

sys.path.insert(0, sys.argv[1])
try:
    import torch
except ImportError:
    sys.exit("bench_peer.py needs torch: pip install torch")
from peer_drt import DRT, Config

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count())
B, T = 4, 640
for width, ffn in ((64, 176), (256, 688)):
    config = Config(vocab=263, width=width, heads=4, ffn=ffn, lower=3, groups=(3,), encoder=1, chunk=64, topk=8, window=128, impl="dense")
    model, chunks = DRT(config), T // config.chunk
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    ids, targets = torch.randint(0, 263, (B, T)), torch.randint(0, 263, (B, T))
    times = []
    for step in range(12):
        start = time.perf_counter()
        noise = [-torch.empty(B, chunks, chunks).exponential_().log() for _ in config.groups]
        model(ids, targets, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    times.sort()
    median = times[len(times) // 2]
    print(f"width {width:4}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, B={B} T={T}: {median * 1e3:7.1f} ms a step "
          f"({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f}), {B * T / median:7.0f} slots/s")
