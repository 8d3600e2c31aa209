"""The model repository of Triton: its configuration against the schema, and its Python model."""

import errno
import importlib.util
import json
import sys
import types

import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from recpress.trainer.export.config import ExportConfig
from recpress.trainer.export.stage import export
from recpress.trainer.export.triton import write_repository
from tests.trainer.export.models import USERS, write_factors, write_log

STRING, INT32, INT64, MESSAGE, ENUM = 9, 5, 3, 11, 14
SCHEMA = {
    "ModelConfig": {
        "name": (1, STRING), "platform": (2, STRING), "max_batch_size": (4, INT32), "backend": (17, STRING),
        "input": (5, "ModelInput"), "output": (6, "ModelOutput"), "instance_group": (7, "ModelInstanceGroup"),
    },
    "ModelInput": {"name": (1, STRING), "data_type": (2, "DataType"), "dims": (4, INT64)},
    "ModelOutput": {"name": (1, STRING), "data_type": (2, "DataType"), "dims": (3, INT64)},
    "ModelInstanceGroup": {"kind": (4, "Kind"), "count": (2, INT32)},
}  # fmt: skip
"""The fields in use, with their numbers and types in Triton's model_config.proto."""
ENUMS = {"DataType": {"TYPE_INT64": 9, "TYPE_FP32": 11}, "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2}}
REPEATED = ("input", "output", "instance_group", "dims")


def model_config():
    """The message class of config.pbtxt."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="inference", syntax="proto2")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=3 if field in REPEATED else 1)
            added.type = kind if isinstance(kind, int) else ENUM if kind in ENUMS else MESSAGE
            if not isinstance(kind, int):
                added.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def parsed(path):
    return text_format.Parse(path.read_text(), model_config()())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    factors = write_factors(write_log(folder), folder / "factors")
    export(ExportConfig(model=factors, out=str(folder / "export"), index="none", triton=True, inline_mb=0.001))
    return folder / "export"


def test_a_program_that_is_not_compiled_runs_in_the_python_backend(exported):
    config = parsed(exported / "model_repository" / "user" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("user", "python", 0)
    assert [(part.name, part.data_type, list(part.dims)) for part in config.input] == [("user", 9, [-1])]
    assert [(part.name, part.data_type, list(part.dims)) for part in config.output] == [("output", 11, [-1, 12])]


def test_compiled_programs_run_in_the_pytorch_backend_unless_they_have_large_tensors(tmp_path):
    spec = {
        "aot": {"file": "model.aot.pt2", "device": "cpu"},
        "large": [],
        "inputs": [
            {"name": 'a"b', "dtype": "int64", "shape": ["batch"]},
            {"name": "price", "dtype": "float32", "shape": ["batch"]},
        ],
        "output": {"dtype": "float32", "shape": ["batch"]},
    }
    (tmp_path / "model.aot.pt2").write_bytes(b"program")
    specs = {"model": spec, "large": {**spec, "large": [{}]}}
    assert write_repository(tmp_path, specs) == {"model": "torch_aoti", "large": "python"}
    config = parsed(tmp_path / "model_repository" / "model" / "config.pbtxt")
    assert (config.platform, config.backend) == ("torch_aoti", "pytorch")
    assert [part.name for part in config.input] == ["INPUT__0", "INPUT__1"]
    assert (tmp_path / "model_repository" / "model" / "1" / "model.pt2").read_bytes() == b"program"
    assert parsed(tmp_path / "model_repository" / "large" / "config.pbtxt").input[0].name == 'a"b'


def test_a_program_is_copied_where_the_filesystem_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "model.aot.pt2").write_bytes(b"program")
    output = {"dtype": "float32", "shape": ["batch"]}
    spec = {"aot": {"file": "model.aot.pt2", "device": "cpu"}, "large": [], "inputs": [], "output": output}
    write_repository(tmp_path, {"model": spec})
    assert (tmp_path / "model_repository" / "model" / "1" / "model.pt2").read_bytes() == b"program"


def test_the_python_model_answers_and_refuses_as_the_program(exported, monkeypatch):
    backend = types.ModuleType("triton_python_backend_utils")
    backend.get_input_tensor_by_name = lambda request, name: request[name]
    backend.Tensor = lambda name, array: {name: array}
    backend.TritonError = str
    backend.InferenceResponse = lambda output_tensors=None, error=None: error or output_tensors[0]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = exported / "model_repository" / "user" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("served", path)
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    model = served.TritonPythonModel()
    model.initialize({"model_name": "user"})

    def request(ids):
        return {"user": types.SimpleNamespace(as_numpy=ids.numpy)}

    given = torch.tensor([0, USERS - 1])
    good, bad = model.execute([request(given), request(given.int())])
    from recpress.trainer.export.loader import load

    assert torch.equal(torch.from_numpy(good["output"]), load(exported, "user")(given))
    assert "expected a tensor of int64" in bad
    assert json.loads((exported / "manifest.json").read_text())["triton"] == {"user": "python", "item": "python"}
