"""The manifest, against the schemas of Kubernetes' API."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.errors import UserError
from llmtrain.launching.kubernetes import KubernetesOptions, container_command, job_name, manifest
from llmtrain.launching.plan import LaunchPlan

PLAN = LaunchPlan(
    Path("yamls/x.yaml"), ("model.n_layers=2",), run_name="x", nodes=2, min_nodes=2, gpus_per_node=8, max_restarts=4
)
OPTIONS = KubernetesOptions(
    image="registry.example/llmtrain:1",
    namespace="ml",
    volume_claims=("training:/workspace", "data:/data"),
    secrets=("WANDB_API_KEY=wandb/key", "s3-keys"),
    requests=("cpu=32", "memory=200Gi"),
    node_selector=("gpu.example/kind=h100",),
    service_account="trainer",
    grace=120,
)
SAVE = "runs/{run_name}/checkpoints"


def documents(plan: LaunchPlan = PLAN, options: KubernetesOptions = OPTIONS, save: str | None = SAVE) -> list[Any]:
    return list(yaml.safe_load_all(manifest(plan, options, save_folder=save)))


def job(plan: LaunchPlan = PLAN, options: KubernetesOptions = OPTIONS) -> Any:
    return documents(plan, options)[-1]


def pod(plan: LaunchPlan = PLAN, options: KubernetesOptions = OPTIONS) -> Any:
    return job(plan, options)["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", ["1.29", "1.31"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_it_is_what_the_api_takes(version: str, nodes: int, on_gpu: bool) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    plan = replace(PLAN, nodes=nodes, min_nodes=nodes, on_gpu=on_gpu, environment={"A": "b"})
    for document in (*documents(plan), *documents(plan, KubernetesOptions(image="x"), "s3://b/c")):
        validate(document, version, strict=True)


def test_the_schemas_would_find_a_typo() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    wrong = job()
    wrong["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.29", strict=True)


def test_one_pod_a_host_that_finds_the_first() -> None:
    service, made = documents()
    assert (service["kind"], service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == (
        *("Service", "None"),
        True,
    )
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": made["metadata"]["name"]}
    assert (made["spec"]["completions"], made["spec"]["parallelism"]) == (2, 2)
    spec = made["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]
    (container,) = spec["containers"]
    command = container["command"]
    assert command[command.index("--rdzv-endpoint") + 1] == "x-0.x:29500"
    assert command[-2:] == ["yamls/x.yaml", "model.n_layers=2"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["workingDir"] == "/workspace"
    assert spec["terminationGracePeriodSeconds"] > int(command[command.index("--grace") + 1]) == 120


def test_one_host_needs_no_service() -> None:
    made = documents(replace(PLAN, nodes=1, min_nodes=1))
    assert [document["kind"] for document in made] == ["Job"]
    command = made[0]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--scheduler") + 1] == "local"
    assert "--rdzv-endpoint" not in command


def test_exit_codes_decide_what_follows() -> None:
    rules = job()["spec"]["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"] for rule in reversed(rules) for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {2: "FailJob", 3: "FailJob", 143: "Ignore"}
    assert {"type": "DisruptionTarget", "status": "True"} in [
        condition for rule in rules for condition in rule.get("onPodConditions", [])
    ]
    assert pod()["restartPolicy"] == "Never"  # a policy of failures is refused otherwise
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {"train"}


def test_shared_memory_is_memory() -> None:
    (volume,) = [volume for volume in pod()["volumes"] if "emptyDir" in volume]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"]}
    assert mounts[volume["name"]] == "/dev/shm"
    assert mounts["claim-1"] == "/data"


def test_secrets_are_named_and_never_shown() -> None:
    container = pod()["containers"][0]
    assert container["env"] == [
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}
    ]
    assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    for plan in (
        replace(PLAN, environment={"HF_TOKEN": "hf_planted"}),
        replace(PLAN, overrides=("loggers.wandb.api_key=planted",)),
    ):
        with pytest.raises(UserError, match="--secret-env") as caught:
            documents(plan)
        assert "planted" not in str(caught.value)


def test_text_that_kubernetes_would_expand_stays_as_it_is() -> None:
    plan = replace(PLAN, overrides=("run_name=$(X)",), environment={"A": "$(B)"})
    container = pod(plan)["containers"][0]
    assert container["command"][-1] == "run_name=$$(X)"
    assert container["env"][0] == {"name": "A", "value": "$$(B)"}


@pytest.mark.parametrize(
    ("run_name", "name"),
    [("MPT-7b_chat.v2", "mpt-7b-chat-v2"), ("7b", "run-7b"), ("x" * 80, "x" * 52), ("__", "run")],
)
def test_a_run_gets_a_name_that_kubernetes_takes(run_name: str, name: str) -> None:
    assert job_name(run_name) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": ""}, "--image"),
        ({"volume_claims": ("training",)}, "--volume-claim"),
        ({"volume_claims": ("training:/a/../b",)}, "--volume-claim"),
        ({"secrets": ("WANDB_API_KEY=abc",)}, "never the value"),
        ({"secrets": ("Not A Name",)}, "--secret-env"),
        ({"requests": ("memory=lots",)}, "--request memory"),
        ({"requests": ("memory",)}, "is not KEY=VALUE"),
        ({"shared_memory": "16 GB"}, "--shm-size"),
        ({"namespace": "A\nb"}, "--namespace"),
        ({"retries": -1}, "--pod-retries"),
        ({"grace": 0}, "--grace"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        documents(options=replace(OPTIONS, **options))
    assert "abc" not in str(caught.value)


def test_checkpoints_that_would_go_with_the_pod_are_refused() -> None:
    nowhere = KubernetesOptions(image="x")
    with pytest.raises(UserError, match=r"save_folder.*--volume-claim"):
        documents(options=nowhere)
    with pytest.raises(UserError, match="save_folder"):
        documents(options=replace(nowhere, volume_claims=("data:/data",), workdir="/workspace"))
    assert documents(options=nowhere, save="s3://bucket/x")
    assert documents(options=replace(nowhere, volume_claims=("data:/data",)), save="/data/checkpoints")


def test_the_command_is_one_of_ours() -> None:
    """Every option that a pod is started with is one that `llmtrain launch` knows."""
    from typer.main import get_command

    from llmtrain.cli import app

    launch = get_command(app).commands["launch"]  # type: ignore[attr-defined]
    for plan in (PLAN, replace(PLAN, min_nodes=1), replace(PLAN, nodes=1, min_nodes=1)):
        command = container_command("x", plan, 300)
        assert command[:2] == ["llmtrain", "launch"]
        launch.make_context("launch", command[2:])
