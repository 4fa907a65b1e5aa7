"""What deploy/ and docs/ say is valid, fits what is installed here, and lets no stranger in."""

import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import shardemb
from shardemb import cli
from shardemb.utils.run_metrics import read_metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (DEPLOY / "constraints.txt").read_text(), re.MULTILINE)
)
IMAGE = f"shardemb:{shardemb.__version__}-ray{PINS['ray']}"
LAUNCHER, KUBERAY = sorted((DEPLOY / "ray").iterdir()), sorted((DEPLOY / "kuberay").iterdir())
DOCUMENTS = {path.name: yaml.safe_load(path.read_text()) for path in (*LAUNCHER, *KUBERAY)}
LABELS = {"app.kubernetes.io/part-of": "shardemb"}
TOKEN = "RAY_AUTH_MODE=token "


def invocations(text: str) -> Iterator[list[str]]:
    """All commands with their arguments in lines of a shell.

    Also what one hands to another in quotes or after "--".
    """
    for line in text.replace("\\\n", " ").splitlines():
        parts = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        parts.whitespace_split = True
        command: list[str] = []
        for word in (*parts, ";"):
            if word.strip(";&|"):
                command.append(word)
                continue
            while command and re.match(r"(\w+=|export$|srun$)", command[0]):
                command.pop(0)
            if command:
                yield command
                for at, part in enumerate(command):
                    if part == "--" or part.startswith("shardemb:"):  # an image
                        yield command[at + 1 :]
                    elif " " in part:
                        yield from invocations(part)
            command = []


def said() -> Iterator[tuple[str, list[str]]]:
    """All commands that files of deploy/ and docs/ tell a reader or a cluster to run.

    With their file's name.
    """
    for path in (DEPLOY / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
            yield from ((path.name, command) for command in invocations(block))
    for path in sorted(DEPLOY.glob("*/*")):
        if path.is_file() and (told := re.search("^# .*:  (.*)", path.read_text(), re.MULTILINE)):
            yield from ((path.name, command) for command in invocations(told[1]))
    for path in LAUNCHER:
        for when in ("head", "worker"):
            for line in DOCUMENTS[path.name][f"{when}_start_ray_commands"]:
                yield from ((path.name, command) for command in invocations(line))
    yield from (
        ("rayjob.yaml", command)
        for command in invocations(DOCUMENTS["rayjob.yaml"]["spec"]["entrypoint"])
    )


def test_every_shardemb_command_parses(slurm: list[str]) -> None:
    seen = set()
    for file, command in (*said(), ("train.sbatch", slurm[slurm.index("--") + 1 :])):
        if command[:1] == ["shardemb"]:
            cli.parser().parse_args(
                [word for word in command[1:] if word != "..."]
            )  # SystemExit says what is wrong
            seen.add((file, command[1]))
    assert {"train", "serve", "evaluate", "top", "checkpoint"} <= {command for _, command in seen}
    assert {("rayjob.yaml", "train"), ("train.sbatch", "train"), ("README.md", "serve")} <= seen


def test_every_ray_command_has_options_that_ray_knows(slurm: list[str]) -> None:
    click = pytest.importorskip("click")
    commands = pytest.importorskip("ray.scripts.scripts").cli
    seen = set()
    for file, words in (*said(), ("train.sbatch", slurm)):
        if words[:1] != ["ray"]:
            continue
        command, rest = commands, words[1:]
        while isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        context = command.make_context(
            " ".join(words[:2]), rest
        )  # click.UsageError says what is wrong
        if words[1] == "symmetric-run":  # which hands these on
            options = list(context.params["ray_args_and_entrypoint"])
            commands.commands["start"].make_context(
                "ray start", options[: options.index("shardemb")]
            )
        seen.add((file, words[1]))
    assert {
        ("on-prem.yaml", "up"),
        ("aws.yaml", "start"),
        ("train.sbatch", "symmetric-run"),
        ("README.md", "job"),
    } <= seen


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return batch(tmp_path_factory.mktemp("slurm"), gpus=4)[0]


def batch(folder: Path, gpus: int) -> tuple[list[str], dict[str, str]]:
    """Run the batch script with a Slurm that only notes what it is given.

    Its step's arguments and environment.
    """
    for name, script in (
        ("scontrol", 'echo "$3-1"; echo "$3-2"'),
        (
            "srun",
            (
                'case "$*" in *hostname*) echo 127.0.0.1 ::1 ;; *) printf "%s\\0" "$@"'
                f' >{folder}/words; env -0 >{folder}/env\nstat -c %a "$RAY_AUTH_TOKEN_PATH"'
                f' >{folder}/mode; cp "$RAY_AUTH_TOKEN_PATH" {folder}/token ;; esac'
            ),
        ),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
    }
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
    }
    environment |= {"SLURM_GPUS_ON_NODE": str(gpus)} if gpus else {}
    subprocess.run(
        ["bash", DEPLOY / "slurm/train.sbatch", "job.toml", "runs/first"],
        env=environment,
        check=True,
    )
    words, told = (
        (folder / "words").read_text().split("\0")[:-1],
        (folder / "env").read_text().split("\0")[:-1],
    )
    return words, dict(entry.split("=", 1) for entry in told)


@pytest.mark.parametrize(("gpus", "workers"), [(0, "2"), (4, "8")])
def test_the_batch_script_makes_a_token_of_its_own_and_takes_it_away(
    tmp_path: Path, gpus: int, workers: str
) -> None:
    words, environment = batch(tmp_path, gpus)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch("[0-9a-f]{64}", (tmp_path / "token").read_text())
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not Path(environment["RAY_AUTH_TOKEN_PATH"]).exists()
    assert words[words.index("--address") + 1] == "127.0.0.1:6379"
    arguments = cli.parser().parse_args(words[words.index("--") + 2 :])
    gpu = getattr(arguments, "training.device") == "cuda"
    assert (str(arguments.workers), gpu, arguments.resume) == (workers, gpus > 0, True)
    missing = subprocess.run(
        ["bash", DEPLOY / "slurm/train.sbatch"], capture_output=True, text=True, check=False
    )
    assert missing.returncode != 0
    assert "got no CONFIG.toml, expected: sbatch train.sbatch CONFIG.toml RUN" in missing.stderr


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_installs_what_dev_does_and_is_pinned(kind: str) -> None:
    text = (DEPLOY / f"docker/Dockerfile.{kind}").read_text()
    alone, rest = re.findall(
        r"-m pip install -q --disable-pip-version-check (.*)", (ROOT / "dev").read_text()
    )
    lines = re.findall(r"-m pip install --no-cache-dir (.*?)(?: \\)?\n", text)
    assert lines == [
        alone,
        rest.replace('"$1"', f"deploy/requirements-{kind}.txt") + " -e '.[ray]'",
    ]
    base = "cpu" if kind == "cpu" else "gpu"
    assert re.findall("^FROM (.*)", text, re.MULTILINE) == [
        f"rayproject/ray:{PINS['ray']}-py311-{base}"
    ]
    assert f" -t {IMAGE}-{kind} ." in text.splitlines()[0]
    copied = {
        source
        for line in re.findall("^COPY (.*)", text, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert {"pyproject.toml", "README.md", "LICENSE", "deploy", "shardemb"} == copied
    assert all((ROOT / source).exists() for source in copied)
    assert re.findall("^USER (.*)", text, re.MULTILINE)[-1] == "1000"
    assert "RAY_AUTH_MODE=token" in text.split("ENV ")[1].splitlines()[0]


#: fields of KubeRay 1.6's ray.io/v1, as its reference names them: no schema of them is to be had
#: offline
FIELDS = {
    "RayCluster": {
        "authOptions",
        "enableInTreeAutoscaling",
        "headGroupSpec",
        "rayVersion",
        "suspend",
        "workerGroupSpecs",
    },
    "authOptions": {"mode", "secretName"},
    "headGroupSpec": {
        "headService",
        "labels",
        "rayStartParams",
        "resources",
        "serviceType",
        "template",
    },
    "workerGroupSpecs": {
        *(
            "groupName",
            "idleTimeoutSeconds",
            "labels",
            "maxReplicas",
            "minReplicas",
            "numOfHosts",
            "rayStartParams",
        ),
        *("replicas", "resources", "scaleStrategy", "template"),
    },
    "RayJob": {
        *(
            "activeDeadlineSeconds",
            "backoffLimit",
            "clusterSelector",
            "deletionStrategy",
            "entrypoint",
            "entrypointNumCpus",
        ),
        *(
            "entrypointNumGpus",
            "entrypointResources",
            "jobId",
            "metadata",
            "rayClusterSpec",
            "runtimeEnvYAML",
        ),
        *(
            "shutdownAfterJobFinishes",
            "submissionMode",
            "submitterConfig",
            "submitterPodTemplate",
            "suspend",
        ),
        "ttlSecondsAfterFinished",
    },
}
CLUSTER: dict[str, Any] = DOCUMENTS["raycluster.yaml"]["spec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
PODS = [group["template"] for group in GROUPS]


def test_manifests_are_valid() -> None:
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    for name in ("networkpolicy.yaml", "storage.yaml"):
        kubernetes_validate.validate(DOCUMENTS[name], version, strict=True)
    for template in PODS:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template["metadata"],
            "spec": template["spec"],
        }
        kubernetes_validate.validate(pod, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError, match="securtyContext"):
            kubernetes_validate.validate(
                pod | {"spec": template["spec"] | {"securtyContext": {}}}, version, strict=True
            )
    job = DOCUMENTS["rayjob.yaml"]
    assert {DOCUMENTS[name]["apiVersion"] for name in ("raycluster.yaml", "rayjob.yaml")} == {
        "ray.io/v1"
    }
    assert (DOCUMENTS["raycluster.yaml"]["kind"], job["kind"]) == ("RayCluster", "RayJob")
    assert job["spec"]["rayClusterSpec"] == CLUSTER
    for name, told in (
        ("RayCluster", CLUSTER),
        ("RayJob", job["spec"]),
        *((name, CLUSTER[name]) for name in CLUSTER),
    ):
        if isinstance(told, dict):
            assert set(told) <= FIELDS[name]
    for group in GROUPS:
        assert group["rayStartParams"] == {
            key: str(value) for key, value in group["rayStartParams"].items()
        }
    for group in CLUSTER["workerGroupSpecs"]:
        assert set(group) <= FIELDS["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_pods_have_no_more_rights_than_they_need() -> None:
    assert CLUSTER["authOptions"]["mode"] == "token"
    assert CLUSTER["headGroupSpec"]["serviceType"] == "ClusterIP"
    secret = (
        f"kubectl create secret generic {CLUSTER['authOptions']['secretName']} -n shardemb"
        " --from-file=auth_token=/dev/stdin"
    )
    assert secret in (DEPLOY / "README.md").read_text()
    claim = DOCUMENTS["storage.yaml"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in PODS:
        spec, (container,) = template["spec"], template["spec"]["containers"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["image"] == f"{IMAGE}-cuda"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert 10001 not in {port["containerPort"] for port in container.get("ports", ())}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in map(dict, spec["volumes"])}
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert int(shared["sizeLimit"][:-2]) < int(container["resources"]["limits"]["memory"][:-2])
        assert volumes[mounts["/mnt/shardemb"]]["persistentVolumeClaim"] == {
            "claimName": claim["metadata"]["name"]
        }
    assert all(
        "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"]["limits"]
        for template in PODS[1:]
    )
    assert CLUSTER["rayVersion"] == PINS["ray"]


def test_the_network_policy_lets_in_the_pods_and_the_operator_alone() -> None:
    spec = DOCUMENTS["networkpolicy.yaml"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    own = {"podSelector": {"matchLabels": LABELS}}
    assert own["podSelector"] == spec["podSelector"]
    assert all(template["metadata"]["labels"] == LABELS for template in PODS)
    pods, operator = spec["ingress"]
    assert pods == {"from": [own]}
    (peer,) = operator["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "kuberay-system"
    }
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    pods, names = spec["egress"]
    assert pods == {"to": [own]}
    assert {port["port"] for port in names["ports"]} == {53}


def test_a_job_that_is_tried_again_goes_on() -> None:
    spec = DOCUMENTS["rayjob.yaml"]["spec"]
    ((_, *words),) = invocations(spec["entrypoint"])
    arguments = cli.parser().parse_args(words)
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert arguments.resume
    assert getattr(arguments, "training.device") == "cuda"
    assert Path("/mnt/shardemb") in arguments.output.parents
    least, most = map(int, arguments.workers.split(":"))
    assert 0 < least <= most == sum(group["replicas"] for group in CLUSTER["workerGroupSpecs"])


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_launcher_files_are_valid_and_closed(path: Path) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(DOCUMENTS[path.name])
    util.validate_config(prepared)
    with pytest.raises(Exception, match="clustername"):
        util.validate_config(prepared | {"clustername": "misspelt"})
    assert prepared["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert (
        prepared["setup_commands"]
        == prepared["head_setup_commands"]
        == prepared["worker_setup_commands"]
        == []
    )
    head, worker = (
        prepared["head_start_ray_commands"][-1],
        prepared["worker_start_ray_commands"][-1],
    )
    assert head.startswith(f"{TOKEN}ray start --head ")
    assert "--dashboard-host=127.0.0.1" in head.split()
    assert worker.startswith(f"{TOKEN}ray start --address=$RAY_HEAD_IP:6379")
    assert prepared["docker"]["image"] == f"{IMAGE}-cuda"
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(
        prepared["docker"]["run_options"]
    )
    for kind in prepared["available_node_types"].values():
        if path.stem == "aws":
            assert kind["node_config"]["SecurityGroupIds"]  # Ray's own opens SSH to the world
            assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_no_secret_lies_in_deploy() -> None:
    for path in DEPLOY.glob("*/*"):
        if path.is_file():
            assert not re.search("[0-9a-f]{32}|BEGIN .*KEY|kind: Secret", path.read_text()), path


@pytest.mark.parametrize(
    "path", [DEPLOY / "README.md", ROOT / "docs/security.md"], ids=lambda path: path.name
)
def test_linked_files_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target


def head_of(file: str, folder: Path) -> tuple[dict[str, str], list[str], str]:
    """The environment and options that a file starts a head with, and the token.

    Which is where the file says it is.
    """
    token = "0123456789abcdef" * 4
    if file == "raycluster.yaml":
        options = [
            f"--{key}={value}" for key, value in CLUSTER["headGroupSpec"]["rayStartParams"].items()
        ]
        return (
            {"RAY_AUTH_MODE": CLUSTER["authOptions"]["mode"], "RAY_AUTH_TOKEN": token},
            options,
            token,
        )
    if file == "train.sbatch":
        words, environment = batch(folder, gpus=0)
        words = words[: words.index("--")]
        for name in ("ray", "symmetric-run", "--address", "127.0.0.1:6379", "--min-nodes", "2"):
            words.remove(name)
        path = Path(environment["RAY_AUTH_TOKEN_PATH"])
        path.write_bytes((folder / "token").read_bytes())  # the script, which is done, took it away
        return (
            {name: environment[name] for name in environment if name.startswith("RAY_")},
            words,
            path.read_text(),
        )
    words = shlex.split(DOCUMENTS[file]["head_start_ray_commands"][-1])
    (folder / ".ray").mkdir()
    (folder / ".ray/auth_token").write_text(token)
    at = words.index("ray")
    assert words[at : at + 3] == ["ray", "start", "--head"]
    return dict(word.split("=") for word in words[:at]), words[at + 3 :], token


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def marked(mark: str) -> list[int]:
    """The processes of this machine that have the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found


@contextmanager
def head(file: str) -> Iterator[tuple[int, str, str]]:
    """A head as the file starts it, but on 127.0.0.1, on free ports and small.

    The dashboard's port, the token, the mark.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:  # sockets' paths are short
        environment, options, token = head_of(file, Path(name))
        port, mark = free_port(), f"SHARDEMB_TEST_HEAD={name}"
        ours = ("--port=", "--autoscaling-config=") + (
            ("--dashboard-host=",) if "--dashboard-host=0.0.0.0" in options else ()
        )
        options = [option for option in options if not option.startswith(ours)]
        for option, value in (
            *(
                ("port", free_port()),
                ("dashboard-port", port),
                ("dashboard-agent-listen-port", free_port()),
            ),
            *(
                ("ray-client-server-port", free_port()),
                ("node-ip-address", "127.0.0.1"),
                ("include-dashboard", "true"),
            ),
            *(("object-store-memory", 80_000_000), ("temp-dir", f"{name}/r")),
        ):
            options.append(f"--{option}={value}")
        here = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": name,
            "SHARDEMB_TEST_HEAD": name,
        }
        here["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
            "0"  # or Ray takes another address of this machine than 127.0.0.1
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options]
        try:
            done = subprocess.run(
                command,
                env=here | environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            yield port, token, mark
        finally:
            for _ in range(50):  # those that were just being started, too
                if not (left := marked(mark)):
                    break
                for process in left:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.1)
            assert not left


def post(port: int, token: str | None) -> tuple[int, str]:
    """What the Jobs server answers to a request without a job in it; waits until it is there."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request(
                "POST", "/api/jobs/", "{}", {"Authorization": f"Bearer {token}"} if token else {}
            )
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "no dashboard after 60 s"
            time.sleep(0.2)
        finally:
            connection.close()


def listeners(processes: list[int]) -> Iterator[tuple[str, str]]:
    """The command and the address, as /proc writes it.

    Of every TCP socket that these processes listen on.
    """
    inodes = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes[f"socket:[{fields[9]}]"] = fields[1].rpartition(":")[0]
    for process in processes:
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                if (address := inodes.get(str(link.readlink()))) is not None:
                    yield (
                        Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(),
                        address,
                    )


@pytest.mark.ray
@pytest.mark.parametrize("file", ["on-prem.yaml", "raycluster.yaml", "train.sbatch"])
def test_a_stranger_who_submits_a_job_gets_401(file: str) -> None:
    pytest.importorskip("ray")
    with head(file) as (port, token, mark):
        assert post(port, None) == (401, "Unauthorized: Missing authentication token")
        assert post(port, "0" * 64)[0] == 403
        status, text = post(port, token)
        assert status == 400
        assert "entrypoint" in text  # who has the token is only told that there is no job in it
        table = (ROOT / "docs/security.md").read_text().partition("## Who listens where")[2]
        told = [
            name
            for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
            for name in re.findall("`(.*?)`", row)
        ]
        seen = set()
        for command, address in listeners(marked(mark)):
            program = " ".join(command.split()[:3])
            *_, name = [name for name in told if name in program] or [""]
            assert name, f"{command}: listens, and docs/security.md does not say so"
            assert address in ("0100007F", "0000000000000000FFFF00000100007F"), command
            seen.add(name)
        assert {"gcs_server", "raylet", "dashboard.py"} <= seen


@pytest.mark.ray
def test_a_job_that_is_submitted_trains_on_the_cluster(tmp_path: Path) -> None:
    """From a folder that Ray brings to the cluster; what it writes lies where all nodes see it."""
    pytest.importorskip("ray")
    job, run = tmp_path / "job", tmp_path / "run"
    (job / "graph").mkdir(parents=True)
    ring = [f"e{i}\tr{k}\te{(i + k + 1) % 83}\n" for i in range(83) for k in range(3)]
    for split, lines in (("train", ring), ("valid", ring[::9]), ("test", ring[5::9])):
        (job / f"graph/{split}.tsv").write_text("".join(lines))
    (job / "job.toml").write_text(
        'dataset = "graph"\n[model]\ndim = 12\n[training]\nepochs = 2\n[launch]\nworkers = 2\n'
    )
    with head("on-prem.yaml") as (port, token, _):
        post(port, token)
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--address",
            f"http://127.0.0.1:{port}",
        ]
        command += [
            "--working-dir",
            str(job),
            "--",
            sys.executable,
            "-m",
            "shardemb",
            "train",
            "job.toml",
        ]
        command += ["--output", str(run), "--launcher", "ray", "--address", "auto"]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test filtered mrr" in done.stdout
    records = read_metrics(run / "metrics.jsonl")
    assert records[-1]["kind"] == "test"
    assert len(records[0]["memory_bytes"]) == 2


@pytest.mark.ray
def test_from_the_images_no_ray_starts_without_a_token(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (line,) = re.findall("^ENV (.*)", (DEPLOY / "docker/Dockerfile.cpu").read_text(), re.MULTILINE)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | dict(
        word.split("=") for word in line.split()
    )
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        f"--temp-dir={tmp_path}/r",
        f"--port={free_port()}",
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "no authentication token was found" in done.stderr
