"""TorchX components. Imports no torch, so that `torchx run` answers at once."""
