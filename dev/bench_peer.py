"""Training speed of the DRT in PyTorch (dev/drt_torch.py) on this machine, the steps that README compares with: on the
CPU at the shapes of dev/bench.cu; on a GPU, where there is one, the paper's model in bf16, compiled, B=2 of 260 chunks.
Usage: bench_peer.py [THREADS]     of the CPU; needs torch (pip install torch). `make bench` runs it.
       torchrun --nproc-per-node 2 dev/bench_peer.py     the GPU's step on each of two, alone at the same time and in DDP"""
import os, sys, time

try:
    import torch
except ImportError:
    sys.exit("bench_peer.py needs torch: pip install torch")
from drt_torch import DRT, Config


def train_step(model, B, chunks, wrap=lambda model: model):
    """A step with Gumbel noise, clipping and AdamW, as a function; slots a step; parameters. wrap: what calls the model."""
    config, device = model.config, model.model.norm.weight.device
    cuda = device.type == "cuda"
    called = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=cuda)
    ids, targets = (torch.randint(0, config.vocab, (B, chunks * config.chunk), device=device) for _ in range(2))

    def step():
        noise = [-torch.empty(B, chunks, chunks, device=device).exponential_().log() for _ in config.groups]
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = called(ids, targets, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, ids.numel(), sum(p.numel() for p in model.parameters())


def on_cpu():
    B, chunks = 4, 10
    for width, ffn in ((64, 176), (256, 688)):
        model = DRT(Config(vocab=263, width=width, heads=4, ffn=ffn, lower=3, groups=(3,), encoder=1, window=128))
        step, slots, parameters = train_step(model, B, chunks)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        times.sort()
        median = times[len(times) // 2]
        print(f"width {width:4}, {parameters / 1e6:.1f}M, PyTorch {torch.__version__}, "
              f"{torch.get_num_threads()} threads, B={B} T={slots // B}: "
              f"{median * 1e3:7.1f} ms a step ({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f}), "
              f"{slots / median:7.0f} slots/s", flush=True)


def time_on_gpu(wrap=lambda model: model):
    """Milliseconds of 20 steps of the paper's model, the shortest first; what train_step says; seconds of compiling."""
    step, slots, parameters = train_step(DRT(Config(), "flex").cuda(), 2, 260, wrap)
    start = time.perf_counter()
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    compiling = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events), slots, parameters, compiling


def on_gpu():
    times, slots, parameters, compiling = time_on_gpu()
    median = times[len(times) // 2]
    print(f"{torch.cuda.get_device_name()}: {parameters / 1e6:.1f}M, PyTorch {torch.__version__}, bf16, "
          f"B=2 T={slots // 2}: {median:.1f} ms a step ({times[0]:.1f} to {times[-1]:.1f}), "
          f"{slots / median * 1e3:.0f} slots/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated; "
          f"compiled in {compiling:.0f} s", flush=True)


def on_gpus():
    """As one of torchrun's processes, each with a GPU: the slowest one's median step alone and in DDP."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl")
    medians = []
    for wrap in (lambda model: model, lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)):
        distributed.barrier()
        times = time_on_gpu(wrap)[0]
        slowest = torch.tensor(times[len(times) // 2], device="cuda")
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
        medians.append(slowest.item())
    if distributed.get_rank() == 0:
        alone, together = medians
        print(f"{distributed.get_world_size()} GPUs, PyTorch {torch.__version__}, DDP: {together:.1f} ms a step, "
              f"each alone at the same time {alone:.1f}: {100 * alone / together:.1f}%", flush=True)
    distributed.destroy_process_group()


torch.manual_seed(0)
if "LOCAL_RANK" in os.environ:
    on_gpus()
else:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count())
    on_cpu()
    if torch.cuda.is_available():
        on_gpu()
