"""What `torchx run -s kubernetes` would submit: as stored, and as Volcano takes it. Needs no cluster.

RECPRESS_STORE_MANIFESTS=1 writes the manifests anew; look at the difference before committing it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torchx
import yaml
from torchx.specs.finder import ComponentValidationException

from recpress.launch.role import merged, read_pod

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCHEMA = json.loads((HERE / "volcano_job.json").read_text())
RUNS = {
    "factorize": ("-h", "cpu_96", "--", "--data", "/data/log", "--out", "/data/factors"),
    "hash": ("-j", "1x1", "--", "--data", "/data/log", "--factors", "/data/factors", "--out", "/data/maps"),
    "train": ("-j", "2x8", "-h", "h100_x8", "--max_retries", "3", "--", "--data", "/data/log", "--out", "/data/model"),
    "evaluate": ("-j", "1x8", "-h", "a100_x8", "--", "--data", "/data/log", "--model", "/data/model"),
    "recommend": ("-j", "1x8", "-h", "a100_x8", "--", "--model", "/data/model", "--out", "/data/best"),
    "pipeline": ("-j", "1:2x8", "-h", "h200_x8", "--", "--config", "/data/pipeline.toml"),
    "script": (
        *("-j", "2x8", "-h", "h100_x8", "--grace", "120", "--metadata", "team=ads,kubernetes=tests/launch/pod.yaml"),
        *("--", "my_dlrm.py", "--epochs", "3"),
    ),
    "bench": ("-j", "1x1", "-h", "a10g", "--", "training", "--out", "/data/bench"),
}
PINNED = torchx.version.__version__ == "0.7.0"
KUBERNETES = "queue=default" if PINNED else "queue=default,validate_spec=false"  # later versions ask the cluster
COMMON = ("--image", "recpress:1", "--mounts", "type=volume,src=claim,dst=/data")


def dry_run(name, *options, scheduler="kubernetes"):
    command = [Path(sys.executable).parent / "torchx", "run", "-s", scheduler, "--workspace", "", "--dryrun"]
    command += [*(("-cfg", KUBERNETES) if scheduler == "kubernetes" else ()), f"launch/components.py:{name}"]
    environment = {**os.environ, "LOGLEVEL": "WARNING", "HOME": str(HERE)}  # no settings of this user
    return subprocess.run(
        [*command, *options, *RUNS[name]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def manifest(name):
    """What the dry run prints, with the run's random name replaced."""
    done = dry_run(name, *COMMON)
    assert done.returncode == 0, done.stderr
    text = done.stdout.partition("=== SCHEDULER REQUEST ===")[2].strip() + "\n"
    job = yaml.safe_load(text)["metadata"]["name"]
    # without line breaks, which the length of the random name moves
    text = yaml.dump(yaml.safe_load(text.replace(job, f"{name}-id")), width=100_000)
    return text.replace(sys.executable, "/here/bin/python")  # whichever environment the tests run in


@pytest.mark.parametrize("name", RUNS)
def test_the_manifest_is_the_stored_one_and_volcano_takes_it(name):
    made, stored = manifest(name), HERE / "manifests" / f"{name}.yaml"
    jsonschema.validate(yaml.safe_load(made), SCHEMA)
    if os.environ.get("RECPRESS_STORE_MANIFESTS"):
        stored.write_text(made)
    assert made == stored.read_text() or not PINNED


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("restartPolicy: Never", "restartPolicy: Sometimes"),
        ("containerPort: 29500", "containerPort: 70000"),
        ("action: RestartJob", "action: Restart"),
        ("schedulerName: volcano", "scheduler: volcano"),
        ("name: train-id", "name: Train_ID"),
        ("value: '1'", "value: 1"),
        ("image: recpress:1", "image: ''"),
    ],
)
def test_the_schema_refuses_what_volcano_would(before, after):
    text = (HERE / "manifests" / "train.yaml").read_text()
    changed = re.sub(f"{re.escape(before)}$", after, text, flags=re.MULTILINE)
    assert changed != text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(changed), SCHEMA)


@pytest.mark.parametrize("scheduler", ["kubernetes", "local_docker"])
def test_containers_need_an_image(scheduler):
    """Otherwise TorchX's own image would run, which has no recpress."""
    done = dry_run("factorize", *COMMON[2:], scheduler=scheduler)
    assert done.returncode == 1
    assert "--image is missing; on " in done.stderr
    assert "Traceback" not in done.stderr


def test_pods_without_shared_storage_are_warned_of():
    assert "no --mounts" in dry_run("factorize", *COMMON[:2]).stderr
    assert "no --mounts" not in dry_run("factorize", *COMMON).stderr


def test_a_pod_overlay_is_merged_as_kubernetes_does():
    base = {"spec": {"containers": [{"name": "a", "env": [{"name": "X", "value": "1"}]}], "restartPolicy": "Never"}}
    env = [{"name": "X", "value": "2"}, {"name": "Y", "value": "3"}]
    tolerations = [{"key": "gpu", "operator": "Exists"}]
    patch = {"spec": {"containers": [{"name": "a", "env": env}], "tolerations": tolerations}, "metadata": {"a": "b"}}
    found = merged(base, patch)
    assert found == {
        "spec": {"containers": [{"name": "a", "env": env}], "restartPolicy": "Never", "tolerations": tolerations},
        "metadata": {"a": "b"},
    }
    assert base["spec"]["containers"][0]["env"] == [{"name": "X", "value": "1"}]
    assert merged(found, {"spec": {"tolerations": [{"key": "spot"}]}})["spec"]["tolerations"] == [
        *tolerations,
        {"key": "spot"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec: [", "while parsing"),
        ("tolerations: []", "has tolerations, expected `metadata` and `spec`"),
        ("", "has NoneType"),
        (None, "No such file"),
    ],
)
def test_a_pod_overlay_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "pod.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ComponentValidationException, match=message):
        read_pod(str(path))
