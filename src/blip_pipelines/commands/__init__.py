"""Commands that a person types beside Kedro's own; one module a subject, light at import."""
