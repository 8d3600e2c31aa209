"""TorchX components and named resources. Imports no torch, so that `torchx run` responds at once."""
