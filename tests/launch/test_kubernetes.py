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
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCHEMA = json.loads((HERE / "volcano_job.json").read_text())
RUNS = {
    "factorize": ("-h", "cpu_96", "--", "--data", "/data/log", "--out", "/data/factors"),
    "hash": ("-j", "1x1", "--", "--data", "/data/log", "--factors", "/data/factors", "--out", "/data/maps"),
    "train": ("-j", "2x8", "-h", "h100_x8", "--max_retries", "3", "--", "--data", "/data/log", "--out", "/data/model"),
    "evaluate": ("-j", "1x8", "-h", "a100_x8", "--", "--data", "/data/log", "--model", "/data/model"),
    "pipeline": ("-j", "1:2x8", "-h", "h200_x8", "--", "--config", "/data/pipeline.toml"),
    "bench": ("-j", "1x1", "-h", "a10g", "--", "training", "--out", "/data/bench"),
}
COMMON = ("--image", "recpress:1", "--mounts", "type=volume,src=claim,dst=/data")


def manifest(name):
    """What the dry run prints, with the run's random name replaced."""
    command = [Path(sys.executable).parent / "torchx", "run", "-s", "kubernetes", "-cfg", "queue=default"]
    command += ["--workspace", "", "--dryrun", f"launch/components.py:{name}", *COMMON, *RUNS[name]]
    environment = {**os.environ, "LOGLEVEL": "WARNING", "HOME": str(HERE)}  # no settings of this user
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
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
    assert made == stored.read_text()


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
