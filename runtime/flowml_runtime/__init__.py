"""flowml's runtime: what runs a plan. `protocol` decides, `host` does it on the real clock, `backends` start workers."""
