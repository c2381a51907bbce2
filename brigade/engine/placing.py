"""Where a unit's experts are at first, and how its ranks are grouped for placing them. No tensors, no clock."""

from brigade.core.placement import Loads, Placement, initial, place
from brigade.engine.config import EngineConfig
from brigade.spec.model import ModelSpec


def n_slots(config: EngineConfig, spec: ModelSpec) -> int:
    """Slots of a layer with routed experts, over all ranks."""
    return spec.moe.n_experts + config.redundant_experts if spec.moe else 0


def first_placement(config: EngineConfig, spec: ModelSpec, n_nodes: int = 1) -> Placement | None:
    """The placement before any load is known; None for a model without routed experts.

    `n_nodes`: groups of ranks that are near each other. Raises ValueError for redundant experts of a model without any.
    """
    if spec.moe is None or not spec.n_moe:
        if config.redundant_experts:
            raise ValueError(f"redundant_experts is {config.redundant_experts}, but the model has no routed experts")
        return None
    return initial(
        spec.n_moe,
        spec.moe.n_experts,
        n_slots=n_slots(config, spec),
        n_ranks=config.ranks,
        n_nodes=n_nodes,
        n_groups=spec.moe.n_groups,
    )


def better_placement(spec: ModelSpec, now: Placement, load_LE: Loads) -> Placement:
    """The placement that these loads ask for, of the same slots, ranks and nodes as the one that holds now."""
    return place(
        load_LE,
        n_slots=now.n_slots,
        n_groups=spec.moe.n_groups if spec.moe else 1,
        n_nodes=now.n_nodes,
        n_ranks=now.n_ranks,
    )
