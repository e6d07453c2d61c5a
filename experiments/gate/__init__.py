"""Is it right: plans, rows and coverage against exact attention."""
