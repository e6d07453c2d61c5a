"""Plug-ins into model libraries."""
