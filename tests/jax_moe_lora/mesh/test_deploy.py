"""The files for Slurm and Kubernetes: checked by hand, and run as local processes with the variables of a cluster."""

import json
import math
import re
import shlex
import subprocess

import pytest
import yaml

from jax_moe_lora import Model, demo
from support import ROOT
from support.processes import free_port, outputs, start

SBATCH, KUBERNETES = ROOT / "docs/deploy/generate.sbatch", ROOT / "docs/deploy/generate.yaml"
REQUESTS = [{"prompt": "hello>", "adapter": "upper"}, {"prompt": "hello>"}, {"prompt": "stone>", "adapter": "upper"}]
PORTS = 65535 - 2**12 + 1  # jax takes Slurm's job number modulo 2**12 above it


def documents():
    """The service and the job."""
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERNETES.read_text())}


def container():
    (only,) = documents()["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def srun():
    """The words behind `srun` in the script, and its `#SBATCH` options."""
    text = SBATCH.read_text()
    line = next(line for line in text.replace("\\\n", " ").splitlines() if line.startswith("srun"))
    return shlex.split(line)[1:], dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))


def devices_of(mesh):
    return math.prod(int(entry.split("=")[1]) for entry in mesh.split(","))


def test_the_job_of_kubernetes_is_complete():
    service, job = documents()["Service"], documents()["Job"]
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"
    assert spec["completionMode"] == "Indexed"
    variables = {entry["name"]: entry for entry in container()["env"]}
    assert int(variables["JAX_NUM_PROCESSES"]["value"]) == spec["completions"] == spec["parallelism"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-0.{pod['subdomain']}"
    assert container()["ports"] == [{"containerPort": int(port)}]
    path = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    mesh = next(word for word in container()["args"] if word.startswith("--mesh=")).removeprefix("--mesh=")
    assert devices_of(mesh) == spec["parallelism"] * container()["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_job_of_slurm_is_complete():
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0
    words, options = srun()
    assert set(options) == {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time"}
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # jax gives each task one GPU
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert devices_of(words[words.index("--mesh") + 1]) == tasks


def with_small_things(words, changes):
    """A command's arguments with this machine's model, files and mesh, behind the name of the program."""
    out = []
    for word in words[words.index("generate") + 1 :]:
        option, equals, _ = word.partition("=")
        if option in changes and equals:
            out += [option, changes[option]]
        elif out and out[-1] in changes and not word.startswith("--"):
            out.append(changes[out[-1]])
        else:
            out.append(word)
    return ["-m", "jax_moe_lora.cli.main", "generate", *out, "--dtype", "float32", "--max-new-tokens", "6"]


def slurm(changes):
    """Two tasks as srun would start them."""
    words, port = srun()[0], free_port() % 2**12 + PORTS
    variables = {"SLURM_JOB_ID": str(port - PORTS), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [
        start(with_small_things(words, changes), variables | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
        for n in range(2)
    ]


def kubernetes(changes):
    """Two pods, whose name for the first one is this machine."""
    words = [*container()["command"], *container()["args"]]
    port, pods = free_port(), []
    for number in range(2):
        variables = {entry["name"]: entry.get("value", str(number)) for entry in container()["env"]}
        variables["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        pods.append(start(with_small_things(words, changes), variables))
    return pods


@pytest.mark.slow(200)
def test_local_processes_with_a_clusters_variables_give_the_text_of_one(tmp_path):
    data = demo.data_folder()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    model = Model.from_pretrained(data / "model", dtype="float32", max_adapters=1)
    model.load_adapter(data / "adapters" / "upper", "upper")
    prompts, names = [one["prompt"] for one in REQUESTS], [one.get("adapter") for one in REQUESTS]
    wanted = [out.text for out in model.generate(prompts, names, max_new_tokens=6)]
    assert wanted[0] == "HELLO"
    for cluster in (slurm, kubernetes):
        out = tmp_path / f"{cluster.__name__}.jsonl"
        changes = {
            "--mesh": "expert=2",
            "--model": str(data / "model"),
            "--adapter": f"upper={data / 'adapters' / 'upper'}",
            "--requests": str(tmp_path / "in.jsonl"),
            "--out": str(out),
            "--start-seconds": "900",
        }
        ended = outputs(cluster(changes))
        assert [code for code, _, _ in ended] == [0, 0], "\n".join(err[-3000:] for _, _, err in ended)
        assert [bool(printed) for _, printed, _ in ended] == [True, False]
        assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == wanted
