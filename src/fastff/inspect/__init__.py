"""What a conditional model does with its trees: how rows spread over them, and which way single tokens take."""

from fastff.inspect.routing import Routing, collect, conditional_layers, decisions, routed_layers, visited

__all__ = ["Routing", "collect", "conditional_layers", "decisions", "routed_layers", "visited"]
