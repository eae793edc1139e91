"""A launch as a manifest of Kubernetes: an indexed Job, one pod a host, and a name by which they find the first."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from llmtrain.errors import UserError
from llmtrain.launching.plan import PORT, LaunchPlan
from llmtrain.launching.variables import refuse_secrets
from llmtrain.training import exit_codes

_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST = 52
"""Of a Job's name: its pods are NAME-INDEX-xxxxx, and a host name has 63 characters."""


@dataclass(frozen=True)
class KubernetesOptions:
    """What Kubernetes is asked for, beyond the plan.

    Attributes:
        image: of the container; llmtrain is installed in it.
        namespace: None for that of kubectl's context.
        volume_claims: `CLAIM:/path`, existing PersistentVolumeClaims; the first one's path is the working directory
            where `workdir` is None.
        workdir: folder from which the launch runs, and below which runs/ goes; None for the first claim's, or the
            image's.
        secrets: `VARIABLE=SECRET/KEY`, or `SECRET` for all of its keys.
        requests: `RESOURCE=QUANTITY` beside the GPUs, such as cpu=32 or memory=200Gi.
        gpu_resource: name of the resource that is a GPU.
        node_selector: `LABEL=VALUE` of the nodes.
        shared_memory: size of /dev/shm, which loaders and NCCL use; it counts as memory of the pod.
        service_account: None for the namespace's.
        retries: how often a pod is replaced after failures; evictions and preemptions do not count.
        grace: seconds to save in after SIGTERM.
    """

    image: str = ""
    namespace: str | None = None
    volume_claims: tuple[str, ...] = ()
    workdir: str | None = None
    secrets: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: tuple[str, ...] = ()
    shared_memory: str = "16Gi"
    service_account: str | None = None
    retries: int = 5
    grace: int = 300


def manifest(plan: LaunchPlan, options: KubernetesOptions, *, save_folder: str | None) -> str:
    """The manifest, for `kubectl apply -f -`: a Job, and a headless Service where there are several hosts.

    Args:
        plan: of the launch.
        options: for Kubernetes.
        save_folder: of the recipe: checkpoints must outlive the pod.

    Raises:
        UserError: an option that Kubernetes would refuse, a secret that would stand in the manifest, or checkpoints
            that would go with the pod.
    """
    refuse_secrets(
        plan, "Put it into a Secret of Kubernetes, and name that: --secret-env {key}=SECRET/KEY (never the value)."
    )
    if not options.image.strip():
        raise UserError("--image: the container's image, with llmtrain installed in it")
    name = job_name(plan.run_name)
    _check_checkpoints(save_folder, _folders(options.volume_claims), options.workdir)
    documents = [_service(name, options)] if plan.nodes > 1 else []
    documents.append(_job(name, plan, options))
    return _HEAD + "---\n".join(_commented(document) for document in documents)


def job_name(run_name: str) -> str:
    """A run's name as Kubernetes takes it: lower case, digits and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower())[:_LONGEST].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")  # a Service's name begins with a letter


def container_command(name: str, plan: LaunchPlan, grace: int) -> list[str]:
    """What each pod runs: our launch restarts ranks in place, and its exit code tells what a pod's end means."""
    command = ["llmtrain", "launch", "--nodes", str(plan.nodes), "--gpus-per-node", str(plan.gpus_per_node)]
    if plan.nodes > 1:
        # The first pod's name; it resolves before the pod is ready.
        command += ["--scheduler", "torchrun", "--rdzv-endpoint", f"{name}-0.{name}:{PORT}"]
        if plan.is_elastic:
            command += ["--min-nodes", str(plan.min_nodes)]
        if plan.rdzv_conf:
            command += ["--rdzv-conf", plan.rdzv_conf]
    else:
        command += ["--scheduler", "local"]
    command += ["--max-restarts", str(plan.max_restarts), "--grace", str(grace)]
    return [*command, *plan.arguments]


def _service(name: str, options: KubernetesOptions) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, options),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _job(name: str, plan: LaunchPlan, options: KubernetesOptions) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, options),
        "spec": {
            "completionMode": "Indexed",
            "completions": plan.nodes,
            "parallelism": plan.nodes,
            "backoffLimitPerIndex": _not_negative("--pod-retries", options.retries),
            "maxFailedIndexes": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    _exit_codes("FailJob", sorted(exit_codes.POINTLESS)),
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    _exit_codes("Ignore", [exit_codes.PREEMPTED]),
                ]
            },
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/name": "llmtrain"}},
                "spec": _pod(name, plan, options),
            },
        },
    }


def _exit_codes(action: str, values: list[int]) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": "train", "operator": "In", "values": values}}


def _pod(name: str, plan: LaunchPlan, options: KubernetesOptions) -> dict[str, Any]:
    claims = _folders(options.volume_claims)
    grace = options.grace
    if grace < 1:
        raise UserError("--grace: ranks need seconds to save in; 300 is usual")
    spec: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": grace + 60}
    if plan.nodes > 1:
        spec["subdomain"] = name
    if options.service_account is not None:
        spec["serviceAccountName"] = options.service_account
    if options.node_selector:
        spec["nodeSelector"] = dict(_pair("--node-selector", given) for given in options.node_selector)
    if plan.on_gpu:
        spec["tolerations"] = [{"key": options.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    container: dict[str, Any] = {
        "name": "train",
        "image": options.image,
        # $(X) would be a variable to Kubernetes.
        "command": [word.replace("$(", "$$(") for word in container_command(name, plan, grace)],
    }
    if workdir := options.workdir or next(iter(claims.values()), None):
        container["workingDir"] = workdir
    environment = [*_plain(plan), *_single_secrets(options.secrets)]
    if environment:
        container["env"] = environment
    if whole := [given for given in options.secrets if "=" not in given]:
        container["envFrom"] = [{"secretRef": {"name": _kubernetes_name("--secret-env", given)}} for given in whole]
    if resources := _resources(plan, options):
        container["resources"] = resources
    container["volumeMounts"] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    _quantity("--shm-size", options.shared_memory)
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}}
    ]
    for number, (claim, path) in enumerate(claims.items()):
        container["volumeMounts"].append({"name": f"claim-{number}", "mountPath": path})
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
    return {**spec, "containers": [container], "volumes": volumes}


def _resources(plan: LaunchPlan, options: KubernetesOptions) -> dict[str, Any]:
    asked = dict(_pair("--request", given) for given in options.requests)
    for key, value in asked.items():
        _quantity(f"--request {key}", value)
    found: dict[str, Any] = {"requests": asked} if asked else {}
    if plan.on_gpu:
        found["limits"] = {options.gpu_resource: str(plan.gpus_per_node)}
    return found


def _plain(plan: LaunchPlan) -> list[dict[str, Any]]:
    return [{"name": key, "value": value.replace("$(", "$$(")} for key, value in plan.environment.items()]


def _single_secrets(given: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for item in given:
        if "=" not in item:
            continue
        variable, reference = _pair("--secret-env", item)
        secret, slash, key = reference.partition("/")
        if not slash or not re.fullmatch(r"[-._a-zA-Z0-9]+", key) or not _ENVIRONMENT.fullmatch(variable):
            raise UserError(
                f"--secret-env: {variable}=... is not VARIABLE=SECRET/KEY: the names of a Secret of Kubernetes and of "
                "a key in it, never the value"
            )
        name = _kubernetes_name("--secret-env", secret)
        found.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
    return found


def _folders(claims: Sequence[str]) -> dict[str, str]:
    """Paths by claim."""
    found: dict[str, str] = {}
    for given in claims:
        claim, _, path = given.partition(":")
        if not path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise UserError(f"--volume-claim: {given!r} is not CLAIM:/path, such as training:/workspace")
        found[_kubernetes_name("--volume-claim", claim)] = path
    return found


def _check_checkpoints(save_folder: str | None, claims: dict[str, str], workdir: str | None) -> None:
    if save_folder is None or "://" in save_folder:
        return
    base = workdir or next(iter(claims.values()), None)
    path = PurePosixPath(base or "/", save_folder)
    if base is None or not any(path.is_relative_to(folder) for folder in claims.values()):
        raise UserError(
            f"save_folder: {save_folder!r} would go with the pod. Give --volume-claim CLAIM:/path for a volume that "
            "holds it (ReadWriteMany where there are several hosts), or a save_folder with a URL, such as s3://..."
        )


def _metadata(name: str, options: KubernetesOptions) -> dict[str, Any]:
    namespace = options.namespace
    where = {"namespace": _kubernetes_name("--namespace", namespace)} if namespace is not None else {}
    return {"name": name, **where, "labels": {"app.kubernetes.io/name": "llmtrain"}}


def _pair(option: str, given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not key or not equals or not value:
        raise UserError(f"{option}: {given!r} is not KEY=VALUE")
    return key, value


def _kubernetes_name(option: str, name: str) -> str:
    if len(name) > 253 or not all(_LABEL.fullmatch(part) for part in name.split(".")):
        raise UserError(f"{option}: {name!r} is no name of Kubernetes: lower case, digits, dashes and dots")
    return name


def _quantity(option: str, value: str) -> None:
    if not _QUANTITY.fullmatch(value):
        raise UserError(f"{option}: {value!r} is no quantity of Kubernetes, such as 16Gi or 500m")


def _not_negative(option: str, value: int) -> int:
    if value < 0:
        raise UserError(f"{option}: 0 or more")
    return value


def _commented(document: dict[str, Any]) -> str:
    """YAML with a comment above what people will ask about."""
    lines = []
    for line in yaml.safe_dump(document, sort_keys=False, width=1000).splitlines():
        key = line.strip().removeprefix("- ")
        if comment := _COMMENTS.get(key.split(":")[0] if key not in _COMMENTS else key):
            indent = " " * (len(line) - len(line.lstrip()))
            lines += [f"{indent}# {text}" for text in comment.split("\n")]
        lines.append(line)
    return "\n".join(lines) + "\n"


_HEAD = """\
# Written by `llmtrain launch --scheduler kubernetes`. Edit it freely; kubectl apply -f FILE. Kubernetes 1.29 or newer.
#
# One pod a host. Each runs `llmtrain launch`, which starts a rank a GPU and starts them again when one crashes.
# A pod that is evicted or preempted has its ranks save first; it is replaced, and the run continues.
# All of it starts over with kubectl delete and apply: the run continues from its newest checkpoint then, too.
"""

_COMMENTS = {
    "kind: Service": "Gives the pods names: NAME-0.NAME is the first, where the others meet.",
    "publishNotReadyAddresses": "Pods look for each other before they are ready.",
    "backoffLimitPerIndex": "How often a pod is replaced that failed. Crashed ranks start again without that.",
    "podReplacementPolicy": "Not before the old pod has saved and gone: both would be the same host.",
    "action: FailJob": "2: a mistake in the recipe. 3: stopped by bad_steps. The same would happen again.",
    "onPodConditions": "Evicted, preempted, the node drained: does not count as a failure.",
    "terminationGracePeriodSeconds": "Time to save in after SIGTERM, and to end.",
    "emptyDir": "Loaders and NCCL share memory between processes; the default of 64 MB ends runs with SIGBUS.",
    "persistentVolumeClaim": "ReadWriteMany where there are several hosts.",
}
