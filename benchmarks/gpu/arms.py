"""One model and the arms of the comparison, which are switched on and off on it.

One model rather than one for each arm, because a GPU's memory does not hold five with their
optimizers. Leaving an arm of APEX fuses its operators into the weights and takes every hook off.
"""

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from apex_composer import Expander, FusedSwiGLU, find_sites
from apex_composer.ops.full_precision import full_float32

Step = Callable[[Tensor], None]


class Arm(NamedTuple):
    """What trains: APEX by this implementation (None: no APEX), with SwiGLU fused or eager."""

    implementation: str | None
    fused: bool

    @property
    def base(self) -> str:
        """The vanilla arm with the same SwiGLU."""
        return "vanilla_fused" if self.fused else "vanilla"


ARMS = {
    "vanilla": Arm(None, False),
    "vanilla_fused": Arm(None, True),
    "apex_torch": Arm("torch", False),
    "apex_kernels": Arm("triton", False),
    "apex_kernels_fused": Arm("triton", True),
}

# Of the models that the steps are timed for; the command line may shrink it.
TINYLLAMA = {
    "layers": 22,
    "hidden": 2048,
    "channels": 5632,
    "heads": 32,
    "kv_heads": 4,
    "vocabulary": 32000,
    "length": 4096,
}


def build_model(sizes: Namespace, device: torch.device, attention: str) -> LlamaForCausalLM:
    """A Llama with random float32 weights.

    Args:
        sizes: with the keys of TINYLLAMA.
        device: that it is built on.
        attention: `flash_attention_2`, `sdpa` or `eager`.
    """
    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.channels,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.length,
        attn_implementation=attention,
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config)
    return model.to(device=device, dtype=torch.float32).train()


class Training:
    """A model with its optimizer, trained by ordinary steps and by those of the arms.

    Args:
        model: of float32 weights.
        device: of the model.
        microbatch: sequences of one forward pass.
        precision: of the model: `bf16` by autocast, or `fp32`, without TF32 where it is allowed.
        lr: learning rate; small, because the data are random.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        device: torch.device,
        *,
        microbatch: int,
        precision: str = "bf16",
        lr: float = 1e-5,
    ):
        self.model, self.device = model, device
        self._microbatch, self._precision = microbatch, precision
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    @contextmanager
    def running(self, arm: Arm, ids: Tensor) -> Iterator[tuple[Step, Expander | None]]:
        """Switch an arm on; yields its step, and the expander of an arm of APEX.

        Args:
            arm: what trains.
            ids: [sequences, length] for the assessment before the stage; one microbatch is used.
        """
        gc.collect()  # what an arm before left in circles must not count in this one's memory
        expander = collector = None
        with ExitStack() as leaving:  # in reverse
            if arm.implementation is not None:
                sites = find_sites(self.model)
                expander = Expander(sites, threshold=0.125, implementation=arm.implementation)
                collector = expander.assessment.reserve_norms
            if arm.fused:
                leaving.callback(FusedSwiGLU(self.model, True, collector=collector).remove)
            if expander is not None:
                leaving.callback(expander.remove)
                leaving.callback(expander.fuse)
                leaving.callback(self._begin(expander, ids).remove)
            yield (lambda batch: self._step(batch, expander)), expander

    def _begin(self, expander: Expander, ids: Tensor):
        with torch.no_grad(), expander.assessing(), self._autocast():
            self.model(input_ids=ids[: self._microbatch])
        expander.begin_stage()
        return expander.attach(self._optimizer)

    def _step(self, ids: Tensor, expander: Expander | None) -> None:
        """Gradients of all microbatches, every forward pass assessed, and the optimizer's step."""
        self._optimizer.zero_grad(set_to_none=True)
        parts = ids.split(self._microbatch)
        in_full = full_float32() if self._precision == "fp32" else nullcontext()
        with in_full, nullcontext() if expander is None else expander.assessing():
            for part in parts:
                with self._autocast():
                    loss = self.model(input_ids=part, labels=part).loss
                (loss / len(parts)).backward()
        self._optimizer.step()

    def _autocast(self):
        enabled = self._precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
