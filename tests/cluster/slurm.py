"""A real Slurm of two nodes on this machine, for tests: each node is a network namespace with an address of its own.

Debian's packages (scripts/install-cluster.sh), started as children of this process with a configuration, a munge key
and a database in one folder; nothing of the system's own Slurm is read or changed, but /etc/netns/<node> is written,
which is where `ip netns exec` takes a namespace's hosts file from. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NODES = ("rpnode1", "rpnode2")
BRIDGE = "rpbr0"
NETWORK = "10.213.77"
CONTROLLER = f"{NETWORK}.254"

SLURM_CONF = """\
ClusterName=recpress
SlurmctldHost={host}({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is how long a job that was requeued waits before it may start again (Slurm's default: 120 s); started
# earlier by hand, it can meet "Job credential revoked" on the node, and FAILED is where it stays
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
SlurmctldPort=17000
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
# heterogeneous jobs, which TorchX makes, are started by the backfill thread alone; its default interval is 30 s
SchedulerParameters=bf_interval=1,bf_continue,sched_min_interval=100000,batch_sched_delay=0
SlurmdTimeout=15
KillWait=60
JobRequeue=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass={folder}/munge/socket
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_accounting
"""

ACCOUNTING_SQL = """\
create database slurm_accounting;
create user 'slurm'@'127.0.0.1' identified by 'slurm';
create user 'slurm'@'localhost' identified by 'slurm';
grant all on slurm_accounting.* to 'slurm'@'127.0.0.1';
grant all on slurm_accounting.* to 'slurm'@'localhost';
"""


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120.0, every: float = 0.1) -> None:
    """Return when the condition holds; TimeoutError naming `what` where it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(every)


class Slurm:
    """Two nodes with four CPUs each, a controller, and accounting, which `torchx status` and `cancel` ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything; returns when both nodes are idle."""
        for name in ("log", "state", "spool"):
            (self.folder / name).mkdir()
        self._configure()
        self._start_munge()
        self._start_network()
        self._start_accounting()
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
        wait_until(lambda: " is UP" in self.run(["scontrol", "ping"]), "slurmctld answers")
        for node in NODES:
            self.start_node(node)

    def stop(self) -> None:
        """End every daemon and job of this cluster; remove its namespaces and its folder."""
        for node in NODES:
            self._kill_all(node)
        for daemon in reversed(list(self._daemons.values())):
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        remove_network()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- nodes -----------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Boot a node: its link and its slurmd; returns when Slurm can give it work."""
        self.link(node, up=True)
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        slurmd = ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node]
        self._spawn(f"slurmd-{node}", self.on(node, slurmd))

        def ready() -> bool:
            state = self.run(["sinfo", "-h", "-N", "-n", node, "-o", "%t"]).strip()
            if state.startswith(("down", "drain")):
                self.run(["scontrol", "update", f"nodename={node}", "state=resume"])
            return state in ("idle", "mix", "alloc")

        wait_until(ready, f"{node} is ready", 240)

    def kill_node(self, node: str) -> None:
        """As if its power was cut: the link goes first, so that no peer hears a connection close."""
        self.link(node, up=False)
        self._kill_all(node)

    def link(self, node: str, *, up: bool) -> None:
        """Take a node's network link up or down, at the switch."""
        subprocess.run(["ip", "link", "set", _port(node), "up" if up else "down"], check=True)

    def processes(self, node: str, words: str = "") -> list[int]:
        """Ids of a node's processes whose command line has `words`, as this machine counts them, oldest first."""
        found = []
        listed = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=False).stdout
        for pid in map(int, listed.split()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if words in line:
                found.append(pid)
        return sorted(found)

    # -- commands --------------------------------------------------------------------------------------------------

    def on(self, node: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a node."""
        return [
            "ip",
            "netns",
            "exec",
            node,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {node}; exec "$@"',
            node,
            *command,
        ]

    def run(self, command: Sequence[str]) -> str:
        """What a Slurm command prints, its errors as well."""
        done = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.stdout

    def state(self, job: str) -> str:
        """The job's state, e.g. PENDING, RUNNING, COMPLETED; the accounting's word where it is gone from the queue."""
        for line in self.run(["scontrol", "show", "job", job]).splitlines():
            for word in line.split():
                if word.startswith("JobState="):
                    return word.partition("=")[2]
        return self.run(["sacct", "-n", "-X", "-P", "-j", job, "-o", "state"]).split("\n")[0]

    # -- parts -----------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={NETWORK}.{k} Port=17001 CPUs=4 RealMemory=8000 State=UNKNOWN"
            for k, node in enumerate(NODES, 1)
        )
        values = {
            "folder": self.folder,
            "host": self.host,
            "controller": CONTROLLER,
            "nodes": nodes,
            "names": ",".join(NODES),
        }
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        database = self.folder / "slurmdbd.conf"
        database.write_text(SLURMDBD_CONF.format(**values))
        database.chmod(0o600)

    def _start_munge(self) -> None:
        """munged refuses folders and keys of another user, and a socket that not all can reach."""
        folder = self.folder / "munge"
        folder.mkdir()
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        key.chmod(0o400)
        options = [f"--{name}-file={folder / name}" for name in ("key", "pid", "seed", "log")]
        drop = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self._spawn("munged", [*drop, "munged", "--foreground", "--force", f"--socket={folder}/socket", *options])
        wait_until((folder / "socket").exists, "munged listens")

    def _start_network(self) -> None:
        """A bridge, and a namespace a node with one end of a cable to it."""
        remove_network()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{CONTROLLER}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        hosts = ["127.0.0.1 localhost", f"{CONTROLLER} {self.host}"]
        hosts += [f"{NETWORK}.{k} {node}" for k, node in enumerate(NODES, 1)]
        for k, node in enumerate(NODES, 1):
            # No DNS: torch's TCPStore looks every peer up by its address, 10 s each where nothing answers.
            etc = Path("/etc/netns") / node
            etc.mkdir(parents=True)
            (etc / "hosts").write_text("\n".join(hosts) + "\n")
            (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
            _ip("netns", "add", node)
            _ip("link", "add", _port(node), "type", "veth", "peer", "name", "eth0", "netns", node)
            _ip("link", "set", _port(node), "master", BRIDGE, "up")
            _ip("-n", node, "addr", "add", f"{NETWORK}.{k}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")
            _ip("-n", node, "link", "set", "lo", "up")

    def _start_accounting(self) -> None:
        data, sock = self.folder / "database", self.folder / "database.sock"
        base = ["--no-defaults", "--user=root", f"--datadir={data}"]
        install = ["mariadb-install-db", *base, "--auth-root-authentication-method=socket", "--skip-test-db"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server = ["mariadbd", *base, f"--socket={sock}", f"--pid-file={self.folder}/mariadb.pid"]
        limits = ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"]  # what slurmdbd asks for
        self._spawn("mariadb", [*server, "--bind-address=127.0.0.1", "--port=13306", *limits])
        client = ["mariadb", "--no-defaults", "-uroot", "-S", str(sock), "-e"]
        wait_until(lambda: not subprocess.run([*client, "select 1"], capture_output=True).returncode, "mariadb answers")
        subprocess.run([*client, ACCOUNTING_SQL], check=True)
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        wait_until(lambda: "Cluster" in self.run(["sacctmgr", "list", "cluster"]), "slurmdbd answers")
        self.run(["sacctmgr", "-i", "add", "cluster", "recpress"])

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _kill_all(self, node: str) -> None:
        def none_left() -> bool:
            for pid in self.processes(node):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return not self.processes(node)

        wait_until(none_left, f"the processes of {node} are gone")
        daemon = self._daemons.pop(f"slurmd-{node}", None)
        if daemon is not None:
            daemon.wait()


def remove_network() -> None:
    """Remove the namespaces, the bridge and the files under /etc/netns, also those that a killed test left."""
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", _port(node)], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / node, ignore_errors=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def _port(node: str) -> str:
    """The bridge's end of a node's cable."""
    return f"{node}p"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
