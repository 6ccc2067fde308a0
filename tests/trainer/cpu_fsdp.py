"""What FSDP needs to run on CPU processes with gloo (torch 2.7, Composer 0.32). For tests only."""

import composer.core.state
import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
import torch.distributed.fsdp.fully_sharded_data_parallel as fsdp1


def patch() -> None:
    """Make FSDP1 accept the CPU, and FSDP2 average gradients with gloo.

    Composer hands FSDP1 the current CUDA device. FSDP2 asks gloo for an averaging
    reduce-scatter, which gloo answers with the sum, without an error: gradients come out too
    large by the number of ranks. With replicas it insists on an event of a CUDA stream, to keep a
    buffer alive until the device has read it. torch crashes when FSDP1's full state dict of CPU
    weights is offloaded to the CPU. FSDP1 measures gradients in float32 only and refuses float64.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    collectives._get_gradient_divide_factors = _divide_after_summing
    param_group.foreach_reduce = _without_buffer(param_group.foreach_reduce)
    fsdp1._get_grad_norm = _norm_in_its_dtype
    options = composer.core.state.StateDictOptions
    composer.core.state.StateDictOptions = lambda **given: options(
        **{**given, "cpu_offload": False}
    )


def _without_buffer(foreach_reduce):
    """FSDP2's gradient reduction, without the buffer that nothing reads later on the CPU."""

    def reduce(*args, **options):
        *first, _, event, partial = foreach_reduce(*args, **options)
        return (*first, None, event, partial)

    return reduce


def _norm_in_its_dtype(params, norm_type, zero, device) -> torch.Tensor:
    """FSDP1's norm of a rank's gradients, for clipping, without its cast to float32."""
    grads = [param.grad for param in params if param.grad is not None]
    return torch.nn.utils.get_total_norm(grads, norm_type) if grads else zero.double()


def _divide_after_summing(shards, replicas, *others, **more) -> tuple[float, float]:
    """(before, after): the collective sums, and the result is divided by the number of ranks."""
    return 1.0, float(shards.size() * (replicas.size() if replicas is not None else 1))
