"""Pictures of results: accuracy and coverage against density, heads, attention maps."""

from experiments.report.pictures.accuracy_density import draw_accuracy_density
from experiments.report.pictures.attention_maps import draw_attention_maps
from experiments.report.pictures.capture import (
    CapturedCall,
    capture_call,
    capture_calls,
    choose_head,
    choose_heads,
)
from experiments.report.pictures.looks import LOOKS, Look, look_of
from experiments.report.pictures.map_gallery import draw_map_gallery

__all__ = [
    "LOOKS",
    "CapturedCall",
    "Look",
    "capture_call",
    "capture_calls",
    "choose_head",
    "choose_heads",
    "draw_accuracy_density",
    "draw_attention_maps",
    "draw_map_gallery",
    "look_of",
]
