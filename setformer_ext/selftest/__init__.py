"""``setformer selftest``: the numeric suite and a benchmark on the user's own device."""
