"""Reads an outputs folder, whoever made it, into tables, pictures, notebooks and a report."""
