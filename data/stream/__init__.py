"""The training stream: example order, shuffle window, prefetch, batches and keyed jagged tensors.

May import `dataset`, `sampling` and `negatives`; only `batch` and `keyed` import TorchRec.
"""

from recpress.data.stream.loader import InteractionStream, StreamDataset

__all__ = ["InteractionStream", "StreamDataset"]
