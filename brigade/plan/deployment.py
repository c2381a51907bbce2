"""The deployment file of an option, as `brigade up` reads it. Host names are placeholders: the planner knows none."""

from collections.abc import Sequence

from brigade.plan.question import Option, Question

WEIGHTS = {"fp8": "int8", "int8": "int8", "bf16": "bf16", "int4": "int4", "fp4": "int4"}
"""What Brigade's own kernels keep in as many bytes."""


def runnable(options: Sequence[Option], model: str) -> Option | None:
    """The first option for the model that Brigade itself can run: its ranks are attention replicas of one card each,
    without pipeline stages."""
    return next((o for o in options if o.model == model and what_brigade_lacks(o) is None), None)


def what_brigade_lacks(o: Option) -> str | None:
    """What an option needs that Brigade cannot do; None: nothing."""
    if tp := next((u.grid.tp for u, _ in o.layout.units if u.grid.tp > 1), 0):
        return f"attention over {tp} cards (TP{tp})"
    if pp := next((u.grid.pp for u, _ in o.layout.units if u.grid.pp > 1), 0):
        return f"{pp} pipeline stages (PP{pp})"
    return None


def deployment_yaml(o: Option, q: Question) -> str:
    """YAML text: model, units, their hosts and limits."""
    least = min(u.pool.device.hbm for u, _ in o.layout.units)
    lines = [
        f"# written by brigade plan: {o.name}",
        f"# {o.why}",
        "# put your hosts' addresses, the model's folder and your key files in place of these",
        f"model: {q.model.found_by}",
        f"weights: {WEIGHTS[q.precision_name]}",
        f"rank_memory: {int(least // 1e9)}GB",
        "listen: 127.0.0.1:8000",
        "secret_file: keys/hosts",
        "units:",
    ]
    host = 1
    for u, k in o.layout.units:
        nodes = max(1, int(u.nodes))
        hosts = [f"node{i}" for i in range(host, host + nodes * k)]
        host += nodes * k
        lines += [
            f"  - role: {u.role}",
            f"    count: {k}",
            f"    hosts: [{', '.join(hosts)}]",
            f"    ranks_per_host: {u.grid.n_gpus // nodes}",
        ]
        if u.grid.redundant:
            lines.append(f"    redundant_experts: {u.grid.redundant}")
        running = max(1, int(u.users / u.grid.dp)) if u.users else 64
        lines += ["    limits:", f"      max_running: {min(4096, running)}", f"      max_context: {q.n_in + q.n_out}"]
    return "\n".join(lines) + "\n"
