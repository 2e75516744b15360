"""What runs a plan: `protocol` decides, `host` does it on the real clock, `backends` start the workers."""
