"""How much of the attention a method keeps, exactly, per layer and head."""
