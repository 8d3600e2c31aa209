"""Runs a program of the export that contains this folder, in the Python backend of Triton."""

import importlib.util
import json
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils

EXPORT = Path(__file__).resolve().parents[3]
"""`triton/NAME/1/model.py` is in it."""


class TritonPythonModel:
    def initialize(self, args):
        name = args["model_name"]
        spec = importlib.util.spec_from_file_location("recpress_load", EXPORT / "load.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        programs = json.loads((EXPORT / "manifest.json").read_text())["programs"]
        self.names = [part["name"] for part in programs[name]["inputs"]]
        self.program = module.load(EXPORT, name, aot=programs[name]["aot"] is not None)

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.names}
        try:
            output = self.program({name: torch.from_numpy(array.copy()) for name, array in given.items()})
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("output", output.numpy())])
