"""The TorchX components, as `torchx run` reads them."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

from recpress.launch import components
from recpress.launch.resources import RESOURCES

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["factorize", "hash", "train", "evaluate", "recommend", "pipeline"]
COMPONENTS = ["run", *STAGES, "bench", "script"]


def torchx(*arguments, path=""):
    command = [str(Path(sys.executable).parent / "torchx"), *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def installed(tmp_path):
    """A folder with what an installation would record: the entry points of pyproject.toml as they are now."""
    record = tmp_path / "recpress_entry_points-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: recpress-entry-points\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    sections = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (record / "entry_points.txt").write_text("\n".join(sections))
    return tmp_path


def arguments(stage):
    if stage == "recommend":
        return ("--model", "a", "--out", "b")
    return ("--data", "a", "--model" if stage == "evaluate" else "--out", "b")


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_runs_its_stage_on_every_process(stage):
    app = getattr(components, stage)(*arguments(stage), j="2x3", cpu=4, mem_mb=1000)
    (role,) = app.roles
    assert role.num_replicas == 2
    assert "--nnodes 2 --nproc_per_node 3" in role.args[-1]
    assert role.args[-1].endswith(f"-m recpress.trainer.cli {stage} {shlex.join(arguments(stage))}")
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert (role.resource.cpu, role.resource.memMB) == (4, 1000)


def test_bench_runs_benchmarks_with_their_own_arguments():
    (role,) = components.bench("training", "--size", "full", "--", "--runs", "3", j="1x2").roles
    assert role.args[-1].endswith("-m recpress.trainer.cli bench run training --size full -- --runs 3")
    with pytest.raises(ComponentValidationException, match="unknown benchmark 'trainin'"):
        components.bench("trainin")


def test_options_reach_torchrun_and_the_scheduler():
    app = components.train(
        *arguments("train"),
        j="1:4x8",
        h="h100_x8",
        env={"A": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"},
        mounts=["type=volume", "src=claim", "dst=/data"],
        max_restarts=7,
        max_retries=2,
        rdzv_port=29999,
        rdzv_timeout=1200,
    )
    (role,) = app.roles
    command = role.args[-1]
    assert "--max_restarts 7 " in command
    assert "--rdzv_conf join_timeout=1200,read_timeout=1200 " in command
    assert ":29999 " in command
    assert "--nnodes 1:4 " in command
    assert "SIGUSR1" in command
    assert (role.max_retries, role.min_replicas, role.num_replicas) == (2, 1, 4)
    assert (role.env["A"], role.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == ("1", "5")
    assert [(mount.src, mount.dst_path) for mount in role.mounts] == [("claim", "/data")]
    assert role.resource == RESOURCES["h100_x8"]()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"j": "2y2"}, "-j is '2y2', expected NODESxPROCESSES"),
        ({"j": "4"}, "-j is '4'"),
        ({"j": "0x2"}, "-j is '0x2'"),
        ({"j": "1x9", "h": "a100_x8"}, "a node has 8 GPUs"),
        ({"h": "a100x8"}, "-h is 'a100x8', expected one of cpu_8, .*a100_x8"),
        ({"max_restarts": -1}, "--max_restarts is -1"),
        ({"grace": -1}, "--grace is -1"),
        ({"mounts": ["type=bind", "src=/a"]}, "--mounts is 'type=bind,src=/a', expected .*dst=FOLDER"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_clear_error(options, message):
    with pytest.raises(ComponentValidationException, match=message):
        components.train(*arguments("train"), **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cores", "3"], "--cores"),
        (["-j", "2y2", "--", "--data", "a", "--out", "b"], "-j is '2y2'"),
        (["-j", "1x2", "--", "--data", "a"], "Missing from recpress train"),
        (["-j", "1x2", "--", "--data", "a", "--out", "b", "--epochs=-1"], "epochs is -1, expected at least 0"),
        (["-j", "1x2", "--", "--data", "a", "--out", "b", "--epoch", "1"], "--epochs"),
    ],
)
def test_torchx_run_answers_a_wrong_argument_at_once(words, message):
    """Before anything is submitted, those of the stage included, and in words, not a traceback."""
    done = torchx("run", "-s", "local_cwd", "--dryrun", "launch/components.py:train", *words)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert "SCHEDULER REQUEST" not in done.stdout


def test_a_config_file_that_lies_on_the_cluster_alone_is_left_to_the_stage():
    (role,) = components.train("--config", "/nowhere/train.toml").roles
    assert role.args[-1].endswith("train --config /nowhere/train.toml")


def test_torchx_takes_the_file_and_the_registered_name(installed):
    """TorchX hides its own components as soon as a package registers some: dist.ddp has to be there still."""
    for name in ("launch/components.py:train", "recpress.train"):
        words = ["-j", "2x3", "--", "--data", "a", "--out", "b"]
        done = torchx("run", "-s", "local_cwd", "--dryrun", name, *words, path=installed)
        assert done.returncode == 0, done.stderr
        assert "recpress.trainer.cli" in done.stdout
    builtins = torchx("builtins", path=installed).stdout
    assert "dist.ddp" in builtins
    listed = re.findall(r"(recpress\.\w+)", builtins)
    assert sorted(listed) == sorted(f"recpress.{name}" for name in COMPONENTS)


def test_every_named_resource_is_registered():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["torchx.named_resources"]
    assert registered == {name: f"recpress.launch.resources:{name}" for name in RESOURCES}
    for make in RESOURCES.values():
        assert make().cpu >= 8
        assert make().memMB > 16_000


def test_torchx_still_writes_the_command_that_ours_is_made_from():
    """`launch.app` puts options behind the first word of it."""
    (role,) = dist.ddp(script="a.py").roles
    assert role.args[0] == "-c"
    assert role.args[-1].startswith("torchrun --rdzv_backend c10d ")


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_has_the_options_of_run_and_help_for_each(name):
    component = getattr(components, name)
    assert inspect.signature(component) == inspect.signature(components.run)
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(component), re.MULTILINE)
    assert documented == list(inspect.signature(component).parameters)


@pytest.mark.parametrize("stage", STAGES)
def test_a_short_name_is_run_with_the_command(stage):
    assert getattr(components, stage)(*arguments(stage), j="1x2") == components.run(stage, *arguments(stage), j="1x2")


def test_run_takes_any_command():
    (role,) = components.run("compare", "cadc", "--seeds", "0").roles
    assert role.name == "compare"
    assert role.args[-1].endswith("-m recpress.trainer.cli compare cadc --seeds 0")
    assert "--max_restarts 0 " in role.args[-1]
    (role,) = components.run("train", *arguments("train"), "--log-format", "json").roles
    assert "--max_restarts 3 " in role.args[-1]
    with pytest.raises(ComponentValidationException, match="unknown command 'trian'; nearest is 'train'"):
        components.run("trian")
    for words in ((), ("--data", "a")):
        with pytest.raises(ComponentValidationException, match="expected a command of recpress after `--`"):
            components.run(*words)


def test_components_import_no_torch():
    program = "import sys, recpress.launch.components; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("A=1,B=2", {"A": "1", "B": "2"}),
        ("TOKEN=abc==,B=x y", {"TOKEN": "abc==", "B": "x y"}),
        ("LIST=a,b;C=", {"LIST": "a,b", "C": ""}),
    ],
)
def test_values_of_env_may_hold_signs_and_commas(given, want):
    (role,) = components.factorize(*arguments("factorize"), env=given).roles
    assert want.items() <= role.env.items()


def test_env_without_a_value_is_refused():
    with pytest.raises(ComponentValidationException, match=r"NOVALUE.*expected NAME=VALUE"):
        components.factorize(*arguments("factorize"), env="NOVALUE")


@pytest.mark.parametrize("option", [("--config", "/cluster/only.toml"), ("--config=/cluster/only.toml",)])
def test_a_config_file_that_is_on_the_cluster_alone_is_left_to_the_stage(option):
    (role,) = components.factorize(*option).roles
    assert role.args[-1].endswith(shlex.join(option))


def test_torchrun_is_that_of_the_interpreter_whatever_path_says():
    (role,) = components.factorize(*arguments("factorize")).roles
    shown = role.args[-1].replace('exec "$@"', 'echo "$@"')
    done = subprocess.run([role.entrypoint, "-c", shown], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout.startswith(f"{sys.executable} -m torch.distributed.run --max_restarts")


def test_every_option_passes_through_torchx_as_text(tmp_path):
    options = (
        "-j 2x4 --cpu 3 --mem_mb 4096 --max_restarts 5 --max_retries 2 --rdzv_port 29501 --rdzv_timeout 60 --grace 9"
    )
    component = str(Path(components.__file__).resolve()) + ":pipeline"
    program = [
        sys.executable,
        "-m",
        "torchx.cli.main",
        "run",
        "--dryrun",
        "-s",
        "local_cwd",
        "--workspace",
        "",
        component,
    ]
    done = subprocess.run(
        [*program, *options.split(), "--", *arguments("pipeline")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "--max_restarts 5" in done.stdout + done.stderr


# ---- the user's own script


def test_a_script_gets_the_restarts_signals_and_grace_period_of_a_stage():
    (role,) = components.script("examples/compress_dlrm.py", "--keep", "0.1", j="2x8", h="h100_x8", max_retries=2).roles
    assert role.name == "compress_dlrm"
    assert role.args[-1].endswith("--role '' examples/compress_dlrm.py --keep 0.1")
    for part in ("--max_restarts 3 ", "--nnodes 2 --nproc_per_node 8", "SIGUSR1", "join_timeout=600"):
        assert part in role.args[-1]
    assert role.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    (module,) = components.script("-m", "my_package.train", "--epochs", "3", max_restarts=0).roles
    assert module.name == "train"
    assert module.args[-1].endswith("-m my_package.train --epochs 3")
    assert "--max_restarts 0 " in module.args[-1]
    (role,) = components.script("folder/my-dlrm.v2.py").roles
    assert role.name == "my_dlrm_v2"
    for words in ((), ("--epochs", "3"), ("-m",)):
        with pytest.raises(ComponentValidationException, match="expected a script after `--`"):
            components.script(*words)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such script"), ("def broken(:\n", "invalid syntax"), ("x = '\0'", "null byte")]
)
def test_a_script_that_cannot_run_is_refused_before_it_waits_in_a_queue(tmp_path, text, message):
    script = tmp_path / "my_dlrm.py"
    if text is not None:
        script.write_text(text)
    done = torchx("run", "-s", "slurm", "--dryrun", "launch/components.py:script", "--", str(script))
    assert done.returncode == 1
    assert str(script) in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_runs_on_every_process(tmp_path):
    """From an environment that is not activated, with arguments that a shell would take apart."""
    script = tmp_path / "my script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[1]) / os.environ['RANK']\n"
        "out.write_text(repr((os.environ['WORLD_SIZE'], sys.argv[2:])))\n"
    )
    words = ["-j", "1x2", "--", str(script), str(tmp_path), "a b", "$HOME"]
    program = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    done = subprocess.run(
        [*program, str(ROOT / "launch/components.py:script"), *words],
        env={**os.environ, "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == [repr(("2", ["a b", "$HOME"]))] * 2


# ---- the config file


def on_the_node(role, tmp_path):
    """The words that torchrun would get, and the config file, in a place without this machine's files."""
    shown = role.args[-1].replace('exec "$@"', 'printf "%s\\n" "$@"') + '; cat "$recpress_config"'
    (tmp_path / "node").mkdir()
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [role.entrypoint, "-c", shown], env=env, cwd=tmp_path / "node", capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("joined", [False, True])
def test_a_config_file_reaches_the_node_as_it_was_checked(tmp_path, monkeypatch, joined):
    monkeypatch.chdir(tmp_path)
    text = "# a note, perhaps about a password\ndata = '/data/log'  # here\nout = \"/data/it's $HOME\"\n"
    Path("my pipeline.toml").write_text(text)
    words = ("--config=my pipeline.toml",) if joined else ("--config", "my pipeline.toml")
    (role,) = components.pipeline(*words).roles
    Path("my pipeline.toml").write_text("data = 1")
    shown = on_the_node(role, tmp_path)
    command, _, found = shown.partition(".toml\n")
    assert tomllib.loads(found) == tomllib.loads(text)
    assert "password" not in shown
    path = command.rpartition("--config=" if joined else "--config\n")[2]
    assert path.endswith("/my pipeline")
    assert path.startswith(str(tmp_path))


def test_a_config_file_is_checked_before_it_is_taken_along(tmp_path):
    (tmp_path / "train.toml").write_text("epocs = 3\n")
    with pytest.raises(ComponentValidationException, match="epocs"):
        components.train("--config", str(tmp_path / "train.toml"), *arguments("train"))
    (tmp_path / "long.toml").write_text("data = '" + "x" * 70_000 + "'\nout = 'b'\n")
    with pytest.raises(ComponentValidationException, match="expected at most 65536"):
        components.train("--config", str(tmp_path / "long.toml"))
    (tmp_path / "lines.toml").write_text("data = '''a\n# no comment'''\nout = 'b'\n")
    (role,) = components.train("--config", str(tmp_path / "lines.toml")).roles
    assert "# no comment" in on_the_node(role, tmp_path)


# ---- metadata


def test_metadata_annotates_the_job():
    app = components.factorize(*arguments("factorize"), metadata="team=ads,cost-center=a,b")
    assert app.metadata == {"team": "ads", "cost-center": "a,b"}
    with pytest.raises(ComponentValidationException, match="--metadata is 'team'"):
        components.factorize(*arguments("factorize"), metadata="team")
