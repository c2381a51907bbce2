"""Ray places the other hosts of a unit: one supervisor actor on each. The only user of Ray, an optional extra.

1. connect to the cluster, from a machine of it that is the unit's first host
2. a placement group reserves each host's ranks, one host a node; what is missing at the deadline is named
3. each actor runs the supervisor that `brigade join` runs; Ray starts it again if its process dies
4. the unit's end ends the actors

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
    """The unit's other hosts call the head as long as this lasts. Raises Fault if they cannot be placed."""
    if launch.hosts is None:
        raise Fault(f"{launch.deployed.file}: --ray is for units on several hosts; give units[0].hosts", 2)
    ray = _connect(address)
    group, actors = None, []
    try:
        group = _reserve(ray, launch.layout, seconds)
        actors = _start(ray, group, launch)
        yield
    finally:
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            ray.util.remove_placement_group(group)
        ray.shutdown()


def missing(layout: Layout, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps hosts of the layout from being placed on these nodes (`ray.nodes()`). Pure."""
    alive = {str(n["NodeManagerAddress"]): n.get("Resources", {}) for n in nodes if n.get("Alive")}
    out = []
    for host in layout.hosts:
        if host.address not in alive:
            out.append(f"{host.address} is no node of the cluster ({', '.join(sorted(alive)) or 'it has none'})")
        elif (cpus := alive[host.address].get("CPU", 0)) < host.n_ranks:
            out.append(f"{host.address} has {cpus:g} CPUs in all, fewer than its {host.n_ranks} ranks")
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


def _reserve(ray: Any, layout: Layout, seconds: float) -> Any:
    """A placement group with a bundle for each host, on the node with its address. Raises Fault at the deadline."""
    from ray.util.placement_group import placement_group

    bundles = [{"CPU": float(h.n_ranks), f"node:{h.address}": PIN} for h in layout.hosts]
    group = placement_group(bundles, strategy="STRICT_SPREAD")
    if group.wait(timeout_seconds=seconds):
        return group
    why = missing(layout, ray.nodes()) or ["its nodes have the CPUs, but others use them"]
    ray.util.remove_placement_group(group)
    raise Fault(f"Ray did not place the hosts within {seconds:g} s: {'; '.join(why)}")


def _start(ray: Any, group: Any, launch: "Launch") -> list[Any]:
    """A supervisor on each host but the first."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # Its process may die with the machine: it is started again, and so is its one call, until it is killed.
    supervisor = ray.remote(max_restarts=-1, max_task_retries=-1)(Supervisor)
    actors = []
    for i, host in enumerate(launch.layout.hosts[1:], 1):
        join = launch.join(host.address, JOIN_S)
        where = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=i)
        actor = supervisor.options(num_cpus=host.n_ranks, scheduling_strategy=where).remote()
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
