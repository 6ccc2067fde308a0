"""Tables of device addresses, through which one launch reaches many tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


class AddressTable:
    """The addresses of a list of tensors, on their device.

    Args:
        device: of the tensors.

    Attributes:
        table: [tensors], int64; None before the first `update`.
        aligned: whether every address is a multiple of 16 bytes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._addresses: list[int] = []
        self.table: Tensor | None = None
        self.aligned = False

    def has_moved(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any tensor lies elsewhere than at the last `update`."""
        return [tensor.data_ptr() for tensor in tensors] != self._addresses

    def update(self, tensors: Sequence[Tensor]) -> None:
        """Look where the tensors lie now, and write the table again if any has moved.

        Args:
            tensors: in the order of the table. The caller keeps them alive.
        """
        if not self.has_moved(tensors):
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        on_cuda = self._device.type == "cuda"
        # From pinned memory the copy takes its turn in the stream and the host does not wait. The
        # pinned memory is new each time: torch reuses it only after the copy has been done.
        table = torch.tensor(addresses, dtype=torch.int64, pin_memory=on_cuda)
        self.table = table.to(self._device, non_blocking=True)
        self.aligned = all(address % 16 == 0 for address in addresses)
        self._addresses = addresses
