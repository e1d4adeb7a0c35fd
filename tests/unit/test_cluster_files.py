"""Every file in `cluster/` is valid by the schema of whoever reads it, and none of them contradicts another or the package."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Set
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
KUBERAY = Path(os.environ.get("DISTILL_KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")
"""Where KubeRay's custom resource definitions lie, `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml`."""
LAUNCHED = ("aws.yaml", "gcp.yaml", "on-premise.yaml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
RAY_LEAVES = {"provider", "file_mounts", "resources", "node_config"}
KUBERAY_LEAVES = {"rayStartParams", "requests", "limits"}
"""Mappings in which a schema allows any key."""


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def files() -> list[Path]:
    return sorted(path for path in CLUSTER.rglob("*") if path.is_file())


def misspelt(value: Any, free: Set[str], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The document `value` once for each of its keys, with that key misspelt; without those below a key in `free`."""
    if path and path[-1] in free:
        return
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in pairs:
        if isinstance(value, dict) and path[-1:] != ("available_node_types",):  # whose keys are names
            yield ".".join((*path, str(key))), {(f"{k}x" if k == key else k): v for k, v in pairs}
        for where, changed in misspelt(inner, free, (*path, str(key))):
            copy = deepcopy(value)
            copy[key] = changed
            yield where, copy


def assert_only_valid_as_written(document: Any, check: Callable[[Any], object], free: Set[str] = frozenset()) -> None:
    check(document)
    tried, unnoticed = 0, []
    for where, changed in misspelt(document, free):
        tried += 1
        try:
            check(changed)
        except Exception:
            continue
        unnoticed.append(where)
    assert tried and not unnoticed


# The cluster launcher


def check_launcher(config: dict[str, Any]) -> dict[str, Any]:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(config, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    prepared = prepare_config(deepcopy(config))  # with the provider's defaults filled in
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHED)
def test_launcher_files_are_valid_for_ray(name: str) -> None:
    assert_only_valid_as_written(read(name), check_launcher, RAY_LEAVES)
    prepared = check_launcher(read(name))
    assert prepared["docker"]["image"] and "pip install" not in str(prepared), "the image has everything"


def test_node_types_of_aws_are_valid_for_ec2() -> None:
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape

    def check(node: dict[str, Any]) -> None:
        report = ParamValidator().validate(node | {"MinCount": 1, "MaxCount": 1}, shape)
        if report.has_errors():
            raise ValueError(report.generate_report())

    for kind in read("aws.yaml")["available_node_types"].values():
        assert_only_valid_as_written(kind["node_config"], check)


def test_node_types_of_gcp_are_valid_for_compute_engine() -> None:
    from googleapiclient.discovery_cache import get_static_doc

    document = get_static_doc("compute", "v1")
    assert document is not None
    schemas = json.loads(document)["schemas"]

    def check(value: Any, schema: dict[str, Any]) -> None:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if schema["type"] == "array":
            for item in value:
                check(item, schema["items"])
        elif schema["type"] == "object":
            for key, inner in value.items():
                check(inner, schema["properties"][key])
        else:
            kind = {"string": str, "boolean": bool, "integer": int}[schema["type"]]
            assert isinstance(value, kind) or schema.get("format") == "int64"
            assert value in schema.get("enum", [value])

    for kind in read("gcp.yaml")["available_node_types"].values():
        assert_only_valid_as_written(kind["node_config"], lambda node: check(node, {"$ref": "Instance"}))


# KubeRay


def resource_schema(kind: str) -> dict[str, Any]:
    file = KUBERAY / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"no {file}: set DISTILL_KUBERAY_CRDS to the folder of KubeRay's custom resource definitions")
    definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    jsonschema.Draft202012Validator.check_schema(schema)
    schema["properties"]["metadata"] |= {"properties": {"name": {}, "generateName": {}}, "additionalProperties": False}
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as a JSON schema that refuses what the API server would drop."""
    closed_ = {key: closed(value) if isinstance(value, dict) else value for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        closed_ = {key: value for key, value in closed_.items() if key != "anyOf"} | {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and schema.get("x-kubernetes-preserve-unknown-fields") is not True:
        closed_["additionalProperties"] = False
    return closed_


def check_resource(document: dict[str, Any]) -> None:
    kind = document["kind"]
    assert (document["apiVersion"], kind) in {("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob")}
    resource_validator(kind).validate(document)


@cache
def resource_validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(resource_schema(kind))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_manifests_are_valid_for_kuberay(name: str) -> None:
    assert_only_valid_as_written(read(f"kuberay/{name}"), check_resource, KUBERAY_LEAVES)


@pytest.mark.parametrize("option", sorted(p.name for p in (CLUSTER / "kuberay" / "options").iterdir()))
def test_options_are_valid_patches(option: str) -> None:
    patch = read(f"kuberay/options/{option}")
    patched = read("kuberay/raycluster.yaml")
    assert not set(patch["spec"]) & set(patched["spec"]), "an option adds, so that merging is no more than this"
    assert_only_valid_as_written(patch, lambda p: check_resource(patched | {"spec": patched["spec"] | p["spec"]}))


def test_storage_claim_is_valid() -> None:
    claim = read("kuberay/storage.yaml")
    volumes = resource_validator("RayCluster").schema["properties"]["spec"]["properties"]["headGroupSpec"]["properties"][
        "template"
    ]
    volumes = volumes["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    template = volumes["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]
    validator = jsonschema.Draft202012Validator(template["spec"])
    assert_only_valid_as_written(claim["spec"], validator.validate, KUBERAY_LEAVES)
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    (volume,) = read("kuberay/raycluster.yaml")["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_a_job_gets_the_cluster_that_stands() -> None:
    spec = read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    head = spec["headGroupSpec"]["template"]["spec"]
    (job,) = (volume for volume in head["volumes"] if "configMap" in volume)
    (mount,) = (mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == job["name"])
    assert read("kuberay/rayjob.yaml")["spec"]["entrypoint"].split()[2].startswith(mount["mountPath"] + "/")
    head["volumes"].remove(job)
    head["containers"][0]["volumeMounts"].remove(mount)
    assert spec == read("kuberay/raycluster.yaml")["spec"]


def test_no_pod_may_more_than_it_must() -> None:
    spec = read("kuberay/raycluster.yaml")["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert spec["authOptions"] == {"mode": "token"}
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "USER 1000:1000\n" in (CLUSTER / "Dockerfile").read_text()


# Commands


@pytest.mark.parametrize("script", sorted(path.name for path in CLUSTER.glob("*.sh")))
def test_scripts_are_sound(script: str) -> None:
    assert subprocess.run(["bash", "-n", CLUSTER / script], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on this machine; bash read the script")
    found = subprocess.run(["shellcheck", CLUSTER / script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def flags(command: str) -> set[str]:
    return {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}


def test_commands_of_ray_take_their_flags() -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    for name in LAUNCHED:
        config = read(name)
        for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
            if command != "ray stop":
                assert command.startswith("ray start ") and flags(command) <= options_of(start)
    script = (CLUSTER / "slurm.sh").read_text().replace("\\\n", " ")
    (run,) = re.findall(r"ray symmetric-run (.*?) -- ", script)
    forbidden = {"--head", "--node-ip-address", "--port", "--block"}  # of `ray start`, as symmetric-run's help has it
    assert {"--address", "--min-nodes", "--num-gpus"} <= flags(run)
    assert flags(run) <= options_of(symmetric_run) | (options_of(start) - forbidden)
    assert not flags("--min-node=1") <= options_of(symmetric_run) | options_of(start)


def test_the_mlflow_server_takes_its_flags() -> None:
    from mlflow.cli import server

    command = read("mlflow/compose.yaml")["services"]["mlflow"]["command"]
    assert command[:2] == ["mlflow", "server"] and flags(shlex.join(command)) <= options_of(server)


def shell_blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (CLUSTER / "README.md").read_text(), flags=re.DOTALL)


def test_verbs_and_their_flags_are_those_of_the_command() -> None:
    import typer

    from orchestrator.cli import app

    verbs: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    named = {verb for file in files() for verb in re.findall(r"\bdistill ([a-z]+)\b", file.read_text())}
    assert {"run", "submit"} <= named <= set(verbs)
    for line in "".join(shell_blocks()).splitlines():
        if line.startswith("distill "):
            assert flags(line) <= options_of(verbs[line.split()[1]]), line


def test_shell_of_the_readme_is_sound() -> None:
    for block in shell_blocks():
        assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0, block
    written = {name for block in shell_blocks() for name in re.findall(r"^([A-Z_]+)=", block, flags=re.MULTILINE)}
    assert written == set(re.findall(r"\$\{(\w+):\?\}", (CLUSTER / "mlflow" / "compose.yaml").read_text()))


# Versions


def test_every_file_names_the_same_versions() -> None:
    python = re.findall(r"^FROM python:([\d.]+)", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    ((version, ray, tag),) = {
        match for file in files() for match in re.findall(r"distill:([\d.]+)-ray([\d.]+)-py(\d+)", file.read_text())
    }
    assert (version, ray) == (PROJECT["version"], PINS["ray"])
    assert [tag] == [p.replace(".", "") for p in python] and f">={python[0]}" == PROJECT["requires-python"]
    for document in (read("kuberay/raycluster.yaml")["spec"], read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]):
        assert document["rayVersion"] == PINS["ray"]
    torch = [line for line in PROJECT["dependencies"] if line.startswith("torch>")]
    assert re.findall(r'"(torch>.*?)"', (CLUSTER / "Dockerfile").read_text()) == torch
    assert re.findall(r"\.\[(\w+)\]", (CLUSTER / "Dockerfile").read_text()) == ["cluster"]
    assert "cluster" in PROJECT["optional-dependencies"]


def test_secrets_are_referred_to_and_never_written() -> None:
    secret = re.compile(r"(?i)(password|secret(_access)?_key|token)$")
    for service in read("mlflow/compose.yaml")["services"].values():
        for name, value in service["environment"].items():
            assert not secret.search(name) or value is None or re.fullmatch(r"\$\{\w+:\?\}", value), name
    for file in files():
        assert not re.search(r"://[^/\s:@]+:[^$/\s@]+@", file.read_text()), f"a password in an address in {file}"
