"""Checks and changes that depend on the scheduler, which TorchX passes to `Role.pre_proc` and not to a component."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torchx import specs
from torchx.specs.finder import ComponentValidationException

logger = logging.getLogger(__name__)

SHARED_DISK = ("local", "slurm", "lsf")
"""Schedulers, as TorchX names their backends, whose jobs see the files of the machine that submits."""
CONTAINERS = ("kubernetes", "kubernetes_mcad", "docker", "aws_batch", "aws_sagemaker")
POD_GRACE = 30
"""Seconds that a pod has to end after torchrun has stopped its workers."""


@dataclass
class JobRole(specs.Role):
    """A role that checks itself against the scheduler, and completes Kubernetes pods."""

    has_image: bool = True
    script: str | None = None
    """The user's script, if the job runs one."""
    grace: int = 60
    pod: dict[str, Any] = field(default_factory=dict)
    """Merged into each pod."""

    def pre_proc(self, scheduler: str, dryrun_info: specs.AppDryRunInfo) -> specs.AppDryRunInfo:
        """Raises ComponentValidationException if the job cannot run on this scheduler."""
        if scheduler in SHARED_DISK:
            self._check_script()
        if scheduler in CONTAINERS and not self.has_image:
            raise ComponentValidationException(
                f"--image is missing; on {scheduler} expected a container image in which recpress is installed, as "
                "`make image` builds"
            )
        if scheduler == "kubernetes":
            if not self.mounts and "volumes" not in self.pod.get("spec", {}) and "://" not in self.args[-1]:
                logger.warning(
                    "no --mounts: what the job writes to a path is lost with its pod; expected shared storage, as "
                    "--mounts type=volume,src=CLAIM,dst=/data, or addresses of an object store"
                )
            self._complete_pods(dryrun_info.request.resource["spec"]["tasks"])
        return dryrun_info

    def _check_script(self) -> None:
        if self.script is None:
            return
        path = Path(self.script)
        if not path.is_file():
            raise ComponentValidationException(f"{path}: no such script, seen from {Path.cwd()}")
        try:
            compile(path.read_bytes(), str(path), "exec")
        except (SyntaxError, ValueError) as error:
            raise ComponentValidationException(f"{path}: {error}") from error

    def _complete_pods(self, tasks: list[dict[str, Any]]) -> None:
        from kubernetes.client import ApiClient

        patch = merged({"spec": {"terminationGracePeriodSeconds": self.grace + POD_GRACE}}, self.pod)
        for task in tasks:
            task["template"] = merged(ApiClient().sanitize_for_serialization(task["template"]), patch)


def merged(base: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with a patch, as Kubernetes merges one.

    Mappings are merged by key, and lists by the `name` of their items; items without a known name are appended.
    Anything else is replaced.
    """
    result = copy.deepcopy(base)
    for key, value in patch.items():
        known = result.get(key)
        if isinstance(known, dict) and isinstance(value, Mapping):
            result[key] = merged(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            for item in value:
                name = item.get("name") if isinstance(item, Mapping) else None
                place = next((k for k, other in enumerate(known) if name is not None and other.get("name") == name), -1)
                if place < 0:
                    known.append(copy.deepcopy(item))
                else:
                    known[place] = merged(known[place], item)
        else:
            result[key] = copy.deepcopy(value)
    return result


def read_pod(path: str) -> dict[str, Any]:
    """A part of a pod from a YAML or JSON file, to be merged into each pod.

    Raises:
        ComponentValidationException: no such file, not YAML, or keys other than `metadata` and `spec`.
    """
    try:
        found = yaml.safe_load(Path(path.removeprefix("file://")).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ComponentValidationException(f"--metadata kubernetes={path}: {error}") from error
    if not isinstance(found, dict) or not found or found.keys() - {"metadata", "spec"}:
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ComponentValidationException(
            f"--metadata kubernetes={path}: has {keys or 'nothing'}, expected `metadata` and `spec` of a pod"
        )
    return found
