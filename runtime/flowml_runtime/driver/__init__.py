"""The driver: loads plans, feeds steps, collects results, and conducts fits."""
