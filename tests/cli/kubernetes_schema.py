"""JSON schemas of the Kubernetes objects that `brigade manifest` writes, as far as it uses them.

The LeaderWorkerSet part follows the CustomResourceDefinition leaderworkersets.leaderworkerset.x-k8s.io, version v1
(kubernetes-sigs/lws, config/crd/bases): names, types, enums and required fields. The pod, Service and ConfigMap parts
follow the core v1 API. Only what is used is here, and everything else is refused: a misspelt field is an error.
"""

from typing import Any

Schema = dict[str, Any]


def obj(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def items(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
BOOL: Schema = {"type": "boolean"}
NATURAL: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
LABELS: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": "^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"},
}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}
AMOUNT = obj(cpu=QUANTITY, memory=QUANTITY)
METADATA = obj(("name",), name=NAME, labels=LABELS)

HTTP_GET = obj(("port",), path=TEXT, port={"anyOf": [PORT, NAME]})
PROBE = obj(
    exec=obj(command=items(TEXT)),
    httpGet=HTTP_GET,
    periodSeconds=POSITIVE,
    timeoutSeconds=POSITIVE,
    failureThreshold=POSITIVE,
)
CONTAINER = obj(
    ("name", "image"),
    name=NAME,
    image=TEXT,
    command=items(TEXT),
    env=items(obj(("name",), name=TEXT, value=TEXT, valueFrom=obj(fieldRef=obj(("fieldPath",), fieldPath=TEXT)))),
    ports=items(obj(("containerPort",), name=NAME, containerPort=PORT)),
    resources=obj(requests=AMOUNT, limits=AMOUNT),
    securityContext=obj(allowPrivilegeEscalation=BOOL, capabilities=obj(drop=items(TEXT))),
    volumeMounts=items(obj(("name", "mountPath"), name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=BOOL)),
    startupProbe=PROBE,
    livenessProbe=PROBE,
    readinessProbe=PROBE,
)
VOLUME = obj(
    ("name",),
    name=NAME,
    configMap=obj(name=NAME),
    secret=obj(secretName=NAME, defaultMode={"type": "integer", "minimum": 0, "maximum": 0o777}),
    emptyDir=obj(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    hostPath=obj(("path",), path=TEXT, type={"enum": ["Directory"]}),
    persistentVolumeClaim=obj(("claimName",), claimName=NAME, readOnly=BOOL),
)
EXPRESSION = obj(
    ("key", "operator"), key=TEXT, operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, values=items(TEXT)
)
SELECTOR = obj(matchLabels=LABELS, matchExpressions=items(EXPRESSION))
APART = obj(("topologyKey",), topologyKey=TEXT, labelSelector=SELECTOR)
POD = obj(
    ("containers",),
    automountServiceAccountToken=BOOL,
    enableServiceLinks=BOOL,
    terminationGracePeriodSeconds=NATURAL,
    securityContext=obj(runAsNonRoot=BOOL, runAsUser=NATURAL, runAsGroup=NATURAL, fsGroup=NATURAL),
    initContainers=items(CONTAINER),
    containers=items(CONTAINER),
    volumes=items(VOLUME),
    affinity=obj(podAntiAffinity=obj(requiredDuringSchedulingIgnoredDuringExecution=items(APART))),
)
TEMPLATE = obj(metadata=obj(labels=LABELS), spec=POD)

LEADER_WORKER_SET = obj(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata=METADATA,
    spec=obj(
        ("leaderWorkerTemplate",),
        replicas=NATURAL,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        networkConfig=obj(("subdomainPolicy",), subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
        leaderWorkerTemplate=obj(
            ("workerTemplate",),
            size=POSITIVE,
            restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate=TEMPLATE,
            workerTemplate=TEMPLATE,
        ),
    ),
)
CONFIG_MAP = obj(
    ("apiVersion", "kind", "metadata"),
    apiVersion={"const": "v1"},
    kind={"const": "ConfigMap"},
    metadata=METADATA,
    data={"type": "object", "additionalProperties": {"type": "string"}},
)
SERVICE = obj(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "v1"},
    kind={"const": "Service"},
    metadata=METADATA,
    spec=obj(selector=LABELS, ports=items(obj(("port",), name=NAME, port=PORT, targetPort={"anyOf": [PORT, NAME]}))),
)
BY_KIND = {"ConfigMap": CONFIG_MAP, "LeaderWorkerSet": LEADER_WORKER_SET, "Service": SERVICE}
