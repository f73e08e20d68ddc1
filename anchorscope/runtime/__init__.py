"""Running a transformers model with anchor attention in place of its own prefill attention."""
