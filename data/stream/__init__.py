"""The training stream: example order, shuffle window, prefetch, batches and keyed jagged tensors."""
