"""A step of a pipeline: its microbatches put together, and what hooks hand from stage to stage."""
