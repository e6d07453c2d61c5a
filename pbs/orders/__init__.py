"""Key orders: how keys move inside their segments before blocks are selected."""

from pbs.orders.base import Order
from pbs.registry import Registry

ORDERS = Registry(
    "order",
    {
        "none": "pbs.orders.none:NaturalOrder",
        "last_block": "pbs.orders.last_block:LastBlockOrder",
        "random_query": "pbs.orders.random_query:RandomQueryOrder",
        "adaptive": "pbs.orders.adaptive:AdaptiveOrder",
        "avg_query": "pbs.orders.avg_query:AverageQueryOrder",
        "greedy": "pbs.orders.greedy:GreedyOrder",
        "random": "pbs.orders.random:RandomOrder",
        "spread": "pbs.orders.spread:SpreadOrder",
    },
)


def build_order(name: str, params: dict[str, object]) -> Order:
    """Make an order; an unknown name or parameter raises ValueError with the valid ones."""
    order = ORDERS.build(name, params)
    assert isinstance(order, Order)
    return order


__all__ = ["ORDERS", "Order", "build_order"]
