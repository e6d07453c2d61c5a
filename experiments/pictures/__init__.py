"""Pictures of results: accuracy against density, and attention maps with the computed tiles."""

from experiments.pictures.accuracy_density import draw_accuracy_density
from experiments.pictures.attention_maps import draw_attention_maps
from experiments.pictures.capture import CapturedCall, capture_call, choose_head
from experiments.pictures.looks import LOOKS, Look, look_of

__all__ = [
    "LOOKS",
    "CapturedCall",
    "Look",
    "capture_call",
    "choose_head",
    "draw_accuracy_density",
    "draw_attention_maps",
    "look_of",
]
