"""`brigade manifest`: a deployment file as Kubernetes objects. Writes YAML; talks to no cluster.

1. ConfigMap: the deployment file as the pods see it, with their own names as the hosts
2. LeaderWorkerSet: the leader pod runs `brigade up`, a worker pod `brigade join`; a pod that is lost restarts alone,
   since the unit re-forms around it. A fleet has one for its gateway, whose pod has no ranks, and one for each entry of
   `units`, with a group of pods for each unit, which all run `brigade join`
3. Service: clients reach the gateway, and only while it is ready
Keys are in a Secret that is named here and made by hand.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brigade.cli.explain import File
from brigade.cli.fault import Fault

if TYPE_CHECKING:
    from brigade.cli.deployed import Deployed
    from brigade.spec.deploy import Deployment, Units

CONFIG, GIVEN_KEYS, KEYS, MODELS, SCRATCH = "/etc/brigade", "/etc/brigade-keys", "/keys", "/models", "/scratch"
API_KEY, SECRET = "api-key", "secret"
PORT, HTTP, GATEWAY = 8000, "-http", "-gateway"
USER = 10001
SET_NAME = "leaderworkerset.sigs.k8s.io/name"
INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,29}[a-z0-9])?")
"""A DNS label with room for what is appended to it, here and by Kubernetes."""
GATEWAY_MEMORY = "4Gi"
"""Of a pod without ranks: the HTTP server and the tokenizer."""
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
        raise Fault(f"--name must be up to 31 small letters, digits and '-', beginning with a letter, not {name!r}", 2)
    if not image.strip() or image != "".join(image.split()):
        raise Fault(f"--image must be an image's name without spaces, like registry/brigade:0.1, not {image!r}", 2)
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
    """ConfigMap, LeaderWorkerSets and Service. Raises Fault for what `brigade up` would not run."""
    import yaml

    from brigade.cli.explained import cannot_run
    from brigade.cli.ports import is_fleet
    from brigade.spec.config import BadConfig, read_spec
    from brigade.spec.deploy import plain

    d = deployed.what
    try:
        problems = cannot_run(deployed, read_spec(deployed.model, deployed.what.drafts))
    except BadConfig as e:
        raise Fault(str(e), 2) from e
    if problems:
        raise Fault(f"{deployed.file}: {problems[0]}", 2)
    if d.admin_key_file is not None:
        raise Fault(f"{deployed.file}: admin_key_file: Kubernetes objects do not carry it yet; leave it out", 2)
    if d.host_port == PORT:
        raise Fault(f"{deployed.file}: host_port: pods listen for clients on {PORT}; give another one", 2)
    if d.rank_memory is None:
        raise Fault(f"{deployed.file}: 'rank_memory' is missing; pods ask for memory by it, like rank_memory: 16GiB", 2)
    if any(d.limits_of(units).kv_disk for units in d.units):
        raise Fault(f"{deployed.file}: kv_disk: pods written here have no disk for it; leave it out", 2)
    inside = in_pods(deployed, name)
    volumes = _volumes(deployed, name, keys, model_claim)
    make = _Pods(name, image, volumes, str(cpus), sum(len(x.hosts) for u in inside.units for x in u.layouts()))
    alone = None if is_fleet(d) else inside.units[0]
    memory = _memory(inside, alone) if alone else GATEWAY_MEMORY
    up = make.pod("mixed" if alone else "gateway", ["up", f"{CONFIG}/deploy.yaml"], memory)
    up["spec"]["containers"][0] |= {
        "ports": [{"name": "http", "containerPort": PORT}, {"name": "hosts", "containerPort": d.host_port}],
        **_probes(),
    }
    sets = [_one_unit(make, inside, up)] if alone else _fleet(make, inside, up)
    return [
        {
            **_head("v1", "ConfigMap", name),
            "data": {"deploy.yaml": yaml.safe_dump(plain(inside), sort_keys=False, width=110)},
        },
        *sets,
        {
            **_head("v1", "Service", name + HTTP),  # NAME itself is the headless service of the pods' own names
            "spec": {
                "selector": {SET_NAME: sets[0]["metadata"]["name"], WORKER_INDEX: "0"},
                "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
            },
        },
    ]


def _one_unit(make: "_Pods", d: "Deployment", up: dict[str, Any]) -> dict[str, Any]:
    """A group of pods of which the first is the gateway, too."""
    [units] = d.units
    worker = make.pod("mixed", _join(make.name), _memory(d, units))
    return _set(make.name, make.name, 1, len(units.hosts), worker, up)


def _fleet(make: "_Pods", d: "Deployment", up: dict[str, Any]) -> list[dict[str, Any]]:
    """The gateway first."""
    sets = [_set(make.name + GATEWAY, make.name, 1, 1, up)]
    for units, name in zip(d.units, set_names(d, make.name), strict=True):
        pod = make.pod(units.role, _join(name), _memory(d, units))
        sets.append(_set(name, make.name, units.count, len(units.hosts) // units.count, pod))
    return sets


def _set(
    name: str, instance: str, replicas: int, size: int, worker: dict[str, Any], leader: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`replicas` groups of `size` pods; `leader`: how the first one of a group differs."""
    return {
        **_head("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", name, instance),
        "spec": {
            "replicas": replicas,
            "startupPolicy": "LeaderCreated",  # a gateway is ready only once the workers have joined it
            "networkConfig": {"subdomainPolicy": "Shared"},
            "leaderWorkerTemplate": {
                "size": size,
                "restartPolicy": "None",
                **({"leaderTemplate": leader} if leader else {}),
                "workerTemplate": worker,
            },
        },
    }


def _join(name: str) -> list[str]:
    return ["join", f"{CONFIG}/deploy.yaml", "--host", f"$(POD_NAME).{name}"]


def _memory(d: "Deployment", units: "Units") -> str:
    """Of a pod with ranks of `units`."""
    return str((d.rank_memory or 0) * units.ranks_per_host)


def set_names(d: "Deployment", name: str) -> list[str]:
    """Of the LeaderWorkerSet of each entry of `units`: NAME-prefill, NAME-decode, NAME-decode2."""
    roles = [u.role for u in d.units]
    before = [roles[:i].count(role) for i, role in enumerate(roles)]
    return [f"{name}-{role}{n + 1 if n else ''}" for role, n in zip(roles, before, strict=True)]


def pod_name(name: str, group: int, worker: int) -> str:
    """The DNS name of a pod of a group, inside its namespace, under subdomain policy Shared."""
    return f"{name}-{group}.{name}" if worker == 0 else f"{name}-{group}-{worker}.{name}"


def in_pods(deployed: "Deployed", name: str) -> "Deployment":
    """The deployment as the pods see it: their names, their folders."""
    from brigade.cli.ports import is_fleet

    d = deployed.what
    names = set_names(d, name) if is_fleet(d) else [name]
    units = []
    for u, of in zip(d.units, names, strict=True):
        sizes = [len(layout.hosts) for layout in u.layouts()]
        hosts = [pod_name(of, group, worker) for group, size in enumerate(sizes) for worker in range(size)]
        units.append(replace(u, hosts=tuple(hosts)))
    return replace(
        d,
        model=None if d.model is None else _mounted(deployed),
        listen=("0.0.0.0", PORT),
        api_key_file=f"{KEYS}/{API_KEY}",
        secret_file=f"{KEYS}/{SECRET}",
        gateway=pod_name(name + GATEWAY, 0, 0) if is_fleet(d) else None,
        units=tuple(units),
    )


def _mounted(deployed: "Deployed") -> str:
    """Where the checkpoint is inside a pod: its folder keeps its name, which clients ask for."""
    return f"{MODELS}/{deployed.served_name}"


def _head(version: str, kind: str, name: str, instance: str | None = None) -> dict[str, Any]:
    labels = _labels(instance or name.removesuffix(HTTP))
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}}


def _labels(instance: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "brigade", INSTANCE: instance}


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


@dataclass(frozen=True)
class _Pods:
    """What all pods have in common."""

    name: str
    image: str
    volumes: list[tuple[str, dict[str, Any]]]
    cpus: str
    n_with_ranks: int

    def pod(self, component: str, args: list[str], memory: str) -> dict[str, Any]:
        mounts = [{"name": v["name"], "mountPath": path, "readOnly": "emptyDir" not in v} for path, v in self.volumes]
        mounts[0]["subPath"] = "deploy.yaml"
        amount = {"cpu": self.cpus, "memory": memory}
        every = {
            "image": self.image,
            "resources": {"requests": amount, "limits": amount},
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        copy = f"umask 077 && cp -fL {GIVEN_KEYS}/{API_KEY} {GIVEN_KEYS}/{SECRET} {KEYS}/"
        copy_keys = {
            "name": "keys",
            **every,
            "command": ["sh", "-c", copy],
            "volumeMounts": [m for m in mounts if m["name"] in ("given-keys", "keys")],
        }
        container = {
            "name": "brigade",
            **every,
            "command": ["brigade", *args],
            "env": [
                {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "BRIGADE_CACHE", "value": SCRATCH},
                {"name": "HOME", "value": SCRATCH},
            ],
            "volumeMounts": [m for m in mounts if m["name"] != "given-keys"],
        }
        spec: dict[str, Any] = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 45,  # 30 s for running requests, and the end of the processes
            "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
            "initContainers": [copy_keys],
            "containers": [container],
            "volumes": [v for _, v in self.volumes],
        }
        if self.n_with_ranks > 1 and component != "gateway":
            spec["affinity"] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [self._apart()]}}
        return {"metadata": {"labels": {**_labels(self.name), COMPONENT: component}}, "spec": spec}

    def _apart(self) -> dict[str, Any]:
        """No two pods with ranks on one node; a gateway may be beside one."""
        return {
            "labelSelector": {
                "matchLabels": _labels(self.name),
                "matchExpressions": [{"key": COMPONENT, "operator": "NotIn", "values": ["gateway"]}],
            },
            "topologyKey": "kubernetes.io/hostname",
        }


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
