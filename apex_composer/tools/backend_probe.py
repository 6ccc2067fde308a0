"""Start torch.distributed with this process alone: `python -m apex_composer.tools.backend_probe`.

In a process of its own, because a backend that does not work may not fail but hang.
"""


def probe() -> str:
    """Initialise, reduce once and stop; returns the backend's name."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Kept until the end: gloo's thread would otherwise free it, and can wait for ever for Python's
    # lock, which the end of the process group holds.
    number = torch.ones(1, device="cuda" if gpu else "cpu")
    dist.all_reduce(number)
    dist.destroy_process_group()
    assert number.item() == 1
    return backend


if __name__ == "__main__":
    print(probe())
