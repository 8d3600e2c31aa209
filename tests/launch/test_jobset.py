"""The JobSet manifest: what it has in common with the TorchX component, and JobSet's own schema."""

import json
import os
import shlex
import urllib.request
from pathlib import Path

import jsonschema
import pytest
import yaml

from recpress.launch import components

HERE = Path(__file__).resolve().parent
CRD = (
    "https://raw.githubusercontent.com/kubernetes-sigs/jobset/v0.12.0/config/components/crd/bases/"
    "jobset.x-k8s.io_jobsets.yaml"
)


@pytest.fixture
def jobset():
    return yaml.safe_load((HERE.parents[1] / "launch" / "jobset.yaml").read_text())


@pytest.fixture
def job(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_every_node_runs_the_command_of_the_component(jobset, job):
    (container,) = job["template"]["spec"]["containers"]
    command = container["command"]
    place = command.index("recpress.trainer.cli")
    (role,) = components.train(*command[place + 2 :], j="2x8", h="h100_x8").roles
    wanted = shlex.split(role.args[-1].partition('exec "$@" ')[2])
    options = dict(zip(wanted[::2], wanted[1::2], strict=False))
    given = dict(word.split("=", 1) for word in command[1 : place - 1])
    first = (
        f"{jobset['metadata']['name']}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0.{jobset['metadata']['name']}"
    )
    assert given.pop("--rdzv_endpoint") == f"{first}:{container['ports'][0]['containerPort']}"
    assert given.pop("--rdzv_id") == jobset["metadata"]["name"]
    assert given == {name: options[name] for name in given}
    assert {entry["name"]: entry["value"] for entry in container["env"]}.items() <= role.env.items()
    assert command[place - 1 : place + 2] == ["-m", "recpress.trainer.cli", "train"]


def test_nodes_gpus_and_the_grace_period_fit_the_command(jobset, job):
    (container,) = job["template"]["spec"]["containers"]
    given = dict(word.split("=", 1) for word in container["command"] if word.startswith("--"))
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(given["--nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == given["--nproc_per_node"]
    grace = int(next(entry["value"] for entry in container["env"] if "SHUTDOWN" in entry["name"]))
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == grace + 30
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert "kueue.x-k8s.io/queue-name" in jobset["metadata"]["labels"]


def test_the_pods_are_pods(job):
    schema = json.loads((HERE / "volcano_job.json").read_text())
    pod = {"$defs": schema["$defs"], "$ref": "#/$defs/pod"}
    jsonschema.validate(job["template"]["spec"], pod)


def closed(schema):
    """The schema without fields that it does not name, as a server with strict validation takes it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key not in ("format", "pattern")}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


def test_jobset_takes_the_manifest(jobset):
    """Against the schema of the CRD: a file named by RECPRESS_JOBSET_CRD, or JobSet's repository."""
    try:
        path = os.environ.get("RECPRESS_JOBSET_CRD")
        if path:
            text = Path(path).read_text()
        else:
            with urllib.request.urlopen(CRD, timeout=5) as answer:
                text = answer.read().decode()
    except OSError as error:
        pytest.skip(f"no schema of JobSet: {error}")
    versions = {v["name"]: v["schema"]["openAPIV3Schema"] for v in yaml.safe_load(text)["spec"]["versions"]}
    schema = closed(versions[jobset["apiVersion"].partition("/")[2]])
    jsonschema.validate(jobset, schema)
    for path, value in ((("spec", "replicatedJob"), []), (("spec", "failurePolicy", "maxRestarts"), "3")):
        wrong = yaml.safe_load(yaml.dump(jobset))
        inner = wrong
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
