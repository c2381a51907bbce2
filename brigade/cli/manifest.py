"""`brigade manifest`: a deployment file as Kubernetes objects. Writes YAML; talks to no cluster.

1. ConfigMap: the deployment file as the pods see it, with their own names as the hosts
2. LeaderWorkerSet: the leader pod runs `brigade up`, a worker pod `brigade join`; a pod that is lost restarts alone,
   since the unit re-forms around it
3. Service: clients reach the leader, and only while it is ready
Keys are in a Secret that is named here and made by hand.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.explain import File
from brigade.cli.fault import Fault

if TYPE_CHECKING:
    from brigade.cli.deployed import Deployed
    from brigade.spec.deploy import Deployment

CONFIG, GIVEN_KEYS, KEYS, MODELS, SCRATCH = "/etc/brigade", "/etc/brigade-keys", "/keys", "/models", "/scratch"
API_KEY, SECRET = "api-key", "secret"
PORT, HTTP = 8000, "-http"
USER = 10001
SET_NAME = "leaderworkerset.sigs.k8s.io/name"
WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
"""A DNS label with room for what Kubernetes appends to it."""
ASK_READY = (
    "import urllib.request as r; key = open('{key}').read().strip(); "
    "r.urlopen(r.Request('http://127.0.0.1:{port}/ready', headers={{'Authorization': 'Bearer ' + key}}), timeout=5)"
)
"""/ready wants the key, which must not stand in a manifest: the probe reads it where the server does."""


def manifest(
    file: File,
    image: Annotated[str, typer.Option(help="Container image with the brigade command.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name of all objects, and of the pods.")] = "brigade",
    keys: Annotated[str | None, typer.Option(help="Secret with the keys. Default: NAME-keys.")] = None,
    model_claim: Annotated[
        str | None, typer.Option(help="PersistentVolumeClaim with the checkpoint. Default: the file's folder, by node.")
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores of a pod.")] = 4,
) -> None:
    """Write a deployment file as Kubernetes objects (LeaderWorkerSet), for kubectl apply -f -."""
    import yaml

    from brigade.cli.deployed import Deployed
    from brigade.cli.deployment_file import read_deployment

    if not NAME.fullmatch(name):
        raise Fault(f"--name must be up to 40 small letters, digits and '-', beginning with a letter, not {name!r}", 2)
    secret = keys or f"{name}-keys"
    found = objects(Deployed(file, read_deployment(file)), image, name, secret, model_claim, cpus)
    typer.echo(
        f"# Before the first start: kubectl create secret generic {secret} \\\n"
        f"#   --from-literal={API_KEY}=$(openssl rand -hex 32) --from-literal={SECRET}=$(openssl rand -hex 32)"
    )
    typer.echo(yaml.dump_all(found, Dumper=_dumper(), sort_keys=False, width=120), nl=False)


def objects(
    deployed: "Deployed", image: str, name: str, keys: str, model_claim: str | None, cpus: int
) -> list[dict[str, Any]]:
    """ConfigMap, LeaderWorkerSet and Service. Raises Fault for what `brigade up` would not run."""
    import yaml

    from brigade.cli.explained import cannot_run, is_fleet
    from brigade.spec.config import BadConfig, read_spec
    from brigade.spec.deploy import plain

    d = deployed.what
    try:
        problems = cannot_run(deployed, read_spec(deployed.model))
    except BadConfig as e:
        raise Fault(str(e), 2) from e
    if problems:
        raise Fault(f"{deployed.file}: {problems[0]}", 2)
    if is_fleet(d):
        raise Fault(f"{deployed.file}: units: only one unit of role mixed can be written as Kubernetes objects", 2)
    if d.rank_memory is None:
        raise Fault(f"{deployed.file}: 'rank_memory' is missing; pods ask for memory by it, like rank_memory: 16GiB", 2)
    inside = in_pods(deployed, name)
    volumes = _volumes(deployed, name, keys, model_claim)
    n = len(d.units[0].hosts)
    amount = {"cpu": str(cpus), "memory": str(d.rank_memory * d.units[0].ranks_per_host)}
    leader = _pod(name, image, ["up", f"{CONFIG}/deploy.yaml"], volumes, amount, n)
    leader["spec"]["containers"][0] |= {
        "ports": [{"name": "http", "containerPort": PORT}, {"name": "hosts", "containerPort": d.host_port}],
        **_probes(),
    }
    joining = ["join", f"{CONFIG}/deploy.yaml", "--host", f"$(POD_NAME).{name}"]
    worker = _pod(name, image, joining, volumes, amount, n)
    return [
        {
            **_head("v1", "ConfigMap", name),
            "data": {"deploy.yaml": yaml.safe_dump(plain(inside), sort_keys=False, width=110)},
        },
        {
            **_head("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", name),
            "spec": {
                "replicas": 1,
                "startupPolicy": "LeaderCreated",  # the leader is ready only once the workers have joined it
                "networkConfig": {"subdomainPolicy": "Shared"},
                "leaderWorkerTemplate": {
                    "size": n,
                    "restartPolicy": "None",
                    "leaderTemplate": leader,
                    "workerTemplate": worker,
                },
            },
        },
        {
            **_head("v1", "Service", name + HTTP),  # NAME itself is the headless service of the pods' own names
            "spec": {
                "selector": {SET_NAME: name, WORKER_INDEX: "0"},
                "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
            },
        },
    ]


def pod_name(name: str, worker: int) -> str:
    """The DNS name of a pod of the first group, inside its namespace, under subdomain policy Shared."""
    return f"{name}-0.{name}" if worker == 0 else f"{name}-0-{worker}.{name}"


def in_pods(deployed: "Deployed", name: str) -> "Deployment":
    """The deployment as the pods see it: their names, their folders."""
    d = deployed.what
    units = d.units[0]
    hosts = tuple(pod_name(name, i) for i in range(len(units.hosts)))
    return replace(
        d,
        model=None if d.model is None else _mounted(deployed),
        listen=("0.0.0.0", PORT),
        api_key_file=f"{KEYS}/{API_KEY}",
        secret_file=f"{KEYS}/{SECRET}",
        units=(replace(units, hosts=hosts),),
    )


def _mounted(deployed: "Deployed") -> str:
    """Where the checkpoint is inside a pod: its folder keeps its name, which clients ask for."""
    return f"{MODELS}/{deployed.served_name}"


def _head(version: str, kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": _labels(name.removesuffix(HTTP))}}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "brigade", "app.kubernetes.io/instance": name}


def _volumes(deployed: "Deployed", name: str, keys: str, model_claim: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Mount paths and volumes.

    A Secret that a user other than root can read is readable by a group, too, which `brigade` refuses for keys. So a
    first container copies the keys into memory of the pod, for its user alone.
    """
    out: list[tuple[str, dict[str, Any]]] = [
        (f"{CONFIG}/deploy.yaml", {"name": "deployment", "configMap": {"name": name}}),
        (GIVEN_KEYS, {"name": "given-keys", "secret": {"secretName": keys, "defaultMode": 0o440}}),
        (KEYS, {"name": "keys", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}),
        (SCRATCH, {"name": "scratch", "emptyDir": {}}),
    ]
    if model_claim is not None:
        out.append(
            (
                _mounted(deployed),
                {"name": "model", "persistentVolumeClaim": {"claimName": model_claim, "readOnly": True}},
            )
        )
    elif deployed.what.model is not None:
        out.append(
            (_mounted(deployed), {"name": "model", "hostPath": {"path": str(deployed.model), "type": "Directory"}})
        )
    return out


def _pod(
    name: str,
    image: str,
    args: list[str],
    volumes: list[tuple[str, dict[str, Any]]],
    amount: dict[str, str],
    n_pods: int,
) -> dict[str, Any]:
    mounts = [{"name": v["name"], "mountPath": path, "readOnly": "emptyDir" not in v} for path, v in volumes]
    mounts[0]["subPath"] = "deploy.yaml"
    closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    copy_keys = {
        "name": "keys",
        "image": image,
        "command": ["sh", "-c", f"umask 077 && cp -fL {GIVEN_KEYS}/{API_KEY} {GIVEN_KEYS}/{SECRET} {KEYS}/"],
        "resources": {"requests": amount, "limits": amount},
        "securityContext": closed,
        "volumeMounts": [m for m in mounts if m["name"] in ("given-keys", "keys")],
    }
    container = {
        "name": "brigade",
        "image": image,
        "command": ["brigade", *args],
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "BRIGADE_CACHE", "value": SCRATCH},
            {"name": "HOME", "value": SCRATCH},
        ],
        "resources": {"requests": amount, "limits": amount},
        "securityContext": closed,
        "volumeMounts": [m for m in mounts if m["name"] != "given-keys"],
    }
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 45,  # 30 s for running requests, and the end of the processes
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
        "initContainers": [copy_keys],
        "containers": [container],
        "volumes": [v for _, v in volumes],
    }
    if n_pods > 1:
        apart = {"labelSelector": {"matchLabels": _labels(name)}, "topologyKey": "kubernetes.io/hostname"}
        spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    return {"metadata": {"labels": _labels(name)}, "spec": spec}


def _probes() -> dict[str, Any]:
    """The port opens when the model is loaded; then /health says that it lives, /ready that it answers."""
    health = {"httpGet": {"path": "/health", "port": "http"}}
    ready = ["python", "-c", ASK_READY.format(key=f"{KEYS}/{API_KEY}", port=PORT)]
    return {
        "startupProbe": {**health, "periodSeconds": 5, "failureThreshold": 360},
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": 3},
        "readinessProbe": {"exec": {"command": ready}, "periodSeconds": 5, "timeoutSeconds": 6, "failureThreshold": 1},
    }


def _dumper() -> Any:
    """Writes text of several lines as such, and no aliases for values that are there twice."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper
