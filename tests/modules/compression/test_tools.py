"""Compressed collections in the tools of PyTorch and TorchRec: each gives what the eager collection gives.

Annotations are not strings here, because torch.fx passes them on to TorchScript.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchrec.fx
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.inference.modules import quantize_inference_model, shard_quant_model
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from recpress.modules.compression.replace import compress
from recpress.modules.frozen.kernel import HasFrozenTables
from tests.modules.compression.model_cases import FEATURES, IDS, collection, id_map, source

KEYS = ["f3", "f1b", "f0", "f2", "f1"]
ROWS = 3


def bags(storage: str = "fp32", *, maps: str = "one two", frozen: str = "t2 t3", **options: Any) -> Any:
    """A collection of a table with one row per id, one with two, one frozen, and one frozen with a map."""
    weighted, packed = options.pop("weighted_map", False), options.pop("packed", False)
    given = {}
    if "one" in maps:
        given["t0"] = id_map(10, weighted=weighted)
    if "two" in maps:
        given["t1"] = id_map(12, rows_per_id=2, weighted=weighted)
    if "t3" in frozen:
        given["t3"] = id_map(9, rows_per_id=2, seed=1)
    dim = options.pop("dim", 8)
    rows = {name: source(dim=dim) for name in frozen.split()}
    made, report = compress(collection(dim, **options), given, rows, storage=storage, packed=packed)  # type: ignore[arg-type]
    return made, report


def sequences(storage: str, weighted_map: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    configs = [
        EmbeddingConfig(name=t, num_embeddings=IDS, embedding_dim=6, feature_names=f) for t, f in FEATURES.items()
    ]
    maps = {"t1": id_map(12, rows_per_id=2, weighted=weighted_map), "t3": id_map(9)}
    rows = {"t2": source(dim=6), "t3": source(dim=6)}
    return compress(EmbeddingCollection(configs, **options), maps, rows, storage=storage)  # type: ignore[arg-type]


def positions() -> Any:
    weights = PositionWeightedModuleCollection({feature: 8 for group in FEATURES.values() for feature in group})
    with torch.no_grad():
        for weight in weights.parameters():
            weight.copy_(torch.linspace(0.5, 1.5, 8))
    tables = FeatureProcessedEmbeddingBagCollection(collection(is_weighted=True), weights)
    return compress(tables, {"t0": id_map(10)})


def baked(made: Any) -> Any:
    model, report = made
    return report.bake(model), report


KINDS: dict[str, Callable[[], Any]] = {
    "one row per id": lambda: bags(maps="one", frozen=""),
    "two weighted rows, packed": lambda: bags(frozen="", weighted_map=True, packed=True),
    "frozen fp32, no map": lambda: bags(maps="", frozen="t2"),
    "fp32": lambda: bags("fp32", dim=6),
    "fp16, weighted features": lambda: bags("fp16", is_weighted=True),
    "int8, weighted map, packed": lambda: bags("int8", weighted_map=True, packed=True),
    "int4, mean": lambda: bags("int4", pooling=PoolingType.MEAN),
    "sequences fp32, indices": lambda: sequences("fp32", False, need_indices=True),
    "sequences int8, weighted map": lambda: sequences("int8", True),
    "sequences int4": lambda: sequences("int4", False),
    "position weights": positions,
    "baked": lambda: baked(bags("int8", weighted_map=True, packed=True)),
    "baked sequences": lambda: baked(sequences("int4", True)),
}


class FromTensors(nn.Module):
    """Tensors in, tensors out: what a serving system calls."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        self.sequences = "Sequences" in type(tables).__name__ or isinstance(tables, EmbeddingCollection)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
        features = KeyedJaggedTensor(
            keys=["f3", "f1b", "f0", "f2", "f1"], values=values, lengths=lengths, weights=weights
        )
        found = self.tables(features)
        if self.sequences:
            return [found["f0"].values(), found["f1"].values(), found["f2"].values(), found["f3"].lengths(),
                    found["f3"].values()]  # fmt: skip
        return [found.values()]


def tensors(model: FromTensors, seed: int = 0, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of `model`, with ids that its maps do not cover."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, (len(KEYS), rows))
    lengths[:, 0] = 2
    values = [rng.integers(0, IDS, int(n.sum())) for n in lengths]
    for feature in mapped(model.tables):
        values[KEYS.index(feature)][:2] = [-4, IDS + 3]
    ids = torch.from_numpy(np.concatenate(values))
    return (
        ids,
        torch.from_numpy(lengths.reshape(-1).astype(np.int32)),
        torch.from_numpy(rng.uniform(0.5, 1.5, len(ids)).astype(np.float32)),
    )


def mapped(tables: Any) -> list[str]:
    """The features that have a map."""
    maps = getattr(tables, "maps", None) or tables.hashes
    return [] if maps is None else list(maps._options[0] if hasattr(maps, "_options") else maps.unknown_counts())


def check(found: list[torch.Tensor], want: list[torch.Tensor], bound: float = 1e-5) -> None:
    assert len(found) == len(want)
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one, two, rtol=bound, atol=bound)


@pytest.fixture(scope="module")
def models() -> dict[str, FromTensors]:
    return {}


def model_of(kind: str, models: dict[str, FromTensors]) -> FromTensors:
    if kind not in models:
        models[kind] = FromTensors(KINDS[kind]()[0]).eval()
    return models[kind]


def export(model: nn.Module, args: Any, strict: bool) -> Any:
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * 3
    return torch.export.export(model, args, dynamic_shapes=dynamic, strict=strict)


def traced(model: FromTensors, args: Any) -> Callable[..., Any]:
    return torch.fx.symbolic_trace(model)


def traced_by_torchrec(model: FromTensors, args: Any) -> Callable[..., Any]:
    return torchrec.fx.symbolic_trace(model)


def scripted(model: FromTensors, args: Any) -> Callable[..., Any]:
    return torch.jit.script(torchrec.fx.symbolic_trace(model))


PROGRAMS: dict[FromTensors, Any] = {}
"""What was exported; a second test uses it."""


def program_of(model: FromTensors, args: Any) -> Any:
    if model not in PROGRAMS:
        PROGRAMS[model] = export(model, args, strict=False)
    return PROGRAMS[model]


def exported(model: FromTensors, args: Any) -> Callable[..., Any]:
    return program_of(model, args).module()


def exported_strictly(model: FromTensors, args: Any) -> Callable[..., Any]:
    return export(model, args, strict=True).module()


def compiled(model: FromTensors, args: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=True)


STRICT = ["two weighted rows, packed", "fp16, weighted features", "int4, mean", "sequences int8, weighted map"]
EXPORTED = [*STRICT, "fp32", "int8, weighted map, packed", "position weights", "baked"]
"""Kinds that contain all paths, for the tools that need seconds for each."""
CASES = [(tool, kind) for tool in (traced, traced_by_torchrec, scripted) for kind in KINDS]
CASES += [(exported, kind) for kind in EXPORTED]
CASES += [(tool, kind) for tool in (exported_strictly, compiled) for kind in STRICT]


@pytest.fixture(autouse=True)
def _compile_data_dependent_sizes() -> Iterator[None]:
    """What TorchRec's own collections need, too, to compile as one graph."""
    names = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch._dynamo.config.patch(names):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("tool", "kind"), CASES, ids=[f"{tool.__name__}-{kind}" for tool, kind in CASES])
def test_equals_eager(tool: Callable[..., Any], kind: str, models: dict[str, FromTensors]) -> None:
    model = model_of(kind, models)
    program = tool(model, tensors(model))
    for seed, rows in ((0, ROWS), (1, 7)):
        args = tensors(model, seed, rows)
        check(program(*args), model(*args))


@pytest.mark.parametrize("kind", KINDS)
def test_quantized(kind: str) -> None:
    """All tables become TorchRec's quantized ones, sharded or not, and TorchScript runs the result."""
    tables = KINDS[kind]()[0]
    model = FromTensors(tables).eval()
    args = tensors(model)
    want = model(*args)
    quantized = quantize_inference_model(copy.deepcopy(model))
    found = _data_types(quantized)
    if kind.startswith("baked"):
        assert found == dict.fromkeys(FEATURES, "INT8")
    else:
        frozen = {} if tables.frozen is None else {t.name: t.storage for t in tables.frozen.tables()}
        assert found == {t: "INT4" if frozen.get(t) == "int4" else "INT8" for t in tables.tables()}
    # a row of normal numbers spans up to 5: int8 errs by 5 / 510 of each entry, and a bag has up to 6
    check(quantized(*args), want, 0.08)
    check(torch.jit.script(torchrec.fx.symbolic_trace(quantized))(*args), quantized(*args))
    if kind == "position weights":  # TorchRec shards a quantized FeatureProcessedEmbeddingBagCollection on CUDA only
        return
    set_propogate_device(True)  # TorchRec would use CUDA
    try:
        sharded, plan = shard_quant_model(quantized, world_size=2, compute_device="cpu", sharding_device="cpu")
        assert sum(len(part) for part in plan.plan.values()) == len(FEATURES)
        check(sharded(*args), quantized(*args))
        check(torch.jit.script(torchrec.fx.symbolic_trace(sharded))(*args), quantized(*args))
    finally:
        set_propogate_device(False)


def _data_types(model: nn.Module) -> dict[str, str]:
    """Table -> its data type in TorchRec's quantized collections; these are all that hold tables."""
    found = {}
    for module in model.modules():
        if type(module).__module__ != "torchrec.quant.embedding_modules":
            assert not isinstance(module, nn.EmbeddingBag | nn.Embedding | HasFrozenTables)
        elif hasattr(module, "embedding_bag_configs"):
            found |= {c.name: c.data_type.name for c in module.embedding_bag_configs()}
        elif hasattr(module, "embedding_configs"):
            found |= {c.name: c.data_type.name for c in module.embedding_configs()}
    return found


LOADER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("recpress", "torchrec"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, fbgemm_gpu
folder = sys.argv[1]
for path in sorted(__import__("pathlib").Path(folder).glob("*.pt2")):
    args, want = torch.load(path.with_suffix(".pt"))
    for found, value in zip(torch.export.load(path).module()(*args), want, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    print(path.stem)
"""


def test_exported_programs_need_no_recpress(tmp_path: Path, models: dict[str, FromTensors]) -> None:
    """Nor TorchRec. The batch has other sizes, and ids that no map covers."""
    names = []
    for place, kind in enumerate((*STRICT[1:], "fp32")):
        model = model_of(kind, models)
        torch.export.save(program_of(model, tensors(model)), tmp_path / f"{place}.pt2")
        args = tensors(model, 1, 7)
        torch.save((args, model(*args)), tmp_path / f"{place}.pt")
        names.append(str(place))
    loaded = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )
    assert loaded.stdout.split() == names, loaded.stderr


WRONG = [(traced, storage) for storage in ("fp32", "fp16", "int8", "int4")]
WRONG += [(scripted, "int4"), (exported, "fp16"), (compiled, "int4")]


@pytest.mark.parametrize(("tool", "storage"), WRONG, ids=[f"{tool.__name__}-{storage}" for tool, storage in WRONG])
def test_an_id_that_a_frozen_table_does_not_have(tool: Callable[..., Any], storage: str) -> None:
    model = FromTensors(bags(storage, maps="", frozen="t2")[0])
    ids, lengths, weights = tensors(model)
    program = tool(model, (ids, lengths, weights))
    first = int(lengths.view(len(KEYS), -1).sum(1)[:3].sum())  # of f2
    for bad in (IDS, -1):
        wrong = ids.clone()
        wrong[first] = bad
        with pytest.raises((RuntimeError, IndexError, torch.jit.Error)):
            program(wrong, lengths, weights)


@pytest.mark.parametrize("tool", [traced, scripted, exported], ids=lambda tool: tool.__name__)
def test_ids_that_a_map_rejects(tool: Callable[..., Any]) -> None:
    model = FromTensors(compress(collection(), {"t0": id_map(10)}, unknown="error")[0])
    features = FromTensors(bags(maps="one", frozen="")[0])
    ids, lengths, weights = tensors(features)
    good = torch.where((ids < 0) | (ids >= IDS), 0, ids)
    program = tool(model, (good, lengths, weights))
    check(program(good, lengths, weights), model(good, lengths, weights))
    with pytest.raises((RuntimeError, torch.jit.Error), match="feature 'f0' has an id"):
        program(ids, lengths, weights)


def test_a_compiled_model_counts_unknown_ids_and_trains() -> None:
    model = FromTensors(bags(maps="one", frozen="t2")[0])
    args = tensors(model)
    program = compiled(model, args)
    torch.stack([value.sum() for value in program(*args)]).sum().backward()
    assert model.tables.hashes.unknown_counts() == {"f0": 2}
    model.tables.hashes.unknown = "error"  # reported later, as on a GPU
    with pytest.raises(ValueError, match="feature 'f0' has the id -4"):
        model.tables.hashes.check_ids()
    assert model.tables.embedding_bags["t0"].weight.grad.abs().sum() > 0


def test_rows_that_were_never_loaded_cannot_be_exported() -> None:
    tables = bags(maps="", frozen="t2")[0]
    tables.frozen._loaded.clear()
    model = FromTensors(tables)
    for tool in (traced, exported):
        with pytest.raises(ValueError, match="never loaded"):
            tool(model, tensors(model))
