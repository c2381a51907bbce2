"""The answer as plain values for programs: everything that the terminal and the report show, and every term."""

from dataclasses import asdict
from typing import Any

from brigade.plan.explained import explain
from brigade.plan.question import Answer, Option
from brigade.plan.rates import Calibration
from brigade.plan.serving import Workload


def as_data(a: Answer, c: Calibration) -> dict[str, Any]:
    """Numbers in base units; sentences in English."""
    q = a.question
    first = a.options[0]
    w = Workload(first.users, q.n_in, q.n_out, q.hit)
    return {
        "question": {
            "model": q.model.name, "model_from": q.model.found_by,
            "servers": [[s.n, s.per_node, s.device.name] for s in q.fleets], "users": q.users,
            "input": q.n_in, "output": q.n_out, "hit_rate": q.hit, "tpot_s": q.slo.tpot, "ttft_s": q.slo.ttft,
            "precision": q.precision_name, "kv": q.precision.kv, "engine": q.engine, "draft": q.can_draft,
            "balanced": q.loads.balanced, "loads": bool(q.loads.loads.counts), "night": q.night,
        },
        "sentence": str(a.sentence),
        "recommended": a.recommended is not None,
        "crossover": str(a.crossover),
        "crossover_nodes": [{"users": users, **row} for users, row in a.curve],
        "notes": [str(x) for x in a.notes],
        "assumptions": [str(x) for x in a.assumptions],
        "options": [option_data(o) for o in a.options],
        "terms_of_first_option": [{k: str(v) for k, v in vars(line).items()} for line in explain(first, c, w)],
        "calibration": a.about,
        "searched": {
            "layouts": sum(f.n_considered for _, f in a.found) + a.n_across,
            "units": sum(f.units.n_tried for _, f in a.found),
            "too_large": sum(f.units.n_dropped_memory for _, f in a.found),
            "too_slow": sum(f.units.n_dropped_bound for _, f in a.found),
        },
    }  # fmt: skip


def option_data(o: Option) -> dict[str, Any]:
    return {
        "deployment": str(o.name), "model": o.model, "family": o.family, "fits": o.fits, "why": str(o.why),
        "limit": o.limit, "nodes": o.layout.nodes, "cards": o.n_gpus, "devices": [d.name for d in o.devices],
        "users": o.users, "most_users": o.most_users, "most_users_80": o.most_users_range,
        "output_tok_s_card": o.tokens_per_gpu, "output_tok_s_node": o.tokens_per_node,
        "output_tok_s_card_full_80": o.tokens_range, "in_flight": o.served.in_flight,
        "ttft_s": dict(zip(("p50", "p90", "p99"), o.ttft, strict=True)),
        "tpot_s": dict(zip(("p50", "p90", "p99"), o.tpot, strict=True)),
        "ttft_factor_80": o.ttft_factor, "tpot_factor_80": o.tpot_factor,
        "usd_per_million_output": o.cost,
        "usd_per_million_output_80": None if o.cost is None else o.cost_range, "kilowatts": o.kilowatts,
        "units": [
            {"role": u.role, "count": k, "device": u.pool.device.name, "nodes": u.nodes, "grid": asdict(u.grid),
             "draft": u.pool.setup.draft, "users": u.users, "requests_s": u.rate, "tpot_s": u.tpot, "limit": u.limit}
            for u, k in o.layout.units
        ],
    }  # fmt: skip
