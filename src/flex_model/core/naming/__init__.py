"""Names of the model: clean, by pattern, on other stages, under adapters."""
