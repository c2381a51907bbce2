"""Ray places the hosts that join the gateway: one supervisor actor on each. The only user of Ray, an optional extra.

1. connect to the cluster, from the machine of it that is the gateway
2. a placement group reserves each host's ranks, of all units, one host a node; what is missing at the deadline is named
3. each actor runs the supervisor that `brigade join` runs; Ray starts it again if its process dies
4. the gateway's end ends the actors

Ray only places. It sees a host that was cut off after a minute; the supervisors and the head notice it by themselves.
"""

import importlib.util
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from brigade.cli.fault import Fault
from brigade.spec.layout import Layout

if TYPE_CHECKING:
    from brigade.cli.launch import Launch

PLACE_S = 60.0
"""Seconds for all hosts to be placed."""
CONNECT_S = 5.0
JOIN_S = 600.0
PIN = 0.001
"""How much of a node's own resource a host takes: only to be on that node."""


@contextmanager
def placed(launch: "Launch", address: str, seconds: float = PLACE_S) -> Iterator[None]:
    """The other hosts call the gateway as long as this lasts. Raises Fault if they cannot be placed."""
    if launch.hosts is None:
        raise Fault(f"{launch.deployed.file}: --ray is for several hosts; give hosts in 'units'", 2)
    n_ranks = ranks_by_host(launch.hosts.here, launch.layouts)
    ray = _connect(address)
    group, actors = None, []
    try:
        group = _reserve(ray, n_ranks, seconds)
        actors = _start(ray, group, launch, n_ranks)
        yield
    finally:
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            ray.util.remove_placement_group(group)
        ray.shutdown()


def ranks_by_host(gateway: str, layouts: Sequence[Layout]) -> dict[str, int]:
    """How many ranks, of all units, each host has; the gateway is one, also without any. Pure."""
    out = {gateway: 0}
    for host in (host for layout in layouts for host in layout.hosts):
        out[host.address] = out.get(host.address, 0) + host.n_ranks
    return out


def missing(n_ranks: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps hosts with so many ranks from being placed on these nodes (`ray.nodes()`). Pure."""
    alive = {str(n["NodeManagerAddress"]): n.get("Resources", {}) for n in nodes if n.get("Alive")}
    out = []
    for address, n in n_ranks.items():
        if address not in alive:
            out.append(f"{address} is no node of the cluster ({', '.join(sorted(alive)) or 'it has none'})")
        elif (cpus := alive[address].get("CPU", 0)) < n:
            out.append(f"{address} has {cpus:g} CPUs in all, fewer than its {n} ranks")
    return out


def _connect(address: str) -> Any:
    """Ray itself, connected. Raises Fault."""
    if importlib.util.find_spec("ray") is None:
        raise Fault("--ray needs Ray: pip install 'brigade[ray]'", 2)
    _check_reachable(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import: nothing about this cluster is told to anybody
    import ray

    try:
        ray.init(address=address, namespace="brigade", logging_level="warning", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise Fault(f"--ray {address}: {e}; this machine must be part of the cluster: run `ray start` here") from e
    return ray


def _check_reachable(address: str) -> None:
    """Ray waits long for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise Fault(f"--ray must be HOST:PORT of the cluster, like 10.0.0.1:6379, not {address!r}", 2)
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as e:
        raise Fault(f"--ray {address}: no cluster answers there ({e}); start it with `ray start --head`") from e


def _reserve(ray: Any, n_ranks: Mapping[str, int], seconds: float) -> Any:
    """A placement group with a bundle for each host, on the node with its address. Raises Fault at the deadline."""
    from ray.util.placement_group import placement_group

    bundles = [{**({"CPU": float(n)} if n else {}), f"node:{address}": PIN} for address, n in n_ranks.items()]
    group = placement_group(bundles, strategy="STRICT_SPREAD")
    if group.wait(timeout_seconds=seconds):
        return group
    why = missing(n_ranks, ray.nodes()) or ["its nodes have the CPUs, but others use them"]
    ray.util.remove_placement_group(group)
    raise Fault(f"Ray did not place the hosts within {seconds:g} s: {'; '.join(why)}")


def _start(ray: Any, group: Any, launch: "Launch", n_ranks: Mapping[str, int]) -> list[Any]:
    """A supervisor on each host but the gateway, which is the first."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # Its process may die with the machine: it is started again, and so is its one call, until it is killed.
    supervisor = ray.remote(max_restarts=-1, max_task_retries=-1)(Supervisor)
    actors = []
    for i, (host, n) in list(enumerate(n_ranks.items()))[1:]:
        join = launch.join(host, JOIN_S)
        where = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=i)
        actor = supervisor.options(num_cpus=n, scheduling_strategy=where).remote()
        actor.run.remote(*join.head, join.address, join.secret, join.model, join.wait, dict(join.terms))
        actors.append(actor)
    return actors


class Supervisor:
    """The actor: runs one host's ranks until the head ends them."""

    async def run(
        self, host: str, port: int, address: str, secret: bytes, model: str, wait: float, terms: dict[str, str]
    ) -> str:
        """Why it ended; what goes wrong is in the log of the head, too."""
        import logging

        from brigade.engine.supervisor import HeadMissing, HostRefused, JoinConfig, supervise

        logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        config = JoinConfig(head=(host, port), address=address, secret=secret, model=model, wait=wait, terms=terms)
        try:
            return (await supervise(config)).text
        except (HostRefused, HeadMissing) as e:
            logging.getLogger("brigade.supervisor").error("%s", e)
            return str(e)
