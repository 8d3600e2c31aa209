"""Runs a program of the export that contains this folder, in the Python backend of Triton."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # of Triton

EXPORT = Path(__file__).resolve().parents[3]
"""`model_repository/NAME/1/model.py` is in it."""


class TritonPythonModel:
    """One program. Triton calls its methods."""

    def initialize(self, args: dict[str, Any]) -> None:
        sys.path.insert(0, str(EXPORT))
        from load import load  # type: ignore[import-not-found]

        name = args["model_name"]
        spec = json.loads((EXPORT / "manifest.json").read_text())["programs"][name]
        self.names = [part["name"] for part in spec["inputs"]]
        self.program = load(EXPORT, name, aot=spec["aot"] is not None)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.names}
        try:
            output = self.program({name: torch.from_numpy(array.copy()) for name, array in given.items()})
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("output", output.numpy())])
