"""The REST API: routes over what `autoeff.search` does."""
