"""Does it fit, on which mesh: closed-form memory and time (imports no jax), and ahead-of-time compilation as the proof."""

from llama_jax.plan.rank import Plan, plan_on, plans
from llama_jax.plan.request import PlanRequest, make_request
from llama_jax.plan.topology import Topology, parse_topology

__all__ = ["Plan", "PlanRequest", "Topology", "make_request", "parse_topology", "plan_on", "plans"]
