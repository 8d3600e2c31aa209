"""Batches whose keys have different strides (TorchRec's variable batch), for look-ups that need one stride."""

from __future__ import annotations

import torch
from torchrec import KeyedJaggedTensor


def with_one_stride(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same batch with the bags of each key repeated by its inverse indices; unchanged if there is one stride.

    Raises:
        ValueError: strides differ, and there are no inverse indices.
    """
    if not features.variable_stride_per_key():
        return features
    given = features.inverse_indices_or_none()
    if given is None:
        raise ValueError("frozen tables: a batch with a different stride per key needs inverse indices")
    names, inverse = given
    values, weights, lengths = [], [], []
    for key in features.keys():  # noqa: SIM118 (of a KeyedJaggedTensor)
        bags, index = features[key], inverse[names.index(key)]
        of_bag = bags.lengths().long()
        starts = of_bag.cumsum(0) - of_bag
        repeated = of_bag[index]
        first = starts[index] - (repeated.cumsum(0) - repeated)
        at = torch.repeat_interleave(first, repeated) + torch.arange(int(repeated.sum()), device=index.device)
        values.append(bags.values()[at])
        lengths.append(repeated)
        if features.weights_or_none() is not None:
            weights.append(bags.weights()[at])
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.cat(weights) if weights else None,
        stride=inverse.shape[1],
    )
