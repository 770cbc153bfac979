"""A real Slurm on this machine: munged, slurmctld and nodes that are network, host name, process and mount
namespaces on a bridge, so that what works on one host only fails here, too. Needs root and Debian's packages.

The file system is shared by all nodes but for /etc/hosts and /dev/shm. Nothing under /etc is changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Of this process, so that two test runs on a machine do not meet.
_OWN = os.getpid() % 250
_BRIDGE, _NETWORK, _CONTROL_PORT = f"gld{_OWN}", f"198.18.{_OWN}", 16900 + _OWN
_NODE_PORT = 6818
_WAITING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}

_CONF = """\
ClusterName=tests
SlurmctldHost={host}({network}.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its credential has expired: 120 s by default, and for values below 5.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
DefMemPerCPU=64
PriorityType=priority/basic
JobRequeue=1
KillWait=5
# A step whose srun is gone with its node holds on for 60 s; a shorter limit would drain the nodes that are left.
UnkillableStepTimeout=120
MinJobAge=3600
InactiveLimit=0
SlurmdTimeout=10
MessageTimeout=10
ReturnToService=2
TmpFS={folder}/tmp/%n
# Job ids of an earlier cluster must not come again: jobs find their state by them.
FirstJobId={first_job}
# Nodes may claim more than this machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 State=UP
"""

# bash is the node's process 1: it adopts orphans, and its death ends all that runs on the node.
_NODE = """\
hostname "$1"
mount -t overlay etc -o "lowerdir=$2/etc:/etc" /etc 2>/dev/null || {
  mount --bind "$2/etc/hosts" /etc/hosts && mount --bind "$2/etc/nsswitch.conf" /etc/nsswitch.conf; }
mount -t tmpfs shm /dev/shm
until ip addr show eth0 2>/dev/null | grep -q "inet "; do sleep 0.05; done
slurmd -D -N "$1" & p=$!
trap 'kill $p' TERM
wait $p; wait $p
"""


def install() -> None:
    """Install the packages that are missing (root on Debian), without starting their daemons."""
    needed = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}
    needed |= {"ip": "iproute2", "shellcheck": "shellcheck"}
    missing = [package for program, package in needed.items() if shutil.which(program) is None]
    if not missing:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        if subprocess.run(command, env=env, capture_output=True, check=False).returncode:
            subprocess.run(["apt-get", "update"], env=env, capture_output=True, check=True)
            subprocess.run(command, env=env, capture_output=True, check=True)
    finally:
        if ours:
            policy.unlink()


class Cluster:
    """A running cluster; ``env`` makes Slurm's commands talk to it.

    Attributes:
        nodes: names of the nodes.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.nodes = [f"node{index + 1}" for index in range(count)]
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("etc", "state", "spool", "tmp", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
            (self.folder / "tmp" / node).mkdir(mode=0o1777)
        self._write_conf()
        self._start_munge()
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        self._run("slurmctld", "slurmctld", "-D")
        self._until("slurmctld answers", lambda: self.run("scontrol", "ping", check=False).returncode == 0)
        for node in self.nodes:
            self.boot(node)
        self._until("nodes are idle", lambda: self.states() == ["idle"] * len(self.nodes))

    def _write_conf(self) -> None:
        lines = [
            f"NodeName={node} NodeAddr={self._address(node)} Port={_NODE_PORT} Sockets=1 CoresPerSocket=16 "
            "ThreadsPerCore=1 RealMemory=100000 Gres=gpu:8 State=UNKNOWN"
            for node in self.nodes
        ]
        host = os.uname().nodename.split(".")[0]
        conf = _CONF.format(
            folder=self.folder, host=host, network=_NETWORK, control_port=_CONTROL_PORT,
            first_job=int(time.time()) % 6_000_000 * 10 + 1, nodes="\n".join(lines),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        # Slurm takes any character device for a GPU.
        for index in range(8):
            (self.folder / f"gpu{index}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        hosts = ["127.0.0.1 localhost", f"{_NETWORK}.1 {host}"]
        hosts += [f"{self._address(node)} {node}" for node in self.nodes]
        (self.folder / "etc/hosts").write_text("\n".join(hosts) + "\n")
        # Sockets of torch look up their peers, and a name server that cannot be reached costs 20 s a job.
        (self.folder / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _address(self, node: str) -> str:
        return f"{_NETWORK}.{10 + int(node.removeprefix('node'))}"

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        for path in (munge, munge / "key"):
            shutil.chown(path, "munge", "munge")
        munge.chmod(0o711)
        (munge / "key").chmod(0o400)
        for parent in munge.parents:  # munged runs as another user and looks through all of them
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
        options = [f"--{name}={munge / name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
        user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        self._run("munged", *user, "munged", "-F", f"--key-file={munge / 'key'}", *options)
        self._until("munged listens", (munge / "socket").exists)

    def boot(self, node: str) -> None:
        """Start a node; it need not have been there before."""
        spaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        self._run(node, "unshare", *spaces, "bash", "-c", _NODE, "node", node, str(self.folder))
        child = Path(f"/proc/{self._processes[node].pid}/task/{self._processes[node].pid}/children")
        self._until(f"{node} has its first process", lambda: bool(child.read_text().split()))
        inside = child.read_text().split()[0]
        cable = f"{_BRIDGE}{node}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", inside)
        _ip("link", "set", cable, "master", _BRIDGE, "up")
        enter = ["nsenter", "--net", "--target", inside, "ip"]
        for words in ("link set lo up", f"addr add {self._address(node)}/24 dev eth0", "link set eth0 up"):
            subprocess.run([*enter, *words.split()], check=True, capture_output=True)

    def crash(self, node: str) -> None:
        """Cut a node's power: every process on it is gone at once."""
        self._end(node, signal.SIGKILL)

    def stop(self) -> None:
        for name in [*self.nodes, "slurmctld", "munged"]:
            if name in self._processes:
                self._end(name, signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)

    def _run(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._processes.pop(name)
        process.send_signal(how)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _until(self, what: str, done: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not done():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted((self.folder / "log").glob("*")))
                raise RuntimeError(f"{what}: not after {seconds:g} s; ended: {dead}\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to the cluster, on the host."""
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done

    def states(self) -> list[str]:
        """State of each node, in order."""
        return self.run("sinfo", "-h", "-N", "-o", "%t", check=False).stdout.split()

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol`` says of a job (of the last member of an array), by field."""
        lines = self.run("scontrol", "-o", "show", "job", job).stdout.strip().splitlines()
        return dict(word.split("=", 1) for word in lines[-1].split() if "=" in word)

    def hosts(self, job: str) -> list[str]:
        """The nodes of a job that runs or has run."""
        return self.run("scontrol", "show", "hostnames", self.show(job)["NodeList"]).stdout.split()

    def job_states(self, job: str) -> list[str]:
        """States of a job or of an array's members."""
        text = self.run("scontrol", "-o", "show", "job", job).stdout
        return [word.removeprefix("JobState=") for word in text.split() if word.startswith("JobState=")]

    def wait(self, job: str, seconds: float = 300.0) -> list[str]:
        """The states in which a job or an array's members ended."""
        end = time.monotonic() + seconds
        while set(states := self.job_states(job)) & _WAITING:
            if time.monotonic() > end:
                queue = self.run("squeue").stdout
                raise AssertionError(f"job {job} is {states} after {seconds:g} s\n{queue}")
            time.sleep(0.2)
        return states

    def processes(self, text: str) -> list[str]:
        """Command lines of this machine's processes, nodes included, that hold ``text``."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in line:
                    found.append(line)
        return found


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def cluster(folder: Path, count: int) -> Iterator[Cluster]:
    made = Cluster(folder, count)
    try:
        made.start()
        yield made
    finally:
        made.stop()
