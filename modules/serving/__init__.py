"""Modules for serving: look-ups in plain torch operators, which torch.export turns into programs without recpress."""
