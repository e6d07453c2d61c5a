"""Key orders: how keys move inside their segments before blocks are selected."""

from pbs.orders.base import Order
from pbs.registry import Registry

ORDERS = Registry(
    "order",
    {
        "none": "pbs.orders.none:NaturalOrder",
        "last_block": "pbs.orders.last_block:LastBlockOrder",
    },
)

__all__ = ["ORDERS", "Order"]
